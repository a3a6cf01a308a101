"""What only a GPU can show: the bits of the Triton kernels on its tensor cores, and decoding by CUDA graphs."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest
import torch

from lapis.inference.engine import LocalEngine
from lapis.inference.request import Request, SamplingParams
from lapis.kernels.ops import select
from lapis.train.float8 import CAPABILITY, around
from tests.integration.test_train_is_serve import ENGINES, FAMILIES, SHORT, differing, exact

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="the Triton kernels' real test needs a GPU"
)


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_trained_is_served(tmp_path: Path, name: str) -> None:
    loaded = exact(tmp_path / "model", FAMILIES[name])
    assert loaded.model.ops.name == "cuda-triton"
    wrong, count = differing(loaded, loaded.model, SHORT, ENGINES[1], 0)
    assert count > 200
    assert wrong == 0, f"{wrong} of {count} logprobs differ"


@pytest.mark.parametrize(("columns", "inner"), [(4096, 4096), (6144, 4096), (4096, 14336), (50000, 2048)])
def test_a_row_of_a_product_is_the_same_in_any_number_of_rows(columns: int, inner: int) -> None:
    ops = select(128)
    x = torch.randn(4096, inner, device="cuda", dtype=torch.bfloat16)
    w = torch.randn(columns, inner, device="cuda", dtype=torch.bfloat16)
    whole = ops.linear(x, w)
    for rows in (1, 7, 64, 65, 256, 257, 1000):
        assert torch.equal(ops.linear(x[:rows], w), whole[:rows])


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < CAPABILITY,
    reason="no 8-bit floats here",
)
def test_linear_maps_in_8_bits_are_near_those_in_bf16() -> None:
    found = []
    for ops in (select(128), around(select(128))):
        torch.manual_seed(0)
        x, w = (torch.randn(size, 2048, device="cuda").bfloat16().requires_grad_() for size in (1000, 4096))
        y = ops.linear(x, w)
        y.backward(torch.randn_like(y))
        found.append([y.detach(), x.grad, w.grad])
    for plain, eight in zip(*found, strict=True):
        assert plain is not None and eight is not None
        assert float((eight.float() - plain.float()).norm() / plain.float().norm()) < 0.08


def test_decoding_is_one_graph(tmp_path: Path) -> None:
    loaded = exact(tmp_path / "model", FAMILIES["llama"])
    texts = []
    for drafts in (0, 7):
        with closing(LocalEngine(loaded, "tiny", drafts=drafts)) as engine:
            request = Request("r", list(range(3, 40)), SamplingParams(40, seed=3, stop_ids=frozenset()))
            texts.append(engine.submit(request).result().token_ids)
            assert engine.stats()["replay"]
    assert texts[0] == texts[1]
