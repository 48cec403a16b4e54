import json

from ogpstream.profiling.row_store import RowStore, settings_digest


def test_rows_of_an_earlier_process_are_found(tmp_path):
    first = RowStore(tmp_path)
    first.add({"settings": "a", "acc": 0.5})
    first.add({"settings": "b", "acc": None})
    again = RowStore(tmp_path)
    assert again.find("a") == {"settings": "a", "acc": 0.5} and again.find("c") is None
    assert [row["settings"] for row in again.rows()] == ["a", "b"]


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
    assert store.find("a") == {"settings": "a"} and not list(tmp_path.iterdir())


def test_settings_are_told_apart_whatever_their_order():
    assert settings_digest({"a": 1, "b": [2]}) == settings_digest(json.loads('{"b": [2], "a": 1}'))
    assert settings_digest({"a": 1, "b": [2]}) != settings_digest({"a": 1, "b": [3]})
