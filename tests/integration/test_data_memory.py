"""Memory stays within the recipe's budget, and the bytes do not depend on it."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lapis.config import parse
from lapis.data import clusters
from lapis.data.pipeline import prepare
from lapis.data.recipe import DataConfig, TokenizerConfig
from lapis.data.workers import Room
from lapis.errors import ConfigError
from lapis.home import Home
from tests.texts import changed, prose

CORPUS = Path(__file__).parents[3] / "shared" / "data" / "corpus.parquet"
GB = 1_000_000_000


def test_a_budget_gives_room_for_fewer_workers_and_smaller_tables() -> None:
    assert Room.within(0, 16).workers == 16
    assert Room.within(GB, 16) == Room(3, 500_000_000)
    assert Room.within(GB, 2) == Room(2, 600_000_000)
    assert Room.within(500_000_000, 16).workers == 1


def test_a_budget_too_small_for_one_worker_is_refused() -> None:
    with pytest.raises(ConfigError, match="memory_bytes = 1000000 is too little: 500,000,000 at least"):
        parse({"memory_bytes": 1_000_000, "sources": [{"path": "x"}]}, DataConfig)


def test_the_same_bytes_from_tables_in_many_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    for n in range(40):
        text = prose(n // 2, 120)
        (texts / f"{n}.txt").write_text(changed(text, n, 0.05) if n % 2 else text, encoding="utf-8")
    data = DataConfig.model_validate(
        {"sources": ({"path": str(texts)},), "heldout": {"min_bytes": 2000}, "memory_bytes": GB}
    )
    tokenizer = TokenizerConfig(vocab_size=400)
    whole = prepare(data, tokenizer, Home(tmp_path / "whole"), workers=1)
    passes = []
    keys = clusters._keys
    monkeypatch.setattr(clusters, "BYTES_EACH", 1 << 27)  # as if there were millions of documents
    monkeypatch.setattr(clusters, "_keys", lambda *given: passes.append(given[3]) or keys(*given))
    little = prepare(data, tokenizer, Home(tmp_path / "little"), workers=1)
    assert passes[0] > 5
    assert little.digest == whole.digest
    assert whole.manifest["documents"] < 25


def processes(root: int) -> list[int]:
    """A process and all that descend from it."""
    children: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                parent = int(Path("/proc", name, "stat").read_text().rsplit(")", 1)[1].split()[1])
            except OSError:
                continue  # it has ended
            children.setdefault(parent, []).append(int(name))
    found, waiting = [], [root]
    while waiting:
        found.append(waiting.pop())
        waiting.extend(children.get(found[-1], []))
    return found


def anonymous(process: int) -> int:
    """Bytes that a process holds in memory and could not give back: mapped files are not among them."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0
    sizes = [int(line.split()[1]) for line in lines if line.startswith(("RssAnon:", "RssShmem:", "VmSwap:"))]
    return 1024 * sum(sizes)


def prepare_within(recipe: Path, home: Path, limit: int) -> int:
    """Run `lapis data prepare`; more memory than the limit ends it. Returns the most it had."""
    environment = {**os.environ, "LAPIS_HOME": str(home)}
    command = [sys.executable, "-m", "lapis.cli.main", "data", "prepare", str(recipe), "--workers", "2"]
    most = 0
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) as running:
        while running.poll() is None:
            most = max(most, sum(map(anonymous, processes(running.pid))))
            if most > limit:
                for process in reversed(processes(running.pid)):
                    os.kill(process, 9)
            time.sleep(0.02)
    assert most <= limit, f"{most:,} bytes of memory, {limit:,} allowed"
    assert running.returncode == 0
    return most


def write_varied(path: Path, size: int) -> None:
    """Real texts up to a size; each further copy of the corpus has its letters exchanged in another way."""
    import pyarrow as pa
    import pyarrow.parquet as parquet

    schema = pa.schema([("text", pa.large_string())])
    written = copy = 0
    with parquet.ParquetWriter(path, schema, compression="zstd") as writer:
        while written < size:
            vowels, others = list("aeiou"), list("bcdfghjklmnpqrstvwxyz")
            table = str.maketrans("".join(vowels + others), exchanged(vowels, copy) + exchanged(others, copy))
            for batch in parquet.ParquetFile(CORPUS).iter_batches(1000, columns=["text"]):
                texts = [text.translate(table) for text in batch["text"].to_pylist()]
                writer.write_table(pa.table({"text": texts}, schema=schema))
                written += sum(len(text.encode()) for text in texts)
                if written >= size:
                    break
            copy += 1


def exchanged(letters: list[str], copy: int) -> str:
    return "".join(random.Random(copy).sample(letters, len(letters))) if copy else "".join(letters)


@pytest.mark.long
@pytest.mark.timeout(6 * 3600)
@pytest.mark.skipif(not CORPUS.exists(), reason=f"needs {CORPUS.name} beside the checkout")
def test_two_gb_of_text_within_one_gb_of_memory(tmp_path: Path) -> None:
    size = int(os.environ.get("LAPIS_TEST_BYTES", 2 * GB))
    write_varied(tmp_path / "texts.parquet", size)
    digests = []
    for name, budget in (("bounded", GB), ("unbounded", 0)):
        recipe = tmp_path / f"{name}.toml"
        recipe.write_text(
            f"[data]\nmemory_bytes = {budget}\n[[data.sources]]\npath = '{tmp_path / 'texts.parquet'}'\n"
            "[tokenizer]\nvocab_size = 8192\n[train]\nsteps = 1\n"
        )
        most = prepare_within(recipe, tmp_path / name, budget or 100 * GB)
        print(f"{name}: {most / 1e6:,.0f} MB at most")
        manifest = next((tmp_path / name / "data").glob("tokens-*/manifest.json"))
        digests.append(manifest.read_bytes())
    assert digests[0] == digests[1]
