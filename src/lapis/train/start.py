"""The weights that a run starts from: random ones of a named size, or those of a model that is there already."""

from __future__ import annotations

from pathlib import Path

from lapis.errors import ConfigError, ConflictError
from lapis.home import Home
from lapis.model import layout
from lapis.model.config import ModelConfig
from lapis.model.families import Decoder, build
from lapis.model.store import ModelStore
from lapis.model.weights import DTYPES, read_model
from lapis.tokenizer.bpe import Tokenizer
from lapis.train.lora import attach
from lapis.train.objective import Objective
from lapis.train.parallel import parallelize
from lapis.train.recipe import Recipe
from lapis.train.replica import Alone, Replica
from lapis.train.world import World


def first_model(recipe: Recipe, tokenizer: Tokenizer, home: Home) -> Decoder:
    """The model before its first step.

    Raises ConflictError if the data were not made with the model's own tokenizer, ConfigError if a window is
    longer than the model's context, and what `read_model` raises.
    """
    section, dtype = recipe.model, DTYPES[recipe.train.dtype]
    if section.source is None:
        model = build(section.resolve(tokenizer.vocab_size), dtype=dtype)
        model.init_weights(recipe.train.seed)
        return model
    folder = model_folder(section.source, home)
    loaded = read_model(folder, dtype=dtype)
    if loaded.tokenizer.digest != tokenizer.digest:
        raise ConflictError(
            f"The data were cut into tokens by another tokenizer ({tokenizer.digest[:12]}) than that of the model "
            f"{section.source} ({loaded.tokenizer.digest[:12]}).",
            hint=f'Leave [tokenizer] out, or set it: tokenizer.path = "{folder / layout.TOKENIZER}"',
            param="tokenizer.path",
        )
    if recipe.train.sequence > loaded.config.context:
        raise ConfigError(
            f"train.sequence = {recipe.train.sequence} is longer than the context of {section.source}, "
            f"{loaded.config.context} tokens.",
            param="train.sequence",
        )
    if recipe.lora is not None:
        attach(loaded.model, recipe.lora, recipe.train.seed)
    return loaded.model


def first_replica(
    recipe: Recipe, objective: Objective, home: Home, world: World
) -> tuple[Replica, ModelConfig]:
    """What takes the first step, in this process or on the ranks of a world, and the whole model's configuration.

    Raises as `first_model`, and ConfigError for a mesh that does not divide the model.
    """
    section, mesh = recipe.train, world.mesh
    if world.size == 1:
        model = first_model(recipe, objective.tokenizer, home)
        objective.begin(model)
        return Alone(model, section), model.config
    if recipe.model.source is None:
        config = recipe.model.resolve(objective.tokenizer.vocab_size)
        mesh.check(config, sequence=section.sequence, batch=section.batch)
        replica = parallelize(config, world, section)
    else:
        model = first_model(recipe, objective.tokenizer, home)
        config = model.config
        mesh.check(config, sequence=section.sequence, batch=section.batch)
        replica = parallelize(config, world, section)
        replica.fill((name, parameter.detach()) for name, parameter in model.named_parameters())
    objective.begin(replica.model)
    return replica, config


def with_own_tokenizer(recipe: Recipe, home: Home) -> Recipe:
    """The recipe with its model's tokenizer, unless it names another one or starts from no model."""
    if recipe.model.source is None or recipe.tokenizer.path:
        return recipe
    path = model_folder(recipe.model.source, home) / layout.TOKENIZER
    return recipe.model_copy(update={"tokenizer": recipe.tokenizer.model_copy(update={"path": str(path)})})


def model_folder(source: str, home: Home) -> Path:
    """The folder of a model of the store, or the folder named. Raises NotFoundError naming the nearest."""
    folder = Path(source).expanduser()
    return folder.absolute() if "/" in source and folder.is_dir() else ModelStore(home).find(source)
