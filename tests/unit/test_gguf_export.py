"""GGUF out: our reader has every bit back, and what a file cannot hold is refused before it is there."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from tokenizers import Tokenizer as HFTokenizer
from tokenizers import pre_tokenizers

from lapis.cli.main import lapis
from lapis.errors import ConfigError, ConflictError, InputError, LapisError
from lapis.home import Home
from lapis.kernels.rope import RopeScaling
from lapis.model.adapters import write_adapter
from lapis.model.config import ModelConfig
from lapis.model.gguf import read_gguf
from lapis.model.gguf_export import export_gguf
from lapis.model.manifest import Source
from lapis.model.peft import write_adapter_folder
from lapis.model.store import ModelStore
from lapis.model.weights import write_model
from lapis.tokenizer.bpe import Tokenizer
from lapis.tokenizer.chat import CHATML
from tests import small_models

FAMILIES = {
    name: replace(shape, window=None, full_layers=()) for name, shape in small_models.families().items()
}
FAMILIES["llama3"] = small_models.config(
    rope_base=5e5, rope_scaling=RopeScaling("llama3", 8.0, 8192), context=32768
)
FAMILIES["sixteen experts"] = replace(FAMILIES["mixtral"], experts=16)  # 10 comes after 2
TEXTS = ("the quick brown fox", "Größe 東京 😀\n\n\t x", "1234567890", "<|im_end|>", "")


def folder_of(
    tmp_path: Path,
    shape: ModelConfig,
    change: Callable[[dict[str, Any]], None] = lambda state: None,
    tokenizer: Tokenizer | None = None,
) -> Path:
    state = small_models.random_state(shape)
    change(state)
    write_model(
        tmp_path / "model",
        shape,
        state,
        tokenizer or small_models.tokenizer(),
        source=Source("run", "20261129-tiny", "mit"),
        chat_template=CHATML,
        add_bos=True,
        stop_ids=(2, 0),
    )
    return tmp_path / "model"


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_comes_back_bit_for_bit(tmp_path: Path, name: str) -> None:
    export_gguf(folder_of(tmp_path, FAMILIES[name]), tmp_path / "m.gguf", "bf16")
    found, state = read_gguf(tmp_path / "m.gguf"), small_models.random_state(FAMILIES[name])
    config = found.config
    if name == "yarn" and config.rope_scaling is not None:  # its factor of sines went through a float32
        assert config.rope_scaling.attention == pytest.approx(1.1386, rel=1e-6)
        config = replace(config, rope_scaling=replace(config.rope_scaling, attention=1.1386))
    assert config == FAMILIES[name]
    assert set(found.state) == set(state)
    assert all(torch.equal(found.state[key], weight) for key, weight in state.items())


@pytest.mark.parametrize(("kind", "within"), [("f32", 0.0), ("f16", 1e-6), ("q8_0", 0.003)])
def test_each_type_keeps_what_it_can(tmp_path: Path, kind: str, within: float) -> None:
    shape = FAMILIES["llama"]
    export_gguf(folder_of(tmp_path, shape), tmp_path / "m.gguf", kind)
    found = read_gguf(tmp_path / "m.gguf").state
    for name, weight in small_models.random_state(shape).items():
        assert torch.allclose(found[name].float(), weight.float(), rtol=0, atol=within), name
        assert weight.ndim > 1 or torch.equal(found[name], weight), name  # vectors are not rounded


def test_tokenizer_template_and_ends_come_back(tmp_path: Path) -> None:
    export_gguf(folder_of(tmp_path, FAMILIES["llama"]), tmp_path / "m.gguf", "f16")
    found, ours = read_gguf(tmp_path / "m.gguf"), small_models.tokenizer()
    assert (found.chat_template, found.add_bos, found.bos_id) == (CHATML, True, ours.end_id)
    assert (found.stop_ids, found.licence) == ((2, 0), "mit")
    assert (found.tokenizer.vocab_size, found.tokenizer.special_tokens) == (
        ours.vocab_size,
        ours.special_tokens,
    )
    for text in TEXTS:
        for special in (False, True):
            assert found.tokenizer.encode(text, special) == ours.encode(text, special), text


def other_split(tokenizer: Tokenizer) -> Tokenizer:
    inner = HFTokenizer.from_str(tokenizer.to_json())
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return Tokenizer(inner)


def unmade_token(tokenizer: Tokenizer) -> Tokenizer:
    """One that a whole look-up finds and its merges do not make."""
    described = json.loads(tokenizer.to_json())
    described["model"]["vocab"]["qqq"] = tokenizer.vocab_size
    return Tokenizer(HFTokenizer.from_str(json.dumps(described)))


def too_large(state: dict[str, Any]) -> None:
    state["layers.1.down"][0, 0] = 1e6


@pytest.mark.parametrize(
    ("kind", "changes", "error", "said"),
    [
        ("bf16", {"shape": small_models.config(window=40)}, ConfigError, "sliding window of 40"),
        ("q8_0", {"shape": small_models.config(ffn=80)}, ConfigError, r"blk\.0\.ffn_down\.weight hold 80"),
        (
            "bf16",
            {"shape": replace(FAMILIES["mixtral"], normalise_experts=False, head_norm="head")},
            ConfigError,
            "normalise_experts",
        ),
        ("f16", {"change": too_large}, InputError, r"ffn_down\.weight holds numbers as large as 9\.99e\+05"),
        ("bf16", {"tokenizer": other_split(small_models.tokenizer())}, InputError, "no name for the way"),
        ("bf16", {"tokenizer": unmade_token(small_models.tokenizer())}, InputError, "no name for the way"),
    ],
    ids=["window", "rows", "experts", "range", "split", "merges"],
)
def test_what_a_file_cannot_hold_is_refused_and_leaves_nothing(
    tmp_path: Path, kind: str, changes: dict[str, Any], error: type[LapisError], said: str
) -> None:
    folder = folder_of(tmp_path, **{"shape": small_models.config(), **changes})
    with pytest.raises(error, match=said) as caught:
        export_gguf(folder, tmp_path / "m.gguf", kind)
    assert caught.value.hint
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_an_adapter_alone_is_refused(home: Home, tmp_path: Path) -> None:
    shape = small_models.config()
    folder_of(home.models, shape).rename(home.models / "small")
    write_adapter(tmp_path / "plain", shape, small_models.random_adapter(shape, seed=1), "small")
    base = ModelStore(home).get("small")
    write_adapter_folder(tmp_path / "plain", home.models / "tuned", base, Source("huggingface", "test"))
    with pytest.raises(InputError, match="is an adapter of 'small'"):
        export_gguf(home.models / "tuned", tmp_path / "m.gguf", "bf16")


def test_the_command_writes_one_file_and_overwrites_none(home: Home, tmp_path: Path) -> None:
    folder_of(home.models, small_models.config()).rename(home.models / "small")
    target = tmp_path / "small.gguf"
    arguments = ["models", "export", "small", str(target), "--gguf", "q8_0"]
    done = CliRunner().invoke(lapis, [*arguments, "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["bytes"] == target.stat().st_size
    again = CliRunner().invoke(lapis, arguments)
    assert isinstance(again.exception, ConflictError)
