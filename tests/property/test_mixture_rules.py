"""The order of a mixture: weights exact, each window once an epoch, segments that leave what came before."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction

from hypothesis import given, settings
from hypothesis import strategies as st

from lapis.data.mixture import Drawn, MixedOrder, Segment, changed, segments_of
from lapis.data.order import index_of, sample_at
from lapis.data.recipe import MixtureConfig
from lapis.hashing import digest_json

NAMES = ("code", "prose", "talk", "web")

weights = st.lists(st.sampled_from([0.0, 0.05, 0.1, 0.25, 1 / 3, 0.7, 2.0]), min_size=4, max_size=4).filter(
    any
)
windows = st.lists(st.integers(1, 60), min_size=4, max_size=4)


def named(values: list[float]) -> dict[str, float]:
    return dict(zip(NAMES, values, strict=True))


def order(
    sizes: list[int], *segments: tuple[int, list[float], dict[str, float]], seed: int = 3, batch: int = 4
) -> MixedOrder:
    chosen = [Segment(step, named(values), epochs) for step, values, epochs in segments]
    return MixedOrder(dict(zip(NAMES, sizes, strict=True)), chosen, batch=batch, seed=seed)


@given(st.integers(1, 2**40), st.integers(0, 2**60), st.integers(0, 4), st.data())
def test_the_inverse_finds_the_index_of_a_sample(
    samples: int, seed: int, epoch: int, data: st.DataObject
) -> None:
    index = epoch * samples + data.draw(st.integers(0, samples - 1))
    assert index_of(sample_at(index, samples, seed), epoch, samples, seed) == index


@given(weights, windows, st.integers(0, 2**32))
@settings(max_examples=60)
def test_every_prefix_follows_the_weights(values: list[float], sizes: list[int], seed: int) -> None:
    mixed = order(sizes, (0, values, {}), seed=seed)
    total = sum(Fraction(str(value)) for value in values)
    least = min(Fraction(str(value)) for value in values if value)
    block = -(-total // least)
    counts: Counter[str] = Counter()
    for place in range(300):
        for name, value in named(values).items():
            off = abs(counts[name] - place * Fraction(str(value)) / total)
            inside = min(place % block, block - place % block)
            assert off < 1 + inside  # less than 1 at a block's end
        assert mixed.consumed(place) == {name: counts[name] for name in NAMES}
        counts[mixed.at(place).source] += 1


@given(weights, windows, st.integers(0, 2**32))
@settings(max_examples=40)
def test_each_epoch_of_a_source_has_each_window_once(
    values: list[float], sizes: list[int], seed: int
) -> None:
    mixed = order(sizes, (0, values, {}), (20, values[::-1], {}), seed=seed)
    seen: dict[str, list[int]] = {name: [] for name in NAMES}
    for place in range(400):
        drawn = mixed.at(place)
        seen[drawn.source].append(drawn.window)
    for name, size in zip(NAMES, sizes, strict=True):
        for start in range(0, len(seen[name]), size):
            epoch = seen[name][start : start + size]
            assert len(set(epoch)) == len(epoch)


@given(weights, windows, st.integers(0, 2**32), st.integers(0, 10**15))
@settings(max_examples=40)
def test_any_place_is_had_without_those_before_it(
    values: list[float], sizes: list[int], seed: int, place: int
) -> None:
    whole = order(sizes, (0, values, {}), seed=seed)
    forward = [whole.at(n) for n in range(40)]
    for n in (39, 0, 17, 4):
        assert order(sizes, (0, values, {}), seed=seed).at(n) == forward[n]
    drawn = order(sizes, (0, values, {}), seed=seed).at(place)
    assert values[NAMES.index(drawn.source)] > 0


@given(weights, weights, windows, st.integers(0, 60))
@settings(max_examples=40)
def test_a_new_segment_leaves_what_came_before_it(
    old: list[float], new: list[float], sizes: list[int], step: int
) -> None:
    before, after = order(sizes, (0, old, {})), order(sizes, (0, old, {}), (step, new, {}))
    if step == 0:
        after = order(sizes, (0, new, {}))
    assert [after.at(n) for n in range(step * 4)] == [before.at(n) for n in range(step * 4)]
    assert all(named(new)[after.at(n).source] > 0 for n in range(step * 4, step * 4 + 30))


@given(weights, windows, st.integers(0, 2**32))
@settings(max_examples=40)
def test_first_use_is_where_a_search_finds_it(values: list[float], sizes: list[int], seed: int) -> None:
    mixed = order(sizes, (0, values, {}), (30, values[::-1], {}), seed=seed)
    places: dict[Drawn, int] = {}
    for place in range(500):
        places.setdefault(mixed.at(place), place)
    for name, size in zip(NAMES, sizes, strict=True):
        for chosen in ({0}, {size - 1}, set(range(size // 2, size))):
            expected = min(places.get(Drawn(name, n), 10**9) for n in chosen)
            found = mixed.first_use(name, chosen)
            assert found == expected or (expected == 10**9 and (found is None or found >= 500))


@given(
    weights,
    windows,
    st.integers(0, 2**32),
    st.lists(st.sampled_from([0.5, 1.0, 2.5]), min_size=4, max_size=4),
)
@settings(max_examples=60)
def test_no_source_comes_more_often_than_it_may(
    values: list[float], sizes: list[int], seed: int, most: list[float]
) -> None:
    sizes = [2 * size for size in sizes]  # so that each may come at least once
    mixed = order(sizes, (0, values, named(most)), seed=seed)
    assert mixed.end is not None
    counts = Counter(mixed.at(place).source for place in range(mixed.end))
    for name, value, size, limit in zip(NAMES, values, sizes, most, strict=True):
        assert counts[name] == (int(limit * size) if value else 0)  # all that is allowed has come at the end
    assert mixed.consumed(mixed.end + 100) == {name: counts[name] for name in NAMES}


def test_segments_of_a_curriculum_begin_at_whole_steps() -> None:
    shares = MixtureConfig.model_validate(
        {"segments": ({"weights": {"a": 1}, "share": 0.75}, {"weights": {"b": 1}, "share": 0.25})}
    )
    found = segments_of(shares, steps=1000, step_tokens=512)
    assert [(one.from_step, dict(one.weights)) for one in found] == [(0, {"a": 1.0}), (750, {"b": 1.0})]
    counts = MixtureConfig.model_validate(
        {"segments": ({"weights": {"a": 1}, "tokens": 5120}, {"weights": {"b": 1}})}
    )
    assert [one.from_step for one in segments_of(counts, steps=None, step_tokens=512)] == [0, 10]


def test_another_curriculum_takes_over_in_its_middle() -> None:
    def at(step: int, name: str) -> Segment:
        return Segment(step, {name: 1.0}, {})

    old, new = (at(0, "a"), at(100, "b")), (at(0, "c"), at(50, "d"), at(90, "e"))
    assert changed(old, new, 60) == (at(0, "a"), at(60, "d"), at(90, "e"))
    assert changed(old, new, 0) == new
    assert changed((), new, 95) == (at(95, "e"),)


def test_the_order_of_a_mixture_is_the_one_that_runs_were_trained_in() -> None:
    """Written down: a run that goes on with another version of the code must find its order again."""
    first = Segment(0, {"web": 0.6, "code": 0.3, "talk": 0.1}, {"talk": 3.0})
    second = Segment(9, {"web": 1.0, "code": 3.0, "talk": 0.5}, {})
    mixed = MixedOrder({"web": 40, "code": 7, "talk": 1}, (first, second), batch=4, seed=5)
    drawn = [mixed.at(place) for place in range(600)]
    assert [f"{one.source[0]}{one.window}" for one in drawn[:12]] == (
        ["c3", "c2", "w13", "w23", "w22", "w7", "w3", "w0", "c0", "t0", "w32", "w24"]
    )
    assert digest_json([list(one) for one in drawn]).startswith("fee82c56c348e253")
    assert (mixed.at(10**9), mixed.at(10**9 + 7)) == (Drawn("code", 3), Drawn("code", 5))
