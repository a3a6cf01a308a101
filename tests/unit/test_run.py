"""A run's folder: found by id, prefix or `last`; its status tells the truth also after a kill."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lapis.errors import ConflictError, InputError, NotFoundError
from lapis.home import Home
from lapis.train.run import Run, effective_steps, status_of

DIGEST = "ab12" + "0" * 60


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path)


def test_a_new_run_is_readable_sortable_and_whole(home: Home) -> None:
    run = Run.create(home, "laptop", "[model]\n", DIGEST)
    assert re.fullmatch(r"laptop-\d{8}-\d{6}-ab12", run.id)
    assert run.name == "laptop"
    assert run.recipe_text == "[model]\n"
    assert run.events.read("create")[0]["recipe_digest"] == DIGEST
    assert [path.name for path in home.runs.iterdir()] == [run.id]


def test_runs_of_one_second_get_different_ids_and_stay_in_order(home: Home) -> None:
    runs = [Run.create(home, "a-name-with-dashes", "", DIGEST) for _ in range(3)]
    assert len({run.id for run in runs}) == 3
    assert {run.name for run in runs} == {"a-name-with-dashes"}
    assert sorted(run.id for run in Run.list(home)) == sorted(run.id for run in runs)


@pytest.mark.parametrize("name", ["", "../up", "a/b", ".hidden", "-x", "sp ace"])
def test_a_name_that_is_no_folder_name_is_refused(home: Home, name: str) -> None:
    with pytest.raises(InputError, match="cannot be named"):
        Run.create(home, name, "", DIGEST)
    assert not home.runs.exists()


def test_a_run_is_found_by_id_prefix_and_last(home: Home) -> None:
    first = Run.create(home, "laptop", "", DIGEST)
    second = Run.create(home, "server", "", DIGEST)
    assert Run.find(home, first.id).id == first.id
    assert Run.find(home, "ser").id == second.id
    assert Run.find(home, "last").id == Run.list(home)[-1].id
    assert Run.open(home, second.id).id == second.id


def test_a_folder_that_was_emptied_is_no_run(home: Home) -> None:
    run = Run.create(home, "laptop", "", DIGEST)
    (home.runs / "x-20260101-000000-abcd").mkdir()
    assert [one.id for one in Run.list(home)] == [run.id]


def test_an_unknown_run_names_the_nearest_and_the_next_command(home: Home) -> None:
    run = Run.create(home, "laptop", "", DIGEST)
    with pytest.raises(NotFoundError, match=f"Did you mean '{run.id}'") as caught:
        Run.find(home, run.id.replace("laptop", "latpop"))
    assert "lapis runs list" in caught.value.hint
    with pytest.raises(NotFoundError):
        Run.open(home, "../..")


def test_no_runs_at_all(tmp_path: Path) -> None:
    assert Run.list(Home(tmp_path / "absent")) == []
    with pytest.raises(NotFoundError, match="no run 'last'"):
        Run.find(Home(tmp_path / "absent"), "last")


def test_a_prefix_of_several_runs_lists_them(home: Home) -> None:
    runs = [Run.create(home, "laptop", "", DIGEST) for _ in range(2)]
    with pytest.raises(InputError, match="fits 2 runs") as caught:
        Run.find(home, "lap")
    assert all(run.id in caught.value.message for run in runs)


def test_status_follows_the_life_of_a_run(home: Home) -> None:
    run = Run.create(home, "laptop", "", DIGEST)
    assert run.status() == "stopped"
    with run.hold():
        run.events.write("start", parameters=5)
        assert run.status() == "running"
        with pytest.raises(ConflictError, match=run.id), run.hold():
            pass
        run.events.write("end", reason="finished")
        assert run.status() == "finished"
    assert run.status() == "finished"


@pytest.mark.parametrize(
    ("held", "names", "status"),
    [
        (True, ["create"], "running"),
        (False, ["create", "start"], "stopped"),  # killed
        (False, ["create", "start", "stopped"], "stopped"),
        (True, ["create", "start", "stopped", "resume"], "running"),
        (False, ["create", "start", "stopped", "resume", "finished"], "finished"),
        (False, ["create", "start", "failed"], "failed"),
    ],
)
def test_status_is_decided_by_events_and_holder(held: bool, names: list[str], status: str) -> None:
    ends = ("stopped", "finished", "failed")
    events = [{"event": "end", "reason": name} if name in ends else {"event": name} for name in names]
    assert status_of(held, events) == status


def test_a_killed_run_is_stopped_not_running(home: Home) -> None:
    run = Run.create(home, "laptop", "", DIGEST)
    code = (
        "import sys, time; from pathlib import Path; from lapis.train.run import Run\n"
        "run = Run(Path(sys.argv[1]))\n"
        "with run.hold():\n    run.events.write('start'); print('held', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(run.folder)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert run.status() == "running"
        process.send_signal(signal.SIGKILL)
    assert run.status() == "stopped"


def test_a_resume_takes_back_the_steps_after_its_checkpoint() -> None:
    steps = [{"event": "step", "step": step, "loss": float(step)} for step in (1, 2, 3)]
    again = {"event": "step", "step": 2, "loss": 9.0}
    events = [*steps, {"event": "resume", "step": 1}, again]
    assert effective_steps(events) == [steps[0], again]


def test_a_run_killed_before_its_first_checkpoint_starts_its_steps_anew() -> None:
    first = [{"event": "step", "step": step, "loss": 5.0} for step in (1, 4, 8)]
    second = [{"event": "step", "step": step, "loss": 4.0} for step in (2, 6)]
    assert effective_steps([{"event": "start"}, *first, {"event": "start"}, *second]) == second


def test_the_summary_gathers_what_the_events_and_the_evaluation_say(home: Home) -> None:
    run = Run.create(home, "laptop", "", DIGEST)
    empty = run.summary()
    assert (empty.step, empty.loss, empty.bits_per_byte, empty.recipe_digest) == (None, None, None, DIGEST)
    run.events.write("start", parameters=14, dataset_digest="d")
    run.events.write("step", step=5, loss=2.5, tokens=640, seconds=1.5)
    run.write_evaluation({"bits_per_byte": 1.25})
    summary = run.summary()
    assert (summary.parameters, summary.step, summary.loss, summary.tokens) == (14, 5, 2.5, 640)
    assert (summary.bits_per_byte, summary.dataset_digest) == (1.25, "d")
    assert run.evaluation() == {"bits_per_byte": 1.25}
    assert abs(summary.created - time.time()) < 3600
