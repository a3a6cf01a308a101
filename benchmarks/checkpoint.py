"""What a checkpoint costs the training: wall time of steps with one being saved beside them, and without.

GPT-2 of 124 M parameters, 2 windows of 1,024 tokens, AdamW: 1.7 GB of weights and optimizer state. Stretches of steps
with and without a checkpoint are taken in turn. The cost of a checkpoint is what its stretch took longer (with the
time for which it blocks, and that of everything it does beside the steps); the overhead is that cost over the time of
the steps between two checkpoints. A stretch is longer than a checkpoint takes, so all of its cost is seen.

    python benchmarks/checkpoint.py [--every 50] [--stretch 5] [--rounds 2] [--shape 14m|gpt2-124m] [--folder DIR]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from harness.training import SIZES, Size
from torch import Tensor

from lapis.checkpoint.retention import Retention
from lapis.checkpoint.saver import Saver
from lapis.cli.output import print_table, say
from lapis.data.loader import TokenBatch
from lapis.kernels.memory import keep_freed_memory
from lapis.model.families import build
from lapis.train.pretrain import token_loss
from lapis.train.recipe import TrainSection
from lapis.train.replica import Alone

WANTED, WANTED_BLOCKING = 0.02, 0.05
SMALL = 64 << 20  # bytes


class Training:
    """Steps of a model on random tokens."""

    def __init__(self, size: Size) -> None:
        model = build(size.config)
        model.init_weights(0)
        self.size, self.section = size, TrainSection(steps=1, optimizer="adamw", lr=6e-4, embed_lr=6e-4)
        self.replica = Alone(model, self.section)

    def step(self) -> None:
        """One step."""
        ids = torch.randint(0, self.size.config.vocab_size, (self.size.tokens + 1,)).numpy()
        micro = TokenBatch(ids[:-1], ids[1:], (self.size.sequence,) * self.size.batch)
        loss = self.replica.backward(lambda model, micro: token_loss(model, micro, self.size.tokens), [micro])
        numbers = self.replica.finish(loss)
        self.replica.update(numbers.norm, lr=self.section.lr, embed_lr=self.section.embed_lr)

    def stretch(self, steps: int) -> float:
        """Seconds of some steps."""
        start = time.perf_counter()
        for _ in range(steps):
            self.step()
        return time.perf_counter() - start


def saved_stretch(training: Training, saver: Saver, number: int, steps: int) -> tuple[float, float, float]:
    """Seconds of as many steps and a checkpoint beside them; for how long it blocked; when it was committed."""
    start = time.perf_counter()
    saver.start(number, training.replica.groups(), {"step": number})
    blocked = time.perf_counter() - start
    committed = 0.0
    for _ in range(steps):
        training.step()
        if not saver.busy and not committed:
            committed = time.perf_counter() - start
    saver.wait()
    seconds = time.perf_counter() - start
    return seconds, blocked, committed or seconds


def blocking_of_small(folder: Path) -> list[float]:
    """Seconds for which the start of a 64 MiB checkpoint blocks, one after the other."""
    tensors: dict[str, Tensor] = {f"part{n}": torch.randn(SMALL // 4 // 16) for n in range(16)}
    saver, seconds = Saver(folder, Retention(keep=1)), []
    for number in range(6):
        start = time.perf_counter()
        saver.start(number, {"model": tensors}, {})
        seconds.append(time.perf_counter() - start)
        saver.wait()
    saver.close()
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--shape", choices=list(SIZES), default="gpt2-124m")
    parser.add_argument("--every", type=int, default=50, help="steps between two checkpoints")
    parser.add_argument("--stretch", type=int, default=5, help="steps that are timed with and without one")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="where to save; a folder of its own is made in it")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    training = Training(SIZES[options.shape])
    training.stretch(2)
    with tempfile.TemporaryDirectory(dir=options.folder) as place:
        small = blocking_of_small(Path(place) / "small")
        saver = Saver(Path(place) / "large", Retention(keep=1))
        saved_stretch(training, saver, 0, options.stretch)  # the first one takes the memory
        plain, saved = [], []
        for number in range(options.rounds):
            plain.append(training.stretch(options.stretch))
            saved.append(saved_stretch(training, saver, number + 1, options.stretch))
        saver.close()
    step = statistics.median(plain) / options.stretch
    costs = [seconds - without for (seconds, _, _), without in zip(saved, plain, strict=True)]
    share = statistics.median(costs) / (options.every * step)
    say(f"{options.shape}: a step takes {step:.2f} s; {options.rounds} rounds of {options.stretch} steps")
    blocked, committed = (statistics.median(values) for values in list(zip(*saved, strict=True))[1:])
    print_table(
        ["what", "measured", "wanted"],
        [
            [f"overhead of a checkpoint every {options.every} steps", f"{share:.2%}", f"≤ {WANTED:.0%}"],
            ["  seconds that a checkpoint costs", f"{statistics.median(costs):.2f}", ""],
            ["  of them blocking", f"{blocked:.3f}", ""],
            ["  seconds until it is committed", f"{committed:.1f}", ""],
            ["blocking time of 64 MiB, later ones, s", f"{max(small[1:]):.3f}", f"≤ {WANTED_BLOCKING}"],
            ["blocking time of 64 MiB, the first, s", f"{small[0]:.3f}", ""],
        ],
    )


if __name__ == "__main__":
    main()
