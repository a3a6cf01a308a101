"""The mesh of a run: how many ranks stand along each axis, and which of them belong together. No torch here."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import cached_property
from math import prod
from typing import NamedTuple

from lapis.errors import ConfigError, nearest
from lapis.model.config import ModelConfig

FORM = 'A mesh is written like "fsdp=4,tp=2"; axes that are not named are 1.'


class Place(NamedTuple):
    """Where one rank stands on each axis."""

    pp: int
    dp: int
    ep: int
    fsdp: int
    cp: int
    tp: int


@dataclass(frozen=True)
class Mesh:
    """Ranks along each axis, the outermost first: neighbours in `tp` are neighbouring ranks.

    pp: stages of layers. dp: copies of everything. ep: owners of different experts. fsdp: shards of every weight.
    cp: parts of every sequence. tp: parts of every head group and feed-forward layer. dp, ep and fsdp see
    different samples.
    """

    pp: int = 1
    dp: int = 1
    ep: int = 1
    fsdp: int = 1
    cp: int = 1
    tp: int = 1

    @staticmethod
    def parse(line: str) -> Mesh:
        """The mesh of a line such as "fsdp=4,tp=2"; an empty line is one rank. Raises ConfigError."""
        found: dict[str, int] = {}
        for item in filter(None, (item.strip() for item in line.split(","))):
            name, _, number = (part.strip() for part in item.partition("="))
            if name not in AXES:
                raise ConfigError(
                    f"mesh: unknown axis {name!r}.", hint=nearest(name, AXES), param="train.mesh"
                )
            if name in found:
                raise ConfigError(f"mesh: the axis {name} is named twice.", hint=FORM, param="train.mesh")
            if not (number.isascii() and number.isdigit() and int(number) > 0):
                raise ConfigError(
                    f"mesh: {item!r}: a positive whole number was expected.", hint=FORM, param="train.mesh"
                )
            found[name] = int(number)
        return Mesh(**found)

    def __str__(self) -> str:
        return ",".join(f"{name}={size}" for name, size in zip(AXES, self.sizes, strict=True) if size > 1)

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """The number of ranks along each axis, in the order of AXES."""
        return tuple(getattr(self, name) for name in AXES)

    @property
    def size(self) -> int:
        """Number of ranks."""
        return prod(self.sizes)

    @property
    def data_ranks(self) -> int:
        """How many shares the samples of a step are dealt in."""
        return self.dp * self.ep * self.fsdp

    @property
    def row_step(self) -> int:
        """The rows of a micro-batch come in multiples of this: context parallel halves its parts once more."""
        return self.tp * (2 * self.cp if self.cp > 1 else 1)

    def place(self, rank: int) -> Place:
        """Where a rank stands."""
        found = []
        for size in reversed(self.sizes):
            rank, at = divmod(rank, size)
            found.append(at)
        return Place(*reversed(found))

    def rank(self, place: Place) -> int:
        """The rank that stands there."""
        found = 0
        for size, at in zip(self.sizes, place, strict=True):
            found = found * size + at
        return found

    def data_rank(self, rank: int) -> int:
        """Which share of the samples a rank sees."""
        at = self.place(rank)
        return (at.dp * self.ep + at.ep) * self.fsdp + at.fsdp

    def peers(self, rank: int, *axes: str) -> tuple[int, ...]:
        """The ranks that differ from this one on these axes alone, itself among them, in ascending order."""
        at = self.place(rank)
        moves = (range(getattr(self, name)) if name in axes else (getattr(at, name),) for name in AXES)
        return tuple(self.rank(Place(*spot)) for spot in itertools.product(*moves))

    def require(self, started: int | None) -> None:
        """Raise ConfigError if another number of ranks is started than the mesh has; None: it is not known yet."""
        if started is not None and started != self.size:
            ranks = "1 rank" if self.size == 1 else f"{self.size} ranks"
            raise ConfigError(
                f"The mesh {str(self) or 'of one rank'} has {ranks}, but {started} were started.",
                hint=f"Start {ranks}, or change train.mesh.",
                param="train.mesh",
            )

    def check(self, config: ModelConfig, *, sequence: int, batch: int) -> None:
        """Raise ConfigError naming everything that this mesh cannot divide; `batch` windows make one step."""
        wrong = [
            f"{what} = {size} does not divide by {name} = {ranks}"
            for what, size, name, ranks in self._divisions(config, sequence, batch)
            if size % ranks
        ]
        if self.ep > 1 and config.family != "moe":
            wrong.append(f"ep = {self.ep}: a model of the family {config.family} has no experts")
        if self.pp > config.layers:
            wrong.append(f"pp = {self.pp}: there are only {config.layers} layers")
        if wrong:
            raise ConfigError(
                f"The mesh {self} does not fit: {'; '.join(wrong)}.",
                hint="Try others with: lapis train RECIPE --dry-run --set train.mesh=…",
                param="train.mesh",
            )

    def _divisions(
        self, config: ModelConfig, sequence: int, batch: int
    ) -> Iterator[tuple[str, int, str, int]]:
        mixtures = [config.is_mixture(layer) for layer in range(config.layers)]
        yield "heads", config.heads, "tp", self.tp
        yield "kv_heads", config.kv_heads, "tp", self.tp
        if not all(mixtures):
            yield "ffn", config.ffn, "tp", self.tp
        if any(mixtures):
            yield "expert_ffn", config.expert_ffn, "tp", self.tp
            yield "experts", config.experts, "ep", self.ep
        yield "train.sequence", sequence, "2·cp·tp" if self.cp > 1 else "tp", self.row_step
        yield "train.batch", batch, "dp·ep·fsdp", self.data_ranks


AXES = tuple(field.name for field in fields(Mesh))
