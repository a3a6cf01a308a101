"""The tokenizer of a GGUF file, rebuilt from its metadata: byte-level BPE, or SentencePiece's (Llama 2).

Back: the metadata of a byte-level BPE whose split has a name.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as HFTokenizer

from lapis.errors import InputError
from lapis.tokenizer.bpe import Tokenizer
from lapis.tokenizer.split import SPLIT

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
    composed: bool = False  # characters are composed first (Unicode NFC)


def _gpt2() -> list[Any]:
    return [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]


def _smollm() -> list[Any]:
    return [pre_tokenizers.Digits(individual_digits=True), *_gpt2()]


def _llama3(pattern: str = SPLIT) -> list[Any]:
    return [
        pre_tokenizers.Split(Regex(pattern), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]


def _qwen2() -> list[Any]:
    return _llama3(SPLIT.replace(r"\p{N}{1,3}", r"\p{N}"))  # one digit at a time


# tokenizer.ggml.pre, the names that llama.cpp gives
SPLITS = {
    "gpt-2": _Split(_gpt2),
    "smollm": _Split(_smollm),
    "llama-bpe": _Split(_llama3, ignore_merges=True, adds_bos=True),
    "qwen2": _Split(_qwen2, composed=True),
    "olmo": _Split(_gpt2, composed=True),
}


def build_tokenizer(metadata: Mapping[str, Any], where: str) -> BuiltTokenizer:
    """Rebuild the tokenizer that a GGUF file's metadata describe. Raises InputError for an unknown kind."""
    kind, pre = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    if kind not in ("gpt2", "llama"):
        raise InputError(
            f"{where}: the tokenizer model {kind!r} is not supported.",
            hint="Supported: gpt2 (byte-level BPE) and llama (SentencePiece's BPE). The same model as a Hugging "
            "Face folder may work.",
        )
    if kind == "gpt2" and pre not in SPLITS:
        raise InputError(
            f"{where}: the pre-tokenizer {pre!r} is unknown, so texts would be cut wrongly.",
            hint=f"Known: {', '.join(SPLITS)}. The same model as a Hugging Face folder may work.",
        )
    tokens, types = _tokens(metadata, where)
    if kind == "gpt2":
        inner = _byte_level_bpe(tokens, types, _merges(metadata, tokens, where), SPLITS[str(pre)])
        adds_bos = SPLITS[str(pre)].adds_bos
    else:
        inner = _sentencepiece(tokens, types, metadata, where)
        adds_bos = True
    inner.add_tokens(
        [
            AddedToken(token, special=kind != USER_DEFINED, normalized=False)
            for token, kind in zip(tokens, types, strict=True)
            if kind in (UNKNOWN, CONTROL, USER_DEFINED)
        ]
    )
    bos = _token(metadata, "bos_token_id", len(tokens), where)
    eos = _token(metadata, "eos_token_id", len(tokens), where)
    tokenizer = _wrap(inner, None if eos is None else tokens[eos])
    ends = [eos, _token(metadata, "eot_token_id", len(tokens), where), *sorted(tokenizer.stop_ids)]
    template = metadata.get("tokenizer.chat_template")
    return BuiltTokenizer(
        tokenizer=tokenizer,
        chat_template=template if isinstance(template, str) else None,
        add_bos=bool(metadata.get("tokenizer.ggml.add_bos_token", adds_bos)) and bos is not None,
        bos_id=bos,
        stop_ids=tuple(dict.fromkeys(id for id in ends if id is not None)),
    )


def _byte_level_bpe(
    tokens: list[str], types: list[int], merges: list[tuple[str, str]], split: _Split
) -> HFTokenizer:
    vocabulary = {token: id for id, token in enumerate(tokens) if types[id] != UNUSED}
    inner = HFTokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=split.ignore_merges))
    if split.composed:
        inner.normalizer = normalizers.NFC()
    inner.pre_tokenizer = pre_tokenizers.Sequence(split.steps())
    inner.decoder = decoders.ByteLevel()
    return inner


