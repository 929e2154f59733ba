"""The command line, one file a command. Heavy imports wait until a command needs them."""

from tokprune.cli import methods, run  # noqa: F401  (importing a command registers it)
from tokprune.cli.app import BadInput, app
from tokprune.cli.values import parse_keep, parse_options

__all__ = ["BadInput", "app", "parse_keep", "parse_options"]
