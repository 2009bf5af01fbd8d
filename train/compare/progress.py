"""Progress of a comparison: one bar over all cells in a terminal, and a line for each cell."""

import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn

from train.progress import Display, duration


class GridProgress(Display):
    """Shows cells done and the time left. Use as a context manager."""

    def __init__(self, total: int, done: int, console: Console) -> None:
        """Prepares the display.

        Args:
            total: Cells of the whole comparison.
            done: Those that have a record already.
            console: Where to write.
        """
        super().__init__(
            console,
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[left]} left  {task.description}"),
        )
        self._total, self._done, self._before = total, done, done
        self._began = time.monotonic()
        self._task = self._bar.add_task("", total=total, completed=done, left="?")

    def begin(self, cell: str) -> None:
        """Names the cell that runs now; its line comes with `finish`.

        Args:
            cell: The cell in words.
        """
        self._bar.update(self._task, description=cell)

    def finish(self, line: str, left: int) -> None:
        """Reports a cell.

        Args:
            line: What came of it.
            left: Cells still to run.
        """
        self._done = self._total - left
        seconds = (time.monotonic() - self._began) / max(1, self._done - self._before)
        remaining = duration(seconds * left)
        self._bar.update(self._task, completed=self._done, left=remaining)
        where = f"[{self._done}/{self._total}] "
        plain = "" if self._console.is_terminal else f"  {remaining} left"
        self.say(f"{where}{line}{plain}")
