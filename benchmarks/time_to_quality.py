"""How long Lapis trains until it is as good as nanoGPT is after ten minutes: 14 M parameters, English prose.

nanoGPT gets bf16 autocast and torch.compile, and trains with its AdamW defaults for so many minutes; compiling is not
counted. Lapis trains with its defaults (Muon) for the part of that time that is wanted. Both read the same token
shards in windows of 256 tokens, 8 in a step, and are measured on the same held-out documents in windows of 256 tokens;
measuring is not counted. They train in turn, for some seconds each, so that what else the machine does slows down both.

    make bench-peers PEERS=nanogpt
    python benchmarks/time_to_quality.py [--minutes 10] [--share 0.5] [--threads 2] [--plot FILE.png] [--json FILE]

The text is the English prose of ../shared/data/corpus.parquet, beside this checkout; without it nothing is measured.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from harness.installed import stamp
from harness.process import Group
from harness.training import COMPILED, KEEP_FREED, SPIN

from lapis.cli.output import print_table, say
from lapis.data.pipeline import prepare
from lapis.data.recipe import DataConfig, HeldoutConfig, SourceConfig, TokenizerConfig
from lapis.data.shards import Dataset
from lapis.home import Home

CORPUS = Path(__file__).parents[2] / "shared" / "data" / "corpus.parquet"
WORKER = Path(__file__).parent / "harness" / "quality_worker.py"
ENVIRONMENTS = {"lapis": SPIN, "nanogpt": COMPILED | KEEP_FREED}
POINTS = 10  # measurements of a side
SLICE = 5.0  # seconds of one turn
HELDOUT_BYTES = 100_000


@dataclass
class Side:
    """One learner in its own process, and its curve of seconds and bits per byte."""

    name: str
    minutes: float
    group: Group
    curve: list[tuple[float, float]] = field(default_factory=list)
    steps: int = 0

    @property
    def end(self) -> float:
        """Seconds that it trains for."""
        return 60 * self.minutes

    def stops(self) -> Iterator[tuple[float, bool]]:
        """Until when each of its turns goes, and whether it is measured then."""
        yield 0.0, True
        step = self.end / POINTS
        for point in range(POINTS):
            turns = max(1, round(step / SLICE))
            for turn in range(1, turns + 1):
                yield step * (point + turn / turns), turn == turns

    def ask(self, **what: Any) -> dict[str, Any]:
        """Let it work, and stop it again."""
        self.group.proceed()
        self.group.input.write(json.dumps(what).encode() + b"\n")
        self.group.input.flush()
        answer = self.read()
        self.group.pause()
        return answer

    def read(self) -> dict[str, Any]:
        """Its next line. Raises EngineFailed if it ended."""
        line = self.group.output.readline()
        if not line:
            raise self.group.failure(f"{self.name} ended")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def turn(self, until: float, measure: bool) -> None:
        """Train up to a time of its own."""
        found = self.ask(until=until, measure=measure)
        self.steps = found["steps"]
        if measure:
            self.curve.append((found["spent"], found["bits_per_byte"]))
            say(
                f"  {self.name:<8} {found['spent']:6.0f} s  step {self.steps:5,}  {self.curve[-1][1]:.4f} bits per byte"
            )


def english_prose(home: Home) -> Dataset:
    """The corpus's English prose as token shards."""
    table = pq.read_table(CORPUS)
    wanted = pc.and_(pc.equal(table["lang"], "en"), pc.equal(table["kind"], "prose"))
    home.root.mkdir(parents=True, exist_ok=True)
    chosen = home.root / "english-prose.parquet"
    pq.write_table(table.filter(wanted), chosen)
    source = SourceConfig(path=str(chosen), licence_column="license", text_kind="prose")
    heldout = HeldoutConfig(max_bytes=HELDOUT_BYTES)
    return prepare(DataConfig(sources=(source,), heldout=heldout), TokenizerConfig(vocab_size=8192), home)


