"""What one decode step of the engine costs without HTTP, text or sampling, for weights in 16, 8 and 4 bits.

Steps of SmolLM2-135M-Instruct at contexts of 128 and 1,024, kinds of weights in turn, the best of the rounds. The share
of the limit is bytes read (weights, keys and values) over the measured read bandwidth of memory.

    python benchmarks/decode_step.py [--threads N] [--rounds 15]
"""

from __future__ import annotations

import argparse
import os
import random
import time
from array import array
from collections.abc import Callable
from pathlib import Path

import torch
from harness.limits import read_bandwidth
from harness.subject import find_model

from lapis.cli.output import print_table, say
from lapis.inference.kv_cache import PAGE, pages_for
from lapis.inference.replayed import Part, ReplayedSteps
from lapis.kernels.quantized import Kind
from lapis.model.families import Decoder
from lapis.model.weights import read_model

CASES = ((1, 128), (16, 128), (1, 1024), (16, 1024))  # sequences, context
KINDS: tuple[Kind | None, ...] = (None, "int8", "int4")


def make_model(folder: Path, kind: Kind | None) -> Decoder:
    """The model as it is served."""
    model = read_model(folder).model.eval()
    if kind is not None:
        model.quantize(kind)
    model.seal()
    return model


def make_step(model: Decoder, sequences: int, context: int) -> Callable[[], object]:
    """A step that computes the next token of each sequence, whose pages are full of some keys and values."""
    columns = pages_for(context + 1)
    pages = list(range(sequences * columns))
    random.shuffle(pages)
    caches = model.new_caches(len(pages) + 1)
    for cache in caches:
        cache.keys.normal_()
        cache.values.normal_()
    steps = ReplayedSteps(model, caches, len(pages), model.config.vocab_size)
    parts = [
        Part([random.randrange(1000)], context, array("i", pages[n * columns : (n + 1) * columns]))
        for n in range(sequences)
    ]
    return lambda: steps.run(parts, range(sequences))


def best_seconds(calls: list[Callable[[], object]], rounds: int) -> list[float]:
    """The shortest time of each call, made in turn."""
    best = [float("inf")] * len(calls)
    for _ in range(rounds):
        for index, call in enumerate(calls):
            for _ in range(3):
                start = time.perf_counter()
                call()
                best[index] = min(best[index], time.perf_counter() - start)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    stored = find_model()
    if stored is None:
        raise SystemExit(1)
    bandwidth = read_bandwidth()
    say(f"memory read {bandwidth / 1e9:.1f} GB/s, load average {os.getloadavg()[0]:.1f}")
    models = [make_model(stored.folder, kind) for kind in KINDS]
    kv_bytes = stored.config.kv_bytes_per_token
    rows = []
    with torch.inference_mode():
        for sequences, context in CASES:
            calls = [make_step(model, sequences, context) for model in models]
            for kind, model, seconds in zip(KINDS, models, best_seconds(calls, options.rounds), strict=True):
                table = model.embed.nbytes if kind or not model.config.tied else 0  # read by a few rows only
                read = model.weight_bytes - table + sequences * pages_for(context + 1) * PAGE * kv_bytes
                share = read / bandwidth / seconds
                rate = f"{sequences / seconds:.0f}"
                rows.append(
                    [
                        f"{sequences} at {context}",
                        kind or "bf16",
                        rate,
                        f"{seconds * 1e3:.2f}",
                        f"{share:.2f}",
                    ]
                )
    print_table(["sequences", "weights", "tokens/s", "ms a step", "of the limit"], rows)


if __name__ == "__main__":
    main()
