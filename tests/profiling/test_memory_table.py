"""`docs/memory.md` says what the code does."""

from pathlib import Path

import pytest

from ogpstream.profiling import memory_table
from ogpstream.profiling.memory_table import LINEARS, MODELS, Linear, fill, linear_row, model_row

PAGE = (Path(__file__).parents[2] / "docs" / "memory.md").read_text()


@pytest.mark.parametrize("linear", LINEARS, ids=str)
def test_the_row_of_a_linear(linear: Linear) -> None:
    assert linear_row(linear) in PAGE.splitlines()


@pytest.mark.parametrize("name", [name for name in MODELS if "22 layers" in name or "default" in name])
def test_the_row_of_a_model(name: str) -> None:
    assert model_row(name) in PAGE.splitlines()


def test_the_formula_of_the_page() -> None:
    """S + P + C and 4 m of one layer, for a square linear with Adam; 1 % for flags and numbers."""
    for width, rank in ((2048, 8), (2048, 16), (4096, 8)):
        row = linear_row(Linear(width, width, rank, 256)).split("|")
        found = int(row[6].replace(",", ""))
        assert found == pytest.approx(16 * rank * 2 * width + 2**20 + 4 * rank * width + 4 * 256, rel=1e-2)


def test_filling_a_page(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_table, "tables", lambda: [("a", ["| 1 |"]), ("b", ["| 2 |", "| 3 |"])])
    page = "x\n<!-- begin a -->\nold\n<!-- end a -->\ny\n<!-- begin b -->\n<!-- end b -->\nz\n"
    once = fill(page)
    assert once == ("x\n<!-- begin a -->\n\n| 1 |\n\n<!-- end a -->\ny\n"
                    "<!-- begin b -->\n\n| 2 |\n| 3 |\n\n<!-- end b -->\nz\n")
    assert fill(once) == once
    with pytest.raises(ValueError, match="no place for the table 'b'"):
        fill(page.replace("begin b", "begin c"))
