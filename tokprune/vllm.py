"""Serve a model with vLLM and fewer visual tokens.

From Python::

    from vllm import LLM
    from tokprune.vllm import overrides

    model = "llava-hf/llava-1.5-7b-hf"
    llm = LLM(model, hf_overrides=overrides(model, "setting.json"))

and on the command line ``tokprune vllm-overrides MODEL --setting setting.json`` prints the same for
``--hf-overrides``. vLLM itself is not needed to make it.
"""

from __future__ import annotations

from os import PathLike
from typing import Any

from tokprune.integrations.vllm.architectures import PREFIX, SERVED, served_by
from tokprune.methods.base import Method
from tokprune.methods.options import Budget

__all__ = ["overrides", "served_models"]


def served_models() -> list[str]:
    """Names of the model classes that vLLM can serve with fewer visual tokens."""
    return sorted(SERVED)


def overrides(
    model: str | PathLike[str],
    setting: str | PathLike[str] | dict[str, Any] | Method,
    *,
    max_keep: Budget | None = None,
    **options: Any,
) -> dict[str, Any]:
    """What to hand to vLLM as ``hf_overrides``: the architecture of ours, and the setting.

    Args:
        model: folder or name of the checkpoint, as vLLM is given it; its config is read.
        setting: file of ``tokprune recommend``, what is in one, the name of a method with its
            ``options``, or a method.
        max_keep: the most that a request may ask for by ``keep`` of its own; None: what the setting
            keeps.

    Raises:
        OSError: the setting or the model's config cannot be read.
        UnsupportedModelError: the model is not served, or the method cannot work in vLLM; says why.
        ValueError, TypeError: a bad setting, or an option that does not fit the model.
    """
    from transformers import AutoConfig

    from tokprune.integrations.vllm.hosts import Hosts
    from tokprune.integrations.vllm.setting import KEY, ServedSetting
    from tokprune.methods.setting import method_of
    from tokprune.models import resolve

    method = method_of(setting, **options)
    served = ServedSetting.read({**ServedSetting(method).as_json(), "max_keep": max_keep})
    config = AutoConfig.from_pretrained(resolve(model))
    name = PREFIX + served_by(config.architectures)
    found = {"architectures": [name], KEY: served.as_json()}
    for key, value in found.items():
        setattr(config, key, value)
    hosts = Hosts(config)
    for _, layout in hosts.examples():
        hosts.count(layout)
    return found
