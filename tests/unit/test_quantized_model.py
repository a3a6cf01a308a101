"""A model in 8 and 4 bits: smaller in memory, close in its answers, the same in every schedule."""

from __future__ import annotations

import pytest
import torch

from lapis.kernels.batch import packed
from lapis.kernels.ops import select
from lapis.kernels.quantized import Kind
from lapis.model.families import Decoder, build
from tests import small_models
from tests.unit.test_model import serve

FAMILIES = {
    name: small_models.families()[name] for name in ("llama", "biases", "qwen3", "gpt2", "olmoe", "qwen3 moe")
}


def made(name: str) -> Decoder:
    shape = FAMILIES[name]
    model = build(shape, select(shape.head_size, widths=(shape.width, shape.ffn)))
    model.load_state_dict(small_models.random_state(shape))
    return model


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("name", FAMILIES)
@torch.inference_mode()
def test_a_quantised_model_is_smaller_and_close(name: str, kind: Kind) -> None:
    model = made(name)
    ids = torch.randint(0, 300, (70,), generator=torch.Generator().manual_seed(2))
    plain, before = model(ids, packed([70])), model.weight_bytes
    assert before == FAMILIES[name].weight_bytes
    kept = model.embed.nbytes
    model.quantize(kind)
    assert "layers.0.qkv" not in model.state_dict()
    head = 0.55 * model.embed.nbytes  # int8, beside the embedding
    assert model.weight_bytes < kept + head + (before - kept) * {"int8": 0.6, "int4": 0.4}[kind]
    logits = model(ids, packed([70]))
    error_T = (logits - plain).square().mean(1).sqrt() / plain.std()
    # the median: where two experts are nearly as likely, a row may choose the other one
    assert error_T.median() < {"int8": 0.045, "int4": 0.35}[kind]
    assert error_T.max() < {"int8": 0.5, "int4": 1.0}[kind]
    if model.ops.bit_exact:
        assert torch.equal(serve(model, ids.tolist(), [33, 1, 36], [3, 0, 2], model.new_caches(4)), logits)
    scores = model.ops.linear_logprobs(model.hidden(ids, packed([70]))[:-1], model.head_weight, ids[1:])
    assert torch.allclose(scores, logits[:-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0], atol=1e-3)
