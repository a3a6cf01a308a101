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
from harness.training import SIZES, SUBJECTS, Subject, Trainee

from lapis.cli.output import print_table, say
from lapis.train.peak import gemm_flops

STEPS = {"laptop": 3, "14m": 3, "gpt2-124m": 1}  # in a round
WANTED = {  # our rate over the peer's, with AdamW
    "14m": {"nanogpt-given": 1.25},
    "gpt2-124m": {"nanogpt-given": 1.3, "litgpt": 1.4, "transformers": 1.4, "nanogpt": 3.5},
}
WANTED_MFU, WANTED_PEAK = 0.80, 3.6e9  # of gpt2-124m


class Match:
    """Lapis with AdamW, at work all the time, against one peer after the other: two processes hold memory, not six."""

    def __init__(self, shape: str, threads: int) -> None:
        self.shape, self.size, self.threads = shape, SIZES[shape], threads
        self.peaks: list[float] = []
        self.rows: list[list[str]] = []
        self.ours = self._started(SUBJECTS[0])

    def _started(self, subject: Subject) -> Trainee:
        trainee = Trainee(subject, self.size, self.threads)
        try:
            trainee.warm_up(2)
        except EngineFailed:
            trainee.group.end()
            raise
        return trainee

    def duel(self, subject: Subject, rounds: int) -> None:
        """Measure the limit, Lapis and the peer in turn, and note the peer's row."""
        try:
            peer = self._started(subject)
        except EngineFailed as error:
            say(f"left out: {error}")
            return
        before = len(self.ours.seconds)
        for _ in range(rounds):
            self.round(peer)
        ratio = statistics.median(peer.seconds) / statistics.median(self.ours.seconds[before:])
        wanted = WANTED.get(self.shape, {}).get(subject.worker)
        goal = "" if wanted is None else f"≥ {wanted:g}×: {_yes(ratio >= wanted)}"
        self.rows.append([subject.title, *self._figures(peer), f"{ratio:.2f}×", goal])
        peer.group.end()

    def round(self, peer: Trainee) -> None:
        """One turn of each."""
        self.peaks.append(gemm_flops(10))
        for trainee in (self.ours, peer):
            trainee.measure(STEPS[self.shape])

    def _figures(self, trainee: Trainee) -> tuple[str, str, str]:
        mfu = f"{self._mfu(trainee):.2f}"
        return f"{trainee.rate:,.0f}", mfu, f"{trainee.peak / 1e9:.2f} GB"

    def _mfu(self, trainee: Trainee) -> float:
        flops = self.size.config.flops_per_token(self.size.sequence)
        return trainee.rate * flops / statistics.median(self.peaks)

    def show(self) -> None:
        """The table."""
        goals = ""
        if self.shape == "gpt2-124m" and self.rows:
            mfu, peak = self._mfu(self.ours), self.ours.peak
            goals = f"MFU ≥ {WANTED_MFU}: {_yes(mfu >= WANTED_MFU)}, "
            goals += f"≤ {WANTED_PEAK / 1e9} GB: {_yes(peak <= WANTED_PEAK)}"
        say(
            f"\n{self.shape}: {self.size.config.parameters / 1e6:.1f} M parameters, {self.size.batch} × "
            f"{self.size.sequence} tokens; bf16 matrix product {statistics.median(self.peaks) / 1e9:,.0f} GFLOP/s"
        )
        ours = [self.ours.subject.title, *self._figures(self.ours), "1", goals]
        print_table(["step", "tokens/s", "MFU", "peak memory", "Lapis is", "wanted"], [ours, *self.rows])


def _yes(met: bool) -> str:
    return "yes" if met else "no"


def peers(shape: str, only: list[str]) -> list[Subject]:
    """Whom Lapis is measured against; Lapis with another optimizer is one of them."""
    found = []
    for subject in SUBJECTS[1:]:
        if subject.gpt2_only and SIZES[shape].config.family != "gpt2":
            continue
        if only and not any(word in subject.worker for word in only):
            continue
        if subject.there():
            found.append(subject)
        else:
            say(f"{subject.title}: not installed (make bench-peers)")
    return found


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
        match = Match(shape, options.threads)
        try:
            for subject in peers(shape, options.only):
                match.duel(subject, options.rounds)
            match.show()
        finally:
            match.ours.group.end()


if __name__ == "__main__":
    main()
