"""Any Unicode text survives the tokenizer, whole or as a stream."""

from __future__ import annotations

from functools import cache

from hypothesis import given
from hypothesis import strategies as st

from lapis.tokenizer.bpe import TextStream, Tokenizer
from tests.texts import prose


@cache
def trained() -> Tokenizer:
    return Tokenizer.train([prose(n) for n in range(20)], 500)


@given(st.text(st.characters(exclude_categories=("Cs",))))
def test_decode_is_the_inverse_of_encode(text: str) -> None:
    assert trained().decode(trained().encode(text)) == text


@given(st.text(st.characters(exclude_categories=("Cs",))))
def test_a_stream_gives_the_same_text_in_whole_characters(text: str) -> None:
    stream = TextStream(trained())
    pieces = [stream.push(id) for id in trained().encode(text)]
    assert "".join(pieces) + stream.finish() == text


@given(st.lists(st.integers(0, 499), max_size=30))
def test_a_stream_of_any_ids_is_valid_text_and_equals_decoding_at_once(ids: list[int]) -> None:
    stream = TextStream(trained())
    pieces = [stream.push(id) for id in ids] + [stream.finish()]
    assert all(piece.encode("utf-8").decode("utf-8") == piece for piece in pieces)
    assert "".join(pieces) == trained().decode(ids)


WORDS = [
    "it's",
    "WE'LL",
    "x_1",
    " 12345",
    "naïve",
    "東京",
    "  ",
    "\n\n",
    "\r\n",
    "\t",
    "...\n",
    "'s",
    "a.b()",
]
WORDS += ["\x1c", "\x0b", "²"]


@given(st.lists(st.sampled_from(WORDS) | st.text(st.characters(exclude_categories=("Cs",)), max_size=3)))
def test_the_fast_encoder_gives_the_ids_of_the_plain_one(pieces: list[str]) -> None:
    text = "".join(pieces)
    assert trained().encode_batch([text]) == [trained().encode(text)]


@given(st.text(st.characters(max_codepoint=127)))
def test_the_fast_encoder_is_exact_on_any_ascii(text: str) -> None:
    assert trained().encode_batch([text]) == [trained().encode(text)]
