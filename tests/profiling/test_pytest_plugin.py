"""The shipped plugin, as another project's tests use it: a folder of their own, a process of its own."""

import os
import subprocess
import sys
import tomllib
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from ogpstream.profiling.byte_size import parse_bytes

ROOT = Path(__file__).parents[2]
README = (ROOT / "profiling" / "README.md").read_text()
EXAMPLE = next(part.split("```")[0] for part in README.split("```python\n")[1:] if "vram_budget" in part)

PLANTED = """
@pytest.fixture(autouse=True)
def planted(monkeypatch):
    import torch
    from ogpstream.learner.proposal import Proposer

    build = Proposer.__init__

    def fat(self, *given):
        build(self, *given)
        self.buffer = torch.zeros(2**18, device=self.staging.device)

    monkeypatch.setattr(Proposer, "__init__", fat)
"""

# as a user has it: this project's own tests run kernels in the interpreter
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
ENVIRONMENT["PYTHONPATH"] = str(ROOT / ".typing")


def _run(folder: Path, source: str) -> tuple[int, str]:
    (folder / "test_theirs.py").write_text(source)
    # where the package is not installed, its entry point is not either
    plugin = [] if entry_points(group="pytest11", name="ogpstream") else ["-p", "ogpstream.profiling.pytest_plugin"]
    run = subprocess.run([sys.executable, "-m", "pytest", "-q", "--strict-markers", "-p", "no:cacheprovider", *plugin],
                         cwd=folder, env=ENVIRONMENT, text=True,
                         capture_output=True, timeout=300)
    return run.returncode, run.stdout + run.stderr


def _small(source: str) -> str:
    """The documented example with two layers, whose state is the same to a kilobyte."""
    assert "num_hidden_layers=32" in source
    return source.replace("num_hidden_layers=32", "num_hidden_layers=2")


@pytest.mark.parametrize("name", ["learning_state", "activations", "serving_copy", "scope", "total"])
def test_every_budget_is_held(tmp_path: Path, name: str) -> None:
    status, output = _run(tmp_path, _small(EXAMPLE).replace('learning_state="2.32MB", activations="256MiB"',
                                                            f'{name}="1kB"'))
    assert status == 1 and f"{name} " in output and "over 1,000" in output, output


def test_the_documented_example_holds(tmp_path: Path) -> None:
    status, output = _run(tmp_path, _small(EXAMPLE))
    assert status == 0, output
    assert "1 passed" in output


def test_a_planted_mebibyte_fails_it(tmp_path: Path) -> None:
    status, output = _run(tmp_path, _small(EXAMPLE) + PLANTED)
    assert status == 1 and "1 failed" in output
    assert "over the VRAM budget on a simulated device: learning_state 2," in output and "over 2,320,000" in output
    # one line, not a trace through the plugin
    assert "pytest_plugin.py" not in output


@pytest.mark.parametrize(("change", "message"), [
    (("update(", "measured.append("), "1 passed"),
    (('"2.32MB"', '"2.32 megs"'), "'2.32 megs' is no size: write a number and one of B, kB, MB"),
    (("learning_state=", "learning_stat="), "needs the marker vram_budget with some of learning_state, activations"),
    (("(vram_budget)", "()"), "measures nothing by itself: take the fixture"),
    (("    vram_budget.update(", "    dict(setup="), "nothing was measured: call vram_budget.update"),
], ids=["control", "size", "name", "no fixture", "no measurement"])
def test_wrong_use_is_one_line(tmp_path: Path, change: tuple[str, str], message: str) -> None:
    source = """import pytest

@pytest.mark.vram_budget(learning_state="2.32MB")
def test_theirs(vram_budget):
    vram_budget.update(None)
"""
    assert change[0] in source
    status, output = _run(tmp_path, source.replace(*change))
    assert (status == 0) == (message == "1 passed"), output
    assert message in output
    assert "Traceback" not in output and "pytest_plugin.py" not in output


@pytest.mark.parametrize(("text", "expected"), [
    ("2.32MB", 2_320_000), ("256MiB", 2**28), ("1 GiB", 2**30), ("17B", 17), ("1.5kB", 1500), ("0KiB", 0), (12, 12),
])
def test_sizes(text: str | int, expected: int) -> None:
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "12", "MB", "-1MB", "1e3MB", "1mb", "1MB ", -1, 1.5, True, None])
def test_no_sizes(text: str) -> None:
    with pytest.raises(ValueError, match="is no size: write a number"):
        parse_bytes(text)


def test_pytest_finds_it() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    module = import_module(project["entry-points"]["pytest11"]["ogpstream"])
    assert module.VramBudget is not None
    # every pytest session of an environment imports it
    loaded = subprocess.run(
        [sys.executable, "-c", "import sys, ogpstream.profiling.pytest_plugin; print('torch' in sys.modules)"],
        env=ENVIRONMENT, text=True, capture_output=True, check=True)
    assert loaded.stdout.strip() == "False"
