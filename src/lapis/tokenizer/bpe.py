"""Byte-level BPE over Hugging Face `tokenizers`: train, load, encode, decode, and decode as a stream."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path

from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as HFTokenizer

from lapis.errors import InputError
from lapis.hashing import digest_json
from lapis.storage import write_text
from lapis.tokenizer.alphabet import from_byte_level
from lapis.tokenizer.merges import learn
from lapis.tokenizer.split import SPLIT, compiled_split
from lapis.tokenizer.words import Ends, Ids, WordEncoder, judged

END, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIALS = (END, TURN_START, TURN_END)  # ids 0, 1, 2 of every tokenizer trained here
SMALLEST = 256 + len(SPECIALS)

# Names under which published tokenizers keep the token that ends a document or a turn, best first.
END_NAMES = (
    END,
    "<|end_of_text|>",
    "</s>",
    "<eos>",
    "<|eot_id|>",
    TURN_END,
    "<|end|>",
    "<end_of_turn>",
    "<|eom_id|>",
)

GROUP = 1 << 20  # characters that are encoded at a time
MAKE_ONE = "`lapis tokenizer train FILES --out F` makes one."
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Tokenizer:
    """Text to token ids and back. Any tokenizer.json works; those trained here are byte-level BPE."""

    def __init__(self, inner: HFTokenizer, *, end: str | None = None) -> None:
        inner.no_truncation()
        inner.no_padding()
        inner.encode_special_tokens = True  # special-token text inside a document is ordinary text
        self._inner = inner
        self._vocabulary: dict[str, int] = inner.get_vocab(with_added_tokens=True)
        ends = [self._vocabulary[name] for name in ((end,) if end else END_NAMES) if name in self._vocabulary]
        if not ends:
            wanted = end or ", ".join(END_NAMES)
            raise InputError(f"The tokenizer has no token that ends a document; looked for {wanted}.")
        self.end_id: int = ends[0]
        self.stop_ids: frozenset[int] = frozenset(ends)
        self.vocab_size: int = max(self._vocabulary.values()) + 1

    @staticmethod
    def train(texts: Iterable[str], vocab_size: int) -> Tokenizer:
        """Learn a byte-level BPE vocabulary; the same texts in any order give the same one.

        A text too small for `vocab_size` entries gives fewer. Raises InputError below 259 entries.
        """
        if vocab_size < SMALLEST:
            raise InputError(
                f"A vocabulary of {vocab_size} entries is too small: 256 bytes and {len(SPECIALS)} special "
                f"tokens need {SMALLEST}.",
                param="vocab_size",
            )
        return Tokenizer(_trained(texts, vocab_size))

    @staticmethod
    def load(path: Path, *, end: str | None = None) -> Tokenizer:
        """Read a tokenizer.json; `end` names the end token if it is none of the usual. Raises InputError."""
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
            raise InputError(f"The tokenizer {path} cannot be read: {reason}.", hint=MAKE_ONE) from error
        try:
            return Tokenizer.from_json(text, end=end)
        except InputError as error:
            raise InputError(f"{path}: {error.message}", hint=error.hint) from error

    @staticmethod
    def from_json(text: str, *, end: str | None = None) -> Tokenizer:
        """Make a tokenizer from the text of a tokenizer.json. Raises InputError if it is none."""
        try:
            inner = HFTokenizer.from_str(text)
        except Exception as error:  # the Rust binding raises bare Exception
            raise InputError(
                f"This is no tokenizer.json: {error}.",
                hint=MAKE_ONE,
            ) from error
        return Tokenizer(inner, end=end)

    def to_json(self) -> str:
        """The tokenizer.json text, entries in id order: equal tokenizers have equal text."""
        return self._inner.to_str(pretty=True) + "\n"

    def save(self, path: Path) -> None:
        """Write tokenizer.json atomically."""
        write_text(path, self.to_json())

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the canonical JSON of tokenizer.json."""
        return digest_json(json.loads(self._inner.to_str()))

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Token ids of a text; `special=True` recognises special tokens. Raises InputError."""
        inner = self._with_specials if special else self._inner
        try:
            return inner.encode(text, add_special_tokens=False).ids
        except (TypeError, UnicodeEncodeError) as error:  # a lone surrogate has no UTF-8 form
            raise InputError(
                "The text holds half of a surrogate pair, which is no Unicode character."
            ) from error

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of many texts, special-token text taken as ordinary text: `encode`, several times faster."""
        groups = (self._encode(group, None) for group in _groups(texts))
        return [row for ids, ends in groups for row in _rows(ids, ends)]

    def encode_stream(self, texts: Sequence[str]) -> tuple[Ids, Ends]:
        """Documents as they lie in a token stream, `end_id d1 … dn`, and where each one ends. Raises InputError."""
        return self._encode(texts, self.end_id)

    def _encode(self, texts: Sequence[str], prefix: int | None) -> tuple[Ids, Ends]:
        if self._words is None:
            return judged(self._inner, texts, prefix)
        return self._words.encode(texts, prefix)

    def decode(self, ids: Sequence[int], special: bool = False) -> str:
        """The text of some ids, without special tokens unless `special=True`; broken UTF-8 becomes U+FFFD."""
        if not self._byte_level:
            return self._inner.decode(list(ids), skip_special_tokens=not special)
        kept = [self.token_bytes(id) for id in ids if special or id not in self.special_ids]
        return b"".join(kept).decode("utf-8", errors="replace")

    def token_bytes(self, id: int) -> bytes:
        """The bytes that a token stands for. Raises InputError if there is no such id."""
        found = self._bytes.get(id)
        if found is None:
            piece = self._pieces.get(id)
            if piece is None:
                raise InputError(f"Token {id} is not in the vocabulary of {self.vocab_size} entries.")
            convert = from_byte_level if self._byte_level else _from_sentencepiece
            found = self._bytes[id] = convert(piece)
        return found

    def token_id(self, name: str) -> int | None:
        """The id of a token by its text in the vocabulary, or None."""
        return self._vocabulary.get(name)

    @property
    def ids(self) -> frozenset[int]:
        """The ids that have a token: some vocabularies have holes."""
        return frozenset(self._pieces) | frozenset(self._inner.get_added_tokens_decoder())

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids of the special tokens: they steer, they are no text."""
        added = self._inner.get_added_tokens_decoder()
        return frozenset(id for id, token in added.items() if token.special)

    @cached_property
    def special_tokens(self) -> dict[str, int]:
        """The text of every added token that `encode(…, special=True)` recognises, with its id."""
        return {token.content: id for id, token in self._inner.get_added_tokens_decoder().items()}

    @cached_property
    def _with_specials(self) -> HFTokenizer:
        # A copy, since the switch is state of the object and several threads encode at once.
        inner = HFTokenizer.from_str(self._inner.to_str())
        inner.encode_special_tokens = False
        return inner

    @cached_property
    def _words(self) -> WordEncoder | None:
        return WordEncoder.of(self._inner)

    @cached_property
    def _byte_level(self) -> bool:
        decoder = self._inner.decoder
        return decoder is not None and b'"ByteLevel"' in decoder.__getstate__()

    @cached_property
    def _pieces(self) -> dict[int, str]:
        return {id: piece for piece, id in self._vocabulary.items()}

    @cached_property
    def _bytes(self) -> dict[int, bytes]:
        """Of added tokens, and of those that were asked for: making all before the first answer takes 0.1 s."""
        return {id: token.content.encode() for id, token in self._inner.get_added_tokens_decoder().items()}


def _trained(texts: Iterable[str], vocab_size: int) -> HFTokenizer:
    inner = HFTokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    inner.decoder = decoders.ByteLevel()
    specials = [AddedToken(name, special=True, normalized=False) for name in SPECIALS]
    splitter = compiled_split(json.loads(inner.to_str())["pre_tokenizer"])
    if splitter is not None:
        inner.model = learn(texts, splitter, vocab_size, SPECIALS)
        inner.add_special_tokens(specials)
        return inner
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(iter(texts), trainer)
    return inner


def _groups(texts: Sequence[str]) -> Iterator[list[str]]:
    """Texts in groups of about GROUP characters, so that memory is bounded by the longest text."""
    group: list[str] = []
    size = 0
    for text in texts:
        group.append(text)
        size += len(text)
        if size >= GROUP:
            yield group
            group, size = [], 0
    if group:
        yield group


def _rows(ids: Ids, ends: Ends) -> list[list[int]]:
    flat, borders = ids.tolist(), [0, *ends.tolist()]
    return [flat[low:high] for low, high in pairwise(borders)]


class TextStream:
    """Decodes a growing list of ids. What it gives is always whole UTF-8.

    Special tokens give no text, but for those of `visible_ids`.
    """

    def __init__(self, tokenizer: Tokenizer, visible_ids: frozenset[int] = frozenset()) -> None:
        self._tokenizer = tokenizer
        self._hidden_ids = tokenizer.special_ids - visible_ids
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, id: int) -> str:
        """The text that this token completes; empty while a character is not whole."""
        if id in self._hidden_ids:
            return ""
        return self._decoder.decode(self._tokenizer.token_bytes(id))

    def finish(self) -> str:
        """The rest: U+FFFD if the last character never became whole."""
        return self._decoder.decode(b"", final=True)


def _from_sentencepiece(piece: str) -> bytes:
    byte = _BYTE_TOKEN.fullmatch(piece)
    return bytes([int(byte[1], 16)]) if byte else piece.replace("▁", " ").encode()
