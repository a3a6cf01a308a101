"""ModelConfig: the arithmetic agrees with a real model, and what is not computed here is refused by name."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lapis.errors import ConfigError
from lapis.kernels.stock import StockOps
from lapis.model.config import NAMED, ModelConfig, from_hf
from lapis.model.families import Llama
from tests import small_models

MISTRAL = {
    "model_type": "mistral",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "sliding_window": None,
}


@pytest.mark.parametrize("name", sorted(NAMED))
def test_a_named_size_counts_the_weights_that_its_model_has(name: str) -> None:
    model = Llama(NAMED[name], StockOps())
    assert sum(weight.numel() for weight in model.parameters()) == NAMED[name].parameters
    assert sum(weight.nbytes for weight in model.parameters()) == NAMED[name].weight_bytes


def test_laptop_is_the_size_that_the_documents_state() -> None:
    assert NAMED["laptop"].parameters == 13_767_552


def test_an_untied_head_counts_twice() -> None:
    tied, untied = small_models.config(tied=True), small_models.config(tied=False)
    assert untied.parameters - tied.parameters == tied.vocab_size * tied.width
    assert sum(weight.numel() for weight in Llama(untied, StockOps()).parameters()) == untied.parameters


def test_published_figures_of_mistral_7b() -> None:
    config = from_hf(MISTRAL)
    assert config.parameters == 7_241_732_096
    assert config.kv_bytes_per_token == 131_072
    assert config.flops_per_token(0) == 6 * (
        config.parameters - config.vocab_size * config.width - 65 * config.width
    )


@given(st.integers(1, 8), st.integers(1, 4), st.integers(1, 4), st.booleans())
def test_a_config_survives_the_way_through_hugging_face(layers: int, kv: int, group: int, tied: bool) -> None:
    config = small_models.config(layers=layers, kv_heads=kv, heads=kv * group, head_size=16, tied=tied)
    assert from_hf(config.to_hf()) == config


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model_type": "gpt2"}, "gpt2"),
        ({"model_type": "qwen3_moe"}, "qwen3_moe"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "llama3"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "linear"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6}}, "yarn"),
        ({"sliding_window": 4096}, "sliding_window"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"num_local_experts": 8}, "num_local_experts"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ],
)
def test_what_is_not_computed_is_refused_with_its_name_and_what_is_supported(
    change: dict[str, object], named: str
) -> None:
    with pytest.raises(ConfigError, match=named) as caught:
        from_hf({**MISTRAL, **change})
    assert "Llama" in caught.value.hint


@pytest.mark.parametrize("change", [{"hidden_size": None}, {"vocab_size": "many"}, {"num_hidden_layers": 0}])
def test_a_config_with_a_missing_or_senseless_value_names_it(change: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(change))):
        from_hf({**MISTRAL, **change})


def test_the_new_place_of_the_rope_base_is_read() -> None:
    values = {key: value for key, value in MISTRAL.items() if key != "rope_theta"}
    assert (
        from_hf({**values, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}).rope_base == 5e5
    )


@pytest.mark.parametrize(
    "change", [{"heads": 3}, {"head_size": 33}, {"layers": -1}, {"family": "gpt2"}, {"ffn": True}]
)
def test_shapes_that_do_not_fit_together_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        replace(NAMED["tiny"], kv_heads=1 if "heads" not in change else 2, **change)


def test_arithmetic_and_store_need_no_torch() -> None:
    code = "import sys, lapis.model.config, lapis.model.store, lapis.model.pull; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_configs_are_values() -> None:
    assert isinstance(NAMED["laptop"], ModelConfig)
    assert replace(NAMED["laptop"]) == NAMED["laptop"]
