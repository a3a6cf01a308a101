"""FakeEngine: a whole engine without a model, for tests, demos and the work on everything above it.

Only the arithmetic is made up. Queue, limits, scheduling, cancellation, stop strings and streams are the
ones of LocalEngine, so what works against the fake works against a model.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path

from lapis.inference import sampler
from lapis.inference.kv_cache import KVCache, pages_for
from lapis.inference.loop import EngineLoop, Limits
from lapis.inference.request import TokenLogprob
from lapis.inference.result import NOTHING, Result, Sample
from lapis.inference.scheduler import Chunk
from lapis.tokenizer.bpe import Tokenizer
from lapis.tokenizer.chat import CHATML, ChatTemplate

Reply = Callable[[str, int], str]  # prompt text and seed to answer

TEXT = (
    "a bridge carries the river under the morning light while seven quiet engines count small stones and "
    "every lantern remembers its own weather before the long road turns home again"
)
WORDS = TEXT.split()
# A JSON text made of the first of these that may come is soon at its end: outside and inside of a string.
OUTSIDE = '}],:"0123456789abcdefghijklmnopqrstuvwxyz.-{[\n '
INSIDE = '"' + OUTSIDE

VECTOR_WIDTH = 8  # numbers of an embedding


def babble(prompt: str, seed: int) -> str:
    """One to three sentences of plain words that depend on nothing but prompt and seed."""
    numbers = hashlib.shake_128(f"{seed}\n{prompt}".encode(errors="replace")).digest(64)
    sentences = []
    for start in range(0, 16 * (1 + numbers[0] % 3), 16):
        count = 5 + numbers[start + 1] % 8
        words = [WORDS[number % len(WORDS)] for number in numbers[start + 2 : start + 2 + count]]
        sentences.append(" ".join(words).capitalize() + ".")
    return " ".join(sentences)


class FakeRunner:
    """Plays out a reply token by token instead of computing one."""

    def __init__(self, tokenizer: Tokenizer, reply: Reply, seconds_per_token: float) -> None:
        self._tokenizer = tokenizer
        self._reply = reply
        self._seconds = seconds_per_token
        self._scripts: dict[int, list[int]] = {}

    def run(self, chunks: Sequence[Chunk], cache: KVCache) -> list[Result]:
        """The next tokens of each reply; all at once, after the delay of one token."""
        if self._seconds:
            time.sleep(self._seconds)
        live = {chunk.sequence.number for chunk in chunks}
        self._scripts = {number: script for number, script in self._scripts.items() if number in live}
        return [self._result(chunk) for chunk in chunks]

    def _result(self, chunk: Chunk) -> Result:
        sequence = chunk.sequence
        end = chunk.start + chunk.count
        if sequence.request.pooling is not None:
            whole = end == sequence.limit
            return Result(embedding=_embedding(sequence.request.prompt_ids)) if whole else NOTHING
        samples: list[Sample] = []
        while chunk.samples and len(samples) <= len(chunk.drafts):
            samples.append(self._sample(chunk, len(samples)))
            if samples[-1].token != next(iter(chunk.drafts[len(samples) - 1 :]), None):
                break
        count = sequence.request.params.prompt_logprobs
        told = []
        if count is not None:
            text = sequence.request.prompt_ids[chunk.start : end + 1]
            told = [self._logprobs(token, count, _logprob(before, token)) for before, token in pairwise(text)]
        return Result(samples, told)

    def _sample(self, chunk: Chunk, ahead: int) -> Sample:
        sequence = chunk.sequence
        script = self._scripts.get(sequence.number)
        if script is None:
            prompt = self._tokenizer.decode(sequence.request.prompt_ids)
            seed = 0 if sequence.request.params.greedy else sequence.seed
            reply = self._reply(prompt, seed)
            if sequence.request.adapter is not None:
                reply = f"{sequence.request.adapter}: {reply}"
            script = [*self._tokenizer.encode(reply), self._tokenizer.end_id]
            self._scripts[sequence.number] = script
        row = sampler.row_of(sequence, [*sequence.ids, *chunk.drafts[:ahead]])
        completion = row.ids[row.prompt_tokens :]
        # After the end only end tokens follow, for a request that does not stop at them.
        place = len(completion)
        if row.barred and len(script) > 1:
            place %= len(script) - 1
        token = script[min(place, len(script) - 1)]
        if row.allowed is not None:
            token = self._allowed(token, script[:place] == completion, row)
        count = sequence.request.params.logprobs
        return Sample(token) if count is None else Sample(token, self._logprobs(token, count))

    def _allowed(self, token: int, follows: bool, row: sampler.Row) -> int:
        """The reply's token while the grammar allows the reply, else what ends the text soonest."""
        assert row.allowed is not None
        ids: list[int] = sampler.allowed_ids(row.allowed, self._tokenizer.vocab_size).tolist()
        if follows and token in ids:
            return token
        inside = self._tokenizer.token_id("#") in ids  # of a string, where a brace closes nothing
        return min(ids, key=lambda id: self._rank(id, INSIDE if inside else OUTSIDE))

    def _rank(self, token: int, closing: str) -> tuple[int, int]:
        """End tokens first, then what closes, then what may stand anywhere; opening and white space last."""
        if token in self._tokenizer.stop_ids:
            return 0, token
        text = self._tokenizer.token_bytes(token).decode("latin-1")
        place = closing.find(text) if len(text) == 1 else -1
        return (1 + place if place >= 0 else 99), token

    def _logprobs(self, token: int, count: int, logprob: float = -0.5) -> TokenLogprob:
        chosen = TokenLogprob(token, self._tokenizer.token_bytes(token), logprob)
        top = [chosen] if count else []
        for rank in range(1, count):
            other = (token + rank) % self._tokenizer.vocab_size
            top.append(TokenLogprob(other, self._tokenizer.token_bytes(other), -1.0 - rank))
        return TokenLogprob(token, chosen.token, chosen.logprob, tuple(top))


