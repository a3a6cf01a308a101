"""The data pipeline under fire: killed, interrupted, out of space, fed a line of 200 MB."""

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
from pathlib import Path

import pytest

from lapis.config import load
from lapis.data.pipeline import prepare
from lapis.data.shards import Dataset
from lapis.home import Home
from lapis.train.recipe import Recipe
from tests.texts import write_corpus

RECIPE = """
[data]
document_chars = 4000
[[data.sources]]
path = "{path}"
[data.heldout]
min_bytes = 2000
[tokenizer]
vocab_size = 600
[train]
steps = 1
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe over 5 MB of text in files of 12 KB: two parts, four shards."""
    folder = tmp_path_factory.mktemp("recipe")
    write_corpus(folder / "text", 400, count=1800)
    path = folder / "recipe.toml"
    path.write_text(RECIPE.format(path=folder / "text"))
    return path


@pytest.fixture(scope="module")
def whole(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """What an unbroken run makes of the recipe."""
    loaded = load(recipe, Recipe)
    dataset = prepare(loaded.sources, loaded.tokenizer, Home(tmp_path_factory.mktemp("home")), workers=1)
    assert len(dataset.manifest["shards"]) > 2
    return dataset


def start(recipe: Path, home: Path, *options: str, limit: int = 0) -> subprocess.Popen[bytes]:
    """`lapis data prepare` in a process group of its own; `limit` is the largest file it may write."""

    def restrict() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    return subprocess.Popen(
        [sys.executable, "-m", "lapis.cli.main", "data", "prepare", str(recipe), *options],
        env={**os.environ, "LAPIS_HOME": str(home)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        preexec_fn=restrict if limit else None,
    )


def finish(process: subprocess.Popen[bytes]) -> tuple[int, str]:
    _, errors = process.communicate(timeout=120)
    return process.returncode, errors.decode()


def members(group: int) -> list[int]:
    """Processes of a process group that are still alive."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            state, _, owner = entry.joinpath("stat").read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue
        if int(owner) == group and state != "Z":
            found.append(int(entry.name))
    return found


def wait_for_end(groups: list[int]) -> None:
    """Every worker of these process groups ends by itself, soon."""
    deadline = time.monotonic() + 10
    while any(members(group) for group in groups):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def files(dataset: Dataset) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in dataset.folder.iterdir() if path.name != "report.json"}


def made_dataset(home: Path) -> Dataset:
    """The one dataset of a home."""
    (folder,) = home.glob("data/tokens-*")
    return Dataset.open(folder)


def half_written(home: Path) -> list[Path]:
    return [path for path in home.rglob("*") if path.name.endswith((".part", ".work"))]


@pytest.mark.parametrize("kills", [4, pytest.param(12, marks=pytest.mark.long)])
def test_killed_at_random_moments_it_gives_the_same_bytes(
    recipe: Path, whole: Dataset, tmp_path: Path, kills: int
) -> None:
    home = tmp_path / "home"
    groups, interrupted = [], 0
    for moment in random.Random(7).choices(range(20, 160), k=kills):  # hundredths of a second
        process = start(recipe, home, "--workers", "2")
        groups.append(process.pid)
        try:
            process.wait(moment / 100)
        except subprocess.TimeoutExpired:
            interrupted += 1
        process.kill()  # only the parent: its workers must notice
        process.communicate()
        if process.returncode == 0:  # it came through: check it, and be killed at the beginning again
            assert files(made_dataset(home)) == files(whole)
            shutil.rmtree(home)
    assert interrupted >= kills // 2
    assert finish(start(recipe, home))[0] == 0
    assert files(made_dataset(home)) == files(whole)
    assert half_written(home) == []
    wait_for_end(groups)


@pytest.mark.long
def test_killed_while_it_annotates_it_goes_on_where_it_was(
    recipe: Path, whole: Dataset, tmp_path: Path
) -> None:
    home = tmp_path / "home"
    process = start(recipe, home, "--workers", "1")
    while not (done := list(home.glob("data/.quality-*.work/part-*.json"))):
        assert process.poll() is None
        time.sleep(0.002)
    process.kill()
    process.communicate()
    assert not list(home.glob("data/quality-*")), "it was killed inside the stage"
    parts = {path.name: path.stat().st_ino for path in done}
    assert finish(start(recipe, home, "--workers", "2"))[0] == 0
    (stage,) = home.glob("data/quality-*")
    assert {name: (stage / name).stat().st_ino for name in parts} == parts, "not made again"
    assert files(made_dataset(home)) == files(whole)


def test_a_full_disk_is_an_error_and_the_next_run_finishes(
    recipe: Path, whole: Dataset, tmp_path: Path
) -> None:
    home = tmp_path / "home"
    for limit in (100_000, 4_000_000):  # a file may not grow beyond it: each run fails further on
        status, errors = finish(start(recipe, home, "--workers", "2", limit=limit))
        assert (status, "Traceback" in errors) in ((9, False), (0, False))
        assert status == 0 or "No space left" in errors
        assert limit > 100_000 or status == 9
        assert not [path for path in home.rglob("*.part") if path.is_file()]
    assert finish(start(recipe, home))[0] == 0
    assert half_written(home) == []
    assert files(made_dataset(home)) == files(whole)


def at_work(process: subprocess.Popen[bytes]) -> None:
    """Wait until a worker of a run is there, beside the command, its resource tracker and what workers fork from."""
    while len(members(process.pid)) < 4:
        time.sleep(0.01)
        assert process.poll() is None


def test_ctrl_c_ends_it_at_once_with_130(recipe: Path, tmp_path: Path) -> None:
    process = start(recipe, tmp_path / "home", "--workers", "2")
    at_work(process)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: parent and workers
    status, errors = finish(process)
    assert status == 130
    assert "Traceback" not in errors
    wait_for_end([process.pid])


def test_workers_end_with_their_parent(recipe: Path, tmp_path: Path) -> None:
    process = start(recipe, tmp_path / "home", "--workers", "2")
    at_work(process)
    process.kill()
    wait_for_end([process.pid])
    process.communicate()


@pytest.mark.long
def test_a_line_of_200_megabytes_is_cut_and_memory_stays_bounded(tmp_path: Path) -> None:
    write_corpus(tmp_path / "text", 40, count=400)
    with (tmp_path / "text" / "line.txt").open("wb") as file:
        for _ in range(200):
            file.write(b"abcdefgh" * 125_000)
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(RECIPE.format(path=tmp_path / "text"))
    script = (
        "import sys\n"
        "from lapis.cli.data import group\n"
        "group(['prepare', sys.argv[1], '--workers', '1', '--json'], standalone_mode=False)\n"
        "status = open('/proc/self/status').read()\n"  # ru_maxrss would count the parent's memory
        "print('peak', status.split('VmHWM:')[1].split()[0], file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(recipe)],
        env={**os.environ, "LAPIS_HOME": str(tmp_path / "home")},
        capture_output=True,
        text=True,
        check=True,
    )
    quality = next(step for step in json.loads(done.stdout)["steps"] if step["step"] == "quality")
    assert quality["bytes_in"] > 200_000_000
    assert list(quality["reasons"]) == ["too few words"]
    assert quality["reasons"]["too few words"] >= 50_000  # pieces of 4000 characters
    assert int(done.stderr.rsplit("peak", 1)[1]) / 1024 < 400  # MiB, of which the imports take most
