"""Who owns which page of the key/value memory: integers only, the tensors are the runner's.

A page holds the keys and values of 32 consecutive tokens of one sequence. Full pages are named by a
digest chained over all tokens up to their end, so an equal prefix finds the pages that are there already
(PagedAttention, arXiv 2309.06180). The chain starts with a salt: pages are shared inside one salt only.

    page states:  new → owned (by one sequence or more) → cached (no owner, named) → evicted, owned again
                                                        → free (no owner, no name) → owned again

A new page takes memory only once it is written. So free pages come first, and as soon as `kept` pages have
been handed out, the least recently used cached ones come before new ones.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

PAGE = 32  # tokens per page; the kernels' pages have the same size


def pages_for(tokens: int) -> int:
    """The pages that hold so many tokens."""
    return -(-tokens // PAGE)


@dataclass(eq=False)
class Holding:
    """The pages of one sequence in order, and the names of its published full pages."""

    salt: bytes
    pages: array[int] = field(default_factory=lambda: array("i"))
    names: list[bytes] = field(default_factory=list)


class KVCache:
    """Pages, their owners and their names. Owners are numbers that the caller chooses.

    Beyond `kept` pages (by default all) new ones are handed out for what runs, never to keep prefixes.
    """

    def __init__(self, pages: int, kept: int | None = None) -> None:
        self.pages = pages
        self.evicted = 0  # cached pages that were reused for something else
        self.touched = 0  # pages that were handed out ever: these take memory; all later ones are new
        self._kept = pages if kept is None else kept
        self._free: list[int] = []
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._owners = [0] * pages
        self._page_of: dict[bytes, int] = {}
        self._name_of: dict[int, bytes] = {}
        self._holdings: dict[int, Holding] = {}

    @property
    def available(self) -> int:
        """Pages that can be handed out now: new ones, free ones and cached ones without an owner."""
        return self.pages - self.touched + len(self._free) + len(self._cached)

    @property
    def used(self) -> int:
        """Pages with at least one owner."""
        return self.pages - self.available

    @property
    def cached(self) -> int:
        """Pages without an owner that are kept for a later equal prefix."""
        return len(self._cached)

    def table(self, owner: int) -> array[int]:
        """The pages of an owner in the order of its tokens (not to be changed)."""
        return self._holdings[owner].pages

    def open(
        self, owner: int, salt: bytes, ids: Sequence[int], spare: int = 0, *, share: bool = True
    ) -> int | None:
        """Give a new owner pages for all of `ids`; return how many leading tokens are there already.

        None, and nothing changed, when that would leave fewer than `spare` pages available. At least the
        last token is never taken from the cache: its logits are needed; without `share` nothing is.
        """
        assert owner not in self._holdings
        names: list[bytes] = []
        shared: list[int] = []
        for name in _chain(salt, ids[: len(ids) - 1] if share else ()):
            page = self._page_of.get(name)
            if page is None:
                break
            names.append(name)
            shared.append(page)
        fresh = pages_for(len(ids)) - len(shared)
        unowned = sum(1 for page in shared if self._owners[page] == 0)
        if fresh + spare > self.available - unowned:
            return None
        holding = Holding(salt, names=names)
        for page in shared:
            self._cached.pop(page, None)
            self._owners[page] += 1
            holding.pages.append(page)
        self._holdings[owner] = holding
        self._extend(holding, fresh)
        return len(shared) * PAGE

    def grow(self, owner: int, tokens: int) -> bool:
        """Give an owner pages for so many tokens; False, and nothing changed, if there are not enough."""
        holding = self._holdings[owner]
        fresh = pages_for(tokens) - len(holding.pages)
        if fresh > self.available:
            return False
        self._extend(holding, fresh)
        return True

    def shrink(self, owner: int, tokens: int) -> None:
        """Take back the pages beyond so many tokens: unpublished ones, as room for rejected drafts is."""
        holding = self._holdings[owner]
        assert len(holding.names) <= pages_for(tokens)
        while len(holding.pages) > pages_for(tokens):
            page = holding.pages.pop()
            self._owners[page] = 0
            self._free.append(page)

    def publish(self, owner: int, ids: Sequence[int], computed: int) -> None:
        """Name the full pages of an owner whose first `computed` tokens of `ids` have been written."""
        holding = self._holdings[owner]
        full = computed // PAGE
        while len(holding.names) < full:
            index = len(holding.names)
            parent = holding.names[-1] if holding.names else holding.salt
            name = _name(parent, ids[index * PAGE : (index + 1) * PAGE])
            holding.names.append(name)
            if name not in self._page_of:  # else an equal page is published already; ours stays nameless
                self._page_of[name] = holding.pages[index]
                self._name_of[holding.pages[index]] = name

    def close(self, owner: int) -> None:
        """Take all pages from an owner. Named pages stay cached, the deepest ones to be evicted first."""
        for page in reversed(self._holdings.pop(owner).pages):
            self._owners[page] -= 1
            if self._owners[page] > 0:
                continue
            if page in self._name_of:
                self._cached[page] = None
            else:
                self._free.append(page)

    def check(self) -> None:
        """Compare the books with each other; AssertionError says which rule is broken."""
        owned = Counter(page for holding in self._holdings.values() for page in holding.pages)
        for holding in self._holdings.values():
            assert len(set(holding.pages)) == len(holding.pages), "a sequence holds a page twice"
        assert all(self._owners[page] == owned[page] for page in range(self.pages)), "owner counts are wrong"
        new = set(range(self.touched, self.pages))
        groups = [set(self._free), set(self._cached), set(owned), new]
        assert len(self._free) == len(groups[0]), "a page is free twice"
        assert sum(len(group) for group in groups) == self.pages, "a page is lost or in two states"
        assert set().union(*groups) == set(range(self.pages)), "an unknown page"
        assert {page: name for name, page in self._page_of.items()} == self._name_of, "names and pages differ"
        assert groups[1] <= set(self._name_of), "a cached page has no name"
        assert not (groups[0] | new) & set(self._name_of), "a free page has a name"

    def _extend(self, holding: Holding, count: int) -> None:
        for _ in range(count):
            page = self._take()
            self._owners[page] = 1
            holding.pages.append(page)

    def _take(self) -> int:
        if self._free:
            return self._free.pop()
        if self._cached and self.touched >= min(self._kept, self.pages):
            return self._evict()
        self.touched += 1
        return self.touched - 1

    def _evict(self) -> int:
        page, _ = self._cached.popitem(last=False)
        del self._page_of[self._name_of.pop(page)]
        self.evicted += 1
        return page


def _chain(salt: bytes, ids: Sequence[int]) -> list[bytes]:
    names: list[bytes] = []
    parent = salt
    for start in range(0, len(ids) - PAGE + 1, PAGE):
        parent = _name(parent, ids[start : start + PAGE])
        names.append(parent)
    return names


def _name(parent: bytes, ids: Sequence[int]) -> bytes:
    # SHA-256 rather than a fast hash: two prompts must never be made to collide on purpose.
    return hashlib.sha256(parent + array("q", ids).tobytes()).digest()
