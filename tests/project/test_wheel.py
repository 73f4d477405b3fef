"""What is shipped."""

import zipfile
from pathlib import Path, PurePosixPath

import pytest
from hatchling.builders.wheel import WheelBuilder

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Names in a wheel built from this tree."""
    folder = str(tmp_path_factory.mktemp("wheel"))
    (wheel,) = WheelBuilder(str(ROOT)).build(directory=folder, versions=["standard"])
    return set(zipfile.ZipFile(wheel).namelist())


def test_the_wheel_holds_both_packages_and_nothing_else(files: set[str]):
    tops = {PurePosixPath(name).parts[0] for name in files}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"jaxmeta", "jaxmeta_bridge"}
    assert not [name for name in files if "test" in name]


def test_the_wheel_is_complete(files: set[str]):
    native = {str(file.relative_to(ROOT)) for file in ROOT.glob("jaxmeta/**/*.py")}
    bridge = {str(file.relative_to(ROOT / "bridge")) for file in ROOT.glob("bridge/**/*.py")}
    typed = {"jaxmeta/py.typed", "jaxmeta_bridge/py.typed"}
    assert native | bridge | typed <= files
