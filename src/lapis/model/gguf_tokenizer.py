"""The tokenizer of a GGUF file, rebuilt from its metadata as a Hugging Face byte-level BPE."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as HFTokenizer

from lapis.errors import InputError
from lapis.tokenizer.bpe import SPLIT, Tokenizer

# tokenizer.ggml.token_type
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6


@dataclass(frozen=True)
class BuiltTokenizer:
    """A tokenizer and how to prompt with it. The first of `stop_ids` is the end-of-sequence token."""

    tokenizer: Tokenizer
    chat_template: str | None
    add_bos: bool
    bos_id: int | None
    stop_ids: tuple[int, ...]


@dataclass(frozen=True)
class _Split:
    """How text is cut before merging, and whether a piece that is a token is taken whole."""

    steps: Callable[[], list[Any]]
    ignore_merges: bool = False
    adds_bos: bool = False  # where the file does not say


def _gpt2() -> list[Any]:
    return [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]


def _smollm() -> list[Any]:
    return [pre_tokenizers.Digits(individual_digits=True), *_gpt2()]


def _llama3() -> list[Any]:
    return [
        pre_tokenizers.Split(Regex(SPLIT), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]


# tokenizer.ggml.pre, the names that llama.cpp gives
SPLITS = {
    "gpt-2": _Split(_gpt2),
    "smollm": _Split(_smollm),
    "llama-bpe": _Split(_llama3, ignore_merges=True, adds_bos=True),
}


def build_tokenizer(metadata: Mapping[str, Any], where: str) -> BuiltTokenizer:
    """Rebuild the tokenizer that a GGUF file's metadata describe. Raises InputError for an unknown kind."""
    kind, pre = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    if kind != "gpt2":
        raise InputError(
            f"{where}: the tokenizer model {kind!r} is not supported.",
            hint="Supported: gpt2 (byte-level BPE). The same model as a Hugging Face folder may work.",
        )
    if pre not in SPLITS:
        raise InputError(
            f"{where}: the pre-tokenizer {pre!r} is unknown, so texts would be cut wrongly.",
            hint=f"Known: {', '.join(SPLITS)}. The same model as a Hugging Face folder may work.",
        )
    tokens, types = _tokens(metadata, where)
    inner = _byte_level_bpe(tokens, types, _merges(metadata, tokens, where), SPLITS[pre])
    bos = _token(metadata, "bos_token_id", len(tokens), where)
    eos = _token(metadata, "eos_token_id", len(tokens), where)
    tokenizer = _wrap(inner, None if eos is None else tokens[eos])
    ends = [eos, _token(metadata, "eot_token_id", len(tokens), where), *sorted(tokenizer.stop_ids)]
    template = metadata.get("tokenizer.chat_template")
    return BuiltTokenizer(
        tokenizer=tokenizer,
        chat_template=template if isinstance(template, str) else None,
        add_bos=bool(metadata.get("tokenizer.ggml.add_bos_token", SPLITS[pre].adds_bos)) and bos is not None,
        bos_id=bos,
        stop_ids=tuple(dict.fromkeys(id for id in ends if id is not None)),
    )


def _byte_level_bpe(
    tokens: list[str], types: list[int], merges: list[tuple[str, str]], split: _Split
) -> HFTokenizer:
    vocabulary = {token: id for id, token in enumerate(tokens)}
    inner = HFTokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=split.ignore_merges))
    inner.pre_tokenizer = pre_tokenizers.Sequence(split.steps())
    inner.decoder = decoders.ByteLevel()
    added = [
        AddedToken(token, special=kind != USER_DEFINED, normalized=False)
        for token, kind in zip(tokens, types, strict=True)
        if kind in (UNKNOWN, CONTROL, USER_DEFINED)
    ]
    inner.add_tokens(added)
    return inner


def _wrap(inner: HFTokenizer, eos: str | None) -> Tokenizer:
    """Our Tokenizer; where no token has a usual end-of-text name, the file's own eos is the end."""
    try:
        return Tokenizer(inner)
    except InputError:
        if eos is None:
            raise
        return Tokenizer(inner, end=eos)


def _tokens(metadata: Mapping[str, Any], where: str) -> tuple[list[str], list[int]]:
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
        raise InputError(f"{where}: the vocabulary (tokenizer.ggml.tokens) is missing.")
    types = metadata.get("tokenizer.ggml.token_type", [NORMAL] * len(tokens))
    if not isinstance(types, list) or len(types) != len(tokens):
        raise InputError(f"{where}: tokenizer.ggml.token_type does not have one entry for each token.")
    if len(set(tokens)) != len(tokens):
        raise InputError(f"{where}: the vocabulary holds a token twice.")
    return tokens, types


def _merges(metadata: Mapping[str, Any], tokens: list[str], where: str) -> list[tuple[str, str]]:
    lines = metadata.get("tokenizer.ggml.merges")
    if not isinstance(lines, list):
        raise InputError(f"{where}: the merges (tokenizer.ggml.merges) are missing.")
    known = set(tokens)
    merges = []
    for line in lines:
        left, _, right = line.partition(" ")
        if not {left, right, left + right} <= known:
            raise InputError(f"{where}: the merge {line!r} makes a token that is not in the vocabulary.")
        merges.append((left, right))
    return merges


def _token(metadata: Mapping[str, Any], key: str, size: int, where: str) -> int | None:
    id = metadata.get(f"tokenizer.ggml.{key}")
    if id is None:
        return None
    if not isinstance(id, int) or not 0 <= id < size:
        raise InputError(f"{where}: tokenizer.ggml.{key} = {id!r} is not a token of the vocabulary.")
    return id
