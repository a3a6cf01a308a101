"""SIGKILL while checkpoints are being saved, at a dozen random moments: what was saved still loads."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import torch

from lapis.checkpoint.retention import Retention
from lapis.checkpoint.sharded import latest, load, save

KILLS = 12

# For every line: forks a saver (every other one saves in the background), kills it after so many seconds, and
# tells the last step whose save returned.
DRIVER = """
import json, os, signal, sys, time
from pathlib import Path
import torch
from lapis.checkpoint.retention import Retention
from lapis.checkpoint.saver import Saver
from lapis.checkpoint.sharded import save

torch.set_num_threads(1)
folder, first, beside = Path(sys.argv[1]), 0, False
for line in sys.stdin:
    reader, writer = os.pipe()
    beside = not beside
    child = os.fork()
    if child == 0:
        step, w, saver = first, torch.empty(1 << 21, dtype=torch.int64), Saver(folder, Retention(2))
        while True:
            step += 1
            if beside:
                saver.start(step, {"model": {"w": w.fill_(step)}}, {"step": step})
                w.fill_(-1)  # the training goes on
                saver.wait()
            else:
                save(folder, step, {"model": {"w": w.fill_(step)}}, {"step": step}, keep=Retention(2))
            os.write(writer, step.to_bytes(8, "little"))
    os.close(writer)
    time.sleep(float(line))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    done = os.read(reader, 1 << 16)
    os.close(reader)
    first = int.from_bytes(done[-8:], "little") if done else first
    print(json.dumps(first), flush=True)
"""


def test_killed_at_a_dozen_random_moments_the_newest_checkpoint_loads(tmp_path: Path) -> None:
    moments = random.Random(7)
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert driver.stdin is not None
    assert driver.stdout is not None
    reported, interrupted = 0, 0
    with driver:
        for _ in range(KILLS):
            driver.stdin.write(f"{moments.uniform(0.0, 0.5)}\n")
            driver.stdin.flush()
            reported = json.loads(driver.stdout.readline())
            interrupted += any(path.name.startswith(".saving-") for path in tmp_path.iterdir())
            found = latest(tmp_path)
            if found is None:
                assert reported == 0
                continue
            assert found.step in (reported, reported + 1)  # + 1: committed, but killed before it could say so
            groups, state = load(found)
            assert state == {"step": found.step}
            assert torch.equal(groups["model"]["w"], torch.full((1 << 21,), found.step))
        driver.stdin.close()
    assert driver.returncode == 0
    assert reported > 0
    assert interrupted > 0, "no kill fell into a save: the test would prove nothing"
    save(tmp_path, reported + 2, {"model": {"w": torch.zeros(1)}}, {}, keep=Retention(1))
    assert len([path for path in tmp_path.iterdir() if path.name != ".lock"]) == 1  # leftovers are gone
