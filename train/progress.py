"""Progress on screen: a live bar in a terminal, now and then a plain line elsewhere."""

import time
from collections.abc import Iterable, Iterator
from statistics import median
from types import TracebackType
from typing import Self, TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)

T = TypeVar("T")


class Display:
    """A bar that moves in a terminal alone, and lines above it. Use as a context manager."""

    def __init__(self, console: Console, *columns: ProgressColumn) -> None:
        """Prepares the display.

        Args:
            console: Where to write.
            columns: What the bar shows.
        """
        self._console = console
        self._bar = Progress(*columns, console=console)

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._bar.start()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._console.is_terminal:
            self._bar.stop()

    def say(self, message: str) -> None:
        """Prints a line above the bar."""
        self._console.print(message, highlight=False, markup=False, soft_wrap=True)


class TrainingProgress(Display):
    """Shows loss, speed and the time left. Use as a context manager."""

    def __init__(
        self,
        total: int,
        start: int = 0,
        console: Console | None = None,
        unit: str = "tokens",
        every_seconds: float = 10.0,
    ) -> None:
        """Prepares the display.

        Args:
            total: Steps of the whole run.
            start: Steps made before, by a run that this one resumes.
            console: Where to write; None is standard output.
            unit: What the speed is counted in.
            every_seconds: Shortest time between plain lines.
        """
        super().__init__(
            console or Console(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn(f"loss {{task.fields[loss]}}  {{task.fields[speed]}} {unit}/s"),
            TimeRemainingColumn(),
        )
        self._total, self._unit, self._every = total, unit, every_seconds
        self._began = self._printed = self._updated = time.monotonic()
        self._size = 0
        self._seconds: list[float] = []
        self._task = self._bar.add_task("train", total=total, completed=start, loss="-", speed="-")

    def __enter__(self) -> Self:
        self._began = self._printed = self._updated = time.monotonic()
        return super().__enter__()

    def update(self, step: int, loss: float, size: int) -> None:
        """Reports a step.

        Args:
            step: Steps made so far, those before `start` included.
            loss: Loss of this step.
            size: Units computed since the last update.
        """
        now = time.monotonic()
        self._seconds.append(now - self._updated)
        self._updated = now
        self._size += size
        elapsed = max(now - self._began, 1e-9)
        shown = {"loss": f"{loss:.4f}", "speed": f"{self._size / elapsed:,.0f}"}
        if self._console.is_terminal:
            self._bar.update(self._task, completed=step, **shown)
        elif now - self._printed >= self._every or step == self._total:
            self._printed = now
            # The median, since a few steps take long: those that compile a program.
            left = median(self._seconds) * (self._total - step)
            line = (
                f"step {step}/{self._total}  loss {shown['loss']}  {shown['speed']} {self._unit}/s"
            )
            self.say(f"{line}  {duration(left)} left")


class CountProgress(Display):
    """Shows how many of some equal things are done. Use as a context manager."""

    def __init__(
        self, what: str, total: int, done: int, console: Console, every_seconds: float = 10.0
    ) -> None:
        """Prepares the display.

        Args:
            what: The things, such as "answers".
            total: All of them.
            done: Those done before.
            console: Where to write.
            every_seconds: Shortest time between plain lines.
        """
        columns = (BarColumn(bar_width=None), MofNCompleteColumn(), TimeRemainingColumn())
        super().__init__(console, TextColumn("{task.description}"), *columns)
        self._what, self._total, self._done, self._every = what, total, done, every_seconds
        self._printed = time.monotonic()
        self._task = self._bar.add_task(what, total=total, completed=done)

    def advance(self, count: int) -> None:
        """Reports that more are done.

        Args:
            count: How many.
        """
        self._done += count
        self._bar.update(self._task, completed=self._done)
        now = time.monotonic()
        if not self._console.is_terminal and now - self._printed >= self._every:
            self._printed = now
            self.say(f"{self._what}: {self._done} of {self._total}")


def track(
    items: Iterable[T], total: int, what: str, console: Console | None = None, after: float = 2.0
) -> Iterator[T]:
    """Goes through items, with a bar in a terminal if that takes long.

    Args:
        items: The items.
        total: How many there are.
        what: What is done with them, for the bar.
        console: Where to write; None is standard output.
        after: Seconds before the bar appears.

    Yields:
        The items.
    """
    console = console or Console()
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=None), MofNCompleteColumn())
    bar = Progress(*columns, TimeRemainingColumn(), console=console, transient=True)
    task, began = bar.add_task(what, total=total), time.monotonic()
    try:
        for item in items:
            if console.is_terminal and time.monotonic() - began > after:
                bar.start()
            yield item
            bar.advance(task)
    finally:
        # To stop what never started would print an empty line.
        if bar.live.is_started:
            bar.stop()


def duration(seconds: float) -> str:
    """A time in hours, minutes and seconds.

    Args:
        seconds: The time.

    Returns:
        For instance "1:02:03" or "2:03".
    """
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
