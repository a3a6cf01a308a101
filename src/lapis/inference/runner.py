"""Runs a step on the model: fills the Batch, calls the one forward, samples.

Dims: T tokens of the step, R rows that get a new token, S sequences, P pages, V vocabulary, H width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from lapis.inference import sampler
from lapis.inference.kv_cache import PAGE, KVCache, pages_for
from lapis.inference.loop import Sample
from lapis.inference.request import TokenLogprob
from lapis.inference.scheduler import Chunk
from lapis.kernels.batch import PAGE as KERNEL_PAGE
from lapis.kernels.batch import Batch, packed
from lapis.model.weights import LoadedModel

assert PAGE == KERNEL_PAGE

DEFAULT_CACHE_BYTES = 2 << 30
DEFAULT_SEQUENCES = 16


class ModelRunner:
    """A loaded model with paged key/value memory of `cache_bytes` (default: 16 full contexts, at most 2 GiB).

    There is always room for one full context, even if that is more.
    """

    def __init__(self, loaded: LoadedModel, cache_bytes: int | None = None) -> None:
        self.loaded = loaded
        self.model = loaded.model.eval()
        self.pages = _page_count(loaded, cache_bytes)
        self._caches = self.model.new_caches(self.pages)
        # Rows of the embedding beyond the tokenizer's entries are padding: they have no text.
        self._sampled_vocabulary = min(loaded.tokenizer.vocab_size, loaded.config.vocab_size)

    @property
    def bit_exact(self) -> bool:
        """Whether a text's logits do not depend on what runs beside it, and equal those of training."""
        return self.model.ops.bit_exact

    @property
    def kernels(self) -> str:
        """The name of the kernels in use."""
        return self.model.ops.name

    @torch.inference_mode()
    def run(self, chunks: Sequence[Chunk], cache: KVCache) -> list[Sample | None]:
        """Compute all chunks in one forward; a Sample for each chunk that samples, in order."""
        ids_T, batch = self._fill(chunks, cache)
        ends = np.cumsum([chunk.count for chunk in chunks])
        rows_R = torch.from_numpy(ends[[chunk.samples for chunk in chunks]] - 1)
        if rows_R.numel() == 0:
            self.model.hidden(ids_T, batch)
            return [None] * len(chunks)
        logits_RV = self.model(ids_T, batch, None if len(rows_R) == len(ids_T) else rows_R)
        samples = iter(self._sample(logits_RV, [chunk for chunk in chunks if chunk.samples]))
        return [next(samples) if chunk.samples else None for chunk in chunks]

    @torch.inference_mode()
    def score(self, ids: Sequence[int]) -> list[float]:
        """The log probability of each token after the first, by the forward of training."""
        ids_T = torch.tensor(ids, dtype=torch.int64)
        x_TH = self.model.hidden(ids_T, packed([len(ids)]))
        logprobs = self.model.ops.linear_logprobs(x_TH[:-1], self.model.head_weight, ids_T[1:])
        return [float(logprob) for logprob in logprobs.tolist()]

    def _fill(self, chunks: Sequence[Chunk], cache: KVCache) -> tuple[Tensor, Batch]:
        tables = [cache.table(chunk.sequence.number) for chunk in chunks]
        table_SP = np.zeros((len(chunks), max(len(table) for table in tables)), dtype=np.int32)
        ids: list[int] = []
        spans = []
        for row, (chunk, table) in enumerate(zip(chunks, tables, strict=True)):
            table_SP[row, : len(table)] = table
            spans.append((len(ids), len(ids) + chunk.count))
            ids += chunk.sequence.ids[chunk.start : chunk.start + chunk.count]
        sequence_T = np.empty(len(ids), dtype=np.int32)
        position_T = np.empty(len(ids), dtype=np.int32)
        for row, (chunk, (start, end)) in enumerate(zip(chunks, spans, strict=True)):
            sequence_T[start:end] = row
            position_T[start:end] = np.arange(chunk.start, chunk.start + chunk.count)
        batch = Batch(
            torch.from_numpy(sequence_T),
            torch.from_numpy(position_T),
            torch.from_numpy(table_SP),
            self._caches,
            tuple(spans),
        )
        return torch.tensor(ids, dtype=torch.int64), batch

    def _sample(self, logits_RV: Tensor, chunks: Sequence[Chunk]) -> list[Sample]:
        sequences = [chunk.sequence for chunk in chunks]
        rows = [sampler.Row(s.request.params, s.seed, s.ids, s.prompt_tokens) for s in sequences]
        tokens = sampler.sample(logits_RV.numpy()[:, : self._sampled_vocabulary], rows)
        samples = []
        for logits_V, row, token in zip(logits_RV, rows, tokens, strict=True):
            if token is None:
                samples.append(Sample(error="The model gave no finite logits for this request."))
            elif row.params.logprobs is None:
                samples.append(Sample(token))
            else:
                samples.append(Sample(token, self._logprob(logits_V, token, row.params.logprobs)))
        return samples

    def _logprob(self, logits_V: Tensor, token: int, count: int) -> TokenLogprob:
        """The chosen token and the `count` most likely ones, each by the very op that training uses."""
        logits = logits_V.numpy()
        ids = [token, *sampler.top_tokens(logits[: self._sampled_vocabulary], count)]
        rows = torch.from_numpy(np.tile(logits, (len(ids), 1)))
        logprobs = self.model.ops.logprobs(rows, torch.tensor(ids)).tolist()
        chosen, *top = (
            TokenLogprob(id, self.loaded.tokenizer.token_bytes(id), logprob)
            for id, logprob in zip(ids, logprobs, strict=True)
        )
        return replace(chosen, top=tuple(top))


def _page_count(loaded: LoadedModel, cache_bytes: int | None) -> int:
    page_bytes = PAGE * loaded.config.kv_bytes_per_token
    context = pages_for(loaded.config.context)
    if cache_bytes is None:
        cache_bytes = min(DEFAULT_CACHE_BYTES, DEFAULT_SEQUENCES * context * page_bytes)
    return max(context, cache_bytes // page_bytes)
