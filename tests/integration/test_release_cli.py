"""`lapis release` as a user types it, in processes of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner

from lapis.audit import AuditLog, os_user
from lapis.cli.release import group
from lapis.db import connect
from lapis.home import Home
from lapis.model import manifest as manifests
from lapis.model.manifest import Manifest, Source


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"weights" * 100)
    files = manifests.describe_files(folder)
    digest = manifests.digest_of_files(files)
    source = Source("huggingface", "somebody/model", "MIT")
    manifest = Manifest(digest, source, files, parameters=1, add_bos=True, bos_id=0, stop_ids=(0,))
    (folder / manifests.NAME).write_text(manifest.to_json())
    return folder


def lapis(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "lapis.cli.main", "release", *words],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def facts(*words: str) -> Any:
    done = lapis(*words, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_model_is_governed_from_the_command_line(model: Path, home: Home) -> None:
    made = facts("create", "my", "--model", str(model))
    assert (made["id"], made["state"], made["lineage"]["licence"]) == ("my:1", "draft", "MIT")
    refused = lapis("approve", "my")
    assert refused.returncode == 5
    assert "There is no evaluation." in refused.stderr
    assert "--force --reason" in refused.stderr
    assert facts("approve", "my", "--force", "--reason", "measured elsewhere")["approved_by"] == os_user()
    shown = lapis("show", "my:1").stdout
    assert all(text in shown for text in ("approved", "measured elsewhere", made["digest"], "gate: digest"))
    assert facts("retire", "my", "--reason", "old")["state"] == "retired"
    assert lapis("retire", "my").returncode == 5
    assert [item["state"] for item in facts("show")] == ["retired"]
    db = connect(home.database_url)
    log = AuditLog(db)
    assert log.verify().entries == 3
    assert log.entries()[-1].facts["reason"] == "old"
    assert {entry.actor for entry in log.entries()} == {os_user()}
    db.dispose()


def test_wrong_words_are_answered(model: Path) -> None:
    assert lapis("create", "my").returncode == 2
    assert lapis("create", "../my", "--model", str(model)).returncode == 2
    missing = lapis("create", "my", "--model", "no-such-model")
    assert missing.returncode == 4
    assert "lapis pull no-such-model" in missing.stderr
    (model / "model.safetensors").write_bytes(b"Weights" * 100)
    damaged = lapis("create", "my", "--model", str(model))
    assert damaged.returncode == 7
    assert "model.safetensors" in damaged.stderr
    assert "Traceback" not in damaged.stderr


def test_a_release_of_a_run_keeps_its_full_id_evaluation_and_lineage(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = {"bits_per_byte": 1.5, "yardsticks": {"5-gram": 2.0}}
    lineage = {"run": "laptop-20260101-000000-abcd", "step": 7, "licences": {"MIT": 3}}

    @contextmanager
    def exported_run(home: Home, run_id: str, *, average: bool, best: bool) -> Iterator[SimpleNamespace]:
        assert run_id == "last"
        yield SimpleNamespace(folder=model, report=report, lineage=lineage)

    # Stands for the export of a checkpoint, which needs torch and a trained run (the whole way is tested in e2e).
    monkeypatch.setitem(sys.modules, "lapis.train.export", SimpleNamespace(exported_run=exported_run))  # type: ignore[arg-type]
    made = CliRunner().invoke(group, ["create", "my", "--run", "last", "--json"])
    assert made.exit_code == 0, made.output
    facts = json.loads(made.stdout)
    assert (facts["state"], facts["run_id"], facts["report"]) == ("evaluated", lineage["run"], report)
    assert (facts["lineage"]["run"], facts["lineage"]["step"]) == (lineage["run"], 7)
    assert CliRunner().invoke(group, ["approve", "my"]).exit_code == 0
