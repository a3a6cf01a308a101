"""How fast the engine answers, beside transformers' `generate` in bf16 and beside what memory allows.

Decode: tokens a second after the first, greedy, all prompts different, for 1 and for 16 requests at once.
Prefill: prompt tokens a second of one prompt (a run of one new token). Both engines take turns, medians are
compared. The ceiling of decoding one sequence is the measured read bandwidth over the bytes of the weights.

    python benchmarks/decode.py [--model NAME_OR_FOLDER] [--threads 2] [--repeat 3] [--tokens 64] [--no-peer]

Without --model it takes smollm2-135m-instruct if that has been pulled, else a random model of the size
`laptop`. The time outside the model (scheduling, sampling, text) is printed for each step.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import torch
from torch import Tensor

from lapis.cli.output import print_table, say
from lapis.errors import LapisError
from lapis.home import Home
from lapis.inference.engine import LocalEngine
from lapis.inference.fake import FakeEngine
from lapis.inference.request import Request, SamplingParams
from lapis.model.config import NAMED
from lapis.model.families import Llama
from lapis.model.manifest import Source
from lapis.model.store import ModelStore
from lapis.model.weights import read_model, write_model

PULLED = "smollm2-135m-instruct"
PROMPT = 128  # tokens of each prompt when decoding is measured
Generate = Callable[[list[list[int]], int], None]  # prompts, new tokens for each


@contextmanager
def model_folder(name: str | None) -> Iterator[Path]:
    """The folder of a model to measure, made for the time of the run if need be."""
    if name and Path(name).is_dir():
        yield Path(name)
        return
    try:
        yield ModelStore(Home.default()).get(name or PULLED).folder
        return
    except LapisError:
        if name:
            raise
    with tempfile.TemporaryDirectory() as temporary, closing(FakeEngine()) as fake:
        model = Llama(NAMED["laptop"])
        model.init_weights(1)
        folder = Path(temporary) / "laptop"
        source = Source("run", "random weights")
        write_model(folder, NAMED["laptop"], model.state_dict(), fake.tokenizer, source=source)
        yield folder


def read_bandwidth() -> float:
    """Bytes a second of reading memory with all threads, the best of ten."""
    big = torch.ones(64 << 20)
    best = float("inf")
    for _ in range(10):
        start = time.perf_counter()
        big.sum()
        best = min(best, time.perf_counter() - start)
    return big.numel() * 4 / best


def lapis_generate(engine: LocalEngine) -> Generate:
    """All prompts at once through the engine."""

    def generate(prompts: list[list[int]], tokens: int) -> None:
        params = SamplingParams(max_tokens=tokens, temperature=0, stop_ids=frozenset())
        streams = [engine.submit(Request(str(n), prompt, params)) for n, prompt in enumerate(prompts)]
        assert all(stream.result().completion_tokens == tokens for stream in streams)

    return generate


def transformers_generate(folder: Path) -> Generate | None:
    """All prompts as one batch through transformers, or None where it is not installed."""
    try:
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging
    except ImportError:
        say("transformers is not installed: no comparison (pip install 'lapis[dev]').")
        return None
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()  # type: ignore[no-untyped-call]

    def generate(prompts: list[list[int]], tokens: int) -> None:
        ids = torch.tensor(prompts)
        with torch.inference_mode():
            model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                min_new_tokens=tokens,
                max_new_tokens=tokens,
                pad_token_id=0,
            )

    return generate


def seconds(generate: Generate, count: int, length: int, tokens: int, vocabulary: int) -> float:
    """Wall seconds for `count` fresh random prompts of `length` tokens."""
    prompts = [[random.randrange(vocabulary) for _ in range(length)] for _ in range(count)]
    start = time.perf_counter()
    generate(prompts, tokens)
    return time.perf_counter() - start


def in_turn(
    engines: dict[str, Generate], repeat: int, measure: Callable[[Generate], float]
) -> dict[str, float]:
    """The median of a rate for each engine, one measurement of each per round after a warm-up."""
    rates: dict[str, list[float]] = {name: [] for name in engines}
    for round_ in range(repeat + 1):
        for name, generate in engines.items():
            rate = measure(generate)
            if round_:
                rates[name].append(rate)
    return {name: statistics.median(values) for name, values in rates.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--no-peer", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    random.seed(1)
    with model_folder(options.model) as folder:
        loaded = read_model(folder)
        with closing(LocalEngine(loaded, folder.name)) as engine:
            engines = {"lapis": lapis_generate(engine)}
            peer = None if options.no_peer else transformers_generate(folder)
            if peer is not None:
                engines["transformers"] = peer
            report(engine, engines, folder, options)
            say(
                f"outside the model: {outside(engine, loaded.model, options.tokens):.2f} ms a step with 16 requests"
            )


def report(
    engine: LocalEngine, engines: dict[str, Generate], folder: Path, options: argparse.Namespace
) -> None:
    """Measure everything and print one table."""
    bandwidth = read_bandwidth()
    weights = (folder / "model.safetensors").stat().st_size
    vocabulary, tokens = engine.tokenizer.vocab_size, options.tokens
    ceiling = bandwidth / weights
    say(
        f"{folder.name}, kernels {engine.kernels}, {options.threads} threads, load average {os.getloadavg()[0]:.1f}"
    )
    say(
        f"memory read {bandwidth / 1e9:.1f} GB/s, weights {weights / 1e6:.1f} MB: at most {ceiling:.0f} tokens/s alone"
    )
    rows = []

    def decode(count: int) -> Callable[[Generate], float]:
        def rate(generate: Generate) -> float:
            whole = seconds(generate, count, PROMPT, tokens + 1, vocabulary)
            first = seconds(generate, count, PROMPT, 1, vocabulary)
            return count * int(tokens) / max(whole - first, 1e-9)

        return rate

    for count in (1, 16):
        rates = in_turn(engines, options.repeat, decode(count))
        share = f"{rates['lapis'] / ceiling:.0%} of the ceiling" if count == 1 else ""
        rows.append([f"decode, {count} at once", *numbers(rates), share])
    length = min(1024, engine.context - 1)
    prefill = in_turn(
        engines, options.repeat, lambda generate: length / seconds(generate, 1, length, 1, vocabulary)
    )
    rows.append([f"prefill, {length} tokens", *numbers(prefill), ""])
    print_table(["tokens/s", "lapis", "transformers", "ratio", ""], rows)


def numbers(rates: dict[str, float]) -> list[str]:
    """Our rate, the peer's and the ratio, as text."""
    ours, theirs = rates["lapis"], rates.get("transformers")
    if theirs is None:
        return [f"{ours:.0f}", "-", "-"]
    return [f"{ours:.0f}", f"{theirs:.0f}", f"{ours / theirs:.2f}x"]


def outside(engine: LocalEngine, model: Llama, tokens: int) -> float:
    """Milliseconds of a step that are not the model's: scheduling, filling batches, sampling, text, streams."""
    computing = 0.0

    def timed(call: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def wrapped(*args: object) -> Tensor:
            nonlocal computing
            start = time.perf_counter()
            try:
                return call(*args)
            finally:
                computing += time.perf_counter() - start

        return wrapped

    setattr(model, "hidden", timed(model.hidden))  # noqa: B010 - this instance's, for the rest of the run
    setattr(model, "logits", timed(model.logits))  # noqa: B010
    before = engine.stats()["steps"]
    took = seconds(lapis_generate(engine), 16, PROMPT, tokens, engine.tokenizer.vocab_size)
    steps: int = engine.stats()["steps"] - before
    return 1e3 * (took - computing) / steps


if __name__ == "__main__":
    main()
