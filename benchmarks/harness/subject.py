"""The model that is measured: SmolLM2-135M-Instruct, pulled into the home that the environment names."""

from __future__ import annotations

import os
from pathlib import Path

from lapis.cli.output import say
from lapis.errors import LapisError
from lapis.home import Home
from lapis.model.store import ModelStore, StoredModel

NAME = "smollm2-135m-instruct"


def find_model() -> StoredModel | None:
    """The pulled model, or None after saying how to get it. `make` keeps it with what the tests need."""
    tests = os.environ.get("LAPIS_TEST_MODELS")
    home = Home(Path(tests)) if tests else Home.default()
    try:
        return ModelStore(home).get(NAME)
    except LapisError:
        say(f"{NAME} is needed and not there. Run: lapis pull {NAME}")
        return None
