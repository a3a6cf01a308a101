"""Evals: the runs of the project and how they came out; of a run the items, those that failed first."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from typing import Any

from nicegui import ui

from lapis.console.parts import Facts, Figures, Text, button, confirm
from lapis.console.table import Act, Cell, Column, Row, Table, Tone
from lapis.console.view import PATH, View, when
from lapis.gateway.eval_runs import OPEN, EvalRun, ItemStatus, OutputItem
from lapis.gateway.evals import Eval
from lapis.tenants.keys import Identity
from lapis.tenants.tenant import Scope

SHOWN = 200
LONGEST = 600  # characters of a text in a table
RUNS = (
    Column("name", "Run"),
    Column("eval", "Eval"),
    Column("model", "Model"),
    Column("status", "State"),
    Column("done", "Done", "number"),
    Column("passed", "Passed", "number"),
    Column("failed", "Failed", "number"),
    Column("errored", "Errored", "number"),
    Column("created", "Created (UTC)", "time"),
)
CRITERIA = (
    Column("name", "Criterion"),
    Column("passed", "Passed", "number"),
    Column("failed", "Failed", "number"),
    Column("share", "Share passed", "number"),
)
ITEMS = (
    Column("number", "Item", "number"),
    Column("status", "Came out"),
    Column("why", "Why"),
    Column("item", "Data", "code"),
    Column("answer", "Answer"),
)
PASSED = tuple(column for column in ITEMS if column.field != "why")
TONES: dict[str, Tone] = {
    "queued": "idle",
    "in_progress": "busy",
    "completed": "good",
    "canceled": "idle",
    "failed": "bad",
}
OUTCOMES: dict[str, Tone] = {"pass": "good", "fail": "bad", "error": "warn"}
CANCEL = Act("cancel", "Cancel", danger=True)


async def show(view: View) -> None:
    """Draw the page of all runs."""
    of: dict[str, str] = {}  # the eval of each run that is shown

    def act(_: str, run_id: str) -> None:
        _ask_to_cancel(view, of[run_id], run_id)

    table = Table(
        "Eval runs", RUNS, "No eval was run yet. Run one with", "client.evals.runs.create", on_act=act
    )

    async def look() -> None:
        found = await asyncio.to_thread(view.services.eval_runs.recent, view.identity.project_id, SHOWN)
        of.update((run.id, run.eval_id) for run, _ in found)
        table.fill([run_row(run, name, view.may(Scope.WORK_WRITE)) for run, name in found])

    await view.repeat(look)


async def show_run(view: View, eval_id: str, run_id: str) -> None:
    """Draw the page of one run."""
    project = view.identity.project_id
    made_of = await asyncio.to_thread(view.services.evals.get, project, eval_id)
    await asyncio.to_thread(view.services.eval_runs.get, project, eval_id, run_id)
    page = _RunPage(view, made_of, run_id)
    await view.repeat(page.look)


class _RunPage:
    """One run, as its items come out."""

    def __init__(self, view: View, made_of: Eval, run_id: str) -> None:
        self.view, self.made_of, self.run_id = view, made_of, run_id
        with ui.element("div").classes("head"):
            self.name = Text("", "h2")
            with ui.element("div").classes("row"):
                self.status = Text("").classes("tone")
                self.cancel = button("Cancel", lambda: _ask_to_cancel(view, made_of.id, run_id), "danger")
        self.figures = Figures("Passed", "Failed", "Errored")
        self.facts = Facts()
        self.criteria = Table("Criteria", CRITERIA, "No criterion.")
        self.failed = Table("What failed", ITEMS, "Nothing failed so far.")
        self.passed = Table("What passed", PASSED, "Nothing passed so far.")

    async def look(self) -> None:
        """Show the run as it is now."""
        runs = self.view.services.eval_runs
        run = await asyncio.to_thread(runs.get, self.view.identity.project_id, self.made_of.id, self.run_id)
        counts = run.counts
        self.name.text = run.name
        self.status.text = run.status.replace("_", " ")
        self.status.classes(replace=f"tone {TONES[run.status]}")
        self.cancel.set_visibility(run.status in OPEN and self.view.may(Scope.WORK_WRITE))
        for name, count in (
            ("Passed", counts.passed),
            ("Failed", counts.failed),
            ("Errored", counts.errored),
        ):
            self.figures.put(name, f"{count:,}", f"of {run.total:,}")
        self.facts.fill(_facts(run, self.made_of))
        self.criteria.fill(criterion_rows(self.made_of, run))
        wrong = await self._items(run, "fail") + await self._items(run, "error")
        self.failed.fill([item_row(item) for item in sorted(wrong, key=lambda item: item.number)[:SHOWN]])
        self.passed.fill([item_row(item) for item in await self._items(run, "pass")])

    async def _items(self, run: EvalRun, status: ItemStatus) -> list[OutputItem]:
        runs = self.view.services.eval_runs
        found, _ = await asyncio.to_thread(
            runs.items, run, status=status, after=None, limit=SHOWN, order="asc"
        )
        return list(found)


def run_row(run: EvalRun, eval_name: str, may_cancel: bool) -> Row:
    """A run in a line."""
    counts = run.counts
    cells = {
        "name": Cell(run.name, href=f"{PATH}/evals/{run.eval_id}/runs/{run.id}", hint=run.id),
        "eval": eval_name,
        "model": str(run.data_source.get("model", "")),
        "status": Cell(run.status.replace("_", " "), tone=TONES[run.status]),
        "done": Cell(f"{counts.total:,} of {run.total:,}", share=counts.total / run.total, value=counts.total)
        if run.total
        else "",
        "passed": counts.passed,
        "failed": counts.failed,
        "errored": counts.errored,
        "created": when(run.created_at),
    }
    return Row(run.id, cells, (CANCEL,) if may_cancel and run.status in OPEN else ())


def criterion_rows(made_of: Eval, run: EvalRun) -> list[Row]:
    """How many items each criterion let pass."""
    rows = []
    for number, (criterion, pair) in enumerate(
        zip(made_of.testing_criteria, run.counts.criteria, strict=True)
    ):
        passed, failed = pair
        share = passed / (passed + failed) if passed + failed else None
        told = Cell() if share is None else Cell(f"{share:.0%}", share=share, value=share)
        cells = {"name": criterion["name"], "passed": passed, "failed": failed, "share": told}
        rows.append(Row(str(number), cells))
    return rows


def item_row(item: OutputItem) -> Row:
    """An item in a line: what was asked, what came back, and what was wrong with it."""
    sample: Mapping[str, Any] = item.body["sample"]
    answer = "\n".join(str(message.get("content") or "") for message in sample.get("output") or ())
    cells = {
        "number": item.number,
        "status": Cell(
            {"pass": "passed", "fail": "failed", "error": "error"}[item.status], tone=OUTCOMES[item.status]
        ),
        "why": _short(_why(item.body["results"], sample)),
        "item": _short(json.dumps(item.body["item"], ensure_ascii=False)),
        "answer": _short(answer),
    }
    return Row(item.id, cells)


def _why(results: Sequence[Mapping[str, Any]], sample: Mapping[str, Any]) -> str:
    """The criteria that an item did not pass; or why there was nothing to grade."""
    error = sample.get("error") or {}
    if error.get("message"):
        return f"{error['code']}: {error['message']}"
    return "; ".join(_verdict(result) for result in results if not result["passed"])


def _verdict(result: Mapping[str, Any]) -> str:
    if "errors" in result:
        return f"{result['name']}: {result.get('message') or ', '.join(result['errors'])}"
    label = (result.get("sample") or {}).get("label")
    return f"{result['name']}: " + (str(label) if label else f"score {result['score']:.3g}")


def _short(text: str) -> str:
    return text if len(text) <= LONGEST else text[:LONGEST] + " …"


def _facts(run: EvalRun, made_of: Eval) -> dict[str, str]:
    tokens = sum(used.prompt_tokens + used.completion_tokens for used in run.counts.usage.values())
    return {
        "Wrong": (run.error or {}).get("message", ""),
        "Eval": f"{made_of.name} ({made_of.id})" if made_of.name != made_of.id else made_of.id,
        "Run": run.id,
        "Model": str(run.data_source.get("model", "")),
        "Tokens": f"{tokens:,}" if tokens else "",
        "Created": f"{when(run.created_at)} UTC",
    }


def _ask_to_cancel(view: View, eval_id: str, run_id: str) -> None:
    def work(identity: Identity) -> EvalRun:
        return view.services.eval_runs.cancel(identity.project_id, eval_id, run_id)

    confirm(
        "Cancel this run?",
        "It ends now. The items that it has graded stay.",
        "Cancel the run",
        lambda: view.act(Scope.WORK_WRITE, work, "The run is cancelled."),
    )
