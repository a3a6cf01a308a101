"""Batches and evals for a furnished home: some ended, and one of each under a lease that no server takes over."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Sequence
from itertools import cycle

from sqlalchemy.engine import Engine

from lapis.db import write
from lapis.gateway.batches import BatchStore, LineResult
from lapis.gateway.eval_runs import EvalRuns, ItemResult, ItemStatus, Used
from lapis.gateway.evals import EvalStore
from lapis.gateway.files import FileStore
from lapis.home import Home
from lapis.tables.batches import batches
from lapis.tables.evals import eval_runs
from lapis.tenants.keys import Identity
from lapis.tenants.tenant import DEFAULT, Role
from lapis.tenants.usage import Usage

DAY = 86_400.0
WHO = Identity(DEFAULT, DEFAULT, None, Role.OWNER.scopes)
CRITERIA = (
    {"type": "string_check", "name": "right year", "input": "{{sample.output_text}}",
     "reference": "{{item.year}}", "operation": "eq"},
    {"type": "text_similarity", "name": "short", "input": "{{sample.output_text}}",
     "reference": "{{item.year}}", "evaluation_metric": "fuzzy_match", "pass_threshold": 0.8},
)  # fmt: skip
ROWS = (
    ("When was the bridge built?", "1894"),
    ("When did the mill burn?", "1931"),
    ("When did <b>it</b> end?", "1902"),
)


def make_batches(home: Home, db: Engine) -> None:
    """A batch that was done, one whose file was wrong, one half done."""
    files = FileStore(home.files, db)
    store = BatchStore(files)
    line = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {"model": "tiny"}}
    text = (json.dumps(line) + "\n").encode()
    for name, status, endpoint, total, done in (
        ("reviews.jsonl", "completed", "/v1/chat/completions", 1200, 1188),
        ("letters.jsonl", "failed", "/v1/embeddings", 0, 0),
        ("tickets.jsonl", "", "/v1/chat/completions", 5000, 3120),
    ):
        file = files.put(DEFAULT, name, "batch", text)
        store.create(WHO, endpoint, file.id)
        claimed = store.claim((), Counter())
        assert claimed is not None
        batch, token = claimed
        if status != "failed":
            batch = store.begin(batch, token, total, "tiny")
            lines = range(1, total + 1 if status else done + 1)
            store.record(batch, token, [LineResult(n, n <= done, "{}", Usage(40, 12)) for n in lines])
        if status:
            errors = [{"code": "invalid", "message": "It is not JSON.", "line": 12, "param": None}]
            store.finish(batch, token, status, errors if status == "failed" else None)
        else:
            with write(db) as connection:
                mine = batches.update().where(batches.c.id == batch.id)
                connection.execute(mine.values(lease_until=time.time() + DAY))


def make_evals(db: Engine) -> None:
    """A run that is done and one that goes on."""
    made = EvalStore(db).create(
        DEFAULT, "years of the harbour", {"type": "object"}, True, CRITERIA, {"team": "poets"}
    )
    runs = EvalRuns(db)
    for name, model, total, ended in (
        ("poet of Monday", "tiny", 40, True),
        ("nightly", "harbour-1b", 200, False),
    ):
        source = {"type": "completions", "model": model, "source": {"type": "file_content", "content": []}}
        runs.create(WHO, made, name, {}, source, total)
        run = runs.claim()
        assert run is not None
        for number, (question, year) in zip(range(total if ended else 60), cycle(ROWS), strict=False):
            runs.record(run, _item(number, model, question, year))
        if ended:
            runs.finish(run, "completed")
        else:
            with write(db) as connection:
                mine = eval_runs.update().where(eval_runs.c.id == run.id)
                connection.execute(mine.values(lease_until=time.time() + DAY))


def _item(number: int, model: str, question: str, year: str) -> ItemResult:
    """Every seventh one is wrong, and the tenth could not be asked."""
    status: ItemStatus = "error" if number == 10 else "fail" if number % 7 == 3 else "pass"
    said = year if status == "pass" else "It was in 1895, or so they say."
    results = [
        {"name": criterion["name"], "type": criterion["type"], "passed": status == "pass",
         "score": float(status == "pass"), "sample": None}
        for criterion in CRITERIA
    ]  # fmt: skip
    wrong: Sequence[str] = ("429", "The queue of this model is full.") if status == "error" else ("", "")
    sample = {
        "output": [] if status == "error" else [{"role": "assistant", "content": said}],
        "error": {"code": wrong[0], "message": wrong[1]},
    }
    item = {"question": question, "year": year}
    used = {model: Used(40, 6, 0, 1)}
    return ItemResult(number, status, item, sample, [] if status == "error" else results, used)
