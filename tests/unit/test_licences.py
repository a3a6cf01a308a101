"""Licence policy: expressions, old names, families, verdicts, and the rules made of them."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

from lapis.data.columns import Columns, part_file, part_writer
from lapis.data.licence_names import FAMILY_OF, IDS, NAMES
from lapis.data.licences import Both, Either, Licence, families, licence_rules, parse, verdict
from lapis.data.recipe import LicencesConfig

MIT, APACHE, BSD = Licence("MIT"), Licence("Apache-2.0"), Licence("BSD-3-Clause")


@pytest.mark.parametrize(
    ("text", "expression"),
    [
        ("MIT", MIT),
        ("  mit ", MIT),
        ("MIT OR Apache-2.0", Either((MIT, APACHE))),
        ("MIT or Apache-2.0 AND BSD-3-Clause", Either((MIT, Both((APACHE, BSD))))),
        ("(MIT OR Apache-2.0) AND BSD-3-Clause", Both((Either((MIT, APACHE)), BSD))),
        ("((MIT))", MIT),
        ("GPL-2.0+ WITH Classpath-exception-2.0", Licence("GPL-2.0-or-later", "Classpath-exception-2.0")),
        ("LGPL-2.1+", Licence("LGPL-2.1-or-later")),
        ("GPL-3.0", Licence("GPL-3.0-only")),
        ("MIT License", MIT),
        ("Mozilla Public License 2.0 (MPL 2.0)", Licence("MPL-2.0")),
        ("Apache Software License AND MIT License", Both((Licence("LicenseRef-Apache"), MIT))),
        ("GNU General Public License v3 (GPLv3) AND MIT License", Both((Licence("GPL-3.0-only"), MIT))),
        ("zlib/libpng License", Licence("Zlib")),
        ("MIT/Apache-2.0", Both((MIT, APACHE))),
        ("LicenseRef-Ours", Licence("LicenseRef-Ours")),
        ("Some Licence Nobody Knows (v2)", Licence("Some Licence Nobody Knows (v2)")),
        ("MIT AND", Licence("MIT AND")),
        ("(MIT", Licence("(MIT")),
        ("MIT WITH (Apache-2.0)", Licence("MIT WITH (Apache-2.0)")),
    ],
)  # fmt: skip
def test_expressions(text: str, expression: object) -> None:
    assert parse(text) == expression


def test_every_other_name_leads_to_a_licence_of_a_family() -> None:
    assert {name for name in NAMES.values() if name.lower() not in FAMILY_OF} == set()
    assert all(IDS[name.lower()] == name for name in NAMES.values())


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("MIT OR GPL-3.0-only", "copyleft or permissive"),
        ("CC-BY-NC-4.0", "non-commercial"),
        ("CC0-1.0", "public-domain"),
        ("CC-BY-SA-4.0 AND MIT", "copyleft and permissive"),
        ("Who knows", "unknown"),
        ("", "unknown"),
    ],
)
def test_families(text: str, named: str) -> None:
    assert families(text) == named


@pytest.mark.parametrize(
    ("text", "policy", "expected"),
    [
        ("MIT", {}, "allow"),
        ("GPL-3.0-only", {}, "allow"),
        ("", {}, "unknown"),
        ("Who knows", {}, "unknown"),
        ("GPL-3.0-only", {"deny": ("copyleft",)}, "deny"),
        ("MIT", {"allow": ("public-domain",)}, "deny"),
        ("MIT OR GPL-3.0-only", {"deny": ("copyleft",)}, "allow"),
        ("MIT AND GPL-3.0-only", {"deny": ("copyleft",)}, "deny"),
        ("MIT AND Who knows", {"allow": ("permissive",)}, "unknown"),
        ("Who knows OR MIT", {"allow": ("permissive",)}, "allow"),
        ("MPL-2.0", {"allow": ("permissive", "mpl-2.0")}, "allow"),
        ("MPL-2.0", {"deny": ("copyleft",), "allow": ("MPL-2.0",)}, "allow"),
        ("MIT", {"allow": ("permissive",), "deny": ("MIT",)}, "deny"),
        ("MIT", {"allow": ("MIT",), "deny": ("MIT",)}, "deny"),
        ("GPL-2.0-only", {"deny": ("GPL-2.0",)}, "deny"),
        ("GPL-2.0-only WITH Classpath-exception-2.0", {"deny": ("copyleft",)}, "deny"),
        (
            "GPL-2.0-only WITH Classpath-exception-2.0",
            {"deny": ("copyleft",), "allow": ("GPL-2.0 WITH Classpath-exception-2.0",)},
            "allow",
        ),
        ("Who knows", {"allow": ("Who knows",)}, "allow"),
        ("Who knows", {"deny": ("unknown",)}, "deny"),
    ],
)
def test_verdicts(text: str, policy: dict[str, object], expected: str) -> None:
    assert verdict(text, LicencesConfig.model_validate(policy)) == expected


def test_the_rules_hit_the_documents_of_a_column(tmp_path: Path) -> None:
    schema = pa.schema([("licence", pa.string())])
    with part_writer(part_file(tmp_path, 0), schema) as writer:
        writer.write(pa.RecordBatch.from_pydict({"licence": ["MIT", "GPL-3.0-only", ""]}, schema=schema))
    with part_writer(part_file(tmp_path, 1), schema) as writer:
        writer.write(
            pa.RecordBatch.from_pydict({"licence": ["MIT OR GPL-3.0-only", "?", "MIT"]}, schema=schema)
        )
    attributes = {"documents": Columns(tmp_path, schema)}

    def hits(**settings: object) -> dict[str, list[int]]:
        rules = licence_rules(LicencesConfig.model_validate(settings))
        return {rule.reason: rule.hit(attributes).nonzero()[0].tolist() for rule in rules}

    assert hits() == {}
    assert hits(deny=("copyleft",)) == {"licence not allowed": [1]}
    assert hits(allow=("permissive",), unknown="drop") == {
        "licence not allowed": [1],
        "licence unknown": [2, 4],
    }
