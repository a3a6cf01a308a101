"""A training step of the laptop size (13.8 M parameters, 8 windows of 256 tokens), beside transformers in a plain loop.

The peer is `LlamaForCausalLM` of the same shape in a plain PyTorch loop: bf16 autocast, SDPA, gradient clipping, fused
AdamW. Lapis runs with AdamW (the same work) and with Muon (its default, more work in a step). Steps are taken in turn;
medians. The limit is the rate of a large bf16 matrix product, measured in between. Windows hold no document border,
so that both sides do the same attention.

    python benchmarks/train_step.py [--threads 2] [--repeat 10]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F

from lapis.data.loader import TokenBatch
from lapis.kernels.memory import keep_freed_memory
from lapis.model.config import NAMED
from lapis.model.config_hf import to_hf
from lapis.model.families import Llama
from lapis.train.flat import FlatParameters
from lapis.train.optimizer import Optimizer
from lapis.train.peak import gemm_flops
from lapis.train.pretrain import token_loss

SEQUENCE, BATCH = 256, 8
CONFIG = NAMED["laptop"]


def tokens(step: int) -> TokenBatch:
    """Random tokens: the time of a step does not depend on them."""
    ids = np.random.default_rng(step).integers(0, CONFIG.vocab_size, BATCH * SEQUENCE + 1)
    return TokenBatch(ids[:-1], ids[1:], (SEQUENCE,) * BATCH)


def lapis_step(optimizer_name: str) -> Callable[[int], None]:
    model = Llama(CONFIG)
    model.init_weights(0)
    flat = FlatParameters(model)
    optimizer = Optimizer(
        flat, model.ops, muon=optimizer_name == "muon", clip=1.0, weight_decay=0.0, betas=(0.8, 0.95)
    )

    def step(number: int) -> None:
        torch.autograd.backward(token_loss(model, tokens(number), BATCH * SEQUENCE))
        optimizer.step(norm=optimizer.norm(), lr=1e-3, embed_lr=1e-3)

    return step


def transformers_step() -> Callable[[int], None]:
    from transformers import LlamaConfig, LlamaForCausalLM

    values = {
        key: value
        for key, value in to_hf(CONFIG).items()
        if key not in ("architectures", "model_type", "torch_dtype")
    }
    model = LlamaForCausalLM(LlamaConfig(**values))
    adamw = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)

    def step(number: int) -> None:
        batch = tokens(number)
        ids, targets = (torch.from_numpy(x).view(BATCH, SEQUENCE) for x in (batch.ids_T, batch.targets_T))
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(ids, use_cache=False).logits
        loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adamw.step()
        adamw.zero_grad()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeat", type=int, default=10)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    steps = {
        "lapis, AdamW": lapis_step("adamw"),
        "lapis, Muon": lapis_step("muon"),
        "transformers, AdamW": transformers_step(),
    }
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    peaks = []
    for number in range(options.repeat + 2):
        peaks.append(gemm_flops(2))
        for name, step in steps.items():
            start = time.perf_counter()
            step(number)
            if number >= 2:  # two rounds warm up
                seconds[name].append(time.perf_counter() - start)
    peak = statistics.median(peaks)
    rates = {name: BATCH * SEQUENCE / statistics.median(values) for name, values in seconds.items()}
    peer = rates["transformers, AdamW"]
    print(f"bf16 matrix product: {peak / 1e9:,.0f} GFLOP/s, {options.threads} threads")
    print(f"{'step':<22}{'tokens/s':>10}{'ratio':>8}{'MFU':>7}")
    for name, rate in rates.items():
        mfu = rate * CONFIG.flops_per_token(SEQUENCE) / peak
        print(f"{name:<22}{rate:>10,.0f}{rate / peer:>8.2f}{mfu:>7.2f}")


if __name__ == "__main__":
    main()
