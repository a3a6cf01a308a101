"""One step: its gradient in micro-batches, with recomputed layers, across documents; GPT-2 as a judge."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lapis import config
from lapis.data.loader import TokenBatch
from lapis.errors import ConfigError
from lapis.home import Home
from lapis.kernels.stock import StockOps
from lapis.model.config import ModelConfig
from lapis.model.families import Decoder, build
from lapis.model.hf_state import to_hf_state
from lapis.train.compiled import compile_layers
from lapis.train.pretrain import token_loss
from lapis.train.recipe import TrainSection
from lapis.train.replica import Alone
from tests import small_models


def section(**values: object) -> TrainSection:
    return config.parse({"steps": 50, **values}, TrainSection)


def model_of(shape: ModelConfig, dtype: torch.dtype = torch.float32, ops: Any = None) -> Decoder:
    model = build(shape, ops, dtype)
    model.init_weights(1)
    return model


def tokens_of(lengths: tuple[int, ...], seed: int = 0) -> TokenBatch:
    """Documents of random tokens; a third of the targets count half, a third nothing."""
    random = np.random.default_rng(seed)
    ids = random.integers(0, 300, sum(lengths) + 1)
    weights = random.choice(np.array([0.0, 0.5, 1.0], dtype=np.float32), sum(lengths))
    return TokenBatch(ids[:-1], ids[1:], lengths, weights)


def gradients(replica: Alone, micros: list[TokenBatch], weight: float) -> tuple[float, dict[str, Tensor]]:
    loss = replica.backward(lambda m, tokens: token_loss(m, tokens, weight), micros)
    return replica.finish(loss).loss, {
        name: view.clone() for name, view in replica.flat.views(replica.flat.grad).items()
    }


@pytest.mark.parametrize(("dtype", "within"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_micro_batches_of_uneven_token_counts_give_the_gradient_of_the_whole(
    dtype: torch.dtype, within: float
) -> None:
    parts = [tokens_of(lengths, seed) for seed, lengths in enumerate([(40, 3), (7,), (1, 90, 20)])]
    weights = [part.weights_T for part in parts]
    whole = TokenBatch(
        np.concatenate([part.ids_T for part in parts]),
        np.concatenate([part.targets_T for part in parts]),
        tuple(length for part in parts for length in part.lengths),
        np.concatenate([part for part in weights if part is not None]),
    )
    assert whole.weights_T is not None
    weight, shape = float(whole.weights_T.sum()), small_models.families()["llama"]
    loss, expected = gradients(Alone(model_of(shape, dtype), section()), [whole], weight)
    shared, found = gradients(Alone(model_of(shape, dtype), section()), parts, weight)
    assert shared == pytest.approx(loss, rel=within)
    for name, gradient in expected.items():
        assert float((found[name] - gradient).norm()) <= within * float(gradient.norm()), name


@pytest.mark.parametrize("name", ["llama", "gpt2", "olmoe"])
def test_recomputed_layers_give_the_same_bits(name: str) -> None:
    shape, micros = small_models.families()[name], [tokens_of((40, 3)), tokens_of((50,), 1)]
    found = [
        gradients(Alone(model_of(shape, torch.bfloat16), section(recompute=kind)), micros, 60.0)
        for kind in ("none", "selective", "full")
    ]
    for loss, grads in found[1:]:
        assert loss == found[0][0]
        assert all(torch.equal(grads[name], gradient) for name, gradient in found[0][1].items())


def test_a_recomputed_model_keeps_less(monkeypatch: pytest.MonkeyPatch) -> None:
    def kept(kind: str) -> int:
        replica, held = Alone(model_of(small_models.config(layers=4)), section(recompute=kind)), []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: held.append(x.nbytes) or x, lambda x: x):
            token_loss(replica.model, tokens_of((100,)), 1.0)
        return sum(held)

    none, selective, full = (kept(kind) for kind in ("none", "selective", "full"))
    assert full < 0.5 * none
    assert full < selective < none


@pytest.mark.parametrize("name", ["llama", "gpt2 untied"])
@pytest.mark.parametrize("kernels", ["own", "stock"])
def test_no_gradient_crosses_the_border_of_a_document(name: str, kernels: str) -> None:
    ids = np.arange(61)  # every token stands once, so that its embedding's gradient is its place's
    late = np.where(np.arange(60) >= 40, 1, 0).astype(np.float32)  # the loss of the last document alone
    model = model_of(
        small_models.families()[name], ops=StockOps(dtype=torch.float32) if kernels == "stock" else None
    )
    token_loss(model, TokenBatch(ids[:-1], ids[1:], (25, 15, 20), late), 20.0).backward()  # type: ignore[no-untyped-call]
    assert model.embed.grad is not None
    assert not model.embed.grad[:40].any()
    assert model.embed.grad[40:60].any(1).all()


def test_gpt2_learns_as_in_transformers() -> None:
    """Same weights, batches and AdamW: 50 losses to 1e-4 in fp32, one window a row there, packed windows here."""
    transformers = pytest.importorskip("transformers")
    shape = small_models.families()["gpt2"]
    model = model_of(shape)
    hf = transformers.GPT2Config(
        vocab_size=shape.vocab_size, n_positions=shape.context, n_embd=shape.width, n_layer=shape.layers,
        n_head=shape.heads, n_inner=shape.ffn, layer_norm_epsilon=shape.norm_eps,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    judge = transformers.GPT2LMHeadModel(hf)
    state = to_hf_state(shape, model.state_dict(), torch.float32)
    missing = judge.load_state_dict(state, strict=False)
    assert missing.missing_keys == ["lm_head.weight"] and not missing.unexpected_keys  # it is tied
    settings = section(optimizer="adamw", lr=3e-3, weight_decay=0.1, clip=1.0, dtype="fp32", micro_batch=2)
    replica = Alone(model, settings)
    decayed = [p for p in judge.parameters() if p.ndim > 1], [p for p in judge.parameters() if p.ndim == 1]
    torch_adamw = torch.optim.AdamW(
        [{"params": decayed[0], "weight_decay": 0.1}, {"params": decayed[1], "weight_decay": 0.0}],
        lr=3e-3, betas=(0.9, 0.95), eps=1e-8,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(2)
    text = torch.randint(0, 300, (8, 65), generator=generator)  # eight windows, met again and again
    ours, theirs = [], []
    for _ in range(50):
        rows = text[torch.randperm(8, generator=generator)[:4]]
        micros = [
            TokenBatch(part[:, :-1].flatten().numpy(), part[:, 1:].flatten().numpy(), (64, 64))
            for part in rows.split(2)
        ]
        loss, _ = gradients(replica, micros, 256.0)
        replica.update(replica.optimizer.norm(), lr=3e-3, embed_lr=3e-3)
        ours.append(loss)
        logits = judge(rows[:, :-1], use_cache=False).logits
        judged = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
        judged.backward()
        torch.nn.utils.clip_grad_norm_(judge.parameters(), 1.0)
        torch_adamw.step()
        torch_adamw.zero_grad()
        theirs.append(float(judged.detach()))
    assert theirs[-1] < theirs[0] - 1.0  # it did learn
    assert max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) < 1e-4


def test_the_compiled_kernels_are_not_compiled_again(tmp_path: Path) -> None:
    model = model_of(small_models.config(), torch.bfloat16)
    if isinstance(model.ops, StockOps):
        pytest.skip("plain torch may be compiled")
    with pytest.raises(ConfigError, match="compiled already"):
        compile_layers(model, Home(tmp_path))


@pytest.mark.long
def test_compiled_layers_give_the_same_loss_and_their_cache_lies_at_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    # In a process of its own, with torch's own warnings: its compiler imports setuptools, which another test's pip
    # keeps from replacing distutils.
    script = f"from pathlib import Path; import {__name__} as test; test.check_compiled_layers(Path({str(tmp_path)!r}))"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    assert any((tmp_path / "cache" / "compile").rglob("*.py"))


def check_compiled_layers(home: Path) -> None:
    """Compile the layers of a small model and compare its loss and gradients with those of the plain one."""
    plain, compiled = (model_of(small_models.config(), ops=StockOps(dtype=torch.float32)) for _ in range(2))
    compile_layers(compiled, Home(home))
    for lengths in ((40, 3), (7, 30, 90)):
        loss, expected = gradients(Alone(plain, section()), [tokens_of(lengths)], 30.0)
        found_loss, found = gradients(Alone(compiled, section()), [tokens_of(lengths)], 30.0)
        assert found_loss == pytest.approx(loss, rel=1e-5)
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-5)
