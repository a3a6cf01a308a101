"""Which engines there are on this machine: Lapis always, a peer when `make bench-peers` has made its environment."""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

from harness.engines import Engine, LlamaBench, Server, Worker
from harness.subject import NAME

from lapis.inference.engine import DRAFTS

PEERS = Path(__file__).parents[2] / ".peers"
PROTOTYPE = (
    Path(__file__).parents[3] / "shared" / "prototypes" / "kernels"
)  # of the kernels; beside a checkout
PRELOADED = ("/usr/lib/x86_64-linux-gnu/libtcmalloc_minimal.so.4",)  # where Debian's libtcmalloc-minimal4 is


class Engines:
    """Makes the engines by name, all for one model folder, its GGUF file and a number of threads."""

    def __init__(self, home: Path, folder: Path, threads: int) -> None:
        self.home, self.folder, self.threads = home, folder, threads
        self.q4_1 = PEERS / "models" / "smollm2-q4_1.gguf"
        self.bf16 = PEERS / "models" / "smollm2-bf16.gguf"
        self._openmp = {"OMP_NUM_THREADS": str(threads)}
        self._spinning = {**self._openmp, "GOMP_SPINCOUNT": "2000"}  # as the command line sets it
        self._makers: dict[str, tuple[Callable[[], Engine], str | None]] = {
            "lapis bf16": (self._lapis, None),
            "lapis lookup bf16": (lambda: self._lapis(drafts=DRAFTS), None),
            "lapis step bf16": (self._step, None),
            "prototype step bf16": (lambda: self._step(str(PROTOTYPE)), "prototype"),
            "lapis int8-kv bf16": (lambda: self._lapis(cache_dtype="int8"), None),
            "lapis int8": (lambda: self._lapis(weights="int8"), None),
            "lapis int4": (lambda: self._lapis(weights="int4"), None),
            "lapis http bf16": (lambda: self._lapis_server("bf16"), None),
            "lapis http int8": (lambda: self._lapis_server("int8"), None),
            "llama.cpp bf16": (lambda: self._llama_bench(self.bf16), "llama.cpp"),
            "llama.cpp q4_1": (lambda: self._llama_bench(self.q4_1), "llama.cpp"),
            "llama.cpp http bf16": (self._llama_server, "llama.cpp"),
            "openvino int8": (lambda: self._openvino("int8"), "openvino"),
            "openvino fp16": (lambda: self._openvino("fp16"), "openvino"),
            "vllm http bf16": (self._vllm, "vllm"),
            "transformers bf16": (self._transformers, None),
        }

    def missing(self, name: str) -> bool:
        """Whether the engine is a peer that has not been installed."""
        peer = self._makers[name][1]
        if peer == "prototype":
            return not PROTOTYPE.is_dir()
        return peer is not None and not stamp(peer).exists()

    def make(self, name: str) -> Engine:
        """The engine, not started yet."""
        return self._makers[name][0]()

    @staticmethod
    def _llama(program: str) -> Path:
        return PEERS / "llama.cpp" / "build" / "bin" / program

    def _lapis(self, drafts: int = 0, **options: str) -> Engine:
        # without speculation, as the peers run
        arguments = (str(self.folder), json.dumps({"drafts": drafts, **options}))
        return Worker(sys.executable, "lapis_worker.py", *arguments, environment=self._spinning)

    def _step(self, *prototype: str) -> Engine:
        arguments = (str(self.folder), *prototype)
        environment = self._openmp if prototype else self._spinning  # the prototype spins as it was made
        return Worker(sys.executable, "step_worker.py", *arguments, environment=environment)

    def _lapis_server(self, weights: str) -> Engine:
        command = [sys.executable, "-m", "lapis.cli.main", "serve", NAME, "--port", "{port}", "--no-console"]
        stored = [] if weights == "bf16" else ["--weights", weights]
        environment = {**self._openmp, "LAPIS_HOME": str(self.home)}
        return Server(
            [*command, *stored], NAME, {"ignore_eos": True}, environment, importlib.metadata.version("lapis")
        )

    def _llama_bench(self, model: Path) -> Engine:
        return LlamaBench(self._llama("llama-bench"), model, self.threads, _version("llama.cpp"))

    def _llama_server(self) -> Engine:
        # -c is divided among the slots: 16 of 2,048
        command = [str(self._llama("llama-server")), "-m", str(self.bf16), "--host", "127.0.0.1"]
        command += ["--port", "{port}", "-c", "32768", "-np", "16", "-t", str(self.threads), "--no-webui"]
        return Server(command, NAME, {"ignore_eos": True, "cache_prompt": False}, {}, _version("llama.cpp"))

    def _openvino(self, weights: str) -> Engine:
        python, model = (
            str(PEERS / "openvino" / "bin" / "python"),
            str(PEERS / "models" / f"openvino-{weights}"),
        )
        return Worker(python, "openvino_worker.py", model, environment=self._openmp)

    def _vllm(self) -> Engine:
        command = [
            str(PEERS / "vllm" / "bin" / "vllm"),
            "serve",
            str(self.folder),
            "--served-model-name",
            NAME,
        ]
        command += [
            "--host",
            "127.0.0.1",
            "--port",
            "{port}",
            "--dtype",
            "bfloat16",
            "--max-model-len",
            "2048",
        ]
        command += ["--max-num-seqs", "32", "--no-enable-prefix-caching"]
        preloaded = [path for path in PRELOADED if Path(path).exists()]
        environment = {
            **self._openmp,
            "VLLM_CPU_KVCACHE_SPACE": "2",
            "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",  # by default one core is kept for the front end
            "LD_PRELOAD": ":".join([*preloaded, str(PEERS / "vllm" / "lib" / "libiomp5.so")]),
            "PYTHONPATH": "",
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_LOGGING_LEVEL": "WARNING",
            "VLLM_CACHE_ROOT": str(PEERS / "vllm-cache"),
            "PATH": f"{PEERS / 'vllm' / 'bin'}:{os.environ['PATH']}",
        }
        return Server(command, NAME, {"ignore_eos": True}, environment, _version("vllm"))

    def _transformers(self) -> Engine:
        return Worker(sys.executable, "transformers_worker.py", str(self.folder), environment=self._openmp)


def stamp(peer: str) -> Path:
    """The file that the installation writes last."""
    return PEERS / f"{peer}.installed"


def _version(peer: str) -> str:
    return stamp(peer).read_text().splitlines()[0]
