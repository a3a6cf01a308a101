"""Measure a model on the held-out documents of a dataset, beside the yardsticks on the same bytes."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from lapis.data.shards import Dataset
from lapis.errors import InputError
from lapis.evaluate.compress import xz_bits_per_byte
from lapis.evaluate.loss import DocumentLoss, bits_per_byte, bootstrap, document_losses
from lapis.evaluate.ngram import KneserNey
from lapis.evaluate.report import FIVE_GRAM, XZ, EvalReport
from lapis.evaluate.scorer import batched_scorer
from lapis.log import Progress, silent
from lapis.model.families import Decoder
from lapis.tokenizer.bpe import Tokenizer


def evaluate(
    model: Decoder,
    dataset: Dataset,
    *,
    train_tokens: NDArray[np.integer],
    tokenizer: Tokenizer | None = None,
    progress: Progress = silent,
) -> EvalReport:
    """Bits per byte of `model` on the dataset's held-out documents, with yardsticks.

    `train_tokens` are what the model was trained on: a stream, or rows of training windows. The 5-gram counts
    the same ones, a window of several epochs once. `tokenizer` is the model's own where it is not that of the
    dataset. Raises InputError if there is no held-out text.
    """
    texts = [document.text for document in dataset.heldout()]
    filled = [text for text in texts if text]
    if not filled:
        raise InputError(
            f"The dataset {dataset.folder} has no held-out text to measure on.",
            hint="Prepare it from more text, or hold out more of it: `lapis config` lists the settings.",
        )
    own = tokenizer or dataset.tokenizer
    losses = document_losses(filled, own, batched_scorer(model), model.config.context, progress)
    interval = bootstrap(losses)
    tokens = sum(loss.tokens for loss in losses)
    if train_tokens.ndim == 2:
        train_tokens = np.unique(train_tokens, axis=0)  # doubled counts would spoil the estimate of discounts
    five_gram = five_gram_bits_per_byte(train_tokens, filled, dataset.tokenizer, progress)
    progress(0, None, "compressing with xz")
    return EvalReport(
        bits_per_byte=bits_per_byte(losses),
        low=interval.low,
        high=interval.high,
        perplexity=math.exp(math.fsum(loss.nats for loss in losses) / tokens),
        documents=len(filled),
        empty_documents=len(texts) - len(filled),
        bytes=sum(loss.bytes for loss in losses),
        tokens=tokens,
        yardsticks={FIVE_GRAM: five_gram, XZ: xz_bits_per_byte(filled)},
        yardstick_tokens=int(train_tokens.size),
        dataset=dataset.digest,
        tokenizer=own.digest,
        parameters=model.config.parameters,
        context=model.config.context,
        kernels=model.ops.name,
        bit_exact=model.ops.bit_exact,
    )


def five_gram_bits_per_byte(
    train_tokens: NDArray[np.integer], texts: list[str], tokenizer: Tokenizer, progress: Progress = silent
) -> float:
    """What smoothed 5-grams of the training tokens need for the texts; both under that tokenizer."""
    counted = KneserNey.train(train_tokens, tokenizer.vocab_size, tokenizer.end_id, progress=progress)
    stream = [tokenizer.end_id]
    for ids in tokenizer.encode_batch(texts):
        stream += [*ids, tokenizer.end_id]
    nats = -float(counted.score(np.array(stream)).sum())
    size = sum(len(text.encode()) for text in texts)
    return bits_per_byte([DocumentLoss(nats, len(stream) - 1, size)])
