"""LoRA fine-tuning of SmolLM2-135M-Instruct on chats, beside peft + transformers on the same data.

Both sides see the same token ids, the same mask, the same batches in the same order, adapters of the same rank on the
same linear maps, and AdamW with the same rate. The peer is `AutoModelForCausalLM` with `peft.get_peft_model` in a plain
PyTorch loop under bf16 autocast (or with weights in bf16, which is slower), a batch padded to its longest chat. Steps
are taken in turn; medians. At the end both adapters are measured on the held-out chats by one judge: the peer's is
saved as peft does, and read here.

    lapis pull smollm2-135m-instruct
    python benchmarks/finetune.py [--steps 45] [--batch 8] [--threads 2]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lapis.data.recipe import ExamplesConfig
from lapis.data.samples import Sample, Samples, of_step
from lapis.home import Home
from lapis.kernels.memory import keep_freed_memory
from lapis.model.adapters import read_adapter
from lapis.model.families import Decoder
from lapis.model.manifest import copy_folder
from lapis.model.store import ModelStore
from lapis.model.weights import read_model
from lapis.train.base import Base
from lapis.train.lora import attach, merged
from lapis.train.objective import of_model
from lapis.train.recipe import LoraSection, TrainSection
from lapis.train.replica import Alone
from lapis.train.sft import Supervised

CHATS = Path(__file__).parents[1] / "recipes" / "examples" / "chats.jsonl"
MODEL, SEQUENCE, RANK, ALPHA = "smollm2-135m-instruct", 512, 16, 32.0
Step = Callable[[int, float], float]


def lapis_side(folder: Path, section: TrainSection, samples: Samples, tokenizer: Any) -> tuple[Step, Decoder]:
    """A step here: its loss. And the model, with its adapters."""
    model = read_model(folder, dtype=torch.bfloat16).model
    attach(model, LoraSection(rank=RANK, alpha=ALPHA), section.seed)
    objective, replica = Supervised(section, samples, tokenizer), Alone(model, section)

    def step(number: int, rate: float) -> float:
        batch = objective.step(number, 0, 1)
        loss = replica.backward(lambda model, micro: objective.loss(model, micro, batch.weight), batch.micros)
        numbers = replica.finish(loss)
        replica.update(numbers.norm, lr=rate, embed_lr=rate)
        return numbers.loss

    return step, model


def peft_side(
    folder: Path, section: TrainSection, samples: Samples, pad: int, dtype: torch.dtype
) -> tuple[Step, Any]:
    """A step of the peer: its loss. And the model, with its adapters."""
    import peft
    import transformers

    torch.manual_seed(section.seed)
    base = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(base, config)
    parameters = [weight for weight in model.parameters() if weight.requires_grad]
    adamw = torch.optim.AdamW(parameters, lr=section.lr, betas=section.betas, weight_decay=0.0, fused=True)

    def step(number: int, rate: float) -> float:
        ids, mask, labels = padded(
            [samples.trained[n] for n in of_step(samples.trained, number, section.batch, section.seed)], pad
        )
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.float32):
            loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, section.clip)
        for group in adamw.param_groups:
            group["lr"] = rate
        adamw.step()
        adamw.zero_grad()
        return float(loss)

    return step, model


def padded(samples: list[Sample], pad: int) -> tuple[Tensor, Tensor, Tensor]:
    """A batch as the peers make it: rows as long as the longest, labels of -100 where nothing is trained on."""
    longest = max(len(text.ids) for (text,) in samples)
    shape = (len(samples), longest)
    ids, mask, labels = (
        torch.full(shape, pad),
        torch.zeros(shape, dtype=torch.int64),
        torch.full(shape, -100),
    )
    for row, (text,) in enumerate(samples):
        count = len(text.ids)
        ids[row, :count], mask[row, :count] = torch.from_numpy(text.ids), 1
        labels[row, :count] = torch.where(torch.from_numpy(text.trained), ids[row, :count], -100)
    return ids, mask, labels


def heldout_loss(folder: Path, adapter: Path, judge: Supervised) -> float:
    """The mean loss of the base with a peft folder merged into it, on the held-out chats."""
    model = read_model(folder, dtype=torch.bfloat16).model
    model.load_state_dict(merged(model.state_dict(), read_adapter(adapter, model.config)))
    model.ops.weights_changed()
    return judge.heldout(of_model(model))["loss"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--steps", type=int, default=45)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--peer", choices=["autocast", "bf16"], default="autocast")
    parser.add_argument("--lr", type=float, default=1e-3)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    warnings.simplefilter("ignore")
    stored = ModelStore(Home.default()).get(MODEL)
    base = Base.open(MODEL, stored.folder)
    section = TrainSection(
        objective="sft", steps=options.steps, batch=options.batch, sequence=SEQUENCE, optimizer="adamw",
        lr=options.lr, betas=(0.9, 0.999),
    )  # fmt: skip
    samples = base.samples(ExamplesConfig(files=(str(CHATS),)), longest=SEQUENCE, preferences=False)
    judge = Supervised(section, samples, base.tokenizer)
    with tempfile.TemporaryDirectory() as place:
        plain = Path(place) / "plain"
        copy_folder(stored.folder, plain, sealed=False)
        mine, model = lapis_side(stored.folder, section, samples, base.tokenizer)
        dtype = torch.bfloat16 if options.peer == "bf16" else torch.float32
        theirs, peer = peft_side(plain, section, samples, base.tokenizer.end_id, dtype)
        before = judge.heldout(of_model(model))["loss"]
        seconds: dict[str, list[float]] = {"lapis": [], "peft + transformers": []}
        losses: dict[str, list[float]] = {name: [] for name in seconds}
        tokens = []
        for number in range(options.steps):
            rate = options.lr * min(1.0, (number + 1) / 5) * (1 - number / options.steps)
            chosen = of_step(samples.trained, number, section.batch, section.seed)
            tokens.append(sum(len(text.ids) for n in chosen for text in samples.trained[n]))
            for name, step in (("lapis", mine), ("peft + transformers", theirs)):
                start = time.perf_counter()
                losses[name].append(step(number, rate))
                seconds[name].append((time.perf_counter() - start) / tokens[-1])
        peer.save_pretrained(Path(place) / "theirs")
        found = {
            "lapis": judge.heldout(of_model(model))["loss"],
            "peft + transformers": heldout_loss(stored.folder, Path(place) / "theirs", judge),
        }
    print(
        f"{options.steps} steps of {options.batch} chats, {sum(tokens):,} tokens, {options.threads} threads"
    )
    print(f"held-out loss before: {before:.4f}")
    print(f"{'side':<22}{'tokens/s':>10}{'ratio':>8}{'loss':>9}{'held out':>10}")
    rates = {name: 1 / statistics.median(values[2:]) for name, values in seconds.items()}
    for name, rate in rates.items():
        last = statistics.mean(losses[name][-5:])
        ratio = rate / rates["peft + transformers"]
        print(f"{name:<22}{rate:>10,.0f}{ratio:>8.2f}{last:>9.4f}{found[name]:>10.4f}")


if __name__ == "__main__":
    main()
