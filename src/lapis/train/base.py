"""The model that is fine-tuned: its tokenizer and template, and the objective over examples that a recipe asks for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lapis import config
from lapis.data.prompts import Prompts, prepare_prompts
from lapis.data.recipe import ExamplesConfig
from lapis.data.samples import Encoder, Samples, prepare_samples, template_of
from lapis.errors import ConfigError, ConflictError, InputError
from lapis.home import Home
from lapis.inference.engine import LocalEngine
from lapis.log import Progress, logger, silent
from lapis.model import layout
from lapis.model.store import ModelStore, StoredModel, open_folder
from lapis.model.weights import read_chat_template, read_tokenizer
from lapis.tokenizer.bpe import Tokenizer
from lapis.tokenizer.chat import ChatTemplate
from lapis.train.grpo import GroupRelative
from lapis.train.objective import Objective
from lapis.train.preference import Preferences
from lapis.train.recipe import Recipe
from lapis.train.reward import reward_of
from lapis.train.run import RECIPE, Run
from lapis.train.sft import Supervised


@dataclass(frozen=True)
class Base:
    """A stored model that is fine-tuned; its weights are not read here."""

    stored: StoredModel
    tokenizer: Tokenizer
    chat: ChatTemplate | None

    @staticmethod
    def open(name: str, folder: Path) -> Base:
        """A model folder under a name. Raises InputError for an adapter, or for ids beyond the vocabulary."""
        stored = open_folder(name, folder)
        if stored.base is not None:
            raise InputError(
                f"{name!r} is an adapter of {stored.base!r}; training starts from a whole model.",
                hint=f"Start from {stored.base}, or from a merged model: lapis models export RUN FOLDER",
            )
        values = layout.read_tokenizer_config(folder)
        tokenizer, rows = read_tokenizer(folder, values), stored.config.vocab_size
        if tokenizer.vocab_size > rows:
            raise InputError(
                f"The tokenizer of {name} has ids up to {tokenizer.vocab_size - 1:,}, its model rows for {rows:,} "
                "tokens only.",
                hint="Model and tokenizer do not belong together.",
            )
        return Base(stored, tokenizer, read_chat_template(folder, values))

    def encoder(self, template: str = "") -> Encoder:
        """How texts become this model's ids; `template` is a file with another chat template."""
        manifest = self.stored.manifest
        return Encoder(
            self.tokenizer,
            template_of(template, self.chat, self.tokenizer),
            manifest.bos_id if manifest.add_bos else None,
        )

    def samples(
        self, examples: ExamplesConfig, *, longest: int, preferences: bool, progress: Progress = silent
    ) -> Samples:
        """The examples for this model. Raises InputError naming file and line, ConfigError beyond its context."""
        self._require(longest)
        return prepare_samples(
            examples,
            self.encoder(examples.template),
            longest=longest,
            preferences=preferences,
            model=self.stored.digest,
            progress=progress,
        )

    def prompts(
        self, examples: ExamplesConfig, *, longest: int, max_tokens: int, progress: Progress = silent
    ) -> Prompts:
        """The prompts for this model, which leave room for an answer. Raises as `samples`."""
        self._require(longest)
        return prepare_prompts(
            examples,
            self.encoder(examples.template),
            longest=longest - max_tokens,
            model=self.stored.digest,
            progress=progress,
        )

    def _require(self, longest: int) -> None:
        context = self.stored.config.context
        if longest > context:
            raise ConfigError(
                f"train.sequence = {longest:,} is longer than the context of {self.stored.name}, "
                f"{context:,} tokens.",
                param="train.sequence",
            )


def fine_tuning(recipe: Recipe, home: Home, progress: Progress = silent) -> Objective:
    """The objective over a recipe's examples. Raises NotFoundError without the model, and as `Base.samples`."""
    section, source, examples = recipe.train, recipe.model.source, recipe.examples
    assert source is not None and examples is not None, "the recipe was checked"
    base = Base.open(source, model_folder(source, home))
    facts = {"base": base.stored.name, "base_digest": base.stored.digest}
    if recipe.grpo is not None:
        longest, answer = section.sequence, recipe.grpo.max_tokens
        prompts = base.prompts(examples, longest=longest, max_tokens=answer, progress=progress)
        reward = reward_of(
            recipe.grpo, prompts, lambda name: LocalEngine.load(model_folder(name, home), name)
        )
        return GroupRelative(
            section, recipe.grpo, prompts, reward, base.tokenizer, base.stored.manifest, facts
        )
    preferences = section.objective == "dpo"
    samples = base.samples(examples, longest=section.sequence, preferences=preferences, progress=progress)
    if preferences:
        return Preferences(section, recipe.dpo, samples, base.tokenizer, facts)
    return Supervised(section, samples, base.tokenizer, facts)


def check_base(run: Run, now: str) -> None:
    """Raise ConflictError if a run started from other weights than its base has now, by their digests.

    A run of an older Lapis may not have noted its base's digest: then there is a warning.
    """
    started = run.events.read("start")
    if not started:
        return
    source, said = config.load(run.folder / RECIPE, Recipe).model.source, started[-1].get("base_digest")
    if said is None:
        logger.warning("the run %s did not note which weights %s had when it started", run.id, source)
    elif said != now:
        raise ConflictError(
            f"The run {run.id} started from other weights than {source} has now: {said[:12]}, not {now[:12]}.",
            hint=f"Give {source} its old weights again; or train on the new ones as a run of its own: --set name=…",
        )


def model_folder(source: str, home: Home) -> Path:
    """The folder of a model of the store, or the folder named. Raises NotFoundError naming the nearest."""
    folder = Path(source).expanduser()
    return folder.absolute() if "/" in source and folder.is_dir() else ModelStore(home).find(source)
