"""Rewards from the command line: look at answers, train, stop and go on, and what can be wrong with a reward."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from subprocess import PIPE, STDOUT
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from lapis import config
from lapis.checkpoint.sharded import load
from lapis.cli.main import lapis
from lapis.errors import ConfigError, InputError, LapisError
from lapis.home import Home
from lapis.log import silent
from lapis.model.manifest import Source
from lapis.model.weights import write_model
from lapis.tokenizer.chat import CHATML
from lapis.train.base import fine_tuning
from lapis.train.export import last_checkpoint
from lapis.train.objective import Objective, StepBatch
from lapis.train.recipe import Recipe
from lapis.train.run import Run
from lapis.train.trainer import Trainer, train
from tests import small_models

RECIPE = """
name = "rewarded"
[model]
from = "m"
[examples]
files = ["{folder}/prompts.jsonl"]
heldout = 0.25
[lora]
rank = 4
alpha = 8.0
[grpo]
{reward}
group = 4
max_tokens = 10
[train]
objective = "grpo"
steps = {steps}
batch = 2
sequence = 96
micro_batch = 4
optimizer = "adamw"
lr = 0.01
warmup = 1
"""
REWARDS = """
from dataclasses import dataclass

@dataclass
class Weights:
    wanted: str

def share(prompt, answer, fields):
    assert prompt[0]["role"] == "user"
    wanted = Weights(fields["wanted"]).wanted
    return answer.count(wanted) / max(1, len(answer))

def broken(prompt, answer, fields):
    return 1 / len([])
"""
FAILING = """
CALLS, whole = [], share

def share(prompt, answer, fields):
    CALLS.append(1)
    return whole(prompt, answer, fields if len(CALLS) <= 30 else {})
"""
PROMPTS = [{"messages": [{"role": "user", "content": f"{n}?"}], "wanted": "e"} for n in range(8)]


def run(*arguments: str) -> Result:
    return CliRunner().invoke(lapis, arguments, catch_exceptions=False)


def refused(error: type[LapisError], *arguments: str) -> str:
    with pytest.raises(error) as caught:
        run(*arguments)
    return str(caught.value)


def recipe(
    place: Path, reward: str = "share", lines: Sequence[object] = PROMPTS, steps: int = 6, **other: str
) -> Path:
    """A recipe beside its prompts; `other` are the settings of a grader in place of a function."""
    (place / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings = other or {"reward": f"{place}/rewards.py:{reward}"}
    path = place / "grpo.toml"
    said = "\n".join(f"{key} = {json.dumps(value)}" for key, value in settings.items())
    path.write_text(RECIPE.format(folder=place, reward=said, steps=steps))
    return path


@pytest.fixture
def place(tmp_path: Path, home: Home) -> Path:
    """A home with the model m, and rewards."""
    shape = small_models.config()
    write_model(
        home.models / "m",
        shape,
        small_models.random_state(shape),
        small_models.tokenizer(),
        source=Source("run", "test", licence="MIT"),
    )
    (tmp_path / "rewards.py").write_text(REWARDS)
    return tmp_path


class Killed:
    """An objective in a process that ends when a step (from 0 on) is to be made."""

    def __init__(self, whole: Objective, step: int) -> None:
        self.whole, self.at = whole, step

    def __getattr__(self, name: str) -> Any:
        return getattr(self.whole, name)

    def step(self, step: int, rank: int, ranks: int) -> StepBatch:
        if step == self.at:
            raise SystemExit
        return self.whole.step(step, rank, ranks)


def told(made: Run) -> list[dict[str, Any]]:
    """What the step events say of learning, without times."""
    names = (
        "step",
        "loss",
        "grad_norm",
        "reward",
        "reward_std",
        "length",
        "kl",
        "ratio_off",
        "silent_groups",
    )
    return [{name: event[name] for name in names} for event in made.events.read("step")]


def assert_same(one: Run, other: Run) -> None:
    """Weights and optimizer ended with the same bits."""
    ends = [load(last_checkpoint(made)).groups["optimizer"] for made in (one, other)]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_answers_and_their_rewards_are_shown_before_anything_is_trained(place: Path, home: Home) -> None:
    path = recipe(place)
    shown = run("train", str(path), "--inspect").output
    assert "examples 6, heldout examples 2" in shown
    assert "<|im_start|>assistant\n" in shown
    assert shown.count("--- reward ") == 4
    facts = json.loads(run("train", str(path), "--inspect", "--json").stdout)
    group = facts["group"]["answers"]
    assert len(facts["prompts"]) == 2
    for answer in group:
        assert answer["reward"] == answer["text"].count("e") / max(1, len(answer["text"]))
    assert sum(answer["advantage"] for answer in group) == pytest.approx(0.0, abs=1e-9)
    assert not Run.list(home)


def test_a_run_tells_its_rewards_and_exports_what_it_learnt(place: Path, home: Home) -> None:
    run("train", str(recipe(place)), "--json")
    made = Run.find(home, "last")
    held = made.events.read("heldout")
    assert [event["step"] for event in held] == [0, 6]
    assert {"reward", "length"} <= held[0].keys()
    start = made.events.read("start")[0]
    assert start["reward"] == f"{place}/rewards.py:share"
    assert len(start["reward_digest"]) == 64
    last = made.steps()[-1]
    assert 0 <= last["reward"] <= 1
    assert last["length"] <= 10
    assert last["kl"] >= 0
    if start["bit_exact"]:
        assert {event["ratio_off"] for event in made.steps()} == {0.0}
    assert last["spent"]["step"] > last["spent"]["data"]  # sampling is work, not waiting
    shown = run("runs", "show", made.id).output
    assert "reward       " in shown
    run("runs", "plot", made.id, "--out", str(place / "curve.png"))
    run("models", "export", made.id, str(place / "whole"))


def test_a_run_that_was_killed_samples_and_learns_the_same_again(
    place: Path, home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in step 4 with a checkpoint of step 2: step 3 is done twice, and is the same both times."""
    monkeypatch.setattr("lapis.train.trainer.RECORD_EVERY_S", 0.0)
    read = config.load(recipe(place), Recipe, ("checkpoint.steps=2",))
    runs = [Run.create(home, name, config.to_toml(read), "0" * 64) for name in ("whole", "killed")]
    train(read, fine_tuning(read, home), runs[0])
    trainer = Trainer(read, Killed(fine_tuning(read, home), 3), runs[1])
    with pytest.raises(SystemExit):
        trainer.loop(silent, threading.Event())
    train(read, fine_tuning(read, home), runs[1])
    assert [event["step"] for event in runs[1].events.read("resume")] == [2]
    whole = told(runs[0])
    assert [event["step"] for event in whole] == [1, 2, 3, 4, 5, 6]
    assert told(runs[1]) == whole[:3] + whole[2:]
    assert_same(*runs)


