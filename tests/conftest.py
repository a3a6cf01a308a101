"""What all tests share: a home of their own, hypothesis without deadlines or chance."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

from lapis.home import Home

settings.register_profile("lapis", deadline=None, derandomize=True, print_blob=False)
settings.load_profile("lapis")


@pytest.fixture(autouse=True)
def _own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test touches the user's home, whatever the environment says."""
    monkeypatch.setenv("LAPIS_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("LAPIS_DATABASE_URL", raising=False)


@pytest.fixture
def home(tmp_path: Path) -> Home:
    """A fresh home."""
    return Home(tmp_path / "home")


# Small models in several processes at once: one thread each, or they wait for each other at every barrier.
# Read when torch is loaded, here and in every child process; tests about threads set their number themselves.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Without a GPU the Triton kernels are tried in Triton's interpreter; read when triton is loaded, by whomever.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")
