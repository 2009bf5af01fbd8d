"""Whole runs of the application on a tiny model."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import optax
import pytest

import circflax as cf
from train import settings, steps, trainer
from train.__main__ import main
from train.checkpoints import Checkpoints, Progress
from train.config import OptimConfig
from train.failures import TrainingError
from train.optimizer import make_optimizer, make_rates, make_schedule
from train.parts import learning_rate
from train.run import run
from train.steps import TrainState
from train.tasks import classification

# What a run does otherwise for one than for another, with hyperparameters that fit layers of 16 by
# 16: frozen arrays, changed inputs and kernels, arrays that train for a while, leaves alone.
METHODS = {
    "cdvft": {},
    "vera": {},
    "ia3": {},
    "boft": {},
    "lamda++": {"r": 3},
    "full": {},
    "bitfit": {},
    "none": {},
}


def flat(tree) -> dict[str, np.ndarray]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def finished(directory: Path) -> tuple[str, bytes]:
    """What two equal runs agree on to the last bit: the metrics and the adapters."""
    metrics = (directory / "metrics.jsonl").read_text()
    return metrics, (directory / "adapter" / "adapter_model.safetensors").read_bytes()


def start(arguments: list[str]) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    return subprocess.Popen(
        [sys.executable, "-m", "train", *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("method", METHODS)
def test_a_run_leaves_a_report_metrics_and_its_adapter(method, arguments, tmp_path) -> None:
    hyperparameters = json.dumps(METHODS[method])
    adapter = ["--adapter.method", method, "--adapter.hyperparameters", hyperparameters]
    summary = run(settings.load([*arguments, *adapter]))
    directory = tmp_path / "run"
    assert set(summary.test) == {"accuracy", "f1", "matthews"}
    assert (directory / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert f"{method} on" in (directory / "report.md").read_text()
    assert list((directory / "tensorboard").iterdir())
    records = [json.loads(line) for line in (directory / "metrics.jsonl").open()]
    assert [r["step"] for r in records if r["split"] == "train"] == list(range(1, 13))
    validation = [r["accuracy"] for r in records if r["split"] == "validation"]
    assert max(validation) == summary.validation["accuracy"]
    assert validation[summary.best_epoch - 1] == max(validation)
    file = cf.load_adapters(directory / "adapter")
    name = method.removesuffix("++")
    assert {t.method.name for t in file.plan.targets} == ({name} & set(cf.methods.METHODS))
    assert ("classifier", "kernel") in file.plan.trained
    biases = [path for path in file.plan.trained if path[-1] == "bias"]
    assert (len(biases) > 1) == (method in ("bitfit", "full"))


def test_it_learns(arguments) -> None:
    more = ["--adapter.method", "full", "--optim.learning_rate", "0.01", "--optim.epochs", "8"]
    summary = run(settings.load([*arguments, *more]))
    assert summary.test["accuracy"] > 0.8


def test_equal_seeds_give_equal_runs_and_others_do_not(arguments, tmp_path) -> None:
    results = []
    for name, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        run(settings.load([*arguments, "--run.output", str(tmp_path / name), "--run.seed", seed]))
        results.append(finished(tmp_path / name))
    assert results[0] == results[1]
    assert results[0] != results[2]


@pytest.mark.slow
def test_a_killed_run_resumes_and_ends_with_the_same_numbers(arguments, tmp_path, capsys) -> None:
    arguments = [*arguments, "--run.checkpoint_every", "2"]
    whole = tmp_path / "whole"
    assert main([*arguments, "--run.output", str(whole)]) == 0
    metrics = tmp_path / "run" / "metrics.jsonl"
    # In the first epoch, and then in the second.
    for stop in (3, 9):
        process = start(arguments)
        while process.poll() is None:
            if metrics.exists() and metrics.read_text().count("\n") >= stop:
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.005)
        process.wait()
        assert process.returncode == -signal.SIGKILL
    capsys.readouterr()
    assert main(arguments) == 0
    assert "resumed from step" in capsys.readouterr().out
    assert finished(tmp_path / "run") == finished(whole)


def test_a_finished_run_is_reported_again_without_training(arguments, tmp_path, capsys) -> None:
    first = run(settings.load(arguments))
    before = finished(tmp_path / "run")
    again = run(settings.load(arguments))
    assert (again.test, again.best_epoch) == (first.test, first.best_epoch)
    assert finished(tmp_path / "run") == before
    assert "resumed from step 12 of 12" in capsys.readouterr().out


def test_a_run_does_not_go_on_with_other_settings(arguments, capsys) -> None:
    assert main(arguments) == 0
    assert main([*arguments, "--optim.learning_rate", "0.1"]) == 2
    assert "`optim.learning_rate` None, not 0.1" in capsys.readouterr().err
    assert main([*arguments, "--optim.learning_rate", "0.1", "--run.resume", "false"]) == 0


def test_only_the_small_tree_is_saved(arguments, tmp_path) -> None:
    run(settings.load([*arguments, "--adapter.method", "none"]))
    sizes = [f.stat().st_size for f in (tmp_path / "run" / "checkpoints").rglob("*") if f.is_file()]
    assert sum(sizes) < 50_000


def test_accumulation_is_the_whole_batch() -> None:
    rng = np.random.default_rng(0)
    small = {"w": np.asarray(rng.standard_normal((3, 2)), np.float32)}
    batch = {
        "x": np.asarray(rng.standard_normal((8, 3)), np.float32),
        "labels": np.arange(8, dtype=np.int32) % 2,
        "weights": np.asarray([1] * 7 + [0], np.float32),
    }
    results = []
    for parts in (1, 2, 8):
        plan = cf.Plan((), (("w",),))
        optimizer = make_optimizer(OptimConfig(warmup=0.0), 0.2, plan, 10)
        step = steps.make_train_step(
            lambda small, base, batch, rng=None: batch["x"] @ small["w"],
            classification.losses,
            optimizer,
            parts,
        )
        tree = jax.tree.map(jax.numpy.array, small)
        state = TrainState(tree, optimizer.init(tree), jax.numpy.zeros((), int))
        results.append(step(state, {}, batch, jax.random.key(0)))
    for state, loss in results[1:]:
        np.testing.assert_allclose(loss, results[0][1], rtol=1e-6)
        np.testing.assert_allclose(state.small["w"], results[0][0].small["w"], rtol=1e-5)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_schedules_rise_to_one_and_fall(schedule) -> None:
    at = make_schedule(OptimConfig(schedule=schedule, warmup=0.1), 100)
    rates = np.array([at(step) for step in range(100)])
    assert 0 < rates[0] <= 0.2
    np.testing.assert_allclose(rates.max(), 1.0)
    assert (np.diff(rates[:10]) > 0).all() and (np.diff(rates[10:]) <= 1e-6).all()
    assert (rates[-1] < 0.05) == (schedule != "constant")


def test_learning_rates_follow_group_and_method(tiny_model) -> None:
    _, base, _ = cf.interop.load_model(tiny_model, "sequence-classification")
    chosen = cf.AdapterConfig(
        method=cf.BCA(p=4), targets=("query",), train=("classifier", "pooler/dense/bias")
    )
    plan = cf.make_plan(base, chosen)
    rates = make_rates(
        0.4,
        0.01,
        plan,
        frozenset({("bert", "pooler", "dense", "bias")}),
    )
    query = rates["bert"]["encoder"]["layer"]["0"]["attention"]["self"]["query"]
    assert query["adapter"]["c"] == pytest.approx(0.1)
    assert rates["classifier"]["kernel"] == 0.01
    assert rates["bert"]["pooler"]["dense"]["bias"] == 0.4


def test_regression_and_pairs(tiny_model, tmp_path) -> None:
    rows = [f"red apple\tgreen lamp\t{i % 5}.5" for i in range(40)]
    (tmp_path / "train.tsv").write_text("\n".join(["a\tb\tscore", *rows]) + "\n")
    options = [
        *("--model.name", str(tiny_model), "--data.train", str(tmp_path / "train.tsv")),
        *("--data.text", "a", "--data.text_pair", "b", "--data.label", "score"),
        *("--data.regression", "true", "--optim.epochs", "1", "--data.max_length", "16"),
        *("--run.output", str(tmp_path / "run")),
    ]
    summary = run(settings.load(options))
    assert summary.metric == "pearson_spearman" and summary.test is None
    assert "no test split" in (tmp_path / "run" / "report.md").read_text()


def test_bfloat16_and_overrides_and_more_leaves(arguments, tmp_path) -> None:
    overrides = '[{"pattern": ".*layer/1.*", "method": "c3a", "hyperparameters": {"b": 4}}]'
    more = ["--model.compute_dtype", "bfloat16", "--adapter.overrides", overrides]
    run(settings.load([*arguments, *more, "--adapter.train", '["LayerNorm"]']))
    plan = cf.load_adapters(tmp_path / "run" / "adapter").plan
    assert {(t.path[3], t.method.name) for t in plan.targets} == {("0", "cdvft"), ("1", "c3a")}
    assert len([path for path in plan.trained if "LayerNorm" in path]) == 10


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(
    arguments, tmp_path, capsys, monkeypatch
) -> None:
    arguments = [*arguments, "--run.checkpoint_every", "2"]
    made = trainer.make_train_step

    def failing(*args):
        step = made(*args)

        def wrapped(state, base, batch, rng):
            poison = np.float32(np.nan if int(state.step) == 4 else 1)
            return step(state, base, {**batch, "weights": batch["weights"] * poison}, rng)

        return wrapped

    monkeypatch.setattr(trainer, "make_train_step", failing)
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert "the loss is nan at step 5" in error and "step 4 is kept" in error
    assert error.count("\n") == 1
    monkeypatch.undo()
    assert main(arguments) == 0


def test_no_space_left_is_one_sentence_and_loses_nothing(
    arguments, tmp_path, capsys, monkeypatch
) -> None:
    assert main([*arguments, "--run.output", str(tmp_path / "whole")]) == 0
    room = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(
        shutil,
        "disk_usage",
        lambda path: room._replace(free=1000 if (Path(path) / "6").exists() else 1 << 30),
    )
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert "checkpoint of step 12" in error and "1,000 are left" in error
    assert error.count("\n") == 1
    monkeypatch.undo()
    assert main(arguments) == 0
    assert finished(tmp_path / "run") == finished(tmp_path / "whole")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--adapter.method", "cdvtf"], "did you mean 'cdvft'"),
        (["--adapter.targets", '["qurey"]'], "did you mean 'query'"),
        (["--adapter.hyperparameters.q", "4"], "cdvft has no hyperparameter 'q'"),
        (
            ["--adapter.method", "bitfit", "--adapter.hyperparameters.p", "4"],
            "`adapter.hyperparameters` has no use with the method `bitfit`",
        ),
        (["--adapter.method", "c3a", "--adapter.hyperparameters.b", "5"], "1, 2, 4, 8, 16"),
        (["--adapter.targets", '["word_embeddings"]'], "cannot be adapted"),
        (["--adapter.train", '["nothing"]'], "'nothing' in `train`"),
        (["--model.name", "missing/model"], "neither a local directory nor a Hub repository"),
        (["--data.train", "missing.jsonl"], "missing.jsonl"),
        (["--data.label", "colour"], "no column `colour`"),
        (["--optim.epoch", "3"], "did you mean `optim.epochs`?"),
        (["--run.metric", "f2"], "`run.metric` 'f2'"),
        (["--data.max_length", "99"], "64 tokens"),
    ],
)
def test_bad_input_is_one_sentence(more, message, arguments, tmp_path, capsys) -> None:
    assert main([*arguments, *more]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and error.startswith("error: ")
    assert not (tmp_path / "run").exists()


def test_checkpoints_hold_what_a_run_needs(tmp_path) -> None:
    optimizer = make_optimizer(OptimConfig(), 0.2, cf.Plan((), (("w",),)), 10)
    small = {"w": jax.numpy.arange(3.0)}
    state = TrainState(small, optimizer.init(small), jax.numpy.asarray(7))
    progress = Progress(1, 2, 1, {"accuracy": 0.5}, 3.5)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state, {"w": small["w"] + 1}, jax.random.key(5), progress)
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest == 7
        restored, best, rng, standing = checkpoints.restore(state, jax.random.key(0))
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    assert all(
        np.array_equal(a, b)
        for a, b in zip(flat(restored).values(), flat(state).values(), strict=True)
    )
    assert np.array_equal(best["w"], small["w"] + 1)
    assert jax.random.key_data(rng).tolist() == jax.random.key_data(jax.random.key(5)).tolist()
    assert standing == progress


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"w": (4,)}, r"`best/w` has shape \(3,\) there, but has shape \(4,\) here"),
        ({"v": (3,)}, r"`best/v` is missing there, but has shape \(3,\) here"),
        ({"v": (3,), "w": (3,)}, r"`best/v` is missing there, but has shape \(3,\) here"),
        ({}, r"`best/w` has shape \(3,\) there, but is missing here"),
    ],
)
def test_a_checkpoint_of_other_adapters_is_one_sentence(other, message, tmp_path) -> None:
    optimizer = optax.adam(1.0)

    def state(shapes) -> TrainState:
        small = {name: jax.numpy.zeros(shape) for name, shape in shapes.items()}
        return TrainState(small, optimizer.init(small), jax.numpy.asarray(7))

    saved, rng = state({"w": (3,)}), jax.random.key(0)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(saved, saved.small, rng, Progress())
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(cf.interop.CheckpointError, match=f"step 7 .*{message}"):
            checkpoints.restore(state(other), rng)
        assert checkpoints.latest == 7
        checkpoints.restore(saved, rng)


def test_training_error_is_not_a_value_error() -> None:
    assert not issubclass(TrainingError, ValueError)


def test_learning_rate_suits_the_method_unless_it_is_set(arguments) -> None:
    def rate(*more: str) -> float:
        return learning_rate(settings.load([*arguments, *more]))

    assert rate("--adapter.method", "lora") == cf.LoRA.learning_rate
    assert rate("--adapter.method", "lamda++") == cf.LaMDA.learning_rate
    assert rate("--adapter.method", "full") < rate("--adapter.method", "bitfit") < 0.01
    assert rate("--adapter.method", "lora", "--optim.learning_rate", "0.5") == 0.5