def test_a_reward_that_raises_costs_no_step(place: Path, home: Home) -> None:
    """What was learnt before is saved; once the reward is mended, the same command goes on with the same run."""
    path = recipe(place)
    (place / "rewards.py").write_text(REWARDS + FAILING)
    message = refused(InputError, "train", str(path))  # 2 held-out prompts, then 8 answers a step
    assert re.search(
        r"share failed for .*prompts\.jsonl:\d: KeyError: 'wanted' \(.*rewards\.py:\d+\)", message
    )
    assert "goes on from the last checkpoint" in message
    made = Run.find(home, "last")
    assert made.status() == "stopped"
    assert load(last_checkpoint(made)).state["step"] == 3
    (place / "rewards.py").write_text(REWARDS)
    run("train", str(path))
    assert made.status() == "finished"
    assert [event["step"] for event in made.events.read("resume")] == [3]
    run("train", str(path), "--set", "name=unbroken")
    assert_same(made, Run.find(home, "unbroken"))


def test_a_reward_that_fails_for_a_held_out_prompt_costs_no_step(place: Path, home: Home) -> None:
    """At the checkpoint of step 4 the answers are measured before it is saved."""
    path = recipe(place)
    (place / "rewards.py").write_text(REWARDS + FAILING.replace("30", str(2 + 4 * 8 + 1)))
    refused(InputError, "train", str(path), "--set", "checkpoint.steps=4")
    made = Run.find(home, "last")
    assert made.status() == "stopped"
    assert load(last_checkpoint(made)).state["step"] == 4
    (place / "rewards.py").write_text(REWARDS)
    run("train", str(path), "--set", "checkpoint.steps=4")
    assert [event["step"] for event in made.events.read("heldout")] == [0, 6]


