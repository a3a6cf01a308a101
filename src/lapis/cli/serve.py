"""`lapis serve`: models behind the OpenAI-compatible API."""

from __future__ import annotations

import gc
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from lapis.cli.output import say
from lapis.errors import ConfigError, InputError
from lapis.home import Home

if TYPE_CHECKING:
    from lapis.inference.engine import CacheDtype, Weights
    from lapis.server import Load, RunningServer


@click.command("serve")
@click.argument("models", nargs=-1, metavar="[MODEL]...")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen at.")
@click.option(
    "--port", default=8000, show_default=True, type=click.IntRange(0, 65535), help="0 = any free port."
)
@click.option(
    "--weights",
    type=click.Choice(["bf16", "fp32", "int8", "int4"]),
    help="By default as the model stores them, bf16 or fp32. In 8 or 4 bits they are smaller and faster; answers "
    "are then no longer exactly those of the trained model.",
)
@click.option(
    "--kv-cache",
    type=click.Choice(["bf16", "int8"]),
    default="bf16",
    show_default=True,
    help="Keys and values in int8 take half the memory, and are read faster in long contexts; answers may differ.",
)
@click.option(
    "--engine",
    type=click.Choice(["lapis", "vllm"]),
    default="lapis",
    show_default=True,
    help="vllm: an installed vLLM computes, for models that it knows; answers are then not those of training.",
)
@click.option(
    "--memory",
    type=click.FloatRange(min=0, min_open=True),
    metavar="GB",
    help="What loaded models and their caches may take; idle ones make room.  [default: 60 % of the machine's]",
)
@click.option("--no-console", is_flag=True, help="Serve the API without the web pages at /console.")
def command(
    models: tuple[str, ...],
    host: str,
    port: int,
    weights: Weights | None,
    kv_cache: CacheDtype,
    engine: str,
    memory: float | None,
    no_console: bool,
) -> None:
    """Serve releases and pulled models by name through the OpenAI-compatible API.

    With names, those models are loaded first; one line with the URL says when they answer. Without names,
    everything that may be served is offered at once, and each model is loaded at its first use; where memory
    ends, the model that has been idle for longest is unloaded.

    On a loopback address no key is needed until one was made; any other address needs one, which
    `lapis keys create NAME` makes.
    The web pages at /console need the console extra: pip install 'lapis[console]'.
    """
    # Imports make a million objects that stay: looking through them for garbage again and again takes 0.3 s.
    gc.disable()
    try:
        _serve(models, host, port, weights, kv_cache, engine, memory, console=not no_console)
    finally:
        gc.enable()


def _serve(
    models: tuple[str, ...],
    host: str,
    port: int,
    weights: Weights | None,
    kv_cache: CacheDtype,
    engine: str,
    memory: float | None,
    *,
    console: bool,
) -> None:
    from lapis.gateway.memory import SHARE, MemoryBudget, machine_memory
    from lapis.inference.engine import LocalEngine
    from lapis.server import serve

    load: Load = partial(LocalEngine.load, weights=weights, cache_dtype=kv_cache)
    if engine == "vllm":
        load = _vllm_load(weights, kv_cache)
    budget = MemoryBudget(
        int(SHARE * machine_memory() if memory is None else memory * 1e9),
        lambda servable: _bytes(servable.folder, weights, kv_cache),
    )
    serve(Home.default(), models, host, port, console=console, ready=_announce, load=load, memory=budget)


def _vllm_load(weights: Weights | None, kv_cache: CacheDtype) -> Load:
    """Raises UnavailableError without vLLM, ConfigError for options that are the other engine's."""
    from lapis.inference.vllm import VllmEngine, require_vllm

    if weights is not None or kv_cache != "bf16":
        raise ConfigError("--weights and --kv-cache are options of Lapis's own engine, not of --engine vllm.")
    require_vllm()
    return VllmEngine.load


def _bytes(folder: Path, weights: Weights | None, kv_cache: CacheDtype) -> int:
    """What a model takes; one whose shape cannot be read, which its load will tell, counts with its files."""
    from lapis.inference.footprint import engine_bytes
    from lapis.model.layout import CONFIG, read_config, read_json
    from lapis.model.manifest import read_manifest

    try:
        stored = "fp32" if read_json(folder / CONFIG).get("torch_dtype") == "float32" else "bf16"
        return engine_bytes(read_config(folder), weights or stored, kv_cache)
    except (InputError, ConfigError):
        return read_manifest(folder).bytes


def _announce(server: RunningServer) -> None:
    gc.enable()
    say(f"Lapis serves {', '.join(server.models)} at {server.url}")
