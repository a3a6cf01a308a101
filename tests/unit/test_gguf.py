"""GGUF in: every quantisation against a judge that reads one number at a time, and clear words for bad files."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind

from lapis.errors import ConfigError, InputError
from lapis.kernels.rope import RopeScaling, frequencies, yarn_attention
from lapis.model.config import ModelConfig
from lapis.model.gguf import read_gguf
from lapis.model.hf_state import to_hf_state
from tests import small_models

SHAPE = small_models.config(width=256, heads=4, kv_heads=2, head_size=64, ffn=512)
DOWN = "layers.1.down"
FAMILIES = small_models.families()


@pytest.fixture(scope="module")
def tensors() -> dict[str, np.ndarray]:
    state = small_models.random_state(SHAPE)
    return {name: tensor.float().numpy() for name, tensor in to_hf_state(SHAPE, state).items()}


def half(data: bytes) -> float:
    return float(struct.unpack("<e", data)[0])


def judge_q8_0(block: bytes) -> list[float]:
    return [half(block[:2]) * q for q in struct.unpack("32b", block[2:])]


def judge_q4_0(block: bytes) -> list[float]:
    nibbles = [byte & 15 for byte in block[2:]] + [byte >> 4 for byte in block[2:]]
    return [half(block[:2]) * (q - 8) for q in nibbles]


def judge_q4_1(block: bytes) -> list[float]:
    nibbles = [byte & 15 for byte in block[4:]] + [byte >> 4 for byte in block[4:]]
    return [half(block[:2]) * q + half(block[2:4]) for q in nibbles]


def judge_q5_0(block: bytes) -> list[float]:
    high = int.from_bytes(block[2:6], "little")
    nibbles = [byte & 15 for byte in block[6:]] + [byte >> 4 for byte in block[6:]]
    return [half(block[:2]) * ((q | (high >> i & 1) << 4) - 16) for i, q in enumerate(nibbles)]


def judge_q5_1(block: bytes) -> list[float]:
    high = int.from_bytes(block[4:8], "little")
    nibbles = [byte & 15 for byte in block[8:]] + [byte >> 4 for byte in block[8:]]
    return [half(block[:2]) * (q | (high >> i & 1) << 4) + half(block[2:4]) for i, q in enumerate(nibbles)]


def k_scale(scales: bytes, j: int) -> tuple[int, int]:
    """Scale and minimum of sub-block j of eight, 6 bits each, as ggml packs them in 12 bytes."""
    if j < 4:
        return scales[j] & 63, scales[j + 4] & 63
    low, high = scales[j + 4] & 15, scales[j + 4] >> 4
    return low | (scales[j - 4] >> 6) << 4, high | (scales[j] >> 6) << 4


def judge_q4_k(block: bytes) -> list[float]:
    d, least, scales, quants = half(block[:2]), half(block[2:4]), block[4:16], block[16:]
    values = []
    for i in range(256):
        j = i // 32
        scale, minimum = k_scale(scales, j)
        byte = quants[32 * (j // 2) + i % 32]
        values.append(d * scale * (byte >> 4 if j % 2 else byte & 15) - least * minimum)
    return values


def judge_q5_k(block: bytes) -> list[float]:
    d, least, scales, high, quants = half(block[:2]), half(block[2:4]), block[4:16], block[16:48], block[48:]
    values = []
    for i in range(256):
        j = i // 32
        scale, minimum = k_scale(scales, j)
        byte = quants[32 * (j // 2) + i % 32]
        q = (byte >> 4 if j % 2 else byte & 15) | (high[i % 32] >> j & 1) << 4
        values.append(d * scale * q - least * minimum)
    return values


def judge_q6_k(block: bytes) -> list[float]:
    low, high, scales, d = (
        block[:128],
        block[128:192],
        struct.unpack("16b", block[192:208]),
        half(block[208:]),
    )
    values = []
    for i in range(256):
        part, rest = divmod(i, 128)
        quarter, column = divmod(rest, 32)
        byte = low[64 * part + 32 * (quarter % 2) + column]
        nibble = byte >> 4 if quarter >= 2 else byte & 15
        q = nibble | (high[32 * part + column] >> 2 * quarter & 3) << 4
        values.append(d * scales[i // 16] * (q - 32))
    return values


JUDGES: dict[Kind, Callable[[bytes], list[float]]] = {
    Kind.Q8_0: judge_q8_0,
    Kind.Q4_0: judge_q4_0,
    Kind.Q4_1: judge_q4_1,
    Kind.Q5_0: judge_q5_0,
    Kind.Q5_1: judge_q5_1,
    Kind.Q4_K: judge_q4_k,
    Kind.Q5_K: judge_q5_k,
    Kind.Q6_K: judge_q6_k,
}
HALVES = {Kind.Q4_K: (0, 2), Kind.Q5_K: (0, 2), Kind.Q6_K: (208,)}  # where a block keeps its float16 numbers


def stored(kind: Kind, values: np.ndarray) -> np.ndarray:
    """Bytes of a matrix: by the gguf package's own quantiser, or random blocks where it has none."""
    if kind not in HALVES:
        return gguf.quants.quantize(values, kind)
    size, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    rows, columns = values.shape
    blocks = np.random.default_rng(0).integers(0, 256, (rows, columns // size, block_bytes), dtype=np.uint8)
    for place in HALVES[kind]:
        blocks[..., place : place + 2] = np.array([0.01], dtype=np.float16).view(np.uint8)
    return blocks.reshape(rows, -1)


@pytest.mark.parametrize("kind", list(JUDGES), ids=lambda kind: kind.name)
def test_a_quantised_matrix_is_read_as_its_definition_says(
    tmp_path: Path, tensors: dict[str, np.ndarray], kind: Kind
) -> None:
    down = tensors["model.layers.1.mlp.down_proj.weight"]
    data = stored(kind, down)
    path = small_models.write_gguf(
        tmp_path / "m.gguf", SHAPE, tensors, raw={"blk.1.ffn_down.weight": (data, kind)}
    )
    block_bytes = gguf.GGML_QUANT_SIZES[kind][1]
    picked = data[:2]  # the judge is slow: two rows tell as much as all
    expected = [v for block in picked.reshape(-1, block_bytes) for v in JUDGES[kind](block.tobytes())]
    found = read_gguf(path).state[DOWN]
    assert torch.equal(found[:2], torch.tensor(expected).reshape(2, -1).to(torch.bfloat16))
    if kind not in HALVES:  # a real quantiser's numbers are near those it was given
        step = {Kind.Q8_0: 0.003, Kind.Q4_0: 0.05, Kind.Q4_1: 0.03, Kind.Q5_0: 0.03, Kind.Q5_1: 0.015}[kind]
        assert float((found.float() - torch.from_numpy(down)).abs().max()) < step


@pytest.mark.parametrize("kind", [Kind.F32, Kind.F16, Kind.BF16], ids=lambda kind: kind.name)
@pytest.mark.parametrize("tied", [True, False])
def test_a_file_of_floats_gives_the_very_weights(tmp_path: Path, kind: Kind, tied: bool) -> None:
    shape = small_models.config(tied=tied)
    state = small_models.random_state(shape)
    tensors = {name: tensor.float().numpy() for name, tensor in to_hf_state(shape, state).items()}
    model = read_gguf(small_models.write_gguf(tmp_path / "m.gguf", shape, tensors, kind))
    assert model.config == shape
    assert model.licence == "apache-2.0"
    for name, tensor in state.items():  # also: queries and keys are back in the order of rotated halves
        assert torch.allclose(model.state[name], tensor, rtol=0, atol=1e-6 if kind == Kind.F16 else 0), name


@pytest.mark.parametrize("name", [n for n in FAMILIES if n not in ("linear", "llama3", "yarn")])
def test_every_family_comes_in(tmp_path: Path, name: str) -> None:
    shape = replace(FAMILIES[name], window=None, full_layers=())
    state = small_models.random_state(shape)
    tensors = {key: tensor.float().numpy() for key, tensor in to_hf_state(shape, state).items()}
    model = read_gguf(small_models.write_gguf(tmp_path / "m.gguf", shape, tensors))
    assert model.config == shape
    assert set(model.state) == set(state)
    assert all(torch.equal(model.state[key], tensor) for key, tensor in state.items())


def test_stretched_positions_come_in(tmp_path: Path, tensors: dict[str, np.ndarray]) -> None:
    scaling = RopeScaling("llama3", 8.0, 8192)
    plain = np.array(frequencies(64, 5e5))
    table = (plain / np.array(frequencies(64, 5e5, scaling))).astype(np.float32)
    shape = replace(SHAPE, rope_base=5e5, context=131072)
    path = write(tmp_path, tensors, shape, raw={"rope_freqs.weight": (table, Kind.F32)})
    assert read_gguf(path).config == replace(shape, rope_scaling=scaling)
    yarn = {
        "llama.rope.scaling.type": "yarn",
        "llama.rope.scaling.factor": 4.0,
        "llama.rope.scaling.original_context_length": 64,
    }
    found = read_gguf(write(tmp_path, tensors, extra=yarn)).config.rope_scaling
    assert found == RopeScaling("yarn", 4.0, 64, attention=yarn_attention(4.0))
    linear = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.0}
    assert read_gguf(write(tmp_path, tensors, extra=linear)).config.rope_scaling == RopeScaling("linear", 2.0)
    window = read_gguf(write(tmp_path, tensors, extra={"llama.attention.sliding_window": 64})).config.window
    assert window == 64


def test_the_tokenizer_is_rebuilt(tmp_path: Path, tensors: dict[str, np.ndarray]) -> None:
    model = read_gguf(small_models.write_gguf(tmp_path / "m.gguf", SHAPE, tensors))
    built, original = model.tokenizer, small_models.tokenizer()
    assert model.stop_ids[0] == 2
    assert (model.bos_id, model.add_bos) == (1, False)
    assert model.chat_template == "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    for text in ("the quick brown fox", "Größe 東京 😀\n\n\t x", "1234567890", ""):
        assert built.decode(built.encode(text)) == text
    assert built.encode("<|im_end|>", special=True) == [2]
    assert len(built.encode("<|im_end|>")) > 1
    assert [built.token_bytes(id) for id in range(300)] == [original.token_bytes(id) for id in range(300)]


@pytest.mark.parametrize(("pre", "longest"), [("smollm", 1), ("gpt-2", 10), ("llama-bpe", 3)])
def test_each_known_split_cuts_digits_its_own_way(
    tmp_path: Path, tensors: dict[str, np.ndarray], pre: str, longest: int
) -> None:
    tokenizer = read_gguf(small_models.write_gguf(tmp_path / "m.gguf", SHAPE, tensors, pre=pre)).tokenizer
    pieces = [tokenizer.token_bytes(id) for id in tokenizer.encode("1234567890")]
    assert b"".join(pieces) == b"1234567890"
    assert max(len(piece) for piece in pieces) <= longest


def write(
    tmp_path: Path, tensors: dict[str, np.ndarray], shape: ModelConfig = SHAPE, **options: object
) -> Path:
    return small_models.write_gguf(tmp_path / "m.gguf", shape, tensors, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "kind", "named"),
    [
        ({"architecture": "gptneox"}, ConfigError, "architecture 'gptneox'"),
        ({"pre": "deepseek-coder"}, InputError, "deepseek-coder"),
        ({"extra": {"llama.rope.scaling.type": "longrope"}}, ConfigError, "longrope"),
        ({"extra": {"llama.attention.value_length": 32}}, ConfigError, "values wider than keys"),
        ({"extra": {"llama.attention.clamp_kqv": 8.0}}, ConfigError, "clamped"),
        (
            {"raw": {"rope_freqs.weight": (np.arange(32, dtype=np.float32) + 1, Kind.F32)}},
            ConfigError,
            "freqs",
        ),
        ({"raw": {"blk.0.extra.weight": (np.ones(256, np.float32), Kind.F32)}}, InputError, r"blk\.0\.extra"),
        ({"kind": Kind.TQ1_0}, InputError, "TQ1_0"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(
    tmp_path: Path,
    tensors: dict[str, np.ndarray],
    options: dict[str, object],
    kind: type[Exception],
    named: str,
) -> None:
    with pytest.raises(kind, match=named):
        read_gguf(write(tmp_path, tensors, **options))


def test_a_missing_tensor_is_named(tmp_path: Path, tensors: dict[str, np.ndarray]) -> None:
    fewer = {name: array for name, array in tensors.items() if "layers.1.mlp.up_proj" not in name}
    with pytest.raises(InputError, match=r"layers\.1\.mlp\.up_proj\.weight is missing"):
        read_gguf(write(tmp_path, fewer))
    none = {name: array for name, array in tensors.items() if "embed_tokens" not in name}
    with pytest.raises(InputError, match="token_embd"):
        read_gguf(write(tmp_path, none))


@pytest.mark.parametrize("kept", [0.0, 0.0001, 0.001, 0.01, 0.3, 0.9, 0.9999])
def test_a_cut_file_is_refused_with_its_name(
    tmp_path: Path, tensors: dict[str, np.ndarray], kept: float
) -> None:
    path = write(tmp_path, tensors)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * kept)])
    with pytest.raises(InputError, match=r"m\.gguf"):
        read_gguf(path)


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"PK\x03\x04" + bytes(1000))
    with pytest.raises(InputError, match="not a whole GGUF file"):
        read_gguf(path)
