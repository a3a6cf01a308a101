"""Signs of life inside a step, so that of ranks that wait for each other the one to blame is known."""

from __future__ import annotations

import time

from torch import Tensor, nn

from lapis.model.families import Decoder
from lapis.train.heartbeat import Heartbeat


def give_signs(model: Decoder, heartbeat: Heartbeat) -> None:
    """Tell the heartbeat of every layer, forward and back, and count the time in layers as the rank's own work.

    To be called when FSDP has its hooks: weights are gathered and freed outside of what is counted. On a GPU the
    host's time is counted, which the device's work may outlast.
    """
    begun = 0.0

    def begin(layer: nn.Module, inputs: object) -> None:
        nonlocal begun
        heartbeat.works()
        begun = time.monotonic()

    def end(layer: nn.Module, inputs: object, x_TH: Tensor) -> None:
        heartbeat.waits(time.monotonic() - begun)
        if x_TH.requires_grad:
            x_TH.register_hook(lambda gradient: heartbeat.waits())  # type: ignore[no-untyped-call]

    for layer in model.layers:
        layer.register_forward_pre_hook(begin)
        layer.register_forward_hook(end, prepend=True)
