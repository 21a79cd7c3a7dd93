"""The wheel carries conf/ and recipes/ and works from any folder, without the checkout."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from align.config.listing import options
from align.config.store import compose_run
from tests.conftest import REPO

pytest.importorskip("hatchling", reason="building a wheel needs hatchling")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("site")
    flags = ["-q", "--no-deps", "--no-index", "--target", str(target)]
    done = subprocess.run([sys.executable, "-m", "pip", "install", *flags, str(wheel)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return target


def python(installed: Path, code: str, *arguments: str) -> subprocess.CompletedProcess:
    """Python in the root folder, with the installed package before everything else."""
    first = f"import sys; sys.path.insert(0, {str(installed)!r}); "
    return subprocess.run([sys.executable, "-c", first + code, *arguments], cwd="/", capture_output=True, text=True)


def align(installed: Path, *arguments: str) -> subprocess.CompletedProcess:
    """The installed `python -m align`."""
    return python(installed, "import runpy; runpy.run_module('align', run_name='__main__')", *arguments)


def test_the_wheel_holds_each_file_once_and_no_tests(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert len(names) == len(set(names))
    assert not [name for name in names if name.startswith("tests/")]


def test_the_wheel_holds_every_file_of_the_package_and_every_option(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    files = [f for f in (REPO / "align").rglob("*") if f.is_file() and "__pycache__" not in f.parts]
    package = {str(f.relative_to(REPO)) for f in files}
    options = {f"align/_conf/{f.relative_to(REPO / 'conf')}" for f in (REPO / "conf").rglob("*.yaml")}
    recipes = {f"align/_conf/recipe/{f.name}" for f in (REPO / "recipes").glob("*.yaml")}
    assert package | options | recipes <= names


def test_the_installed_package_is_the_one_that_runs(installed):
    where = python(installed, "import align.config.listing as l; print(l.__file__, l.conf_dir())").stdout.split()
    assert where == [str(installed / "align/config/listing.py"), str(installed / "align/_conf")]


@pytest.mark.parametrize("recipe", sorted(options("recipe")))
def test_an_installed_recipe_composes_to_the_checkouts_run(installed, recipe):
    done = align(installed, f"+recipe={recipe}", "--cfg", "job", "-p", "stages")
    assert done.returncode == 0, done.stderr
    stages = OmegaConf.to_yaml(compose_run([f"+recipe={recipe}"]).tree.stages)
    assert done.stdout == f"# @package stages\n{stages}"


def test_the_installed_package_lists_its_recipes(installed):
    done = align(installed)
    assert done.returncode == 2
    assert all(note in done.stdout for note in options("recipe").values())