def test_a_reward_that_cannot_be_had_is_refused_before_anything_starts(place: Path, home: Home) -> None:
    assert "Did you mean 'share'?" in refused(InputError, "train", str(recipe(place, "shares")))
    absent = f"grpo.reward={place}/absent.py:share"
    assert "absent.py cannot be read" in refused(InputError, "train", str(recipe(place)), "--set", absent)
    assert "names no function" in refused(
        ConfigError, "train", str(recipe(place)), "--set", "grpo.reward=x.py"
    )
    (place / "rewards.py").write_text("1 / 0")
    assert "rewards.py cannot be loaded: ZeroDivisionError" in refused(
        InputError, "train", str(recipe(place))
    )
    assert "exactly one of" in refused(ConfigError, "train", str(recipe(place, regex=".", exact="a")))
    assert "is no regular expression" in refused(ConfigError, "train", str(recipe(place, regex="(")))
    assert not Run.list(home)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ({"messages": []}, "an empty one"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "nothing to answer"),
        ({"messages": PROMPTS[0]["messages"], "tools": []}, "tools are not taken"),
        ({"prompt": ""}, "is empty"),
        ({"prompt": "a b c d e f g h " * 20}, "more than train.sequence - grpo.max_tokens = 86"),
        ({"question": "x"}, "the keys of the line are 'question'"),
    ],
)
def test_a_bad_prompt_is_named(place: Path, line: object, said: str) -> None:
    message = refused(InputError, "train", str(recipe(place, lines=[PROMPTS[0], line])))
    assert "prompts.jsonl:2: " in message
    assert said in message


def test_a_file_without_prompts_is_refused(place: Path) -> None:
    assert "holds no examples" in refused(InputError, "train", str(recipe(place, lines=[])))


def test_graders_need_no_code(place: Path, home: Home) -> None:
    lines = [{"prompt": f"{n} the quick", "answer": "fox"} for n in range(4)]
    path = recipe(place, lines=lines, regex="[aeiou]{2}")
    group = json.loads(run("train", str(path), "--inspect", "--json").stdout)["group"]["answers"]
    assert {answer["reward"] for answer in group} <= {0.0, 1.0}
    goal = fine_tuning(config.load(recipe(place, lines=lines, exact="answer"), Recipe), home)
    asked = goal.prompts.trained[0]  # type: ignore[attr-defined]
    assert [goal.reward(asked, text) for text in (" fox\n", "foxes")] == [1.0, 0.0]  # type: ignore[attr-defined]
    missing = refused(InputError, "train", str(recipe(place, lines=lines, exact="answers")))
    assert "Did you mean 'answer'?" in missing


PROGRAM = """
def grade(sample, item):
    assert item["messages"][0]["role"] == "user"
    return sample["output_text"].count(item["wanted"]) / max(1, len(sample["output_text"]))
"""


def test_the_graders_of_the_api_are_rewards(place: Path, home: Home) -> None:
    """A program does what the same function does; a model grades with an engine of its own."""
    program = {"grader.type": "python", "grader.name": "share", "grader.source": PROGRAM}
    goals = [fine_tuning(config.load(recipe(place, **other), Recipe), home) for other in ({}, program)]
    asked = goals[0].prompts.trained[0]  # type: ignore[attr-defined]
    for text in ("eel", "e", "", "x"):
        assert (
            goals[1].reward(asked, text)
            == goals[0].reward(asked, text)
            == text.count("e") / max(1, len(text))
        )  # type: ignore[attr-defined]
    assert goals[1].facts()["reward"] == "grader share"  # type: ignore[attr-defined]

    judge = {
        "type": "score_model", "name": "judge", "model": "judge", "range": [0, 2],
        "sampling_params": {"max_completions_tokens": 300},
        "input": [{"role": "user", "content": "{{ sample.output_text }}"}],
    }  # fmt: skip
    shape, tokens = small_models.config(), small_models.tokenizer()
    state, source = small_models.random_state(shape), Source("run", "test")
    write_model(home.models / "judge", shape, state, tokens, source=source, chat_template=CHATML)
    read = config.load(recipe(place), Recipe)
    assert read.grpo is not None
    grpo = read.grpo.model_copy(update={"reward": None, "grader": judge})
    goal = fine_tuning(read.model_copy(update={"grpo": grpo}), home)
    assert 0 <= goal.reward(asked, "hi") <= 2  # type: ignore[attr-defined]


