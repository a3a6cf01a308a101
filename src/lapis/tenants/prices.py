"""What work costs: a price list that the operator keeps, read again when it changes. Costs are fixed as work ends."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field

from lapis.config import Section, load
from lapis.errors import LapisError
from lapis.log import logger
from lapis.tenants.policy import family
from lapis.tenants.quota import NANO

MILLION = 1_000_000
HOUR_MS = 3_600_000
OTHERS = "default"  # the entry for models that have none of their own

Price = Annotated[float, Field(ge=0, le=1e6)]


class ModelPrice(Section):
    """Money for a million tokens; `cached` ones of the prompt cost as much as others unless told."""

    prompt: Price = 0.0
    cached: Price | None = None
    completion: Price = 0.0


class ComputePrice(Section):
    """Money for an hour of one GPU or one core, for jobs."""

    gpu_hour: Price = 0.0
    cpu_hour: Price = 0.0


class PriceList(Section):
    """Prices by the models' names.

    A version costs as its release and a checkpoint as its model unless it has a price of its own; so does a
    fine-tuned model `ft:BASE:…` as its base.
    """

    currency: Annotated[str, Field(pattern="^[a-z]{3}$")] = "usd"
    models: dict[str, ModelPrice] = Field(default_factory=dict)
    compute: ComputePrice = ComputePrice()

    def model(self, name: str) -> ModelPrice | None:
        """The price of a model, or of its family, its base, or all others; None where nothing is said."""
        base = name.split(":")[1] if name.startswith("ft:") and ":" in name[3:] else name
        names = (name, family(name), base, OTHERS)
        return next((self.models[known] for known in names if known in self.models), None)

    def tokens(self, name: str, prompt: int, completion: int, cached: int = 0) -> int:
        """What tokens cost, in NANO; `cached` ones are among the prompt's."""
        price = self.model(name)
        if price is None:
            return 0
        reread = price.prompt if price.cached is None else price.cached
        money = (prompt - cached) * price.prompt + cached * reread + completion * price.completion
        return round(money * (NANO / MILLION))

    def work(self, cpu_ms: int, gpu_ms: int) -> int:
        """What processor time costs, in NANO."""
        return round((cpu_ms * self.compute.cpu_hour + gpu_ms * self.compute.gpu_hour) * (NANO / HOUR_MS))


FREE = PriceList()


@dataclass(frozen=True)
class _Read:
    """A list, and the state of the file that it was read from."""

    prices: PriceList
    state: tuple[int, int] | None


class Prices:
    """The price list of a file. It may be absent (all is free), and changed while a server runs."""

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._read = _Read(FREE, None)

    def current(self) -> PriceList:
        """The list as it stands in the file now; one that cannot be read is reported, and the last one stays."""
        if self._path is None:
            return FREE
        state = _state(self._path)
        if state == self._read.state:
            return self._read.prices
        with self._lock:
            prices = self._read.prices
            try:
                prices = FREE if state is None else load(self._path, PriceList)
            except LapisError as error:
                logger.error("prices: the last list stays in force: %s", error)
            self._read = _Read(prices, state)
            return prices


def _state(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_mtime_ns, found.st_size
