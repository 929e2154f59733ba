"""The libraries that sweeps and reports need beyond tokprune's own dependencies."""

from __future__ import annotations

from importlib.util import find_spec

NEEDED = ("numpy", "scipy", "matplotlib", "jinja2")


def check_extra(what: str, needed: tuple[str, ...] = NEEDED, extra: str = "sweep") -> None:
    """Whether the libraries are installed, without importing them; ``what`` needs them, and
    ``extra`` brings them.

    Raises:
        ImportError: names those that are missing, and the command that installs them.
    """
    missing = [name for name in needed if find_spec(name) is None]
    if missing:
        raise ImportError(
            f"{what} need {', '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not "
            f"installed: pip install 'tokprune[{extra}]'"
        )
