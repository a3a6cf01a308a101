"""What quantised weights cost in quality: perplexity on real English text, beside bf16.

The text is what the installed packages say of themselves, or a file of your own; it is cut into windows, and every
token after the first of a window is scored given those before it. Bounds: int8 at most 1 % worse, int4 at most 3 %.
Every token is compared with itself in bf16, and the differences of a window count as one, so that the standard error
tells how far another text of the same kind may lead. A bound is reached or missed when it lies two of them away.

    python benchmarks/quality.py [--text FILE] [--tokens 32768] [--window 512]

Exits with 1 when a bound is missed.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from contextlib import closing
from pathlib import Path

from harness.prompts import Prompts
from harness.subject import find_model

from lapis.cli.output import print_table, say
from lapis.inference.engine import LocalEngine
from lapis.model.weights import read_model

BOUNDS = {"int8": 0.01, "int4": 0.03}  # how much higher the perplexity may be


Scores = list[list[float]]  # the log probabilities of each window's tokens


def perplexity(scores: Scores) -> float:
    """exp of the mean negative log probability over all scored tokens."""
    tokens = [score for window in scores for score in window]
    return math.exp(-math.fsum(tokens) / len(tokens))


def excess(plain: Scores, quantised: Scores) -> tuple[float, float]:
    """By what part the perplexity is higher, and the standard error of that over windows."""
    lost = [
        statistics.fmean(before - after for before, after in zip(*window, strict=True))
        for window in zip(plain, quantised, strict=True)
    ]
    error = statistics.stdev(lost) / math.sqrt(len(lost)) if len(lost) > 1 else math.inf
    return math.expm1(statistics.fmean(lost)), error


def verdict(worse: float, error: float, bound: float) -> str:
    """Reached or missed, if the text is long enough to say."""
    if abs(bound - worse) < 2 * error:
        return "undecided: take more --tokens"
    return "reached" if worse <= bound else "missed"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text", type=Path)
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--window", type=int, default=512)
    options = parser.parse_args()
    model = find_model()
    if model is None:
        return
    found: dict[str, Scores] = {}
    windows: list[list[int]] = []
    for weights in ("bf16", *BOUNDS):
        with closing(LocalEngine(read_model(model.folder), model.name, weights=weights)) as engine:
            if not windows:
                prompts = Prompts(engine.tokenizer, options.text.read_text() if options.text else None)
                windows = prompts.take(max(1, options.tokens // options.window), options.window)
            say(f"{weights}: scoring {len(windows)} windows of {options.window} tokens")
            found[weights] = [engine.score(window) for window in windows]
    rows = [["bf16", f"{perplexity(found['bf16']):.3f}", "", "", "", ""]]
    for weights, bound in BOUNDS.items():
        worse, error = excess(found["bf16"], found[weights])
        figures = [f"{perplexity(found[weights]):.3f}", f"{worse:+.2%}", f"± {error:.2%}"]
        rows.append([weights, *figures, f"at most {bound:+.0%}", verdict(worse, error, bound)])
    print_table(["weights", "perplexity", "to bf16", "standard error", "wanted", ""], rows)
    if any(row[-1] == "missed" for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
