"""Jobs as Kubernetes manifests: a Job, or of several ranks a JobSet, in a queue of Kueue. Rendered, not run.

A job of several ranks has one pod for each, which finds its place in the environment as a torch.distributed program
does. Kueue admits all of them or none. Written for batch/v1, jobset.x-k8s.io/v1alpha2 and Kueue's labels.
"""

from __future__ import annotations

import math
from typing import Any

from lapis.jobs.cluster import KubernetesSection
from lapis.jobs.job import Job

QUEUE = "kueue.x-k8s.io/queue-name"
PRIORITY = "kueue.x-k8s.io/priority-class"
JOB, PROJECT = "lapis/job", "lapis/project"
INDEX = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
HOME = "/lapis"
PORT = 29500
RANK = "rank"  # the name of the pods' container, and of the JobSet's only group
LOST = (75, 137, 143)  # exit statuses after which another place may help: EX_TEMPFAIL, SIGKILL, SIGTERM

Manifest = dict[str, Any]


def manifest(job: Job, section: KubernetesSection) -> Manifest:
    """The manifest of a job's next attempt; JSON of it can be given to `kubectl apply -f -`."""
    labels = {
        QUEUE: section.queues.get(job.project_id, section.queue),
        JOB: job.id,
        PROJECT: job.project_id,
    }
    if job.spec.priority in section.priorities:
        labels[PRIORITY] = section.priorities[job.spec.priority]
    name = name_of(job)
    head = {"metadata": {"name": name, "namespace": section.namespace, "labels": labels}}
    work = _job(job, section, name)
    if job.spec.ranks == 1:
        return {"apiVersion": "batch/v1", "kind": "Job", **head, "spec": {"suspend": True, **work}}
    group = {"name": RANK, "replicas": 1, "template": {"spec": work}}
    spec = {
        "suspend": True,  # Kueue starts it, when there is room for all
        "network": {"enableDNSHostnames": True},
        "failurePolicy": {
            "maxRestarts": job.spec.retries,
            "rules": [
                {
                    "name": "failed",
                    "action": "FailJobSet",
                    "onJobFailureReasons": ["PodFailurePolicy", "DeadlineExceeded"],
                }
            ],
        },
        "replicatedJobs": [group],
    }
    return {"apiVersion": "jobset.x-k8s.io/v1alpha2", "kind": "JobSet", **head, "spec": spec}


def name_of(job: Job) -> str:
    """The name of a job's next attempt in Kubernetes."""
    return f"lapis-{job.id.replace('_', '-')}-{job.attempt + 1}"


def _job(job: Job, section: KubernetesSection, name: str) -> Manifest:
    """The spec of a batch/v1 Job with a pod for each rank."""
    spec = job.spec
    failed = {"containerName": RANK, "operator": "NotIn", "values": list(LOST)}
    work: Manifest = {
        "completions": spec.ranks,
        "parallelism": spec.ranks,
        "completionMode": "Indexed",
        "backoffLimit": spec.retries if spec.ranks == 1 else 0,  # of several ranks all start again, or none
        "podFailurePolicy": {"rules": [{"action": "FailJob", "onExitCodes": failed}]},
        "template": {"metadata": {"labels": {JOB: job.id}}, "spec": _pod(job, section, name)},
    }
    if spec.time_limit is not None:
        work["activeDeadlineSeconds"] = math.ceil(spec.time_limit)
    return work


def _pod(job: Job, section: KubernetesSection, name: str) -> Manifest:
    each = job.spec.resources
    amounts: Manifest = {"cpu": f"{math.ceil(1000 * each.cpus)}m"}
    if each.memory:
        amounts["memory"] = str(each.memory)
    if each.gpus:
        amounts[section.gpu] = str(each.gpus)
    container = {
        "name": RANK,
        "image": section.image,
        "command": list(job.spec.argv),
        "workingDir": HOME,
        "env": _environment(job, name),
        "resources": {"requests": amounts, "limits": amounts},
        "volumeMounts": [
            {"name": "home", "mountPath": HOME},
            {"name": "shared-memory", "mountPath": "/dev/shm"},
        ],
    }
    pod: Manifest = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": section.grace_seconds,
        "containers": [container],
        "volumes": [
            {"name": "home", "persistentVolumeClaim": {"claimName": section.volume}},
            {"name": "shared-memory", "emptyDir": {"medium": "Memory"}},
        ],
    }
    if job.spec.spread:
        alone = {"topologyKey": "kubernetes.io/hostname", "labelSelector": {"matchLabels": {JOB: job.id}}}
        pod["affinity"] = {"podAntiAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [alone]}}
    return pod


def _environment(job: Job, name: str) -> list[Manifest]:
    """The job's own variables; of several ranks, each one's place as torch.distributed wants to know it."""
    told = {"LAPIS_HOME": HOME, "OMP_NUM_THREADS": str(max(1, int(job.spec.resources.cpus)))}
    found: list[Manifest] = []
    if job.spec.ranks > 1:
        told |= {
            "WORLD_SIZE": str(job.spec.ranks),
            "LOCAL_RANK": "0",
            "LOCAL_WORLD_SIZE": "1",
            "MASTER_ADDR": f"{name}-{RANK}-0-0.{name}",  # the JobSet's name for its first pod
            "MASTER_PORT": str(PORT),
        }
        found.append({"name": "RANK", "valueFrom": {"fieldRef": {"fieldPath": INDEX}}})
    return [*found, *({"name": key, "value": value} for key, value in {**told, **job.spec.env}.items())]
