"""One subject of benchmarks/train_step.py in its own process: training_worker.py SUBJECT SHAPE, the shape in JSON.

A step is forward, backward, clipping to 1.0, the optimizer. Tokens are random and new in every step: the time of a step
does not depend on them. Imports Lapis only for its own subjects: it also runs in the peers' environments.
"""

from __future__ import annotations

import contextlib
import json
import math
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from conversation import answer_all
from torch import Tensor

Shape = dict[str, Any]  # model (a named size of Lapis), vocabulary, layers, width, heads, sequence, batch
Step = Callable[[Tensor, Tensor], float]  # ids and targets (batch, sequence), to the loss
NANOGPT = Path(__file__).parents[2] / ".peers" / "nanogpt"
LR, BETAS, DECAY, CLIP = 6e-4, (0.9, 0.95), 0.1, 1.0


def lapis(shape: Shape, optimizer: str) -> Step:
    """The trainer's own step, without its loop around it."""
    from lapis.data.loader import TokenBatch
    from lapis.kernels.memory import keep_freed_memory
    from lapis.model.config import NAMED
    from lapis.model.families import build
    from lapis.train.pretrain import token_loss
    from lapis.train.recipe import TrainSection
    from lapis.train.replica import Alone

    keep_freed_memory()
    model = build(NAMED[shape["model"]])
    model.init_weights(0)
    decay = DECAY if optimizer == "adamw" else 0.0
    section = TrainSection.model_validate(
        {"steps": 1, "optimizer": optimizer, "clip": CLIP, "weight_decay": decay}
    )
    replica, lengths = Alone(model, section), (shape["sequence"],) * shape["batch"]

    def step(ids: Tensor, targets: Tensor) -> float:
        micro = TokenBatch(ids.flatten().numpy(), targets.flatten().numpy(), lengths)
        loss = replica.backward(lambda model, micro: token_loss(model, micro, ids.numel()), [micro])
        numbers = replica.finish(loss)
        replica.update(numbers.norm, lr=section.lr, embed_lr=section.embed_lr)
        return numbers.loss

    return step


def nanogpt(shape: Shape, *, given: bool) -> Step:
    """nanoGPT's model and optimizer; given bf16 autocast and torch.compile, or as it runs on a CPU: fp32."""
    sys.path.insert(0, str(NANOGPT))
    from model import GPT, GPTConfig  # type: ignore[import-not-found]

    torch.manual_seed(0)
    sizes = {"n_layer": shape["layers"], "n_head": shape["heads"], "n_embd": shape["width"]}
    config = GPTConfig(
        block_size=shape["sequence"], vocab_size=shape["vocabulary"], dropout=0.0, bias=False, **sizes
    )
    model = GPT(config)
    adamw = model.configure_optimizers(DECAY, LR, BETAS, "cpu")
    run = torch.compile(model) if given else model
    context = torch.autocast("cpu", torch.bfloat16) if given else contextlib.nullcontext()

    def loss_of(ids: Tensor, targets: Tensor) -> Tensor:
        with context:
            loss: Tensor = run(ids, targets)[1]
        return loss

    return plain_loop(loss_of, model, adamw)


def litgpt(shape: Shape) -> Step:
    """litgpt's GPT of the same sizes (rotary in place of learned positions) with its loss, compiled as it pretrains."""
    from litgpt.config import Config  # type: ignore[import-not-found]
    from litgpt.model import GPT  # type: ignore[import-not-found]
    from litgpt.utils import chunked_cross_entropy  # type: ignore[import-not-found]

    torch.manual_seed(0)
    sizes = {"n_layer": shape["layers"], "n_head": shape["heads"], "n_embd": shape["width"]}
    config = Config(
        block_size=shape["sequence"],
        padded_vocab_size=shape["vocabulary"],
        parallel_residual=False,
        bias=False,
        gelu_approximate="tanh",
        **sizes,
    )
    model = GPT(config)
    model.transformer.wte.weight = model.lm_head.weight
    torch.nn.init.normal_(model.lm_head.weight, std=0.02)
    adamw = torch.optim.AdamW(model.parameters(), lr=LR, betas=BETAS, weight_decay=DECAY)
    run = torch.compile(model)

    def loss_of(ids: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            logits = run(ids)
        loss: Tensor = chunked_cross_entropy(logits, targets)
        return loss

    return plain_loop(loss_of, model, adamw)


def transformers(shape: Shape) -> Step:
    """transformers' model of the same shape in a plain loop: bf16 autocast, SDPA, fused AdamW."""
    from transformers import AutoConfig, AutoModelForCausalLM  # type: ignore[import-not-found]

    from lapis.model.config import NAMED
    from lapis.model.config_hf import to_hf

    torch.manual_seed(0)
    values = {key: value for key, value in to_hf(NAMED[shape["model"]]).items() if key != "torch_dtype"}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**values))
    for part in model.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0
    adamw = torch.optim.AdamW(model.parameters(), lr=LR, betas=BETAS, weight_decay=DECAY, fused=True)

    def loss_of(ids: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(ids, use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten())

    return plain_loop(loss_of, model, adamw)


def plain_loop(
    loss_of: Callable[[Tensor, Tensor], Tensor], model: torch.nn.Module, adamw: torch.optim.Optimizer
) -> Step:
    """A step as plain PyTorch loops take it."""

    def step(ids: Tensor, targets: Tensor) -> float:
        loss = loss_of(ids, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        adamw.step()
        adamw.zero_grad(set_to_none=True)
        return float(loss)

    return step


SUBJECTS: dict[str, Callable[[Shape], Step]] = {
    "lapis-adamw": lambda shape: lapis(shape, "adamw"),
    "lapis-muon": lambda shape: lapis(shape, "muon"),
    "nanogpt": lambda shape: nanogpt(shape, given=False),
    "nanogpt-given": lambda shape: nanogpt(shape, given=True),
    "litgpt": litgpt,
    "transformers": transformers,
}


def main() -> None:
    """Make the subject and answer `{"steps": n}` with `{"seconds": [one a step], "peak": bytes}`."""
    shape: Shape = json.loads(sys.argv[2])
    torch.set_num_threads(shape["threads"])
    step, generator = SUBJECTS[sys.argv[1]](shape), torch.Generator().manual_seed(0)

    def answer(asked: dict[str, Any]) -> dict[str, Any]:
        seconds = []
        for _ in range(asked["steps"]):
            size = (shape["batch"], shape["sequence"] + 1)
            ids = torch.randint(0, shape["vocabulary"], size, generator=generator)
            inputs, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
            start = time.perf_counter()
            loss = step(inputs, targets)
            seconds.append(time.perf_counter() - start)
            assert math.isfinite(loss), "a step that diverges measures nothing"
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
        return {"seconds": seconds, "peak": peak}

    answer_all({"torch": torch.__version__}, answer)


if __name__ == "__main__":
    main()
