"""Builds the C code beside the Python files: kernels, one shared library per instruction set, the tokenizer's
and the data path's.

The build is optional. Without a C compiler the installation succeeds, says so, and plain torch, Python and Hugging
Face `tokenizers` do the work. LAPIS_NO_KERNELS=1 skips it on purpose.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

PACKAGE = Path("src/lapis/kernels")
UNITS = (
    "cpu.c",
    "cpu_linear.c",
    "cpu_attention.c",
    "cpu_attention_write.c",
    "cpu_attention_backward.c",
    "cpu_rows.c",
    "cpu_replay.c",
    "cpu_train.c",
    "cpu_muon.c",
    "cpu_quantized.c",
    "cpu_experts.c",
    "cpu_fp32.c",
    "cpu_fp32_attention.c",
)
# as in kernels/variants.py: all text that goes into a library, in this order
SOURCES = (
    *UNITS,
    "cpu_vector.h",
    "cpu_team.h",
    "cpu_product.h",
    "cpu_amx.h",
    "cpu_transpose.h",
    "cpu_attention.h",
    "cpu_fp32.h",
)
# folder, library: all text that goes into it, in this order; one build for every CPU
PLAIN = {
    # as in tokenizer/compiled.py
    (Path("src/lapis/tokenizer"), "bpe-portable.so"): (
        "bpe_split.c", "bpe_merge.c", "bpe_encode.c", "bpe_train.c", "bpe.h", "bpe_merge.h",
    ),
    # as in data/native.py
    (Path("src/lapis/data"), "text-portable.so"): (
        "statistics.c", "ngrams.c", "parts.c", "language.c", "words.c", "sketch.c", "text.h", "statistics.h",
    ),
}  # fmt: skip
VARIANTS = {"portable": ()}
if platform.machine().lower() in ("x86_64", "amd64"):
    VARIANTS |= {
        "avx2": ("-march=x86-64-v3",),
        "avx512": ("-march=x86-64-v4",),
        "avx512bf16": ("-march=x86-64-v4", "-mavx512bf16", "-mavx512vnni"),
        "amx": ("-march=x86-64-v4", "-mavx512bf16", "-mavx512vnni", "-mamx-tile", "-mamx-bf16", "-mamx-int8"),
    }
# sums must keep the order in which the contract writes them: no contraction, no fast math
FLAGS = (
    "-std=gnu11",
    "-O3",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fPIC",
    "-fvisibility=hidden",
    "-Wno-psabi",
)


def find_compiler() -> list[str] | None:
    """The C compiler: $CC, or the first of cc, gcc, clang on the path."""
    asked = shlex.split(os.environ.get("CC", ""))
    for command in [asked] if asked else [["cc"], ["gcc"], ["clang"]]:
        if shutil.which(command[0]):
            return command
    return None


def source_digest(package: Path, names: tuple[str, ...]) -> str:
    """Digest of the sources, compiled in, so that a library of other sources is noticed when it is loaded."""
    digest = hashlib.sha256()
    for name in names:
        digest.update((package / name).read_bytes())
    return digest.hexdigest()[:16]


class BuildKernels(build_ext):
    """Compiles every variant that the compiler can make; never fails the installation."""

    def run(self) -> None:
        """Build, and report in one line per variant what came of it."""
        folder = self._place(PACKAGE)
        folder.mkdir(parents=True, exist_ok=True)
        self.built: list[str] = []
        compiler = find_compiler()
        if os.environ.get("LAPIS_NO_KERNELS"):
            print("lapis kernels: skipped (LAPIS_NO_KERNELS); plain torch will be used")
        elif compiler is None:
            print("lapis kernels: no C compiler found; plain torch will be used (see: lapis doctor)")
        else:
            for package, name in PLAIN:
                self._compile_plain(compiler, package, name)
            with tempfile.TemporaryDirectory() as scratch:
                self._compile_all(compiler, folder, Path(scratch))
        plain = [self._place(package) / name for package, name in PLAIN]
        for library in (*folder.glob("cpu-*.so"), *plain):
            if str(library) not in self.built and library.exists():
                library.unlink()  # of an earlier build

    def get_outputs(self) -> list[str]:
        """The libraries that were built."""
        return self.built

    def _compile_all(self, compiler: list[str], folder: Path, scratch: Path) -> None:
        digest = source_digest(PACKAGE, SOURCES)
        define = f'-DLAPIS_SOURCE="{digest}"'
        made = [folder / f"cpu-{variant}.so" for variant in VARIANTS]
        self.built += [str(path) for path in made if path.exists() and digest.encode() in path.read_bytes()]
        variants = [
            variant for variant, path in zip(VARIANTS, made, strict=True) if str(path) not in self.built
        ]
        jobs = [(variant, unit) for variant in variants for unit in UNITS]

        def compile_unit(job: tuple[str, str]) -> tuple[str, bool]:
            variant, unit = job
            command = [*compiler, *FLAGS, *VARIANTS[variant], define, "-c", str(PACKAGE / unit)]
            target = ["-o", str(scratch / f"{variant}-{unit}.o")]
            threaded = subprocess.run([*command, "-fopenmp", *target], capture_output=True, text=True)
            if threaded.returncode == 0:
                return "", True
            single = subprocess.run([*command, *target], capture_output=True, text=True)
            return ("" if single.returncode == 0 else single.stderr), False

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            results = dict(zip(jobs, pool.map(compile_unit, jobs), strict=True))
        for variant in variants:
            errors = [results[variant, unit][0] for unit in UNITS if results[variant, unit][0]]
            threads = all(results[variant, unit][1] for unit in UNITS)
            self._link(compiler, folder / f"cpu-{variant}.so", scratch, variant, errors, threads)

    def _place(self, package: Path) -> Path:
        """Where a package's libraries go: beside its sources, or into the wheel."""
        return (
            package
            if self.inplace or self.editable_mode
            else Path(self.build_lib) / package.relative_to("src")
        )

    def _compile_plain(self, compiler: list[str], package: Path, name: str) -> None:
        sources = PLAIN[package, name]
        target = self._place(package) / name
        target.parent.mkdir(parents=True, exist_ok=True)
        beside = target.with_suffix(".tmp")
        define = f'-DLAPIS_SOURCE="{source_digest(package, sources)}"'
        units = [str(package / source) for source in sources if source.endswith(".c")]
        compiled = subprocess.run(
            [*compiler, *FLAGS, define, "-shared", *units, "-o", str(beside)], capture_output=True, text=True
        )
        if compiled.returncode == 0:
            beside.replace(target)
            self.built.append(str(target))
            print(f"lapis {package.name}: built {target.name}")
            return
        print(
            f"lapis {package.name}: left out, the compiler says: {compiled.stderr.strip().splitlines()[-1]}"
        )

    def _link(
        self, compiler: list[str], target: Path, scratch: Path, variant: str, errors: list[str], threads: bool
    ) -> None:
        if not errors:
            objects = [str(scratch / f"{variant}-{unit}.o") for unit in UNITS]
            beside = target.with_suffix(".tmp")
            command = [
                *compiler,
                "-shared",
                *(["-fopenmp"] if threads else []),
                *objects,
                "-o",
                str(beside),
                "-lm",
            ]
            linked = subprocess.run(command, capture_output=True, text=True)
            if linked.returncode == 0:
                beside.replace(target)  # a process that holds the old library keeps it
                self.built.append(str(target))
                print(
                    f"lapis kernels: built {target.name}" + ("" if threads else " for one thread: no OpenMP")
                )
                return
            errors = [linked.stderr]
        print(f"lapis kernels: {variant} left out, the compiler says: {errors[0].strip().splitlines()[-1]}")


setup(
    ext_modules=[Extension("lapis.kernels.cpu", [str(PACKAGE / unit) for unit in UNITS])],
    cmdclass={"build_ext": BuildKernels},
)
