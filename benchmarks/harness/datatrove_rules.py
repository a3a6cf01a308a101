"""datatrove's quality blocks over JSON lines of texts, in datatrove's own environment; says verdicts and seconds.

    python datatrove_rules.py TEXTS.jsonl own|spaces

"own" splits words as datatrove does (spaCy); "spaces" lets it take what white space separates for words, so that
only the rules differ from ours.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from datatrove.data import Document
from datatrove.pipeline.filters import (
    C4QualityFilter,
    FineWebQualityFilter,
    GopherQualityFilter,
    GopherRepetitionFilter,
)
from datatrove.utils import text as text_utils


def blocks() -> dict[str, Any]:
    """The blocks of FineWeb's order, as its example sets them up."""
    return {
        "gopher-repetition": GopherRepetitionFilter(),
        "gopher-quality": GopherQualityFilter(),
        "c4": C4QualityFilter(),
        "c4 without its end rule": C4QualityFilter(filter_no_terminal_punct=False),
        "fineweb 0.01": FineWebQualityFilter(),
        "fineweb 0.1": FineWebQualityFilter(char_duplicates_ratio=0.1),
    }


def main() -> None:
    texts = [json.loads(line) for line in Path(sys.argv[1]).read_text(encoding="utf-8").splitlines()]
    if sys.argv[2] == "spaces":
        for name in ("gopher_quality_filter", "gopher_repetition_filter", "fineweb_quality_filter"):
            module = sys.modules[f"datatrove.pipeline.filters.{name}"]
            module.split_into_words = lambda text, language=None: text.split()  # type: ignore[attr-defined]
    found: dict[str, dict[str, Any]] = {}
    for name, block in blocks().items():
        block.filter(Document(text="Load the splitter. " * 20, id="0"))
        text_utils.split_into_parts.cache_clear()
        began = time.process_time()
        verdicts = [block.filter(Document(text=text, id=str(n))) for n, text in enumerate(texts)]
        seconds = time.process_time() - began
        reasons = ["" if verdict is True else verdict[1] for verdict in verdicts]
        found[name] = {"seconds": seconds, "reasons": reasons}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
