"""Progress in a terminal and in a file."""

import io
import time

import pytest
from rich.console import Console

from train.progress import Display, TrainingProgress, duration, untracked


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


@pytest.mark.parametrize(("after", "shown"), [(0.1, True), (60.0, False)])
def test_a_bar_of_its_own_where_going_through_items_takes_long(after, shown):
    output = io.StringIO()
    console = Console(file=output, force_terminal=True, width=80)
    with Display(console, after=after) as display:
        tracked = display.track(iter("abc"), 3, "checking")
        assert next(tracked) == "a"
        # The bar appears while the first item takes long.
        until = time.monotonic() + (10.0 if shown else 0.3)
        while "0/3" not in output.getvalue() and time.monotonic() < until:
            time.sleep(0.01)
        assert list(tracked) == ["b", "c"]
        before = output.getvalue()
        display.say("done")
    assert ("checking" in before) == ("0/3" in before) == shown
    # Once all are gone through, nothing of the bar is drawn again.
    assert "checking" not in output.getvalue()[len(before) :]


def test_plain_lines_where_going_through_items_takes_long():
    for every, lines in ((0.0, ["checking 1/3", "checking 2/3", "checking 3/3"]), (60.0, [])):
        output = io.StringIO()
        console = Console(file=output, force_terminal=False, width=80)
        with Display(console, every_seconds=every) as display:
            assert list(display.track(iter("abc"), 3, "checking")) == list("abc")
        assert [line.partition("  ")[0] for line in output.getvalue().splitlines()] == lines


def test_nothing_is_shown_where_nothing_is_tracked(capsys):
    assert list(untracked(iter("abc"), 3, "checking")) == list("abc")
    assert capsys.readouterr() == ("", "")


def test_duration():
    assert [duration(s) for s in (0.4, 61, 3723.4)] == ["0:00", "1:01", "1:02:03"]
