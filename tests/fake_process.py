"""A server in a process of its own whose answers never end by themselves: `python -m tests.fake_process HOME`."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from lapis.home import Home
from lapis.inference.fake import FakeEngine
from lapis.server import serve
from tests.served import model_folder


@contextmanager
def server_processes(home: Home, count: int) -> Iterator[list[str]]:
    """The URLs of so many servers over one home and its database; ended with the block."""
    if not (home.models / "tiny").exists():
        model_folder(home.models / "tiny")
    command = [sys.executable, "-m", "tests.fake_process", str(home.root)]
    with ExitStack() as stack:
        started = []
        for _ in range(count):
            process = subprocess.Popen(
                command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1]
            )
            stack.enter_context(process)
            stack.callback(process.terminate)  # which settles what was used
            started.append(process)
        urls = []
        for process in started:
            assert process.stdout is not None
            urls.append(process.stdout.readline().strip())
        yield urls


if __name__ == "__main__":
    serve(
        Home(Path(sys.argv[1])),
        ["tiny"],
        port=0,
        console=False,
        load=lambda _, name: FakeEngine(name, reply=lambda prompt, seed: "on and " * 200),
        ready=lambda server: print(server.url, flush=True),
    )
