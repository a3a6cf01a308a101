"""One side of benchmarks/time_to_quality.py: quality_worker.py SIDE SETUP, the setup in JSON.

It trains until it has used so many seconds of its own time, and measures bits per byte of the held-out documents when
it is asked. Both sides read the same token shards and are measured by the same windows of at most 256 tokens.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from conversation import answer_all
from torch import Tensor

from lapis.data.shards import Dataset
from lapis.evaluate.loss import ScoreMany, bits_per_byte, document_losses
from lapis.evaluate.scorer import batched_scorer
from lapis.kernels.memory import keep_freed_memory
from lapis.model.families import build
from lapis.train import schedule
from lapis.train.pretrain import Pretraining
from lapis.train.recipe import ModelSection, TrainSection
from lapis.train.replica import Alone

NANOGPT = Path(__file__).parents[2] / ".peers" / "nanogpt"
SEQUENCE, BATCH = 256, 8
LAYERS, HEADS, WIDTH = 6, 6, 384
# nanoGPT's defaults of AdamW; its warm-up of 2,000 steps would be longer than the run: that of its small configurations
LR, MIN_LR, BETAS, DECAY, CLIP, WARMUP = 6e-4, 6e-5, (0.9, 0.95), 0.1, 1.0, 100
Step = Callable[[int, float], float]  # number and seconds used so far, to the loss


def lapis(setup: dict[str, Any], dataset: Dataset) -> tuple[Step, ScoreMany]:
    """The default recipe: Muon; the rate rises, stays, and falls over the last 60 % of the time."""
    keep_freed_memory()
    section = TrainSection(minutes=setup["minutes"], sequence=SEQUENCE, batch=BATCH)
    model = build(ModelSection(name="laptop").resolve(dataset.tokenizer.vocab_size))
    model.init_weights(section.seed)
    objective, replica = Pretraining(section, dataset), Alone(model, section)
    plan = schedule.by_minutes(section.warmup, section.final)

    def step(number: int, spent: float) -> float:
        nonlocal plan
        if schedule.decay_is_due(plan, spent, setup["minutes"], section.decay):
            plan = schedule.close(plan, number, spent, setup["minutes"])
        batch = objective.step(number, 0, 1)
        loss = replica.backward(lambda model, micro: objective.loss(model, micro, batch.weight), batch.micros)
        numbers = replica.finish(loss)
        scale = plan.scale(number)
        replica.update(numbers.norm, lr=section.lr * scale, embed_lr=section.embed_lr * scale)
        return numbers.loss

    return step, batched_scorer(model)


def nanogpt(setup: dict[str, Any], dataset: Dataset) -> tuple[Step, ScoreMany]:
    """nanoGPT's model and optimizer with bf16 autocast and torch.compile: random windows, cosine over the time."""
    sys.path.insert(0, str(NANOGPT))
    from model import GPT, GPTConfig  # type: ignore[import-not-found]

    torch.manual_seed(0)
    vocabulary = -(-dataset.tokenizer.vocab_size // 64) * 64
    sizes = {"n_layer": LAYERS, "n_head": HEADS, "n_embd": WIDTH}
    model = GPT(GPTConfig(block_size=SEQUENCE, vocab_size=vocabulary, dropout=0.0, bias=False, **sizes))
    adamw = model.configure_optimizers(DECAY, LR, BETAS, "cpu")
    run, stream = torch.compile(model), dataset.read(0, dataset.tokens)
    peak = setup["peer_lr"]

    def loss_of_batch() -> Tensor:
        starts = torch.randint(len(stream) - SEQUENCE, (BATCH,)).tolist()
        windows = torch.from_numpy(
            np.stack([stream[start : start + SEQUENCE + 1] for start in starts]).astype(np.int64)
        )
        with torch.autocast("cpu", torch.bfloat16):
            loss: Tensor = run(windows[:, :-1].contiguous(), windows[:, 1:].contiguous())[1]
        return loss

    def step(number: int, spent: float) -> float:
        done = min(1.0, spent / (60 * setup["minutes"]))
        lowest = peak * MIN_LR / LR
        fallen = lowest + (peak - lowest) * 0.5 * (1 + math.cos(math.pi * done))
        for group in adamw.param_groups:
            group["lr"] = min(fallen, peak * (number + 1) / WARMUP)
        loss = loss_of_batch()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        adamw.step()
        adamw.zero_grad(set_to_none=True)
        return float(loss)

    loss_of_batch().backward()  # compiles, before the clock runs
    adamw.zero_grad(set_to_none=True)

    @torch.no_grad()
    def scored(sequences: Sequence[Sequence[int]]) -> Iterator[Sequence[float]]:
        for first in range(0, len(sequences), 16):
            some = sequences[first : first + 16]
            ids = torch.zeros(len(some), max(map(len, some)), dtype=torch.int64)
            for row, sequence in enumerate(some):
                ids[row, : len(sequence)] = torch.tensor(sequence)
            with torch.autocast("cpu", torch.bfloat16):
                logits = model(ids, ids)[0]  # with targets it gives the logits of all places
            logprobs = logits.float().log_softmax(-1)[:, :-1].gather(2, ids[:, 1:, None])[..., 0]
            for row, sequence in enumerate(some):
                yield logprobs[row, : len(sequence) - 1].tolist()

    return step, scored


def main() -> None:
    """Answer `{"until": seconds, "measure": bool}` with `{"steps", "spent", "loss", "bits_per_byte"}`."""
    setup = json.loads(sys.argv[2])
    torch.set_num_threads(setup["threads"])
    dataset = Dataset.open(Path(setup["dataset"]))
    texts = [document.text for document in dataset.heldout() if document.text]
    step, score = {"lapis": lapis, "nanogpt": nanogpt}[sys.argv[1]](setup, dataset)
    number, spent, loss = 0, 0.0, math.nan

    def answer(asked: dict[str, Any]) -> dict[str, Any]:
        nonlocal number, spent, loss
        while spent < asked["until"]:
            start = time.perf_counter()
            loss = step(number, spent)
            spent += time.perf_counter() - start
            number += 1
        found = {"steps": number, "spent": spent, "loss": loss}
        if asked["measure"]:
            found["bits_per_byte"] = bits_per_byte(document_losses(texts, dataset.tokenizer, score, SEQUENCE))
        return found

    answer_all({"side": sys.argv[1]}, answer)


if __name__ == "__main__":
    main()
