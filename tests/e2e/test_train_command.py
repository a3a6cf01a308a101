"""`lapis train` as a user starts, stops and repeats it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.texts import write_corpus

RECIPE = """
name = "small"
[data]
sources = [{ path = "texts" }]
[data.filters]
enabled = false
[data.heldout]
min_bytes = 2000
[tokenizer]
vocab_size = 512
[model]
name = "tiny"
[train]
steps = 4
sequence = 32
batch = 2
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_corpus(tmp_path / "texts", 40)
    (tmp_path / "small.toml").write_text(RECIPE)
    return tmp_path


def start(folder: Path, *options: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "lapis.cli.main", "train", "small.toml", "--workers", "1", *options],
        cwd=folder,
        env={**os.environ, "LAPIS_HOME": str(folder / "home")},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_ctrl_c_tells_where_it_stopped_and_how_to_go_on(folder: Path) -> None:
    process = start(folder, "--set", "train.steps=1000000")
    while not any('"step"' in path.read_text() for path in folder.glob("home/runs/*/events.jsonl")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    told, empty, last = errors.splitlines()[-3:]
    assert "stopped at step" in told and "the same command goes on from it" in told
    assert (empty, last) == ("", "Interrupted; what was complete is kept.")


def test_a_finished_run_is_not_said_to_train(folder: Path) -> None:
    first, _ = start(folder).communicate(timeout=120)
    again, _ = start(folder).communicate(timeout=120)
    assert "training on" in first and "training on" not in again
    assert "it is finished already" in again and "step 4, loss" in again
