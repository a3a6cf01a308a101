"""WARC to main text beside trafilatura: pages per CPU second, and how well both find the text that people marked.

    python benchmarks/data_extract.py [--warc PAGES.warc.gz] [--truth FOLDER] [--rounds 3] [--seconds 12]

Lapis is timed as it reads (`read_part`: the archive, the encoding, checks, extraction, cutting into documents, with
its second process for large pages), the peer as its function alone over the same records. FOLDER is a checkout of
scrapinghub/article-extraction-benchmark (181 pages and their article texts; the pages belong to third parties):
with it a second table gives precision, recall and F1 of word 4-grams, computed as its evaluate.py does; without it
the two are only compared with each other.
`make bench-peers PEERS=trafilatura` installs the peer. One process each, runs alternate, medians.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from harness.installed import PEERS, stamp

from lapis.cli.output import print_table, say
from lapis.data import extract_apart
from lapis.data.formats.part import Note, Skip
from lapis.data.readers import plan_parts, read_part
from lapis.data.recipe import DataConfig, SourceConfig
from lapis.data.sources import list_inputs
from lapis.data.workers import run_tasks

PAGES = Path(__file__).parents[2] / "shared" / "data" / "pages.warc.gz"
WORKER = Path(__file__).parent / "harness" / "extract_worker.py"
WHOLE = 1 << 30  # longest document: pages are not cut
Triple = tuple[float, float, float]


def lapis(path: Path) -> dict[str, Any]:
    """Read the archive as the pipeline does, in this process."""
    parts = plan_parts(list_inputs(DataConfig(sources=(SourceConfig(path=str(path)),))).inputs)
    texts: list[str] = []
    began = cpu_seconds()
    for part in parts:
        for one in read_part(part, WHOLE):
            if not isinstance(one, Note):
                texts.append("" if isinstance(one, Skip) else one.text)
    return {"seconds": cpu_seconds() - began, "pages": len(texts), "texts": texts}


def cpu_seconds() -> float:
    """Of this process and of the one that reads large pages."""
    helper = extract_apart._running
    if helper is None:
        extract_apart.page_text(b" " * extract_apart.LARGE)  # starts it
        return cpu_seconds()
    fields = Path(f"/proc/{helper.pid}/stat").read_text().rpartition(")")[2].split()
    return time.process_time() + (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def peer(mode: str, path: Path, limit: float) -> dict[str, Any]:
    """The peer's result, made by its own interpreter."""
    python = PEERS / "trafilatura" / "bin" / "python"
    command = [str(python), str(WORKER), mode, str(path), str(limit)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={"PYTHONPATH": ""})
    return dict(json.loads(done.stdout))


def read_one(part: Any) -> int:
    """How many documents a part gives."""
    return sum(not isinstance(one, Skip | Note) for one in read_part(part, WHOLE))


def scaling(path: Path) -> tuple[float, float]:
    """Wall seconds of the same parts in one process and in two, after the processes have started."""
    copies = [SourceConfig(path=str(path), name=f"copy{n}") for n in range(4)]
    parts = plan_parts(list_inputs(DataConfig(sources=tuple(copies))).inputs)
    seconds = []
    for workers in (1, 2):
        results = run_tasks(read_one, [*parts[:2], *parts], workers)
        next(results), next(results)
        began = time.perf_counter()
        sum(results)
        seconds.append(time.perf_counter() - began)
    return seconds[0], seconds[1]


def quality(pairs: Iterable[tuple[str, str]]) -> Triple:
    """F1, precision and recall of word 4-grams over pairs of true and found text."""
    precisions, recalls = [], []
    for true, found in pairs:
        wanted, given = shingles(true), shingles(found)
        both = sum((wanted & given).values())
        if given:
            precisions.append(both / given.total())
        if wanted:
            recalls.append(both / wanted.total())
    precision, recall = statistics.mean(precisions), statistics.mean(recalls)
    return 2 * precision * recall / (precision + recall), precision, recall


