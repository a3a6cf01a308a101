"""OpenAI's metadata: up to 16 pairs of short texts that a caller hangs on an object."""

from __future__ import annotations

from typing import Annotated

from pydantic import BeforeValidator

MAX_METADATA = 16


def read_metadata(value: object) -> object:
    """Up to 16 pairs of short texts; null means none."""
    if value is None:
        return {}
    if not isinstance(value, dict) or len(value) > MAX_METADATA:
        raise ValueError(f"must be an object of at most {MAX_METADATA} texts")
    for name, text in value.items():
        if len(name) > 64 or not isinstance(text, str) or len(text) > 512:
            raise ValueError("names have at most 64 characters, values are strings of at most 512")
    return value


Metadata = Annotated[dict[str, str], BeforeValidator(read_metadata)]
