"""Settings: what is refused, the schedule of the rate, and the way to JSON and back."""

import json
import math
from typing import Any

import pytest

from ogpstream.learner import ConfigError, LearnerConfig


@pytest.mark.parametrize(
    "changes",
    [
        {"rank": 0}, {"alpha": 0.0}, {"max_active": 0}, {"lr": 0.0}, {"lr": math.nan}, {"basis_columns": 0},
        {"max_tokens": 1}, {"weight_decay": -0.1}, {"warmup": -1}, {"replay_every": -1}, {"rehearsals": -1},
        {"novelty": 1.5}, {"warm_share": -0.1}, {"warm_energy": math.nan}, {"held_rank": 0}, {"optimizer": "lion"},
        {"guard": "ewc"}, {"basis_scope": "model"}, {"ring_keep": "all"},
        {"warmup": 10, "total_updates": 10}, {"novelty": 1.0}, {"use_window": 15}, {"basis_columns": 600},
        {"rank": 3.0}, {"lr": math.inf}, {"weight_decay": math.nan}, {"eps": -1.0}, {"seed": -1},
        {"restart_after": -1}, {"restart_loss": 2.0}, {"shared_tokens": -1},
        {"loraplus_lr_ratio": 0.0}, {"loraplus_lr_ratio": math.inf}, {"seed": 2**63},
        # a state of these could not be loaded
        {"repeats": 2.0}, {"snapshot_every": 1e2}, {"warm_start": 1}, {"append_eos": 1}, {"rehearsals": 1.5},
        {"betas": (0.9,)}, {"held_rank": 1.5}, {"lr": "1"}, {"lr": True}, {"target_modules": ("q_proj", 1)},
    ],
    ids=str,
)
def test_a_value_out_of_range_is_named(changes: dict[str, Any]) -> None:
    name = "total_updates" if "total_updates" in changes else next(iter(changes))
    with pytest.raises(ConfigError, match=f"^{name} is "):
        LearnerConfig(**changes)


def test_betas_are_shares() -> None:
    with pytest.raises(ConfigError, match=r"^betas are \(1\.0, 0\.99\)"):
        LearnerConfig(betas=(1.0, 0.99))


def test_the_limits_themselves_are_accepted() -> None:
    LearnerConfig(rank=1, max_tokens=2, replay_every=0, rehearsals=0, held_rank=1, novelty=0.0, warm_share=1.0)
    LearnerConfig(held_rank=None, warmup=9, total_updates=10)
    assert LearnerConfig(target_modules=["q_proj"]) == LearnerConfig(target_modules=("q_proj",))  # type: ignore


@pytest.mark.parametrize(
    "config",
    [LearnerConfig(), LearnerConfig.literal(), LearnerConfig(target_modules=("q_proj",), betas=(0.5, 0.6), seed=3)],
    ids=["default", "literal", "other"],
)
def test_json_and_back(config: LearnerConfig) -> None:
    assert LearnerConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_an_unknown_setting_is_named_with_those_known() -> None:
    with pytest.raises(ConfigError, match=r"unknown setting learning_rates; known are .*\blr\b"):
        LearnerConfig.from_dict({"learning_rates": 1.0})


def test_the_rate_warms_up_and_stays() -> None:
    config = LearnerConfig(lr=0.5, warmup=4)
    assert [config.learning_rate(update) for update in range(4)] == pytest.approx([0.1, 0.2, 0.3, 0.4])
    assert {config.learning_rate(update) for update in (4, 5, 1000, 10**9)} == {0.5}
    assert LearnerConfig(lr=0.5).learning_rate(0) == 0.5


def test_with_a_known_end_the_rate_falls_as_a_cosine() -> None:
    config = LearnerConfig(lr=0.5, warmup=10, total_updates=110)
    rates = [config.learning_rate(update) for update in range(120)]
    assert rates[:10] == pytest.approx([0.5 * (n + 1) / 11 for n in range(10)])
    assert rates[10] == 0.5
    for done in (0.25, 0.5, 0.75):
        assert rates[10 + int(100 * done)] == pytest.approx(0.25 * (1 + math.cos(math.pi * done)))
    assert all(later < earlier for earlier, later in zip(rates[10:110], rates[11:111], strict=True))
    # a stream that goes on after its announced end learns nothing more
    assert max(rates[110:]) == pytest.approx(0.0, abs=1e-15)


def test_the_scaling_and_the_specifications_own_values() -> None:
    assert LearnerConfig(rank=4, alpha=10.0).scaling == 2.5
    literal = LearnerConfig.literal()
    assert (literal.rank, literal.basis_columns, literal.ring_samples, literal.novelty) == (8, 256, 4096, 0.5)
    assert (literal.directions_per_sample, literal.warm_start, literal.rehearsals) == (1, False, 0)
    assert (literal.optimizer, literal.lr, literal.loraplus_lr_ratio) == ("sgd", 1e-4, 1.0)
    assert LearnerConfig.literal(lr=0.1).lr == 0.1
