"""A progress bar of steps, drawn by rich."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text


class _StepsPerSecond(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed:,.0f} steps/s" if speed else "- steps/s")


@contextmanager
def bar(steps: int | None, done: int) -> Iterator[Callable[[int], None]]:
    """Show a bar on a terminal, and nothing elsewhere. Yields a function that takes the number of finished steps."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda done: None
        return
    columns = (
        MofNCompleteColumn(),
        TextColumn("steps"),
        BarColumn(),
        _StepsPerSecond(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=steps, completed=done)
        yield lambda done: progress.update(task, completed=done)
