"""Plug-in for vLLM: visual tokens reduced inside the server, before its scheduler counts them.

vLLM calls :func:`register` in every one of its processes, whether anybody wants to prune there or
not, so nothing but names is imported here.
"""

from __future__ import annotations

from tokprune.integrations.vllm.architectures import PREFIX, SERVED
from tokprune.integrations.vllm.versions import why_not

__all__ = ["register"]


def register() -> None:
    """Make our architectures known to vLLM; their modules are imported when one is served. Called
    again, it does nothing new.

    With a release of vLLM that is not supported nothing is registered: an engine that is asked for
    one of them stops, and a line of the log says why.
    """
    from vllm import ModelRegistry

    reason = why_not()
    if reason is not None:
        from vllm.logger import init_logger

        init_logger("vllm.tokprune").warning(reason)
        return
    for name, module in SERVED.items():
        architecture = PREFIX + name
        ModelRegistry.register_model(architecture, f"{__name__}.{module}:{architecture}")
