"""Decoding steps without the engine around them: step_worker.py FOLDER [FOLDER of the kernels' prototype].

Pages are full of some keys and values, in a shuffled order; each step's best tokens are the next step's.
"""

from __future__ import annotations

import importlib
import os
import random
import shutil
import sys
import tempfile
import time
from array import array
from collections.abc import Callable
from pathlib import Path

import torch
from conversation import Times, converse
from safetensors.torch import load_file
from torch import Tensor

from lapis.inference.kv_cache import PAGE, pages_for
from lapis.inference.replayed import Part, ReplayedSteps
from lapis.model.weights import read_model

Step = Callable[
    [list[int], int], list[int]
]  # the tokens of all sequences at a position, to the best next ones
MakeStep = Callable[[int, int], Step]  # for so many sequences and positions

GGUF_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "model.layers": "blk",
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
}


def main() -> None:
    """Load the model and answer."""
    folder = Path(sys.argv[1])
    torch.set_grad_enabled(False)
    with tempfile.TemporaryDirectory() as place:
        made = prototype(folder, Path(sys.argv[2]), Path(place)) if sys.argv[2:] else lapis(folder)

    def generate(prompts: list[list[int]], tokens: int) -> tuple[float, int, Times]:
        start_at = len(prompts[0])
        step = made(len(prompts), start_at + tokens)
        ids, times = [prompt[-1] for prompt in prompts], []
        start = time.perf_counter()
        for position in range(start_at, start_at + tokens):
            ids = step(ids, position)
            times.append(time.perf_counter() - start)
        return times[-1], tokens * len(prompts), [times] * len(prompts)

    converse("the step alone", generate)


def lapis(folder: Path) -> MakeStep:
    """The steps that the engine makes."""
    model = read_model(folder).model.eval()
    model.seal()

    def make(sequences: int, positions: int) -> Step:
        tables = [array("i", pages) for pages in _tables(sequences, positions)]
        caches = model.new_caches(sequences * len(tables[0]) + 1)
        for cache in caches:
            cache.keys.normal_()
            cache.values.normal_()
        steps = ReplayedSteps(model, caches, sequences * len(tables[0]), model.config.vocab_size)

        def step(ids: list[int], position: int) -> list[int]:
            parts = [Part([id], position, table) for id, table in zip(ids, tables, strict=True)]
            done = steps.run(parts, range(sequences))
            if done is None:
                raise SystemExit(f"the step is not replayed: {steps.reason}")
            return done[1]

        return step

    return make


def prototype(folder: Path, source: Path, place: Path) -> MakeStep:
    """The steps of the prototype, built in `place`."""
    for file in source.iterdir():
        shutil.copyfile(file, place / file.name)
    os.environ["SMOLLM2_WHEEL"] = ""  # its own way to weights, which is not gone
    sys.path.insert(0, str(place))
    lk, graph = importlib.import_module("lk"), importlib.import_module("graph")
    model = lk.Model({_gguf_name(name): x for name, x in load_file(folder / "model.safetensors").items()})
    for matrix in (model.emb, *(weight for weight in model.w if weight.ndim == 2)):
        lk.packed(matrix)  # not while it records

    def make(sequences: int, positions: int) -> Step:
        table_SP = torch.tensor(_tables(sequences, positions), dtype=torch.int32)
        caches = [tuple(torch.randn(2, table_SP.numel(), 3 * 2048).bfloat16()) for _ in range(model.L)]
        recorded = graph.Graph(model, sequences, table_SP.shape[1], caches)
        recorded.b.tab.copy_(table_SP)

        def step(ids: list[int], position: int) -> list[int]:
            recorded.ids.copy_(torch.tensor(ids))
            recorded.b.pos.fill_(position)
            recorded.b.page.copy_(table_SP[:, position // PAGE])
            recorded.step()
            best: Tensor = recorded.am
            return best.tolist()

        return step

    return make


def _tables(sequences: int, positions: int) -> list[list[int]]:
    columns = pages_for(positions)
    pages = list(range(sequences * columns))
    random.shuffle(pages)
    return [pages[n * columns : (n + 1) * columns] for n in range(sequences)]


def _gguf_name(name: str) -> str:
    for ours, theirs in GGUF_NAMES.items():
        name = name.replace(ours, theirs)
    return name


if __name__ == "__main__":
    main()
