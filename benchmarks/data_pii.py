"""How well and how fast personal data and secrets are found.

    python benchmarks/data_pii.py [--mb 40] [--path PARQUET] [--text-column text] [--misses]

First a table of precision and recall for each kind on tests/data/pii.jsonl. Then, given a parquet file, MB of text per
CPU second, beside datatrove's PIIFormatter (e-mail and IPv4 only) where .peers/datatrove is installed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from statistics import median

from harness.installed import PEERS

from lapis.cli.output import print_table, say
from lapis.data.pii import Span, find, find_all

LABELS = Path(__file__).parents[1] / "tests" / "data" / "pii.jsonl"
CHUNK_CHARS = 200_000
PEER = """
import json, sys, time
from datatrove.data import Document
from datatrove.pipeline.formatters import PIIFormatter
texts = json.load(open(sys.argv[1]))
form = PIIFormatter()
for _ in range(3):
    began = time.process_time()
    for text in texts:
        form.format(text)
    print(time.process_time() - began)
"""


def labelled(path: Path = LABELS) -> list[tuple[str, list[Span]]]:
    """Texts with what is to be found in them; kinds of IP addresses apart."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        text, spans = "", []
        for piece in json.loads(line):
            if isinstance(piece, str):
                text += piece
                continue
            value = "".join(piece[1])
            spans.append(Span(len(text), len(text) + len(value), piece[0]))
            text += value
        rows.append((text, spans))
    return rows


def scores(rows: list[tuple[str, list[Span]]]) -> dict[str, tuple[int, int, int]]:
    """For each kind how many there are, how many of them are found, and how many finds are wrong.

    Found is what a span of the right kind covers but for its separators; a find that touches no label of its kind is
    wrong, and so is one that covers twice as much as there is.
    """
    there: Counter[str] = Counter()
    right: Counter[str] = Counter()
    wrong: Counter[str] = Counter()
    for text, labels in rows:
        found = [span._replace(what=_kind(text, span)) for span in find(text)]
        for label in labels:
            there[label.what] += 1
            right[label.what] += any(_covers(text, span, label) for span in found)
        for span in found:
            wrong[span.what] += not any(_covers(text, span, label) for label in labels)
    return {kind: (there[kind], right[kind], wrong[kind]) for kind in sorted({*there, *wrong})}


def _kind(text: str, span: Span) -> str:
    if span.what == "ip":
        return "ipv6" if ":" in text[span.start : span.end] else "ipv4"
    return span.what


def _covers(text: str, span: Span, label: Span) -> bool:
    if span.what != label.what or span.end - span.start > 2 * (label.end - label.start):
        return False
    missed = text[label.start : max(span.start, label.start)] + text[min(span.end, label.end) : label.end]
    return span.start < label.end and label.start < span.end and sum(map(str.isalnum, missed)) <= 2


def chunks(texts: list[str]) -> list[list[str]]:
    """Texts in chunks as the pipeline makes them."""
    result: list[list[str]] = [[]]
    chars = 0
    for text in texts:
        if chars >= CHUNK_CHARS:
            result.append([])
            chars = 0
        result[-1].append(text)
        chars += len(text)
    return result


def speed(texts: list[str]) -> float:
    """CPU seconds of the median of three runs."""
    seconds = []
    for _ in range(3):
        began = time.thread_time()
        for chunk in chunks(texts):
            find_all(chunk)
        seconds.append(time.thread_time() - began)
    return median(seconds)


def peer_speed(texts: list[str]) -> float | None:
    """The same of datatrove's PIIFormatter, or None if it is not installed."""
    python = PEERS / "datatrove" / "bin" / "python"
    if not python.exists():
        return None
    place = PEERS / "pii-texts.json"
    place.write_text(json.dumps(texts))
    done = subprocess.run([python, "-c", PEER, place], capture_output=True, text=True, check=False)
    place.unlink()
    if done.returncode:
        say(done.stderr[-400:])
        return None
    return median(map(float, done.stdout.split()))


def main() -> None:
    """Print both tables."""
    options = argparse.ArgumentParser()
    options.add_argument("--path", type=Path)
    options.add_argument("--text-column", default="text")
    options.add_argument("--mb", type=int, default=20)
    options.add_argument("--misses", action="store_true", help="print what was missed and what was wrong")
    given = options.parse_args()
    rows = labelled()
    if given.misses:
        for text, labels in rows:
            found = [span._replace(what=_kind(text, span)) for span in find(text)]
            missed = [one for one in labels if not any(_covers(text, span, one) for span in found)]
            wrong = [span for span in found if not any(_covers(text, span, one) for one in labels)]
            if missed or wrong:
                say(f"{text!r} missed {missed} wrong {[(s.what, text[s.start : s.end]) for s in wrong]}")
    table = [
        (kind, count, f"{right / max(1, count):.3f}", f"{right / max(1, right + wrong):.3f}")
        for kind, (count, right, wrong) in scores(rows).items()
    ]
    print_table(("kind", "labels", "recall", "precision"), table)
    if given.path is None:
        return
    import pyarrow.parquet as parquet

    texts: list[str] = []
    size = 0
    for text in parquet.read_table(given.path, columns=[given.text_column])[given.text_column].to_pylist():
        texts.append(text)
        size += len(text.encode())
        if size > given.mb * 1_000_000:
            break
    clean = [text for text, found in zip(texts, find_all(texts), strict=True) if not found]
    for name, some in (("all", texts), ("without finds", clean)):
        size = sum(len(text.encode()) for text in some)
        own, other = speed(some), peer_speed(some)
        line = f"{name}: {size / 1e6:.1f} MB, {size / 1e6 / own:.0f} MB/s per core"
        say(line + (f", datatrove {size / 1e6 / other:.1f} MB/s: {other / own:.1f} times" if other else ""))


if __name__ == "__main__":
    sys.exit(main())
