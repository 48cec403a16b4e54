import json

from ogpstream.profiling import row_store
from ogpstream.profiling.row_store import RowStore, code_digest, settings_digest


def test_rows_of_an_earlier_process_are_found(tmp_path):
    first = RowStore(tmp_path)
    first.add({"settings": "a", "acc": 0.5})
    first.add({"settings": "b", "acc": None})
    again = RowStore(tmp_path)
    assert again.find("a") == {"settings": "a", "acc": 0.5, "code": code_digest()} and again.find("c") is None
    assert [row["settings"] for row in again.rows()] == ["a", "b"]


def test_rows_that_other_code_has_made_are_told(tmp_path, monkeypatch):
    store = RowStore(tmp_path)
    store.add({"settings": "a"})
    assert store.found(["b"]) is None and store.found(["a", "b"]) == "1 of 2 rows are there already"
    monkeypatch.setattr("ogpstream.profiling.row_store.code_digest", lambda: "0" * 12)
    store.add({"settings": "b"})
    assert str(RowStore(tmp_path).found(["a", "b"])).startswith("2 of 2 rows are there already, 1 of them by another")
    # rows of before they had any
    with store.path.open("a") as file:
        file.write('{"settings": "c"}\n')
    assert "2 of them by another version" in str(RowStore(tmp_path).found(["a", "b", "c"]))


def test_the_code_is_the_source_of_the_package(tmp_path, monkeypatch):
    for part in ("kernels", "learner", "memory", "profiling"):
        (tmp_path / part / "in").mkdir(parents=True)
        (tmp_path / part / "in" / "a.py").write_text("x = 1")
    monkeypatch.setattr(row_store, "__file__", str(tmp_path / "profiling" / "row_store.py"))
    first = row_store.code_digest.__wrapped__()
    (tmp_path / "learner" / "README.md").write_text("no source")
    assert row_store.code_digest.__wrapped__() == first != code_digest()
    (tmp_path / "learner" / "in" / "a.py").write_text("x = 2")
    assert row_store.code_digest.__wrapped__() != first


def test_half_a_line_is_no_row_and_harms_none(tmp_path):
    store = RowStore(tmp_path)
    store.add({"settings": "a", "acc": 0.5})
    store.add({"settings": "b", "acc": 0.25})
    written = store.path.read_bytes()
    # every place where a kill can stop the writing of the second line
    start = written.index(b"\n") + 1
    for end in range(start, len(written) - 1):
        store.path.write_bytes(written[:end])
        torn = RowStore(tmp_path)
        assert torn.find("a") is not None and torn.find("b") is None
        torn.add({"settings": "c", "acc": 1.0})
        assert {row["settings"] for row in RowStore(tmp_path).rows()} == {"a", "c"}


def test_without_a_folder_rows_are_in_memory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store = RowStore(None)
    store.add({"settings": "a"})
    assert store.find("a") == {"settings": "a", "code": code_digest()} and not list(tmp_path.iterdir())


def test_settings_are_told_apart_whatever_their_order():
    assert settings_digest({"a": 1, "b": [2]}) == settings_digest(json.loads('{"b": [2], "a": 1}'))
    assert settings_digest({"a": 1, "b": [2]}) != settings_digest({"a": 1, "b": [3]})
