"""The weights that a run starts from: random ones of a named size, or those of a model that is there already."""

from __future__ import annotations

from lapis.errors import ConfigError, ConflictError
from lapis.home import Home
from lapis.model import layout
from lapis.model.config import ModelConfig
from lapis.model.families import Decoder, build
from lapis.model.weights import DTYPES, read_model
from lapis.tokenizer.bpe import Tokenizer
from lapis.train import float8
from lapis.train.base import Base, model_folder
from lapis.train.copies import Copies
from lapis.train.layout import check as layout_check
from lapis.train.lora import attach
from lapis.train.mesh import Mesh
from lapis.train.objective import Objective
from lapis.train.recipe import Recipe
from lapis.train.replica import Alone, Replica
from lapis.train.world import World


def checked_shape(recipe: Recipe, tokenizer: Tokenizer, home: Home, mesh: Mesh) -> ModelConfig:
    """The shape of the model that a recipe trains on tokens of a tokenizer, found to fit before any weight is read.

    Raises ConflictError if the tokens are not those of the model's own tokenizer, ConfigError if a window is longer
    than the model's context or the mesh does not divide the model, and as `Base.open`.
    """
    section, source = recipe.train, recipe.model.source
    if source is None:
        config = recipe.model.resolve(tokenizer.vocab_size)
    else:
        base = Base.open(source, model_folder(source, home))
        config = base.stored.config
        if base.tokenizer.digest != tokenizer.digest:
            raise ConflictError(
                f"The data were cut into tokens by another tokenizer ({tokenizer.digest[:12]}) than that of the model "
                f"{source} ({base.tokenizer.digest[:12]}).",
                hint=f'Leave [tokenizer] out, or set it: tokenizer.path = "{base.stored.folder / layout.TOKENIZER}"',
                param="tokenizer.path",
            )
        if section.sequence > config.context:
            raise ConfigError(
                f"train.sequence = {section.sequence} is longer than the context of {source}, {config.context} tokens.",
                hint=f"Shorter windows: --set train.sequence={config.context}",
                param="train.sequence",
            )
    layout_check(config, mesh, section, recipe.answers)
    return config


def check_best(recipe: Recipe, objective: Objective) -> None:
    """Raise ConfigError if the best checkpoints are to be kept and nothing is held out to tell them by."""
    facts = objective.facts()
    if recipe.checkpoint.best and not facts.get("heldout_documents", facts.get("heldout_examples")):
        raise ConfigError(
            "checkpoint.best goes by the loss on what is held out, and nothing is.",
            hint="Hold out a part (data.heldout, examples.heldout), or leave checkpoint.best out.",
            param="checkpoint.best",
        )


def first_model(recipe: Recipe, config: ModelConfig, home: Home) -> Decoder:
    """The model before its first step, its shape being checked. Raises as `read_model` and `float8.around`."""
    dtype = DTYPES[recipe.train.dtype]
    if recipe.model.source is None:
        model = build(config, dtype=dtype)
        model.init_weights(recipe.train.seed)
    else:
        model = read_model(model_folder(recipe.model.source, home), dtype=dtype).model
    if recipe.train.fp8:
        model.ops = float8.around(model.ops)
    if recipe.lora is not None:
        attach(model, recipe.lora, recipe.train.seed)
    return model


def first_replica(
    recipe: Recipe, objective: Objective, home: Home, world: World
) -> tuple[Replica, ModelConfig]:
    """What takes the first step, in this process or on the ranks of a world, and the whole model's configuration.

    Raises as `checked_shape` and `read_model`.
    """
    section = recipe.train
    config = checked_shape(recipe, objective.tokenizer, home, world.mesh)
    if world.size == 1:
        model = first_model(recipe, config, home)
        objective.begin(model)
        return Alone(model, section), config
    if recipe.lora is not None:
        model = first_model(recipe, config, home)
        objective.begin(model)
        return Copies(Alone(model, section), world), config
    from lapis.train.parallel import (
        parallelize,
    )  # and with it torch's pipelines: a second that one rank saves

    replica = parallelize(config, world, section)
    if recipe.model.source is not None:
        model = first_model(recipe, config, home)
        replica.fill((name, parameter.detach()) for name, parameter in model.named_parameters())
    objective.begin(replica.model, replica.reference)
    return replica, config


def with_own_tokenizer(recipe: Recipe, home: Home) -> Recipe:
    """The recipe with its model's tokenizer, unless it names another one or starts from no model."""
    if recipe.model.source is None or recipe.tokenizer.path:
        return recipe
    path = model_folder(recipe.model.source, home) / layout.TOKENIZER
    return recipe.model_copy(update={"tokenizer": recipe.tokenizer.model_copy(update={"path": str(path)})})
