"""Every error that Lapis raises on purpose, as one short tree.

    LapisError            code          HTTP  exit
    ├── InputError        bad_input      400    2   a value, a file or a text that cannot be used
    ├── ConfigError       bad_config     400    2   a recipe, an option or a setting that cannot be used
    ├── AuthError         unauthorized   401    3   no key, or a key that may not do this
    ├── NotFoundError     not_found      404    4   a model, a run, a release that is not there
    ├── ConflictError     conflict       409    5   somebody else holds it, or the state does not allow it
    ├── LimitError        rate_limited   429    6   a quota or a full queue: try again later
    ├── IntegrityError    corrupt        500    7   bytes that do not match their digest
    ├── UnavailableError  unavailable    503    8   a missing package, compiler, network or model that is not ready
    ├── StorageError      no_space       507    9   the disk is full or refuses to be written
    └── TrainingError     training       500   10   a run whose numbers went wrong

A click usage error exits with 2 and Ctrl-C with 130, as in every shell program.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class LapisError(Exception):
    """What went wrong, and in `hint` what to do next (a command where there is one)."""

    code = "error"
    http_status = 500
    exit_status = 1

    def __init__(self, message: str, *, hint: str = "", param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.param = param  # the field of a request or recipe that is to blame

    def __str__(self) -> str:
        return f"{self.message}\n{self.hint}" if self.hint else self.message


class InputError(LapisError):
    code, http_status, exit_status = "bad_input", 400, 2


class ConfigError(LapisError):
    code, http_status, exit_status = "bad_config", 400, 2


class AuthError(LapisError):
    code, http_status, exit_status = "unauthorized", 401, 3


class NotFoundError(LapisError):
    code, http_status, exit_status = "not_found", 404, 4


class ConflictError(LapisError):
    code, http_status, exit_status = "conflict", 409, 5


class LimitError(LapisError):
    """Carries `retry_after`, the seconds after which another try makes sense; None: something must change first."""

    code, http_status, exit_status = "rate_limited", 429, 6

    def __init__(
        self, message: str, *, retry_after: float | None = 1.0, hint: str = "", param: str | None = None
    ):
        super().__init__(message, hint=hint, param=param)
        self.retry_after = retry_after


class IntegrityError(LapisError):
    code, http_status, exit_status = "corrupt", 500, 7


class UnavailableError(LapisError):
    """May carry `retry_after`, the seconds after which another try makes sense."""

    code, http_status, exit_status = "unavailable", 503, 8

    def __init__(
        self, message: str, *, retry_after: float | None = None, hint: str = "", param: str | None = None
    ):
        super().__init__(message, hint=hint, param=param)
        self.retry_after = retry_after


class StorageError(LapisError):
    code, http_status, exit_status = "no_space", 507, 9


class TrainingError(LapisError):
    code, http_status, exit_status = "training", 500, 10


def nearest(name: str, known: Iterable[str]) -> str:
    """A sentence that helps after a wrong name: the closest known one, or all of them if they are few."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    if close:
        return f"Did you mean {close[0]!r}?"
    if 0 < len(names) <= 12:
        return f"Known: {', '.join(names)}."
    return ""
