"""A batch's input: every wrong line is named with its number before anything runs."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from lapis.gateway import batch_input
from lapis.gateway.batch_input import MAX_ERRORS, body_of, read_input

URL = "/v1/chat/completions"


def line(custom_id: object = "a", **more: object) -> str:
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": URL, "body": {"model": "m"}, **more})


def read(*lines: str) -> batch_input.BatchInput:
    return read_input(io.BytesIO("\n".join(lines).encode(errors="surrogatepass")), URL)


def test_requests_are_found_again_by_their_place(tmp_path: Path) -> None:
    bodies = [{"model": "m", "n": 1}, {"model": "ü", "text": "größe " * 50}, {"model": "m"}]
    text = "\ufeff" + line("0", body=bodies[0]) + "\r\n\n  " + line("1", body=bodies[1]) + "\n" + line("2")
    (tmp_path / "in").write_bytes(text.encode())
    with (tmp_path / "in").open("rb") as file:
        found = read_input(file, URL)
        assert found.errors == []
        assert [(line.number, line.custom_id, line.model) for line in found.lines] == [
            (1, "0", "m"), (3, "1", "ü"), (4, "2", "m"),
        ]  # fmt: skip
        assert [json.loads(body_of(file, line)) for line in found.lines] == bodies


@pytest.mark.parametrize(
    ("wrong", "code", "param"),
    [
        ("{", "invalid_json_line", None),
        ("[1]", "invalid_json_line", None),
        ("[" * 5000, "invalid_json_line", None),
        (line().replace('"m"', '"m", "model": "n"'), "invalid_json_line", "model"),
        ("{}", "missing_required_parameter", "custom_id"),
        (line(""), "invalid_custom_id", "custom_id"),
        (line(7), "invalid_custom_id", "custom_id"),
        (line("x" * 513), "invalid_custom_id", "custom_id"),
        (line("\ud800"), "invalid_custom_id", "custom_id"),
        (line(method="GET"), "invalid_method", "method"),
        (line(url="/v1/embeddings"), "invalid_url", "url"),
        (line(body=[]), "invalid_request", "body"),
        (line(body={}), "missing_required_parameter", "body.model"),
        (line(body={"model": "m", "stream": True}), "invalid_request", "body.stream"),
        (line("first"), "duplicate_custom_id", "custom_id"),
    ],
)
def test_a_wrong_line_is_named(wrong: str, code: str, param: str | None) -> None:
    found = read(line("first"), wrong, line("last"))
    assert [(error.line, error.code, error.param) for error in found.errors] == [(2, code, param)]
    assert all(error.message for error in found.errors)


def test_too_much_is_refused_without_reading_on(monkeypatch: pytest.MonkeyPatch) -> None:
    assert read().errors[0].code == "empty_file"
    assert read("", "  ").errors[0].code == "empty_file"
    assert len(read(*["x"] * 1000).errors) == MAX_ERRORS
    monkeypatch.setattr(batch_input, "MAX_LINES", 3)
    assert [error.code for error in read(*[line(str(n)) for n in range(4)]).errors] == ["too_many_requests"]
    assert read(*[line(str(n)) for n in range(3)]).errors == []
    monkeypatch.setattr(batch_input, "MAX_LINE", 200)
    found = read(line("a"), line("b", body={"model": "m", "text": "x" * 5000}), line("c"))
    assert [(error.line, error.code) for error in found.errors] == [(2, "line_too_long")]
    assert [one.custom_id for one in found.lines] == ["a", "c"]
