"""Progress in a terminal and in a file."""

import io

import pytest
from rich.console import Console

from train.progress import TrainingProgress, duration, track


def test_plain_lines_without_control_characters():
    output = io.StringIO()
    console = Console(file=output, force_terminal=False, width=80)
    with TrainingProgress(100, console=console, every_seconds=3600) as progress:
        for step in range(1, 101):
            progress.update(step, loss=0.5, size=10)
        progress.say("[epoch] done")
    lines = output.getvalue().splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("step 100/100  loss 0.5000  ")
    assert lines[0].endswith(" tokens/s  0:00 left")
    assert lines[1] == "[epoch] done"
    assert output.getvalue().replace("\n", "").isprintable()


def test_a_bar_in_a_terminal():
    output = io.StringIO()
    console = Console(file=output, force_terminal=True, width=80)
    with TrainingProgress(10, start=4, console=console) as progress:
        progress.update(10, loss=0.25, size=10)
    assert "10/10" in output.getvalue()
    assert "loss 0.2500" in output.getvalue()


@pytest.mark.parametrize(("terminal", "after"), [(True, 0.0), (True, 60.0), (False, 0.0)])
def test_a_bar_where_going_through_items_takes_long(terminal, after):
    output = io.StringIO()
    console = Console(file=output, force_terminal=terminal, width=80)
    assert list(track(iter("abc"), 3, "checking", console, after)) == list("abc")
    assert ("checking" in output.getvalue()) == bool(output.getvalue()) == (terminal and not after)


def test_duration():
    assert [duration(s) for s in (0.4, 61, 3723.4)] == ["0:00", "1:01", "1:02:03"]
