"""Manifests of jobs: core kinds against Kubernetes' own schemas, strictly; a JobSet's own fields against their list.

The schemas of core kinds come with the package kubernetes-validate. Nobody ships those of JobSet, so what a JobSet
has around its Job templates is checked here by the fields of jobset.x-k8s.io/v1alpha2 that we write.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
from click.testing import CliRunner

from lapis.cli.cluster import group
from lapis.db import open_database
from lapis.errors import ConfigError
from lapis.home import Home
from lapis.jobs.cluster import KubernetesSection
from lapis.jobs.executors.kubernetes import manifest
from lapis.jobs.job import Job, JobSpec, Priority, Resources, State
from lapis.jobs.queue import JobQueue

VERSION = "1.37"
SECTION = KubernetesSection(
    image="registry.example/lapis:1", queue="shared", volume="lapis-home", queues={"proj_a": "team-a"},
    priorities={Priority.HIGH: "urgent"},
)  # fmt: skip
SPEC = JobSpec(
    "train", ("lapis", "train", "recipe.toml"), Resources(7.5, 1, 3 << 30), {"A": "b $(c)"}, retries=2,
    time_limit=90.5, priority=Priority.HIGH,
)  # fmt: skip
JOB = Job(
    "job_0a1b", "proj_a", SPEC, State.QUEUED, "", 0, 0, None, None, None, None, 0.0, "os:ana", None, None
)

# Which fields a JobSet has where we write some, and of which type.
JOBSET: dict[str, Any] = {
    "suspend": bool,
    "network": {"enableDNSHostnames": bool, "subdomain": str, "publishNotReadyAddresses": bool},
    "failurePolicy": {
        "maxRestarts": int,
        "restartStrategy": {"Recreate", "BlockingRecreate", "InPlaceRestart"},
        "rules": [
            {
                "name": str,
                "action": {"FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts", "RestartJob"},
                "onJobFailureReasons": [
                    {
                        "BackoffLimitExceeded", "DeadlineExceeded", "FailedIndexes", "MaxFailedIndexesExceeded",
                        "PodFailurePolicy",
                    }
                ],
                "targetReplicatedJobs": [str],
            }
        ],
    },
    "replicatedJobs": [{"name": str, "replicas": int, "template": object}],
}  # fmt: skip


def check(value: Any, kind: Any, where: str = "spec") -> None:
    """A value is of a kind: a type, one of a set of words, a list of a kind, or an object of known fields."""
    if isinstance(kind, dict):
        assert isinstance(value, dict), where
        assert value.keys() <= kind.keys(), where
        for name, inner in value.items():
            check(inner, kind[name], f"{where}.{name}")
    elif isinstance(kind, list):
        assert isinstance(value, list), where
        for inner in value:
            check(inner, kind[0], where)
    elif isinstance(kind, set):
        assert value in kind, where
    else:
        assert isinstance(value, kind) and (kind is object or isinstance(value, bool) is (kind is bool)), (
            where
        )


def checked(job: Job, section: KubernetesSection = SECTION) -> dict[str, Any]:
    """A job's manifest, found to be right."""
    made = manifest(job, section)
    assert json.loads(json.dumps(made)) == made
    core = made
    if made["kind"] == "JobSet":
        assert made.keys() == {"apiVersion", "kind", "metadata", "spec"}
        assert made["apiVersion"] == "jobset.x-k8s.io/v1alpha2"
        check(made["spec"], JOBSET)
        (one,) = made["spec"]["replicatedJobs"]
        core = {"apiVersion": "batch/v1", "kind": "Job", "metadata": made["metadata"], **one["template"]}
    kubernetes_validate.validate(core, VERSION, strict=True)
    return made


def pod(made: dict[str, Any]) -> dict[str, Any]:
    spec = made["spec"]
    if made["kind"] == "JobSet":
        spec = spec["replicatedJobs"][0]["template"]["spec"]
    found: dict[str, Any] = spec["template"]["spec"]
    return found


