"""The fair queue's rules, for any jobs and nodes that hypothesis thinks of."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace

from harness.simulation import Decided, Task, World
from hypothesis import given, settings
from hypothesis import strategies as st

from lapis.jobs.fairshare import Schedule, schedule
from lapis.jobs.job import Job, JobSpec, Node, Place, Priority, Resources, State
from lapis.jobs.policy import Policy
from lapis.jobs.shares import Share

NOW = 100_000.0
PROJECTS = ("ana", "bo", "cy", "di")
LIMITS = (60.0, 600.0, 3000.0)

sizes = st.builds(Resources, st.sampled_from([0.5, 1.0, 2.0, 3.0]), st.integers(0, 3), st.integers(0, 4))
nodes = st.lists(
    st.builds(Resources, st.sampled_from([2.0, 4.0, 8.0]), st.integers(0, 4), st.integers(4, 16)),
    min_size=1, max_size=4,
).map(lambda rooms: [Node(f"n{i}", room) for i, room in enumerate(rooms)])  # fmt: skip
specs = st.builds(
    JobSpec,
    st.just("job"), st.just(("run",)), sizes,
    ranks=st.integers(1, 3),
    priority=st.sampled_from(Priority),
    time_limit=st.sampled_from([None, *LIMITS]),
    preemptible=st.booleans(),
)  # fmt: skip
weights = st.dictionaries(
    st.sampled_from(PROJECTS),
    st.builds(Share, st.sampled_from([1.0, 3.0]), st.tuples(st.floats(0, 1e6), st.floats(0, 1e5), st.just(0.0))),
)  # fmt: skip


def job(name: str, spec: JobSpec, project: str = "ana", age: float = 0.0) -> Job:
    return Job(
        name, project, spec, State.QUEUED, "", 0, 0, None, None, None, None, NOW - age, "os:ana", None, None
    )  # fmt: skip


def running(waiting: Job, ranks: Mapping[str, int], seconds: float = 0.0) -> Job:
    places = tuple(Place(node, count) for node, count in ranks.items())
    return replace(waiting, state=State.RUNNING, places=places, started_at=NOW - seconds)


@st.composite
def moments(draw: st.DrawFn) -> tuple[list[Job], list[Job], list[Node], dict[str, Share]]:
    """Nodes on which some jobs run, placed by the queue itself earlier, and others that wait."""
    there, shares = draw(nodes), draw(weights)
    drawn = draw(
        st.lists(st.tuples(specs, st.sampled_from(PROJECTS), st.floats(0, 90_000)), min_size=1, max_size=14)
    )
    jobs = [job(f"job_{i}", *facts) for i, facts in enumerate(drawn)]
    cut = draw(st.integers(0, len(jobs)))
    begun = schedule(jobs[:cut], [], there, {}, NOW).starts
    ran = draw(st.sampled_from([0.0, 700.0]))
    active = [running(jobs[i], begun[jobs[i].id], ran) for i in range(cut) if jobs[i].id in begun]
    if active and draw(st.booleans()):
        active[0] = replace(active[0], preempt_at=NOW - 5, preempt_for="job_x")
    return jobs[cut:], active, there, shares


def used(jobs: Sequence[Job], node: Node) -> Resources:
    """What jobs take of a node."""
    total = Resources(0, 0, 0)
    for one in jobs:
        for place in one.places:
            if place.node == node.name:
                total += one.spec.resources * place.ranks
    return total


def begin(decided: Schedule, waiting: Sequence[Job]) -> list[Job]:
    return [running(one, decided.starts[one.id]) for one in waiting if one.id in decided.starts]


@settings(max_examples=80, deadline=None)
@given(moments())
def test_nodes_are_never_overfull_and_gangs_are_whole(
    moment: tuple[list[Job], list[Job], list[Node], dict[str, Share]],
) -> None:
    waiting, active, there, shares = moment
    decided = schedule(waiting, active, there, shares, NOW)
    for node in there:
        assert used([*active, *begin(decided, waiting)], node).fits(node.resources)
    for one in waiting:
        if one.id in decided.starts:
            assert sum(decided.starts[one.id].values()) == one.spec.ranks


@settings(max_examples=50, deadline=None)
@given(moments())
def test_every_job_starts_or_is_told_why_not_and_when(
    moment: tuple[list[Job], list[Job], list[Node], dict[str, Share]],
) -> None:
    waiting, active, there, shares = moment
    decided = schedule(waiting, active, there, shares, NOW)
    parts = [set(decided.starts), set(decided.waits), set(decided.refused)]
    assert sum(map(len, parts)) == len(set().union(*parts)) == len(waiting)
    for wait in decided.waits.values():
        assert wait.reason
        assert wait.likely_start is not None and wait.likely_start >= NOW
    again = schedule(list(waiting), list(active), list(there), dict(shares), NOW)
    assert (again.starts, again.preemptions, again.waits) == (
        decided.starts,
        decided.preemptions,
        decided.waits,
    )


@settings(max_examples=50, deadline=None)
@given(moments())
def test_empty_nodes_do_not_stay_empty(
    moment: tuple[list[Job], list[Job], list[Node], dict[str, Share]],
) -> None:
    waiting, _, there, shares = moment
    decided = schedule(waiting, [], there, shares, NOW)
    assert decided.starts or len(decided.refused) == len(waiting)


@settings(max_examples=80, deadline=None)
@given(moments())
def test_only_what_may_be_stopped_is_stopped_and_no_more_than_needed(
    moment: tuple[list[Job], list[Job], list[Node], dict[str, Share]],
) -> None:
    waiting, active, there, shares = moment
    policy = Policy()
    decided = schedule(waiting, active, there, shares, NOW, policy)
    by_id = {one.id: one for one in [*waiting, *active]}
    weight = {name: shares[name].weight if name in shares else 1.0 for name in PROJECTS}
    busy = {one.project_id for one in by_id.values() if one.id not in decided.refused}
    whole = sum((node.resources for node in there), Resources(0, 0, 0))

    def part(jobs: Sequence[Job]) -> float:
        total = sum((one.spec.total for one in jobs), Resources(0, 0, 0))
        pairs = [(total.cpus, whole.cpus), (total.gpus, whole.gpus), (total.memory, whole.memory)]
        return max(has / of for has, of in pairs if of)

    for victim_id, claimant_id in decided.preemptions.items():
        victim, claimant = by_id[victim_id], by_id[claimant_id]
        assert victim.spec.preemptible and victim.started_at is not None
        assert NOW - victim.started_at >= policy.minimum_run
        assert victim.preempt_at is None and claimant_id in decided.waits
        if victim.project_id == claimant.project_id:
            assert victim.spec.priority.level < claimant.spec.priority.level
        else:  # only projects above their due lose, and only to those that stay within theirs
            due = {name: max(weight[name] / sum(weight[n] for n in busy), policy.small) for name in busy}
            mine = [one for one in active if one.project_id == victim.project_id]
            assert part(mine) > due[victim.project_id]
            assert part([claimant]) <= due[claimant.project_id] + 1e-9
    for claimant_id in set(decided.preemptions.values()):
        # Without any one of its victims, with all else that ends, it would not fit.
        victims = [victim for victim, whom in decided.preemptions.items() if whom == claimant_id]
        if len(set(decided.preemptions.values())) > 1 or any(one.preempt_at for one in active):
            continue
        for kept in victims:
            stay = [one for one in active if one.id not in victims or one.id == kept]
            stay += begin(decided, waiting)
            assert not fits(by_id[claimant_id], stay, there)
        assert fits(
            by_id[claimant_id],
            [one for one in active if one.id not in victims] + begin(decided, waiting),
            there,
        )


def fits(one: Job, beside: Sequence[Job], there: Sequence[Node]) -> bool:
    """Whether a gang has room, counted the slow way."""
    ranks = 0
    for node in there:
        taken = used(beside, node)
        while (taken + one.spec.resources).fits(node.resources) and ranks < one.spec.ranks:
            taken += one.spec.resources
            ranks += 1
    return ranks >= one.spec.ranks


@settings(max_examples=80, deadline=None)
@given(moments())
def test_what_is_started_never_delays_the_head(
    moment: tuple[list[Job], list[Job], list[Node], dict[str, Share]],
) -> None:
    waiting, active, there, shares = moment
    decided = schedule(waiting, active, there, shares, NOW)
    head = decided.turn.head
    if head is None:
        return
    at = head.at
    limit = {one.id: one.spec.time_limit for one in waiting}
    still = [one for one in begin(decided, waiting) if (limit[one.id] or Policy().assumed) + NOW > at]
    # Started without a limit before the head had its place: expected to run as long as `assumed`.
    still += [one for one in active if one.id not in decided.preemptions and expected_end(one) > at]
    assert fits(decided.turn.waiting.jobs[head.index], still, there)


def expected_end(one: Job) -> float:
    assert one.started_at is not None
    if one.preempt_at is not None:
        return max(NOW, one.preempt_at + Policy().grace)
    if one.spec.time_limit is not None:
        return max(NOW, one.started_at + one.spec.time_limit)
    ran = NOW - one.started_at
    return NOW + max(Policy().assumed - ran, ran)


tiny = st.builds(Resources, st.integers(0, 3).map(float), st.integers(0, 3)).filter(
    lambda r: r.cpus + r.gpus > 0
)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(tiny, st.sampled_from([1.0, 2.0, 5.0])), min_size=2, max_size=4))
def test_each_project_gets_its_share_of_its_dominant_resource(kinds: list[tuple[Resources, float]]) -> None:
    """Ghodsi et al., section 4: sharing incentive. Less by what one job of each project is worth."""
    there = [Node("n", Resources(100, 100, 0))]
    shares = {f"p{i}": Share(weight) for i, (_, weight) in enumerate(kinds)}
    waiting = [
        job(f"{project}_{number:03}", JobSpec("job", ("run",), size, preemptible=True), project)
        for project, (size, _) in zip(shares, kinds, strict=True)
        for number in range(101)
    ]
    decided = schedule(waiting, [], there, shares, NOW)
    total = sum(share.weight for share in shares.values())
    for project, (size, weight) in zip(shares, kinds, strict=True):
        count = sum(name.startswith(f"{project}_") for name in decided.starts)
        share = count * max(size.cpus, size.gpus) / 100
        assert share >= weight / total * (1 - 0.03 * (len(kinds) + 1))


def test_who_used_much_lately_waits_for_who_used_little() -> None:
    there = [Node("n", Resources(4))]
    waiting = [
        job(f"{project}_{number}", JobSpec("job", ("run",)), project)
        for project in ("a", "b")
        for number in range(4)
    ]
    used_much = {"a": Share(used=(86_400 / 0.693 * 3.5, 0, 0)), "b": Share()}  # 3.5 CPUs on average
    assert set(schedule(waiting, [], there, used_much, NOW).starts) == {"b_0", "b_1", "b_2", "b_3"}
    little = {"a": Share(used=(86_400 / 0.693 * 1.5, 0, 0)), "b": Share()}
    assert set(schedule(waiting, [], there, little, NOW).starts) == {"a_0", "b_0", "b_1", "b_2"}


def test_priority_orders_a_project_s_own_jobs_only() -> None:
    there = [Node("n", Resources(2))]
    low, high = (JobSpec("job", ("run",), priority=priority) for priority in (Priority.LOW, Priority.HIGH))
    waiting = [
        job("a_low", low, "a", 50),
        job("a_high", high, "a"),
        job("b_low", low, "b"),
        job("b_high", high, "b"),
    ]
    assert set(schedule(waiting, [], there, {}, NOW).starts) == {"a_high", "b_high"}


def test_the_public_share_is_kept_for_small_projects_and_lent_to_what_may_be_stopped() -> None:
    there = [Node("n", Resources(100))]
    firm = JobSpec("job", ("run",), Resources(10))
    soft = replace(firm, preemptible=True)
    large = [job(f"large_{i}", firm, "large", 50) for i in range(10)]
    small = job("small", JobSpec("job", ("run",), Resources(5)), "small")
    alone = schedule(large, [], there, {}, NOW)
    assert len(alone.starts) == 10  # nobody else is there to keep it for
    decided = schedule(large, [], there, {"small": Share()}, NOW)
    assert len(decided.starts) == 9
    assert "kept for small projects" in decided.waits["large_9"].reason
    active = begin(decided, large)
    assert set(schedule([large[9], small], active, there, {}, NOW).starts) == {"small"}
    lent = schedule([job("large_s", soft, "large")], active, there, {"small": Share()}, NOW)
    assert set(lent.starts) == {"large_s"}
    active.append(running(job("large_s", soft, "large"), {"n": 1}, seconds=600))
    claimed = schedule([small], active, there, {"small": Share()}, NOW)
    assert claimed.preemptions == {"large_s": "small"}
    assert "being stopped for it" in claimed.waits["small"].reason


def test_a_claim_is_kept_until_the_others_have_stopped() -> None:
    there = [Node("n", Resources(10))]
    spec = JobSpec("job", ("run",), Resources(5), preemptible=True, time_limit=9000.0)
    active = [running(job(f"a_{i}", spec, "a", 900), {"n": 1}, seconds=700 + i) for i in range(2)]
    claimant = job("b_1", replace(spec, resources=Resources(5)), "b")
    first = schedule([claimant], active, there, {}, NOW)
    assert first.preemptions == {"a_0": "b_1"}  # the youngest loses least
    active[0] = replace(active[0], preempt_at=NOW, preempt_for="b_1")
    then = schedule(
        [claimant, job("c_1", JobSpec("job", ("run",), Resources(4)), "c")], active, there, {}, NOW
    )
    assert not then.preemptions and not then.starts
    assert then.waits["b_1"].likely_start == NOW + Policy().grace


def test_no_more_are_stopped_than_needed_when_the_first_are_too_small() -> None:
    there = [Node("n", Resources(10))]
    sizes = {"a_old": (6, 900), "a_young": (2, 700), "a_youngest": (2, 650)}
    active = [
        running(
            job(name, JobSpec("job", ("run",), Resources(cpus), preemptible=True), "a", 950), {"n": 1}, ran
        )
        for name, (cpus, ran) in sizes.items()
    ]
    claimant = job("b_1", JobSpec("job", ("run",), Resources(5)), "b")
    assert set(schedule([claimant], active, there, {}, NOW).preemptions) == {"a_old"}


def test_who_would_delay_another_is_told_so_and_only_of_its_own_project_by_name() -> None:
    there = [Node("n", Resources(4))]
    spec = JobSpec("job", ("run",), Resources(2), time_limit=1200.0)
    active = [running(job("r_1", spec, "a", 100), {"n": 1})]
    first = job("a_1", replace(spec, resources=Resources(4)), "a", 90)
    long = replace(spec, resources=Resources(1), time_limit=9000.0)
    own, other = job("a_2", long, "a"), job("c_1", long, "c")
    shares = {"a": Share(weight=100.0), "c": Share(used=(1e6, 0, 0))}  # so c comes after a
    waits = schedule([first, own, other], active, there, shares, NOW).waits
    assert waits["a_1"].likely_start == NOW + 1200.0
    assert waits["a_2"].reason.startswith("it would delay a_1, which goes first; with a time limit of 20 min")
    assert waits["c_1"].reason.startswith("it would delay a job of another project, which goes first")


def decide(policy: Policy, there: Sequence[Node]):  # type: ignore[no-untyped-def]
    def decided(
        waiting: Sequence[Job], active: Sequence[Job], shares: Mapping[str, Share], now: float
    ) -> Decided:
        return schedule(waiting, active, there, shares, now, policy)

    return decided


def test_a_gang_of_everything_does_not_starve() -> None:
    """Small jobs of its own project and of others come for ever; it needs all nodes at once."""
    rng = random.Random(1)
    policy = Policy(patience=600.0, small=0.0, minimum_run=1e9)
    there = [Node("a", Resources(4)), Node("b", Resources(4))]
    spec = JobSpec("job", ("run",), Resources(1), preemptible=True, time_limit=300.0)
    tasks = [
        Task(
            replace(job(f"job_{i:04}", spec, rng.choice("abc" if i > 10 else "bc")), created_at=i * 8.0),
            rng.uniform(50, 300),
        )
        for i in range(250)
    ]
    gang = replace(spec, resources=Resources(4), ranks=2, time_limit=100.0)
    tasks.append(Task(replace(job("gang", gang, "a"), created_at=100.0), 100.0))
    shares = {"a": Share(weight=0.001)}  # by shares alone it would never be its turn
    world = World(tasks, there, 1.0, shares)
    ended = {task.job.id: task for task in world.run(decide(policy, there))}
    assert all(task.end is not None for task in ended.values())
    start = ended["gang"].first_start
    assert start is not None and start - 100.0 <= policy.patience + 300 + 100


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(specs, st.sampled_from(LIMITS)), min_size=2, max_size=12), nodes)
def test_a_reserved_start_is_kept(drawn: list[tuple[JobSpec, float]], there: list[Node]) -> None:
    """One project, no arrivals: once a job goes next, its start only comes nearer, whoever goes ahead."""
    tasks = [
        Task(replace(job(f"job_{i:02}", replace(spec, time_limit=limit)), created_at=0.0), limit * 0.9)
        for i, (spec, limit) in enumerate(drawn)
    ]
    told: dict[str, float] = {}

    def see(world: World, decided: Decided) -> None:
        assert isinstance(decided, Schedule)
        for refused in decided.refused:
            del world.waiting[refused]
        head = decided.turn.head
        if head is not None:
            head_id = decided.turn.waiting.jobs[head.index].id
            assert head.at <= told.get(head_id, head.at) + 1e-6
            told[head_id] = head.at

    world = World(tasks, there, 1.0)
    for task in world.run(decide(Policy(minimum_run=1e9), there), see):
        if task.first_start is not None and task.job.id in told:
            assert task.first_start <= told[task.job.id] + 1.0 + 1e-6
