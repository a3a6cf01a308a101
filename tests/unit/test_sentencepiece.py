"""Tokenizers of Llama 2's kind: SentencePiece's pieces and scores in a GGUF file, spaces as ▁, single bytes."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lapis.errors import InputError
from lapis.model.gguf_tokenizer import BuiltTokenizer, build_tokenizer
from lapis.tokenizer.bpe import TextStream, Tokenizer

PIECES = ["▁", "h", "e", "l", "o", "w", "r", "d", "▁h", "he", "▁he", "ll", "▁hell", "▁hello", "or", "▁wor"]
TOKENS = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *PIECES, "ö"]
TYPES = [2, 3, 3, *[6] * 256, *[1] * (len(PIECES) + 1)]
METADATA = {
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.tokens": TOKENS,
    "tokenizer.ggml.token_type": TYPES,
    "tokenizer.ggml.scores": [0.0] * 259 + [-float(rank) for rank in range(len(PIECES) + 1)],
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
}


@pytest.fixture(scope="module")
def built() -> BuiltTokenizer:
    return build_tokenizer(METADATA, "test")


def judge(text: str) -> list[int]:
    """SentencePiece's way, slowly: merge the adjacent pair whose piece has the best score, then fall to bytes."""
    score = {piece: -rank for rank, piece in enumerate(PIECES)}
    pieces = list(("▁" + text if text else "").replace(" ", "▁"))
    while True:
        joined = [a + b for a, b in zip(pieces, pieces[1:], strict=False)]
        known = [(score[piece], -at) for at, piece in enumerate(joined) if piece in score]
        if not known:
            break
        at = -max(known)[1]
        pieces[at : at + 2] = [joined[at]]
    ids = []
    for piece in pieces:
        ids += [TOKENS.index(piece)] if piece in TOKENS[259:] else [3 + byte for byte in piece.encode()]
    return ids


@given(st.text(alphabet="helowrd ö東\n", max_size=20))
def test_texts_are_cut_as_sentencepiece_cuts_them_and_come_back(text: str) -> None:
    tokenizer = build_tokenizer(METADATA, "test").tokenizer
    ids = tokenizer.encode(text)
    assert ids == judge(text)
    assert tokenizer.decode(ids) == text


def test_a_stream_gives_whole_characters_and_keeps_the_space_before_a_word(built: BuiltTokenizer) -> None:
    ids = built.tokenizer.encode("hello 東京 wörld")
    stream = TextStream(built.tokenizer)
    parts = [stream.push(id) for id in [*ids, 2]]
    assert "".join(parts) + stream.finish() == " hello 東京 wörld"
    assert "�" not in "".join(parts)
    assert built.tokenizer.token_bytes(3 + 0xE6) == b"\xe6"


def test_prompts_start_with_bos_and_end_at_eos(built: BuiltTokenizer) -> None:
    assert (built.add_bos, built.bos_id, built.stop_ids) == (True, 1, (2,))
    assert built.tokenizer.encode("</s>") != [2]
    assert built.tokenizer.encode("</s>", special=True) == [2]


def test_it_survives_the_way_through_a_file(built: BuiltTokenizer, tmp_path: Path) -> None:
    built.tokenizer.save(tmp_path / "tokenizer.json")
    again = Tokenizer.load(tmp_path / "tokenizer.json")
    assert again.encode("hello wörld") == built.tokenizer.encode("hello wörld")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"tokenizer.ggml.scores": [0.0]}, "scores"),
        ({"tokenizer.ggml.model": "t5"}, "t5"),
        ({"tokenizer.ggml.tokens": TOKENS[:200], "tokenizer.ggml.scores": [0.0] * 200}, "token_type"),
    ],
)
def test_what_cannot_be_rebuilt_is_refused(change: dict[str, object], named: str) -> None:
    with pytest.raises(InputError, match=named):
        build_tokenizer({**METADATA, **change}, "test")
