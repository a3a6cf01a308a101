"""A home with something on every page: models, runs, a release, jobs, keys, usage. Only the engine is made up."""

from __future__ import annotations

import math
import os
import time

from sqlalchemy.engine import Engine

from lapis import config
from lapis.data.pipeline import prepare
from lapis.db import open_database
from lapis.home import Home
from lapis.jobs.job import JobSpec, Resources
from lapis.jobs.queue import JobQueue
from lapis.release.registry import Registry
from lapis.tenants.invites import Invites
from lapis.tenants.keys import ApiKeys, Identity
from lapis.tenants.prices import Prices
from lapis.tenants.quota import Quota
from lapis.tenants.tenant import DEFAULT, Role, Tenants
from lapis.tenants.usage import Usage, UsageLedger
from lapis.tenants.users import Users
from lapis.train.recipe import Recipe
from lapis.train.run import Run
from tests.browser.background import make_batches, make_evals
from tests.corpus import write_corpus
from tests.served import model_folder

DAY = 86_400
REPORT = {
    "bits_per_byte": 1.618, "low": 1.571, "high": 1.664, "yardsticks": {"5-gram": 1.842, "xz -9e": 2.301},
    "weights": "", "subject": "run poems at step 400",
}  # fmt: skip


PRICES = """[models.tiny]
prompt = 0.8
completion = 2.4

[models.harbour-1b]
prompt = 3.0
cached = 0.3
completion = 12.0
"""
RECIPE_OF_DATA = {
    "name": "letters",
    "data": {
        "sources": [{"name": "library", "path": "", "licence": "PSF-2.0"}],
        "heldout": {"max_bytes": 20_000},
    },
    "tokenizer": {"vocab_size": 384},
    "model": {"name": "tiny"},
    "train": {"steps": 1, "sequence": 64},
}


def furnish(home: Home) -> str:
    """Fill an empty home. Returns the text of an administrator's key."""
    home.prices.parent.mkdir(parents=True, exist_ok=True)
    home.prices.write_text(PRICES)
    make_dataset(home)
    for name in ("tiny", "harbour-1b"):
        model_folder(home.models / name, name)
    for number, (name, steps, ended) in enumerate(
        [("poems", 400, "stopped"), ("poems", 400, "finished"), ("letters", 160, "")]
    ):
        make_run(home, name, steps, ended, slope=0.8 + 0.25 * number, suffix=f"{number}")
    db = open_database(home.database_url)
    try:
        tenants = Tenants(db)
        for name in ("search", "support"):
            tenants.create_project(name, "os:ada")
        search = tenants.project("search")
        tenants.set_quota(search.id, Quota(tokens_per_day=2_000_000, spend_per_month=50_00), "os:ada")
        make_people(db, search.id)
        keys = ApiKeys(db)
        text = keys.create("ada's laptop", "os:ada", scopes=Role.OWNER.scopes)[1]
        nightly = keys.create("nightly", "os:ada", project="search", expires_at=time.time() + 30 * DAY)[0]
        old = keys.create("old laptop", "os:ada")[0]
        keys.revoke(old.id, "os:ada")
        make_usage(home, db, nightly.id)
        registry = Registry(home, db)
        registry.create(
            "poet",
            home.models / "tiny",
            Run.list(home)[1].id,
            REPORT,
            "os:ada",
            {"licences": {"CC0-1.0": 4120, "CC-BY-4.0": 815}},
        )
        registry.create("poet", home.models / "harbour-1b", None, None, "os:ada")
        make_batches(home, db)
        make_evals(db)
        queue = JobQueue(db)
        wanted = (
            ("train letters", Resources(float(os.cpu_count() or 1), 0)),
            ("batch of 12,000 requests", Resources(1.0, 0)),
            ("train poems on 8 GPUs", Resources(16.0, 8)),
        )
        for name, resources in wanted:
            queue.submit(JobSpec(name, ("sleep", "600"), resources), "os:ada")
        cancelled = queue.submit(JobSpec("train poems", ("lapis", "train", "poems.toml")), "os:ada")
        queue.cancel(cancelled.id, "os:ada")
    finally:
        db.dispose()
    return text


