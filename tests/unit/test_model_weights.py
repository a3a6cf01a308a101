"""Model folders: what is written is read back bit for bit, and what was changed since is never loaded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lapis.errors import ConfigError, ConflictError, InputError, IntegrityError, NotFoundError
from lapis.kernels.batch import packed
from lapis.kernels.stock import StockOps
from lapis.model import layout, manifest
from lapis.model.config import ModelConfig
from lapis.model.config_hf import to_hf
from lapis.model.hf_state import from_hf_state, to_hf_state
from lapis.model.huggingface import read_folder
from lapis.model.manifest import Source
from lapis.model.weights import (
    LoadedModel,
    read_model,
    write_imported,
    write_model,
)
from lapis.tokenizer.bpe import Tokenizer
from lapis.tokenizer.chat import CHATML
from tests import small_models

SOURCE = Source("run", "run 1", "Apache-2.0")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return small_models.tokenizer()


def write(folder: Path, tokenizer: Tokenizer, shape: ModelConfig | None = None) -> dict[str, Tensor]:
    shape = shape or small_models.config()
    state = small_models.random_state(shape)
    write_model(folder, shape, state, tokenizer, source=SOURCE, chat_template=CHATML, add_bos=True)
    return state


def load(folder: Path) -> LoadedModel:
    return read_model(folder, StockOps())


@pytest.mark.parametrize("tied", [True, False])
def test_a_written_model_is_read_back_bit_for_bit(tmp_path: Path, tokenizer: Tokenizer, tied: bool) -> None:
    shape = small_models.config(tied=tied)
    state = write(tmp_path / "model", tokenizer, shape)
    loaded = load(tmp_path / "model")
    assert loaded.config == shape
    assert loaded.tokenizer.digest == tokenizer.digest
    assert loaded.chat is not None and loaded.chat.template == CHATML
    assert loaded.add_bos and loaded.bos_id == tokenizer.end_id
    assert loaded.stop_ids == tokenizer.stop_ids
    assert loaded.manifest.source == SOURCE
    found = loaded.model.state_dict()
    assert set(found) == set(state)
    assert all(torch.equal(found[name], state[name]) for name in state)


def test_equal_models_have_equal_digests_wherever_they_came_from(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    shape = small_models.config()
    state = small_models.random_state(shape)
    first = write_model(tmp_path / "a", shape, state, tokenizer, source=SOURCE)
    second = write_model(tmp_path / "b", shape, state, tokenizer, source=Source("gguf", "elsewhere"))
    state["norm"] = state["norm"] + 1
    other = write_model(tmp_path / "c", shape, state, tokenizer, source=SOURCE)
    assert first.digest == second.digest != other.digest


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "lapis.json"])
def test_a_flipped_bit_in_any_file_is_refused_with_its_name(
    tmp_path: Path, tokenizer: Tokenizer, name: str
) -> None:
    write(tmp_path / "model", tokenizer)
    path = tmp_path / "model" / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(IntegrityError, match=name):
        load(tmp_path / "model")


def test_a_cut_or_missing_file_is_refused_with_its_name(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write(tmp_path / "model", tokenizer)
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(IntegrityError, match=r"model\.safetensors.*bytes instead of"):
        load(tmp_path / "model")
    weights.unlink()
    with pytest.raises(IntegrityError, match=r"model\.safetensors.*missing"):
        load(tmp_path / "model")


def test_nothing_is_written_over_a_model_that_is_there(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write(tmp_path / "model", tokenizer)
    with pytest.raises(ConflictError):
        write(tmp_path / "model", tokenizer)


def test_an_empty_folder_is_filled(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "model").mkdir()
    write(tmp_path / "model", tokenizer)
    assert manifest.verify(tmp_path / "model").parameters == small_models.config().parameters


def test_weights_that_do_not_fit_leave_no_folder(tmp_path: Path, tokenizer: Tokenizer) -> None:
    state = small_models.random_state(small_models.config())
    del state["layers.1.down"]
    with pytest.raises(InputError, match=r"layers\.1\.down"):
        write_model(tmp_path / "model", small_models.config(), state, tokenizer, source=SOURCE)
    assert list(tmp_path.iterdir()) == []


def test_a_tokenizer_with_more_entries_than_the_model_is_refused(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    shape = small_models.config(vocab_size=280)
    with pytest.raises(InputError, match="280"):
        write_model(tmp_path / "m", shape, small_models.random_state(shape), tokenizer, source=SOURCE)


def test_pickled_weights_are_refused_by_name(tmp_path: Path) -> None:
    folder = tmp_path / "pickled"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(to_hf(small_models.config())))
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02.")
    with pytest.raises(InputError, match="pytorch_model.bin"):
        read_model(folder)
    with pytest.raises(InputError, match="pytorch_model.bin"):
        read_folder(folder)


def test_a_folder_that_is_none_and_one_that_is_no_model_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        read_model(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"lapis\.json") as caught:
        read_model(tmp_path)
    assert "lapis pull" in caught.value.hint


@pytest.mark.parametrize(("dtype", "shards"), [(torch.bfloat16, 1), (torch.float16, 1), (torch.float32, 3)])
def test_a_hugging_face_folder_is_imported(tmp_path: Path, dtype: torch.dtype, shards: int) -> None:
    shape = small_models.config(tied=False)
    state = small_models.random_state(shape)
    tensors = {name: tensor.to(dtype) for name, tensor in to_hf_state(shape, state).items()}
    model = read_folder(small_models.write_hf_folder(tmp_path / "hf", shape, tensors, shards))
    write_imported(tmp_path / "model", model, Source("huggingface", "here"))
    loaded = load(tmp_path / "model")
    assert loaded.config == shape
    assert loaded.manifest.source.licence == "mit"
    assert not loaded.add_bos
    # Every bfloat16 value of this size has an exact float16 or float32 form, save the smallest in float16.
    slack = 1e-6 if dtype == torch.float16 else 0.0
    found = loaded.model.state_dict()
    assert all(torch.allclose(found[name], state[name], rtol=0, atol=slack) for name in state)


@pytest.mark.parametrize("licence", ["apache-2.0", "mixed: MIT (3), CC-BY-4.0 (1)", "Someone's own"])
def test_a_model_card_keeps_the_licence(tmp_path: Path, licence: str) -> None:
    (tmp_path / "README.md").write_text(layout.model_card(licence))
    assert layout.read_licence(tmp_path) == licence


def test_an_imported_model_answers_as_before_export(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write(tmp_path / "model", tokenizer)
    manifest.copy_folder(tmp_path / "model", tmp_path / "plain", sealed=False)
    assert not (tmp_path / "plain" / "lapis.json").exists()
    again = read_folder(tmp_path / "plain")
    write_imported(tmp_path / "again", again, SOURCE)
    ids = torch.arange(20)
    first, second = load(tmp_path / "model"), load(tmp_path / "again")
    assert torch.equal(first.model(ids, packed([20])), second.model(ids, packed([20])))
    assert (first.stop_ids, first.bos_id, first.add_bos) == (second.stop_ids, second.bos_id, second.add_bos)
    assert first.chat == second.chat


def test_copying_a_damaged_model_names_the_file_and_leaves_nothing(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    write(tmp_path / "model", tokenizer)
    (tmp_path / "model" / "config.json").write_text("{}")
    with pytest.raises(IntegrityError, match=str(tmp_path / "model" / "config.json")):
        manifest.copy_folder(tmp_path / "model", tmp_path / "plain", sealed=False)
    assert not (tmp_path / "plain").exists()


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), "up_proj.weight is missing"),
        (lambda t: t.update({"model.norm.weight": torch.ones(3)}), r"model.norm.weight has shape \(3,\)"),
        (
            lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(3)}),
            "unknown tensors.*q_proj.bias",
        ),
        (lambda t: t.update({"model.norm.weight": torch.ones(128, dtype=torch.int8)}), "int8"),
        (lambda t: t.update({"lm_head.weight": torch.ones(320, 128)}), "tied"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_name(damage: object, named: str) -> None:
    shape = small_models.config()
    tensors = to_hf_state(shape, small_models.random_state(shape))
    damage(tensors)  # type: ignore[operator]
    with pytest.raises(InputError, match=named):
        from_hf_state(shape, tensors, where="here")


def test_damaged_folders_are_refused_with_the_reason(tmp_path: Path) -> None:
    shape = small_models.config()
    tensors = to_hf_state(shape, small_models.random_state(shape))
    folder = small_models.write_hf_folder(tmp_path / "cut", shape, tensors)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(InputError, match=r"model\.safetensors is not a readable"):
        read_folder(folder)
    folder = small_models.write_hf_folder(tmp_path / "escape", shape, tensors, shards=2)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../../secret.safetensors"}}')
    with pytest.raises(InputError, match="secret"):
        read_folder(folder)
    folder = small_models.write_hf_folder(
        tmp_path / "scaled", shape, tensors, rope_scaling={"type": "dynamic"}
    )
    with pytest.raises(ConfigError, match="dynamic"):
        read_folder(folder)
    folder = small_models.write_hf_folder(tmp_path / "mute", shape, tensors)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(InputError, match=r"no tokenizer\.json"):
        read_folder(folder)


def test_a_shard_that_repeats_a_tensor_is_refused(tmp_path: Path) -> None:
    shape = small_models.config()
    tensors = to_hf_state(shape, small_models.random_state(shape))
    folder = small_models.write_hf_folder(tmp_path / "twice", shape, tensors, shards=2)
    name = "model-00001-of-00002.safetensors"
    save_file(tensors, folder / name)
    assert len(load_file(folder / name)) == len(tensors)
    with pytest.raises(InputError, match="stands in another file too"):
        read_folder(folder)


@pytest.mark.parametrize(
    ("config", "post_processor", "expected"),
    [
        ({"bos_token": "<|im_start|>", "add_bos_token": True}, None, True),
        ({"bos_token": {"content": "<|im_start|>"}}, "TemplateProcessing", True),
        ({"bos_token": "<|im_start|>", "add_bos_token": False}, "TemplateProcessing", False),
        ({"bos_token": "<|im_start|>"}, None, False),
    ],
)
def test_whether_a_text_starts_with_bos_is_what_the_folder_says(
    tmp_path: Path, config: dict[str, object], post_processor: str | None, expected: bool
) -> None:
    shape = small_models.config()
    tensors = to_hf_state(shape, small_models.random_state(shape))
    folder = small_models.write_hf_folder(tmp_path / "hf", shape, tensors)
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>", **config}))
    if post_processor:
        values = json.loads((folder / "tokenizer.json").read_text())
        single = [
            {"SpecialToken": {"id": "<|im_start|>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ]
        token = {"<|im_start|>": {"id": "<|im_start|>", "ids": [1], "tokens": ["<|im_start|>"]}}
        step = {
            "type": post_processor,
            "single": single,
            "pair": [*single, single[1]],
            "special_tokens": token,
        }
        values["post_processor"] = {"type": "Sequence", "processors": [step]}
        (folder / "tokenizer.json").write_text(json.dumps(values))
    model = read_folder(folder)
    assert (model.add_bos, model.bos_id) == (expected, 1)
    assert model.stop_ids[0] == 2
