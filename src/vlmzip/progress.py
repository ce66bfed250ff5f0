"""What the command line says beside its results: on stderr, so that stdout holds results only."""

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console


@contextmanager
def working(what: str) -> Iterator[None]:
    """Show a spinner with ``what`` on stderr, if that is a terminal, until the block ends."""
    with Console(stderr=True).status(what):
        yield


def note(text: str) -> None:
    """Say something in passing: one line on stderr."""
    Console(stderr=True).print(f"note: {text}", markup=False, highlight=False, soft_wrap=True)


def silence_transformers() -> None:
    """Stop transformers' warnings and progress bars for the rest of the process."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
