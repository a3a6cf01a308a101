"""docs/tutorial.md, run as it stands; only the port is another one, and in the quick form the model."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from lapis.home import Home
from lapis.model.store import ModelStore
from tests.tuned import BASE, tiny_home

PAGE = Path(__file__).parents[2] / "docs" / "tutorial.md"
MODEL = "smollm2-135m-instruct"
BLOCK = re.compile(r"^```(bash|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PULL = re.compile(r"^lapis pull.*\n", re.MULTILINE)
SERVE = re.compile(r"^lapis serve.*$", re.MULTILINE)
# The shell has `lapis`, waits until the server answers, and ends it and its jobs with itself.
BEFORE = f'set -e\nlapis() {{ {sys.executable} -m lapis.cli.main "$@"; }}\n'
SERVED = r"""{serve} > server.log 2>&1 &
server=$!
trap 'kill $server; wait $server || true' EXIT
until grep -q "Lapis serves" server.log; do kill -0 $server; sleep 0.1; done
"""


def script(model: str) -> str:
    """The page's shell lines, then its Python as one program."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    blocks = {"bash": "", "python": ""}
    for language, text in BLOCK.findall(PAGE.read_text()):
        blocks[language] += text.replace("8000", port).replace(MODEL, model)
    assert "client.fine_tuning.jobs.create" in blocks["python"]
    assert blocks["bash"].index("lapis pull") < blocks["bash"].index("lapis serve")
    if model != MODEL:  # it is nowhere to be fetched
        blocks["bash"] = PULL.sub("", blocks["bash"])
    program = (
        f"{sys.executable} -m lapis.cli.main"  # a function's process would stand before it and be ended alone
    )
    shell = SERVE.sub(
        lambda found: SERVED.format(serve=found[0].replace("lapis", program, 1)), blocks["bash"]
    )
    assert "server=$!" in shell
    return f"{BEFORE}{shell}cat > tutorial.py <<'END'\n{blocks['python']}END\n{sys.executable} tutorial.py\n"


def run(home: Home, folder: Path, model: str) -> str:
    """What the page prints, server log first where something failed."""
    environment = {**os.environ, "LAPIS_HOME": str(home.root)}
    done = subprocess.run(
        ["bash", "-c", script(model)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=1500,
        check=False,
    )
    log = folder / "server.log"
    assert done.returncode == 0, f"{log.read_text() if log.exists() else ''}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def check(said: str, model: str) -> str:
    """Whether each part of the page did what it tells; the name of the model that was made."""
    found = re.search(rf"^model (ft:{model}:default:moss:\w+) from [1-9]\d* tokens$", said, re.MULTILINE)
    assert found, said
    assert re.search(rf"^100 [\d.]+ {found[1]}:ckpt-step-100$", said, re.MULTILINE), said
    assert len(re.findall(r"^question-\d ", said, re.MULTILINE)) == 3
    assert re.search(rf"^{found[1]} 4 requests, [1-9]\d* tokens written$", said, re.MULTILINE), said
    return found[1]


def test_the_tutorial_runs_with_a_tiny_model(home: Home, tmp_path: Path) -> None:
    tiny_home(home)
    shutil.move(home.models / BASE, home.models / "tiny")
    check(run(home, tmp_path, "tiny"), "tiny")


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_the_tutorial_teaches_a_real_model(home: Home, tmp_path: Path) -> None:
    kept = Path(os.environ.get("LAPIS_TEST_MODELS", "none")) / "models" / MODEL
    if not kept.is_dir():
        pytest.skip(f"{MODEL} is not on this machine")
    shutil.copytree(kept, home.models / MODEL)
    assert ModelStore(home).get(MODEL).digest
    said = run(home, tmp_path, MODEL)
    name = check(said, MODEL)
    answers = re.findall(rf"^(?:{name}:|question-\d) (.*)$", said, re.MULTILINE)
    assert len(answers) == 4
    assert all("Moss and Sons" in answer for answer in answers), answers
    base = re.search(rf"^{MODEL}: (.*)$", said, re.MULTILINE)
    assert base is not None
    assert "Moss" not in base[1]
