"""Servers for tests: a real home, registry, database and HTTP server; only the model is the FakeEngine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lapis.gateway.memory import MemoryBudget
from lapis.home import Home
from lapis.inference.fake import FakeEngine
from lapis.model import manifest
from lapis.model.manifest import Manifest, Source
from lapis.server import RunningServer, running_server


def model_folder(folder: Path, text: str = "weights") -> Path:
    """A sound model folder; its weights are only looked at by their digest."""
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_text(text)
    files = manifest.describe_files(folder)
    facts = Manifest(
        digest=manifest.digest_of_files(files),
        source=Source("gguf", "test", "Apache-2.0"),
        files=files,
        parameters=1,
        add_bos=True,
        bos_id=0,
        stop_ids=(0,),
    )
    (folder / manifest.NAME).write_text(facts.to_json())
    return folder


@contextmanager
def fake_server(
    home: Home, *names: str, load: bool = True, memory: MemoryBudget | None = None, **engine: Any
) -> Iterator[RunningServer]:
    """A server on a free port with pulled models of these names (`tiny` if none is given)."""
    for name in names or ("tiny",):
        if not (home.models / name).exists():
            model_folder(home.models / name, name)
    asked = (names or ("tiny",)) if load else ()
    make = lambda _, name: FakeEngine(name, **engine)  # noqa: E731
    with running_server(home, asked, load=make, memory=memory) as server:
        yield server
