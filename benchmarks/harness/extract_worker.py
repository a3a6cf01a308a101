"""trafilatura over the pages of a WARC file, in its own environment; prints CPU seconds and texts as JSON.

    python extract_worker.py fast|precision PAGES.warc.gz [LEAST_SECONDS]

Reading is fastwarc's, as in Lapis, so that only the extractors differ. With LEAST_SECONDS it stops once it has taken
that long, and says how many pages it has done.
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from pathlib import Path

import trafilatura
from fastwarc.warc import ArchiveIterator, WarcRecordType

OPTIONS = {"fast": {"fast": True}, "precision": {"favor_precision": True}}


def main() -> None:
    """Extract and print."""
    warnings.simplefilter("ignore")
    mode, path, limit = (
        sys.argv[1],
        Path(sys.argv[2]),
        float(sys.argv[3]) if len(sys.argv) > 3 else float("inf"),
    )
    trafilatura.extract("<html><body><p>what is loaded when first used</p></body></html>")
    texts, size = [], 0
    began = time.process_time()
    with path.open("rb") as file:
        for record in ArchiveIterator(file, record_types=WarcRecordType.response, parse_http=True):
            html = record.reader.read()
            size += len(html)
            texts.append(trafilatura.extract(html, include_comments=False, **OPTIONS[mode]) or "")
            if time.process_time() - began > limit:
                break
    seconds = time.process_time() - began
    print(json.dumps({"seconds": seconds, "pages": len(texts), "bytes": size, "texts": texts}))


if __name__ == "__main__":
    main()