def make_dataset(home: Home) -> None:
    """A small real dataset, with its report."""
    texts = write_corpus(home.root / "texts", ("json",))
    RECIPE_OF_DATA["data"]["sources"][0]["path"] = str(texts)  # type: ignore[index]
    recipe = config.parse(RECIPE_OF_DATA, Recipe)
    assert recipe.data is not None
    prepare(recipe.data, recipe.tokenizer, home, workers=1)


def make_people(db: Engine, project_id: str) -> None:
    """Two people and an invitation."""
    users = Users(db)
    users.add("ada@example.org", Role.OWNER, "os:ada", name="Ada")
    grace = users.add("grace@example.org", Role.READER, "os:ada", name="Grace")
    users.join(project_id, grace.id, Role.MEMBER, "os:ada")
    Invites(db).create("alan@example.org", Role.READER, "os:ada", places={project_id: "member"})


def make_run(home: Home, name: str, steps: int, ended: str, slope: float, suffix: str) -> Run:
    """A run as the trainer would have written it."""
    run = Run.create(home, name, RECIPE.format(name=name), f"{suffix}bc{suffix}ef")
    write = run.events.write
    spent = {"start": 3.2}
    write("start", parameters=1_180_000, tokens=2_400_000, kernels="avx512", bit_exact=True, threads=2, gap=0.0,
          dataset="5f0c1be2a9", clock={"boot": "a", "monotonic": 10.0})  # fmt: skip
    for step in range(1, steps + 1):
        noise = 0.05 * math.sin(step * 1.7) + 0.03 * math.cos(step * 0.37)
        loss = 1.6 + 4.0 * math.exp(-slope * step / 60) + noise
        spent = {
            "start": 3.2,
            "data": 0.02 * step,
            "step": 0.31 * step,
            "checkpoint": 0.01 * step,
            "compile": 4.5,
            "elapsed": 7.9 + 0.35 * step,
        }
        facts = {
            "lr": round(3e-4 * min(1, step / 40), 6),
            "tokens": step * 4096,
            "seconds": round(0.31 * step, 2),
        }
        speed = round(11800 + 900 * math.sin(step / 9))
        write("step", step=step, loss=round(loss, 4), tokens_per_s=speed, spent=spent, **facts)
        if step % 100 == 0:
            write(
                "samples",
                step=step,
                samples=[dict(zip(("prompt", "text"), one, strict=True)) for one in SAMPLES],
            )
            write(
                "checkpoint",
                step=step,
                folder=f"step-{step}",
                digest=f"{step:08x}c0ffee",
                score=round(loss + 0.1, 4),
                stall=0.1,
                spent=spent,
            )
    if ended:
        write("end", reason=ended, step=steps, spent=spent)
    return run


SAMPLES = (
    (
        "The river saw ",
        "a heron this morning, and the heron saw the river.\nNeither of them spoke of it <b>twice</b>.",
    ),
    (
        "Of all the boats",
        ", the smallest came home first: its sail was patched with a letter nobody had read.",
    ),
)
RECIPE = """name = "{name}"

[model]
size = "1m"

[train]
steps = 400
batch_tokens = 4096
lr = 3e-4
seed = 7
"""


def make_usage(home: Home, db: Engine, nightly: str) -> None:
    """Three weeks of requests."""
    now = time.time()
    for day in range(21):
        for number, (project, key, model) in enumerate(
            [(DEFAULT, None, "tiny"), ("search", nightly, "harbour-1b"), ("search", nightly, "tiny")]
        ):
            at = now - day * DAY
            ledger = UsageLedger(db, clock=lambda at=at: at, prices=Prices(home.prices))  # type: ignore[misc]
            project_id = Tenants(db).project(project).id
            identity = Identity(DEFAULT, project_id, key, Role.MEMBER.scopes)
            for request in range(1 + (day * 7 + number * 3) % 4):
                used = Usage(
                    900 + 130 * ((day * 5 + request) % 7),
                    400 + 90 * ((day + number) % 5),
                    200 * (request % 3),
                )
                ledger.settle(ledger.reserve(identity, model, used.total_tokens), used)
