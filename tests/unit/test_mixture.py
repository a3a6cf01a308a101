"""Windows of a mixture: each from one source, cut at documents, the same for any sharing among ranks."""

from __future__ import annotations

import tomllib
from collections import Counter
from typing import Any

import numpy as np
import pytest

from lapis import config
from lapis.data.document import Document
from lapis.data.loader import TokenLoader
from lapis.data.mixture import Segment
from lapis.data.recipe import MixtureConfig
from lapis.data.shards import Dataset, write_heldout, write_manifest, write_shard
from lapis.errors import ConfigError, InputError
from lapis.tokenizer.bpe import Tokenizer
from lapis.train.pretrain import Pretraining
from lapis.train.proof import expected
from lapis.train.recipe import Recipe
from tests.texts import prose

SOURCES = ("web", "code", "books.txt")
DOCUMENTS = [
    Document(prose(n, 20 + 7 * n % 40), SOURCES[n % 7 % 3], f"p{n}", "MIT", "prose", f"{n:032x}")
    for n in range(40)
]
TOKENIZER = Tokenizer.train([document.text for document in DOCUMENTS], 400)
BEFORE = (105, 339, 370, 357, 5, 318, 303, 344)  # the first step's windows
WEIGHTS = {"web": 0.5, "code": 0.3, "books.txt": 0.2}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    folder = tmp_path_factory.mktemp("dataset")
    cuts = [(0, 9), (9, 10), (10, 37)]
    shards = [write_shard(folder, n, DOCUMENTS[low:high], TOKENIZER) for n, (low, high) in enumerate(cuts)]
    write_manifest(folder, TOKENIZER, shards, write_heldout(folder, DOCUMENTS[37:]))
    return Dataset.open(folder)


def recipe(mixture: dict[str, Any] | None, **train: Any) -> Recipe:
    values = {
        "data": {"sources": [{"path": "x"}]} | ({} if mixture is None else {"mixture": mixture}),
        "model": {"name": "tiny"},
        "train": {"steps": 20, "sequence": 16, "batch": 8, **train},
    }
    return config.parse(values, Recipe)


def stream_of(source: str) -> list[int]:
    chosen = [one for one in DOCUMENTS[:37] if one.source == source]
    return [id for one in chosen for id in (0, *TOKENIZER.encode(one.text))]


