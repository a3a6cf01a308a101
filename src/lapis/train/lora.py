"""Low-rank adapters in training (LoRA, Hu et al. 2021): two thin matrices beside each frozen weight.

One pair (A, B) for each of PEFT's modules; where a weight joins several of them, as query, key and value, their As are
stacked and their Bs stand on a diagonal, times alpha / rank. What training computes with is what is exported and
served, bit for bit. Dims: T tokens of a batch, K and N inputs and outputs of a module, R rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lapis.errors import ConfigError
from lapis.kernels.batch import AdapterPair, Batch
from lapis.model.adapters import Adapter, Pair, modules_of
from lapis.model.config import ModelConfig
from lapis.model.families import Decoder
from lapis.train.recipe import LoraSection


class Lora(nn.Module):
    """The trainable pairs of all layers: A random, as PEFT starts it, B zero, so that at first nothing changes."""

    def __init__(
        self,
        section: LoraSection,
        config: ModelConfig,
        seed: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        self.config, self.rank, self.scale = config, section.rank, section.alpha / section.rank
        self.modules_of_layer = chosen_modules(config, section.targets)
        self.layers = nn.ModuleList()
        generator = torch.Generator().manual_seed(seed)
        for _ in range(config.layers):
            pairs = nn.ModuleDict()
            for name, (rows, columns) in self.modules_of_layer.items():
                bound = columns**-0.5  # kaiming_uniform_ with a = √5
                a_RK = torch.empty(section.rank, columns).uniform_(-bound, bound, generator=generator)
                pairs[_key(name)] = Low(a_RK.to(device, dtype), rows)
            self.layers.append(pairs)

    def forward(self, batch: Batch) -> Batch:
        """The batch with the adapter on every token."""
        adapters: Sequence[Mapping[str, Sequence[AdapterPair]]] = [
            {name: [pair] for name, pair in layer.items()} for layer in self.pairs()
        ]
        return replace(batch, adapter_T=torch.zeros(batch.tokens, dtype=torch.int32), adapters=adapters)

    def pairs(self) -> list[dict[str, Pair]]:
        """For each layer, by the name of our weight, the joined pair that is computed with."""
        return [
            {
                name: self._joined(layer, parts)
                for name, parts in modules_of(self.config).items()
                if parts.keys() & self.modules_of_layer.keys()
            }
            for layer in self.layers
        ]

    def adapter(self) -> Adapter:
        """The adapter as it is now: what is exported and served."""
        with torch.no_grad():
            return Adapter(tuple(self.pairs()))

    def _joined(self, layer: nn.Module, parts: Mapping[str, tuple[int, int]]) -> Pair:
        """The pairs of the modules that one weight joins: one above the other, and on a diagonal."""
        assert isinstance(layer, nn.ModuleDict)
        known = {name: cast(Low, layer[_key(name)]) for name in parts if name in self.modules_of_layer}
        width, left = len(known) * self.rank, 0
        above: list[Tensor] = [low.A for low in known.values()]
        beside: list[Tensor] = []
        for name, (rows, _) in parts.items():
            if name not in known:
                beside.append(above[0].new_zeros(rows, width))
                continue
            beside.append(F.pad(known[name].B * self.scale, (left, width - left - self.rank)))
            left += self.rank
        odd = width % 2  # ranks of adapters are even
        return F.pad(torch.cat(above), (0, 0, 0, odd)), F.pad(torch.cat(beside), (0, odd))


class Low(nn.Module):
    """A (R, K) and B (N, R) of one module."""

    def __init__(self, a_RK: Tensor, rows: int) -> None:
        super().__init__()
        self.A = nn.Parameter(a_RK)
        self.B = nn.Parameter(a_RK.new_zeros(rows, len(a_RK)))


def attach(model: Decoder, section: LoraSection, seed: int) -> Lora:
    """Freeze a model and give it adapters to train in its place. Raises ConfigError for unknown targets."""
    model.requires_grad_(False)
    lora = Lora(section, model.config, seed, model.dtype, model.ops.device)
    model.lora = lora
    return lora


def bare(batch: Batch, layers: int) -> Batch:
    """The batch without any adapter, also in a model that has them in training."""
    return replace(batch, adapters=[{}] * layers)


def chosen_modules(config: ModelConfig, targets: Sequence[str]) -> dict[str, tuple[int, int]]:
    """The modules that `targets` name by their last part, with outputs and inputs; all of them where none is named.

    Raises ConfigError for a name that the model does not have.
    """
    known = {name: size for parts in modules_of(config).values() for name, size in parts.items()}
    ends = {name.rsplit(".", 1)[-1] for name in known}
    for target in targets:
        if target not in ends:
            raise ConfigError(
                f"lora.targets: the model has no linear map {target!r} that can be adapted.",
                hint=f"It has {', '.join(sorted(ends))}.",
                param="lora.targets",
            )
    return {name: size for name, size in known.items() if not targets or name.rsplit(".", 1)[-1] in targets}


@torch.no_grad()
def merged(state: Mapping[str, Tensor], adapter: Adapter) -> dict[str, Tensor]:
    """A model's weights with an adapter added: W + B A, summed in fp32, rounded once to the weight's type."""
    whole = dict(state)
    for layer, pairs in enumerate(adapter.layers):
        for name, (a_RK, b_NR) in pairs.items():
            key = f"layers.{layer}.{name}"
            whole[key] = (state[key].float() + b_NR.float() @ a_RK.float()).to(state[key].dtype)
    return whole


def _key(module: str) -> str:
    return module.replace(".", "_")