def _sentencepiece(
    tokens: list[str], types: list[int], metadata: Mapping[str, Any], where: str
) -> HFTokenizer:
    """SentencePiece's BPE: the pair that makes the piece of the best score is merged first; bytes for the rest."""
    scores = metadata.get("tokenizer.ggml.scores")
    if not isinstance(scores, list) or len(scores) != len(tokens):
        raise InputError(f"{where}: tokenizer.ggml.scores does not have one entry for each token.")
    ids = {token: id for id, token in enumerate(tokens)}
    if any(f"<0x{byte:02X}>" not in ids for byte in range(256)):
        raise InputError(f"{where}: the vocabulary lacks the tokens of single bytes.")
    pieces = {token for token, kind in zip(tokens, types, strict=True) if kind in (NORMAL, UNUSED)}
    ranked = [
        (-scores[ids[piece]], ids[piece], ids[piece[:cut]], ids[piece[cut:]])
        for piece in pieces
        for cut in range(1, len(piece))
        if piece[:cut] in pieces and piece[cut:] in pieces
    ]
    merges = [(tokens[left], tokens[right]) for _, _, left, right in sorted(ranked)]
    unknown = next((token for token, kind in zip(tokens, types, strict=True) if kind == UNKNOWN), None)
    inner = HFTokenizer(
        models.BPE(vocab=ids, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    spaces: list[Any] = [normalizers.Prepend("▁")] if prefix else []
    inner.normalizer = normalizers.Sequence([*spaces, normalizers.Replace(" ", "▁")])
    steps: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    inner.decoder = decoders.Sequence([*steps, *([decoders.Strip(" ", 1, 0)] if prefix else [])])
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


def to_metadata(
    tokenizer: Tokenizer,
    rows: int,
    *,
    chat_template: str | None,
    add_bos: bool,
    bos_id: int | None,
    stop_ids: tuple[int, ...],
) -> dict[str, Any]:
    """The metadata from which `build_tokenizer` rebuilds a tokenizer, for a model with so many rows of embedding.

    Raises InputError if it is no byte-level BPE, or cuts texts in a way that has no name in a GGUF file.
    """
    described = json.loads(tokenizer.to_json())
    model = described["model"]
    tokens, types = [f"[PAD{id}]" for id in range(rows)], [UNUSED] * rows
    for token, id in model.get("vocab", {}).items() if model["type"] == "BPE" else ():
        tokens[id], types[id] = token, NORMAL
    for added in described["added_tokens"]:
        tokens[added["id"]] = added["content"]
        types[added["id"]] = CONTROL if added["special"] else USER_DEFINED
    values = {
        "model": "gpt2",
        "pre": _split_name(described),
        "tokens": tokens,
        "token_type": types,
        "merges": [" ".join(pair) if isinstance(pair, list) else pair for pair in model["merges"]],
        "add_bos_token": add_bos,
        "bos_token_id": bos_id,
        "eos_token_id": stop_ids[0],
        "eot_token_id": next((id for id in stop_ids[1:] if id != tokenizer.end_id), None),
    }
    found = {f"tokenizer.ggml.{key}": value for key, value in values.items() if value is not None}
    return found if chat_template is None else {**found, "tokenizer.chat_template": chat_template}


def _split_name(described: Mapping[str, Any]) -> str:
    """llama.cpp's name of the way in which the tokenizer of this tokenizer.json cuts texts."""
    model, decoder = described["model"], described["decoder"] or {}
    steps, normalizer = _steps(described["pre_tokenizer"]), described["normalizer"]
    if model["type"] == "BPE" and decoder.get("type") == "ByteLevel":
        for name, split in SPLITS.items():
            made = json.loads(pre_tokenizers.Sequence(split.steps()).__getstate__())
            composed = {"type": "NFC"} if split.composed else None
            if (steps, normalizer) != (_steps(made), composed):
                continue
            if split.ignore_merges == bool(model.get("ignore_merges")) or _merges_make_every_token(described):
                return name
    raise InputError(
        "A GGUF file has no name for the way in which this model's tokenizer cuts texts.",
        hint=f"Known: byte-level BPE with the splits {', '.join(SPLITS)}. The plain folder has the tokenizer as it "
        "is: lapis models export NAME FOLDER",
    )


def _steps(pre_tokenizer: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    """The steps of a pre-tokenizer one after the other, without what changes offsets only."""
    if pre_tokenizer is None:
        return []
    if pre_tokenizer["type"] == "Sequence":
        return [step for inner in pre_tokenizer["pretokenizers"] for step in _steps(inner)]
    return [{key: value for key, value in pre_tokenizer.items() if key != "trim_offsets"}]


def _merges_make_every_token(described: Mapping[str, Any]) -> bool:
    """Whether a piece that is a token is cut into itself alone, whether it is looked up whole or merged."""
    model, added = described["model"], {token["content"] for token in described["added_tokens"]}
    bpe = models.BPE(vocab=model["vocab"], merges=[tuple(pair) for pair in model["merges"]])
    return all(len(bpe.tokenize(token)) == 1 for token in model["vocab"] if token not in added)
