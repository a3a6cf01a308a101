"""Every kind of parallelism against one process: the same losses, gradients, norms and weights."""

from __future__ import annotations

import math
import os
import socket
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lapis.kernels import stock, torch_steps
from lapis.model.config import ModelConfig
from lapis.model.families import build, initial_weights
from lapis.model.weights import DTYPES
from lapis.train.flat import HIDDEN, VECTOR, _blocks, kind_of
from lapis.train.mesh import Mesh
from lapis.train.optimizer import EPS, ITERATIONS, MOMENTUM, NEWTON_SCHULZ
from lapis.train.placement import placements
from lapis.train.sharded_optimizer import inside, outside
from tests import parallel_worker as worker
from tests.parallel_worker import (
    BETAS,
    CLIP,
    EMBED_LR,
    LONG,
    LONG_PIPELINES,
    LR,
    PIPELINES,
    SHORT,
    STEPS,
    WEIGHT_DECAY,
    Case,
)

TURN = 24  # every mesh makes groups of ranks, whose threads stay until the process ends


@cache
def one_process(config: ModelConfig, optimizer: str) -> dict[str, Any]:
    """What the ranks must give: plain backward, then the steps of plain torch over whole fp32 weights."""
    made = build(config, dtype=torch.float32)
    made.init_weights(worker.SEED)
    named = dict(made.named_parameters())
    state = {name: [torch.zeros(p.numel()) for _ in range(2)] for name, p in named.items()}
    losses, norms, first = [], [], {}
    for step in range(STEPS):
        loss = worker.loss(made, worker.joined(worker.windows(step)), worker.weight_of(step))
        made.zero_grad(set_to_none=True)
        loss.backward()
        losses.append(loss.item())
        grads = {name: p.grad.detach().clone() for name, p in named.items() if p.grad is not None}
        norms.append(math.sqrt(sum(float(grad.double().square().sum()) for grad in grads.values())))
        first = first or {name: grad.clone() for name, grad in grads.items()}
        for name, parameter in named.items():
            update(config, name, parameter, grads[name], state[name], optimizer, step, norms[-1])
        made.ops.weights_changed()
    made.init_weights(worker.SEED)
    grads = worker.gradient(config)
    norm = math.sqrt(sum(float(grad.double().square().sum()) for grad in grads.values()))
    for name, parameter in named.items():
        fresh = [torch.zeros(parameter.numel()) for _ in range(2)]
        update(config, name, parameter, grads[name], fresh, optimizer, 0, norm)
    weights = {name: p.detach() for name, p in named.items()}
    return {"losses": losses, "norms": norms, "grads": first, "weights": weights}


def update(
    config: Any,
    name: str,
    parameter: Tensor,
    grad: Tensor,
    state: list[Tensor],
    optimizer: str,
    step: int,
    norm: float,
) -> None:
    """The step of the one-process optimizer for one weight, in plain torch."""
    kind = kind_of(name, parameter)
    master, unused = parameter.detach().flatten(), torch.zeros(parameter.numel())
    if kind == HIDDEN and optimizer == "muon":
        for block in _blocks(name, 0, parameter, config):
            buffers = (unused, grad.flatten(), master, state[0])
            torch_steps.muon_step(buffers, block, LR, MOMENTUM, WEIGHT_DECAY, NEWTON_SCHULZ, ITERATIONS)
    else:
        stock.StockOps().adamw(
            unused, grad.flatten(), master, *state, lr=LR if kind == HIDDEN else EMBED_LR, beta1=BETAS[0],
            beta2=BETAS[1], eps=EPS, weight_decay=0.0 if kind == VECTOR else WEIGHT_DECAY,
            correction1=1 - BETAS[0] ** (step + 1), correction2=1 - BETAS[1] ** (step + 1),
            clip=min(1.0, CLIP / (norm + 1e-6)),
        )  # fmt: skip
    parameter.data = master.view(parameter.shape)


