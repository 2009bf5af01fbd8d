"""The quickstart: its data anywhere, and the whole of it where its model is at hand."""

from pathlib import Path

import pytest

from train import docstrings, quickstart

MODEL = Path(__file__).parents[2] / ".cache" / "minilm"


def test_docstrings_are_many_and_distinct() -> None:
    texts = docstrings.collect()
    assert len(texts) == docstrings.MODULES >= 16
    assert all(40 <= len(of_module) <= docstrings.MOST for of_module in texts.values())
    everything = [text for of_module in texts.values() for text in of_module]
    assert len(set(everything)) == len(everything) > 1500


@pytest.mark.slow
@pytest.mark.skipif(not MODEL.is_dir(), reason=f"{MODEL} is missing: `make quickstart` fetches it")
def test_the_whole_way_on_a_few_examples(tmp_path, capsys) -> None:
    settings = {
        "model.name": MODEL,
        "data.buckets": [64],
        "data.max_train_examples": 64,
        "data.max_eval_examples": 64,
        "optim.epochs": 1,
        "run.output": tmp_path / "run",
    }
    arguments = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
    assert quickstart.main(arguments) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "times fewer than LoRA r=8" in out
    assert "logits within" in out
