"""What the command line says beside its results: on stderr, so that stdout holds results only."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


@contextmanager
def working(what: str) -> Iterator[None]:
    """Show a spinner with ``what`` on stderr, if that is a terminal, until the block ends."""
    with Console(stderr=True).status(what):
        yield


@contextmanager
def counting(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show a progress bar on stderr, if that is a terminal; the block calls what it gets with steps."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=total)
        yield lambda steps: bar.advance(task, steps)


def note(text: str) -> None:
    """Say something in passing: one line on stderr."""
    Console(stderr=True).print(f"note: {text}", markup=False, highlight=False, soft_wrap=True)


def silence_transformers() -> None:
    """Stop transformers' warnings and progress bars for the rest of the process."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
