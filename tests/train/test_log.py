"""The record of a run: a resumed run's file equals an unbroken one's."""

import pytest

from train import log


def _append(metrics_log: log.MetricsLog, steps: range) -> None:
    for step in steps:
        metrics_log.append(step=step, epoch=1 + step // 4, split="train", loss=1 / (step + 1))


def test_records_come_back(tmp_path):
    with log.MetricsLog(tmp_path / "run") as metrics_log:
        metrics_log.append(step=1, epoch=1, split="train", loss=0.1, tokens=3)
        metrics_log.append(step=2, epoch=1, split="train", loss=float("nan"))
    assert log.read(tmp_path / "run" / log.FILE_NAME) == [
        {"step": 1, "epoch": 1, "split": "train", "loss": 0.1, "tokens": 3.0},
        {"step": 2, "epoch": 1, "split": "train", "loss": None},
    ]
    assert list((tmp_path / "run" / "tensorboard").iterdir())


@pytest.mark.parametrize("unfinished", ["", '{"step": 9, "ep'])
@pytest.mark.parametrize("checkpoint", [0, 3, 6])
def test_a_resumed_log_equals_an_unbroken_one(tmp_path, checkpoint, unfinished):
    with log.MetricsLog(tmp_path / "whole") as metrics_log:
        _append(metrics_log, range(1, 11))
    with log.MetricsLog(tmp_path / "broken") as metrics_log:
        _append(metrics_log, range(1, 7))
    path = tmp_path / "broken" / log.FILE_NAME
    path.write_text(path.read_text() + unfinished)
    with log.MetricsLog(tmp_path / "broken", resume_step=checkpoint) as metrics_log:
        _append(metrics_log, range(checkpoint + 1, 11))
    assert path.read_bytes() == (tmp_path / "whole" / log.FILE_NAME).read_bytes()


def test_a_new_log_begins_empty(tmp_path):
    for _ in range(2):
        with log.MetricsLog(tmp_path) as metrics_log:
            _append(metrics_log, range(3))
    assert len(log.read(tmp_path / log.FILE_NAME)) == 3


def test_a_broken_line_in_the_middle_is_not_skipped(tmp_path):
    path = tmp_path / log.FILE_NAME
    path.write_text('{"step": 1}\n{"st\n{"step": 2}\n')
    with pytest.raises(ValueError, match="line 2 is not a record"):
        log.read(path)
