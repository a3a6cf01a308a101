"""This process's place among the ranks of a run: a plain torch.distributed program, whoever started it."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from lapis.errors import ConfigError, UnavailableError
from lapis.train.mesh import Mesh

TIMEOUT_S = 3600.0  # longer than any rank may be late; that one is lost is seen by the supervisor
# the axes along which ranks talk, beside FSDP's own: those that split rows, experts, and whole weights
GROUPS = (("tp",), ("cp",), ("ep",), ("ep", "fsdp", "cp", "tp"), ("fsdp", "cp", "tp"))
ENVIRONMENT = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class World:
    """One rank of a run; `meshes` are None in a process of its own.

    The dense mesh has the dims pp, dp, shard (ep, fsdp and cp joined) and tp; in the expert mesh ep stands apart.
    """

    mesh: Mesh
    rank: int
    device: torch.device
    dense: DeviceMesh | None = None
    expert: DeviceMesh | None = None
    groups: Mapping[tuple[str, ...], dist.ProcessGroup] = field(default_factory=dict)

    @staticmethod
    def alone(device: torch.device | None = None) -> World:
        """One process, no communication."""
        return World(Mesh(), 0, device or torch.device("cpu"))

    @staticmethod
    def join(mesh: Mesh, device: torch.device | None = None) -> World:
        """Meet the other ranks, by RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT; NCCL on a GPU, else gloo.

        Joining again with another mesh of the same size keeps the connection. Raises ConfigError if the number of
        ranks that were started is not that of the mesh.
        """
        mesh.require(started())
        device = _connect(device)
        rank, sizes = dist.get_rank(), (mesh.pp, mesh.dp, mesh.ep, mesh.fsdp * mesh.cp, mesh.tp)
        dense = init_device_mesh(
            device.type,
            (mesh.pp, mesh.dp, mesh.ep * mesh.fsdp * mesh.cp, mesh.tp),
            mesh_dim_names=("pp", "dp", "shard", "tp"),
        )
        expert = init_device_mesh(device.type, sizes, mesh_dim_names=("pp", "dp", "ep", "shard", "tp"))
        return World(mesh, rank, device, dense, expert, _groups(mesh, rank))

    @property
    def size(self) -> int:
        """Number of ranks."""
        return self.mesh.size

    @property
    def is_main(self) -> bool:
        """Whether this rank is the one that writes and speaks."""
        return self.rank == 0

    @property
    def data_rank(self) -> int:
        """Which share of the samples this rank sees."""
        return self.mesh.data_rank(self.rank)

    @property
    def data_ranks(self) -> int:
        """How many shares the samples are dealt in."""
        return self.mesh.data_ranks

    def group(self, *axes: str) -> dist.ProcessGroup | None:
        """The ranks that differ from this one on these axes (see GROUPS) alone; None where it is alone."""
        return self.groups.get(axes)

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def max(self, tensor: Tensor) -> Tensor:
        """The largest of all ranks, element by element, in place."""
        if self.size > 1:
            dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return tensor

    def all(self, true: bool) -> bool:
        """Whether something holds on every rank."""
        return not bool(self.max(torch.tensor(float(not true), device=self.device)))

    def agree(self, stop: bool, seconds: float) -> tuple[bool, float]:
        """Whether any rank is to stop, and the first rank's clock: clocks differ, what follows from them must not."""
        if self.size == 1:
            return stop, seconds
        told = torch.tensor([float(stop), seconds if self.is_main else 0.0], dtype=torch.float64)
        stops, first = self.sum(told.to(self.device)).tolist()
        return stops > 0, first

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.size > 1:
            dist.barrier()


def started() -> int:
    """How many ranks were started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Whether this process is the one that writes and speaks: the first rank, or the only one."""
    return int(os.environ.get("RANK", "0")) == 0


@contextmanager
def first_alone() -> Iterator[None]:
    """The first rank does the block before all others, which then find what it made."""
    if started() == 1:
        yield
        return
    _connect(None)
    if not is_first():
        with lost_peers():
            dist.barrier()
    yield
    if is_first():
        dist.barrier()


@contextmanager
def lost_peers() -> Iterator[None]:
    """Raise UnavailableError where torch.distributed says that another rank is gone."""
    try:
        yield
    except RuntimeError as error:
        if started() == 1 or not (isinstance(error, dist.DistError) or "gloo/" in str(error)):
            raise  # gloo's own errors have no type of their own
        raise UnavailableError(
            f"Rank {os.environ.get('RANK')} lost another rank of this run: {str(error).splitlines()[0]}",
            hint="What that rank said tells why. The same command goes on from the last checkpoint.",
        ) from error


def _connect(device: torch.device | None) -> torch.device:
    """Start torch.distributed unless it runs already, and say which device this rank computes on."""
    if device is None:
        local = int(os.environ.get("LOCAL_RANK", "0"))
        device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        missing = [name for name in ENVIRONMENT if name not in os.environ]
        if missing:
            raise ConfigError(
                f"This rank was started without {', '.join(missing)}.",
                hint="Start it with: lapis train RECIPE --ranks N, or torchrun.",
            )
        backend = "nccl" if device.type == "cuda" else "gloo"
        with _signals_kill():
            dist.init_process_group(backend, timeout=timedelta(seconds=TIMEOUT_S))
    return device


@contextmanager
def _signals_kill() -> Iterator[None]:
    """SIGINT and SIGTERM end the process at once: while it waits in torch for ranks that never come, Python's handlers
    are not called. Nothing is lost so early."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _groups(mesh: Mesh, rank: int) -> dict[tuple[str, ...], dist.ProcessGroup]:
    """One group for each of GROUPS that has more than one rank; every rank makes all of them, in one order."""
    found: dict[tuple[str, ...], dist.ProcessGroup] = {}
    for axes in GROUPS:
        for ranks in sorted({mesh.peers(other, *axes) for other in range(mesh.size)}):
            if len(ranks) > 1:
                made = dist.new_group(list(ranks))
                if rank in ranks:
                    found[axes] = made
    return found
