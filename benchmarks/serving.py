"""The engine beside the best CPU engines: one table, every peer measured in the same run, in turn with Lapis.

SmolLM2-135M-Instruct, prompts of 128 (or 1,024) tokens of real text, all different, 128 new tokens, greedy, end
tokens ignored, no cache of prefixes. Each round measures Lapis, then the peer, with fresh prompts; the engine that is
not measured is stopped. A warm-up round is not counted; figures are medians over the rounds.

    python benchmarks/serving.py [--only ROW] [--rounds 3] [--threads N] [--json FILE]

Peers are installed by `make bench-peers`; a row whose peer is not there shows Lapis alone. "limit" is what reading
memory and multiplying matrices allow, by this machine's rates measured in the same run.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import signal
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from harness.client import RequestFailed
from harness.engines import Engine
from harness.installed import Engines
from harness.limits import Limits, Shape
from harness.process import EngineFailed
from harness.prompts import Prompts
from harness.rows import ROWS, Duel, Row, Side
from harness.subject import NAME, find_model

from lapis.cli.output import print_table, say
from lapis.model.config import ModelConfig
from lapis.model.store import StoredModel
from lapis.tokenizer.bpe import Tokenizer

FAILURES = (EngineFailed, RequestFailed, OSError, TimeoutError)


class Ring:
    """Runs duels, and keeps engines between duels, stopped, until no later duel needs them."""

    def __init__(self, engines: Engines, prompts: Prompts, rounds: int) -> None:
        self.engines, self.prompts, self.rounds = engines, prompts, rounds
        self.running: dict[str, Engine] = {}
        self.starts: dict[str, list[float]] = {}
        self.versions: dict[str, str] = {}
        self.failures: dict[str, str] = {}

    def fight(self, duel: Duel) -> list[Side]:
        """Our side and, if it is there and works, the peer's. Empty if ours failed."""
        names = [duel.ours] + ([duel.theirs] if duel.theirs else [])
        sides = [Side(name) for name in names if not self.engines.missing(name)]
        for round_ in range(self.rounds + 1):
            for side in list(sides):
                once = duel.fresh and side.engine == duel.theirs  # a peer that takes a minute is started once
                if side.engine in self.failures or (once and round_ > 0):
                    continue
                say(f"  {side.engine}, {'warm-up' if round_ == 0 else f'round {round_} of {self.rounds}'}")
                try:
                    self._measure(duel, side, counted=round_ > 0)
                except FAILURES as error:
                    self.failures[side.engine] = str(error) or type(error).__name__
                    say(f"  {side.engine} failed: {self.failures[side.engine]}")
                    self.drop(side.engine)
        return [side for side in sides if side.engine not in self.failures]

    def _measure(self, duel: Duel, side: Side, *, counted: bool) -> None:
        fresh = duel.fresh and side.engine == duel.ours
        if fresh:
            self.drop(side.engine)
        engine = self._engine(side.engine)
        engine.proceed()
        burst = engine.run(self.prompts.take(duel.count, duel.prompt), duel.new)
        side.resident = max(side.resident, engine.resident())
        engine.pause()
        if fresh and not counted:
            self.starts[side.engine].pop()
        side.starts = self.starts[side.engine]
        if counted:
            side.bursts.append(burst)

    def _engine(self, name: str) -> Engine:
        if name not in self.running:
            engine = self.engines.make(name)
            engine.start()
            self.running[name] = engine
            self.starts.setdefault(name, []).append(engine.start_seconds)
            self.versions[name] = engine.version
        return self.running[name]

    def drop(self, name: str) -> None:
        """End an engine if it runs."""
        engine = self.running.pop(name, None)
        if engine is not None:
            engine.end()

    def keep_only(self, names: set[str]) -> None:
        """End all others."""
        for name in set(self.running) - names:
            self.drop(name)


