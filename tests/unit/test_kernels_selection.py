"""Which kernels are chosen, what is said when they are not there, and that an installation never fails for them."""

from __future__ import annotations

import mmap
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lapis.errors import ConfigError, UnavailableError
from lapis.kernels import variants
from lapis.kernels.memory import LargePages, keep_freed_memory
from lapis.kernels.ops import select, status

ROOT = Path(__file__).parents[2]
built = pytest.mark.skipif(not status().usable, reason="no compiled kernels here")


@pytest.fixture(autouse=True)
def unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LAPIS_KERNELS", raising=False)


@built
def test_the_fastest_usable_build_is_chosen() -> None:
    ops = select(64, widths=(384, 1024))
    assert ops.name == f"cpu-{status().usable[0]}"
    assert ops.bit_exact
    assert ops.reason == ""
    assert status().lost == ""


@built
def test_the_environment_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    for variant in status().usable:
        monkeypatch.setenv("LAPIS_KERNELS", variant)
        assert select(64).name == f"cpu-{variant}"
    monkeypatch.setenv("LAPIS_KERNELS", "stock")
    assert select(64).name == "stock"
    assert status().hint == "unset LAPIS_KERNELS"


def test_an_unknown_name_is_an_error_that_helps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAPIS_KERNELS", "avx512bf61")
    with pytest.raises(ConfigError, match="avx512bf16"):
        select(64)


@pytest.mark.parametrize(
    ("head_size", "widths", "dtype", "word"),
    [
        (40, (), torch.bfloat16, "head sizes"),
        (64, (384, 1000), torch.bfloat16, "1000"),
        (64, (), torch.float16, "bf16"),
    ],
)
def test_a_shape_that_does_not_fit_gets_plain_torch(
    head_size: int, widths: tuple[int, ...], dtype: torch.dtype, word: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ops = select(head_size, widths=widths, dtype=dtype)
    assert (ops.name, ops.bit_exact) == ("stock", False)
    assert word in ops.reason
    monkeypatch.setenv("LAPIS_KERNELS", "portable")
    with pytest.raises(UnavailableError, match=word):
        select(head_size, widths=widths, dtype=dtype)


def test_without_libraries_plain_torch_runs_and_says_what_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(variants, "FOLDER", tmp_path)
    ops, facts = select(64), status()
    assert ops.name == facts.chosen == "stock"
    assert not facts.bit_exact
    assert facts.built == ()
    assert "bits" in facts.lost
    assert "no compiled kernels" in ops.reason
    assert "build_ext" in facts.hint
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "C compiler" in status().hint
    monkeypatch.setenv("LAPIS_KERNELS", "portable")
    variants.library.cache_clear()
    with pytest.raises(UnavailableError, match="not built"):
        select(64)


@built
def test_libraries_of_other_sources_or_another_cpu_are_refused(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    variants.library.cache_clear()
    monkeypatch.setattr(variants, "source_digest", lambda: "0" * 16)
    with caplog.at_level("WARNING"):
        assert select(64).reason.count("other sources") == 1
    assert "build_ext" in caplog.text
    monkeypatch.setattr(variants, "cpu_flags", lambda: frozenset({"sse2"}))
    with pytest.raises(UnavailableError, match="this CPU cannot run"):
        variants.library("avx2")
    variants.library.cache_clear()


def test_status_needs_no_torch() -> None:
    code = (
        "import sys; from lapis.kernels.variants import status; status(); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def build(tmp_path: Path, **environment: str) -> tuple[str, list[str]]:
    """Runs the package's build of the kernels in a copy; gives what it printed and the libraries it made."""
    shutil.copy(ROOT / "setup.py", tmp_path)
    for source in (ROOT / "src" / "lapis").glob("*/*.[ch]"):
        place = tmp_path / source.relative_to(ROOT)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, place)
    kernels = tmp_path / "src" / "lapis" / "kernels"
    (kernels / "cpu-avx2.so").write_bytes(b"of an earlier build")
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    done = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, **environment}, capture_output=True, text=True, check=True
    )
    return done.stdout, sorted(path.name for path in kernels.glob("*.so"))


def test_an_installation_without_compiler_succeeds_and_says_so(tmp_path: Path) -> None:
    printed, libraries = build(tmp_path, CC="no-such-compiler")
    assert "no C compiler found; plain torch will be used" in printed
    assert libraries == []


def test_the_build_can_be_skipped(tmp_path: Path) -> None:
    printed, libraries = build(tmp_path, LAPIS_NO_KERNELS="1")
    assert "LAPIS_NO_KERNELS" in printed
    assert libraries == []


def test_a_compiler_that_fails_costs_only_its_builds(tmp_path: Path) -> None:
    compiler = tmp_path / "cc"
    compiler.write_text("#!/bin/sh\necho 'unknown option' >&2\nexit 1\n")
    compiler.chmod(0o755)
    printed, libraries = build(tmp_path, CC=str(compiler))
    assert "portable left out, the compiler says: unknown option" in printed
    assert libraries == []


def test_setup_and_package_agree_on_the_sources() -> None:
    text = (ROOT / "setup.py").read_text()
    assert all(f'"{name}"' in text for name in variants.SOURCES)
    assert all(f'"{name}"' in text for name in variants.VARIANTS)


def test_keeping_freed_memory_is_possible_with_glibc() -> None:
    import platform

    assert keep_freed_memory() == (platform.libc_ver()[0] == "glibc")


def test_tensors_lie_side_by_side_in_large_pages_and_are_gone_with_the_last_one() -> None:
    pages = LargePages()
    some = [torch.arange(count, dtype=torch.int16).view(-1, 3) for count in (3, 300_000, 40_000_002)]
    copies = [pages.copy(tensor) for tensor in some]
    assert all(torch.equal(*pair) for pair in zip(some, copies, strict=True))
    assert all(copy.data_ptr() % 64 == 0 for copy in copies)
    assert pages.copy(torch.empty(0, 3)).shape == (0, 3)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        assert copies[1].data_ptr() - copies[0].data_ptr() == 64
        assert pages._block() is not None
    del copies
    assert pages._block() is None