def test_each_window_is_cut_from_the_documents_of_one_source(dataset: Dataset) -> None:
    loader = TokenLoader(
        dataset,
        sequence=16,
        batch=8,
        seed=2,
        segments=(Segment(0, WEIGHTS, dict.fromkeys(SOURCES, 1.0)),),
    )
    assert loader.mixed is not None
    found: dict[str, list[int]] = {name: [] for name in SOURCES}
    whole = {name: stream_of(name) for name in SOURCES}
    for place in range(loader.mixed.end or 0):
        (sample,) = loader.samples_at(place, 1)
        source, window = loader.mixed.at(place)
        batch = loader.windows([sample])
        start = window * 16
        assert batch.ids_T.tolist() == whole[source][start : start + 16]
        assert batch.targets_T.tolist() == whole[source][start + 1 : start + 17]
        edges = np.cumsum((0, *batch.lengths))[:-1].tolist()
        assert edges == sorted({0, *(n for n, id in enumerate(batch.ids_T.tolist()) if id == 0)})
        assert np.concatenate([dataset.read(*piece) for piece in loader.pieces(sample)]).tolist() == (
            batch.ids_T.tolist()
        )
        found[source].append(window)
    for name in SOURCES:  # once through each source: each of its windows once
        assert sorted(found[name]) == list(range((len(whole[name]) - 1) // 16))


@pytest.mark.parametrize("mixture", [None, {"weights": WEIGHTS}])
def test_ranks_and_micro_batches_share_one_order(dataset: Dataset, mixture: dict[str, Any] | None) -> None:
    alone = Pretraining(recipe(None).train, dataset, recipe(mixture).mixture)
    for step in (0, 7, 3):
        whole = alone.step(step, 0, 1)
        for ranks, micro in ((1, 2), (2, None), (2, 1), (4, 2), (8, 1)):
            section = recipe(None, micro_batch=micro).train if micro else recipe(None).train
            shared = Pretraining(section, dataset, recipe(mixture).mixture)
            parts = [shared.step(step, rank, ranks) for rank in range(ranks)]
            assert sum((part.samples for part in parts), ()) == whole.samples
            ids = np.concatenate([one.ids_T for part in parts for one in part.micros])
            assert np.array_equal(ids, whole.micros[0].ids_T)


def test_without_a_mixture_the_order_is_the_one_of_before(dataset: Dataset) -> None:
    """The order that runs were trained in before there were mixtures, written down."""
    loader = TokenLoader(dataset, sequence=16, batch=8, seed=0)
    assert loader.samples_at(0, 8) == BEFORE
    later = TokenLoader(dataset, sequence=16, batch=8, seed=0, segments=(Segment(2, WEIGHTS, {}),))
    assert later.samples_at(0, 16) == loader.samples_at(0, 16)
    assert min(later.samples_at(16, 64)) >= loader.samples


def test_a_curriculum_changes_what_is_drawn(dataset: Dataset) -> None:
    only = [{"web": 1.0, "code": 0, "books.txt": 0}, {"web": 0, "code": 1.0, "books.txt": 0}]
    stages = [{"weights": only[0], "share": 0.5}, {"weights": only[1], "share": 0.5}]
    mixed = Pretraining(recipe(None).train, dataset, recipe({"segments": stages}).mixture).loader.mixed
    assert mixed is not None
    drawn = Counter((place // 8 < 10, mixed.at(place).source) for place in range(20 * 8))
    assert drawn == {(True, "web"): 80, (False, "code"): 80}


@pytest.mark.parametrize(
    ("mixture", "said"),
    [
        ({"weights": {"web": 1.0, "code": 1.0}}, "does not name the source 'books.txt'"),
        ({"weights": WEIGHTS | {"wbe": 1.0}}, "'wbe', but the dataset has no text of it. Did you mean 'web'"),
        ({"weights": WEIGHTS, "epochs": {"web": 0.001}}, "less than one window"),
    ],
)
def test_a_mixture_that_does_not_fit_the_data_is_refused(
    mixture: dict[str, Any], said: str, dataset: Dataset
) -> None:
    with pytest.raises(ConfigError, match=said):
        Pretraining(recipe(None).train, dataset, recipe(mixture).mixture)
    Pretraining(recipe(None).train, dataset, recipe({"weights": WEIGHTS | {"gone": 0}}).mixture)


@pytest.mark.parametrize(
    ("mixture", "said"),
    [
        ({}, "exactly one of data.mixture.weights"),
        ({"weights": {"a": 0.0}}, "needs a weight above 0"),
        ({"weights": {"a": 1.0, "b": 1e-6}}, "the weight of 'b' is less than"),
        ({"segments": [{"weights": {"a": 1.0}, "share": 0.5}]}, "together 1"),
        ({"segments": [{"weights": {"a": 1.0}, "tokens": 5}]}, "each but the last has tokens"),
    ],
)
def test_a_mixture_that_means_nothing_is_refused(mixture: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        recipe(mixture)


def test_shares_need_a_run_of_known_length(dataset: Dataset) -> None:
    stages = [{"weights": WEIGHTS, "share": 0.5}, {"weights": WEIGHTS, "share": 0.5}]
    with pytest.raises(ConfigError, match="does not know its steps"):
        Pretraining(
            recipe(None, steps=None, minutes=1.0).train, dataset, recipe({"segments": stages}).mixture
        )


def test_text_that_runs_out_is_said_with_its_step(dataset: Dataset) -> None:
    mixture = recipe({"weights": WEIGHTS, "epochs": dict.fromkeys(SOURCES, 0.5)}).mixture
    objective = Pretraining(recipe(None).train, dataset, mixture)
    assert objective.loader.mixed is not None
    last = (objective.loader.mixed.end or 0) // 8
    objective.step(last - 1, 0, 1)
    with pytest.raises(InputError, match=f"ends at step {last}"):
        objective.step(last, 0, 1)


def test_a_recipe_with_a_mixture_is_read_back_and_is_the_same_run() -> None:
    mixed = recipe({"weights": WEIGHTS, "epochs": {"books.txt": 2.0}})
    assert config.parse(tomllib.loads(config.to_toml(mixed)), Recipe) == mixed
    assert mixed.digest() == recipe(None).digest()
    stages = [{"weights": WEIGHTS, "share": 0.5}, {"weights": {"books.txt": 1.0}, "share": 0.5}]
    curriculum = recipe({"segments": stages})
    assert config.parse(tomllib.loads(config.to_toml(curriculum)), Recipe) == curriculum
    assert isinstance(curriculum.mixture, MixtureConfig)


def test_a_segment_takes_back_proofs_of_steps_after_it() -> None:
    events = [
        {"event": "proof", "checkpoint": 8, "step": 8, "loss": "0x1p0"},
        {"event": "proof", "checkpoint": 8, "step": 9, "loss": "0x1p1"},
    ]
    segment = {"event": "segment", "from_step": 9}
    assert set(expected(events, 8)) == {8, 9}
    assert set(expected([*events, segment], 8)) == {8}
    assert set(expected([*events, segment, events[1]], 8)) == {8, 9}