def shingles(text: str) -> Counter[tuple[str, ...]]:
    """Word 4-grams of a text, a shorter text as one."""
    words = re.findall(r"\w+", text, re.UNICODE | re.DOTALL)
    return Counter(tuple(words[n : n + 4]) for n in range(max(1, len(words) - 3)) if words)


def speed(path: Path, rounds: int, limit: float) -> dict[str, dict[str, Any]]:
    """Pages per CPU second of everybody, runs alternating; the last run's texts."""
    modes = ("fast", "precision") if stamp("trafilatura").exists() else ()
    rates: dict[str, list[float]] = {}
    last: dict[str, dict[str, Any]] = {}
    for _ in range(rounds):
        for name in ("lapis", *modes):
            last[name] = lapis(path) if name == "lapis" else peer(name, path, limit)
            rates.setdefault(name, []).append(last[name]["pages"] / last[name]["seconds"])
    for name, found in rates.items():
        last[name]["rate"] = statistics.median(found)
    return last


def against_truth(folder: Path) -> list[tuple[str, str, float, float, float]]:
    """Rows of the second table."""
    truth = json.loads((folder / "ground-truth.json").read_text())
    html = {key: gzip.decompress((folder / "html" / f"{key}.html.gz").read_bytes()) for key in truth}
    rows = []
    began = cpu_seconds()
    texts = [extract_apart.page_text(html[key]) for key in truth]
    seconds = cpu_seconds() - began
    found = {"lapis": texts}
    if stamp("trafilatura").exists():
        with tempfile.TemporaryDirectory() as temporary:
            archive = Path(temporary) / "truth.warc.gz"
            archive.write_bytes(b"".join(record(html[key]) for key in truth))
            found |= {mode: peer(mode, archive, float("inf"))["texts"] for mode in ("fast", "precision")}
    for name, texts in found.items():
        pairs = [(truth[key]["articleBody"], text) for key, text in zip(truth, texts, strict=True)]
        rows.append(
            (name if name == "lapis" else f"trafilatura {name}", *(round(x, 3) for x in quality(pairs)))
        )
    say(f"{len(truth)} pages with marked articles; lapis: {len(truth) / seconds:,.0f} of them per CPU second")
    return rows


def record(html: bytes) -> bytes:
    """A page as a record of a WARC file."""
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n\r\n"
    fields = b"WARC/1.0\r\nWARC-Type: response\r\nWARC-Record-ID: <urn:uuid:0>\r\n"
    kind = b"Content-Type: application/http; msgtype=response\r\n"
    length = b"Content-Length: %d\r\n\r\n" % (len(head) + len(html))
    return gzip.compress(fields + kind + length + head + html + b"\r\n\r\n")


def main() -> None:
    """Measure and print."""
    options = argparse.ArgumentParser()
    options.add_argument("--warc", type=Path, default=PAGES)
    options.add_argument("--truth", type=Path)
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--seconds", type=float, default=12.0)
    given = options.parse_args()
    if not given.warc.exists():
        sys.exit(f"There is no {given.warc}; name an archive with --warc.")
    if not stamp("trafilatura").exists():
        say("trafilatura is not installed: make bench-peers PEERS=trafilatura")
    results = speed(given.warc, given.rounds, given.seconds)
    own = results["lapis"]
    rows = []
    for name, result in results.items():
        agreement = quality(zip(result["texts"], own["texts"], strict=False))[0]
        label = name if name == "lapis" else f"trafilatura {name}"
        rows.append(
            (
                label,
                result["pages"],
                round(result["rate"]),
                round(own["rate"] / result["rate"], 1),
                round(agreement, 3),
            )
        )
    print_table(
        ("WARC → main text", "pages", "pages/s per core", "lapis is × as fast", "F1 with lapis"), rows
    )
    one, two = scaling(given.warc)
    say(f"4 copies in parts: {one:.1f} s in one process, {two:.1f} s in two: {one / two:.2f} × as fast")
    if given.truth:
        print_table(("against marked articles", "F1", "precision", "recall"), against_truth(given.truth))


if __name__ == "__main__":
    main()
