"""``python -m patches.llava``: see :mod:`tokprune.cli.llava_v1`."""

from tokprune.cli.llava_v1 import app

if __name__ == "__main__":
    app()
