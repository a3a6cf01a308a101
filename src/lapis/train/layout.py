"""What each rank of a mesh would hold and need, computed without starting one. No torch here.

Weights, optimizer state and gradients are exact; activations are an estimate of what the ops keep for the gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lapis.errors import ConfigError
from lapis.log import bytes_text
from lapis.model.config import ModelConfig
from lapis.train.mesh import Mesh, Place
from lapis.train.placement import Placement, elements, local_config, placements
from lapis.train.recipe import TrainSection
from lapis.train.stages import Stages

FP32 = 4
BYTES = {"bf16": 2, "fp32": 4}
LOGITS = 1 << 22  # that exist at a time in the loss
AHEAD = 2  # layers whose whole weights exist at a time: the one that computes and the next


@dataclass(frozen=True)
class RankLayout:
    """One rank: where it stands, what it holds, and bytes by what they are for."""

    rank: int
    place: Place
    data_rank: int
    layers: tuple[range, ...]  # of each stage that it has in a pipeline
    heads: range
    experts: range
    parameters: int  # elements that this rank keeps
    master: int
    moments: int
    gradients: int
    gathered: int  # whole weights and gradients: of layers at work, embedding and head; in a pipeline of all
    activations: int

    @property
    def total(self) -> int:
        """Bytes at the peak of a step."""
        return self.master + self.moments + self.gradients + self.gathered + self.activations


def check(config: ModelConfig, mesh: Mesh, section: TrainSection, answers: int = 1) -> Stages:
    """The stages of a layout; a prompt has so many `answers`. Raises ConfigError for what the mesh cannot divide."""
    mesh.check(config, sequence=section.sequence, batch=section.batch)
    if section.objective in (
        "pretrain",
        "grpo",
    ):  # the others pack examples into micro-batches by their tokens
        section.shares(mesh.data_ranks, answers)
    stages = Stages.cut(config, mesh.pp, section.pipeline, section.sequence)
    if mesh.pp > 1:
        stages.check(section.micros(mesh.data_ranks))
    return stages


def plan(config: ModelConfig, mesh: Mesh, section: TrainSection, answers: int = 1) -> list[RankLayout]:
    """The layout of every rank. Raises as `check`."""
    stages = check(config, mesh, section, answers)
    placed = placements(config)
    return [_rank(config, mesh, section, stages, placed, rank) for rank in range(mesh.size)]


def check_memory(layouts: Sequence[RankLayout], memory: int) -> None:
    """Raise ConfigError if a rank needs more bytes than there are."""
    most = max(layouts, key=lambda layout: layout.total)
    if most.total > memory:
        raise ConfigError(
            f"Rank {most.rank} needs about {bytes_text(most.total)}, there are {bytes_text(memory)}.",
            hint="More shards (fsdp), train.recompute=full or a smaller train.micro_batch need less.",
        )


def rows(layouts: Sequence[RankLayout]) -> list[tuple[str, ...]]:
    """Ranks, layers, heads, experts, parameters, gigabytes, those of activations; ranks that hold alike are one row."""
    alike: dict[tuple[str, ...], list[int]] = {}
    for layout in layouts:
        spans = (" and ".join(map(_span, layout.layers)), _span(layout.heads), _span(layout.experts))
        sizes = (f"{layout.total / 1e9:,.2f}", f"{layout.activations / 1e9:,.2f}")
        alike.setdefault((*spans, f"{layout.parameters:,}", *sizes), []).append(layout.rank)
    return [(_ranks(ranks), *cells) for cells, ranks in alike.items()]


def _ranks(ranks: Sequence[int]) -> str:
    whole = range(ranks[0], ranks[-1] + 1)
    if len(ranks) == len(whole):
        return _span(whole)
    return ", ".join(map(str, ranks[:2])) + (f", … {ranks[-1]} ({len(ranks)} ranks)" if ranks[2:] else "")


def _span(numbers: range) -> str:
    if not numbers:
        return "–"
    return f"{numbers[0]}" if len(numbers) == 1 else f"{numbers[0]}–{numbers[-1]}"


def _rank(
    config: ModelConfig,
    mesh: Mesh,
    section: TrainSection,
    stages: Stages,
    placed: dict[str, Placement],
    rank: int,
) -> RankLayout:
    place = mesh.place(rank)
    layers = stages.layers(place.pp)
    used = [name for name in placed if any(stages.uses(stage, name) for stage in stages.of(place.pp))]
    here = {name: placed[name] for name in used}
    held = {
        name: elements(placement.held(mesh, rank))
        for name, placement in here.items()
        if stages.keeps(place.pp, name)
    }
    hidden = {name for name in held if placed[name].layer is not None and len(placed[name].shape) >= 2}
    kept = sum(held.values())
    second = kept - (sum(held[name] for name in hidden) if section.optimizer == "muon" else 0)
    heads, experts = config.heads // mesh.tp, config.experts // mesh.ep
    return RankLayout(
        rank=rank,
        place=place,
        data_rank=mesh.data_rank(rank),
        layers=layers,
        heads=range(place.tp * heads, (place.tp + 1) * heads),
        experts=range(place.ep * experts, (place.ep + 1) * experts),
        parameters=kept,
        master=FP32 * kept,
        moments=FP32 * (kept + second),
        gradients=FP32 * kept,
        gathered=_gathered(mesh, section, here),
        activations=_activations(config, mesh, section, stages, place.pp),
    )


def _gathered(mesh: Mesh, section: TrainSection, here: dict[str, Placement]) -> int:
    """Weights and gradients of whole layers at work; those of embedding and head exist all the time.

    In a pipeline all weights of the rank's stages are whole during a step, and their gradients' sums.
    """
    by_layer: dict[int | None, int] = {}
    for placement in here.values():
        count = 1
        for size in placement.computed_shape(mesh):
            count *= size
        by_layer[placement.layer] = by_layer.get(placement.layer, 0) + count
    size = BYTES[section.dtype]
    if mesh.pp > 1:
        return (size + FP32) * sum(by_layer.values()) + size * max(by_layer.values())
    outer = by_layer.pop(None, 0)
    layer = max(by_layer.values(), default=0)
    return size * (2 * outer + (AHEAD + 1) * layer) + FP32 * max(outer, layer)


def _activations(config: ModelConfig, mesh: Mesh, section: TrainSection, stages: Stages, rank: int) -> int:
    """What the ops keep of micro-batches until their gradients, and the logits that exist at a time."""
    layers, micros = sum(map(len, stages.layers(rank))), section.micros(mesh.data_ranks)
    windows = section.micro_batch or section.batch // mesh.data_ranks
    size, own = BYTES[section.dtype], local_config(config, mesh)
    branch = windows * section.sequence // mesh.cp  # rows inside a branch; between them tp splits them
    between = branch // mesh.tp
    query, key = own.heads * own.head_size, own.kv_heads * own.head_size
    kept = between * 2 * own.width  # what enters the two norms
    kept += branch * (
        2 * own.width + 2 * query + 3 * key + query + key
    )  # their results, q, k, v, and turned; out
    kept += 2 * key * branch * mesh.cp if mesh.cp > 1 else 0  # keys and values of all
    if config.experts:
        travelling = branch * config.experts_per_token * own.width
        kept += travelling * (3 if mesh.ep > 1 else 0) + branch * 2 * config.experts
    else:
        kept += branch * own.ffn * (2 if config.family == "gpt2" else 3)
    alone = between * own.width  # a layer that is computed again keeps what enters it
    full, again = {"none": (layers, 0), "selective": (layers // 2, layers - layers // 2)}.get(
        section.recompute, (1, layers)
    )
    chunk = FP32 * min(LOGITS, between * config.vocab_size)
    in_flight = stages.in_flight(rank, micros)
    return int(size * in_flight * (full * kept + again * alone + 2 * alone)) + 2 * chunk
