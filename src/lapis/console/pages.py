"""All pages by their path. NiceGUI is imported with this file; a page draws, and decides nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import NamedTuple

from fastapi import FastAPI
from nicegui import ui
from starlette.requests import Request

from lapis.console import (
    audit,
    batches,
    data,
    evals,
    files,
    jobs,
    members,
    models,
    overview,
    playground,
    run,
    training,
    tuning,
    usage,
)
from lapis.console.frame import Link, frame, who
from lapis.console.view import require_operator
from lapis.errors import AuthError, LapisError
from lapis.gateway.services import Services
from lapis.tenants.keys import Identity
from lapis.tenants.tenant import Scope

PATIENCE = 30.0  # seconds that a page may take to be drawn: a busy machine is no error


class Place(NamedTuple):
    """A page: where it is, what it is called, who draws it and the scope it needs."""

    path: str
    title: str
    show: Callable[..., Awaitable[None]]
    scope: Scope = Scope.MODELS_READ
    operator: bool = False  # whether it shows what belongs to no project


PLACES = (
    Place("/", "Overview", overview.show),
    Place("/playground", "Playground", playground.show, Scope.MODELS_USE),
    Place("/training", "Training", training.show),
    Place("/data", "Data", data.show, Scope.ADMIN, operator=True),
    Place("/models", "Models", models.show),
    Place("/files", "Files", files.show, Scope.WORK_READ),
    Place("/batches", "Batches", batches.show, Scope.WORK_READ),
    Place("/evals", "Evals", evals.show, Scope.WORK_READ),
    Place("/jobs", "Jobs", jobs.show, Scope.WORK_READ),
    Place("/usage", "Usage", usage.show),
    Place("/members", "Keys and members", members.show),
    Place("/audit", "Audit", audit.show, Scope.ADMIN, operator=True),
)
PATIENCE = 30.0  # seconds for a page's first content; a busy machine is no error
DETAILS = (  # reached from a page, which stays marked in the navigation
    Place("/training/fine-tune", "Training", tuning.show_form, Scope.WORK_WRITE),
    Place("/training/fine-tune/{job_id}", "Training", tuning.show_job, Scope.WORK_READ),
    Place("/data/{name}", "Data", data.show_dataset, Scope.ADMIN, operator=True),
    Place("/training/runs/{run_id}", "Training", run.show),
    Place("/models/{reference}", "Models", models.show_release, Scope.ADMIN, operator=True),
    Place("/evals/{eval_id}/runs/{run_id}", "Evals", evals.show_run, Scope.WORK_READ),
    Place("/jobs/{job_id}", "Jobs", jobs.show_job, Scope.WORK_READ),
)


def create_pages(services: Services) -> FastAPI:
    """The app of all pages, to be mounted. NiceGUI keeps one set of pages in a process."""
    for place in (*PLACES, *DETAILS):
        title = f"{place.title} · Lapis"
        page = ui.page(place.path, title=title, language="en-US", response_timeout=PATIENCE)
        page(_page(services, place))
    app = FastAPI(openapi_url=None)
    files.add_routes(app, services)
    data.add_routes(app, services)
    ui.run_with(
        app,
        mount_path="/",
        title="Lapis",
        dark=None,
        tailwind=False,
        language="en-US",
        show_welcome_message=False,
    )
    return app


def _page(services: Services, place: Place) -> Callable[[Request], Awaitable[None]]:
    async def page(request: Request) -> None:
        session = request.scope["lapis.session"]
        identity = await asyncio.to_thread(session.identity)
        links = [Link(other.path, other.title) for other in PLACES if _may_see(identity, other)]
        here = next(other.path for other in PLACES if other.title == place.title)
        name = await asyncio.to_thread(who, services, identity)
        places = await asyncio.to_thread(session.places)
        with frame(services, session, identity, name, places, place.title, links, here) as view:
            try:
                identity.require(place.scope)
                if place.operator:
                    require_operator(identity)
                await place.show(view, **request.path_params)
            except LapisError as error:
                view.complain(error)

    return page


def _may_see(identity: Identity, place: Place) -> bool:
    try:
        identity.require(place.scope)
        if place.operator:
            require_operator(identity)
    except AuthError:
        return False
    return True
