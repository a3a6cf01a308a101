"""One process on one machine: the engines, the gateway, the API and the console over one home."""

from __future__ import annotations

import asyncio
import errno
import resource
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from ipaddress import ip_address
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn

from lapis.api.app import create_app
from lapis.audit import AuditLog
from lapis.console.mount import mount
from lapis.db import connect, open_database
from lapis.errors import ConfigError, ConflictError, IntegrityError, NotFoundError
from lapis.gateway.admission import Admission
from lapis.gateway.deployment import Build, Record
from lapis.gateway.fine_tuned import FineTunedModels
from lapis.gateway.loops import in_thread
from lapis.gateway.memory import MemoryBudget
from lapis.gateway.metering import Meter
from lapis.gateway.router import Router
from lapis.gateway.services import Services
from lapis.gateway.settings import server_settings
from lapis.hashing import digest_file
from lapis.home import Home
from lapis.inference.engine import Engine, LocalEngine
from lapis.jobs.cluster import make_executor
from lapis.jobs.controller import Controller
from lapis.model import manifest
from lapis.release.registry import Registry, Servable
from lapis.release.release import SERVABLE
from lapis.tenants.admin_keys import AdminKeys
from lapis.tenants.keys import ApiKeys
from lapis.tenants.prices import Prices
from lapis.tenants.usage import UsageLedger

ACTOR = "server"
DRAIN_SECONDS = 30  # what SIGTERM gives to answers under way
INTERRUPT_SECONDS = 1  # what Ctrl-C gives to them
# How long a connection may wait for the headers of a request (its body has a limit of its own). Clients take an
# idle connection for alive for 5 s, so a shorter time would cut off requests that are just being sent.
HEADER_SECONDS = 20.0
PORTS_TO_TRY = 100
OPEN_FILES = 65_536
CONTROL_SECONDS = 0.5  # between two looks at the queue of jobs
# How long a thread may keep the interpreter: with Python's 5 ms the engine's thread waits for the event loop, and 16
# streams get a third fewer tokens.
SWITCH_SECONDS = 0.0005

Load = Callable[[Path, str], Engine]  # a model folder and its name; quickstart and serve use LocalEngine's


@dataclass(frozen=True)
class RunningServer:
    """A server that answers. `url` is what the official client takes as base_url."""

    url: str
    models: tuple[str, ...]
    services: Services


def serve(
    home: Home,
    models: Sequence[str] = (),
    host: str = "127.0.0.1",
    port: int = 8000,
    *,
    console: bool = True,
    ready: Callable[[RunningServer], None] | None = None,
    load: Load = LocalEngine.load,
    memory: MemoryBudget | None = None,
) -> None:
    """Serve until SIGTERM (answers under way are finished first) or Ctrl-C, which raises KeyboardInterrupt.

    Named models are loaded before `ready` is called; without names everything servable is listed at once and
    each model is loaded at its first use, for which others that are idle make room in `memory`. Raises
    NotFoundError, ConflictError (port in use), ConfigError (no API key for an address that others can reach,
    named models that do not fit into `memory`).
    """
    _allow_many_connections()
    with _prepared(home, models, host, port, console, load, memory) as (server, listener, running):
        if ready is not None:
            server.when_started = lambda: ready(running)
        asyncio.run(server.serve(sockets=[listener]))
    if server.interrupted:
        raise KeyboardInterrupt


def _allow_many_connections() -> None:
    """Raise this process's limit on open files, usually 1,024, as far as it may: each connection is one."""
    limit, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES if most == resource.RLIM_INFINITY else min(most, OPEN_FILES)
    if limit != resource.RLIM_INFINITY and limit < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))


@contextmanager
def running_server(
    home: Home,
    models: Sequence[str] = (),
    host: str = "127.0.0.1",
    port: int = 0,
    *,
    console: bool = False,
    load: Load = LocalEngine.load,
    memory: MemoryBudget | None = None,
) -> Iterator[RunningServer]:
    """A server in a thread of this process, by default on a free port; ended when the block is left."""
    with _prepared(home, models, host, port, console, load, memory) as (server, listener, running):
        thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])), name="server")
        thread.start()
        try:
            while not server.started and thread.is_alive():
                time.sleep(0.005)
            if not server.started:
                raise ConflictError("The server did not start; its log has the reason.")
            yield running
        finally:
            server.should_exit = True
            thread.join()


