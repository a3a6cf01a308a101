"""Where jobs run, as an administrator says it in `cluster.toml` in the home. Without the file: on this machine."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from lapis import config
from lapis.config import Section
from lapis.home import Home
from lapis.jobs.executor import Executor
from lapis.jobs.job import Priority

FILE = "cluster.toml"


class SlurmSection(Section):
    """How jobs are handed to Slurm."""

    partition: str | None = None
    """The partition; without one, Slurm's default."""
    account: str | None = None
    """The account of projects that `accounts` does not name; without one, the default of the server's user."""
    accounts: dict[str, str] = Field(default_factory=dict)
    """By a project's id: the account that its jobs are charged to."""
    qos: dict[Priority, str] = Field(default_factory=dict)
    """By a job's priority (low, normal, high): the quality of service that it asks for."""
    options: tuple[str, ...] = ()
    """More options of sbatch, such as "--constraint=h200"."""

    def account_of(self, project_id: str) -> str | None:
        """The account that a project's jobs are charged to."""
        return self.accounts.get(project_id, self.account)


class KubernetesSection(Section):
    """How manifests are rendered."""

    image: str
    """The container image that jobs run in; it has Lapis installed."""
    queue: str
    """Kueue's LocalQueue for projects that `queues` does not name."""
    volume: str
    """The PersistentVolumeClaim that holds the home; all pods mount it."""
    namespace: str = "default"
    """The namespace of jobs."""
    queues: dict[str, str] = Field(default_factory=dict)
    """By a project's id: its LocalQueue."""
    priorities: dict[Priority, str] = Field(default_factory=dict)
    """By a job's priority: the name of a WorkloadPriorityClass of Kueue."""
    gpu: str = "nvidia.com/gpu"
    """The name of a GPU as a resource."""
    grace_seconds: Annotated[int, Field(ge=0)] = 60
    """What a pod has to write a checkpoint when it is stopped."""


class Cluster(Section):
    """The whole file."""

    executor: Literal["local", "slurm"] = "local"
    """What runs the jobs of this installation."""
    slurm: SlurmSection = SlurmSection()
    """Slurm."""
    kubernetes: KubernetesSection | None = None
    """Kubernetes: `lapis cluster manifest` renders for it."""


def load_cluster(home: Home) -> Cluster:
    """The home's cluster.toml. Raises ConfigError naming the key that is wrong."""
    path = home.root / FILE
    return config.load(path, Cluster) if path.is_file() else Cluster()


def make_executor(home: Home) -> Executor:
    """What runs this installation's jobs. Raises ConfigError, UnavailableError without Slurm's commands."""
    cluster = load_cluster(home)
    if cluster.executor == "slurm":
        from lapis.jobs.executors.slurm import SlurmExecutor

        return SlurmExecutor(home.jobs, cluster.slurm)
    from lapis.jobs.executors.local import LocalExecutor

    return LocalExecutor(home.jobs)
