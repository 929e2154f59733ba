"""Releases of vLLM that this works with."""

from __future__ import annotations

import re

LEAST, BELOW = (0, 32), (0, 34)


def why_not(version: str | None = None) -> str | None:
    """Why it does not work with a release of vLLM (None: the one that is installed); None: it does,
    or is a build whose version says nothing."""
    if version is None:
        import vllm

        version = str(vllm.__version__)
    found = re.match(r"(\d+)\.(\d+)", version)
    if found is None or found[0] == "0.0":
        return None
    if LEAST <= (int(found[1]), int(found[2])) < BELOW:
        return None
    return (
        f"tokprune does not work with vLLM {version}: it should be at least "
        f"{'.'.join(map(str, LEAST))} and below {'.'.join(map(str, BELOW))}. Its architectures are "
        "not registered"
    )