@contextmanager
def _prepared(
    home: Home,
    models: Sequence[str],
    host: str,
    port: int,
    console: bool,
    load: Load,
    memory: MemoryBudget | None,
) -> Iterator[tuple[Server, socket.socket, RunningServer]]:
    sys.setswitchinterval(SWITCH_SECONDS)
    listener = _listen(host, port)
    try:
        services = make_services(home, models, host, load, memory)
        try:
            names = tuple(servable.name for servable, _ in services.router.models())
            services.router.load(models)
            server = _make_server(services, console)
            yield server, listener, RunningServer(_url(host, listener), names, services)
        finally:
            services.close()
    finally:
        listener.close()


def make_services(
    home: Home, models: Sequence[str], host: str, load: Load, memory: MemoryBudget | None = None
) -> Services:
    """The gateway over a home. Raises ConfigError (open door, no key), NotFoundError (nothing to serve)."""
    db = open_database(home.database_url)
    try:
        prices = Prices(home.prices)
        ledger = UsageLedger(db, prices=prices)
        meter = Meter(ledger, _impatient(home.database_url, prices))
        keys = ApiKeys(db, later=meter.write)
        have_keys = keys.exist() or AdminKeys(db).exist()
        signed_in = server_settings(home).sign_in is not None
        if not have_keys and not signed_in and not _is_loopback(host):
            raise ConfigError(
                f"{host} can be reached from other machines, and there is no API key yet.",
                hint="Make one first: lapis keys create NAME",
            )
        registry = Registry(home, db)
        catalog = _catalog(registry, FineTunedModels(home, db), models)
        router = Router(catalog, _builder(registry, load), memory, _recorder(AuditLog(db)))
        admission = Admission(keys, keys_required=have_keys or not _is_loopback(host))
        ledger.expire()  # what a killed server had reserved
        services = Services(home, db, router, admission, meter)
        controller = Controller(services.queue, make_executor(home))
        services.loops.append(in_thread(partial(controller.run, seconds=CONTROL_SECONDS)))
        return services
    except BaseException:
        db.dispose()
        raise


def _impatient(url: str, prices: Prices) -> UsageLedger | None:
    """The ledger for whoever must not wait; only a file can be written so soon."""
    return UsageLedger(connect(url, patient=False), prices=prices) if url.startswith("sqlite:") else None


def _catalog(
    registry: Registry, fine_tuned: FineTunedModels, models: Sequence[str]
) -> Callable[[], list[Servable]]:
    found = {servable.name for servable in registry.servables()}
    if not found and not models:
        raise NotFoundError(
            "There is no model to serve yet.",
            hint="Train one with `lapis quickstart`, or fetch one with `lapis pull NAME`.",
        )
    for name in models:
        if name not in found:
            registry.resolve(name)  # raises, naming why

    def catalog() -> list[Servable]:
        found = registry.servables()
        bases = {servable.base for servable in found if servable.name in models}
        wanted = {*models, *bases}
        served = [servable for servable in found if not models or servable.name in wanted]
        return served + fine_tuned.servables(served)

    return catalog


def _builder(registry: Registry, load: Load) -> Build:
    def build(servable: Servable) -> Engine:
        if servable.kind == "release":
            _take_into_service(registry, servable)
        return load(servable.folder, servable.name)

    return build


def _recorder(audit: AuditLog) -> Record:
    def record(servable: Servable) -> None:
        facts = {"digest": servable.digest, "kind": servable.kind, "base": servable.base}
        audit.append(ACTOR, "model.load", servable.name, facts)

    return record


def _take_into_service(registry: Registry, servable: Servable) -> None:
    """Check a release's manifest against its registration and record it as live; loading checks the rest."""
    for release in registry.list(servable.name.partition(":")[0]):
        if release.folder != servable.folder or release.state not in SERVABLE:
            continue
        if digest_file(servable.folder / manifest.NAME) != release.manifest_digest:
            raise IntegrityError(
                f"The manifest of {release.id} is not the one that it was registered with.",
                hint=f"Make a new version of it; see: lapis release show {release.id}",
            )
        registry.go_live(release.id, ACTOR)
        return
    raise NotFoundError(f"The release {servable.name!r} has just been retired.", param="model")


