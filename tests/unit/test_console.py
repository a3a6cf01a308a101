"""The console's rules: how a machine is read, how values are written, what becomes of a question."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from lapis.console.chat import Settings, python_code
from lapis.console.machine import Gpu, gpu, memory_facts
from lapis.errors import ConflictError
from lapis.home import Home
from lapis.train.run import Run

nicegui = pytest.importorskip("nicegui", reason="the console extra is not installed")


def test_memory_and_gpus_are_read_as_the_machine_tells_them() -> None:
    facts = memory_facts("MemTotal:       16384 kB\nMemAvailable:    4096 kB\nHugePages_Total:       0\n")
    assert facts == {"MemTotal": 16384 * 1024, "MemAvailable": 4096 * 1024}
    assert gpu("NVIDIA A10, 24Q, 37, 1024, 24576") == Gpu("NVIDIA A10, 24Q", 0.37, 2**30, 24 * 2**30)
    assert gpu("Tegra, [N/A], [N/A], [N/A]") == Gpu("Tegra", None, None, None)


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 bytes"), (999, "999 bytes"), (1000, "1.0 kB"), (123_456, "123 kB"), (25_300_000_000, "25.3 GB")],
)
def test_sizes_are_written_short(count: int, text: str) -> None:
    from lapis.console.view import size

    assert size(count) == text


def test_numbers_have_separators_and_missing_values_are_empty() -> None:
    from lapis.console.table import Cell, _cell

    assert [_cell(value).text for value in (1234567, 0, None, "text")] == ["1,234,567", "0", "", "text"]
    assert _cell(Cell("x", tone="good")).props() == {"text": "x", "tone": "good"}


def test_exported_names_are_no_formulas() -> None:
    from lapis.console.usage import _safe

    assert [_safe(text) for text in ("=1+1", "@x", "-2", "gpt")] == ["'=1+1", "'@x", "'-2", "gpt"]


def test_the_python_code_is_python_whatever_was_said() -> None:
    said = [{"role": "user", "content": '\'"""\\ \n{x} 中'}]
    code = python_code("http://127.0.0.1:1/v1", "a'b", said, Settings(temperature=0.5, seed=7))
    names: dict[str, object] = {}
    fake = "class OpenAI:\n def __init__(self, **k): self.chat = self.completions = self\n"
    fake += " def create(self, **k): asked.update(k); return []\n"
    exec(fake + code.replace("from openai import OpenAI", ""), {"asked": names})
    assert names == {
        "model": "a'b", "messages": said, "temperature": 0.5, "top_p": 1.0, "seed": 7, "stream": True
    }  # fmt: skip


def test_a_run_is_interrupted_where_it_is_trained(home: Home) -> None:
    run = Run.create(home, "poems", "seed = 7\n", "abcdef")
    with pytest.raises(ConflictError, match="No process of this machine trains"):
        run.interrupt()
    program = (
        "import sys, time; from pathlib import Path; from lapis.train.run import Run\n"
        "with Run(Path(sys.argv[1])).hold():\n print('held', flush=True)\n time.sleep(60)\n"
    )
    trainer = subprocess.Popen(
        [sys.executable, "-c", program, str(run.folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert trainer.stdout is not None
    assert trainer.stdout.readline() == "held\n"
    run.interrupt()
    trainer.communicate()
    assert trainer.returncode == -signal.SIGTERM
    assert run.status() == "stopped"
