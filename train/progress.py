"""Progress on screen: live bars in a terminal, now and then a plain line elsewhere."""

import time
from collections.abc import Iterable, Iterator
from statistics import median
from types import TracebackType
from typing import Protocol, Self, TypeVar

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)

T = TypeVar("T")


class Track(Protocol):
    """Goes through items and shows how far it has come; see `Display.track`."""

    def __call__(self, items: Iterable[T], total: int, what: str) -> Iterator[T]:
        """Yields the items."""


def untracked(items: Iterable[T], total: int, what: str) -> Iterator[T]:
    """Goes through items and shows nothing; see `Display.track`."""
    del total, what
    return iter(items)


class Display:
    """Bars that move in a terminal alone, and lines above them. Use as a context manager."""

    def __init__(
        self,
        console: Console,
        *columns: ProgressColumn,
        every_seconds: float = 10.0,
        after: float = 2.0,
    ) -> None:
        """Prepares the display.

        Args:
            console: Where to write.
            columns: What the bar of the whole shows, if there is one.
            every_seconds: Shortest time between plain lines.
            after: Seconds before what is tracked has a bar.
        """
        self._console, self._every = console, every_seconds
        self._bar = Progress(*columns, console=console)
        self._tracked = _Late(after, console)
        bars = Group(self._bar, self._tracked)
        self._live = Live(bars, console=console, refresh_per_second=10)

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._console.is_terminal:
            self._live.stop()

    def say(self, message: str) -> None:
        """Prints a line above the bars."""
        self._console.print(message, highlight=False, markup=False, soft_wrap=True)

    def track(self, items: Iterable[T], total: int, what: str) -> Iterator[T]:
        """Goes through items, with a bar of their own, until they end, if that takes long.

        Args:
            items: The items.
            total: How many there are.
            what: What is done, and to what, such as "checking image".

        Yields:
            The items.
        """
        task = self._tracked.add_task(what, total=total)
        began = printed = time.monotonic()
        try:
            for done, item in enumerate(items, start=1):
                yield item
                self._tracked.update(task, completed=done)
                now = time.monotonic()
                if not self._console.is_terminal and now - printed >= self._every:
                    printed = now
                    left = duration((now - began) / done * (total - done))
                    self.say(f"{what} {done}/{total}  {left} left")
        finally:
            self._tracked.remove_task(task)


class _Late(Progress):
    """Bars of what has been going on for some time."""

    def __init__(self, after: float, console: Console) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(bar_width=None))
        super().__init__(*columns, MofNCompleteColumn(), TimeRemainingColumn(), console=console)
        self._after = after

    def get_renderables(self) -> Iterator[RenderableType]:
        # Asked for at every refresh, so that a bar appears even while its first item takes long.
        late = [task for task in self.tasks if (task.elapsed or 0.0) >= self._after]
        yield self.make_tasks_table(late)


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
            every_seconds=every_seconds,
        )
        self._total, self._unit = total, unit
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
        description = TextColumn("{task.description}")
        super().__init__(console, description, *columns, every_seconds=every_seconds)
        self._what, self._total, self._done = what, total, done
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
