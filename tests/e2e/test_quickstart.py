"""The whole way as a user goes it: the command line in processes of its own, killed, repeated, misused."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from lapis.cli.main import lapis as commands
from lapis.db import open_database
from lapis.errors import LapisError
from lapis.home import Home
from lapis.release.registry import Registry
from tests.corpus import write_corpus

pytestmark = pytest.mark.sqlite  # homes of several names, and one variable for the database of all processes
MINUTES = "0.05"
KILLS = 12


def start(home: Path, *arguments: str, limit: Callable[[], None] | None = None) -> subprocess.Popen[str]:
    """`lapis ARGUMENTS` in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "lapis.cli.main", *arguments],
        env={**os.environ, "LAPIS_HOME": str(home)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=limit,
    )


def lapis(home: Path, *arguments: str, limit: Callable[[], None] | None = None) -> tuple[int, str, str]:
    child = start(home, *arguments, limit=limit)
    out, err = child.communicate(timeout=240)
    return child.returncode, out, err


def quickstart(home: Path, texts: Path) -> dict[str, Any]:
    status, out, err = lapis(home, "quickstart", "--text", str(texts), "--minutes", MINUTES, "--json")
    assert status == 0, err
    facts: dict[str, Any] = json.loads(out)
    return facts


def dataset_digests(home: Path) -> set[str]:
    return {path.parent.name for path in (home / "data").glob("tokens-*/manifest.json")}


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("texts"), ("email", "json", "http"))


