"""Data: the prepared datasets, what is in them, their reports; how to trace and remove documents."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from nicegui import ui
from starlette.requests import Request
from starlette.responses import FileResponse, PlainTextResponse, Response

from lapis.console.parts import Facts, Text, copy_button, link, panel
from lapis.console.session import Session
from lapis.console.table import Cell, Column, Row, Table
from lapis.console.view import PATH, View, require_operator, size, when
from lapis.errors import LapisError, NotFoundError
from lapis.gateway.services import Services

MANIFEST, REPORT = "manifest.json", "report.html"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
DATASETS = (
    Column("name", "Dataset"),
    Column("documents", "Documents", "number"),
    Column("tokens", "Tokens", "number"),
    Column("size", "Text", "number"),
    Column("heldout", "Held out", "number"),
    Column("licences", "Licences"),
    Column("made", "Made (UTC)", "time"),
)
LICENCES = (
    Column("source", "Source"),
    Column("licence", "Licence"),
    Column("documents", "Documents", "number"),
    Column("tokens", "Tokens", "number"),
    Column("size", "Text", "number"),
)
MOST_LICENCES = 3  # named in a row
# The report is one page without scripts: nothing in it may run, or be fetched, whatever the documents say.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; sandbox; frame-ancestors 'self'"


async def show(view: View) -> None:
    """Draw the page of all datasets."""
    table = Table("Datasets", DATASETS, "No dataset yet. Prepare one with", "lapis data prepare RECIPE.toml")

    async def look() -> None:
        found = await asyncio.to_thread(manifests, view.services.home.data)
        table.fill([_row(folder, manifest) for folder, manifest in found])

    await view.repeat(look, every=10.0)


async def show_dataset(view: View, name: str) -> None:
    """Draw the page of one dataset."""
    folder = await asyncio.to_thread(dataset_folder, view.services.home.data, name)
    manifest = json.loads((folder / MANIFEST).read_text())
    with ui.element("div").classes("head"):
        Text(f"Dataset {folder.name}", "h2")
        if (folder / REPORT).exists():
            link("Open the report", f"{PATH}/data/{folder.name}/report", "button").props('target="_blank"')
    Facts().fill(_facts(manifest))
    licences = Table("Sources and licences", LICENCES, "The dataset is empty.")
    licences.fill([_licence(row) for row in sorted(manifest["licences"], key=lambda row: -row["tokens"])])
    if (folder / REPORT).exists():
        with panel("Report"):
            frame = ui.element("iframe").classes("report").props('title="The dataset\'s report"')
            frame.props["src"] = f"{PATH}/data/{folder.name}/report"
    with panel("Trace and remove"):
        Text("Each token can be followed back to its document, and documents can be left out for good:", "p")
        for what, command in (
            ("Which documents tokens 0 to 100 come from", f"lapis data trace {folder} 0:100"),
            ("What leaving out a licence would mean", f"lapis data remove {folder} --licence NAME --dry-run"),
        ):
            Text(what).classes("label")
            with ui.element("div").classes("row"):
                copy_button(Text(command, "code"))


def add_routes(app: FastAPI, services: Services) -> None:
    """The reports, as they were written."""

    @app.get("/data/{name}/report")
    def report(request: Request, name: str) -> Response:
        session: Session = request.scope["lapis.session"]
        try:
            require_operator(session.identity())
            path = dataset_folder(services.home.data, name) / REPORT
        except LapisError as error:
            return PlainTextResponse(str(error), error.http_status)
        if not path.exists():
            return PlainTextResponse("This dataset has no report.", 404)
        headers = {"content-security-policy": POLICY, "x-frame-options": "SAMEORIGIN"}
        return FileResponse(path, media_type="text/html", headers=headers)


def manifests(folder: Path) -> list[tuple[Path, dict[str, Any]]]:
    """The prepared datasets of a home with their manifests, the newest first."""
    if not folder.is_dir():
        return []
    paths = [path for path in folder.glob(f"*/{MANIFEST}") if NAME.fullmatch(path.parent.name)]
    paths.sort(key=lambda path: path.stat().st_mtime, reverse=True)
    found = [(path.parent, json.loads(path.read_text())) for path in paths]
    return [(place, manifest) for place, manifest in found if "shards" in manifest]


def dataset_folder(folder: Path, name: str) -> Path:
    """The folder of a dataset. Raises NotFoundError."""
    found = folder / name
    if not NAME.fullmatch(name) or not (found / MANIFEST).is_file():
        raise NotFoundError(f"There is no dataset {name[:80]!r}.", hint=f"All datasets are at {PATH}/data.")
    return found


def _row(folder: Path, manifest: Mapping[str, Any]) -> Row:
    cells = {
        "name": Cell(folder.name, href=f"{PATH}/data/{folder.name}"),
        "documents": manifest["documents"],
        "tokens": manifest["tokens"],
        "size": Cell(size(manifest["bytes"]), value=manifest["bytes"]),
        "heldout": manifest["heldout"]["documents"],
        "licences": _named(manifest["licences"]),
        "made": when((folder / MANIFEST).stat().st_mtime),
    }
    return Row(folder.name, cells)


def _named(licences: Sequence[Mapping[str, Any]]) -> Cell:
    """The licences with the most tokens."""
    tokens: dict[str, int] = {}
    for row in licences:
        tokens[row["licence"] or "unknown"] = tokens.get(row["licence"] or "unknown", 0) + row["tokens"]
    names = sorted(tokens, key=lambda name: -tokens[name])
    more = f" and {len(names) - MOST_LICENCES} more" if len(names) > MOST_LICENCES else ""
    return Cell(", ".join(names[:MOST_LICENCES]) + more, hint=", ".join(names))


def _licence(row: Mapping[str, Any]) -> Row:
    cells = {
        "source": row["source"],
        "licence": row["licence"] or "unknown",
        "documents": row["documents"],
        "tokens": row["tokens"],
        "size": Cell(size(row["bytes"]), value=row["bytes"]),
    }
    return Row(f"{row['source']} {row['licence']}", cells)


def _facts(manifest: Mapping[str, Any]) -> dict[str, str]:
    tokenizer, heldout, removed = manifest["tokenizer"], manifest["heldout"], manifest.get("removed")
    return {
        "Digest": manifest["digest"],
        "Documents": f"{manifest['documents']:,}",
        "Tokens": f"{manifest['tokens']:,} in {len(manifest['shards']):,} shards",
        "Text": size(manifest["bytes"]),
        "Held out": f"{heldout['documents']:,} documents, {size(heldout['bytes'])}",
        "Removed": f"{removed['documents']:,} documents, {removed['tokens']:,} tokens" if removed else "",
        "Tokenizer": f"{tokenizer['digest'][:12]}, {tokenizer['vocab_size']:,} tokens",
        "Made from": str(manifest.get("parent") or ""),
    }
