"""The model definition and the folders it is written to, judged by Hugging Face `transformers`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lapis.kernels.batch import packed
from lapis.kernels.ops import select
from lapis.kernels.stock import StockOps
from lapis.model.config import ModelConfig
from lapis.model.families import Llama
from lapis.model.manifest import Source, copy_folder
from lapis.model.weights import write_model
from lapis.tokenizer.chat import CHATML
from tests import small_models

transformers = pytest.importorskip(
    "transformers", reason="transformers is not installed (pip install lapis[dev])"
)

SHAPES = {
    "tied": small_models.config(tied=True),
    "untied": small_models.config(tied=False),
    "every head its own keys": small_models.config(kv_heads=4),
    "one key head": small_models.config(kv_heads=1),
    "another rope base": small_models.config(rope_base=1e6),
    "heads wider than the model": small_models.config(head_size=64),
    "another epsilon": small_models.config(norm_eps=1e-2),
}
IDS = torch.randint(0, 300, (90,), generator=torch.Generator().manual_seed(3))


def exported(folder: Path, shape: ModelConfig) -> Path:
    """A random model, written by us and exported as a plain Hugging Face folder."""
    state = small_models.random_state(shape)
    tokenizer = small_models.tokenizer()
    source = Source("run", "test")
    write_model(folder / "model", shape, state, tokenizer, source=source, chat_template=CHATML, add_bos=True)
    copy_folder(folder / "model", folder / "plain", sealed=False)
    return folder / "plain"


def theirs(folder: Path, dtype: torch.dtype) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


@pytest.mark.parametrize("name", SHAPES)
@torch.no_grad()
def test_an_exported_folder_gives_the_same_logits_in_transformers(tmp_path: Path, name: str) -> None:
    shape = SHAPES[name]
    folder = exported(tmp_path, shape)
    state = small_models.random_state(shape)
    expected = theirs(folder, torch.float32)(IDS[None]).logits[0]
    ours = Llama(shape, StockOps(), torch.float32)
    ours.load_state_dict({key: weight.float() for key, weight in state.items()})
    assert torch.allclose(ours(IDS, packed([90])), expected, atol=1e-4)
    # In bfloat16 each operation rounds: ours may be no further from float32 than theirs is, give or take.
    served = Llama(shape, select(shape.head_size, widths=(shape.width, shape.ffn)))
    served.load_state_dict(state)
    their_error = (theirs(folder, torch.bfloat16)(IDS[None]).logits[0] - expected).square().mean().sqrt()
    our_error = (served(IDS, packed([90])) - expected).square().mean().sqrt()
    assert our_error < 1.5 * their_error


def test_an_exported_tokenizer_encodes_and_renders_alike(tmp_path: Path) -> None:
    theirs = transformers.AutoTokenizer.from_pretrained(exported(tmp_path, small_models.config()))
    ours = small_models.tokenizer()
    for text in ("the quick brown fox", "Größe 東京 😀\n\n\tx = 12345", ""):
        assert theirs.encode(text, add_special_tokens=False) == ours.encode(text)
    assert theirs.eos_token_id == ours.end_id
    messages = [{"role": "user", "content": "hello"}]
    text = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
