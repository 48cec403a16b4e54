"""VRAM budgets as tests: pytest loads this plugin where the package is installed.

A marker gives the budgets, the fixture measures updates of a full-size model against them: on a CUDA device by its
allocator, and without one on a device that is not there, in seconds and without weights.

    @pytest.mark.vram_budget(learning_state="2.32MB", activations="256MiB")
    def test_our_setup(vram_budget):
        vram_budget.update(transformers.LlamaConfig(...), LearnerConfig(...), tokens=1024, rows=512)
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from ogpstream.profiling.byte_size import parse_bytes

# what every pytest session of an environment would wait for is imported when the fixture is used
if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from ogpstream.learner import LearnerConfig
    from ogpstream.profiling.vram import Usage

MARKER = "vram_budget"
NAMES = ("learning_state", "activations", "serving_copy", "scope", "total")


class VramBudget:
    """Measures updates and fails the test where one is over a budget.

    Args:
        limits: bytes by the name of a field of `Usage`.
    """

    def __init__(self, limits: dict[str, int]) -> None:
        self.limits = limits
        self.measured: list[Usage] = []

    def update(self, architecture: PretrainedConfig, config: LearnerConfig, *, tokens: int = 1024, rows: int = 512,
               experts: int = 2, dtype: str = "bfloat16") -> Usage:
        """The bytes of updates of a model of this architecture with random weights.

        Args:
            tokens: ids of the sample, rows: supervised ones of them.
            experts: that exist, of which `config.max_active` are served.
            dtype: of the model.
        """
        from ogpstream.profiling.vram import measure_update

        usage = measure_update(architecture, config, tokens=tokens, rows=rows, experts=experts, dtype=dtype)
        self.measured.append(usage)
        over = [f"{name} {getattr(usage, name):,} bytes, {getattr(usage, name) - limit:,} over {limit:,}"
                for name, limit in self.limits.items() if getattr(usage, name) > limit]
        if over:
            where = "a simulated device" if usage.device == "fake" else usage.device
            pytest.fail(f"over the VRAM budget on {where}: {'; '.join(over)}", pytrace=False)
        return usage


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", f"{MARKER}({', '.join(f'{name}=size' for name in NAMES)}): most bytes on the "
                                       "device that updates measured by the fixture of this name may take")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker(MARKER) is not None and MARKER not in getattr(item, "fixturenames", ()):
        pytest.fail(f"the marker {MARKER} measures nothing by itself: take the fixture {MARKER} and call its update",
                    pytrace=False)


@pytest.fixture
def vram_budget(request: pytest.FixtureRequest) -> Iterator[VramBudget]:
    """Measures updates against the budgets of the marker of the same name."""
    marker = request.node.get_closest_marker(MARKER)
    if marker is None or marker.args or not marker.kwargs or not set(marker.kwargs) <= set(NAMES):
        pytest.fail(f"the fixture {MARKER} needs the marker {MARKER} with some of {', '.join(NAMES)}, such as "
                    f"@pytest.mark.{MARKER}(learning_state='2.32MB')", pytrace=False)
    try:
        budget = VramBudget({name: parse_bytes(size) for name, size in marker.kwargs.items()})
    except ValueError as error:
        pytest.fail(str(error), pytrace=False)
    yield budget
    if not budget.measured:
        pytest.fail(f"nothing was measured: call {MARKER}.update", pytrace=False)
