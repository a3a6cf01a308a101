"""Checkpoints over several processes: saved by two, loaded by four and by one; a failing or dying rank."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from lapis.checkpoint.sharded import latest, load

# Forks so many ranks; each calls `work` and prints what it returns.
RANKS = """
import json, os, resource, signal, sys, threading
from pathlib import Path
import torch
import torch.distributed as dist
from lapis.checkpoint import tensors
from lapis.checkpoint.piece import Box, Part, Sharded
from lapis.checkpoint.ranks import Ranks
from lapis.checkpoint.retention import Retention
from lapis.checkpoint.saver import Saver
from lapis.checkpoint.sharded import latest, load, save
from lapis.errors import LapisError

torch.set_num_threads(1)
folder, size = Path(sys.argv[1]), int(sys.argv[2])
WHOLE = torch.arange(96.0).reshape(8, 12)

def rows(start, end, data=None, owned=True):
    box = Box((start, 0), (end - start, 12))
    return Part(box, WHOLE[start:end].clone() if data is None else data, owned)

def attempt(action):
    try:
        return action()
    except LapisError as error:
        return f"{type(error).__name__}: {error.message}"

WORK

children = []
for rank in range(size):
    if (child := os.fork()) == 0:
        dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=size)
        print(json.dumps({"rank": rank, "found": work(rank)}) + chr(10), end="", flush=True)
        os._exit(0)
    children.append(child)
for child in children:
    os.waitpid(child, 0)
"""


def run_ranks(folder: Path, size: int, work: str) -> dict[int, Any]:
    code = RANKS.replace("WORK", work)
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder), str(size)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert lines, done.stderr
    return {line["rank"]: line["found"] for line in lines}


def test_saved_by_two_loaded_by_four_saved_beside_and_loaded_by_one(tmp_path: Path) -> None:
    found = run_ranks(
        tmp_path,
        4,
        """
def work(rank):
    pair = dist.new_group([0, 1], backend="gloo")
    if rank < 2:  # rows; the middle ones are on both, and owned by the first
        parts = (rows(0, 4), rows(4, 6)) if rank == 0 else (rows(4, 6, owned=False), rows(6, 8))
        one = Sharded((), (Part(Box((), ()), torch.tensor(3), rank == 1),))
        groups = {"model": {"w": Sharded((8, 12), parts), "one": one}}
        save(folder / "two", 5, groups, {"rank": rank}, Retention(2), ranks=Ranks(pair))
    dist.barrier()
    column = torch.zeros(8, 3)  # columns
    one = torch.tensor(0)
    box = Box((0, 3 * rank), (8, 3))
    wanted = {"model": {"w": Sharded((8, 12), (Part(box, column),)), "one": one}}
    state = load(latest(folder / "two"), wanted).state
    saver = Saver(folder / "four", Retention(2))
    saver.start(6, {"model": {"w": wanted["model"]["w"]}}, state)
    again = column.clone()
    column.zero_()
    dist.barrier()  # the training talks meanwhile
    checkpoint = saver.wait()
    saver.close()
    files = sorted(checkpoint.manifest.files)
    return [torch.equal(again, WHOLE[:, 3 * rank : 3 * rank + 3]), one.item(), state, checkpoint.step, files]
""",
    )
    files = [*(f"model.000{rank}-of-0004.safetensors" for rank in range(1, 5)), "state.json"]
    assert found == {rank: [True, 3, {"rank": 0}, 6, files] for rank in range(4)}
    for name in ("two", "four"):
        checkpoint = latest(tmp_path / name)
        assert checkpoint is not None
        assert torch.equal(load(checkpoint).groups["model"]["w"], torch.arange(96.0).reshape(8, 12))


def test_a_failing_rank_stops_the_commit_on_all_and_a_dead_one_leaves_no_half_checkpoint(
    tmp_path: Path,
) -> None:
    found = run_ranks(
        tmp_path,
        2,
        """
def work(rank):
    ranks, checkpoints, told = Ranks.own(), folder / "run", []
    groups = {"model": {"w": Sharded((8, 12), (rows(4 * rank, 4 * rank + 4),))}}
    def step(number, values=groups):
        return attempt(lambda: save(checkpoints, number, values, {}, Retention(1), ranks=ranks).step)
    told.append(step(1))
    if rank == 1:  # its disk is full
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    told.append(step(2))
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    told.append(step(3, {"model": {"w": Sharded((8, 12), (rows(0, 4),))}}))
    told.append(step(4))
    told.append(sorted(path.name[:13] for path in checkpoints.iterdir()))
    dist.barrier()
    if rank == 1:
        tensors.write = lambda *args: os.kill(os.getpid(), signal.SIGKILL)
    told.append(step(5))
    told.append(latest(checkpoints).step)
    told.append(sorted(path.name[:13] for path in checkpoints.iterdir()))
    return told
""",
    )
    assert found.keys() == {0}  # the other was killed
    first, full, twice, again, files, dead, newest, left = found[0]
    assert (first, again, newest) == (1, 4, 4)
    assert full.startswith("StorageError: No space left while writing")
    assert twice.startswith("InputError: The checkpoint of step 3 is refused: tensor w of model: ")
    assert dead.startswith("UnavailableError: A process of this run did not answer rank 0")
    assert files == left == [".lock", "step-00000004"]


def test_ranks_of_a_run_save_at_the_same_steps_and_fall_back_to_the_same_checkpoint(tmp_path: Path) -> None:
    """Their clocks do not agree: one of them finds that it is time much later."""
    found = run_ranks(
        tmp_path,
        2,
        """
from lapis.train.checkpoints import Checkpoints, Snapshot
from lapis.train.goodput import Spent
from lapis.train.recipe import CheckpointSection
from lapis.train.run import Run

def work(rank):
    run, due = Run(folder / "run"), []
    groups = {"model": {"w": Sharded((8, 12), (rows(4 * rank, 4 * rank + 4),))}}
    with Checkpoints(run, CheckpointSection(seconds=0.05 if rank == 0 else 99.0, keep=9), Spent()) as checkpoints:
        for step in range(1, 13):
            threading.Event().wait(0.02)
            checkpoints.poll()
            if checkpoints.due(step):
                checkpoints.begin(Snapshot(step, groups, {}, None))
                due.append(step)
        checkpoints.finish(Snapshot(13, groups, {}, None))
        if rank == 0:
            path = latest(run.checkpoints).folder / "model.0002-of-0002.safetensors"
            path.write_bytes(path.read_bytes()[:-1] + b"x")
        dist.barrier()
        newest = checkpoints.newest().step
    dist.barrier()
    told = {name: [event.get("step") for event in run.events.read(name)] for name in ("checkpoint", "fallback")}
    return [due, newest, told]
""".replace("from lapis.train.checkpoints", "import threading\nfrom lapis.train.checkpoints", 1),
    )
    due, newest, events = found[0]
    assert found[1] == found[0]
    assert len(due) >= 2
    assert newest == due[-1]
    assert events == {"checkpoint": [*due, 13], "fallback": [None]}
