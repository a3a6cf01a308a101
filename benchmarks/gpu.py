"""What a GPU gives: decoding beside the memory's own limit and beside transformers, products beside cuBLAS.

A random model of Llama's shape; needs an NVIDIA GPU and the gpu extra. Rows are checked for their bits as well.

    python benchmarks/gpu.py [--shape 8b|1b] [--context 1024] [--rounds 20]
"""

from __future__ import annotations

import argparse
import random
from array import array
from collections.abc import Callable

import torch
from torch import Tensor

from lapis.cli.output import print_table, say
from lapis.inference.kv_cache import PAGE, pages_for
from lapis.inference.replayed import Part, ReplayedSteps
from lapis.kernels.ops import Ops
from lapis.model.config import ModelConfig
from lapis.model.families import Decoder, build

SHAPES = {  # layers, width, heads, kv_heads, head_size, ffn
    "8b": (32, 4096, 32, 8, 128, 14336),
    "1b": (16, 2048, 32, 8, 64, 8192),
}
VOCABULARY = 128256


def make_config(shape: tuple[int, ...], context: int, vocabulary: int = VOCABULARY) -> ModelConfig:
    """A Llama of this shape."""
    layers, width, heads, kv_heads, head_size, ffn = shape
    return ModelConfig(
        family="llama",
        vocab_size=vocabulary,
        layers=layers,
        width=width,
        heads=heads,
        kv_heads=kv_heads,
        head_size=head_size,
        ffn=ffn,
        context=context,
        rope_base=500000.0,
        norm_eps=1e-5,
        tied=False,
    )


def make_model(config: ModelConfig) -> Decoder:
    """Random weights, made on the device."""
    model = build(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.fill_(1.0) if weight.ndim == 1 else weight.normal_(0.0, 0.02)
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


def make_transformers(config: ModelConfig, sequences: int, context: int) -> Callable[[], object]:
    """The same step of transformers' Llama, its attention by torch."""
    from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

    shape = LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.width,
        intermediate_size=config.ffn,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.kv_heads,
        head_dim=config.head_size,
        max_position_embeddings=config.context,
    )
    with torch.device("cuda"):
        model = LlamaForCausalLM._from_config(shape, dtype=torch.bfloat16).eval()
        ids = torch.ones(sequences, 1, dtype=torch.int64)
        cache = DynamicCache(config=shape)
        size = (sequences, config.kv_heads, context, config.head_size)
        for layer in range(config.layers):
            cache.update(*(torch.randn(size, dtype=torch.bfloat16) for _ in range(2)), layer)

    def step() -> object:
        cache.crop(context)
        return model(ids, past_key_values=cache).logits.argmax(-1)

    return step


def seconds(call: Callable[[], object], rounds: int) -> float:
    """The shortest time of a call that has been warmed up."""
    best = float("inf")
    for turn in range(rounds + 3):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        if turn >= 3:
            best = min(best, start.elapsed_time(end) / 1e3)
    return best


def bandwidth(rounds: int) -> float:
    """Bytes per second that a large copy reads and writes."""
    source = torch.ones(1 << 30, dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / seconds(lambda: target.copy_(source), rounds)


def product_rows(ops: Ops, columns: int, inner: int, rounds: int) -> list[list[str]]:
    """Our product beside cuBLAS for 1 to 4,096 rows, and whether rows keep their bits in each."""
    x = torch.randn(4096, inner, device="cuda", dtype=torch.bfloat16)
    w = torch.randn(columns, inner, device="cuda", dtype=torch.bfloat16)

    def theirs(some: Tensor) -> Tensor:
        return torch.nn.functional.linear(some, w)

    def ours(some: Tensor) -> Tensor:
        return ops.linear(some, w)

    whole, found = {call: call(x) for call in (ours, theirs)}, []
    for rows in (1, 16, 64, 256, 1024, 4096):
        some = x[:rows]
        cells = [f"{rows} x {inner} -> {columns}"]
        for call in (ours, theirs):
            same = torch.equal(call(some), whole[call][:rows])
            time = seconds(lambda call=call, some=some: call(some), rounds)
            cells += [f"{time * 1e6:.0f}", f"{2 * rows * inner * columns / time / 1e12:.0f}", str(same)]
        found.append(cells)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("This needs an NVIDIA GPU and pip install 'lapis[gpu]'.")
    limit = bandwidth(options.rounds)
    say(f"{torch.cuda.get_device_name()}, copy {limit / 1e9:.0f} GB/s")
    config = make_config(SHAPES[options.shape], options.context + PAGE)
    model, rows = make_model(config), []
    say(f"kernels {model.ops.name}, bit_exact {model.ops.bit_exact} {model.ops.reason}")
    with torch.inference_mode():
        ours = {n: seconds(make_step(model, n, options.context), options.rounds) for n in (1, 64)}
        read = model.weight_bytes - model.embed.nbytes  # of which a step reads a few rows
        shape, width, ffn, ops = options.shape, config.width, config.ffn, model.ops
        del model
        torch.cuda.empty_cache()
        for sequences, time in ours.items():
            theirs = seconds(make_transformers(config, sequences, options.context), options.rounds)
            torch.cuda.empty_cache()
            bound = (read + sequences * options.context * config.kv_bytes_per_token) / limit
            cells = (sequences / time, time * 1e3, bound / time, sequences / theirs, theirs / time)
            rows.append([f"{shape}, {sequences}", *(f"{cell:.2f}" for cell in cells)])
        heads = ["sequences", "tokens/s", "ms a step", "of the limit", "transformers", "times"]
        print_table(heads, rows)
        products = product_rows(ops, width, width, options.rounds)
        products += product_rows(ops, 2 * ffn, width, options.rounds)
    print_table(["product", "us", "TFLOP/s", "same bits", "cuBLAS us", "TFLOP/s", "same bits"], products)


if __name__ == "__main__":
    main()
