"""`lapis data prepare --on ray`: the same bytes as on one machine, whatever dies on the way."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.texts import write_corpus

installed = all(importlib.util.find_spec(name) for name in ("ray", "daft"))
on_cluster = pytest.mark.skipif(
    not installed, reason="Ray and Daft are not installed (make test-cluster installs them)"
)
# Small parts and shards, so that there are many tasks: in this process, and in every one that the tests start.
PREPARE = """
import sys
from lapis.cli.main import main
from lapis.data import pipeline, readers

readers.BATCH_BYTES, pipeline.SHARD_BYTES = 8000, (8000, 1 << 20)
main()
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    write_corpus(tmp_path / "text", 40)
    path = tmp_path / "recipe.toml"
    path.write_text(
        f'[[data.sources]]\npath = "{tmp_path / "text"}"\nlicence = "CC-BY-4.0"\n'
        "[data.heldout]\nmin_bytes = 2000\n[tokenizer]\nvocab_size = 400\n[train]\nsteps = 1\n"
    )
    return path


def start(
    recipe: Path, home: Path, *options: str, program: str = PREPARE, **variables: str
) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", program, "data", "prepare", str(recipe), "--json", *options]
    environment = {**os.environ, "LAPIS_HOME": str(home), **variables}
    return subprocess.Popen(
        command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=240)
    return process.returncode, out, err


def digest(process: subprocess.Popen[str]) -> str:
    code, out, err = ended(process)
    assert code == 0, err
    return str(json.loads(out)["digest"])


def test_ray_and_daft_are_never_loaded_on_one_machine(recipe: Path, tmp_path: Path) -> None:
    program = PREPARE.replace(
        "\nmain()", "\ntry:\n    main()\nfinally:\n    print({'ray', 'daft'} & set(sys.modules))"
    )
    command = [sys.executable, "-c", program, "data", "prepare", str(recipe), "--workers", "2"]
    done = subprocess.run(
        command, env={**os.environ, "LAPIS_HOME": str(tmp_path / "home")}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "training tokens" in done.stdout
    assert done.stdout.splitlines()[-1] == "set()"


@on_cluster
@pytest.mark.parametrize(
    ("address", "code", "says"),
    [
        ("", 8, "ray start --head"),
        ("127.0.0.1:9", 8, "ray start --head"),
        ("ray://here:10001", 2, "HOST:PORT"),
    ],
)
def test_a_cluster_that_cannot_be_reached_is_refused_with_the_next_command(
    recipe: Path, tmp_path: Path, address: str, code: int, says: str
) -> None:
    found, _, err = ended(start(recipe, tmp_path / "home", "--on", "ray", RAY_ADDRESS=address))
    assert found == code
    assert says in err


NODES = """
import json, sys
from ray.cluster_utils import Cluster

node = {"num_cpus": 1, "object_store_memory": 80 << 20, "include_dashboard": False}
cluster = Cluster(initialize_head=True, head_node_args=node)
try:
    (second,) = cluster.add_node(**node).all_processes["raylet"]
    print(json.dumps({"address": cluster.address, "raylet": second.process.pid}), flush=True)
    sys.stdin.read()
finally:
    cluster.shutdown()
"""


@pytest.fixture
def cluster() -> Iterator[dict[str, Any]]:
    """Two nodes of one core: their address, and the process that holds the second one together."""
    process = subprocess.Popen(
        [sys.executable, "-c", NODES],
        env={**os.environ, "RAY_USAGE_STATS_ENABLED": "0"},
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with process:  # its end of file ends all that it has started
        assert process.stdout is not None
        found = next((line for line in process.stdout if line.startswith("{")), None)
        assert found is not None, "the cluster did not start"
        yield json.loads(found)


def parts(home: Path) -> int:
    return len([*home.glob("data/.quality-*.work/part-*.json"), *home.glob("data/quality-*/part-*.json")])


@on_cluster
@pytest.mark.long
def test_the_same_bytes_on_a_cluster_one_of_whose_machines_dies(
    cluster: dict[str, Any], recipe: Path, tmp_path: Path
) -> None:
    write_corpus(tmp_path / "text", 300)
    native = digest(start(recipe, tmp_path / "native", "--workers", "1"))
    home = tmp_path / "shared"
    process = start(recipe, home, "--on", "ray", RAY_ADDRESS=cluster["address"])
    while parts(home) < 5 and process.poll() is None:
        time.sleep(0.02)
    os.kill(cluster["raylet"], signal.SIGKILL)
    done, whole = parts(home), parts(tmp_path / "native")
    assert digest(process) == native
    assert 5 <= done < whole
    assert parts(home) == whole
    left = [path for path in home.rglob("*") if path.name.endswith(".part") or ".cluster-" in path.name]
    assert left == []


@on_cluster
@pytest.mark.long
def test_an_error_of_a_task_ends_the_command_as_it_would_on_one_machine(
    cluster: dict[str, Any], recipe: Path, tmp_path: Path
) -> None:
    other = "from lapis.data import cluster\nfound = {**cluster.versions(), 'lapis': '0.0.1'}\n"
    other += "cluster.versions = lambda: found\n"
    process = start(
        recipe, tmp_path / "home", "--on", "ray", program=other + PREPARE, RAY_ADDRESS=cluster["address"]
    )
    code, out, err = ended(process)
    assert (code, out) == (8, "")
    assert "the machine of the command 0.0.1" in err
    assert "constraints.txt" in err
    assert "Traceback" not in err
