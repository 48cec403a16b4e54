import pytest

from ogpstream.learner import ConfigError, LearnerConfig
from ogpstream.profiling.forgetting_row import Job
from ogpstream.profiling.rates import Rate, candidates, read_rates, winners, write_rates


def _rows(method, *tried):
    return [{"method": method, "lr": lr, "lr_ratio": ratio, "strength": strength, "acc": acc}
            for lr, ratio, strength, acc in tried]


def test_the_highest_mean_over_the_seeds_wins():
    rows = _rows("ewc", (1e-3, 1.0, 1.0, 0.9), (1e-3, 2.0, 1.0, 0.6), (1e-3, 1.0, 1.0, 0.1), (1e-3, 2.0, 1.0, 0.6),
                 (5e-4, 1.0, 2.0, None))
    found = winners(rows)["ewc"]
    assert (found["lr"], found["lr_ratio"], found["strength"]) == (1e-3, 2.0, 1.0)
    assert (found["acc"], found["seeds"]) == (pytest.approx(0.6), 2)
    assert [(one["lr"], one["lr_ratio"], one["acc"]) for one in found["tried"]] == [
        (1e-3, 1.0, 0.5), (1e-3, 2.0, 0.6), (5e-4, 1.0, 0.0)]
    # of equal ones the first in the grid
    assert winners(_rows("si", (1e-3, 1.0, 1.0, 0.5), (2e-3, 1.0, 1.0, 0.5)))["si"]["lr"] == 1e-3


def test_a_file_of_rates_is_written_added_to_and_read(tmp_path):
    path = tmp_path / "rates.json"
    write_rates(path, "s", _rows("ewc", (1e-3, 2.0, 10.0, 0.5)))
    write_rates(path, "t", _rows("agem", (5e-4, 1.0, None, 0.5)))
    assert read_rates(path) == {"ewc": Rate(1e-3, 10.0, "s", 2.0), "agem": Rate(5e-4, None, "t", 1.0)}


@pytest.mark.parametrize("text,told", [("{", "no file of rates"), ('{"ewx": {}}', "rates of ewx"),
                                       ("[]", "no JSON object"), ('{"ewc": {"lr": 1}}', "strength"),
                                       (None, "cannot be read")])
def test_a_wrong_file_of_rates_is_told(tmp_path, text, told):
    if text is not None:
        (tmp_path / "rates.json").write_text(text)
    with pytest.raises(ConfigError, match=f"{told}.*--find-rates|{told}.*methods are"):
        read_rates(tmp_path / "rates.json")


def test_every_setting_of_a_grid_is_a_row_of_its_own():
    job = Job("ewc", "m", None, "demo", LearnerConfig().to_dict())
    tried = candidates(job)
    settings = {(one.lr, one.config["loraplus_lr_ratio"], one.strength) for one in tried}
    assert len(settings) == len({one.settings for one in tried}) == 24
    assert candidates(Job("ogp", "m", None, "demo", LearnerConfig().to_dict())) == []
