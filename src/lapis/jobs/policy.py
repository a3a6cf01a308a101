"""The numbers of the fair queue's rules; docs/jobs.md says what they do."""

from __future__ import annotations

from dataclasses import dataclass

from lapis.jobs.shares import HALF_LIFE


@dataclass(frozen=True)
class Policy:
    """The rules' numbers. Times are seconds, parts are of everything that the nodes have."""

    half_life: float = HALF_LIFE
    minimum_run: float = 600.0  # a job runs so long before it may be stopped for another one
    grace: float = 60.0  # what it then has to write a checkpoint
    patience: float = 43_200.0  # after which a project's first job goes first of all
    public: float = 0.1  # kept from large projects' jobs that cannot be stopped, in whole CPUs and GPUs
    small: float = 0.05  # a project is small while its score times its weight is at most this
    assumed: float = 3600.0  # what a job without a time limit is expected to take, at first
