"""Every family: judged by `transformers`, the same bits in training and serving, gradients against fp32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lapis.kernels.batch import Batch, packed
from lapis.kernels.stock import StockOps
from lapis.model.families import Decoder, build
from lapis.model.huggingface import read_folder
from lapis.model.manifest import Source, copy_folder
from lapis.model.weights import read_model, write_model
from tests import small_models

FAMILIES = small_models.families()
IDS = torch.randint(0, 300, (90,), generator=torch.Generator().manual_seed(4))


def exported(folder: Path, name: str) -> Path:
    """A random model, written by us and exported as a plain Hugging Face folder."""
    shape = FAMILIES[name]
    tokenizer = small_models.tokenizer()
    write_model(
        folder / "model", shape, small_models.random_state(shape), tokenizer, source=Source("run", "test")
    )
    copy_folder(folder / "model", folder / "plain", sealed=False)
    return folder / "plain"


def made(name: str, ops: Any, dtype: torch.dtype) -> Decoder:
    """Our model of a family with its random weights."""
    shape = FAMILIES[name]
    model = build(shape, ops, dtype)
    state = small_models.random_state(shape)
    model.load_state_dict({key: weight.to(dtype) for key, weight in state.items()})
    return model


def compiled(name: str) -> Decoder:
    """Our model over the compiled kernels."""
    model = made(name, None, torch.bfloat16)
    if not model.ops.bit_exact:
        pytest.skip(f"no compiled kernels here: {model.ops.reason}")
    return model


def serve(model: Decoder, ids: Tensor, chunks: list[int], table: list[int]) -> Tensor:
    """Logits of a sequence that comes in chunks, its keys and values in the pages of `table`."""
    caches, logits, start = model.new_caches(max(table) + 1), [], 0
    for size in chunks:
        batch = Batch(
            torch.zeros(size, dtype=torch.int32),
            torch.arange(start, start + size, dtype=torch.int32),
            torch.tensor([table], dtype=torch.int32),
            caches,
            ((0, size),),
        )
        logits.append(model(ids[start : start + size], batch))
        start += size
    return torch.cat(logits)


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_transformers_computes_the_same_from_an_exported_folder(tmp_path: Path, name: str) -> None:
    import transformers

    folder = exported(tmp_path, name)

    def theirs(dtype: torch.dtype) -> Tensor:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
        return model(IDS[None]).logits[0].float()

    expected = theirs(torch.float32)
    assert expected.std() > 0.1
    ours = made(name, StockOps(), torch.float32)
    assert torch.allclose(ours(IDS, packed([90])), expected, atol=2e-4)
    # In bfloat16 each operation rounds: ours may be no further from float32 than theirs is, give or take. The
    # median, since here and there rounding decides between two experts.
    served = serve(made(name, None, torch.bfloat16), IDS, [50, 1, 1, 38], [3, 0, 2])
    our_error, their_error = (
        (logits - expected).square().mean(-1).sqrt().median() for logits in (served, theirs(torch.bfloat16))
    )
    assert our_error < 1.5 * their_error


@pytest.mark.parametrize("name", FAMILIES)
def test_a_folder_comes_back_as_it_was(tmp_path: Path, name: str) -> None:
    plain = exported(tmp_path, name)
    state = small_models.random_state(FAMILIES[name])
    for config, found in (
        (lambda m: (m.config, m.state))(read_folder(plain)),
        (lambda m: (m.config, m.model.state_dict()))(read_model(tmp_path / "model")),
    ):
        assert config == FAMILIES[name]
        assert set(found) == set(state)
        assert all(torch.equal(found[key], weight) for key, weight in state.items())


@pytest.mark.parametrize("name", FAMILIES)
def test_training_and_serving_give_the_same_bits(name: str) -> None:
    model = compiled(name)
    other = torch.randint(0, 300, (37,), generator=torch.Generator().manual_seed(7))
    trained = model(torch.cat([other, IDS]), packed([37, 90]))[37:]
    assert trained.requires_grad
    with torch.inference_mode():
        for chunks in ([90], [33, 1, 1, 31, 24], [64, *[1] * 26]):
            assert torch.equal(serve(model, IDS, chunks, [4, 0, 2]), trained.detach())


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_point_where_those_of_fp32_do(name: str) -> None:
    gradients = []
    for model in (compiled(name), made(name, StockOps(), torch.float32)):
        x_TH = model.hidden(IDS[:-1], packed([89]))
        loss = model.ops.linear_cross_entropy(x_TH, model.head_weight, IDS[1:])
        loss.backward()  # type: ignore[no-untyped-call]
        assert all(parameter.grad is not None for parameter in model.parameters())
        gradients.append(
            torch.cat([p.grad.float().flatten() for p in model.parameters() if p.grad is not None])
        )
    assert F.cosine_similarity(*gradients, dim=0) > 0.99
