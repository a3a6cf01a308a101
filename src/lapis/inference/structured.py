"""Grammars enforced: which tokens may come next so that the text stays inside a language. Over llguidance.

A grammar is compiled once per tokenizer, by whoever submits a request, never on the engine's thread. Each
sequence then has a Matcher of its own, fed with the tokens of its completion; it belongs to the sequence and not
to its pages, so preemption does not touch it. The end tokens are allowed exactly where the grammar may end.

Dims: W words of 32 bits, one bit for each entry of the vocabulary.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper
from numpy.typing import NDArray

from lapis.errors import InputError
from lapis.tokenizer.bpe import Tokenizer
from lapis.tokenizer.grammar import SPACE, Grammar

Words = NDArray[np.uint32]

CACHED = 256  # compiled grammars that are kept
# Work, not seconds, so that the same grammar is refused everywhere: about 20 ms of compiling, 15 ms a token.
LIMITS = LLParserLimits(
    initial_lexer_fuel=1_000_000,
    step_lexer_fuel=200_000,
    step_max_items=50_000,
    max_items_in_row=2000,
    max_lexer_states=10_000,  # of 1 to 2 kB
    max_grammar_size=200_000,
    verbose_errors=False,  # they would show one user's text in the log
)


class Matcher:
    """One sequence's place in its grammar."""

    def __init__(self, inner: LLMatcher, tokenizer: LLTokenizer, stop_ids: frozenset[int]) -> None:
        self._inner = inner
        self._consumed = 0
        self._mask_W: Words = np.zeros(-(-tokenizer.vocab_size // 32), np.uint32)
        ends = frozenset(tokenizer.eos_tokens)
        self._end = min(ends)
        self._dropped = sorted(ends - stop_ids)
        self._added = sorted(stop_ids - ends)

    def forced(self, completion: Sequence[int]) -> tuple[int, ...]:
        """The tokens that write what must follow in any case, as the tokenizer would; none if there is a fault."""
        try:
            self._follow(completion)
            return tuple(self._inner.compute_ff_tokens())
        except RuntimeError:  # `allowed` tells, where it ends this request alone
            return ()

    def allowed(self, completion: Sequence[int]) -> Words:
        """The bits of the tokens that may follow these: those of last time, more of them or fewer.

        The array is overwritten by the next call. Raises RuntimeError when the grammar does not allow the
        completion, or following it takes more work than is allowed.
        """
        self._follow(completion)
        self._inner.unsafe_compute_mask_ptr(self._mask_W.ctypes.data, self._mask_W.nbytes)
        if self._inner.is_error():
            raise RuntimeError(f"the grammar cannot be followed any further: {self._reason()}")
        if self._dropped or self._added:
            self._change_ends()
        return self._mask_W

    def _follow(self, completion: Sequence[int]) -> None:
        back = self._consumed - len(completion)
        if back > 0:  # a step that failed is computed again
            self._inner.rollback(back)
            self._consumed -= back
        fresh = list(completion[self._consumed :])
        if fresh and not self._inner.consume_tokens(fresh):
            raise RuntimeError(f"the grammar cannot be followed any further: {self._reason()}")
        self._consumed += len(fresh)

    def _change_ends(self) -> None:
        """Let the request's own end tokens end the text instead of the model's."""
        may_end = has(self._mask_W, self._end)
        for token in self._dropped:
            self._mask_W[token >> 5] &= np.uint32(~(1 << (token & 31)) & 0xFFFFFFFF)
        if may_end:
            for token in self._added:
                self._mask_W[token >> 5] |= np.uint32(1 << (token & 31))

    def _reason(self) -> str:
        return one_line(self._inner.get_error())


class Compiler:
    """Turns Grammars into Matchers for one tokenizer; may be called from any thread."""

    def __init__(self, tokenizer: Tokenizer, stop_ids: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._stop_ids = stop_ids or tokenizer.stop_ids
        self._lock = threading.Lock()
        self._inner: LLTokenizer | None = None
        self._compiled: OrderedDict[Grammar, LLMatcher] = OrderedDict()

    def matcher(self, grammar: Grammar, stop_ids: frozenset[int] | None = None) -> Matcher:
        """A Matcher at the start of a grammar, which ends with one of `stop_ids` (none: the model's own).

        Raises InputError with the grammar's `param` when it is malformed, cannot be enforced or is too large.
        """
        with self._lock:
            inner = self._inner = self._inner or _inner_tokenizer(self._tokenizer, self._stop_ids)
            compiled = self._compiled.get(grammar)
            if compiled is not None:
                self._compiled.move_to_end(grammar)
                compiled = compiled.deep_copy()
        if compiled is None:  # without the lock: a large grammar must not hold up the small ones
            compiled = _compile(grammar, inner)
            with self._lock:
                self._compiled[grammar] = compiled.deep_copy()
                while len(self._compiled) > CACHED:
                    self._compiled.popitem(last=False)
        return Matcher(compiled, inner, stop_ids or self._stop_ids)


def has(mask_W: Words, token: int) -> bool:
    """Whether a token's bit is set."""
    return bool(int(mask_W[token >> 5]) >> (token & 31) & 1)


def one_line(text: str, limit: int = 300) -> str:
    """A compiler's message without its line breaks, cut where it gets long."""
    line = " ".join(text.replace("<non-verbose/>", "").split()).rstrip(".")
    return line if len(line) <= limit else line[:limit] + "…"


def _compile(grammar: Grammar, tokenizer: LLTokenizer) -> LLMatcher:
    what = {"json": "JSON schema", "regex": "regular expression", "lark": "grammar"}[grammar.kind]
    try:
        matcher = LLMatcher(tokenizer, _source(grammar), log_level=0, limits=LIMITS)
        reason = matcher.get_error()
        if not reason:  # some faults show with the first mask only
            first = matcher.deep_copy()
            some = any(first.compute_bitmask())
            reason = first.get_error() or ("" if some else "NoExtension")
    except (ValueError, RuntimeError) as error:
        reason = str(error)
    if "NoExtension" in reason:
        reason = "no text satisfies it"
    if reason:
        raise InputError(f"The {what} cannot be enforced: {one_line(reason)}.", param=grammar.param)
    return matcher


def _source(grammar: Grammar) -> str:
    if grammar.kind == "regex":
        return LLMatcher.grammar_from_regex(grammar.text)
    if grammar.kind == "lark":
        return LLMatcher.grammar_from_lark(grammar.text)
    switches = {"whitespace_pattern": SPACE, "lenient": not grammar.strict}
    return LLMatcher.grammar_from_json_schema(grammar.text, overrides=switches)  # type: ignore[arg-type]


class _Vocabulary:
    """A Tokenizer as llguidance wants to see it: bytes of each token, and how a text is encoded."""

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, end_id: int) -> None:
        used = set(tokenizer.ids)
        self.eos_token_id = end_id
        self.tokens = [tokenizer.token_bytes(id) if id in used else b"" for id in range(tokenizer.vocab_size)]
        self.special_token_ids = sorted(tokenizer.special_ids)
        self._encode: Callable[[str], list[int]] = tokenizer.encode

    def __call__(self, text: bytes | str) -> list[int]:
        return self._encode(text if isinstance(text, str) else text.decode())


def _inner_tokenizer(tokenizer: Tokenizer, stop_ids: frozenset[int]) -> LLTokenizer:
    wrapper = TokenizerWrapper(_Vocabulary(tokenizer, min(stop_ids)))
    return LLTokenizer(wrapper, n_vocab=tokenizer.vocab_size, eos_token=sorted(stop_ids))