def main() -> None:
    options = _options()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that the engines end too
    torch.set_num_threads(options.threads)
    model = find_model()
    if model is None:
        return
    rows = [row for row in ROWS if not options.only or row.key in options.only]
    tokenizer = Tokenizer.load(model.folder / "tokenizer.json")
    say(_machine(options.threads))
    with tempfile.TemporaryDirectory() as home:
        (Path(home) / "models").mkdir()
        (Path(home) / "models" / NAME).symlink_to(model.folder)
        ring = Ring(Engines(Path(home), model.folder, options.threads), Prompts(tokenizer), options.rounds)
        try:
            fought, limits = _fight_all(ring, rows, model)
        finally:
            ring.keep_only(set())
    say(f"memory read {limits.bandwidth / 1e9:.1f} GB/s, bf16 product {limits.product / 1e9:.0f} GFLOP/s")
    results = [_result(row, fought[row.duel], limits, model) for row in rows]
    _print(results)
    _print_what_is_missing(ring, rows)
    if options.json:
        facts = {
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "machine": _machine(options.threads),
            "limits": asdict(limits),
            "versions": ring.versions,
            "failures": ring.failures,
            "rows": results,
        }
        options.json.write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n")
    if any(name.startswith("lapis") for name in ring.failures):
        sys.exit(1)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    keys = [row.key for row in ROWS]
    parser.add_argument(
        "--only", action="append", choices=keys, metavar="ROW", help=f"one of {', '.join(keys)}"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser.parse_args()


def _fight_all(ring: Ring, rows: Sequence[Row], model: StoredModel) -> tuple[dict[Duel, list[Side]], Limits]:
    duels = list(dict.fromkeys(row.duel for row in rows))
    fought: dict[Duel, list[Side]] = {}
    limits = Limits.measure()
    for number, duel in enumerate(duels):
        keys = ", ".join(row.key for row in rows if row.duel == duel)
        say(f"{number + 1} of {len(duels)}: {keys}")
        fought[duel] = ring.fight(duel)
        limits = limits.best(Limits.measure())  # what disturbs it only lowers it
        for row in (row for row in rows if row.duel == duel):
            result = _result(row, fought[duel], limits, model)
            say(f"  {row.key}: {_number(result['lapis'])}, peer {_number(result['peer_figure'])} {row.unit}")
        ring.keep_only({name for later in duels[number + 1 :] for name in (later.ours, later.theirs) if name})
    return fought, limits


def _machine(threads: int) -> str:
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    cpu = names[0].partition(":")[2].strip() if names else platform.machine()
    load = os.getloadavg()[0]
    return f"{cpu}, {os.cpu_count()} cores, {threads} threads, load {load:.1f}, torch {torch.__version__}"


def shape(config: ModelConfig, engine: str) -> Shape:
    """What a step costs at least, by the bits of the engine's weights; 4 bits with a scale and a minimum for 32."""
    bits = {"bf16": 16, "int8": 8, "int4": 5}[engine.rpartition(" ")[2]]
    head = config.vocab_size * config.width
    return Shape(
        config.parameters * bits // 8, config.parameters, head, config.kv_bytes_per_token, bits == 16
    )


def _result(row: Row, sides: Sequence[Side], limits: Limits, model: StoredModel) -> dict[str, Any]:
    ours = next((side for side in sides if side.engine == row.duel.ours), None)
    theirs = next((side for side in sides if side.engine == row.duel.theirs), None)
    costs = shape(model.config, row.duel.ours)
    mine = row.figure(ours, costs) if ours else None
    other = (row.theirs or row.figure)(theirs, costs) if theirs else None
    share = mine / row.limit(limits, costs) if mine is not None and row.limit else None
    ratio = mine / other if mine is not None and other else None
    met = row.target.met(ratio, mine, share) if row.target and mine is not None else None
    return {
        "row": row.key,
        "title": row.title,
        "unit": row.unit,
        "lapis": mine,
        "peer": row.duel.theirs,
        "peer_figure": other,
        "ratio": ratio,
        "wanted": str(row.target) if row.target else None,
        "met": met,
        "limit_share": share,
        "rounds": {side.engine: [burst.throughput() for burst in side.bursts] for side in sides},
    }


def _print(results: Sequence[dict[str, Any]]) -> None:
    lines = [
        [
            result["title"],
            f"{_number(result['lapis'])} {result['unit']}",
            result["peer"] or "-",
            _number(result["peer_figure"]),
            "-" if result["ratio"] is None else f"{result['ratio']:.2f}x",
            result["wanted"] or "-",
            "-" if result["met"] is None else ("reached" if result["met"] else "missed"),
            "-" if result["limit_share"] is None else f"{result['limit_share']:.0%}",
        ]
        for result in results
    ]
    print_table(["what", "lapis", "peer", "its figure", "ratio", "wanted", "", "of the limit"], lines)


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 100 else f"{value:.2f}"


def _print_what_is_missing(ring: Ring, rows: Sequence[Row]) -> None:
    names = dict.fromkeys(name for row in rows for name in (row.duel.ours, row.duel.theirs) if name)
    missing = [name for name in names if ring.engines.missing(name)]
    if missing:
        say(f"Not installed: {', '.join(missing)}. To have them beside Lapis, run: make bench-peers")
    for name, reason in ring.failures.items():
        say(f"{name} failed: {reason}")


if __name__ == "__main__":
    main()
