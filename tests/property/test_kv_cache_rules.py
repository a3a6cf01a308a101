"""The KV cache under random use: no page lost or owned wrongly, and a hit always holds the right prefix."""

from __future__ import annotations

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    precondition,
    rule,
)

from lapis.inference.kv_cache import PAGE, KVCache, pages_for

PAGES = 12
SALTS = (b"one", b"two")


def prompts() -> st.SearchStrategy[list[int]]:
    """Up to five pages of two kinds and a short tail, so that many prompts share their beginning."""
    blocks = st.lists(st.sampled_from([1, 2]), min_size=1, max_size=5)
    tails = st.lists(st.just(3), max_size=PAGE - 1)
    return st.builds(lambda pages, tail: [kind for kind in pages for _ in range(PAGE)] + tail, blocks, tails)


class CacheMachine(RuleBasedStateMachine):
    """Beside the cache stands a memory that notes what was written to each page: salt and whole prefix."""

    owners = Bundle("owners")

    def __init__(self) -> None:
        super().__init__()
        self.kept, self.most_used = PAGES, 0
        self.cache = KVCache(PAGES)
        self.memory: dict[int, tuple[bytes, tuple[int, ...]]] = {}
        self.ids: dict[int, list[int]] = {}
        self.salts: dict[int, bytes] = {}
        self.computed: dict[int, int] = {}
        self.next = 0

    @initialize(kept=st.integers(0, PAGES))
    def choose(self, kept: int) -> None:
        self.kept, self.cache = kept, KVCache(PAGES, kept)

    def note_used(self) -> None:
        self.most_used = max(self.most_used, self.cache.used)

    @rule(target=owners, salt=st.sampled_from(SALTS), ids=prompts(), spare=st.integers(0, 3))
    def open(self, salt: bytes, ids: list[int], spare: int) -> int | None:
        before = self.cache.available
        owner = self.next
        self.next += 1
        cached = self.cache.open(owner, salt, ids, spare)
        self.note_used()
        if cached is None:
            assert self.cache.available == before
            return None
        assert cached < len(ids)
        assert cached % PAGE == 0
        assert self.cache.available >= spare
        table = self.cache.table(owner)
        assert len(table) == pages_for(len(ids))
        for index in range(cached // PAGE):
            assert self.memory[table[index]] == (salt, tuple(ids[: (index + 1) * PAGE]))
        self.ids[owner], self.salts[owner], self.computed[owner] = list(ids), salt, cached
        return owner

    @rule(owner=owners, token=st.sampled_from([1, 2, 3]), count=st.integers(1, 40))
    def write(self, owner: int | None, token: int, count: int) -> None:
        """Compute what is pending and, if there is room, add tokens that are computed too."""
        if owner is None or owner not in self.ids:
            return
        ids = self.ids[owner]
        if self.cache.grow(owner, len(ids) + count):
            ids += [token] * count
        self.note_used()
        table = self.cache.table(owner)
        for position in range(self.computed[owner], len(ids)):
            page = table[position // PAGE]
            others = [other for other in self.ids if other != owner and page in self.cache.table(other)]
            assert not others, "a page that another sequence reads is written to"
            self.memory[page] = (self.salts[owner], tuple(ids[: position + 1]))
        self.computed[owner] = len(ids)
        self.cache.publish(owner, ids, len(ids))

    @rule(owner=owners, count=st.integers(1, 70))
    def guess(self, owner: int | None, count: int) -> None:
        """Room for drafts that all turn out wrong is given back whole."""
        if owner is None or owner not in self.ids:
            return
        tokens, before = len(self.ids[owner]), self.cache.available
        held = list(self.cache.table(owner))
        if self.cache.grow(owner, tokens + count):
            self.note_used()
            assert len(self.cache.table(owner)) == pages_for(tokens + count)
            for page in list(self.cache.table(owner))[len(held) :]:
                self.memory.pop(page, None)  # written over
            self.cache.shrink(owner, tokens)
        assert list(self.cache.table(owner)) == held
        assert self.cache.available == before

    @rule(owner=owners)
    def read_all(self, owner: int | None) -> None:
        """Who needs every row takes nothing from the cache, though the same tokens are there."""
        if owner is None or owner not in self.ids:
            return
        held = set(self.cache.table(owner))
        if self.cache.open(-1, self.salts[owner], self.ids[owner], share=False) is not None:
            self.note_used()
            assert not held & set(self.cache.table(-1))
            for page in self.cache.table(-1):
                self.memory.pop(page, None)
            self.cache.close(-1)

    @rule(owner=consumes(owners))
    def close(self, owner: int | None) -> None:
        if owner is not None and owner in self.ids:
            self.cache.close(owner)
            del self.ids[owner]

    @precondition(lambda self: not self.ids)
    @rule()
    def idle(self) -> None:
        assert self.cache.used == 0
        assert self.cache.available == PAGES

    @invariant()
    def books(self) -> None:
        self.cache.check()

    @invariant()
    def memory_is_bounded(self) -> None:
        """By what is kept or, if that was more once, by what ran at a time."""
        assert self.cache.touched <= max(self.kept, self.most_used)

    def teardown(self) -> None:
        for owner in list(self.ids):
            self.cache.close(owner)
        self.cache.check()
        assert self.cache.available == PAGES


TestKVCache = CacheMachine.TestCase
TestKVCache.settings = settings(derandomize=True, max_examples=60, stateful_step_count=30, deadline=None)
