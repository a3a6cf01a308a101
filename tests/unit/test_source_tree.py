"""Source trees: what nobody wrote there is counted under its reason, and each file has the licence it says."""

from __future__ import annotations

import sys
import sysconfig
from importlib.metadata import distribution
from pathlib import Path

import pytest

from lapis.data.recipe import DataConfig
from lapis.data.source_tree import licence_of_text
from lapis.data.sources import list_inputs
from tests.sources import source

CODE = "def f(x):\n    return x + 1\n" * 5
MIT = 'Permission is hereby granted, free of charge, to any person. The Software is provided "as is".'
BSD = "Redistribution and use in source and binary forms are permitted. Neither the name of X may be used."


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_what_nobody_wrote_is_counted_under_its_reason(tmp_path: Path) -> None:
    root = write(
        tmp_path / "tree",
        {
            "src/main.py": CODE,
            "README.md": "Words about it.",
            "vendor/lib/a.c": CODE,
            "src/third_party/b.c": CODE,
            "package-lock.json": "{}",
            "src/x_pb2.py": CODE,
            "web/app.min.js": "var a;",
            "web/packed.js": "var a=1;" * 800,
            "web/wide.py": "x" * 5000,
            ".git/config": "x",
            "node_modules/a/index.js": CODE,
        },
    )
    (root / "logo.png").write_bytes(b"\x89PNG\0\0")
    step = list_inputs(DataConfig(sources=(source(root, kind="code"),))).step
    assert step.reasons == {"vendored": 2, "generated": 2, "minified": 2, "binary": 1}
    assert step.notes == {
        "hidden files and folders, not entered": 1,
        "__pycache__ and node_modules, not entered": 1,
    }
    plain = list_inputs(DataConfig(sources=(source(root),)))
    assert plain.step.reasons == {"binary": 1}  # a folder of files is read as it is


def test_a_file_has_its_own_licence_or_that_of_the_nearest_folder(tmp_path: Path) -> None:
    root = write(
        tmp_path / "tree",
        {
            "LICENSE": MIT,
            "a.py": CODE,
            "b.py": f"# SPDX-License-Identifier: Apache-2.0 OR MIT\n{CODE}",
            "c.c": f"/* SPDX-License-Identifier: GPL-2.0-only */\n{CODE}",
            "deep/er/d.py": CODE,
            "part/COPYING": BSD,
            "part/e.py": CODE,
            "own/LICENSE.txt": "All rights reserved; ask us.",
            "own/f.py": CODE,
            "both/LICENSE-MIT": MIT,
            "both/LICENSE-BSD": BSD,
            "both/g.py": CODE,
        },
    )
    found = {
        item.name: item.licence
        for item in list_inputs(DataConfig(sources=(source(root, kind="code"),))).inputs
    }
    assert {name: found[name] for name in found if name.endswith((".py", ".c"))} == {
        "a.py": "MIT",
        "b.py": "Apache-2.0 OR MIT",
        "c.c": "GPL-2.0-only",
        "deep/er/d.py": "MIT",
        "part/e.py": "BSD-3-Clause",
        "own/f.py": "",
        "both/g.py": "BSD-3-Clause AND MIT",
    }
    given = list_inputs(DataConfig(sources=(source(root, kind="code", licence="CC0-1.0"),))).inputs
    assert {item.licence for item in given} == {"CC0-1.0"}


@pytest.mark.parametrize(
    ("package", "expected"),
    [("click", "BSD-3-Clause"), ("fsspec", "BSD-3-Clause"), ("pydantic", "MIT"), ("requests", "Apache-2.0")],
)
def test_the_licence_files_of_installed_packages_are_known(package: str, expected: str) -> None:
    texts = [file.read_text() for file in distribution(package).files or () if "LICEN" in file.name.upper()]
    assert {licence_of_text(text) for text in texts} == {expected}


def test_a_real_tree_keeps_its_own_code(tmp_path: Path) -> None:
    library = Path(sysconfig.get_paths()["stdlib"]) / "json"
    listing = list_inputs(DataConfig(sources=(source(library, kind="code"),)))
    assert {item.name for item in listing.inputs} >= {"__init__.py", "decoder.py", "encoder.py"}
    assert not listing.step.reasons, sys.version
