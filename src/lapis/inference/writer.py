"""A sequence's way out: tokens become text here, and it is decided whether the text has ended."""

from __future__ import annotations

from dataclasses import dataclass, field

from lapis.inference.request import FinishReason, Output, TokenLogprob
from lapis.inference.result import Result
from lapis.inference.scheduler import Chunk, Sequence
from lapis.inference.stream import Channel
from lapis.inference.text import StopText
from lapis.tokenizer.bpe import TextStream, Tokenizer


@dataclass(eq=False)
class Writer:
    """The outputs of one sequence. Tokens after the end, as right drafts can be, are left out."""

    sequence: Sequence
    tokenizer: Tokenizer
    stop_ids: frozenset[int]
    channel: Channel = field(default_factory=Channel)
    told: int = 0  # new tokens in outputs so far
    prompt_told: int = 1  # prompt tokens whose logprobs are told; the first one has none
    started: bool = False  # the prompt has been computed

    def __post_init__(self) -> None:
        self._text = TextStream(self.tokenizer, self.sequence.request.params.visible_ids)
        self._stop = StopText(self.sequence.request.params.stop)

    def write(self, chunk: Chunk, result: Result) -> Output | None:
        """The delta that a chunk's result makes; None if there is nothing to tell."""
        prompt = self._new_prompt_logprobs(chunk, result)
        if result.error is not None:
            return self.output(finish_reason="error", error=result.error)
        if not chunk.samples:
            if chunk.start + chunk.count >= self.sequence.limit:
                return self.output(prompt=prompt, finish_reason="length", embedding=result.embedding)
            return self.output(prompt=prompt) if prompt else None
        text = ""
        tokens: list[int] = []
        logprobs: list[TokenLogprob] = []
        reason: FinishReason | None = None
        error: str | None = None
        for sample in result.samples:
            if sample.token is None:
                reason, error = "error", sample.error
                break
            tokens.append(sample.token)
            self.told += 1
            if sample.logprob is not None:
                logprobs.append(sample.logprob)
            piece, reason = self._add(sample.token)
            text += piece
            if reason is not None:
                break
        return self.output(text, tuple(tokens), tuple(logprobs), reason, error, prompt)

    def output(
        self,
        text: str = "",
        token_ids: tuple[int, ...] = (),
        logprobs: tuple[TokenLogprob, ...] = (),
        finish_reason: FinishReason | None = None,
        error: str | None = None,
        prompt: tuple[TokenLogprob, ...] = (),
        embedding: tuple[float, ...] = (),
    ) -> Output:
        """An Output with this sequence's counts."""
        return Output(
            text,
            token_ids,
            logprobs,
            finish_reason,
            error,
            self.sequence.prompt_tokens,
            self.told,
            self.sequence.cached,
            prompt,
            embedding,
        )

    def _add(self, token: int) -> tuple[str, FinishReason | None]:
        reason: FinishReason | None = None
        text = ""
        if token in self.stop_ids:
            reason = "stop"
        else:
            text = self._stop.push(self._text.push(token))
            if self._stop.stopped:
                reason = "stop"
            elif self.sequence.prompt_tokens + self.told >= self.sequence.limit:
                reason = "length"
        if reason is not None and not self._stop.stopped:
            text += self._stop.push(self._text.finish()) + self._stop.finish()
            reason = "stop" if self._stop.stopped else reason
        return text, reason

    def _new_prompt_logprobs(self, chunk: Chunk, result: Result) -> tuple[TokenLogprob, ...]:
        """Those that no earlier output had: after a preemption the prompt is computed once more."""
        if not result.prompt_logprobs:
            return ()
        new = tuple(result.prompt_logprobs)[max(self.prompt_told - chunk.start - 1, 0) :]
        self.prompt_told += len(new)
        return new
