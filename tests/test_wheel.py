"""A wheel, an editable install and a plain checkout all find what they need, wherever they are started."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from vitfreeze.config import RECIPE_FOLDER

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "constraints.txt")
FOLDERS = ("vitfreeze", "data_prep", "ds_configs")
DS_CONFIGS = sorted(path.name for path in (ROOT / "ds_configs").glob("*.json"))
OFFLINE = ("--no-deps", "--no-index", "--no-build-isolation", "--disable-pip-version-check", "--quiet")
# What would lead back to the checkout, and what runs of this process have said about ranks.
INHERITED = {"PYTHONPATH", "PYTHONSAFEPATH", "MASTER_ADDR", "MASTER_PORT", "RANK", "LOCAL_RANK", "WORLD_SIZE"}
Run = Callable[..., str]


def call(*command: str | Path, cwd: Path, path: str = "") -> str:
    """Run a command far from the checkout and return what it prints."""
    environment = {name: value for name, value in os.environ.items() if name not in INHERITED}
    environment |= {"PYTHONPATH": path} if path else {}
    environment |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout: building leaves files behind."""
    folder = tmp_path_factory.mktemp("source") / "checkout"
    for name in FOLDERS:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in PARTS:
        shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def wheel(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    call(sys.executable, "-m", "pip", "wheel", *OFFLINE, "--wheel-dir", out, checkout, cwd=out)
    return next(out.glob("vitfreeze-*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, installed where nothing else is."""
    target = tmp_path_factory.mktemp("installed")
    call(sys.executable, "-m", "pip", "install", *OFFLINE, "--target", target, wheel, cwd=target)
    return target


@pytest.fixture
def run(installed: Path, tmp_path: Path) -> Run:
    """Run one of the wheel's console commands in an empty folder."""

    def run(command: str, *arguments: str) -> str:
        return call(sys.executable, installed / "bin" / command, *arguments, cwd=tmp_path, path=str(installed))

    return run


def test_the_wheel_holds_everything_once(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert sorted(Path(name).name for name in names if "ds_configs/" in name) == DS_CONFIGS
    recipes = sorted(Path(name).name for name in names if name.startswith("vitfreeze/recipes/"))
    assert recipes == sorted(path.name for path in RECIPE_FOLDER.glob("*.yaml"))
    assert {"vitfreeze/py.typed", "data_prep/py.typed"} <= set(names)
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"vitfreeze", "data_prep"}
    metadata = zipfile.ZipFile(wheel).read(next(name for name in names if name.endswith("/METADATA"))).decode()
    assert "Requires-Dist: torch<2.15,>=2.11" in metadata
    assert "Requires-Dist: braceexpand" in metadata


def test_the_source_archive_can_be_built_from(checkout: Path, tmp_path: Path) -> None:
    program = f"from setuptools import build_meta; build_meta.build_sdist({str(tmp_path)!r})"
    call(sys.executable, "-c", program, cwd=checkout)
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {f"ds_configs/{name}" for name in DS_CONFIGS} | {"setup.py", "vitfreeze/py.typed"} <= names


def test_the_wheel_is_what_runs(installed: Path, tmp_path: Path) -> None:
    program = "import vitfreeze, data_prep; print(vitfreeze.__file__, data_prep.__file__)"
    for file in call(sys.executable, "-c", program, cwd=tmp_path, path=str(installed)).split():
        assert Path(file).is_relative_to(installed)


def test_the_wheel_plans_and_explains(run: Run) -> None:
    assert run("vitfreeze", "plan", "paper").startswith("paper: vit_base_patch16")
    assert run("vitfreeze", "plan", "vit_base_1x8_v100").startswith("vit_base_1x8_v100: vit_base_patch16")
    assert "data.allow_pipe = False" in run("vitfreeze", "config", "paper")


def test_the_wheel_packs_and_trains(run: Run, installed: Path, tmp_path: Path) -> None:
    assert "train: 64 samples" in run("vitfreeze-data", "demo", "--out", "shards/demo", "--samples", "80")
    assert "all checks passed" in run("vitfreeze-data", "verify", "shards/demo")
    module = call(sys.executable, "-m", "data_prep", "verify", "shards/demo", cwd=tmp_path, path=str(installed))
    assert "all checks passed" in module
    settings = ("run.length=12 steps", "batch.global_size=8", "data.workers=0", "run.show_every=0", "eval.samples=16")
    run("vitfreeze", "pretrain", "demo", *settings)
    assert (tmp_path / "runs" / "demo" / "metrics.jsonl").stat().st_size


def test_a_relative_checkout_works(checkout: Path, tmp_path: Path) -> None:
    nearby = tmp_path / "nearby"
    nearby.mkdir()
    for cwd, path in ((checkout, "."), (nearby, os.path.relpath(checkout, nearby))):
        plan = call(sys.executable, "-m", "vitfreeze", "plan", "vit_base_1x8_v100", cwd=cwd, path=path)
        assert plan.startswith("vit_base_1x8_v100: vit_base_patch16")


def test_the_default_editable_install_works(checkout: Path, tmp_path: Path) -> None:
    """Its files stay in the checkout, and so does ds_configs/."""
    call(sys.executable, "-m", "pip", "install", *OFFLINE, "--target", tmp_path, "--editable", checkout, cwd=tmp_path)
    assert not (checkout / "vitfreeze" / "ds_configs").exists()
    program = (
        "import site; site.addsitedir({here!r}); site.addsitedir({there!r})\n"  # ours comes before what is there
        "from vitfreeze.config import find_ds_config; print(find_ds_config('cpu'))"
    ).format(here=str(tmp_path), there=sysconfig.get_path("purelib"))
    found = call(sys.executable, "-S", "-c", program, cwd=tmp_path)
    assert Path(found.strip()) == checkout / "ds_configs" / "cpu.json"
