"""What quantised weights cost in quality: perplexity on real English text, beside bf16.

The text is what the installed packages say of themselves, or a file of your own; it is cut into windows, and every
token after the first of a window is scored given those before it. Bounds: int8 at most 1 % worse, int4 at most 3 %.

    python benchmarks/quality.py [--text FILE] [--tokens 8192] [--window 512]

Exits with 1 when a bound is exceeded.
"""

from __future__ import annotations

import argparse
import math
import sys
from contextlib import closing
from pathlib import Path

from harness.prompts import Prompts
from harness.subject import find_model

from lapis.cli.output import print_table, say
from lapis.inference.engine import LocalEngine
from lapis.model.weights import read_model

BOUNDS = {"int8": 0.01, "int4": 0.03}  # how much higher the perplexity may be


def perplexity(engine: LocalEngine, windows: list[list[int]]) -> float:
    """exp of the mean negative log probability over all scored tokens."""
    scores = [score for window in windows for score in engine.score(window)]
    return math.exp(-math.fsum(scores) / len(scores))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text", type=Path)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--window", type=int, default=512)
    options = parser.parse_args()
    model = find_model()
    if model is None:
        return
    found: dict[str, float] = {}
    windows: list[list[int]] = []
    for weights in ("bf16", *BOUNDS):
        with closing(LocalEngine(read_model(model.folder), model.name, weights=weights)) as engine:
            if not windows:
                prompts = Prompts(engine.tokenizer, options.text.read_text() if options.text else None)
                windows = prompts.take(max(1, options.tokens // options.window), options.window)
            say(f"{weights}: scoring {len(windows)} windows of {options.window} tokens")
            found[weights] = perplexity(engine, windows)
    worse = {weights: found[weights] / found["bf16"] - 1 for weights in BOUNDS}
    rows = [["bf16", f"{found['bf16']:.3f}", "", "", ""]]
    for weights, bound in BOUNDS.items():
        verdict = "reached" if worse[weights] <= bound else "missed"
        rows.append(
            [weights, f"{found[weights]:.3f}", f"{worse[weights]:+.2%}", f"at most {bound:+.0%}", verdict]
        )
    print_table(["weights", "perplexity", "to bf16", "wanted", ""], rows)
    if any(worse[weights] > bound for weights, bound in BOUNDS.items()):
        sys.exit(1)


if __name__ == "__main__":
    main()
