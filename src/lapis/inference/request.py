"""What goes into an engine and what comes out: plain values, checked where they are made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, NamedTuple

from lapis.errors import InputError
from lapis.tokenizer.grammar import Grammar

MAX_STOP_STRINGS = 16
MAX_STOP_LENGTH = 256
MAX_TOP_LOGPROBS = 20
MAX_LOGIT_BIAS = 1024

FinishReason = Literal["stop", "length", "error"]
Pooling = Literal["mean", "last"]


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen. Raises InputError with `param` = the field's name when a value makes no sense.

    `stop_ids` None means the model's own end tokens; an empty set means that no token ends the text.
    `logprobs` n asks for the logprob of each token and of its n most likely alternatives,
    `prompt_logprobs` n for those of the prompt's tokens after the first. `max_tokens` 0 only reads the prompt.
    Before `min_tokens` no end token comes. `structure` is the language that the text must belong to; it may
    end there even with no `stop_ids`. `visible_ids` are special tokens whose text is part of the output.
    With `tempered_logprobs` logprobs are those of the logits over the temperature.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_ids: frozenset[int] | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    repetition_penalty: float = 1.0
    min_tokens: int = 0
    structure: Grammar | None = None
    visible_ids: frozenset[int] = frozenset()
    tempered_logprobs: bool = False

    def __post_init__(self) -> None:
        _whole("max_tokens", self.max_tokens, 0, None)
        _number("temperature", self.temperature, 0.0, 2.0)
        _number("top_p", self.top_p, 0.0, 1.0)
        if self.top_p == 0:
            raise InputError("top_p must be greater than 0 and at most 1, got 0.", param="top_p")
        _whole("top_k", self.top_k, 0, None)
        _number("min_p", self.min_p, 0.0, 1.0)
        if self.seed is not None:
            _whole("seed", self.seed, -(2**63), 2**64 - 1)
        _number("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _number("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        if self.logprobs is not None:
            _whole("logprobs", self.logprobs, 0, MAX_TOP_LOGPROBS)
        if self.prompt_logprobs is not None:
            _whole("prompt_logprobs", self.prompt_logprobs, 0, MAX_TOP_LOGPROBS)
        _number("repetition_penalty", self.repetition_penalty, 0.1, 10.0)
        _whole("min_tokens", self.min_tokens, 0, None)
        if self.min_tokens > self.max_tokens:
            message = f"min_tokens is {self.min_tokens}, which is more than max_tokens, {self.max_tokens}."
            raise InputError(message, param="min_tokens")
        self._check_stop()
        self._check_logit_bias()

    @property
    def greedy(self) -> bool:
        """Temperature 0: the most likely token, no random number."""
        return self.temperature == 0

    @cached_property
    def takes_best(self) -> bool:
        """Whether each token is the one with the largest logit, and nothing else is asked about the logits."""
        return (
            self.greedy
            and not self.logit_bias
            and self.structure is None
            and self.logprobs is None
            and self.min_tokens == 0
            and self.repetition_penalty == 1
            and self.presence_penalty == self.frequency_penalty == 0
        )

    def _check_stop(self) -> None:
        if isinstance(self.stop, str):
            raise InputError("stop must be a sequence of strings.", param="stop")
        if len(self.stop) > MAX_STOP_STRINGS:
            message = f"stop takes at most {MAX_STOP_STRINGS} strings, got {len(self.stop)}."
            raise InputError(message, param="stop")
        for text in self.stop:
            if not isinstance(text, str) or not 0 < len(text) <= MAX_STOP_LENGTH:
                message = f"Every stop string must have 1 to {MAX_STOP_LENGTH} characters."
                raise InputError(message, param="stop")

    def _check_logit_bias(self) -> None:
        if len(self.logit_bias) > MAX_LOGIT_BIAS:
            message = f"logit_bias takes at most {MAX_LOGIT_BIAS} tokens, got {len(self.logit_bias)}."
            raise InputError(message, param="logit_bias")
        for token, bias in self.logit_bias.items():
            _whole("logit_bias", token, 0, None)
            _number("logit_bias", bias, -100.0, 100.0)


@dataclass(frozen=True)
class Request:
    """One text to continue, or with `pooling` to embed. `id` is the caller's name for it.

    `tenant` says whose share it takes. A request of higher `priority` goes before and displaces those of
    lower ones (live traffic 0, batch work below). `adapter` names a LoRA adapter of the engine.
    """

    id: str
    prompt_ids: Sequence[int]
    params: SamplingParams
    tenant: str = "default"
    priority: int = 0
    adapter: str | None = None
    pooling: Pooling | None = None


@dataclass(frozen=True)
class TokenLogprob:
    """A token, its bytes and its log probability under the model itself (before temperature and penalties).

    `top` holds the most likely tokens at this place, best first, each without a `top` of its own.
    """

    token_id: int
    token: bytes
    logprob: float
    top: tuple[TokenLogprob, ...] = ()


class Output(NamedTuple):
    """A delta: what is new since the last Output. The counts are totals so far.

    Text may come later than its tokens: bytes of an unfinished character and text that may become
    a stop string are held back. The last Output of a request has a `finish_reason`; with "error",
    `error` says why (also when the request was cancelled). `embedding` comes whole, with the last Output.
    """

    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    error: str | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    embedding: tuple[float, ...] = ()


def join_outputs(outputs: Sequence[Output]) -> Output:
    """Several deltas of one request, in order, as one."""
    if not outputs:
        return Output()
    last = outputs[-1]
    if len(outputs) == 1:
        return last
    return Output(
        text="".join(output.text for output in outputs),
        token_ids=tuple(token for output in outputs for token in output.token_ids),
        logprobs=tuple(logprob for output in outputs for logprob in output.logprobs),
        finish_reason=last.finish_reason,
        error=last.error,
        prompt_tokens=last.prompt_tokens,
        completion_tokens=last.completion_tokens,
        cached_tokens=last.cached_tokens,
        prompt_logprobs=tuple(logprob for output in outputs for logprob in output.prompt_logprobs),
        embedding=last.embedding,
    )


def check_request(request: Request, context: int, vocab_size: int) -> None:
    """Raise InputError (`param` prompt, max_tokens, …) when this model cannot run the request."""
    length = len(request.prompt_ids)
    if length == 0:
        raise InputError("The prompt is empty: at least one token is needed.", param="prompt")
    if request.params.max_tokens == 0:
        _check_read_only(request, context)
    elif request.pooling is not None:
        raise InputError("An embedding has no new tokens: max_tokens must be 0.", param="max_tokens")
    elif length >= context:
        raise InputError(
            f"The prompt has {length} tokens; this model takes at most {context - 1} "
            f"(a context of {context} with room for one new token).",
            hint="Shorten the prompt.",
            param="prompt",
        )
    _check_ids(request.prompt_ids, vocab_size, "prompt")
    _check_ids(tuple(request.params.logit_bias), vocab_size, "logit_bias")
    _check_ids(tuple(request.params.stop_ids or ()), vocab_size, "stop_ids")
    _check_ids(tuple(request.params.visible_ids), vocab_size, "visible_ids")


def _check_read_only(request: Request, context: int) -> None:
    if request.pooling is None and request.params.prompt_logprobs is None:
        raise InputError("max_tokens must be a whole number at least 1, got 0.", param="max_tokens")
    if len(request.prompt_ids) > context:
        raise InputError(
            f"The text has {len(request.prompt_ids)} tokens; this model takes at most {context}.",
            hint="Shorten the text.",
            param="prompt",
        )


def check_scored(ids: Sequence[int], context: int, vocab_size: int) -> None:
    """Raise InputError (param "prompt") when these tokens cannot be scored in one forward."""
    if not 2 <= len(ids) <= context:
        message = f"A text to score must have 2 to {context} tokens, got {len(ids)}."
        raise InputError(message, param="prompt")
    _check_ids(ids, vocab_size, "prompt")


def _check_ids(ids: Sequence[int], vocab_size: int, param: str) -> None:
    if ids and not 0 <= min(ids) <= max(ids) < vocab_size:
        wrong = next(token for token in ids if not 0 <= token < vocab_size)
        message = f"{param} has the token id {wrong}; ids of this model are 0 to {vocab_size - 1}."
        raise InputError(message, param=param)


def _whole(param: str, value: object, low: int, high: int | None) -> None:
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    if not is_whole or value < low or (high is not None and value > high):  # type: ignore[operator]
        bounds = f"at least {low}" if high is None else f"between {low} and {high}"
        raise InputError(f"{param} must be a whole number {bounds}, got {value!r}.", param=param)


def _number(param: str, value: object, low: float, high: float) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not low <= value <= high:  # type: ignore[operator]  # NaN is between nothing
        message = f"{param} must be a number between {low:g} and {high:g}, got {value!r}."
        raise InputError(message, param=param)
