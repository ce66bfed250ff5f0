"""The command line: ``vlmzip VERB``. Each verb lives in its own file of ``commands/``."""

import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from vlmzip import __version__
from vlmzip.commands.ask import ask
from vlmzip.commands.bench import bench
from vlmzip.commands.demo import demo
from vlmzip.commands.eval import evaluate
from vlmzip.commands.models import models
from vlmzip.commands.path import path
from vlmzip.commands.serve import PASS_ON, serve
from vlmzip.commands.show import show

# What bad input raises, in our code or below it. Anything else is a defect: its traceback is wanted.
_EXPECTED = (ValueError, TypeError, OSError, RuntimeError)


class Verbs(TyperGroup):
    """The verbs, with one way to fail: a line on stderr and exit code 2."""

    def main(self, args: Sequence[str] | None = None, *rest: Any, **settings: Any) -> Any:
        """Run a verb. Errors end in ``error: ...`` and 2, Ctrl-C ends in 130."""
        settings["standalone_mode"] = False
        try:
            code = super().main(args, *rest, **settings)
        except (KeyboardInterrupt, typer.Abort):
            code = 130
        except Exception as error:
            # typer's own errors share no public base class over its versions, but this method.
            if not isinstance(error, _EXPECTED) and not hasattr(error, "format_message"):
                raise
            if not is_help(error):
                print(f"error: {one_line(error)}", file=sys.stderr)
            code = 2
        sys.exit(code)


def is_help(error: Exception) -> bool:
    """Whether the help was printed because no command was given; typer raises that too."""
    return hasattr(error, "format_message") and not error.format_message()


def one_line(error: Exception) -> str:
    """The text of an error on one line."""
    text = error.format_message() if hasattr(error, "format_message") else str(error)
    return " ".join(text.split()) or type(error).__name__


app = typer.Typer(
    cls=Verbs,
    name="vlmzip",
    help="Fewer image tokens for vision-language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for verb in (demo, ask, show, models, path):
    app.command()(verb)
app.command("eval")(evaluate)
app.command(context_settings=PASS_ON)(serve)
app.add_typer(bench)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"vlmzip {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """Fewer image tokens for vision-language models: VisionZip on Hugging Face transformers."""


def main() -> None:
    """The ``vlmzip`` program."""
    app()
