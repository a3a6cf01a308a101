"""Makes chats.jsonl and preferences.jsonl from a document set: what the sources of Lapis say about themselves.

Also sums.jsonl, prompts with the number that answers them.

Every public function and class with a sentence about it gives a question and its answer; a preference sets that answer
against the one to another question.

    python recipes/examples/make.py [--source src/lapis] [--chats 400] [--pairs 200] [--sums 120]
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeVar

Item = TypeVar("Item")
HERE = Path(__file__).parent
SYSTEM = "You answer questions about the Python package Lapis in a sentence or two."
QUESTIONS = (
    "What is `{name}` in `{module}` for?",
    "Explain `{name}` of the module `{module}`.",
    "I came across `{name}` in `{module}`. What does it do?",
)


def documented(folder: Path) -> Iterator[tuple[str, str, str]]:
    """Module, name and sentence of every public definition, in the order of the files."""
    for path in sorted(folder.rglob("*.py")):
        module = ".".join((folder.name, *path.relative_to(folder).with_suffix("").parts))
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name.startswith("_"):
                continue
            text = re.sub(r"\s+", " ", ast.get_docstring(node) or "").strip()
            if 40 <= len(text) <= 400:
                yield module, node.name, text


def scattered(items: Iterable[Item]) -> list[Item]:
    """The items in an order that has nothing to do with what they are, the same each time."""
    return sorted(items, key=lambda item: hashlib.sha256(repr(item).encode()).digest())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--source", type=Path, default=HERE.parents[1] / "src" / "lapis")
    parser.add_argument("--chats", type=int, default=400)
    parser.add_argument("--pairs", type=int, default=200)
    parser.add_argument("--sums", type=int, default=120)
    options = parser.parse_args()
    unique = {(module, name): text for module, name, text in documented(options.source)}
    found = scattered(unique.items())
    chats, pairs = found[: options.chats], found[options.chats : options.chats + options.pairs]
    asked = [
        [
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": QUESTIONS[n % len(QUESTIONS)].format(module=module, name=name)},
        ]
        for n, ((module, name), _) in enumerate(chats + pairs)
    ]
    with (HERE / "chats.jsonl").open("w") as file:
        for messages, (_, text) in zip(asked, chats, strict=False):
            answer = {"role": "assistant", "content": text}
            file.write(json.dumps({"messages": [*messages, answer]}, ensure_ascii=False) + "\n")
    with (HERE / "preferences.jsonl").open("w") as file:
        for n, (messages, (_, text)) in enumerate(zip(asked[len(chats) :], pairs, strict=True)):
            other = pairs[(n + 1) % len(pairs)][1]
            preference = {
                "input": {"messages": messages},
                "preferred_output": [{"role": "assistant", "content": text}],
                "non_preferred_output": [{"role": "assistant", "content": other}],
            }
            file.write(json.dumps(preference, ensure_ascii=False) + "\n")
    with (HERE / "sums.jsonl").open("w") as file:
        for one, other in scattered((one, other) for one in range(2, 20) for other in range(2, 20))[
            : options.sums
        ]:
            question = f"What is {one} + {other}? Answer with the number alone."
            line = {"messages": [{"role": "user", "content": question}], "answer": str(one + other)}
            file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
