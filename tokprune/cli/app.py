"""The application that the commands hang on, and how it reports bad input."""

from __future__ import annotations

import sys
from typing import Annotated, Any, NoReturn

import typer

from tokprune import __version__


class BadInput(Exception):
    """Something the user gave cannot be used; the message is the whole report."""


class _App(typer.Typer):
    """Reports bad input as one line on stderr and exit code 2."""

    def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
        try:
            code = super().__call__(*args, **{**kwargs, "standalone_mode": False})
        except (KeyboardInterrupt, typer.Abort):
            print("Aborted.", file=sys.stderr)
            sys.exit(130)
        except Exception as error:
            if not _is_bad_input(error):
                raise
            text = error.format_message() if hasattr(error, "format_message") else str(error)
            first = next((x.strip() for x in text.splitlines() if x.strip()), "")
            print(f"Error: {first or type(error).__name__}", file=sys.stderr)
            sys.exit(2)
        sys.exit(code if isinstance(code, int) else 0)


def _is_bad_input(error: Exception) -> bool:
    # ImportError: what a model or a file needs is not installed
    if isinstance(error, (BadInput, ValueError, OSError, ImportError)):
        return True
    # click's usage errors, whichever click typer brings; ours (all of them say what to do)
    return hasattr(error, "format_message") or type(error).__module__ == "tokprune.errors"


def new_app(name: str) -> typer.Typer:
    """A command line whose bad input is one line and exit code 2."""
    return _App(
        name=name,
        no_args_is_help=True,
        add_completion=False,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
    )


app = new_app("tokprune")


def _version(wanted: bool) -> None:
    if wanted:
        print(f"tokprune {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Prune and merge the visual tokens of vision-language models, without training."""
