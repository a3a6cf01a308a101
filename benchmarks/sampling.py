"""What choosing a token costs: sampling rows of logits, and a grammar's mask of the tokens that may come next.

Sampling takes 16 rows of 49,152 logits, shaped like a language model's, beside the logits processors of
transformers with torch's multinomial, in turn. Masks follow one JSON text token by token, with the tokenizer
that is given.

    python benchmarks/sampling.py [--tokenizer tokenizer.json] [--repeat 30]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LogitsProcessorList
from transformers.generation import logits_process as processors

from lapis.inference import sampler
from lapis.inference.request import SamplingParams
from lapis.inference.structured import Compiler
from lapis.tokenizer.bpe import Tokenizer
from lapis.tokenizer.grammar import Grammar

ROWS, VOCABULARY = 16, 49152
SETTINGS: list[dict[str, Any]] = [
    {"temperature": 0},
    {},
    {"temperature": 0.8, "top_p": 0.95},
    {"top_k": 50, "top_p": 0.9},
    {"min_p": 0.05},
]
TEXT = '{\n  "name": "Alexandra of the mill",\n  "age": 25,\n  "hobbies": ["walking", "rowing at night"]\n}'


def logits() -> np.ndarray[Any, np.dtype[np.float32]]:
    """Rows with a few likely tokens and a long tail."""
    random = np.random.default_rng(0)
    logits_RV = random.normal(0, 3, (ROWS, VOCABULARY)).astype(np.float32)
    for row_V in logits_RV:
        row_V[random.choice(VOCABULARY, 40, replace=False)] += random.uniform(4, 12, 40).astype(np.float32)
    return logits_RV


def peer(logits_RV: torch.Tensor, params: dict[str, Any]) -> torch.Tensor:
    """The same choice by transformers and torch."""
    if params.get("temperature") == 0:
        return logits_RV.argmax(-1)
    steps = LogitsProcessorList()
    if "temperature" in params:
        steps.append(processors.TemperatureLogitsWarper(params["temperature"]))
    if "min_p" in params:
        steps.append(processors.MinPLogitsWarper(params["min_p"]))
    if "top_k" in params:
        steps.append(processors.TopKLogitsWarper(params["top_k"]))
    if "top_p" in params:
        steps.append(processors.TopPLogitsWarper(params["top_p"]))
    return torch.multinomial(torch.softmax(steps(None, logits_RV), -1), 1)


def in_turn(calls: list[Callable[[], object]], repeat: int) -> list[float]:
    """Median milliseconds of each call."""
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(repeat):
        for call, kept in zip(calls, times, strict=True):
            start = time.perf_counter()
            call()
            kept.append(1e3 * (time.perf_counter() - start))
    return [statistics.median(kept) for kept in times]


def sampling(repeat: int) -> None:
    """One line for each setting."""
    logits_RV = logits()
    for params in SETTINGS:
        rows = [sampler.Row(SamplingParams(1, **params), n, [1, 2, 3], 1) for n in range(ROWS)]
        ours, theirs = in_turn(
            [
                lambda rows=rows: sampler.sample(logits_RV, rows),
                lambda params=params: peer(torch.from_numpy(logits_RV), params),
            ],
            repeat,
        )
        name = ", ".join(f"{key} {value}" for key, value in params.items()) or "temperature 1"
        print(f"{name:30} {ours:7.2f} ms   transformers {theirs:7.2f} ms   {theirs / ours:5.1f}x")


def masks(tokenizer: Tokenizer, repeat: int) -> None:
    """A schema with free strings, and one whose strings are bounded."""
    for bound in ({}, {"maxLength": 40}):
        text = {"type": "string", **bound}
        properties = {"name": text, "age": {"type": "integer"}, "hobbies": {"type": "array", "items": text}}
        schema = {"type": "object", "properties": properties, "required": ["name", "age", "hobbies"]}
        compiler = Compiler(tokenizer, tokenizer.stop_ids)
        compiler.matcher(Grammar.json_object())  # the tokenizer's tables
        start = time.perf_counter()
        compiler.matcher(Grammar.json_schema(schema))
        compiled = time.perf_counter() - start
        ids, times = tokenizer.encode(TEXT), []
        for _ in range(repeat):
            matcher = compiler.matcher(Grammar.json_schema(schema))
            for end in range(len(ids)):
                start = time.perf_counter()
                matcher.allowed(ids[:end])
                times.append(1e6 * (time.perf_counter() - start))
        name = f"mask, strings {'bounded' if bound else 'free'}"
        middle, high = statistics.median(times), statistics.quantiles(times, n=20)[-1]
        print(f"{name:30} {middle:7.1f} us, p95 {high:.0f} us   compiling {1e3 * compiled:.1f} ms")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--repeat", type=int, default=30)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{ROWS} rows of {VOCABULARY:,} logits, one thread, medians")
    sampling(options.repeat)
    if options.tokenizer:
        masks(Tokenizer.load(options.tokenizer), options.repeat)


if __name__ == "__main__":
    main()
