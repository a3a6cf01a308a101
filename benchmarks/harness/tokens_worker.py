"""Encodes or trains with one library in a process of its own, and tells how long it took.

    python tokens_worker.py SUBJECT TEXTS.json FOLDER VOCABULARY

Nothing of Lapis is imported but for its own subjects, so this also runs in a peer's environment. The folder holds
tokenizer.json and, for tiktoken, the same vocabulary as `ranks.json` with the split pattern.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import resource
import sys
import time
from array import array
from collections.abc import Callable
from pathlib import Path

os.environ["TOKENIZERS_PARALLELISM"] = "false"
BATCH = 200  # documents that are encoded at a time

Rows = list[list[int]]


def main() -> None:
    """Run one subject once and print its time, tokens, and a digest of what it made."""
    subject, texts, folder, size = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4])
    documents: list[str] = json.loads(texts.read_text(encoding="utf-8"))
    work = TRAIN[subject](size) if subject in TRAIN else ENCODE[subject](folder)
    began = time.process_time()
    made = work(documents)
    seconds = time.process_time() - began
    if isinstance(made, str):
        tokens, content = 0, made.encode()
    else:
        flat = array("I", [id for row in made for id in row]) if isinstance(made, list) else array("I", made)
        tokens, content = len(flat), flat.tobytes()
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    digest = hashlib.sha256(content).hexdigest()
    print(json.dumps({"seconds": seconds, "tokens": tokens, "digest": digest, "resident": resident}))


def lapis_arrays(folder: Path) -> Callable[[list[str]], array[int]]:
    """Token ids in arrays, as shards are written; the end tokens are taken out afterwards."""
    from lapis.tokenizer.bpe import Tokenizer

    tokenizer = Tokenizer.load(folder / "tokenizer.json")
    tokenizer.encode_stream([""])

    def work(documents: list[str]) -> array[int]:
        found = array("I")
        for n in range(0, len(documents), BATCH):
            ids, _ = tokenizer.encode_stream(documents[n : n + BATCH])
            found.frombytes(ids[ids != tokenizer.end_id].tobytes())
        return found

    return work


def lapis_lists(folder: Path) -> Callable[[list[str]], Rows]:
    """Token ids in Python lists, as the peers give them."""
    from lapis.tokenizer.bpe import Tokenizer

    tokenizer = Tokenizer.load(folder / "tokenizer.json")
    tokenizer.encode_batch([""])
    return tokenizer.encode_batch


def hugging_face(folder: Path) -> Callable[[list[str]], Rows]:
    """Hugging Face `tokenizers`."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.encode_special_tokens = True

    def work(documents: list[str]) -> Rows:
        rows: Rows = []
        for n in range(0, len(documents), BATCH):
            found = tokenizer.encode_batch_fast(documents[n : n + BATCH], add_special_tokens=False)
            rows += [one.ids for one in found]
        return rows

    return work


def tiktoken(folder: Path) -> Callable[[list[str]], Rows]:
    """tiktoken with the same vocabulary and split pattern."""
    from tiktoken import Encoding

    facts = json.loads((folder / "ranks.json").read_text())
    ranks = {base64.b64decode(piece): id for piece, id in facts["ranks"].items()}
    encoding = Encoding(
        "same", pat_str=facts["split"], mergeable_ranks=ranks, special_tokens=facts["specials"]
    )
    return lambda documents: [encoding.encode_ordinary(document) for document in documents]


def train_lapis(size: int) -> Callable[[list[str]], str]:
    """Training as Lapis does it."""
    from lapis.tokenizer.bpe import Tokenizer

    Tokenizer.train([""], 300)
    return lambda documents: Tokenizer.train(documents, size).to_json()


def train_hugging_face(size: int) -> Callable[[list[str]], str]:
    """Training by Hugging Face `tokenizers`, to the same file."""
    from lapis.tokenizer import bpe

    bpe.compiled_split = lambda _: None  # what Lapis does without its compiled code
    return lambda documents: bpe.Tokenizer.train(documents, size).to_json()


ENCODE = {
    "lapis arrays": lapis_arrays,
    "lapis lists": lapis_lists,
    "tokenizers": hugging_face,
    "tiktoken": tiktoken,
}
TRAIN = {"train lapis": train_lapis, "train tokenizers": train_hugging_face}


if __name__ == "__main__":
    main()
