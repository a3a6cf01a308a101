"""Trained models in programs that we did not write: `transformers`, and llama.cpp where it is built."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from lapis import config
from lapis.data.shards import Dataset
from lapis.home import Home
from lapis.kernels.batch import packed
from lapis.model.gguf_export import export_gguf
from lapis.model.weights import LoadedModel, read_model
from lapis.train.export import exported_run
from lapis.train.pretrain import Pretraining
from lapis.train.recipe import Recipe
from lapis.train.trainer import find_or_create, train

from .conftest import tiny_recipe
from .test_smollm2 import CLEAR, NAME, folder

__all__ = ["folder"]  # the fixture: SmolLM2, or a skip with the reason

PEERS = Path(os.environ.get("LAPIS_TEST_PEERS") or Path(__file__).parents[2] / ".peers")
SERVER = PEERS / "llama.cpp" / "build" / "bin" / "llama-server"
PROMPTS = ("def parse(", "import os\n\nclass ", "The message ")
TOKENS = 12
SMALL = {"layers": 2, "width": 64, "ffn": 128, "context": 128}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"name": "tiny"},
    "gpt2": {"name": "laptop-gpt2", **SMALL},
    "moe": {"name": "laptop-moe", **SMALL},
}
needs_llama_cpp = pytest.mark.skipif(
    not SERVER.exists(), reason=f"llama.cpp is not built in {PEERS} (python benchmarks/peers.py llama.cpp)"
)


@pytest.fixture(scope="module", params=MODELS)
def trained(
    request: pytest.FixtureRequest, texts: Path, dataset: Dataset, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Path]:
    """The model folder of a run of each family, trained for some steps in fp32."""
    home = Home(tmp_path_factory.mktemp("trained"))
    values = tiny_recipe(texts, steps=30, dtype="fp32").model_dump(mode="json", exclude_none=True)
    recipe = config.parse({**values, "model": MODELS[request.param]}, Recipe)
    objective = Pretraining(recipe.train, dataset)
    run = train(recipe, objective, find_or_create(home, recipe, config.to_toml(recipe), objective))
    with exported_run(home, run.id) as exported:
        yield exported.folder


@contextmanager
def llama_cpp(path: Path) -> Iterator[str]:
    """The address of a llama.cpp server of a GGUF file: one thread, keys and values in float32."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = (
        "-c",
        "128",
        "-t",
        "2",
        "-np",
        "1",
        "-fa",
        "off",
        "-ctk",
        "f32",
        "-ctv",
        "f32",
        "--no-warmup",
    )
    command = [SERVER, "-m", path, "--port", str(port), "--jinja", *arguments]
    with (
        path.with_suffix(".log").open("w") as log,
        subprocess.Popen(command, stdout=log, stderr=log) as server,
    ):
        try:
            deadline = time.monotonic() + 60
            while not healthy(f"http://127.0.0.1:{port}"):
                said = path.with_suffix(".log").read_text()[-2000:]
                assert server.poll() is None and time.monotonic() < deadline, said
                time.sleep(0.05)
            yield f"http://127.0.0.1:{port}"
        finally:
            server.kill()


def healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=10):
            return True
    except (urllib.error.URLError, ConnectionError):
        return False


def ask(url: str, **body: Any) -> dict[str, Any]:
    data = json.dumps({"temperature": 0, "cache_prompt": False, **body}).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return dict(json.load(answer))


@torch.no_grad()
def is_greedy(loaded: LoadedModel, prompt: list[int], answer: list[int]) -> bool:
    """Whether each token of an answer is the best one after those before it: by induction, the greedy answer."""
    ids = torch.tensor(prompt + answer[:-1])
    logits = loaded.model(ids, packed([len(ids)]), torch.arange(len(prompt) - 1, len(ids)))
    return bool(logits.argmax(-1).tolist() == answer)


@torch.no_grad()
def test_transformers_gives_the_logits_of_a_trained_model(trained: Path) -> None:
    import transformers

    loaded = read_model(trained)
    ids = torch.tensor(
        loaded.tokenizer.encode("def main(arguments):\n    return None\n\nThe end of the message.\n")
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(trained, dtype=torch.float32).eval()
    theirs, ours = model(ids[None]).logits[0], loaded.model(ids, packed([len(ids)]))
    assert ours.std() > 0.1  # it has learned something
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-4)


@needs_llama_cpp
def test_llama_cpp_continues_texts_as_a_trained_model_does(trained: Path, tmp_path: Path) -> None:
    loaded = read_model(trained)
    assert loaded.add_bos
    assert loaded.bos_id is not None
    export_gguf(trained, tmp_path / "m.gguf", "f32")
    with llama_cpp(tmp_path / "m.gguf") as url:
        for prompt in PROMPTS:
            said = ask(f"{url}/completion", prompt=prompt, n_predict=TOKENS, return_tokens=True)
            assert len(said["tokens"]) == TOKENS
            assert is_greedy(loaded, [loaded.bos_id, *loaded.tokenizer.encode(prompt)], said["tokens"]), said


@needs_llama_cpp
def test_llama_cpp_answers_a_chat_as_smollm2_does_here(folder: Path, tmp_path: Path) -> None:
    loaded = read_model(folder)
    assert loaded.chat is not None
    export_gguf(folder, tmp_path / f"{NAME}.gguf", "bf16")
    with llama_cpp(tmp_path / f"{NAME}.gguf") as url:
        for question in CLEAR[:1]:
            messages = [{"role": "user", "content": question}]
            prompt = ask(f"{url}/apply-template", messages=messages)["prompt"]
            said = ask(f"{url}/completion", prompt=prompt, n_predict=TOKENS, return_tokens=True)
            assert len(said["tokens"]) == TOKENS
            assert is_greedy(loaded, loaded.chat.prompt(messages, loaded.tokenizer), said["tokens"]), said
