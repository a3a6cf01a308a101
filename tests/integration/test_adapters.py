"""Low-rank adapters, judged by PEFT: what it wrote is computed alike, what we wrote it reads."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lapis.errors import ConflictError, InputError
from lapis.kernels.batch import Batch, packed
from lapis.kernels.stock import StockOps
from lapis.model.adapters import Adapter, for_batch, read_adapter, write_adapter
from lapis.model.families import Decoder, build
from lapis.model.manifest import Source, copy_folder
from lapis.model.weights import write_model
from tests import small_models

# of packages among themselves
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")

IDS = torch.randint(0, 300, (40,), generator=torch.Generator().manual_seed(3))
TARGETS = {
    "llama": ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"],
    "qwen3 moe": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],
}
SHAPES = {name: small_models.families()[name] for name in TARGETS}


def base(folder: Path, name: str) -> Any:
    """The base model in transformers, from a folder that we wrote."""
    import transformers

    state = small_models.random_state(SHAPES[name])
    write_model(folder / "m", SHAPES[name], state, small_models.tokenizer(), source=Source("run", "test"))
    copy_folder(folder / "m", folder / "plain", sealed=False)
    return transformers.AutoModelForCausalLM.from_pretrained(folder / "plain", dtype=torch.float32).eval()


def peft_folder(folder: Path, name: str, **options: Any) -> tuple[Path, Tensor]:
    """A random adapter that PEFT wrote, and the logits that PEFT computes with it."""
    import peft

    config = peft.LoraConfig(r=3, lora_alpha=7, target_modules=TARGETS[name], **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fan_in_fan_out of GPT-2 is set by itself, with a warning
        model = peft.get_peft_model(base(folder, name), config).eval()
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for key, weight in model.named_parameters():
                if "lora_" in key:  # numbers that bfloat16 holds
                    values = torch.randn(weight.shape, generator=generator) * 0.1
                    weight.copy_(values.bfloat16())
        model.save_pretrained(folder / "adapter")
    with torch.no_grad():
        return folder / "adapter", model(IDS[None]).logits[0]


def adapted(model: Decoder, adapters: list[Adapter], adapter_T: Tensor) -> Tensor:
    """Logits with the adapter that each token names."""
    batch = packed([len(IDS)])
    pairs = for_batch(adapters, model.config.layers)
    dtype = model.embed.dtype
    cast = [
        {key: [p and (p[0].to(dtype), p[1].to(dtype)) for p in row] for key, row in layer.items()}
        for layer in pairs
    ]
    whole = Batch(batch.sequence_T, batch.position_T, batch.page_table_SP, None, batch.spans, adapter_T, cast)
    with torch.no_grad():
        return model(IDS, whole)


def stock(name: str) -> Decoder:
    """Our model in float32 over plain torch."""
    model = build(SHAPES[name], StockOps(), torch.float32)
    state = small_models.random_state(SHAPES[name])
    model.load_state_dict({key: weight.float() for key, weight in state.items()})
    return model


@pytest.mark.parametrize("name", TARGETS)
def test_an_adapter_of_peft_computes_what_peft_computes(tmp_path: Path, name: str) -> None:
    folder, expected = peft_folder(tmp_path, name)
    adapter = read_adapter(folder, SHAPES[name])
    assert all(pair[0].shape[0] % 2 == 0 for layer in adapter.layers for pair in layer.values())
    model = stock(name)
    plain = model(IDS, packed([len(IDS)])).detach()
    found = adapted(model, [adapter], torch.zeros(len(IDS), dtype=torch.int32))
    # scale · B is rounded to bfloat16
    error = (found - expected).square().mean().sqrt() / (plain - expected).square().mean().sqrt()
    assert error < 0.01
    none = adapted(model, [adapter], torch.full((len(IDS),), -1, dtype=torch.int32))
    assert torch.allclose(none, plain, atol=1e-6)


def test_rslora_divides_by_the_root_of_the_rank(tmp_path: Path) -> None:
    folder, expected = peft_folder(tmp_path, "llama", use_rslora=True)
    adapter = read_adapter(folder, SHAPES["llama"])
    found = adapted(stock("llama"), [adapter], torch.zeros(len(IDS), dtype=torch.int32))
    assert (found - expected).square().mean().sqrt() < 0.01 * expected.std()


@pytest.mark.parametrize("name", TARGETS)
def test_peft_reads_what_was_written(tmp_path: Path, name: str) -> None:
    folder, expected = peft_folder(tmp_path, name)
    adapter = read_adapter(folder, SHAPES[name])
    write_adapter(tmp_path / "again", SHAPES[name], adapter, base="base")
    again = read_adapter(tmp_path / "again", SHAPES[name])
    for mine, other in zip(adapter.layers, again.layers, strict=True):
        assert set(mine) == set(other)
        for key, (a_RK, b_NR) in mine.items():  # ranks may stand elsewhere, the product is the same
            assert torch.allclose(b_NR.float() @ a_RK.float(), other[key][1].float() @ other[key][0].float())
    import peft

    (tmp_path / "base").mkdir()
    model = peft.PeftModel.from_pretrained(base(tmp_path / "base", name), tmp_path / "again").eval()
    with torch.no_grad():
        logits = model(IDS[None]).logits[0]
    assert (logits - expected).square().mean().sqrt() < 0.01 * expected.std()
    with pytest.raises(ConflictError):
        write_adapter(tmp_path / "again", SHAPES[name], adapter, base="base")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"peft_type": "IA3"}, "IA3"),
        ({"alpha_pattern": {"q_proj": 3}}, "alpha_pattern"),
        ({"lora_alpha": None}, "lora_alpha"),
    ],
)
def test_what_is_not_computed_is_refused_by_name(
    tmp_path: Path, change: dict[str, object], named: str
) -> None:
    folder = small_adapter(tmp_path / "a")
    facts = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**facts, **change}))
    with pytest.raises(InputError, match=named):
        read_adapter(folder, SHAPES["llama"])


def small_adapter(folder: Path) -> Path:
    """An adapter of one weight, made by hand."""
    pair = (torch.ones(2, 128).bfloat16(), torch.ones(128, 2).bfloat16())
    write_adapter(folder, SHAPES["llama"], Adapter(({"out": pair}, {})), base="base")
    return folder


def test_an_adapter_of_another_model_is_refused(tmp_path: Path) -> None:
    folder = small_adapter(tmp_path / "a")
    with pytest.raises(InputError, match="adapt nothing"):
        read_adapter(folder, SHAPES["gpt2"])
    tensors = load_file(folder / "adapter_model.safetensors")
    name = next(key for key in tensors if key.endswith("layers.0.self_attn.o_proj.lora_B.weight"))
    save_file({**tensors, name: torch.zeros(64, 2)}, folder / "adapter_model.safetensors")
    with pytest.raises(InputError, match="o_proj"):
        read_adapter(folder, SHAPES["llama"])
