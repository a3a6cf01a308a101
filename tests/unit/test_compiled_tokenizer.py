"""The compiled tokenizer gives what Hugging Face `tokenizers` gives, or leaves the work to it."""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tokenizers import AddedToken, Regex, models, normalizers, trainers
from tokenizers import Tokenizer as HFTokenizer
from tokenizers import pre_tokenizers as steps

from lapis.errors import InputError
from lapis.tokenizer import compiled, split, unicode_classes
from lapis.tokenizer.bpe import SPECIALS, Tokenizer
from lapis.tokenizer.split import QWEN_SPLIT, SPLIT, Splitter, compiled_split
from lapis.tokenizer.words import WordEncoder
from tests.texts import prose, real_texts

BYTES = steps.ByteLevel(add_prefix_space=False, use_regex=False)
GPT2 = steps.ByteLevel(add_prefix_space=False, use_regex=True)
WAYS: dict[str, Callable[[], steps.PreTokenizer]] = {
    "llama3": lambda: steps.Sequence([steps.Split(Regex(SPLIT), "isolated"), BYTES]),
    "qwen": lambda: steps.Sequence([steps.Split(Regex(QWEN_SPLIT), "isolated"), BYTES]),
    "gpt2": lambda: GPT2,
    "smollm": lambda: steps.Sequence([steps.Digits(individual_digits=True), GPT2]),
}
SPLITTERS = {
    "llama3": Splitter(split.LLAMA3, 3),
    "qwen": Splitter(split.LLAMA3, 1),
    "gpt2": Splitter(split.GPT2),
    "smollm": Splitter(split.GPT2, digits=True),
}
TEXTS = [prose(n) for n in range(30)]
ODD = [
    "",
    "\0 a\0\0b",
    "it's WE'LL they'Re 'ſ 'T'",
    "  \n\n \t\r\n x\u2003\u00a0 y  ",
    "e\u0301\u0323 zalgo\u0336\u0335 \u200d👩\u200d👩\u200d👧🏽 \ufeff",
    "١٢٣٤٥ Ⅷ½ 12345678 3.14 \U0001d7d9\U0001d7da",
    "नमस्ते 東京タワー привет Ǆ ꙮ \U00016ff4 \U000e0041 \U0010fffd",
    "a" * 900 + " " * 900 + "\n" * 90 + "=" * 900 + "é" * 400,
    "x" * 49 + " " + "abc" * 100 + " " + "-" * 257,
    "<|endoftext|><|im_start|>",
]


def trained(way: str, size: int = 700) -> HFTokenizer:
    """A tokenizer by `tokenizers` alone."""
    inner = HFTokenizer(models.BPE())
    inner.pre_tokenizer = WAYS[way]()
    inner.decoder = Tokenizer.train([], 259)._inner.decoder
    specials = [AddedToken(name, special=True, normalized=False) for name in SPECIALS]
    alphabet = steps.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    inner.train_from_iterator([*TEXTS, *ODD], trainer)
    return inner


