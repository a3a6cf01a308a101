"""docs/api.md's table of the client's methods against the installed client: none is missing, none is made up."""

from __future__ import annotations

import inspect
import re
from functools import cached_property
from pathlib import Path

import openai

PAGE = Path(__file__).parents[2] / "docs" / "client.md"
TURNED = ("with_raw_response", "with_streaming_response")  # other forms of the same methods


def methods(resource: object, prefix: str = "") -> set[str]:
    """Dotted names of all methods below a resource."""
    found: set[str] = set()
    for name, member in inspect.getmembers(type(resource)):
        if name.startswith("_") or name in TURNED:
            continue
        if isinstance(member, cached_property | property):
            found |= methods(getattr(resource, name), f"{prefix}{name}.")
        elif inspect.isfunction(member):
            found.add(f"{prefix}{name}")
    return found


def whole_client() -> set[str]:
    """Every method of every resource of the client."""
    with openai.OpenAI(api_key="none") as client:
        groups = [
            name
            for name, member in inspect.getmembers(openai.OpenAI)
            if isinstance(member, cached_property) and not name.startswith("_") and name not in TURNED
        ]
        return {method for name in groups for method in methods(getattr(client, name), f"{name}.")}


def table() -> dict[str, str]:
    """Names or groups (`audio.*`) and what the page says of them."""
    rows = re.findall(r"^\| (.+?) \| (.+?) \|$", PAGE.read_text(), re.MULTILINE)
    return {name: said for names, said in rows for name in re.findall(r"`([\w.*]+)`", names)}


def test_every_method_of_the_client_stands_in_the_table() -> None:
    client, rows = whole_client(), table()
    assert len(client) > 300
    groups = [name.removesuffix("*") for name in rows if name.endswith(".*")]
    named = {name for name in rows if not name.endswith(".*")}
    missing = {name for name in client - named if not any(name.startswith(group) for group in groups)}
    assert not missing
    assert not named - client
    assert not [group for group in groups if not any(name.startswith(group) for name in client)]
    assert all(said.startswith(("works", "not offered", "in part")) for said in rows.values())
