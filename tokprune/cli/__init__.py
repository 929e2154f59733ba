"""The command line, one file a command. Heavy imports wait until a command needs them."""

# importing a command registers it
from tokprune.cli import (  # noqa: F401
    bench,
    exec,
    export,
    methods,
    recommend,
    repair,
    report,
    reproduce,
    run,
    second_question,
    sweep,
    tune,
    vllm,
)
from tokprune.cli.app import BadInput, app
from tokprune.cli.values import parse_keep, parse_options

__all__ = ["BadInput", "app", "parse_keep", "parse_options"]