def started(name: str, minutes: float, dataset: Dataset, options: argparse.Namespace) -> Side:
    """A side that waits for its first turn."""
    setup = {
        "minutes": minutes,
        "threads": options.threads,
        "dataset": str(dataset.folder),
        "peer_lr": options.peer_lr,
    }
    environment = {"OMP_NUM_THREADS": str(options.threads), **ENVIRONMENTS[name]}
    group = Group([sys.executable, str(WORKER), name, json.dumps(setup)], environment, talk=True)
    side = Side(name, minutes, group)
    side.read()
    group.pause()
    return side


def in_turn(sides: list[Side]) -> None:
    """Let every side train to its end, in turn."""
    waiting = {side.name: (side, side.stops()) for side in sides}
    while waiting:
        for name, (side, stops) in list(waiting.items()):
            stop = next(stops, None)
            if stop is None:
                del waiting[name]
            else:
                side.turn(*stop)


def crossing(curve: list[tuple[float, float]], bits: float) -> float | None:
    """When a curve comes down to so many bits per byte, between its points in a straight line."""
    for (before, high), (after, low) in zip(curve, curve[1:], strict=False):
        if low <= bits:
            return after if high <= low else before + (after - before) * (high - bits) / (high - low)
    return None


def draw(sides: list[Side], bits: float, path: Path) -> None:
    """Both curves as a picture."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot(xlabel="seconds of training", ylabel="held-out bits per byte")
    for side in sides:
        axes.plot(*zip(*side.curve[1:], strict=True), marker="o", label=f"{side.name}, {side.steps:,} steps")
    axes.axhline(bits, color="gray", linewidth=0.8)
    axes.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--share", type=float, default=0.5, help="of the minutes, that Lapis gets")
    parser.add_argument("--peer-lr", type=float, default=6e-4, help="nanoGPT's peak rate")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--plot", type=Path, default=Path("time_to_quality.png"))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if not CORPUS.is_file() or not stamp("nanogpt").exists():
        missing = CORPUS if not CORPUS.is_file() else "nanoGPT (make bench-peers PEERS=nanogpt)"
        say(f"Nothing is measured: {missing} is not there.")
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the sides are ended too
    with tempfile.TemporaryDirectory() as place:
        dataset = english_prose(Home(Path(place)))
        sides: list[Side] = []
        try:
            sides.append(started("nanogpt", options.minutes, dataset, options))
            sides.append(started("lapis", options.minutes * options.share, dataset, options))
            in_turn(sides)
        finally:
            for side in sides:
                side.group.end()
    show(sides, dataset, options)


def show(sides: list[Side], dataset: Dataset, options: argparse.Namespace) -> None:
    """Both curves, and the time that Lapis needed."""
    peer, ours = sides
    bits = peer.curve[-1][1]
    say(f"\n{dataset.tokens:,} training tokens, {dataset.manifest['heldout']['bytes']:,} held-out bytes")
    rows = [[side.name, *(f"{value:.4f}" for _, value in side.curve)] for side in sides]
    print_table(["bits per byte after", *(f"{n}/{POINTS}" for n in range(POINTS + 1))], rows)
    reached = crossing(ours.curve, bits)
    say(
        f"nanoGPT ends with {bits:.4f} after {peer.curve[-1][0]:.0f} s; Lapis with {ours.curve[-1][1]:.4f}",
    )
    if reached is None:
        say(f"Lapis does not get there in {ours.end:.0f} s (wanted: ≤ 0.5 of the time).")
    else:
        say(
            f"Lapis is there after {reached:.0f} s: {reached / peer.curve[-1][0]:.2f} of the time (wanted: ≤ 0.5)"
        )
    draw(sides, bits, options.plot)
    say(f"Curves: {options.plot}")
    if options.json:
        facts = {side.name: {"steps": side.steps, "curve": side.curve} for side in sides}
        options.json.write_text(
            json.dumps({"minutes": options.minutes, "reached": reached, **facts}, indent=1)
        )


if __name__ == "__main__":
    main()
