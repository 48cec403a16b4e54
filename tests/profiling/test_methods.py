from dataclasses import replace

from ogpstream.learner import LearnerConfig
from ogpstream.profiling.methods import METHODS, OURS, method_config

EQUAL = LearnerConfig(ring_samples=7, seed=3, rank=4)


def test_ours_differ_from_the_defaults_by_what_their_name_says():
    assert method_config("ogp", EQUAL) == EQUAL
    assert method_config("ogp-named", EQUAL) == replace(EQUAL, routing="named")
    assert method_config("ogp-uncut", EQUAL) == replace(EQUAL, held_rank=None)
    assert method_config("ogp-shared", EQUAL) == replace(EQUAL, basis_scope="shared")
    # as the specification has it, with what was set for all methods
    assert method_config("ogp-literal", EQUAL) == LearnerConfig.literal(ring_samples=7, seed=3, rank=4)


def test_every_other_method_is_plain_lora_at_its_own_rate():
    for method in METHODS[len(OURS):]:
        config = method_config(method, EQUAL, lr=3e-4)
        assert config.guard == "none" and not config.warm_start
        assert config.lr == 3e-4 and config.loraplus_lr_ratio == EQUAL.loraplus_lr_ratio == 2.0
        assert (config.ring_samples, config.rank, config.seed) == (7, 4, 3)
        assert config.rehearsals == (0 if method == "sequential" else EQUAL.rehearsals)
