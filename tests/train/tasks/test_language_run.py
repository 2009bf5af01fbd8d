"""Whole runs of a tiny random Llama on texts and answers."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from transformers import BloomConfig, FlaxBloomForCausalLM

import circflax as cf
from tests.train.tasks.language import make_tokenizer, write_llama
from train import settings, trainer
from train.__main__ import main
from train.run import run


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return write_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    pairs = [tuple(map(int, rng.integers(0, 50, 2))) for _ in range(80)]
    records = [{"question": f"{a}+{b}", "answer": str(a + b)} for a, b in pairs]
    chats = [
        {
            "messages": [
                {"role": "user", "content": record["question"]},
                {"role": "assistant", "content": record["answer"]},
            ]
        }
        for record in records
    ]
    (directory / "sums.json").write_text(json.dumps(records))
    (directory / "chats.jsonl").write_text("\n".join(map(json.dumps, chats)))
    (directory / "text.txt").write_text("the cat sat on the mat and " * 60)
    (directory / "old.txt").write_text("0123456789" * 10)
    return directory


@pytest.fixture
def arguments(llama, data, tmp_path) -> list[str]:
    """Command-line arguments of a short run; later ones win."""
    given = {
        "model.name": llama,
        "language.root": data,
        "language.max_length": 48,
        "adapter.targets": ["q_proj", "v_proj"],
        "optim.epochs": 2,
        "optim.batch_size": 8,
        "optim.eval_batch_size": 8,
        "run.output": tmp_path / "run",
    }
    return [part for name, value in given.items() for part in (f"--{name}", str(value))]


SUMS = [
    *("--language.train", "sums.json", "--language.format", "gsm8k"),
    *("--language.prompt", "{question}="),
]


def records_of(directory: Path, split: str) -> list[dict]:
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["split"] == split]


def finished(directory: Path) -> tuple[str, bytes]:
    """What two equal runs agree on to the last bit: the metrics and the adapters."""
    adapter = (directory / "adapter" / "adapter_model.safetensors").read_bytes()
    return (directory / "metrics.jsonl").read_text(), adapter


def test_a_text_is_learnt_and_compared_with_another(arguments, tmp_path) -> None:
    more = ["--language.train", "text.txt", "--language.others", "{digits: old.txt}"]
    summary = run(settings.load([*arguments, *more, "--optim.epochs", "6"]))
    assert set(summary.validation) == {"perplexity", "token_accuracy"}
    assert summary.metric == "perplexity"
    perplexities = [r["perplexity"] for r in records_of(tmp_path / "run", "validation")]
    assert len(perplexities) == 6
    assert perplexities[summary.best_epoch - 1] == min(perplexities)
    before, after = summary.compared["validation"]
    assert after == summary.validation
    assert after["perplexity"] < 0.8 * before["perplexity"]
    assert set(summary.compared) == {"validation", "digits"}
    report = (tmp_path / "run" / "report.md").read_text()
    before, after = summary.compared["digits"]
    line = f"{after['perplexity']:.4f} ({before['perplexity']:.4f} before the training)"
    assert f"| digits perplexity | {line} |" in report
    assert "the last 162 of 1,620 characters of the training text held out" in report


def test_answers_in_packed_rows_with_accumulation(arguments, tmp_path) -> None:
    results = []
    for parts in ("1", "4"):
        output = tmp_path / parts
        more = [*SUMS, "--optim.accumulation_steps", parts, "--run.output", str(output)]
        summary = run(settings.load([*arguments, *more, "--optim.epochs", "3"]))
        losses = [record["loss"] for record in records_of(output, "train")]
        assert np.mean(losses[-3:]) < np.mean(losses[:3])
        results.append(losses)
    np.testing.assert_allclose(results[0], results[1], rtol=1e-4)
    assert "train: 72 examples in 16 rows of 48 tokens" in "".join(summary.notes)


@pytest.mark.slow
def test_rows_that_are_not_packed_come_to_the_same_perplexity(arguments, tmp_path) -> None:
    compared = []
    for packing in ("true", "false"):
        more = ["--language.packing", packing, "--run.output", str(tmp_path / packing)]
        summary = run(settings.load([*arguments, *SUMS, *more, "--optim.epochs", "1"]))
        compared.append(summary.compared["validation"][0])
    assert compared[0] == pytest.approx(compared[1], rel=1e-5)


def test_a_base_in_bfloat16_trains_in_float32_and_is_exported(arguments, llama, tmp_path) -> None:
    more = ["--model.param_dtype", "bfloat16", "--adapter.train", "[norm]"]
    chat = ["--language.train", "chats.jsonl", "--language.format", "chat"]
    config = settings.load([*arguments, *more, *chat, "--optim.learning_rate", "0.5"])
    summary = run(config)
    before, after = summary.compared["validation"]
    assert after["perplexity"] < before["perplexity"]
    file = cf.load_adapters(tmp_path / "run" / "adapter")
    assert file.plan.trained == (("model", "norm", "weight"),)
    assert {leaf.dtype for leaf in jax.tree.leaves(file.adapters)} == {np.dtype(np.float32)}

    adapted = cf.interop.load_adapted(tmp_path / "run")
    cf.interop.export_adapted(tmp_path / "run", tmp_path / "merged")
    model, params, _ = cf.interop.load_model(tmp_path / "merged", "causal-lm")
    ids = np.arange(20)[None]
    merged = model(ids, params=params).logits
    ours = cf.linen.attach(adapted.model, file.plan)
    expected = ours(ids, params=cf.combine(adapted.params, file.adapters)).logits
    np.testing.assert_allclose(merged, expected, rtol=1e-4, atol=1e-4)


def test_a_run_that_was_stopped_goes_on_with_the_next_examples(
    arguments, tmp_path, monkeypatch
) -> None:
    # Two updates an epoch: the run stops in the middle of the second.
    arguments = [*arguments, *SUMS, "--run.checkpoint_every", "1"]
    whole = tmp_path / "whole"
    assert main([*arguments, "--run.output", str(whole)]) == 0
    made = trainer.make_train_step

    def failing(*args):
        step = made(*args)

        def wrapped(state, *rest):
            if int(state.step) == 3:
                raise KeyboardInterrupt
            return step(state, *rest)

        return wrapped

    monkeypatch.setattr(trainer, "make_train_step", failing)
    assert main(arguments) == 130
    assert len(records_of(tmp_path / "run", "train")) == 3
    monkeypatch.undo()
    assert main(arguments) == 0
    assert finished(tmp_path / "run") == finished(whole)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--language.max_length", "65"], "65 exceeds the 64 positions of the model"),
        (["--run.metric", "accuracy"], "it can be perplexity, token_accuracy"),
        (["--language.prompt", "{sum}"], "line 1: no column `sum`; there are question, answer"),
        (["--language.train", "missing.json"], "missing.json"),
        (["--language.max_length", "4"], "no example is left to use"),
        (["--adapter.targets", "[query]"], "q_proj"),
    ],
)
def test_bad_input_is_one_sentence(more, message, arguments, tmp_path, capsys) -> None:
    assert main([*arguments, *SUMS, *more]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and error.startswith("error: ")
    assert not (tmp_path / "run").exists()


def test_a_model_that_cannot_keep_examples_apart_is_refused_before_the_run(
    arguments, tmp_path, capsys
) -> None:
    tokenizer = make_tokenizer()
    config = BloomConfig(len(tokenizer), hidden_size=16, n_layer=1, n_head=2)
    FlaxBloomForCausalLM(config).save_pretrained(tmp_path / "bloom")
    tokenizer.save_pretrained(tmp_path / "bloom")
    more = ["--model.name", str(tmp_path / "bloom"), "--adapter.targets", "[query_key_value]"]
    assert main([*arguments, *SUMS, *more]) == 2
    error = capsys.readouterr().err
    assert "no attention that holds a causal mask" in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()
    # With one example a row there is nothing to keep apart.
    assert main([*arguments, *SUMS, *more, "--language.packing", "false"]) == 0


def test_a_vocabulary_that_the_model_lacks(arguments, tmp_path, capsys) -> None:
    small = write_llama(tmp_path / "small", vocab_size=200)
    assert main([*arguments, *SUMS, "--model.name", str(small)]) == 2
    message = "the tokenizer has 258 tokens, but the model's `vocab_size` is 200"
    assert message in capsys.readouterr().err
