"""A model that stays as it is while another one learns: what preferences are compared with.

Where ranks hold parts of it they pass through it together, so what one of them needs, all of them do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from lapis.model.families import Decoder, build


@dataclass(frozen=True)
class Reference:
    """The model as it was at one moment, and what the ranks that hold it agree on."""

    find: Callable[
        [Callable[[Decoder], Tensor]], Tensor
    ]  # what a function finds with the model, without gradients
    wanted: Callable[[bool], bool]  # whether any rank wants to: then all of them have to


def of_whole(model: Decoder) -> Reference:
    """A model that this process has all of, as it is now."""
    first = first_weights(model)
    return Reference(lambda function: function(first), lambda here: here)


def first_weights(model: Decoder) -> Decoder:
    """What is the model as it is now for ever: one with adapters itself, to be run without them; else a copy."""
    if model.lora is not None:
        return model
    copy = build(model.config, dtype=model.dtype)
    copy.load_state_dict(model.state_dict())
    copy.requires_grad_(False)
    return copy
