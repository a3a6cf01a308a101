"""torch.compile for the layers of a model in plain torch, with a cache that the next start finds."""

from __future__ import annotations

import os

import torch

from lapis.errors import ConfigError
from lapis.home import Home
from lapis.kernels.stock import StockOps
from lapis.model.families import Decoder

CACHE = "TORCHINDUCTOR_CACHE_DIR"


def compile_layers(model: Decoder, home: Home) -> None:
    """Compile what lies between the attentions of the layers; an attention walks documents and stays as it is.

    Raises ConfigError for kernels that torch cannot look into.
    """
    if not isinstance(model.ops, StockOps):
        raise ConfigError(
            f"train.compile is for plain torch: the kernels {model.ops.name} are compiled already.",
            hint="Leave train.compile out, or take plain torch: LAPIS_KERNELS=stock",
            param="train.compile",
        )
    os.environ.setdefault(CACHE, str(home.root / "cache" / "compile"))
    whole = torch.compiler.disable(model.ops.attention)  # type: ignore[no-untyped-call]
    setattr(model.ops, "attention", whole)  # noqa: B010
    for layer in model.layers:
        layer.compile(dynamic=True)
