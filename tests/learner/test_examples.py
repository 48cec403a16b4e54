"""The examples of learner/README.md, run as they are printed."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers as tf

from ogpstream.learner import LearnerConfig, StreamLearner

README = Path(__file__).parents[2] / "learner" / "README.md"
EXAMPLES = re.findall(r"^## (.+?)\n.*?^```python\n(.+?)^```", README.read_text(encoding="utf-8"), re.M | re.S)


def test_there_are_three_of_about_twenty_lines() -> None:
    assert len(EXAMPLES) == 3
    assert all(code.count("\n") <= 27 for _, code in EXAMPLES)


@pytest.mark.parametrize("code", [code for _, code in EXAMPLES], ids=[title for title, _ in EXAMPLES])
def test_example_learns_a_correction_beside_its_server(
    tiny_model: Callable[..., tf.PreTrainedModel], tiny_tokenizer: Any, tmp_path: Path, code: str
) -> None:
    config = LearnerConfig(rank=2, target_modules=("q_proj",), warm_start=False, ring_samples=8)
    names: dict[str, Any] = dict(model=tiny_model(num_hidden_layers=1), tokenizer=tiny_tokenizer, config=config,
                                 state=tmp_path / "state", prompt="2 + 2 =", completion=" 4")
    exec(compile(code, str(README), "exec"), names)
    assert names["report"].status == "learned" and names["report"].version > names["version"]
    assert isinstance(names["answer"], str) and names["answer"]
    again = StreamLearner.load_state(tmp_path / "state", tiny_model(num_hidden_layers=1), tiny_tokenizer)
    assert again.state.counters.learned == 1
    again.close()
