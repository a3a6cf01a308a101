"""A rank of a parallel run: trains small models on many meshes in one launch and writes what it saw.

`python -m tests.parallel_worker FOLDER NAME…` with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT; the names are those
of CASES. Each rank writes FOLDER/NAME.RANK.pt: losses and norms of all steps, gradients of the first, and the weights
after one step along a given gradient.

Dims: T tokens, H width.
"""

from __future__ import annotations

import itertools
import os
import sys
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lapis.data.loader import TokenBatch
from lapis.kernels.batch import packed
from lapis.model.config import ModelConfig
from lapis.model.families import Decoder, initial_weights
from lapis.model.shapes import shapes
from lapis.train.mesh import Mesh
from lapis.train.parallel import Parallel, parallelize
from lapis.train.recipe import TrainSection
from lapis.train.sharded_optimizer import inside, local, outside
from lapis.train.stages import PER_RANK
from lapis.train.world import World

WINDOW, WINDOWS, STEPS, CLIP = 32, 8, 5, 0.2
BETAS = (0.8, 0.95)
LR, EMBED_LR, WEIGHT_DECAY, SEED = 0.003, 0.003, 0.01, 3

LLAMA = ModelConfig(
    family="llama", vocab_size=96, layers=2, width=64, heads=4, kv_heads=2, head_size=16, ffn=96, context=128,
    rope_base=10000.0, norm_eps=1e-5, tied=True,
)  # fmt: skip
MODELS = {
    "llama": LLAMA,
    "qwen2": replace(LLAMA, qkv_bias=True, tied=False),
    "qwen3": replace(LLAMA, head_norm="head", window=20, full_layers=(1,)),
    "biased": replace(LLAMA, qkv_bias=True, out_bias=True, ffn_bias=True),
    "gpt2": replace(
        LLAMA, family="gpt2", kv_heads=4, rope_base=0.0, qkv_bias=True, out_bias=True, ffn_bias=True
    ),
    "mixtral": replace(
        LLAMA, family="moe", experts=4, experts_per_token=2, expert_ffn=64, normalise_experts=True
    ),
    "odd": replace(LLAMA, family="moe", experts=3, experts_per_token=2, expert_ffn=64),
    "olmoe": replace(
        LLAMA, family="moe", experts=4, experts_per_token=2, expert_ffn=32, head_norm="whole", tied=False,
        layers=3, dense_layers=(1,),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One model on one mesh."""

    model: str
    mesh: str
    optimizer: str = "adamw"
    dtype: str = "fp32"
    recompute: str = "none"
    pipeline: str = "1f1b"

    @property
    def config(self) -> ModelConfig:
        """The model's; stages need more layers."""
        config = MODELS[self.model]
        return replace(config, layers=4) if "pp" in self.mesh else config

    @property
    def name(self) -> str:
        """Of the files that belong to it."""
        return (
            f"{self.model}-{self.mesh.replace('=', '').replace(',', '-')}-{self.optimizer}-{self.dtype}"
            + (f"-{self.pipeline}-{self.recompute}" if "pp" in self.mesh else "")
        )


SHORT = (
    Case("llama", "dp=2"), Case("qwen2", "fsdp=2", "muon"), Case("gpt2", "tp=2"), Case("qwen3", "cp=2"),
    Case("mixtral", "ep=2", "muon"), Case("llama", "fsdp=2", dtype="bf16"), Case("qwen2", "fsdp=2,tp=2", "muon"),
    Case("olmoe", "ep=2,fsdp=2", "muon"), Case("llama", "cp=2,fsdp=2", recompute="full"),
)  # fmt: skip
PIPELINES = (
    Case("llama", "pp=2"), Case("gpt2", "pp=2", pipeline="interleaved"),
    Case("olmoe", "pp=2", pipeline="zero-bubble-v"), Case("gpt2", "pp=2,tp=2", pipeline="zero-bubble"),
)  # fmt: skip
LONG = tuple(
    Case(model, mesh, optimizer)
    for optimizer in ("adamw", "muon")
    for model in MODELS
    for mesh in ("dp=2", "fsdp=2", "tp=2", "cp=2", "ep=2", "dp=2,fsdp=2", "fsdp=4", "dp=2,tp=2", "fsdp=2,tp=2",
                 "fsdp=2,cp=2", "cp=2,tp=2", "cp=4", "ep=2,fsdp=2", "ep=2,tp=2", "ep=2,cp=2", "ep=4", "ep=2,dp=2")
    if "ep" not in mesh or MODELS[model].experts == 4
)  # fmt: skip
LONG_PIPELINES = (
    Case("qwen2", "pp=2", "muon", pipeline="gpipe"), Case("llama", "pp=2", dtype="bf16", recompute="full"),
    Case("llama", "pp=2,fsdp=2", "muon", pipeline="interleaved"),
    *(
        Case(model, mesh, pipeline=pipeline, recompute=recompute)
        for model, mesh, recompute in (
            *((model, "pp=2", "none") for model in MODELS), ("llama", "pp=2", "full"), ("mixtral", "pp=2", "selective"),
            *(("olmoe", f"pp=2,{axis}=2", "none") for axis in ("dp", "fsdp", "tp", "cp", "ep")),
            ("odd", "pp=2,fsdp=2", "none"), ("gpt2", "pp=2,cp=2", "none"), ("llama", "pp=4", "none"),
        )
        for pipeline in PER_RANK
        if mesh != "pp=4" or PER_RANK[pipeline] == 1
    ),
)  # fmt: skip
CASES = {case.name: case for case in (*SHORT, *PIPELINES, *LONG, *LONG_PIPELINES)}


def windows(step: int) -> list[TokenBatch]:
    """The windows of a step: each two documents of random length, one token in four without weight."""
    random = np.random.default_rng([SEED, step])
    found = []
    for _ in range(WINDOWS):
        stream = random.integers(0, 90, WINDOW + 1)
        targets_T = np.where(random.random(WINDOW) < 0.25, -1, stream[1:])
        border = int(random.integers(1, WINDOW))
        found.append(TokenBatch(stream[:-1], targets_T, (border, WINDOW - border)))
    return found


def joined(batches: list[TokenBatch]) -> TokenBatch:
    """Windows as one micro-batch."""
    return TokenBatch(
        np.concatenate([batch.ids_T for batch in batches]),
        np.concatenate([batch.targets_T for batch in batches]),
        tuple(length for batch in batches for length in batch.lengths),
    )


def loss(model: Decoder, micro: TokenBatch, weight: float) -> Tensor:
    """Summed loss of a micro-batch / the weight of the step."""
    x_TH = model.hidden(torch.from_numpy(micro.ids_T), packed(micro.lengths))
    assert isinstance(model.head_weight, Tensor)
    return model.ops.linear_cross_entropy(x_TH, model.head_weight, torch.from_numpy(micro.targets_T)) / weight


def weight_of(step: int) -> float:
    """How many tokens of a step are trained on."""
    return float(sum((batch.targets_T >= 0).sum() for batch in windows(step)))


def run(case: Case, world: World) -> dict[str, object]:
    """Train for some steps. Returns what the test compares."""
    count = 4 if world.mesh.pp > 1 else 2  # micro-batches of a rank
    section = TrainSection(
        steps=STEPS, optimizer=case.optimizer, dtype=case.dtype, recompute=case.recompute, seed=SEED, clip=CLIP,
        pipeline=case.pipeline, sequence=WINDOW, batch=WINDOWS, micro_batch=WINDOWS // world.data_ranks // count,
        betas=BETAS, weight_decay=WEIGHT_DECAY,
    )  # fmt: skip
    made = parallelize(case.config, world, section)
    losses, norms, grads = [], [], {}
    for step in range(STEPS):
        mine = windows(step)[world.data_rank :: world.data_ranks]
        borders = (
            (0, 3, 4, 6, 8)
            if len(mine) == 2 * count == WINDOWS
            else range(0, len(mine) + 1, len(mine) // count)
        )
        weight, micros = weight_of(step), [joined(mine[a:b]) for a, b in itertools.pairwise(borders)]
        numbers = made.finish(
            made.backward(lambda model, part, weight=weight: loss(model, part, weight), micros)
        )
        losses.append(numbers.loss)
        norms.append(numbers.norm)
        if step == 0:
            grads = {name: grad.clone() for name, grad in made.optimizer.gradients().items()}
        made.update(norms[-1], lr=LR, embed_lr=EMBED_LR)
    made.fill(initial_weights(case.config, SEED))
    whole = made.whole()
    found = {} if whole is None else {name: weight.detach() for name, weight in whole.named_parameters()}
    weights = lone_step(case.config, made)
    return {"losses": losses, "norms": norms, "grads": grads, "weights": weights, "whole": found}


def gradient(config: ModelConfig) -> dict[str, Tensor]:
    """Some gradient of every weight."""
    generator = torch.Generator().manual_seed(SEED)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes(config).items()}


def lone_step(config: ModelConfig, made: Parallel) -> dict[str, Tensor]:
    """This rank's weights after one step from the first weights along a gradient that is the same everywhere."""
    made.fill(initial_weights(config, SEED))
    for shards in (made.optimizer.first, made.optimizer.second):
        for shard in shards.values():
            shard.zero_()
    made.optimizer.steps = 0
    world, wholes = made.world, gradient(config)
    for name, parameter in made.optimizer.named.items():
        parameter.grad = torch.zeros_like(parameter)
        placement = made.placements[name]
        if placement.tp_dim is not None or world.mesh.place(world.rank).tp == 0:  # else one of tp's summands
            for piece in placement.held(world.mesh, world.rank):
                inside(local(parameter.grad), piece).copy_(outside(wholes[name], piece))
    made.update(made.optimizer.finish(), lr=LR, embed_lr=EMBED_LR)
    return made.optimizer.master


def main(folder: Path, names: list[str]) -> None:
    """Every case of the names on this rank."""
    torch.set_num_threads(1)
    join = cache(lambda mesh: World.join(Mesh.parse(mesh), torch.device("cpu")))
    for name in names:
        torch.save(run(CASES[name], join(CASES[name].mesh)), folder / f"{name}.{os.environ['RANK']}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
