"""What all ops around other ops share: every operation that they leave alone is the inner ops' own."""

from __future__ import annotations

from typing import Any

from lapis.kernels.ops import Ops


class OpsAround:
    """Ops over other ops. A subclass defines those that need other ranks; the model sees no difference."""

    def __init__(self, inner: Ops) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["inner"], name)
