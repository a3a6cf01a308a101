"""What a machine of a cluster must have before it runs a task."""

from __future__ import annotations

from pathlib import Path

import pytest

from lapis.data.cluster import check_node, versions
from lapis.errors import UnavailableError


def test_a_machine_that_does_not_see_the_shared_folder_is_refused(tmp_path: Path) -> None:
    check_node(versions(), [str(tmp_path)])
    with pytest.raises(UnavailableError, match="does not see /nowhere/mark.*\n.*LAPIS_HOME"):
        check_node(versions(), [str(tmp_path), "/nowhere/mark"])


@pytest.mark.parametrize("package", ["lapis", "numpy", "python"])
def test_a_machine_with_another_version_is_refused(package: str) -> None:
    with pytest.raises(UnavailableError, match=f"has {package} {versions()[package]} installed"):
        check_node({**versions(), package: "0.0.1"}, [])


def test_a_machine_that_lacks_a_package_or_has_one_more_is_refused() -> None:
    fewer = {name: found for name, found in versions().items() if name != "xxhash"}
    with pytest.raises(UnavailableError, match="has xxhash .* installed, the machine of the command not"):
        check_node(fewer, [])