def plain_ids(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    return [tokenizer.encode(text) for text in texts]


@pytest.mark.parametrize("way", WAYS)
def test_ids_are_those_of_tokenizers(way: str) -> None:
    inner = trained(way)
    assert WordEncoder.of(inner) is not None
    tokenizer = Tokenizer(inner)
    texts = [*ODD, *TEXTS]
    expected = plain_ids(tokenizer, texts)
    assert tokenizer.encode_batch(texts) == expected
    assert tokenizer.encode_batch(texts) == expected  # all words remembered now


def test_real_documents_have_the_ids_of_tokenizers() -> None:
    texts = real_texts(60)
    tokenizer = Tokenizer.train(texts[:20], 4_096)
    assert tokenizer.encode_batch(texts) == plain_ids(tokenizer, texts)


@pytest.mark.parametrize("way", WAYS)
def test_words_are_cut_where_tokenizers_cuts(way: str) -> None:
    random_texts = [
        "".join(random.Random(n).choices("aZ é9٣ \n\r\t'sſ.=ß東\u0301\u2003", k=40)) for n in range(60)
    ]
    judge = steps.Split(Regex(QWEN_SPLIT if way == "qwen" else SPLIT), "isolated")
    for text in [*ODD, *random_texts]:
        found = SPLITTERS[way].split(text)
        if way in ("llama3", "qwen"):
            assert found == [text[low:high] for _, (low, high) in judge.pre_tokenize_str(text)]
        else:
            expected = [text[low:high] for _, (low, high) in WAYS[way]().pre_tokenize_str(text)]
            assert found == expected


def test_a_normalizer_and_whole_words_are_followed() -> None:
    facts = json.loads(trained("qwen").to_str())
    facts["normalizer"] = {"type": "NFC"}
    facts["model"]["ignore_merges"] = True
    entry = next(
        name for name in facts["model"]["vocab"] if len(name) > 4 and name.isalpha() and name.isascii()
    )
    facts["model"]["merges"] = [pair for pair in facts["model"]["merges"] if "".join(pair) != entry]
    tokenizer = Tokenizer(HFTokenizer.from_str(json.dumps(facts)))
    assert tokenizer._words is not None
    word = entry.replace("Ġ", " ")
    texts = [*ODD, *TEXTS, word, word + "s", "Cafe\u0301 \u212b \u1100\u1161\u11a8"]
    assert tokenizer.encode_batch(texts) == plain_ids(tokenizer, texts)
    assert tokenizer.encode_batch([word]) == [[facts["model"]["vocab"][entry]]]


def test_added_tokens_that_are_no_special_ones_are_found_in_text() -> None:
    inner = trained("llama3")
    inner.add_tokens([AddedToken("lo wo", normalized=False), AddedToken("<tool>", normalized=True)])
    tokenizer = Tokenizer(inner)
    texts = ["hello world", "plain", *TEXTS[:3], "a <tool> b", "plain again"]
    assert tokenizer._words is not None
    assert tokenizer.encode_batch(texts) == plain_ids(tokenizer, texts)
    assert tokenizer.token_id("<tool>") in tokenizer.encode_batch(texts)[5]
    ids, ends = tokenizer.encode_stream(texts)
    assert np.split(ids, ends)[1].tolist() == [tokenizer.end_id, *tokenizer.encode("plain")]


@pytest.mark.parametrize("change", ["lower case", "another pattern", "a missing byte", "dropout"])
def test_what_is_not_known_to_be_equal_is_left_to_tokenizers(change: str) -> None:
    facts = json.loads(trained("llama3").to_str())
    if change == "another pattern":
        facts["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\p{L}+|\P{L}"
    elif change == "a missing byte":
        facts["model"]["vocab"]["\ue000"] = facts["model"]["vocab"].pop("ÿ")
    elif change == "dropout":
        facts["model"]["dropout"] = 0.0
    inner = HFTokenizer.from_str(json.dumps(facts))
    if change == "lower case":
        inner.normalizer = normalizers.Lowercase()
    assert WordEncoder.of(inner) is None
    tokenizer = Tokenizer(inner)
    assert tokenizer.encode_batch(TEXTS) == plain_ids(tokenizer, TEXTS)


def test_training_learns_the_merges_of_tokenizers() -> None:
    for size in (300, 700, 20_000):  # the last one until no pair is left
        assert Tokenizer.train([*TEXTS, *ODD], size).to_json() == Tokenizer(trained("llama3", size)).to_json()


def test_without_compiled_code_tokenizers_does_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    fast = Tokenizer.train([*TEXTS, *ODD], 700)
    expected, stream = fast.encode_batch(ODD), fast.encode_stream(TEXTS)
    monkeypatch.setattr(split, "library", lambda: None)
    slow = Tokenizer.train([*TEXTS, *ODD], 700)
    assert slow._words is None
    assert slow.to_json() == fast.to_json()
    assert slow.encode_batch(ODD) == expected
    assert all(np.array_equal(a, b) for a, b in zip(slow.encode_stream(TEXTS), stream, strict=True))
    with pytest.raises(InputError, match="surrogate"):
        slow.encode_batch(["x\ud800"])


def test_a_library_of_other_sources_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "source_digest", lambda: "another")
    assert compiled.library.__wrapped__() is None
    monkeypatch.setattr(compiled, "LIBRARY", Path("absent.so"))
    assert compiled.library.__wrapped__() is None


def test_other_classes_of_characters_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert unicode_classes.agree.__wrapped__()
    changed = unicode_classes.classes().copy()
    changed[0x1E900:0x1E910] = 0  # a script taken away
    monkeypatch.setattr(unicode_classes, "classes", lambda: changed)
    assert not unicode_classes.agree.__wrapped__()
    monkeypatch.setattr(split, "agree", lambda: False)
    assert compiled_split(json.loads(trained("gpt2").to_str())["pre_tokenizer"]) is None


def test_half_a_surrogate_pair_is_refused_in_a_batch_and_in_training() -> None:
    for work in (
        lambda: Tokenizer.train(["x\ud800"], 300),
        lambda: Tokenizer.train([], 259).encode_batch(["\udfff"]),
    ):
        with pytest.raises(InputError, match="surrogate"):
            work()


def test_threads_share_one_tokenizer() -> None:
    tokenizer = Tokenizer.train(TEXTS, 500)
    expected = plain_ids(tokenizer, TEXTS)
    found: list[list[list[int]]] = []
    threads = [threading.Thread(target=lambda: found.append(tokenizer.encode_batch(TEXTS))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [expected] * 4


@pytest.mark.long
def test_more_words_than_are_remembered() -> None:
    tokenizer = Tokenizer.train(TEXTS, 500)
    texts = [
        " ".join(f"{n * 7919:x}q" * 2 for n in range(low, low + 1_000)) for low in range(0, 1_300_000, 1_000)
    ]
    ids, ends = tokenizer.encode_stream(texts)
    again = [tokenizer.encode(text) for text in texts[::100]]
    assert [row[1:].tolist() for row in np.split(ids, ends)[:-1:100]] == again


@pytest.mark.long
def test_every_character_is_classed_and_cut_as_tokenizers_does() -> None:
    points = np.array([*range(0xD800), *range(0xE000, unicode_classes.CODE_POINTS)])
    for bit in (unicode_classes.LETTER, unicode_classes.NUMBER, unicode_classes.SPACE, unicode_classes.DIGIT):
        expected = (unicode_classes.classes()[points] & bit) != 0
        assert np.array_equal(unicode_classes.judged(points, bit), expected)
    for way, splitter in SPLITTERS.items():
        for start in range(0, 0x32000, 0x2000):  # beyond are no letters, numbers or spaces
            chars = [chr(n) for n in range(start, start + 0x2000) if not 0xD800 <= n < 0xE000]
            text = "".join(f" {c}'{c}a {c} {c}\n{c}1{c}2'l{c}'r{c}{c}\r{c}" for c in chars)
            judge = WAYS[way]() if way in ("gpt2", "smollm") else WAYS[way]()[0]
            assert splitter.split(text) == [text[low:high] for _, (low, high) in judge.pre_tokenize_str(text)]


@pytest.mark.long
@pytest.mark.parametrize("size", [8_192, 32_768])
def test_every_document_of_real_text_has_the_ids_of_tokenizers(size: int) -> None:
    texts = real_texts(None)
    tokenizer = Tokenizer.train(texts[::3], size)
    for first in range(0, len(texts), 500):
        some = texts[first : first + 500]
        judged = tokenizer._inner.encode_batch_fast(some, add_special_tokens=False)
        assert tokenizer.encode_batch(some) == [encoding.ids for encoding in judged]
