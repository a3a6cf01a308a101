"""From nothing to the first step: wall time of `lapis train` in a new process until its first step is done.

The data lies prepared, as it does after the first start; Lapis compiles nothing when it starts, so there is no cache to
warm. Beside it nanoGPT's first step with torch.compile from a warm cache, in a new process as well. The caches of the
operating system are warm on both sides: each is started once before.

    python benchmarks/cold_start.py [--shape 14m|gpt2-124m] [--rounds 3] [--threads 2]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from harness.process import EngineFailed
from harness.training import SIZES, SUBJECTS, Trainee

from lapis.cli.output import print_table, say

WANTED = 12.0  # seconds
PEER = "nanogpt-given"
RECIPE = """
name = "cold-start"

[[data.sources]]
kind = "environment"

[data]
max_bytes = 3_000_000

[tokenizer]
vocab_size = 50257

[model]
name = "{model}"

[train]
steps = 1
sequence = {sequence}
batch = {batch}
optimizer = "adamw"
seed = {seed}
"""


def lapis_start(shape: str, home: Path, seed: int, threads: int) -> float:
    """Seconds from the start of `lapis train` to the event of its first step."""
    size = SIZES[shape]
    recipe = home.parent / f"cold-start-{seed}.toml"
    recipe.write_text(RECIPE.format(model=size.model, sequence=size.sequence, batch=size.batch, seed=seed))
    environment = {**os.environ, "LAPIS_HOME": str(home), "OMP_NUM_THREADS": str(threads)}
    begin = time.time()
    command = [sys.executable, "-m", "lapis.cli.main", "train", str(recipe)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise EngineFailed(f"lapis train: {done.stderr[-500:]}")
    newest = max((home / "runs").iterdir(), key=lambda folder: (folder / "events.jsonl").stat().st_mtime)
    events = [json.loads(line) for line in (newest / "events.jsonl").read_text().splitlines()]
    first: float = next(event["time"] for event in events if event["event"] == "step")
    return first - begin


def peer_start(shape: str, threads: int) -> float:
    """Seconds from the start of the peer's process to the end of its first step."""
    subject = next(subject for subject in SUBJECTS if subject.worker == PEER)
    begin = time.perf_counter()
    trainee = Trainee(subject, SIZES[shape], threads)
    trainee.warm_up(1)
    seconds = time.perf_counter() - begin
    trainee.group.end()
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=["14m", "gpt2-124m"], default="gpt2-124m")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    peer = next(subject for subject in SUBJECTS if subject.worker == PEER)
    found: dict[str, list[float]] = {"Lapis": []}
    if peer.there():
        found[peer.title] = []
    with tempfile.TemporaryDirectory() as place:
        for number in range(options.rounds + 1):
            for name, seconds in found.items():
                if name == "Lapis":
                    seconds.append(lapis_start(options.shape, Path(place) / "home", number, options.threads))
                else:
                    seconds.append(peer_start(options.shape, options.threads))
    say(f"{options.shape}, from nothing to the end of the first step, {options.rounds} rounds")
    rows = []
    for name, seconds in found.items():
        wanted = f"≤ {WANTED:.0f}" if name == "Lapis" else ""
        rows.append([name, f"{statistics.median(seconds[1:]):.1f}", f"{seconds[0]:.1f}", wanted])
    print_table(["what", "seconds", "the very first time (with data, compiling)", "wanted"], rows)


if __name__ == "__main__":
    main()
