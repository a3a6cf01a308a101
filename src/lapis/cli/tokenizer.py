"""`lapis tokenizer`: train a tokenizer, encode text with it."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import click

from lapis.cli.output import json_option, print_json, print_table, say


@click.group()
def group() -> None:
    """Train a tokenizer, encode text with it."""


@group.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--vocab", type=int, default=8192, show_default=True, help="Entries of the vocabulary.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Where tokenizer.json goes.")
@json_option
def train(files: tuple[Path, ...], vocab: int, out: Path, as_json: bool) -> None:
    """Train a byte-level BPE on FILES (files and folders of text)."""
    from lapis.tokenizer.bpe import Tokenizer

    began = time.perf_counter()
    texts = _texts(files)
    tokenizer = Tokenizer.train(texts, vocab)
    tokenizer.save(out)
    size = sum(len(text.encode()) for text in texts)
    tokens = sum(map(len, tokenizer.encode_batch(texts)))
    facts = {
        "file": str(out),
        "digest": tokenizer.digest,
        "entries": tokenizer.vocab_size,
        "documents": len(texts),
        "bytes": size,
        "bytes_per_token": round(size / max(1, tokens), 3),
        "seconds": round(time.perf_counter() - began, 2),
    }
    if as_json:
        print_json(facts)
        return
    print_table(("fact", "value"), list(facts.items()))


@group.command()
@click.argument("tokenizer", type=click.Path(path_type=Path))
@click.argument("text")
@click.option("--special", is_flag=True, help="Recognise the text of special tokens.")
@json_option
def encode(tokenizer: Path, text: str, special: bool, as_json: bool) -> None:
    """Show the tokens of TEXT (- reads standard input); TOKENIZER is a tokenizer.json or its folder."""
    from lapis.tokenizer.bpe import Tokenizer

    path = tokenizer / "tokenizer.json" if tokenizer.is_dir() else tokenizer
    loaded = Tokenizer.load(path)
    given = sys.stdin.buffer.read().decode("utf-8", errors="replace") if text == "-" else text
    ids = loaded.encode(given, special=special)
    pieces = [loaded.token_bytes(id).decode("utf-8", errors="replace") for id in ids]
    if as_json:
        print_json({"ids": ids, "tokens": pieces, "characters": len(given), "bytes": len(given.encode())})
        return
    print_table(("id", "token"), [(str(id), repr(piece)) for id, piece in zip(ids, pieces, strict=True)])
    say(f"\n{len(ids):,} tokens, {len(given.encode()) / max(1, len(ids)):.2f} bytes per token")


def _texts(files: tuple[Path, ...]) -> list[str]:
    """Every text of some files and folders, repaired as the data pipeline repairs it."""
    from lapis.data.document import Document
    from lapis.data.readers import plan_parts, read_part
    from lapis.data.recipe import DataConfig, SourceConfig
    from lapis.data.repair import repair
    from lapis.data.sources import list_inputs

    config = DataConfig(sources=tuple(SourceConfig(path=str(file)) for file in files))
    parts = plan_parts(list_inputs(config).inputs)
    found = (one for part in parts for one in read_part(part, config.document_chars))
    return [repair(one.text) for one in found if isinstance(one, Document)]
