"""Prompts as token ids, with what a grader needs to know of each; held-out ones apart."""

from __future__ import annotations

from dataclasses import dataclass

from lapis.data.examples import Line, Prompt
from lapis.data.recipe import ExamplesConfig
from lapis.data.samples import Encoder, fits, nothing_left, read_sets
from lapis.errors import InputError
from lapis.log import Progress, silent

LIMIT = "train.sequence - grpo.max_tokens"


@dataclass(frozen=True)
class Asked:
    """A prompt, its ids as they are served, and the file and line where it stands."""

    prompt: Prompt
    ids: tuple[int, ...]
    place: str


@dataclass(frozen=True)
class Prompts:
    """What a model is to answer. `digest` covers lines, template, tokenizer and the model that they are for."""

    trained: tuple[Asked, ...]
    heldout: tuple[Asked, ...]
    dropped: int  # too long
    digest: str

    @property
    def tokens(self) -> int:
        """Tokens of all prompts to train on."""
        return sum(len(asked.ids) for asked in self.trained)


def prepare_prompts(
    config: ExamplesConfig, encoder: Encoder, *, longest: int, model: str = "", progress: Progress = silent
) -> Prompts:
    """Read, check and encode all prompts; those of more than `longest` tokens are refused or dropped, as asked.

    Raises InputError naming file and line.
    """
    lines, apart, digest = read_sets(config, encoder, "prompts", longest, model)
    wanted = [*lines, *apart]
    found: list[Asked | None] = []
    for number, line in enumerate(wanted):
        progress(number, len(wanted), f"prompt {number:,} of {len(wanted):,}")
        asked = _asked(line, encoder)
        fit = fits(line, len(asked.ids), longest, config.too_long == "drop", LIMIT)
        found.append(asked if fit else None)
    trained = tuple(asked for asked in found[: len(lines)] if asked is not None)
    if not trained:
        raise nothing_left(lines, longest)
    heldout = tuple(asked for asked in found[len(lines) :] if asked is not None)
    return Prompts(trained, heldout, found.count(None), digest)


def _asked(line: Line, encoder: Encoder) -> Asked:
    assert isinstance(line.example, Prompt), "prompts were asked for"
    try:
        ids = encoder.prompt(line.example)
    except InputError as error:
        raise InputError(f"{line.place}: {error.message.rstrip('.')}.", hint=error.hint) from error
    if not ids:
        raise InputError(f"{line.place}: the prompt has no token.")
    return Asked(line.example, tuple(ids), line.place)