def test_a_job_is_suspended_in_its_project_s_queue() -> None:
    made = checked(JOB)
    assert (made["kind"], made["spec"]["suspend"], made["spec"]["backoffLimit"]) == ("Job", True, 2)
    assert made["metadata"]["labels"] == {
        "kueue.x-k8s.io/queue-name": "team-a", "kueue.x-k8s.io/priority-class": "urgent",
        "lapis/job": "job_0a1b", "lapis/project": "proj_a",
    }  # fmt: skip
    assert made["spec"]["activeDeadlineSeconds"] == 91
    (container,) = pod(made)["containers"]
    amounts = {"cpu": "7500m", "memory": str(3 << 30), "nvidia.com/gpu": "1"}
    assert container["resources"] == {"requests": amounts, "limits": amounts}
    assert container["command"] == list(SPEC.argv)
    assert "RANK" not in {variable["name"] for variable in container["env"]}
    other = checked(replace(JOB, project_id="proj_b", spec=replace(SPEC, priority=Priority.LOW)))
    assert other["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "shared"
    assert "kueue.x-k8s.io/priority-class" not in other["metadata"]["labels"]


def test_several_ranks_are_a_jobset_whose_pods_find_each_other() -> None:
    made = checked(replace(JOB, attempt=2, spec=replace(SPEC, ranks=4, spread=True)))
    assert (made["kind"], made["metadata"]["name"]) == ("JobSet", "lapis-job-0a1b-3")
    work = made["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert (work["completions"], work["parallelism"], work["backoffLimit"]) == (4, 4, 0)
    assert made["spec"]["failurePolicy"]["maxRestarts"] == 2
    env = {variable["name"]: variable for variable in pod(made)["containers"][0]["env"]}
    assert env["MASTER_ADDR"]["value"] == "lapis-job-0a1b-3-rank-0-0.lapis-job-0a1b-3"
    assert env["WORLD_SIZE"]["value"] == "4"
    assert "job-completion-index" in env["RANK"]["valueFrom"]["fieldRef"]["fieldPath"]
    assert env["A"]["value"] == "b $(c)"
    assert "podAntiAffinity" in pod(made)["affinity"]


def test_the_checks_find_what_is_wrong() -> None:
    wrong = manifest(JOB, SECTION)
    wrong["spec"]["backofLimit"] = 1
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, VERSION, strict=True)
    spec = manifest(replace(JOB, spec=replace(SPEC, ranks=2)), SECTION)["spec"]
    for bad in (
        {**spec, "suspended": True},
        {**spec, "suspend": "yes"},
        {**spec, "failurePolicy": {"maxRestarts": True}},
    ):
        with pytest.raises(AssertionError):
            check(bad, JOBSET)


def test_the_command_prints_what_kubectl_takes(home: Home) -> None:
    queue = JobQueue(open_database(home.database_url))
    job = queue.submit(SPEC, "os:ana")
    queue.db.dispose()
    with pytest.raises(ConfigError, match="kubernetes"):
        CliRunner().invoke(group, ["manifest", job.id], catch_exceptions=False, standalone_mode=False)
    home.root.joinpath("cluster.toml").write_text('[kubernetes]\nimage = "i"\nqueue = "q"\nvolume = "v"\n')
    told = CliRunner().invoke(group, ["manifest", job.id], catch_exceptions=False, standalone_mode=False)
    section = KubernetesSection(image="i", queue="q", volume="v")
    assert json.loads(told.stdout) == manifest(job, section)


def test_a_wrong_key_in_the_file_is_named(home: Home) -> None:
    from lapis.jobs.cluster import load_cluster

    assert load_cluster(home).executor == "local"
    Path(home.root).mkdir(parents=True, exist_ok=True)
    (home.root / "cluster.toml").write_text('executor = "slurm"\n[slurm]\npartitoin = "gpu"\n')
    with pytest.raises(ConfigError, match="Did you mean 'partition'"):
        load_cluster(home)