def launch(folder: Path, cases: tuple[Case, ...]) -> None:
    """Train the cases in as many processes as their meshes have ranks: one launch for each size, and for 24 cases."""
    named: dict[int, list[str]] = {}
    for case in sorted(cases, key=lambda case: case.mesh):
        named.setdefault(Mesh.parse(case.mesh).size, []).append(case.name)
    turns = [
        (size, named[size][at : at + TURN])
        for size in sorted(named)
        for at in range(0, len(named[size]), TURN)
    ]
    for size, names in turns:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = str(free.getsockname()[1])
        common = {
            "WORLD_SIZE": str(size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, "-W", "error", "-m", "tests.parallel_worker", str(folder), *names]
        ranks = [
            subprocess.Popen(
                command, env={**os.environ, **common, "RANK": str(rank)}, stderr=subprocess.PIPE, text=True
            )
            for rank in range(size)
        ]
        failures = [text for rank in ranks if (text := rank.communicate()[1]) and rank.returncode]
        assert not failures, "\n".join(text[-3000:] for text in failures)


def whole(config: Any, mesh: Mesh, shards: list[dict[str, Tensor]], name: str) -> Tensor:
    """A tensor put together from what each rank holds; NaN where nobody holds it."""
    placement = placements(config)[name]
    found = torch.full(placement.shape, math.nan)
    for rank, held in enumerate(shards):
        for piece in placement.held(mesh, rank):
            if name in held:  # else it is another stage's
                outside(found, piece).copy_(inside(held[name], piece))
    return found


def check(folder: Path, case: Case) -> None:
    """The case's ranks against one process."""
    mesh, config = Mesh.parse(case.mesh), case.config
    seen = [torch.load(folder / f"{case.name}.{rank}.pt") for rank in range(mesh.size)]
    expected = one_process(config, case.optimizer)
    close, norm_close, grad_close = (1e-3, 5e-2, 3e-2) if case.dtype == "bf16" else (1e-5, 1e-4, 1e-5)
    for rank in seen:
        assert rank["losses"] == pytest.approx(expected["losses"], rel=close)
        assert rank["norms"] == pytest.approx(expected["norms"], rel=norm_close)
        assert rank["norms"] == seen[0]["norms"], "every rank clips alike"
    assert min(expected["norms"]) > 2 * CLIP, "clipping is at work"
    for name, gradient in expected["grads"].items():
        found = whole(config, mesh, [rank["grads"] for rank in seen], name)
        assert float((found - gradient).abs().max()) <= grad_close * float(gradient.abs().max()), name
    for name, weight in expected["weights"].items():
        found = whole(config, mesh, [rank["weights"] for rank in seen], name)
        torch.testing.assert_close(found, weight, atol=1e-7, rtol=1e-6, msg=name)
    assert [bool(rank["whole"]) for rank in seen] == [number == 0 for number in range(mesh.size)]
    for name, weight in initial_weights(config, worker.SEED):  # what is sampled from
        assert torch.equal(seen[0]["whole"][name], weight.to(DTYPES[case.dtype])), name


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What all short cases wrote."""
    folder = tmp_path_factory.mktemp("ranks")
    launch(folder, (*SHORT, *PIPELINES))
    return folder


@pytest.mark.parametrize("case", [*SHORT, *PIPELINES], ids=lambda case: case.name)
def test_ranks_train_like_one_process(trained: Path, case: Case) -> None:
    check(trained, case)


@pytest.mark.long
def test_every_model_on_every_mesh_trains_like_one_process(tmp_path: Path) -> None:
    launch(tmp_path, LONG)
    for case in LONG:
        check(tmp_path, case)


@pytest.mark.long
def test_every_schedule_on_every_model_and_mesh_trains_like_one_process(tmp_path: Path) -> None:
    launch(tmp_path, LONG_PIPELINES)
    for case in LONG_PIPELINES:
        check(tmp_path, case)