class FakeEngine(EngineLoop):
    """An Engine that answers `reply(prompt text, seed)`; by default deterministic babble. Needs no torch.

    The seed is 0 at temperature 0, else the request's. With a grammar the reply is followed as far as it is
    allowed, then the text is ended as soon as the grammar lets it. `seconds_per_token` slows it down to a model's pace.
    An adapter, whatever is in its folder, makes answers begin with its name.
    """

    bit_exact = True
    add_bos = True
    vector_width = VECTOR_WIDTH

    def __init__(
        self,
        name: str = "fake",
        *,
        reply: Reply = babble,
        seconds_per_token: float = 0.0,
        context: int = 2048,
        pages: int | None = None,
        step_tokens: int = Limits.step_tokens,
        running: int = Limits.running,
        queued_tokens: int = Limits.queued_tokens,
        drafts: int = Limits.drafts,
    ) -> None:
        tokenizer = _tokenizer()
        pages = max(pages_for(context), 16 * pages_for(context) if pages is None else pages)
        self.bos_id = tokenizer.end_id
        self.chat = ChatTemplate(CHATML)
        runner = FakeRunner(tokenizer, reply, seconds_per_token)
        limits = Limits(context, pages, step_tokens, running, queued_tokens, drafts=drafts)
        super().__init__(name, runner, limits, tokenizer, tokenizer.stop_ids)

    def add_adapter(self, name: str, folder: Path) -> None:
        """Answer requests for this adapter too."""
        self._put_adapter(name, FakeAdapter(str(folder)))


@dataclass(frozen=True)
class FakeAdapter:
    """An adapter that only has a name for its contents."""

    digest: str


def _embedding(ids: Sequence[int]) -> tuple[float, ...]:
    """Numbers of length 1 that depend on nothing but the ids."""
    digest = hashlib.blake2b(repr(tuple(ids)).encode(), digest_size=VECTOR_WIDTH).digest()
    numbers = [byte - 127.5 for byte in digest]
    length = math.hypot(*numbers)
    return tuple(number / length for number in numbers)


def _logprob(before: int, token: int) -> float:
    digest = hashlib.blake2b(f"{before} {token}".encode(), digest_size=2).digest()
    return -8.0 * int.from_bytes(digest, "little") / 65536


@cache
def _tokenizer() -> Tokenizer:
    return Tokenizer.train([TEXT + ". " + TEXT.title()], vocab_size=512)
