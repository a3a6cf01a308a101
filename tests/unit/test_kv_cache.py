"""What a user of the KV cache counts on; random use is in tests/property."""

from __future__ import annotations

import pytest

from lapis.inference.kv_cache import PAGE, KVCache, pages_for

PROMPT = [1] * PAGE + [2] * PAGE + [3] * 5


def filled(cache: KVCache, owner: int, ids: list[int], salt: bytes = b"tenant") -> int | None:
    cached = cache.open(owner, salt, ids)
    if cached is not None:
        cache.publish(owner, ids, len(ids))
    return cached


def test_an_equal_beginning_is_shared_while_it_is_owned_and_after() -> None:
    cache = KVCache(8)
    assert filled(cache, 1, PROMPT) == 0
    assert filled(cache, 2, PROMPT) == 2 * PAGE
    assert cache.table(1)[:2] == cache.table(2)[:2]
    assert cache.used == 4
    cache.close(1)
    cache.close(2)
    assert (cache.used, cache.cached) == (0, 2)
    assert filled(cache, 3, PROMPT[:PAGE] + [9] * PAGE) == PAGE
    cache.check()


def test_the_last_token_is_always_computed() -> None:
    cache = KVCache(8)
    filled(cache, 1, PROMPT[: 2 * PAGE])
    cache.close(1)
    assert filled(cache, 2, PROMPT[: 2 * PAGE]) == PAGE


def test_pages_of_a_completion_are_reused_too() -> None:
    cache = KVCache(8)
    cache.open(1, b"tenant", PROMPT)
    for computed in range(len(PROMPT), 4 * PAGE):
        assert cache.grow(1, computed)
        cache.publish(1, (PROMPT + [4] * 4 * PAGE)[:computed], computed)
    cache.close(1)
    assert cache.open(2, b"tenant", (PROMPT + [4] * 4 * PAGE)[: 3 * PAGE + 1]) == 3 * PAGE


def test_another_salt_shares_nothing() -> None:
    cache = KVCache(8)
    filled(cache, 1, PROMPT, b"one")
    assert filled(cache, 2, PROMPT, b"two") == 0


def test_what_is_not_computed_yet_is_not_shared() -> None:
    cache = KVCache(8)
    cache.open(1, b"tenant", PROMPT)
    cache.publish(1, PROMPT, PAGE + 3)
    assert cache.open(2, b"tenant", PROMPT) == PAGE


def test_the_least_recently_used_prefix_goes_first_and_from_its_end() -> None:
    cache = KVCache(4)
    filled(cache, 1, [1] * 2 * PAGE)
    cache.close(1)
    filled(cache, 2, [2] * 2 * PAGE)
    cache.close(2)
    filled(cache, 3, [3] * PAGE)
    cache.close(3)
    assert cache.evicted == 1
    assert cache.open(4, b"tenant", [1] * 2 * PAGE) == PAGE  # only its second page was taken
    cache.check()


def test_prefixes_are_kept_in_few_pages_and_what_runs_may_take_all() -> None:
    cache = KVCache(100, kept=6)
    for owner in range(20):
        filled(cache, owner, [owner] * 2 * PAGE)
        cache.close(owner)
    assert (cache.touched, cache.cached) == (6, 6)
    assert filled(cache, 20, [19] * 3 * PAGE) == 2 * PAGE  # the latest are still there
    assert filled(cache, 21, [21] * 90 * PAGE) == 0
    assert cache.touched == cache.used == 93
    cache.check()


def test_a_refusal_changes_nothing() -> None:
    cache = KVCache(4)
    filled(cache, 1, PROMPT)
    before = list(cache.table(1))
    assert cache.open(2, b"other", PROMPT) is None
    assert cache.open(3, b"tenant", [7], spare=1) is None
    assert not cache.grow(1, 5 * PAGE)
    assert list(cache.table(1)) == before
    assert cache.available == 1
    cache.check()


def test_the_books_notice_a_page_that_is_in_two_places() -> None:
    cache = KVCache(4)
    filled(cache, 1, PROMPT)
    cache._free.append(cache.table(1)[0])
    with pytest.raises(AssertionError, match="two states"):
        cache.check()


def test_pages_for() -> None:
    assert [pages_for(tokens) for tokens in (0, 1, PAGE, PAGE + 1)] == [0, 1, 1, 2]
