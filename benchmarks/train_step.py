"""A training step beside nanoGPT, litgpt and transformers: tokens a second, MFU and memory, each in its own process.

All take the same work: forward, backward, clipping to 1.0, AdamW, on a model of the same sizes (Lapis with Muon, its
default, takes more). Windows hold no document border, so that all sides do the same attention. Rounds: every subject
takes some steps while the others are stopped; medians. MFU is against the rate of a large bf16 matrix product, measured
in every round: the limit. Peak memory is all that the process ever held.

    python benchmarks/train_step.py [--shape laptop|14m|gpt2-124m|all] [--threads 2] [--rounds 5] [--only WORD]

14m: GPT-2 of 14 M parameters, 8 windows of 256 tokens; gpt2-124m: 2 windows of 1,024; laptop: as 14m, but Llama's
form, beside transformers alone. Peers are installed by `make bench-peers`; those that are not there are left out.
"""

from __future__ import annotations

import argparse
import signal
import statistics
import sys

import torch
from harness.process import EngineFailed
from harness.training import SIZES, SUBJECTS, Trainee

from lapis.cli.output import print_table, say
from lapis.train.peak import gemm_flops

STEPS = {"laptop": 3, "14m": 3, "gpt2-124m": 1}  # in a round
WANTED = {  # our rate over the peer's, with AdamW
    "14m": {"nanogpt-given": 1.25},
    "gpt2-124m": {"nanogpt-given": 1.3, "litgpt": 1.4, "transformers": 1.4, "nanogpt": 3.5},
}
WANTED_MFU, WANTED_PEAK = 0.80, 3.6e9  # of gpt2-124m
OURS = "lapis-adamw"


class Match:
    """All subjects of one shape, started, and what was measured."""

    def __init__(self, shape: str, only: list[str], threads: int) -> None:
        self.shape, self.size = shape, SIZES[shape]
        self.peaks: list[float] = []
        self.trainees: dict[str, Trainee] = {}
        for subject in SUBJECTS:
            named = not only or subject.worker == OURS or any(word in subject.worker for word in only)
            if not named or (subject.gpt2_only and self.size.config.family != "gpt2"):
                continue
            if not subject.there():
                say(f"{subject.title}: not installed (make bench-peers)")
                continue
            self._start(subject.worker, Trainee(subject, self.size, threads))

    def _start(self, name: str, trainee: Trainee) -> None:
        try:
            trainee.warm_up(2)
        except EngineFailed as error:
            trainee.group.end()
            say(f"left out: {error}")
            return
        self.trainees[name] = trainee

    def round(self) -> None:
        """Measure the limit, then everybody in turn."""
        self.peaks.append(gemm_flops(2))
        for trainee in self.trainees.values():
            trainee.measure(STEPS[self.shape])

    def end(self) -> None:
        """End all processes."""
        for trainee in self.trainees.values():
            trainee.group.end()

    def show(self) -> None:
        """The table."""
        limit = statistics.median(self.peaks)
        config = self.size.config
        say(
            f"\n{self.shape}: {config.parameters / 1e6:.1f} M parameters, {self.size.batch} × {self.size.sequence} "
            f"tokens; bf16 matrix product {limit / 1e9:,.0f} GFLOP/s (the limit)"
        )
        print_table(
            ["step", "tokens/s", "Lapis is", "wanted", "MFU", "peak memory"],
            [self._row(name, trainee, limit) for name, trainee in self.trainees.items()],
        )

    def _row(self, name: str, trainee: Trainee, limit: float) -> list[str]:
        ours = self.trainees[OURS].rate / trainee.rate
        mfu = trainee.rate * trainee.size.config.flops_per_token(trainee.size.sequence) / limit
        wanted = WANTED.get(self.shape, {}).get(name)
        goals = ["" if wanted is None else f"≥ {wanted:g}× {'yes' if ours >= wanted else 'no'}"]
        if name == OURS and self.shape == "gpt2-124m":
            goals = [f"MFU ≥ {WANTED_MFU} {'yes' if mfu >= WANTED_MFU else 'no'}"]
            goals += [f"≤ {WANTED_PEAK / 1e9} GB {'yes' if trainee.peak <= WANTED_PEAK else 'no'}"]
        return [
            trainee.subject.title,
            f"{trainee.rate:,.0f}",
            f"{ours:.2f}×",
            ", ".join(goals),
            f"{mfu:.2f}",
            f"{trainee.peak / 1e9:.2f} GB",
        ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=[*SIZES, "all"], default="all")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", action="append", default=[], metavar="WORD", help="peers whose name has it")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the subjects are ended too
    for shape in SIZES if options.shape == "all" else [options.shape]:
        match = Match(shape, options.only, options.threads)
        try:
            if OURS not in match.trainees:
                sys.exit(1)
            for _ in range(options.rounds):
                match.round()
            match.show()
        finally:
            match.end()


if __name__ == "__main__":
    main()
