"""What a model writes while it trains: prompts of the recipe, continued with the likeliest tokens.

The weights are read as they are, and no random number is drawn: the run's losses are those of a run without.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from lapis.data.examples import Prompt
from lapis.data.prompts import Asked
from lapis.data.samples import Encoder
from lapis.errors import ConfigError, InputError
from lapis.home import Home
from lapis.inference.footprint import page_bytes
from lapis.inference.kv_cache import pages_for
from lapis.model.config import ModelConfig
from lapis.model.families import Decoder
from lapis.model.manifest import Manifest, Source
from lapis.model.weights import LoadedModel
from lapis.tokenizer.bpe import Tokenizer
from lapis.train.base import Base, model_folder
from lapis.train.objective import Objective, Sampled
from lapis.train.preference import Preferences
from lapis.train.recipe import Recipe
from lapis.train.rollout import answers
from lapis.train.sft import Supervised

PLACE = "train.samples"


class Shown(NamedTuple):
    """A prompt as people read it, and as the model does."""

    text: str
    ids: tuple[int, ...]


@dataclass(frozen=True)
class SamplePrompts:
    """What a model in training is to continue, and how its texts begin and end."""

    prompts: tuple[Shown, ...]
    tokens: int  # of a continuation, at most
    config: ModelConfig
    tokenizer: Tokenizer
    manifest: Manifest

    def continued(self, model: Decoder) -> list[Sampled]:
        """What a whole model writes to each prompt. Raises TrainingError, and as an engine does."""
        if not self.prompts:
            return []
        asked = [Asked(Prompt(one.text, {}), one.ids, PLACE) for one in self.prompts]
        with torch.compiler.set_stance(
            "force_eager"
        ):  # compiling a few tokens takes longer than computing them
            found = answers(
                LoadedModel(model, self.config, self.tokenizer, None, self.manifest),
                [(one, 0) for one in asked],
                max_tokens=self.tokens,
                temperature=0.0,
                cache_bytes=self._cache_bytes(model),
            )
        return [Sampled(one.text, answer.text) for one, answer in zip(self.prompts, found, strict=True)]

    def _cache_bytes(self, model: Decoder) -> int:
        """Room for all of them at once; an engine's own choice may be more than the training leaves."""
        pages = sum(pages_for(len(one.ids) + self.tokens) for one in self.prompts)
        return pages * page_bytes(self.config, "fp32" if model.dtype.itemsize == 4 else "bf16")


def sample_prompts(recipe: Recipe, objective: Objective, config: ModelConfig, home: Home) -> SamplePrompts:
    """The prompts of a recipe for its model.

    Raises ConfigError for one that has no token or leaves no room, or where held-out examples are wanted and none is.
    """
    section, tokenizer = recipe.train.samples, objective.tokenizer
    encoder, manifest = _model(recipe, tokenizer, config, home)
    prompts = [_encoded(text, encoder) for text in section.prompts]
    for number, one in enumerate(prompts):
        if not one.ids or len(one.ids) + section.tokens > config.context:
            raise ConfigError(
                f"train.samples.prompts[{number}] has {len(one.ids):,} tokens; between 1 and "
                f"{config.context - section.tokens:,} leave room for {section.tokens:,} more in the model's context.",
                hint="Shorten it, or lower train.samples.tokens.",
                param="train.samples",
            )
    held = _heldout(objective, tokenizer, section.heldout)
    return SamplePrompts((*prompts, *held), section.tokens, config, tokenizer, manifest)


def _model(recipe: Recipe, tokenizer: Tokenizer, config: ModelConfig, home: Home) -> tuple[Encoder, Manifest]:
    """How the model reads and ends a text: as its base does, or as it will when it was trained on [data]."""
    if recipe.examples is not None and recipe.model.source is not None:
        base = Base.open(recipe.model.source, model_folder(recipe.model.source, home))
        return base.encoder(recipe.examples.template), base.stored.manifest
    end = tokenizer.end_id
    stops = (end, *sorted(tokenizer.stop_ids - {end}))
    manifest = Manifest("", Source("run", recipe.name), {}, config.parameters, True, end, stops)
    return Encoder(tokenizer, None, end), manifest


def _encoded(text: str, encoder: Encoder) -> Shown:
    asked = text if encoder.chat is None else ({"role": "user", "content": text},)
    try:
        return Shown(text, tuple(encoder.prompt(Prompt(asked, {}))))
    except InputError as error:
        raise ConfigError(f"train.samples.prompts: {error.message}", hint=error.hint) from error


def _heldout(objective: Objective, tokenizer: Tokenizer, count: int) -> Sequence[Shown]:
    """The first held-out examples up to where an answer begins, as the model reads them."""
    if not count or not isinstance(objective, Supervised | Preferences):
        return ()
    if not objective.samples.heldout:
        raise ConfigError(
            "train.samples.heldout asks for held-out examples, and nothing is held out.",
            hint="Hold out a part (examples.heldout), or leave train.samples.heldout out.",
            param="train.samples.heldout",
        )
    found = []
    for tokens, *_ in objective.samples.heldout[:count]:
        begin = int(np.flatnonzero(tokens.trained)[0])
        ids = tuple(tokens.ids[:begin].tolist())
        if ids:
            found.append(Shown(tokenizer.decode(ids, special=True), ids))
    return found
