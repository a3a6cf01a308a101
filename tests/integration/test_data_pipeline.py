"""The data pipeline as a whole: the same bytes however it is run, and nothing near a held-out text in training."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from lapis.config import parse
from lapis.data.pipeline import find, prepare
from lapis.data.recipe import DataConfig, DedupConfig, HeldoutConfig, SourceConfig, TokenizerConfig
from lapis.data.shards import Dataset
from lapis.data.verdicts import Decided
from lapis.data.workers import kept_workers, run_tasks
from lapis.errors import ConfigError, InputError, NotFoundError, UnavailableError
from lapis.home import Home
from tests.texts import changed, prose, write_corpus

SMALL = TokenizerConfig(vocab_size=400)
LITTLE = HeldoutConfig(min_bytes=2000)


def source(path: Path, **settings: object) -> SourceConfig:
    return SourceConfig.model_validate({"path": str(path), **settings})


def config(*sources: SourceConfig, **settings: object) -> DataConfig:
    return DataConfig.model_validate({"sources": sources, "heldout": LITTLE, **settings})


def files(dataset: Dataset) -> dict[str, bytes]:
    """Every file of a dataset but its report, which holds times."""
    return {path.name: path.read_bytes() for path in dataset.folder.iterdir() if path.name != "report.json"}


def shingles(text: str) -> set[tuple[str, ...]]:
    words = text.lower().replace(".", " ").split()
    return {tuple(words[n : n + 5]) for n in range(max(1, len(words) - 4))}


def training_texts(dataset: Dataset) -> list[str]:
    bounds = [*dataset.document_starts.tolist(), dataset.tokens]
    return [
        dataset.tokenizer.decode(dataset.read(low, high - low).tolist()) for low, high in pairwise(bounds)
    ]


def step(dataset: Dataset, name: str) -> dict[str, int]:
    return next(row.reasons for row in dataset.report if row.step == name)


def test_the_same_bytes_for_any_number_of_workers_and_any_order_of_sources(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lapis.data.readers.BATCH_BYTES", 8000)  # many parts
    monkeypatch.setattr("lapis.data.pipeline.SHARD_BYTES", (8000, 1 << 20))  # many shards
    a = source(write_corpus(tmp_path / "a", 60), licence="MIT")
    b = source(write_corpus(tmp_path / "b", 60, first=30), licence="CC0-1.0")  # half of them copies
    datasets = [
        prepare(config(*order), SMALL, Home(tmp_path / f"home{n}"), workers=workers)
        for n, (order, workers) in enumerate([((a, b), 1), ((b, a), 2), ((a, b), 7)])
    ]
    assert len(datasets[0].manifest["shards"]) > 5
    assert step(datasets[0], "dedup") == {"exact duplicate": 30}
    assert files(datasets[0]) == files(datasets[1]) == files(datasets[2])
    assert len({dataset.digest for dataset in datasets}) == 1


def test_documents_lie_in_the_order_of_their_digests_whatever_their_source(
    home: Home, tmp_path: Path
) -> None:
    a = source(write_corpus(tmp_path / "a", 30), priority=1)
    b = source(write_corpus(tmp_path / "b", 30, first=30), priority=0)
    dataset = prepare(config(a, b), SMALL, home, workers=1)
    entries = [dataset.document_of(start) for start in dataset.document_starts.tolist()]
    assert [entry.id for entry in entries] == sorted(entry.id for entry in entries)
    assert {entry.source for entry in entries[:20]} == {"a", "b"}


def test_what_is_done_is_not_done_again_and_what_changed_is(home: Home, tmp_path: Path) -> None:
    folder = write_corpus(tmp_path / "a", 40)
    data = config(source(folder))
    with pytest.raises(NotFoundError, match="not prepared"):
        find(data, SMALL, home)
    first = prepare(data, SMALL, home, workers=1)
    before = {path: path.stat().st_mtime_ns for path in home.data.rglob("*") if ".locks" not in path.parts}
    assert prepare(data, SMALL, home, workers=1).digest == find(data, SMALL, home).digest == first.digest
    assert before == {path: path.stat().st_mtime_ns for path in before}
    prepare(data, TokenizerConfig(vocab_size=300), home, workers=1)
    stages = sorted(path.name.split("-")[0] for path in home.data.iterdir() if path.name != ".locks")
    assert stages == [
        "documents", "pii", "quality", "sketch", "split", "tokenizer", "tokenizer", "tokens", "tokens",
    ]  # fmt: skip
    (folder / "0000.txt").write_text(prose(500))
    changed_input = prepare(data, SMALL, home, workers=1)
    assert changed_input.digest != first.digest


def stages(home: Home) -> Counter[str]:
    return Counter(path.name.rpartition("-")[0] for path in home.data.iterdir() if path.name != ".locks")


@pytest.mark.parametrize(
    ("change", "remade"),
    [
        ({"dedup": {"threshold": 0.6}}, "split tokenizer tokens"),
        ({"heldout": {"min_bytes": 3000}}, "split tokenizer tokens"),
        ({"max_bytes": 60_000}, "split tokenizer tokens"),
        ({"filters": {"enabled": False}}, "split tokenizer tokens"),
        ({"filters": {"prose": {"min_words": 60}}}, "split tokenizer tokens"),
        ({"document_chars": 1000}, "documents pii quality sketch split tokenizer tokens"),
    ],
)
def test_a_changed_setting_remakes_what_depends_on_it_and_nothing_else(
    home: Home, tmp_path: Path, change: dict[str, object], remade: str
) -> None:
    folder = source(write_corpus(tmp_path / "a", 40))
    prepare(config(folder), SMALL, home, workers=1)
    before = stages(home)
    prepare(config(folder, **change), SMALL, home, workers=1)
    assert sorted(stages(home) - before) == remade.split()


def test_any_partition_of_the_same_documents_gives_the_same_tokens(tmp_path: Path) -> None:
    texts = [prose(n, 100 + n) for n in range(60)] + [prose(3, 103), changed(prose(50, 150), 1, 0.05)]
    files_of(tmp_path / "files", texts)
    pq.write_table(pa.table({"text": texts}), tmp_path / "all.parquet")
    (tmp_path / "lines").mkdir()
    for n in range(5):
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts[n::5])
        packed = zstandard.compress(lines.encode())
        (tmp_path / "lines" / f"{n}.jsonl.zst").write_bytes(packed)
    found = []
    for name in ("files", "all.parquet", "lines"):
        dataset = prepare(config(source(tmp_path / name)), SMALL, Home(tmp_path / f"home-{name}"), workers=1)
        assert step(dataset, "dedup") == {"exact duplicate": 1, "near-duplicate": 1}
        streams = {
            key: value for key, value in files(dataset).items() if not key.endswith(("jsonl", "json", "html"))
        }
        held = [(document.id, document.text) for document in dataset.heldout()]
        found.append((streams, dataset.tokenizer.digest, held))
    assert found[0] == found[1] == found[2]


def files_of(folder: Path, texts: list[str]) -> None:
    folder.mkdir()
    for n, text in enumerate(texts):
        (folder / f"{n}.txt").write_text(text, encoding="utf-8")


def test_every_document_has_a_verdict_and_every_duplicate_its_survivor(home: Home, tmp_path: Path) -> None:
    folder = write_corpus(tmp_path / "a", 40)
    copies = {"copy.txt": prose(5), "near.txt": changed(prose(6), 1, 0.05), "short.txt": "too short"}
    for name, text in copies.items():
        (folder / name).write_text(text, encoding="utf-8")
    dataset = prepare(config(source(folder)), SMALL, home, workers=1)
    (split,) = home.data.glob("split-*")
    found = Decided(split)
    assert sum(map(len, found.rows.values())) == len(found.documents) == 43
    assert len(found.rows["", ""]) == dataset.manifest["documents"]
    (short,) = found.rows["quality", "too few words"]
    assert found.document(short).path == "short.txt"
    clusters = [{found.document(row).path for row in rows} for rows in found.clusters]
    assert sorted(map(sorted, clusters)) == [["0005.txt", "copy.txt"], ["0006.txt", "near.txt"]]
    gone = [*found.rows["dedup", "exact duplicate"], *found.rows["dedup", "near-duplicate"]]
    assert sorted(gone) == sorted(row for rows in found.clusters for row in rows[1:])
    held = {document.path for document in dataset.heldout()}
    assert {found.document(row).path for row in found.rows["split", "held out"]} == held


def test_a_given_tokenizer_is_used(home: Home, tmp_path: Path) -> None:
    data = config(source(write_corpus(tmp_path / "a", 40)))
    first = prepare(data, SMALL, home, workers=1)
    given = TokenizerConfig(path=str(first.folder / "tokenizer.json"))
    again = prepare(data, given, home, workers=1)
    assert again.tokenizer.digest == first.tokenizer.digest
    assert again.digest == first.digest


def test_no_near_duplicate_of_a_held_out_document_is_trained_on(home: Home, tmp_path: Path) -> None:
    folder = write_corpus(tmp_path / "a", 60)
    for n in range(60):  # for every document one that is too far from it for dedup, yet close
        (folder / f"like-{n:04d}.txt").write_text(changed(prose(n), n, 0.2))
    threshold = {"heldout_threshold": 0.5}
    dataset = prepare(config(source(folder), dedup=DedupConfig(**threshold)), SMALL, home, workers=1)
    assert step(dataset, "split")["close to a held-out document"] >= 3
    assert closest(dataset) < 0.6
    unguarded = DedupConfig(heldout_threshold=0.999)
    assert closest(prepare(config(source(folder), dedup=unguarded), SMALL, home, workers=1)) > 0.6


def closest(dataset: Dataset) -> float:
    """The largest exact Jaccard similarity between a held-out and a training document."""
    held = [shingles(document.text) for document in dataset.heldout()]
    assert held
    trained = [shingles(text) for text in training_texts(dataset)]
    return max(len(a & b) / len(a | b) for a in held for b in trained)


def test_the_preferred_source_keeps_its_copy_and_its_licence(home: Home, tmp_path: Path) -> None:
    web = source(write_corpus(tmp_path / "web", 40), licence="unclear", priority=1)
    clean = source(write_corpus(tmp_path / "clean", 40), licence="CC-BY-4.0", priority=0)
    dataset = prepare(config(web, clean), SMALL, home, workers=1)
    assert [(row["source"], row["licence"]) for row in dataset.manifest["licences"]] == [
        ("clean", "CC-BY-4.0")
    ]
    assert {document.licence for document in dataset.heldout()} == {"CC-BY-4.0"}
    assert dataset.document_of(dataset.tokens - 1).licence == "CC-BY-4.0"


def test_text_in_many_languages_comes_out_as_it_went_in(home: Home, tmp_path: Path) -> None:
    alphabets = {
        "el": 0x3B1,
        "ru": 0x430,
        "he": 0x5D0,
        "ar": 0x627,
        "hi": 0x915,
        "th": 0xE01,
        "ja": 0x3042,
        "zh": 0x4E00,
    }
    spaced = {"el", "ru", "he", "ar", "hi"}
    texts = set()
    for n, (name, first) in enumerate(alphabets.items()):
        for m in range(6):
            words = prose(100 * n + m, 150).lower().split()
            moved = ["".join(chr(first + ord(c) % 24) for c in word if c.isalpha()) for word in words]
            text = (" " if name in spaced else "").join(moved)
            texts.add(text)
            (tmp_path / f"{name}{m}.txt").write_text(text, encoding="utf-8")
    dataset = prepare(config(source(tmp_path)), SMALL, home, workers=1)
    assert step(dataset, "quality") == {}
    assert set(training_texts(dataset)) | {document.text for document in dataset.heldout()} == texts


def test_a_limit_on_bytes_holds(home: Home, tmp_path: Path) -> None:
    folder = write_corpus(tmp_path / "a", 60)
    dataset = prepare(config(source(folder), max_bytes=30_000), SMALL, home, workers=1)
    used = dataset.manifest["bytes"] + dataset.manifest["heldout"]["bytes"]
    assert 25_000 < used <= 30_000


def test_a_file_that_vanishes_meanwhile_is_counted_and_the_name_says_so(home: Home, tmp_path: Path) -> None:
    folder = write_corpus(tmp_path / "a", 40)

    def vanish(done: float, total: float | None = None, text: str = "") -> None:
        if "39 of 40" in text:  # the last file is listed, none is read
            (folder / "0007.txt").unlink(missing_ok=True)

    dataset = prepare(config(source(folder)), SMALL, home, workers=1, progress=vanish)
    assert step(dataset, "read") == {"vanished while it was read": 1}
    assert dataset.manifest["documents"] + dataset.manifest["heldout"]["documents"] == 39
    (folder / "0007.txt").write_text(prose(7))
    whole = prepare(config(source(folder)), SMALL, home, workers=1)
    assert whole.manifest["documents"] + whole.manifest["heldout"]["documents"] == 40


def test_too_little_text_says_how_much_there_is_and_how_much_is_needed(home: Home, tmp_path: Path) -> None:
    folder = write_corpus(tmp_path / "a", 3)
    with pytest.raises(InputError, match=r"4,\d\d\d bytes are left.*at least 10,000 bytes"):
        prepare(DataConfig(sources=(source(folder),)), SMALL, home, workers=1)


def test_when_the_rules_drop_everything_the_reasons_are_told(home: Home, tmp_path: Path) -> None:
    folder = write_corpus(tmp_path / "a", 5, count=20)
    with pytest.raises(InputError, match="too few words 5") as caught:
        prepare(config(source(folder)), SMALL, home, workers=1)
    assert "data.filters.enabled=false" in caught.value.hint


def test_a_recipe_needs_a_path_and_little_else(home: Home, tmp_path: Path) -> None:
    folder = write_corpus(tmp_path / "a", 120)
    data = parse({"sources": [{"path": str(folder)}]}, DataConfig)
    dataset = prepare(data, parse({"vocab_size": 300}, TokenizerConfig), home, workers=1)
    assert dataset.tokens > 1000


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({}, "'sources' is required"),
        ({"sources": []}, "at least one"),
        ({"sources": [{}]}, "needs a path"),
        ({"sources": [{"kind": "environment", "path": "x"}]}, "takes no path"),
        ({"sources": [{"path": "x", "format": "docx"}]}, "'parquet'"),
        ({"sources": [{"path": "x"}], "heldout": {"max_bytes": 9}}, "min_bytes = 10000 is more than"),
        ({"sources": [{"path": "x"}], "dedup": {"treshold": 0.5}}, "Did you mean 'threshold'"),
    ],
)
def test_a_wrong_recipe_says_what_is_wrong(values: dict[str, object], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        parse(values, DataConfig)


def test_two_at_once_make_one_dataset(home: Home, tmp_path: Path) -> None:
    data = config(source(write_corpus(tmp_path / "a", 60)))
    found: list[Dataset] = []
    threads = [
        threading.Thread(target=lambda: found.append(prepare(data, SMALL, home, workers=1))) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({dataset.digest for dataset in found}) == 1
    assert len(found) == 3


@pytest.mark.parametrize("kept", [False, True])
def test_a_worker_that_dies_is_an_error_not_a_hang(kept: bool) -> None:
    with kept_workers(2 if kept else 1):
        with pytest.raises(UnavailableError, match="worker process ended") as caught:
            list(run_tasks(os._exit, [3, 3, 3], 2))
        assert "--workers 1" in caught.value.hint


def worker(_: int) -> int:
    return os.getpid()


def test_stages_share_their_workers() -> None:
    with kept_workers(2):
        found = [set(run_tasks(worker, range(20), 2)) for _ in range(3)]
    assert len(set.union(*found)) == 2
    assert os.getpid() not in set.union(*found)


def test_when_a_task_fails_no_other_goes_on(tmp_path: Path) -> None:
    with kept_workers(2), pytest.raises(ZeroDivisionError):
        list(run_tasks(fail_or_write, [(n, tmp_path / str(n)) for n in range(9)], 2))
    before = set(tmp_path.iterdir())
    time.sleep(0.3)
    assert set(tmp_path.iterdir()) == before
    assert len(before) < 8


def fail_or_write(task: tuple[int, Path]) -> None:
    number, path = task
    if not number:
        raise ZeroDivisionError
    time.sleep(0.2)
    path.touch()


def test_workers_see_what_their_parent_sees_now(monkeypatch: pytest.MonkeyPatch) -> None:
    list(run_tasks(worker, range(2), 2))  # what workers are forked from is there
    monkeypatch.setenv("LAPIS_TEST_SEEN", "now")
    assert set(run_tasks(os.getenv, ["LAPIS_TEST_SEEN"] * 2, 2)) == {"now"}


@pytest.mark.parametrize("temporary", ["tmp", "too-long-for-a-socket-" * 5])
def test_nothing_is_loaded_from_the_folder_that_the_user_is_in(
    temporary: str, home: Home, tmp_path: Path
) -> None:
    (tmp_path / "xxhash.py").write_text("raise SystemExit('this is a file of the user')")
    (tmp_path / temporary).mkdir()
    command = tmp_path / "bin" / "lapis"  # as an installed command, it has its own folder on the path
    command.parent.mkdir()
    command.write_text("from lapis.cli.main import main\nif __name__ == '__main__':\n    main()\n")
    folder = write_corpus(tmp_path / "a", 60)
    (tmp_path / "recipe.toml").write_text(
        f"[data]\n[[data.sources]]\npath = '{folder}'\n[data.heldout]\nmin_bytes = 2000\n"
        "[tokenizer]\nvocab_size = 400\n[train]\nsteps = 1\n"
    )
    done = subprocess.run(
        [sys.executable, command, "data", "prepare", "recipe.toml", "--workers", "2"],
        cwd=tmp_path,
        env={**os.environ, "LAPIS_HOME": str(home.root), "TMPDIR": str(tmp_path / temporary)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, "file of the user" in done.stderr) == (0, False), done.stderr
