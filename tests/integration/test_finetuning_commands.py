"""Fine-tuning from the command line: look at a batch, train, go on, export the adapter and the merged model."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from lapis import config
from lapis.checkpoint.sharded import load
from lapis.cli.main import lapis
from lapis.errors import ConflictError, InputError, LapisError
from lapis.home import Home
from lapis.kernels.batch import packed
from lapis.log import silent
from lapis.model.adapters import read_adapter
from lapis.model.manifest import Source
from lapis.model.store import ModelStore
from lapis.model.weights import read_model, write_model
from lapis.train.base import fine_tuning
from lapis.train.export import last_checkpoint
from lapis.train.lora import merged
from lapis.train.recipe import Recipe
from lapis.train.run import Run
from lapis.train.trainer import Trainer, train
from tests import small_models

RECIPE = """
name = "tuned"
[model]
from = "m"
[examples]
files = ["{file}"]
heldout = 0.25
[lora]
rank = 4
alpha = 8.0
[train]
objective = "{objective}"
steps = {steps}
batch = 2
sequence = 128
optimizer = "adamw"
lr = 0.02
warmup = 1
"""
SAMPLES = 'train.samples={prompts = ["who is it?"], heldout = 2, tokens = 8}'
CHATS = [
    {"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": "the fox"}]}
    for n in range(8)
]
PAIRS = [{"prompt": f"{n}?", "chosen": "the fox", "rejected": "the dog"} for n in range(8)]


def run(*arguments: str) -> Result:
    return CliRunner().invoke(lapis, arguments, catch_exceptions=False)


def refused(error: type[LapisError], *arguments: str) -> str:
    with pytest.raises(error) as caught:
        run(*arguments)
    return str(caught.value)


@pytest.fixture
def place(tmp_path: Path, home: Home) -> Path:
    """A home with the model m, and recipes beside it."""
    shape = small_models.config()
    write_model(
        home.models / "m",
        shape,
        small_models.random_state(shape),
        small_models.tokenizer(),
        source=Source("run", "test", licence="MIT"),
    )
    for objective, lines in (("sft", CHATS), ("dpo", PAIRS)):
        recipe(tmp_path, objective, lines)
    return tmp_path


def recipe(place: Path, objective: str, lines: Sequence[object], steps: int = 6) -> Path:
    file, path = place / f"{objective}.jsonl", place / f"{objective}.toml"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    path.write_text(RECIPE.format(file=file, objective=objective, steps=steps))
    return path


def test_a_batch_is_shown_before_anything_is_trained(place: Path, home: Home) -> None:
    shown = run("train", str(place / "sft.toml"), "--inspect").output
    assert "examples 6, heldout examples 2" in shown
    assert "<|im_start|>assistant\n⟦the fox<|im_end|>⟧" in shown
    facts = json.loads(run("train", str(place / "dpo.toml"), "--inspect", "--json").stdout)
    assert facts["batch"]["micro_batches"] == 1
    texts = facts["batch"]["texts"]
    said = ["".join(p["text"] for p in text["pieces"] if p["trained"]) for text in texts]
    assert said == ["the fox<|endoftext|>", "the dog<|endoftext|>"] * 2
    assert sum(text["trained"] for text in texts) == facts["batch"]["trained"]
    assert not Run.list(home)


def test_an_adapter_is_trained_exported_and_merged(place: Path, home: Home) -> None:
    run("train", str(place / "sft.toml"), "--json", "--set", SAMPLES)
    made = Run.find(home, "last")
    first, last = (event["samples"] for event in made.samples())
    assert first[0]["prompt"] == "who is it?"  # which is asked as a chat
    assert len(first) == 3
    for one in first[1:]:  # held-out prompts, as the model reads them
        assert re.fullmatch(r"<\|im_start\|>user\n\d\?<\|im_end\|>\n<\|im_start\|>assistant\n", one["prompt"])
    assert {one["text"] for one in last} == {"the fox"}  # by the adapter
    assert {one["text"] for one in first} != {"the fox"}
    held = made.events.read("heldout")
    assert [event["step"] for event in held] == [0, 6]
    assert held[1]["loss"] < held[0]["loss"]
    start = made.events.read("start")[0]
    assert (start["base"], start["base_digest"]) == ("m", ModelStore(home).get("m").digest)
    weights = load(last_checkpoint(made)).groups["model"]
    assert all(name.startswith("lora.layers.") for name in weights)

    run("models", "export", made.id, str(place / "adapter"), "--adapter")
    run("models", "export", made.id, str(place / "merged"))
    run("pull", str(place / "adapter"), "--name", "tuned")
    assert ModelStore(home).get("tuned").base == "m"
    run("pull", str(place / "merged"), "--name", "whole")
    base, whole = read_model(home.models / "m"), read_model(home.models / "whole")
    assert whole.manifest.stop_ids == base.manifest.stop_ids
    added = merged(base.model.state_dict(), read_adapter(place / "adapter", base.config))
    base.model.load_state_dict(added)
    ids = torch.arange(5, 25)
    with torch.no_grad():
        assert torch.equal(whole.model(ids, packed([20])), base.model(ids, packed([20])))
    released = json.loads(run("release", "create", "tuned", "--run", made.id, "--json").stdout)
    assert released["lineage"]["run"] == made.id
    assert released["lineage"]["licence"] == "MIT"
    assert "it has no dataset of its own" in refused(ConflictError, "evaluate", made.id)


def test_preferences_tell_accuracy_and_margin(place: Path, home: Home) -> None:
    run("train", str(place / "dpo.toml"), "--json", "--set", "train.samples.heldout=1")
    made = Run.find(home, "last")
    assert [event["step"] for event in made.samples()] == [0, 6]
    last = made.steps()[-1]
    assert last["accuracy"] == 1.0
    assert last["margin"] > 0.1
    assert made.events.read("heldout")[-1]["accuracy"] == 1.0


def test_an_adapter_of_a_base_that_has_changed_is_refused(place: Path, home: Home) -> None:
    run("train", str(place / "sft.toml"), "--json")
    shape = small_models.config()
    run("models", "remove", "m", "--yes")
    write_model(
        home.models / "m",
        shape,
        small_models.random_state(shape, seed=1),
        small_models.tokenizer(),
        source=Source("run", "test"),
    )
    said = refused(ConflictError, "models", "export", "last", str(place / "adapter"), "--adapter")
    assert "started from other weights than m has now" in said


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ({"messages": [{"role": "user", "content": "a"}]}, ":1: the chat has no assistant turn"),
        ({"text": "a"}, ":1: the keys of the line are 'text'"),
        ({"prompt": "a", "completion": "b" * 500}, ":1: the example has"),
    ],
)
def test_bad_examples_are_told_before_a_run_is_made(place: Path, home: Home, line: object, said: str) -> None:
    path = recipe(place, "sft", [line])
    assert said in refused(InputError, "train", str(path))
    (place / "sft.jsonl").write_text("{\n")
    assert "sft.jsonl:1: the line is not JSON" in refused(InputError, "train", str(path))
    (place / "sft.jsonl").write_text("")
    assert "the file is empty" in refused(InputError, "train", str(path))
    assert not Run.list(home)


def test_a_model_with_ids_beyond_its_vocabulary_is_not_trained(place: Path, home: Home) -> None:
    shape = home.models / "m" / "config.json"
    shape.write_text(shape.read_text().replace('"vocab_size": 320', '"vocab_size": 280'))
    said = refused(InputError, "train", str(place / "sft.toml"))
    assert "has ids up to 299, its model rows for 280 tokens only" in said


class After(threading.Event):
    """Is set once it was asked for so many times."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.left = times

    def is_set(self) -> bool:
        self.left -= 1
        return self.left < 0


def test_a_stopped_adapter_run_goes_on_bit_for_bit(place: Path, home: Home) -> None:
    path = place / "sft.toml"
    resolved = config.load(path, Recipe, ["train.steps=4", "train.decay=0.0"])
    weights = []
    for name, pauses in (("whole", 0), ("paused", 2)):
        objective = fine_tuning(resolved, home)
        made = Run.create(home, name, config.to_toml(resolved), "0000")
        if pauses:
            first = Trainer(resolved, objective, made)
            with pytest.raises(KeyboardInterrupt):
                first.loop(silent, After(pauses))
            assert made.events.read("end")[-1]["step"] == pauses
        train(resolved, fine_tuning(resolved, home), made)
        weights.append(load(last_checkpoint(made)).groups["model"])
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    (place / "sft.jsonl").write_text((place / "sft.jsonl").read_text().replace("fox", "dog"))
    with pytest.raises(ConflictError, match="other data"):
        Trainer(resolved, fine_tuning(resolved, home), made).loop(silent, threading.Event())