@pytest.fixture(scope="module")
def done(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A home in which a quickstart has gone the whole way."""
    home = tmp_path_factory.mktemp("home")
    return home, quickstart(home, texts)


def test_the_whole_way_ends_with_an_answer(done: tuple[Path, dict[str, Any]]) -> None:
    home, facts = done
    assert [stage["name"] for stage in facts["stages"]] == ["data", "train", "evaluate", "release", "ask"]
    assert facts["answer"].strip()
    assert 0 < facts["evaluation"]["bits_per_byte"] < 8
    assert set(facts["evaluation"]["yardsticks"]) == {"5-gram", "xz -9e"}
    release = Registry(Home(home), open_database(Home(home).database_url)).show(facts["release"])
    assert release.state == "live"
    assert release.lineage.dataset is not None


def test_the_second_time_everything_is_there(done: tuple[Path, dict[str, Any]], texts: Path) -> None:
    home, first = done
    again = quickstart(home, texts)
    assert [stage["name"] for stage in again["stages"] if stage["new"]] == ["ask"]
    assert (again["run"], again["release"], again["answer"]) == (
        first["run"],
        first["release"],
        first["answer"],
    )


def test_its_commands_go_on_from_there(done: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    home, facts = done
    status, out, _ = lapis(home, "runs", "show", "last")
    assert status == 0
    assert facts["run"] in out
    status, out, _ = lapis(home, "chat", facts["release"], "--once", "import", "--max-tokens", "8")
    assert status == 0
    assert out.strip()
    plot = tmp_path / "plot.png"
    assert lapis(home, "runs", "plot", "last", "--out", str(plot))[0] == 0
    assert plot.read_bytes().startswith(b"\x89PNG")
    status, out, _ = lapis(home, "evaluate", "last", "--json")
    assert status == 0
    assert json.loads(out)["bits_per_byte"] == facts["evaluation"]["bits_per_byte"]


def test_other_text_is_another_run(done: tuple[Path, dict[str, Any]], texts: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    # a server that ends removes them; the database makes them anew
    shutil.copytree(done[0], home, ignore=shutil.ignore_patterns("lapis.db-*"))
    more = tmp_path / "more"
    shutil.copytree(texts, more)
    (more / "note.txt").write_text("A note about the way from text to tokens, and back again. " * 40)
    status, _, err = lapis(home, "data", "prepare", str(_recipe(tmp_path, more)), "--json")
    assert status == 0, err
    assert len(dataset_digests(home)) == 2


@pytest.mark.long
def test_killed_a_dozen_times_it_ends_with_the_same_shards(
    done: tuple[Path, dict[str, Any]], texts: Path, tmp_path: Path
) -> None:
    chance = random.Random(20261124)
    home = tmp_path / "killed"
    for _ in range(KILLS):
        child = start(home, "quickstart", "--text", str(texts), "--minutes", MINUTES, "--json")
        time.sleep(chance.uniform(0.3, 7.0))
        os.killpg(child.pid, signal.SIGKILL)
        child.communicate()
    facts = quickstart(home, texts)
    assert facts["answer"]
    assert dataset_digests(home) == dataset_digests(done[0])
    leftovers = [path for path in (home / "data").iterdir() if ".part" in path.name]
    assert not leftovers


@pytest.mark.long
def test_two_at_once_in_one_home(texts: Path, tmp_path: Path) -> None:
    home = tmp_path / "shared"
    first = start(home, "quickstart", "--text", str(texts), "--minutes", "5")
    while not (home / "quickstart.lock").exists() or not (home / "quickstart.lock").read_text():
        assert first.poll() is None
        time.sleep(0.02)
    status, _, err = lapis(home, "quickstart", "--text", str(texts), "--minutes", MINUTES)
    assert status == 5
    assert f"in use by process {first.pid}" in err
    assert first.poll() is None  # it goes on
    first.send_signal(signal.SIGINT)
    first.communicate(timeout=120)
    assert first.returncode == 130


@pytest.mark.long
def test_ctrl_c_while_it_trains_loses_nothing(texts: Path, tmp_path: Path) -> None:
    home = tmp_path / "interrupted"
    child = start(home, "quickstart", "--text", str(texts), "--minutes", "5")
    while not list((home / "runs").glob("*/events.jsonl")) or '"step"' not in _events(home):
        assert child.poll() is None, child.communicate()
        time.sleep(0.05)
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=20)
    assert child.returncode == 130
    assert "Traceback" not in err
    assert list((home / "runs").glob("*/checkpoints/step-*"))


def test_ctrl_c_while_it_reads_ends_at_once(texts: Path, tmp_path: Path) -> None:
    child = start(tmp_path / "home", "quickstart", "--text", str(texts), "--minutes", "5")
    assert child.stdout is not None
    assert child.stdout.readline().startswith("data")
    os.killpg(child.pid, signal.SIGINT)  # as a terminal does it: to the whole group
    _, err = child.communicate(timeout=20)
    assert child.returncode == 130
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("make", "minutes", "said"),
    [
        (lambda folder: None, "0", "training needs more than no time"),
        (lambda folder: folder.rmdir(), "1", "There is no file or folder"),
        (lambda folder: None, "1", "holds no files"),
        (lambda folder: (folder / "image.bin").write_bytes(bytes(range(256)) * 400), "1", "no text"),
        (lambda folder: shutil.copy(json.scanner.__file__, folder / "short.py"), "1", "held"),
    ],
    ids=["no time", "no folder", "empty folder", "binary files", "too little text"],
)
def test_bad_input_is_named_and_changes_nothing(
    tmp_path: Path, make: Callable[[Path], object], minutes: str, said: str
) -> None:
    folder = tmp_path / "input"
    folder.mkdir()
    make(folder)
    options = ["quickstart", "--text", str(folder), "--minutes", minutes]
    with pytest.raises(LapisError, match=said) as caught:
        CliRunner().invoke(commands, options, catch_exceptions=False, standalone_mode=False)
    assert caught.value.exit_status == 2


@pytest.mark.long
def test_a_full_disk_is_named_and_the_next_try_finishes(texts: Path, tmp_path: Path) -> None:
    home = tmp_path / "full"

    def small_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, 2_000_000))

    status, _, err = lapis(home, "quickstart", "--text", str(texts), "--minutes", MINUTES, limit=small_files)
    assert status == 9, err
    assert "No space left" in err
    assert "Traceback" not in err
    assert quickstart(home, texts)["answer"]


def _events(home: Path) -> str:
    return "".join(path.read_text() for path in (home / "runs").glob("*/events.jsonl"))


def _recipe(folder: Path, texts: Path) -> Path:
    path = folder / "recipe.toml"
    path.write_text(f'[[data.sources]]\npath = "{texts}"\n[train]\nsteps = 1\n')
    return path
