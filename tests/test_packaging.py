"""The folders are mapped into the namespace `ogpstream`, in the one way that leaves transformers importable.

Hugging Face publishes a distribution `kernels` that every model class of transformers imports when it is
there, and `profiling` is a module of the standard library from Python 3.15 on. A folder of that name in
the working directory would be taken for theirs if it had an `__init__.py`.
"""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
FOLDERS = {"kernels", "learner", "memory", "profiling"}


@pytest.mark.parametrize("folder", ["kernels", "profiling"])
def test_folders_with_a_foreign_name_are_no_packages_of_their_own(folder):
    assert not (ROOT / folder / "__init__.py").exists()


def test_every_folder_with_code_is_mapped_and_listed():
    with_code = {path.name for path in ROOT.glob("[!.]*") if any(path.rglob("*.py"))} - {"tests", "build"}
    setuptools = PROJECT["tool"]["setuptools"]
    assert with_code == FOLDERS
    assert setuptools["package-dir"] == {f"ogpstream.{folder}": folder for folder in FOLDERS}
    # a folder below is found through its parent's mapping, but it must be listed
    below = {f"ogpstream.{path.parent.relative_to(ROOT).as_posix().replace('/', '.')}"
             for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")}
    assert set(setuptools["packages"]) == below >= set(setuptools["package-dir"])
    assert "ogpstream.profiling.baselines" in below


@pytest.mark.parametrize("folder", sorted(FOLDERS))
def test_type_checkers_and_uninstalled_runs_find_the_folder(folder):
    link = ROOT / ".typing" / "ogpstream" / folder
    assert link.is_symlink() and os.readlink(link) == f"../../{folder}"
    assert (ROOT / folder / "py.typed").is_file()


def test_version_is_not_taken_for_hugging_faces_kernels():
    assert not PROJECT["project"]["version"].startswith("0.18.")


def test_declared_faces():
    project = PROJECT["project"]
    assert project["name"] == "ogp-lora-stream"
    assert project["scripts"] == {"ogpstream": "ogpstream.learner.cli:main"}
    assert project["entry-points"]["ogpstream.commands"] == {
        name: f"ogpstream.profiling.{name}:register" for name in ("demo", "bench")
    }


def test_base_dependencies_and_tested_versions_agree():
    names = {line.split(";")[0].split(">")[0] for line in PROJECT["project"]["dependencies"]}
    assert names >= {"torch", "triton", "transformers", "peft", "safetensors", "numpy"}
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert names <= set(pins)
    assert (pins["torch"], pins["triton"]) == ("2.13.0", "3.7.1")


def test_transformers_and_the_learner_load_from_the_repository_root():
    # `python -c` puts the working directory in front of sys.path, like `python -m` in a user's checkout
    code = (
        "import transformers.integrations.hub_kernels, transformers.models.llama.modeling_llama\n"
        "import ogpstream.kernels.dispatch, ogpstream.learner, sys\n"
        "assert 'kernels.dispatch' not in sys.modules\n"
        "print(ogpstream.kernels.dispatch.__file__)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT / ".typing")}
    environment.pop("PYTHONSAFEPATH", None)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).resolve() == ROOT / "kernels" / "dispatch.py"
