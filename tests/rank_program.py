"""A small training program for tests of the supervisor: an all-reduce each step, a checkpoint every few steps.

`main(folder, steps, every, step_s, fault…)`; a fault is "RANK:STEP:WHAT" with WHAT an exit status, "slow" (from that
step on), or in a run's first attempt "nursery": the process that bore the rank is killed.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from lapis.checkpoint.retention import Retention
from lapis.checkpoint.sharded import latest, load, save
from lapis.log import EventLog
from lapis.train.heartbeat import Heartbeat

SIZE = 1 << 18


def main(arguments: Sequence[str]) -> None:
    folder, steps, every, step_s = (
        Path(arguments[0]),
        int(arguments[1]),
        int(arguments[2]),
        float(arguments[3]),
    )
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, events = dist.get_rank(), EventLog(folder / "events.jsonl")
    heartbeat, step, weights = Heartbeat.of_environment(), 0, torch.zeros(SIZE, dtype=torch.float64)
    checkpoint = latest(folder / "checkpoints")
    if checkpoint is not None:
        loaded = load(checkpoint)
        weights, step = loaded.groups["model"]["weights"].clone(), loaded.state["step"]
    if rank == 0:
        events.write("start")
        events.write("resume", step=step)
        print("it is told", file=sys.stderr)
    heartbeat.stepped(step)
    anew = step == 0
    while step < steps:
        began = time.monotonic()
        gradient = torch.sin(weights + step + rank)
        time.sleep(step_s)
        _fail(arguments[4:], rank, step, step_s, anew)
        heartbeat.waits(time.monotonic() - began)
        dist.all_reduce(gradient)
        weights, step = 0.5 * weights + gradient, step + 1
        heartbeat.stepped(step)
        if rank == 0:
            events.write("step", step=step)
        if step % every == 0 or step == steps:
            with heartbeat.busy():
                if rank == 0:
                    save(
                        folder / "checkpoints",
                        step,
                        {"model": {"weights": weights}},
                        {"step": step},
                        keep=Retention(2),
                    )
                dist.barrier()


def _fail(faults: Sequence[str], rank: int, step: int, step_s: float, anew: bool) -> None:
    for fault in faults:
        where, when, what = fault.split(":")
        if int(where) != rank or step < int(when):
            continue
        if what == "slow":
            time.sleep(4 * step_s)
        elif what.isdecimal():
            print("it fails on purpose", file=sys.stderr, flush=True)
            sys.exit(int(what))
        elif anew:
            os.kill(os.getppid(), signal.SIGKILL)
