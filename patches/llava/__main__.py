"""``python -m patches.llava``: the same as ``tokprune exec``."""

import sys

from tokprune.cli import app

if __name__ == "__main__":
    app(["exec", *sys.argv[1:]], prog_name="tokprune")
