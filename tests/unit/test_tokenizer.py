"""The tokenizer: trained the same every time, exact both ways, honest about what it is not."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from tokenizers import AddedToken, decoders, models
from tokenizers import Tokenizer as HFTokenizer

from lapis.errors import InputError
from lapis.tokenizer.bpe import END, TURN_END, TURN_START, TextStream, Tokenizer
from tests.texts import prose

TEXTS = [prose(n) for n in range(40)]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(TEXTS, 600)


def test_training_gives_the_same_vocabulary_for_any_order_of_the_texts(tokenizer: Tokenizer) -> None:
    shuffled = random.Random(3).sample(TEXTS, len(TEXTS))
    assert Tokenizer.train(shuffled, 600).to_json() == tokenizer.to_json()
    assert Tokenizer.train(TEXTS[1:], 600).digest != tokenizer.digest


def test_special_tokens_come_first_and_end_a_document_or_a_turn(tokenizer: Tokenizer) -> None:
    assert [tokenizer.token_id(name) for name in (END, TURN_START, TURN_END)] == [0, 1, 2]
    assert tokenizer.end_id == 0
    assert tokenizer.stop_ids == {0, 2}
    assert tokenizer.vocab_size == 600


def test_special_text_is_plain_text_unless_asked_for(tokenizer: Tokenizer) -> None:
    text = f"a{TURN_END}b"
    plain, special = tokenizer.encode(text), tokenizer.encode(text, special=True)
    assert 2 not in plain
    assert tokenizer.decode(plain) == text
    assert special.count(2) == 1
    assert tokenizer.decode(special) == "ab"
    assert tokenizer.decode(special, special=True) == text


def test_a_batch_gives_the_ids_of_its_texts(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode_batch(TEXTS) == [tokenizer.encode(text) for text in TEXTS]


def test_a_saved_tokenizer_is_the_same_one(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "tokenizer.json")
    loaded = Tokenizer.load(tmp_path / "tokenizer.json")
    assert loaded.digest == tokenizer.digest
    assert loaded.encode(TEXTS[0]) == tokenizer.encode(TEXTS[0])


def test_the_bytes_of_the_tokens_make_up_the_text(tokenizer: Tokenizer) -> None:
    text = "naïve 東京 😀\tx\n\n  y"
    assert b"".join(map(tokenizer.token_bytes, tokenizer.encode(text))) == text.encode()
    with pytest.raises(InputError, match="not in the vocabulary of 600"):
        tokenizer.token_bytes(600)


def test_a_stream_holds_back_half_a_character(tokenizer: Tokenizer) -> None:
    stream = TextStream(tokenizer)
    given = [stream.push(id) for id in tokenizer.encode("東")]
    assert given == ["", "", "東"]
    assert stream.push(tokenizer.encode("東")[0]) == ""
    assert stream.push(tokenizer.end_id) == ""
    assert stream.finish() == "\ufffd"


def test_a_vocabulary_below_the_bytes_is_refused() -> None:
    with pytest.raises(InputError, match="need 259"):
        Tokenizer.train(TEXTS, 258)


def test_no_text_at_all_still_gives_the_bytes() -> None:
    tokenizer = Tokenizer.train([], 1000)
    assert tokenizer.vocab_size == 259
    assert tokenizer.decode(tokenizer.encode("any ünicode")) == "any ünicode"


@pytest.mark.parametrize("content", [b"{}", b"not json", b"\xff\xfe\x00"])
def test_a_file_that_is_no_tokenizer_is_refused_by_name(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"tokenizer\.json"):
        Tokenizer.load(path)
    with pytest.raises(InputError, match="No such file"):
        Tokenizer.load(tmp_path / "absent.json")


def test_half_a_surrogate_pair_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match="surrogate"):
        tokenizer.encode("x\ud800")


def _sentencepiece_like() -> HFTokenizer:
    bytes_ = {f"<0x{byte:02X}>": 1 + byte for byte in range(256)}
    vocabulary = {"<unk>": 0, **bytes_, "▁hi": 257, "▁": 258, "a": 259}
    inner = HFTokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    inner.add_special_tokens([AddedToken("</s>", special=True)])
    return inner


def test_tokens_of_the_sentencepiece_kind_have_bytes_too() -> None:
    tokenizer = Tokenizer(_sentencepiece_like())
    assert tokenizer.token_bytes(257) == b" hi"
    assert tokenizer.token_bytes(1 + 0xE6) == b"\xe6"
    assert tokenizer.end_id == 260
    assert tokenizer.decode([257, 1 + 0xC3, 1 + 0xA9, 260]) == " hié"


def test_a_tokenizer_without_an_end_token_is_refused_unless_it_is_named() -> None:
    inner = HFTokenizer(models.BPE({"a": 0, "[stop]": 1}, []))
    with pytest.raises(InputError, match="no token that ends a document"):
        Tokenizer(inner)
    assert Tokenizer(inner, end="[stop]").end_id == 1
