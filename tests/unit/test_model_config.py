"""ModelConfig: the arithmetic agrees with a real model, and what is not computed here is refused by name."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lapis.errors import ConfigError
from lapis.kernels.rope import RopeScaling
from lapis.kernels.stock import StockOps
from lapis.model.config import NAMED, ModelConfig
from lapis.model.config_hf import from_hf, to_hf
from lapis.model.families import Llama, build
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
    model = build(NAMED[name], StockOps())
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


@pytest.mark.parametrize("name", small_models.families())
def test_every_family_counts_the_weights_that_its_model_has(name: str) -> None:
    config = small_models.families()[name]
    model = build(config, StockOps())
    assert sum(weight.numel() for weight in model.parameters()) == config.parameters
    matrices = [weight for weight in model.parameters() if weight.ndim > 1]
    assert config.matmul_parameters <= sum(weight.numel() for weight in matrices)
    assert from_hf(to_hf(config)) == config
    assert ModelConfig(**json.loads(json.dumps(asdict(config)))) == config


@given(st.integers(1, 8), st.integers(1, 4), st.integers(1, 4), st.booleans())
def test_a_config_survives_the_way_through_hugging_face(layers: int, kv: int, group: int, tied: bool) -> None:
    config = small_models.config(layers=layers, kv_heads=kv, heads=kv * group, head_size=16, tied=tied)
    assert from_hf(to_hf(config)) == config


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model_type": "gpt_neox"}, "gpt_neox"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 8.0}}, "dynamic"),
        ({"rope_parameters": {"rope_type": "longrope", "factor": 2.0}}, "longrope"),
        ({"rope_scaling": {"type": "default", "mrope_section": [16, 24, 24]}}, "mrope_section"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"layer_types": ["chunked_attention"] * 32}, "layer_types"),
        ({"layer_types": ["sliding_attention"] * 32}, "sliding_window"),
        ({"model_type": "llama", "sliding_window": 4096}, "sliding_window"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"num_local_experts": 8}, "num_local_experts"),
        ({"model_type": "olmoe", "clip_qkv": 8.0}, "clip_qkv"),
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


GPT2 = {"model_type": "gpt2", "vocab_size": 50257}
QWEN2 = {
    "model_type": "qwen2",
    "vocab_size": 151936,
    "hidden_size": 896,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "intermediate_size": 4864,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": True,
    "rope_theta": 1e6,
    "sliding_window": 32768,
    "max_window_layers": 21,
    "use_sliding_window": False,
}
LLAMA3 = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 2048,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "head_dim": 64,
    "tie_word_embeddings": True,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
}
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}


@pytest.mark.parametrize(
    ("values", "parameters"), [(GPT2, 124_439_808), (QWEN2, 494_032_768), (LLAMA3, 1_235_814_400)]
)
def test_published_figures_of_other_families(values: dict[str, object], parameters: int) -> None:
    assert from_hf(values).parameters == parameters


def test_old_and_new_places_of_a_rope_scaling_say_the_same() -> None:
    old = from_hf({**LLAMA3})
    scaling = {**LLAMA3["rope_scaling"], "rope_theta": 500000.0}  # type: ignore[dict-item]
    new = {key: value for key, value in LLAMA3.items() if not key.startswith("rope_")}
    assert from_hf({**new, "rope_parameters": scaling, "dtype": "bfloat16"}) == old
    assert old.rope_scaling == RopeScaling("llama3", 32.0, 8192)
    yarn = from_hf({**QWEN2, "rope_scaling": YARN}).rope_scaling
    assert yarn is not None and abs(yarn.attention - 1.138629) < 1e-6


@pytest.mark.parametrize(
    ("change", "windows"),
    [
        ({"use_sliding_window": False, "sliding_window": 100}, [None] * 3),
        ({"use_sliding_window": True, "sliding_window": 100, "max_window_layers": 2}, [None, None, 100]),
        ({"use_sliding_window": True, "sliding_window": 100}, [None] * 3),
        ({"use_sliding_window": True, "sliding_window": 32768, "max_window_layers": 0}, [None] * 3),
        (
            {
                "use_sliding_window": True,
                "sliding_window": 64,
                "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            },
            [64, None, 64],
        ),
        ({"model_type": "mistral", "sliding_window": 4096}, [4096] * 3),
        ({"model_type": "mistral", "sliding_window": None}, [None] * 3),
    ],
)
def test_each_layer_has_the_window_that_the_config_says(
    change: dict[str, object], windows: list[int | None]
) -> None:
    config = from_hf({**QWEN2, "num_hidden_layers": 3, **change})
    assert [config.window_of(layer) for layer in range(3)] == windows


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
