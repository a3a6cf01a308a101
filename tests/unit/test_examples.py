"""Files of examples: every form is read, every bad line is named, and only what should be is trained on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lapis.data.examples import Chat, Completion, Preference, read_examples
from lapis.data.recipe import ExamplesConfig
from lapis.data.samples import Encoder, Samples, of_step, packed_batches, prepare_samples, template_of
from lapis.errors import InputError
from lapis.tokenizer.bpe import Tokenizer
from lapis.tokenizer.chat import CHATML, ChatTemplate
from lapis.tokenizer.tools import prompt_with_tools, read_tools
from tests.texts import prose

USER, BOT = {"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Me."}
TOOL = {
    "type": "function",
    "function": {"name": "look", "description": "Looks.", "parameters": {"type": "object", "properties": {}}},
}


@pytest.fixture(scope="module")
def encoder() -> Iterator[Encoder]:
    chat = ChatTemplate(CHATML)
    yield Encoder(Tokenizer.train([prose(n) for n in range(5)], 300), chat)
    chat.close()


def write(tmp_path: Path, *lines: Any, name: str = "examples.jsonl") -> Path:
    path = tmp_path / name
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def prepared(path: Path, encoder: Encoder, longest: int = 200, **options: Any) -> Samples:
    config = ExamplesConfig(**{"files": (str(path),), "heldout": 0.0, **options})
    return prepare_samples(config, encoder, longest=longest, preferences=False)


def test_every_form_of_a_line_is_read(tmp_path: Path) -> None:
    parts = {"role": "user", "content": [{"type": "text", "text": "Wh"}, {"type": "text", "text": "o?"}]}
    path = write(
        tmp_path, {"messages": [parts, BOT], "tools": [TOOL]}, "", {"prompt": "2+2=", "completion": "4"}
    )
    chat, completion = read_examples([path], "texts")
    assert chat.example == Chat((USER, BOT), (True,), read_tools([TOOL]))
    assert completion.example == Completion("2+2=", "4")
    assert completion.place == f"{path}:3"
    other = {"role": "assistant", "content": "You."}
    path = write(
        tmp_path,
        {
            "input": {"messages": [USER, BOT, USER]},
            "preferred_output": [BOT],
            "non_preferred_output": [other],
        },
        {"prompt": "2+2=", "chosen": "4", "rejected": "5"},
        {"prompt": [USER], "chosen": [BOT], "rejected": [other]},
    )
    found = [line.example for line in read_examples([path], "preferences")]
    assert found == [
        Preference(
            Chat((USER, BOT, USER, BOT), (False, True)), Chat((USER, BOT, USER, other), (False, True))
        ),
        Preference(Completion("2+2=", "4"), Completion("2+2=", "5")),
        Preference(Chat((USER, BOT), (True,)), Chat((USER, other), (True,))),
    ]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"messages": [', "the line is not JSON"),
        ("[1]", "no JSON object"),
        ({"text": "a"}, "the keys of the line are 'text'"),
        ({"messages": [USER]}, "the chat has no assistant turn"),
        ({"messages": [USER, {**BOT, "weight": 0}]}, "assistant turns of weight 0 only"),
        ({"messages": [USER, {**BOT, "weight": 0.5}]}, "weight 0.5"),
        ({"messages": [{"role": "robot", "content": "a"}, BOT]}, "unknown role 'robot'"),
        ({"messages": [{"role": "user"}, BOT]}, "message 0 has no content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}, BOT]}, "neither a text nor"),
        ({"messages": "hello"}, '"messages" is no list'),
        ({"messages": [USER, BOT], "tools": [{}]}, 'type "function"'),
        ({"prompt": "a", "completion": ""}, "nothing to train on"),
        ({"prompt": "a", "completion": 4}, "are texts"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: Any, said: str) -> None:
    path = write(tmp_path, {"messages": [USER, BOT]}, line)
    with pytest.raises(InputError) as error:
        read_examples([path], "texts")
    assert str(error.value).startswith(f"{path}:2: ")
    assert said in str(error.value)


def test_a_file_that_is_empty_or_missing_or_of_the_other_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no examples: the file is empty"):
        read_examples([write(tmp_path, "", " ")], "texts")
    with pytest.raises(InputError, match=r"cannot be read: No such file"):
        read_examples([tmp_path / "none.jsonl"], "texts")
    with pytest.raises(InputError, match=r":1: the keys of the line are 'messages'"):
        read_examples([write(tmp_path, {"messages": [USER, BOT]})], "preferences")


def test_only_the_answers_are_trained_on_and_weight_0_is_left_out(encoder: Encoder) -> None:
    text = encoder.encode(Chat((USER, BOT, USER, {"role": "assistant", "content": "I."}), (False, True)))
    said = [id for id, trained in zip(text.ids, text.trained, strict=True) if trained]
    assert encoder.tokenizer.decode(said, special=True) == "I.<|im_end|>"
    assert text.trained[-1]  # nothing after the last trained token costs time
    text = encoder.encode(Completion("2+2=", "4"))
    assert encoder.tokenizer.decode(text.ids.tolist(), special=True) == "2+2=4<|endoftext|>"
    assert text.targets == 2
    bos = Encoder(encoder.tokenizer, None, bos_id=encoder.tokenizer.end_id)
    assert bos.encode(Completion("", "4")).ids.tolist()[0] == encoder.tokenizer.end_id


def test_a_chat_with_tools_begins_as_it_is_served(encoder: Encoder) -> None:
    tools = read_tools([TOOL])
    call = {"id": "1", "type": "function", "function": {"name": "look", "arguments": "{}"}}
    asked = [USER, {"role": "assistant", "content": "", "tool_calls": [call]}]
    asked.append({"role": "tool", "tool_call_id": "1", "content": "nothing"})
    assert encoder.chat is not None
    text = encoder.encode(Chat((*asked, BOT), (True, True), tools))
    for turn in (asked[:1], asked):
        prompt = prompt_with_tools(encoder.chat, encoder.tokenizer, turn, tools).ids
        assert text.ids[: len(prompt)].tolist() == prompt
    said = [id for id, trained in zip(text.ids, text.trained, strict=True) if trained]
    told = encoder.tokenizer.decode(said, special=True)
    assert told.startswith("<tool_call>\n")
    assert told.endswith("</tool_call><|im_end|>Me.<|im_end|>")


def test_what_is_too_long_is_refused_or_dropped_and_counted(tmp_path: Path, encoder: Encoder) -> None:
    long = {"messages": [USER, {"role": "assistant", "content": prose(1)}]}
    path = write(tmp_path, {"messages": [USER, BOT]}, long)
    with pytest.raises(
        InputError, match=rf"{path}:2: the example has [\d,]+ tokens, more than train.sequence = 60"
    ):
        prepared(path, encoder, 60)
    found = prepared(path, encoder, 60, too_long="drop")
    assert (len(found.trained), found.dropped) == (1, 1)
    with pytest.raises(InputError, match="No example is left to train on: all 2"):
        prepared(path, encoder, 5, too_long="drop")


def test_a_model_without_a_template_takes_chatml_if_it_has_its_marks(
    tmp_path: Path, encoder: Encoder
) -> None:
    found = template_of("", None, encoder.tokenizer)
    assert found is not None
    assert found.template == CHATML
    path = write(tmp_path, {"messages": [USER, BOT]})
    with pytest.raises(InputError, match=r":1: the model has no chat template"):
        prepared(path, Encoder(encoder.tokenizer, None))
    (tmp_path / "own.jinja").write_text("{% for m in messages %}{{ m.content }}|{% endfor %}")
    own = template_of(str(tmp_path / "own.jinja"), found, encoder.tokenizer)
    assert own is not None
    text = Encoder(encoder.tokenizer, own).encode(Chat((USER, BOT), (True,)))
    assert encoder.tokenizer.decode(text.ids.tolist()) == "Who?|Me.|"
    own.close()


def test_the_held_out_share_does_not_depend_on_order_and_equal_lines_stay_together(
    tmp_path: Path, encoder: Encoder
) -> None:
    lines = [{"prompt": f"{n}+1=", "completion": str(n + 1)} for n in range(20)]
    found = prepared(write(tmp_path, *lines), encoder, heldout=0.2)
    again = prepared(write(tmp_path, *reversed(lines), *lines), encoder, heldout=0.2)
    texts = [{encoder.tokenizer.decode(s[0].ids.tolist()) for s in part.heldout} for part in (found, again)]
    assert texts[0] == texts[1]
    assert (len(texts[0]), len(found.trained), len(again.heldout)) == (4, 16, 8)
    apart = write(tmp_path, lines[0], name="apart.jsonl")
    found = prepared(write(tmp_path, *lines), encoder, heldout_files=(str(apart),))
    assert (len(found.trained), len(found.heldout)) == (20, 1)


def test_the_identity_covers_examples_template_and_tokenizer(tmp_path: Path, encoder: Encoder) -> None:
    lines = [{"messages": [USER, BOT]}, {"prompt": "2+2=", "completion": "4"}]
    path = write(tmp_path, *lines)
    same = prepared(path, encoder).digest
    assert prepared(write(tmp_path, *lines, name="copy.jsonl"), encoder).digest == same
    other = Tokenizer.train([prose(n) for n in range(9)], 320)
    template = ChatTemplate(CHATML.replace("\n", " "))
    changed = [
        prepared(path, Encoder(other, encoder.chat)).digest,
        prepared(path, Encoder(encoder.tokenizer, template)).digest,
        prepared(write(tmp_path, *lines, lines[0]), encoder).digest,
    ]
    assert len({same, *changed}) == 4
    template.close()


def test_texts_are_packed_whole_and_in_order(tmp_path: Path, encoder: Encoder) -> None:
    lines = [{"prompt": "a" * n, "completion": "b"} for n in range(1, 40)]
    samples = prepared(write(tmp_path, *lines), encoder).trained
    batches = list(packed_batches(samples, 64))
    assert all(sum(batch.lengths) == len(batch.ids_T) <= 64 for batch in batches)
    rows = [
        row for batch in batches for row in zip(batch.ids_T, batch.targets_T, batch.weights_T, strict=True)
    ]  # type: ignore[arg-type]
    wanted = [
        row for (text,) in samples for row in zip(text.ids[:-1], text.ids[1:], text.trained[1:], strict=True)
    ]
    assert rows == wanted


def test_every_epoch_sees_every_sample_once(tmp_path: Path, encoder: Encoder) -> None:
    samples = prepared(write(tmp_path, *[{"prompt": str(n), "completion": "b"} for n in range(12)]), encoder)
    steps = [of_step(samples.trained, step, 4, seed=1) for step in range(6)]
    epochs = [[n for step in steps[start : start + 3] for n in step] for start in (0, 3)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(12))] * 2
    assert epochs[0] != epochs[1]
    assert of_step(samples.trained, 4, 4, seed=1) == steps[4]