def test_a_grader_that_cannot_grade_ends_the_run_and_an_answer_that_cannot_be_graded_earns_nothing(
    place: Path, home: Home
) -> None:
    check = {"grader.type": "string_check", "grader.name": "same", "grader.operation": "eq"}
    texts = {"grader.input": "{{ sample.output_json.x }}", "grader.reference": "{{ item.wanted }}"}
    goal = fine_tuning(config.load(recipe(place, **check, **texts), Recipe), home)
    asked = goal.prompts.trained[0]  # type: ignore[attr-defined]
    assert [goal.reward(asked, text) for text in ('{"x": "e"}', '{"x": "f"}', "no JSON")] == [1.0, 0.0, 0.0]  # type: ignore[attr-defined]
    texts["grader.reference"] = "{{ item.want }}"
    goal = fine_tuning(config.load(recipe(place, **check, **texts), Recipe), home)
    with pytest.raises(InputError, match=r"The reward grader same failed for .*no 'want' in item"):
        goal.reward(asked, '{"x": "e"}')  # type: ignore[attr-defined]
    said = refused(ConfigError, "train", str(recipe(place, **check)))
    assert "input: field required" in said
    program = {"grader.type": "python", "grader.name": "code", "grader.source": "def grade(sample) return 1"}
    assert "cannot be run: SyntaxError" in refused(InputError, "train", str(recipe(place, **program)))


def ranks(path: Path, mesh: str, *sets: str) -> list[subprocess.CompletedProcess[str]]:
    """Two ranks of `lapis train`, to their end, without adapters."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "lapis.cli.main", "train", str(path), "--set", f"train.mesh={mesh}"]
    command += [part for item in sets for part in ("--set", item)]
    begun = [
        subprocess.Popen(
            command, env={**os.environ, **common, "RANK": str(rank)}, stdout=PIPE, stderr=STDOUT, text=True
        )
        for rank in range(2)
    ]
    return [
        subprocess.CompletedProcess(command, rank.wait(timeout=100), rank.communicate()[0]) for rank in begun
    ]


@pytest.mark.parametrize(
    ("mesh", "lora"), [pytest.param("fsdp=2", False, marks=pytest.mark.long), ("dp=2", True)]
)
def test_two_ranks_answer_their_own_prompts_and_learn_what_one_learns(
    place: Path, home: Home, mesh: str, lora: bool
) -> None:
    path = recipe(place, steps=3)
    if not lora:
        path.write_text(path.read_text().replace("[lora]\nrank = 4\nalpha = 8.0\n", ""))
    for done in ranks(path, mesh, "train.dtype=fp32", "train.lr=0.001"):
        assert done.returncode == 0, done.stdout
    run("train", str(path), "--set", "name=alone", "--set", "train.dtype=fp32", "--set", "train.lr=0.001")
    two, one = (made.events.read("step") for made in Run.list(home))
    assert two[-1]["step"] == one[-1]["step"] == 3
    exact = Run.list(home)[0].events.read("start")[0]["bit_exact"]
    for many, single in ((many, single) for many in two for single in one if many["step"] == single["step"]):
        assert many["ratio_off"] == 0.0 or not exact
        assert many["reward"] == pytest.approx(single["reward"])
        assert many["tokens"] == single["tokens"]
        assert many["grad_norm"] == pytest.approx(single["grad_norm"], rel=1e-4)


def test_a_mesh_that_cuts_layers_or_adapters_is_refused(place: Path, home: Home) -> None:
    read = config.load(recipe(place), Recipe, ("train.mesh=fsdp=2",))
    with pytest.raises(ConfigError, match=r"\[lora\] is not offered on the mesh fsdp=2"):
        read.mesh(2)
    path = recipe(place)
    path.write_text(path.read_text().replace("[lora]\nrank = 4\nalpha = 8.0\n", ""))
    said = refused(ConfigError, "train", str(path), "--ranks", "2", "--set", "train.mesh=tp=2")
    assert "The objective grpo is not offered on the mesh tp=2: each rank samples answers" in said
    said = refused(ConfigError, "train", str(path), "--set", "train.micro_batch=3")
    assert "prompts with 4 answers each cannot be shared by 1" in said
    assert not Run.list(home)
