"""What each reason to drop documents costs, from the attributes that are there: nothing is computed again."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from lapis.data.decide import Cost
from lapis.data.pipeline import Stages, decided
from lapis.data.recipe import DataConfig, TokenizerConfig
from lapis.data.sources import Listing
from lapis.data.split import Means
from lapis.errors import NotFoundError
from lapis.home import Home

BYTES_PER_TOKEN = 4.0  # where no dataset was tokenized yet


@dataclass(frozen=True)
class Costs:
    """What each reason costs, in the order in which they are looked at, and what is trained on."""

    reasons: list[Cost]
    documents: int
    bytes: int

    def plain(self, bytes_per_token: float) -> dict[str, Any]:
        """JSON-ready values, with tokens estimated from bytes."""

        def tokens(size: int | None) -> int | None:
            return None if size is None else round(size / bytes_per_token)

        rows = [
            {**asdict(one), "tokens": tokens(one.bytes), "alone_tokens": tokens(one.alone_bytes)}
            for one in self.reasons
        ]
        kept = {"documents": self.documents, "bytes": self.bytes, "tokens": tokens(self.bytes)}
        return {"reasons": rows, "kept": kept}


def reason_costs(data: DataConfig, tokenizer: TokenizerConfig, listing: Listing, home: Home) -> Costs:
    """What each reason of a recipe costs. Raises NotFoundError if an attribute is not there yet."""
    made = Stages.of(data, tokenizer, listing, home.data).annotated
    missing = [stage.name for stage in made.stages if not stage.done]
    if missing:
        raise NotFoundError(
            f"Not there yet: {', '.join(missing)}. Either the recipe was never prepared, or these settings change "
            f"what is measured, not only what is decided from it.",
            hint="Prepare it with the same settings: lapis data prepare RECIPE.toml --set …",
        )
    split = decided(data, made, Means())
    sizes, verdicts = split.sizes, split.verdicts
    costs = list(split.costs)
    for code, (step, reason) in enumerate(verdicts.reasons):
        if code and not any((one.step, one.reason) == (step, reason) for one in costs):
            rows = verdicts.code == code
            costs.append(Cost(step, reason, int(rows.sum()), int(sizes[rows].sum())))
    return Costs(costs, len(split.train), int(sizes[split.train].sum()))


def bytes_per_token(
    data: DataConfig, tokenizer: TokenizerConfig, listing: Listing, home: Home
) -> float | None:
    """Bytes of text a token in the prepared dataset of a recipe; None if it is not prepared."""
    tokens = Stages.of(data, tokenizer, listing, home.data).tokens
    if not tokens.done:
        return None
    manifest = json.loads((tokens.folder / "manifest.json").read_text(encoding="utf-8"))
    return float(manifest["bytes"] / max(1, manifest["tokens"]))
