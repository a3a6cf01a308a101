"""A Slurm cluster for all tests of this folder, which run in `make test-slurm` and are skipped where it cannot be."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from .cluster import NODES, SlurmCluster, missing

ROOT = Path(__file__).parents[2]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All of them take long."""
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.long)


@pytest.fixture(scope="session")
def running_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    """One cluster, whatever state the tests leave its nodes in."""
    why = missing()
    if why:
        pytest.skip(why)
    before = dict(os.environ)
    with SlurmCluster(tmp_path_factory.mktemp("slurm")) as cluster:
        os.environ["SLURM_CONF"] = str(cluster.conf)
        paths = (str(ROOT / "src"), str(ROOT))
        os.environ["PYTHONPATH"] = os.pathsep.join(paths)
        yield cluster
        os.environ.clear()
        os.environ.update(before)


@pytest.fixture
def cluster(running_cluster: SlurmCluster) -> Iterator[SlurmCluster]:
    """The cluster with all nodes idle; afterwards nothing runs on it."""
    cluster = running_cluster
    for node, state in cluster.states().items():
        if state != "idle":
            cluster.kill_node(node)
            cluster.start_node(node)
    cluster.until(lambda: cluster.states() == dict.fromkeys(NODES, "idle"))
    yield cluster
    cluster.call("scancel", "--user=root")
