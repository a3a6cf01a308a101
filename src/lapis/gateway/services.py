"""What the API and the console stand on: one object per process."""

from __future__ import annotations

from dataclasses import dataclass, field

from sqlalchemy.engine import Engine as Database

from lapis.gateway.admission import Admission
from lapis.gateway.batch_runner import BatchRunner
from lapis.gateway.batches import BatchStore
from lapis.gateway.counters import Counters
from lapis.gateway.eval_runner import EvalRunner
from lapis.gateway.eval_runs import EvalRuns
from lapis.gateway.evals import EvalStore
from lapis.gateway.files import FileStore
from lapis.gateway.fine_tuned import FineTunedModels
from lapis.gateway.fine_tuning import FineTuning
from lapis.gateway.fine_tuning_loop import FineTuningLoop
from lapis.gateway.graders import Graders
from lapis.gateway.idempotency import IdempotencyKeys
from lapis.gateway.inside import Answer, Post, no_handlers
from lapis.gateway.loops import Loop
from lapis.gateway.metering import Meter
from lapis.gateway.moderation import Moderator, read_moderator
from lapis.gateway.router import Router
from lapis.gateway.stored import StoredResponses
from lapis.gateway.uploads import UploadStore
from lapis.home import Home
from lapis.jobs.queue import JobQueue
from lapis.tenants.keys import Identity
from lapis.tenants.limits import Limits
from lapis.tenants.prices import Prices
from lapis.tenants.usage import UsageLedger

EVAL_RUNS = 2  # at a time


@dataclass
class Services:
    """The home, its database, and the parts of the gateway over them."""

    home: Home
    db: Database
    router: Router
    admission: Admission
    meter: Meter
    counters: Counters = field(default_factory=Counters)
    responses: StoredResponses = field(init=False)
    files: FileStore = field(init=False)
    uploads: UploadStore = field(init=False)
    batches: BatchStore = field(init=False)
    idempotency: IdempotencyKeys = field(init=False)
    moderator: Moderator = field(init=False)
    graders: Graders = field(init=False)
    evals: EvalStore = field(init=False)
    eval_runs: EvalRuns = field(init=False)
    post: Post = no_handlers  # the API's own handlers, once there is an app
    queue: JobQueue = field(init=False)
    fine_tuning: FineTuning = field(init=False)
    fine_tuned: FineTunedModels = field(init=False)
    loops: list[Loop] = field(default_factory=list)  # run beside the requests
    draining: bool = False  # what is under way is finished, nothing new is begun

    def __post_init__(self) -> None:
        self.responses = StoredResponses(self.db)
        self.files = FileStore(self.home.files, self.db, storage_limit=Limits(self.db).storage)
        self.uploads = UploadStore(self.files)
        self.batches = BatchStore(self.files)
        self.moderator = read_moderator(self.home.moderation)
        self.idempotency = IdempotencyKeys(self.db)
        prices = Prices(self.home.prices)
        self.queue = JobQueue(self.db, ledger=UsageLedger(self.db, prices=prices))
        self.fine_tuning = FineTuning(self.home, self.db, self.queue, self.files)
        self.fine_tuned = FineTunedModels(self.home, self.db)
        self.loops += [self.meter.tidy, self.files.tidy, self.uploads.tidy, self.idempotency.tidy]
        self.graders = Graders(self._post, self.router)
        self.loops.append(FineTuningLoop(self.fine_tuning).run)
        self.loops.append(BatchRunner(self).run)
        self.evals, self.eval_runs = EvalStore(self.db), EvalRuns(self.db)
        runner = EvalRunner(
            self.evals, self.eval_runs, self.files, self.admission.keys, self.graders, self._post
        )
        self.loops += [runner.work] * EVAL_RUNS

    def close(self) -> None:
        """End the engines, write the last usage, close the database."""
        self.graders.close()
        self.router.close()
        self.meter.close()
        self.db.dispose()

    async def _post(self, identity: Identity, path: str, body: bytes) -> Answer:
        """The handlers of the app that is made over these services later."""
        return await self.post(identity, path, body)
