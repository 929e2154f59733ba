"""``python -m tokprune``."""

from tokprune.cli import app

app(prog_name="tokprune")
