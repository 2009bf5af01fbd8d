"""The report of a run."""

import dataclasses
import io
import json

import pytest
from rich.console import Console

from train import log, report, table

SUMMARY = report.Summary(
    task="a|b.tsv",
    model="organisation/a-model-with-a-rather-long-name-on-the-hub",
    method="cdvft",
    trainable={"adapters": 55296, "head": 1538},
    total=1_000_000,
    metric="accuracy",
    best_epoch=2,
    validation={"accuracy": 0.75, "f1": 0.5},
    test={"accuracy": 0.7, "f1": 0.4},
    seconds=61,
    seed=3,
    notes=("validation: 4 of 20 training examples held out",),
)


@pytest.mark.parametrize("losses", [[], [0.5], [0.9, float("nan"), 0.5, 0.4]])
def test_files(tmp_path, losses):
    with log.MetricsLog(tmp_path) as metrics_log:
        for step, loss in enumerate(losses):
            metrics_log.append(step=step, epoch=1, split="train", loss=loss)
        for epoch, accuracy in ((1, 0.7), (2, 0.75)):
            metrics_log.append(step=epoch, epoch=epoch, split="validation", accuracy=accuracy)
    report.write(tmp_path, SUMMARY)
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    text = (tmp_path / "report.md").read_text()
    for line in (
        "| task | a\\|b.tsv |",
        "| trainable parameters | 56,834 of 1,000,000 (5.683%): adapters 55,296, head 1,538 |",
        "| best epoch | 2 (by validation accuracy) |",
        "| validation accuracy | 0.7500 |",
        "| test f1 | 0.4000 |",
        "| time | 1:01 |",
        "- validation: 4 of 20 training examples held out",
        "![Training loss and validation metric](curves.png)",
    ):
        assert line in text.splitlines()


def test_a_missing_test_split_is_said():
    text = report.markdown(dataclasses.replace(SUMMARY, test=None, notes=()))
    assert "| test | not reported: there is no test split |" in text


def test_what_was_measured_before_the_training_stands_beside_what_came_of_it():
    compared = {"test": ({"f1": 0.1}, {"f1": 0.4}), "old": ({"f1": 0.9}, {"f1": 0.8})}
    lines = report.markdown(dataclasses.replace(SUMMARY, compared=compared)).splitlines()
    assert "| validation f1 | 0.5000 |" in lines
    assert "| test accuracy | 0.7000 |" in lines
    assert "| test f1 | 0.4000 (0.1000 before the training) |" in lines
    assert "| old f1 | 0.8000 (0.9000 before the training) |" in lines


def test_the_table_fits_80_columns():
    output = io.StringIO()
    report.show(SUMMARY, Console(file=output, width=80))
    lines = output.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    assert "0.7500" in output.getvalue()
    assert "…" not in output.getvalue()


@pytest.mark.parametrize(("metric", "shown"), [("accuracy", "70.00"), ("perplexity", "0.70")])
def test_a_table_of_runs_scales_all_but_perplexities(tmp_path, metric, shown):
    results = dataclasses.asdict(SUMMARY) | {
        "metric": metric,
        "trainable": {"adapters": 5, "in full": 6},
        "validation": {metric: 0.75},
        "test": {metric: 0.7},
    }
    (tmp_path / report.RESULTS).write_text(json.dumps(results))
    row = table.table([tmp_path]).splitlines()[-1]
    assert f"| {metric} | " in row and f"| {shown} | 3 | 2 |" in row