def _make_server(services: Services, console: bool) -> Server:
    app = create_app(services)
    if console:
        mount(app, services)
    config = uvicorn.Config(
        app, log_config=None, access_log=False, server_header=False, timeout_keep_alive=int(HEADER_SECONDS)
    )
    return Server(config, services)


class Server(uvicorn.Server):
    """uvicorn's server with our ends: SIGTERM drains, Ctrl-C hurries, neither is raised again at the end.

    A connection that does not send a whole request within HEADER_SECONDS is closed.
    """

    def __init__(self, config: uvicorn.Config, services: Services) -> None:
        super().__init__(config)
        self.services = services
        self.interrupted = False
        self.drained_at = float("inf")  # when it ends though answers are still under way
        # Connections that wait for a request: the last one that they had answered, and since when.
        self.idle_since: dict[Any, tuple[Any, float]] = {}
        self.when_started: Callable[[], None] = lambda: None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to listen, then say so."""
        await super().startup(sockets)
        if self.started:
            self.when_started()

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second: end once everything is drained; close connections that only linger."""
        now = time.monotonic()
        if self.services.draining and (not self.services.counters.active or now > self.drained_at):
            self.should_exit = True
        if counter % 10 == 0:
            self._close_lingering(now)
        return await super().on_tick(counter)

    def _close_lingering(self, now: float) -> None:
        before, self.idle_since = self.idle_since, {}
        for connection in list(self.server_state.connections):
            cycle = getattr(connection, "cycle", None)
            if cycle is not None and not cycle.response_complete:
                continue
            answered, since = before.get(connection, (cycle, now))
            since = since if answered is cycle else now
            self.idle_since[connection] = (cycle, since)
            if now - since > HEADER_SECONDS:
                connection.transport.close()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle SIGTERM and SIGINT while serving. In another thread than the main one: none."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        signals = (signal.SIGTERM, signal.SIGINT)
        before = {number: signal.signal(number, self.handle_exit) for number in signals}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin nothing more and let what is under way end; a second signal ends it at once.

        While SIGTERM's answers are finished, new requests are answered with 503.
        """
        self.interrupted = self.interrupted or sig == signal.SIGINT
        self.force_exit = self.should_exit or self.services.draining
        self.should_exit = self.interrupted or self.force_exit
        self.services.draining = True
        self.drained_at = time.monotonic() + DRAIN_SECONDS
        self.config.timeout_graceful_shutdown = INTERRUPT_SECONDS


def _listen(host: str, port: int) -> socket.socket:
    """A bound socket. Raises ConflictError for a port in use, ConfigError for an address that is not ours."""
    family, address = _resolve(host, port)
    # asyncio switches Nagle's delay off only on sockets that name their protocol: 40 ms an answer.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
        return listener
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            free = _next_free(host, port)
            raise ConflictError(
                f"Port {port} of {host} is in use.", hint=f"Use another one: --port {free}"
            ) from error
        raise ConfigError(f"Cannot listen at {host} port {port}: {error.strerror}.") from error


def _next_free(host: str, port: int) -> int:
    for candidate in range(port + 1, min(port + PORTS_TO_TRY, 65536)):
        family, address = _resolve(host, candidate)
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(address)
            except OSError:
                continue
            return candidate
    return 0  # the system picks one


def _resolve(host: str, port: int) -> tuple[socket.AddressFamily, tuple[str, int]]:
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise ConfigError(
            f"The host {host!r} is unknown: {error.strerror}.", hint="Example: --host 127.0.0.1"
        ) from error
    return family, (str(address[0]), port)


def _is_loopback(host: str) -> bool:
    return ip_address(_resolve(host, 0)[1][0]).is_loopback


def _url(host: str, listener: socket.socket) -> str:
    name = f"[{host}]" if ":" in host else host
    return f"http://{name}:{listener.getsockname()[1]}/v1"
