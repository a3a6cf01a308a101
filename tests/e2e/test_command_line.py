"""The command line's manners: help, typos, exit statuses, JSON."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from lapis.cli.main import lapis as commands
from lapis.errors import LapisError
from lapis.home import Home

ROOT = Path(__file__).parents[2]


def lapis(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "lapis.cli.main", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


def test_every_command_and_verb_has_help() -> None:
    from lapis.cli.main import COMMANDS

    for name in COMMANDS:
        done = lapis(name, "--help")
        assert done.returncode == 0, done.stderr
        assert "Usage:" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["trian"], 2, "Did you mean 'train'?"),
        (["train", "nowhere.toml"], 2, "nowhere.toml cannot be read"),
        (["runs", "show", "nothing"], 4, "no run 'nothing'"),
        (["jobs", "submit", "--", "echo", "\udcff"], 2, "'\\udcff' cannot be used: it is not UTF-8"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_are_named_with_the_next_step(arguments: list[str], status: int, said: str) -> None:
    done = lapis(*arguments)
    assert done.returncode == status
    assert said in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["serve", "nothing"], 4, "nothing"),
        (["chat", "nothing", "--once", "x"], 4, "nothing"),
        (["models", "show", "nothing"], 4, "nothing"),
        (["release", "approve", "nothing"], 4, "nothing"),
        (["serve", "--host", "0.0.0.0"], 2, "API key"),
        (["backup", "/proc/nothing/b.lapis"], 9, "/proc/nothing/b.lapis cannot be written: No such file"),
        (["backup", f"{__file__}/b.lapis"], 9, "b.lapis cannot be written: Not a directory"),
        (["audit", "export", "/proc/nothing/audit.jsonl"], 9, "/proc/nothing/audit.jsonl cannot be written"),
        (["audit", "export", "a" * 300], 9, "File name too long"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_raise_what_the_process_says(arguments: list[str], status: int, said: str) -> None:
    """The same of other commands, in this process."""
    with pytest.raises(LapisError, match=said) as caught:
        CliRunner().invoke(commands, arguments, catch_exceptions=False, standalone_mode=False)
    assert caught.value.exit_status == status


@pytest.mark.parametrize(
    ("option", "value"),
    [("--memory", "9" * 400), ("--time-limit", "40000d"), ("--gpus", "9" * 400), ("--ranks", "9" * 400)],
    ids=lambda value: value[:20],
)
def test_a_number_that_nothing_can_have_is_refused(option: str, value: str) -> None:
    done = CliRunner().invoke(commands, ["jobs", "submit", option, value, "--", "true"])
    assert done.exit_code == 2, done.output
    assert option in done.output


def test_a_recipe_with_a_typo(tmp_path: Path) -> None:
    text = (ROOT / "recipes" / "tiny.toml").read_text().replace("steps", "stpes")
    (tmp_path / "typo.toml").write_text(text)
    done = lapis("train", str(tmp_path / "typo.toml"))
    assert done.returncode == 2
    assert "'train.stpes'. Did you mean 'steps'?" in done.stderr


def test_config_prints_every_field_and_a_resolved_recipe() -> None:
    facts = json.loads(lapis("config", "--json").stdout)
    assert {"train.minutes", "data.dedup.threshold"} <= {fact["key"] for fact in facts}
    resolved = json.loads(
        lapis("config", str(ROOT / "recipes" / "tiny.toml"), "--set", "train.seed=5", "--json").stdout
    )
    assert resolved["recipe"]["train"]["seed"] == 5


@pytest.mark.parametrize("override", ["train.steps=3", "nonsense"])
def test_an_override_needs_a_recipe(override: str) -> None:
    done = CliRunner().invoke(commands, ["config", "--set", override])
    assert done.exit_code == 2 and "RECIPE" in done.output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("release show", "lapis release create"),
        ("keys list", "lapis keys create"),
        ("users list", "lapis users add"),
        ("audit list", "no entries yet"),
    ],
)
def test_a_list_without_anything_says_so(home: Home, arguments: str, said: str) -> None:
    done = CliRunner().invoke(commands, arguments.split(), catch_exceptions=False)
    assert said in done.output and done.output.count("\n") == 1


def test_accounts_without_a_cluster_name_what_is_missing(home: Home) -> None:
    with pytest.raises(LapisError, match=r"cluster\.toml") as caught:
        CliRunner().invoke(commands, ["cluster", "accounts"], catch_exceptions=False, standalone_mode=False)
    assert caught.value.exit_status == 2


def test_doctor_says_what_is_there_and_where_things_lie() -> None:
    facts = json.loads(lapis("doctor", "--json").stdout)
    names = {check["name"] for check in facts["checks"]}
    assert {"python", "torch", "kernels", "disk", "compiler"} <= names
    assert facts["home"]
    assert lapis("doctor").returncode == 0


@pytest.mark.parametrize("place", ["file", "file/below", "/proc/nothing"])
def test_a_home_that_cannot_be_written_is_not_ready(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LAPIS_HOME", str(tmp_path / place))
    said = CliRunner().invoke(commands, ["doctor", "--brief"], catch_exceptions=False).output
    assert f"disk: {tmp_path / place} cannot be written" in said and "is ready" not in said


def test_without_kernels_doctor_says_what_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAPIS_KERNELS", "stock")
    kernels = next(
        c for c in json.loads(lapis("doctor", "--json").stdout)["checks"] if c["name"] == "kernels"
    )
    assert kernels["state"] == "missing"
    assert "slightly different bits" in kernels["fact"]


@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="there may be a GPU")
def test_doctor_asks_whether_the_kernels_for_gpus_can_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAPIS_KERNELS", "triton")
    kernels = next(
        c for c in json.loads(lapis("doctor", "--json").stdout)["checks"] if c["name"] == "kernels"
    )
    assert kernels["state"] == "missing"
    assert "no model can be loaded" in kernels["fact"]
    assert kernels["command"]


def test_an_unexpected_defect_shows_no_traceback_unless_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LAPIS_HOME", str(tmp_path / "file"))
    (tmp_path / "file").write_text("a file where the home should be")
    done = lapis("runs", "list")
    assert "Traceback" not in done.stderr
    done = lapis("release", "show")
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    assert "Traceback" in lapis("--debug", "release", "show").stderr


@pytest.mark.skipif(shutil.which("git") is None, reason="asks git which files the project holds")
def test_the_project_holds_no_weights_and_no_build() -> None:
    files = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    assert not [name for name in files if name.endswith((".so", ".safetensors", ".gguf", ".min.js", ".whl"))]
