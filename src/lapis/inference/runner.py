"""Runs a step on the model: fills the Batch, calls the one forward, samples.

Dims: T tokens of the step, R rows that logits are made of, S sequences, P pages, V vocabulary, H width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lapis.hashing import digest_file, digest_json
from lapis.inference import sampler
from lapis.inference.footprint import Dtype, cache_pages
from lapis.inference.kv_cache import PAGE, KVCache
from lapis.inference.replayed import MOST_ROWS, Part, ReplayedSteps
from lapis.inference.request import TokenLogprob
from lapis.inference.result import NOTHING, Result, Sample
from lapis.inference.scheduler import Chunk
from lapis.inference.scheduler import Sequence as Running
from lapis.kernels.batch import PAGE as KERNEL_PAGE
from lapis.kernels.batch import AdapterPair, Batch
from lapis.model.adapters import CONFIG, WEIGHTS, Adapter, for_batch, read_adapter
from lapis.model.weights import LoadedModel

assert PAGE == KERNEL_PAGE
NOT_FINITE = Sample(error="The model gave no finite logits for this request.")


@dataclass(frozen=True, eq=False)
class LoadedAdapter:
    """A low-rank adapter, and the digest of the files that it was read from."""

    digest: str
    adapter: Adapter


class ModelRunner:
    """A loaded model with paged key/value memory of `cache_bytes` (default: 16 full contexts, at most 2 GiB).

    There is always room for one full context, even if that is more. Steps of up to `step_tokens` are replayed.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        cache_bytes: int | None = None,
        cache_dtype: str = "bf16",
        step_tokens: int = MOST_ROWS,
    ) -> None:
        self.loaded = loaded
        self.model = loaded.model.eval()
        self._int8_cache = cache_dtype == "int8"
        stored: Dtype = "fp32" if self.model.dtype is torch.float32 else "bf16"
        self.pages = cache_pages(loaded.config, "int8" if self._int8_cache else stored, cache_bytes)
        self._caches = self.model.new_caches(self.pages + 1, int8=self._int8_cache)  # one is nobody's
        # Rows of the embedding beyond the tokenizer's entries are padding: they have no text.
        self._sampled_vocabulary = min(loaded.tokenizer.vocab_size, loaded.config.vocab_size)
        self._mixed: tuple[tuple[LoadedAdapter, ...], list[dict[str, list[AdapterPair]]]] = ((), [])
        self.steps = ReplayedSteps(
            self.model, self._caches, self.pages, self._sampled_vocabulary, step_tokens
        )

    @property
    def bit_exact(self) -> bool:
        """Whether a text's logits do not depend on what runs beside it, and equal those of training."""
        return self.model.ops.bit_exact and self.loaded.as_stored and not self._int8_cache

    @property
    def kernels(self) -> str:
        """The name of the kernels in use."""
        return self.model.ops.name

    def read_adapter(self, folder: Path) -> LoadedAdapter:
        """A PEFT folder for this model. Raises InputError for what is no adapter of it."""
        adapter = read_adapter(folder, self.loaded.config, self.model.dtype)
        digest = digest_json({name: digest_file(folder / name) for name in (CONFIG, WEIGHTS)})
        return LoadedAdapter(digest, adapter)

    def run(self, chunks: Sequence[Chunk], cache: KVCache) -> list[Result]:
        """Compute all chunks in one forward; a Result for each, in order."""
        end = 0
        rows: list[int] = []
        for chunk in chunks:
            end += chunk.count
            if chunk.samples:
                rows += range(end - len(chunk.drafts) - 1, end)
        if rows and end <= MOST_ROWS and not any(reads(chunk.sequence) for chunk in chunks):
            parts = self._parts(chunks, cache)
            done = None if parts is None else self.steps.run(parts, rows)
            if done is not None:
                return self._with_samples([NOTHING] * len(chunks), *done, chunks)
        return self._computed(chunks, cache, rows)

    @torch.inference_mode()
    def _computed(self, chunks: Sequence[Chunk], cache: KVCache, rows: Sequence[int]) -> list[Result]:
        logits_RV, read = self._forward(chunks, cache, rows)
        if logits_RV is None:
            return read
        best_R = self.model.ops.argmax(logits_RV, self._sampled_vocabulary).tolist()
        return self._with_samples(read, logits_RV, best_R, chunks)

    def _with_samples(
        self, read: Sequence[Result], logits_RV: Tensor, best_R: Sequence[int], chunks: Sequence[Chunk]
    ) -> list[Result]:
        """Results with the new tokens of those chunks that sample."""
        easy = all(chunk.sequence.request.params.takes_best for chunk in chunks if chunk.samples)
        samples = None if easy else iter(self._sample(logits_RV, best_R, chunks))
        results: list[Result] = []
        row = 0
        for chunk, result in zip(chunks, read, strict=True):
            if chunk.samples:
                end = row + len(chunk.drafts) + 1
                new = _best(chunk, best_R[row:end]) if samples is None else next(samples)
                row = end
                result = Result(new) if result is NOTHING else result._replace(samples=new)
            results.append(result)
        return results

    def _parts(self, chunks: Sequence[Chunk], cache: KVCache) -> list[Part] | None:
        """The step as it is replayed, if it can be."""
        if not self.steps.active or any(chunk.sequence.adapter is not None for chunk in chunks):
            return None
        return [Part(chunk.ids, chunk.start, cache.table(chunk.sequence.number)) for chunk in chunks]

    def _hidden(self, chunks: Sequence[Chunk], cache: KVCache) -> Tensor:
        """Hidden rows of all tokens: by one C call, or op by op."""
        tokens = sum(chunk.count for chunk in chunks)
        parts = self._parts(chunks, cache) if MOST_ROWS < tokens <= self.steps.most else None
        x_TH = None if parts is None else self.steps.hidden(parts)
        return self.model.hidden(*self._fill(chunks, cache)) if x_TH is None else x_TH

    def _forward(
        self, chunks: Sequence[Chunk], cache: KVCache, rows: Sequence[int]
    ) -> tuple[Tensor | None, list[Result]]:
        """Logits of the rows, if any, and what is read from the prompts' hidden rows."""
        x_TH = self._hidden(chunks, cache)
        read = [NOTHING] * len(chunks)
        if any(reads(chunk.sequence) for chunk in chunks):
            pieces = torch.split(x_TH, [chunk.count for chunk in chunks])
            read = [self._read(chunk, x_PH) for chunk, x_PH in zip(chunks, pieces, strict=True)]
        if not rows:
            return None, read
        x_RH = x_TH if len(rows) == len(x_TH) else self.model.ops.embedding(torch.tensor(rows), x_TH)
        return self.model.logits(x_RH), read

    def _fill(self, chunks: Sequence[Chunk], cache: KVCache) -> tuple[Tensor, Batch]:
        tables = [cache.table(chunk.sequence.number) for chunk in chunks]
        table_SP = np.zeros((len(chunks), max(len(table) for table in tables)), dtype=np.int32)
        ids: list[int] = []
        spans = []
        for row, (chunk, table) in enumerate(zip(chunks, tables, strict=True)):
            table_SP[row, : len(table)] = table
            spans.append((len(ids), len(ids) + chunk.count))
            ids += chunk.ids
        sequence_T = np.empty(len(ids), dtype=np.int32)
        position_T = np.empty(len(ids), dtype=np.int32)
        for row, (chunk, (start, end)) in enumerate(zip(chunks, spans, strict=True)):
            sequence_T[start:end] = row
            position_T[start:end] = np.arange(chunk.start, chunk.start + chunk.count)
        adapter_T, adapters = self._adapted(chunks)
        batch = Batch(
            torch.from_numpy(sequence_T),
            torch.from_numpy(position_T),
            torch.from_numpy(table_SP),
            self._caches,
            tuple(spans),
            adapter_T,
            adapters,
        )
        return torch.tensor(ids, dtype=torch.int64), batch

    def _adapted(self, chunks: Sequence[Chunk]) -> tuple[Tensor | None, Sequence[Any] | None]:
        """Which adapter each token has, and the step's adapters by layer; nothing where no token has one."""
        loaded = [chunk.sequence.adapter for chunk in chunks]
        used = tuple(dict.fromkeys(one for one in loaded if isinstance(one, LoadedAdapter)))
        if not used:
            return None, None
        if self._mixed[0] != used:  # the same few adapters run for many steps
            self._mixed = used, for_batch([one.adapter for one in used], self.loaded.config.layers)
        number = {one: place for place, one in enumerate(used)}
        counts = torch.tensor([chunk.count for chunk in chunks])
        adapter_S = torch.tensor([number.get(one, -1) for one in loaded], dtype=torch.int32)  # type: ignore[call-overload]
        return adapter_S.repeat_interleave(counts), self._mixed[1]

    def _sample(
        self, logits_RV: Tensor, best_R: Sequence[int], chunks: Sequence[Chunk]
    ) -> list[list[Sample]]:
        """Each chunk's new tokens: one, and one more behind every draft that sampling picks as well."""
        chunks = [chunk for chunk in chunks if chunk.samples]
        samples: list[list[Sample]] = []
        going: list[int] = []
        first = list(accumulate((1 + len(chunk.drafts) for chunk in chunks), initial=0))
        for index, chunk in enumerate(chunks):
            easy = chunk.sequence.request.params.takes_best
            samples.append(_best(chunk, best_R[first[index] : first[index + 1]]) if easy else [])
            if not easy:
                going.append(index)
        depth = 0
        while going:
            wanted = [first[index] + depth for index in going]
            rows_RV = logits_RV if wanted == list(range(len(logits_RV))) else logits_RV[wanted]
            rows = [
                self._row(chunks[index], depth, best_R[place])
                for index, place in zip(going, wanted, strict=True)
            ]
            for index, sample in zip(going, self._sample_rows(rows_RV, rows), strict=True):
                samples[index].append(sample)
            going = [
                index
                for index in going
                if depth < len(chunks[index].drafts)
                and samples[index][-1].token == chunks[index].drafts[depth]
            ]
            depth += 1
        return samples

    def _row(self, chunk: Chunk, depth: int, best: int) -> sampler.Row:
        sequence = chunk.sequence
        ids = [*sequence.ids, *chunk.drafts[:depth]] if depth else sequence.ids
        return sampler.row_of(sequence, ids, best)

    @torch.inference_mode()
    def _sample_rows(self, logits_RV: Tensor, rows: Sequence[sampler.Row]) -> list[Sample]:
        tokens = sampler.sample(logits_RV.cpu().numpy()[:, : self._sampled_vocabulary], rows)
        samples = []
        for logits_V, row, token in zip(logits_RV, rows, tokens, strict=True):
            if token is None:
                samples.append(NOT_FINITE)
            elif row.params.logprobs is None:
                samples.append(Sample(token))
            else:
                if row.params.tempered_logprobs:
                    logits_V = logits_V / row.params.temperature
                samples.append(Sample(token, self._logprob(logits_V, token, row.params.logprobs)))
        return samples

    def _read(self, chunk: Chunk, x_PH: Tensor) -> Result:
        """What is asked about the tokens of a prompt: logprobs of those that follow, or its embedding."""
        sequence = chunk.sequence
        if sequence.request.pooling is not None:
            return self._pool(chunk, x_PH)
        count = sequence.request.params.prompt_logprobs
        targets = sequence.ids[chunk.start + 1 : min(chunk.start + chunk.count + 1, sequence.prompt_tokens)]
        if count is None or not targets:
            return NOTHING
        x_PH, ids_P = x_PH[: len(targets)], torch.tensor(targets)
        token_bytes = self.loaded.tokenizer.token_bytes
        if count == 0:
            values = self.model.ops.linear_logprobs(x_PH, self.model.head_weight, ids_P).tolist()
            told = [TokenLogprob(id, token_bytes(id), v) for id, v in zip(targets, values, strict=True)]
        else:
            logits_PV = self.model.logits(x_PH)
            told = [self._logprob(row_V, id, count) for row_V, id in zip(logits_PV, targets, strict=True)]
        return Result(prompt_logprobs=told)

    def _pool(self, chunk: Chunk, x_PH: Tensor) -> Result:
        """Mean: fp64 sums in the order of positions, whatever the chunks; then length 1 in fp32."""
        done = chunk.start + chunk.count == chunk.sequence.limit
        if chunk.sequence.request.pooling == "mean":
            rows_PH = x_PH.double().cpu().numpy()
            if chunk.start > 0:
                before_H = chunk.sequence.pooled
                assert isinstance(before_H, np.ndarray)
                rows_PH = np.concatenate([before_H[None], rows_PH])
            sum_H = np.add.accumulate(rows_PH, axis=0)[-1]  # strictly one after the other
        else:
            sum_H = x_PH[-1].double().cpu().numpy()
        if not done:
            return Result(pooled=sum_H)
        if not np.isfinite(sum_H).all() or not sum_H.any():
            return Result(error="The model gave no finite hidden rows for this text.")
        length = np.sqrt(np.add.accumulate(sum_H * sum_H)[-1])
        return Result(embedding=tuple((sum_H / length).astype(np.float32).tolist()))

    def _logprob(self, logits_V: Tensor, token: int, count: int) -> TokenLogprob:
        """The chosen token and the `count` most likely ones, each by the very op that training uses."""
        logits = logits_V.cpu().numpy()
        ids = [token, *sampler.top_tokens(logits[: self._sampled_vocabulary], count)]
        rows = torch.from_numpy(np.tile(logits, (len(ids), 1)))
        logprobs = self.model.ops.logprobs(rows, torch.tensor(ids)).tolist()
        chosen, *top = (
            TokenLogprob(id, self.loaded.tokenizer.token_bytes(id), logprob)
            for id, logprob in zip(ids, logprobs, strict=True)
        )
        return replace(chosen, top=tuple(top))


def _best(chunk: Chunk, best_D: Sequence[int]) -> list[Sample]:
    """The samples of a chunk that takes the best tokens, which are known: the logits are not looked at."""
    samples: list[Sample] = []
    for depth, token in enumerate(best_D):
        samples.append(Sample(token) if token >= 0 else NOT_FINITE)
        if depth < len(chunk.drafts) and token != chunk.drafts[depth]:
            break
    return samples


def reads(sequence: Running) -> bool:
    """Whether something is asked about the rows of its prompt."""
    asked = sequence.request.params.prompt_logprobs is not None or sequence.request.pooling is not None
    return asked and sequence.computed < sequence.prompt_tokens
