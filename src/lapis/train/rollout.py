"""Answers of a model in training: an engine over its own weights, in this process, for the length of one step.

Of several ranks each one gathers a copy of the whole weights and answers the prompts of its own share.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass

import torch
from torch import Tensor

from lapis.data.prompts import Asked
from lapis.errors import TrainingError
from lapis.inference.engine import LocalEngine
from lapis.inference.request import Output, Request, SamplingParams
from lapis.model.families import Decoder, build
from lapis.model.weights import LoadedModel
from lapis.train.lora import Lora

WAVE = 512  # requests handed to an engine at a time; it takes 1,024
NAME = "in training"  # of the model, and of its adapter
WHOLE = "full_tensor"  # what torch's sharded tensors have; importing their type takes a second and a half


@dataclass(frozen=True)
class Answer:
    """What a model said to a prompt, with the log probability of each token at the temperature of sampling."""

    asked: Asked
    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    text: str
    cut: bool  # it had no end within its length


def seed_of(seed: int, step: int, sample: int) -> int:
    """The seed of one answer: 64 bits that belong to run, step and place in the step."""
    name = f"{seed} {step} {sample}".encode()
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little")


def answers(
    loaded: LoadedModel,
    wanted: Sequence[tuple[Asked, int]],
    *,
    max_tokens: int,
    temperature: float,
    cache_bytes: int | None = None,
) -> list[Answer]:
    """An answer to each prompt with its seed, by the weights as they are now. Raises TrainingError if one fails.

    The engine reads the model's own memory and ends with the call: no key or value outlives the weights it is of.
    """
    queued = sum(len(asked.ids) + loaded.config.context for asked, _ in wanted)
    lora, adapter = loaded.model.lora, None
    with closing(LocalEngine(loaded, NAME, queued_tokens=queued, cache_bytes=cache_bytes)) as engine:
        if isinstance(lora, Lora):
            adapter = NAME
            engine.put_adapter(adapter, lora.adapter())
        requests = [
            Request(
                asked.place,
                asked.ids,
                SamplingParams(
                    max_tokens, temperature=temperature, seed=seed, logprobs=0, tempered_logprobs=True
                ),
                adapter=adapter,
            )
            for asked, seed in wanted
        ]
        outputs = list(_outputs(engine, requests))
    return [_answer(asked, output) for (asked, _), output in zip(wanted, outputs, strict=True)]


def sampled_from(model: Decoder, dtype: torch.dtype) -> Decoder:
    """What an engine can read: the model itself, or where ranks hold shards of it a copy, which `gather` fills."""
    if not any(hasattr(parameter, WHOLE) for parameter in model.parameters()):
        return model
    copy = build(model.config, dtype=dtype)
    copy.requires_grad_(False)
    return copy


@torch.no_grad()
def gather(copy: Decoder, model: Decoder) -> None:
    """Bring a copy up to the weights as they are now; all ranks together. Nothing for a model that is its own."""
    if copy is model:
        return
    for name, parameter in model.named_parameters():
        whole: Tensor = getattr(parameter, WHOLE)() if hasattr(parameter, WHOLE) else parameter
        copy.get_parameter(name).copy_(whole)
    copy.ops.weights_changed()


def _outputs(engine: LocalEngine, requests: Sequence[Request]) -> Iterator[Output]:
    for start in range(0, len(requests), WAVE):
        streams = [engine.submit(request) for request in requests[start : start + WAVE]]
        yield from (stream.result() for stream in streams)


def _answer(asked: Asked, output: Output) -> Answer:
    if output.finish_reason == "error":
        raise TrainingError(f"The model could not answer {asked.place}: {output.error}")
    logprobs = tuple(logprob.logprob for logprob in output.logprobs)
    return Answer(asked, output.token_ids, logprobs, output.text, output.finish_reason == "length")
