"""The classes that lmms-eval asks for a model, and what they make of the wrapped one."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from lmms_eval.api.model import lmms
from lmms_eval.tasks import TaskManager
from loguru import logger

from tokprune.integrations.lmms_eval.arguments import Arguments, read_arguments
from tokprune.integrations.lmms_eval.find import check_fit
from tokprune.integrations.lmms_eval.run import Run
from tokprune.integrations.lmms_eval.wrapped import parameters


class Compressed:
    """Comes before the wrapped class: answers are the wrapped class's own, given by a patched
    model, with numbers beside them."""

    _tokprune: Run

    def generate_until(self, requests: list[Any]) -> list[Any]:
        return self._tokprune.generate(super().generate_until, requests)  # type: ignore[misc]

    def generate_until_multi_round(self, requests: list[Any]) -> Sequence[Any]:
        answer = super().generate_until_multi_round  # type: ignore[misc]
        return self._tokprune.pass_on(answer, requests, "generate_until_multi_round")

    def loglikelihood(self, requests: list[Any]) -> Sequence[Any]:
        return self._tokprune.likelihoods(requests)

    def clean(self) -> None:
        """Called by lmms-eval after the last request; the model is unpatched first."""
        self._tokprune.close()
        super().clean()  # type: ignore[misc]


def make(arguments: Arguments, additional: Mapping[str, Any] | None = None) -> Any:
    """The wrapped model, loaded and patched.

    Args:
        additional: more arguments of the wrapped class (batch size, device), None values left out.

    Raises:
        UnsupportedModelError, ValueError: no such model can be patched, or not with this method.
    """
    check_fit(arguments)
    takes, _ = parameters(arguments.base_class)
    # bases that take it differ in what they do where nothing is said
    trust = {"trust_remote_code": False} if "trust_remote_code" in takes else {}
    more = {name: value for name, value in (additional or {}).items() if value is not None}
    base = arguments.base_class
    cls: Any = type(f"Tokprune{base.__name__}", (Compressed, base), {"__module__": __name__})
    lm = cls(**_placed(arguments, {**trust, **arguments.passed, **more}))
    lm._tokprune = Run(lm, arguments)
    _name_tasks_after(arguments.base)
    logger.info(f"tokprune: {arguments.base} with {arguments.description}")
    return lm


def _placed(arguments: Arguments, values: dict[str, Any]) -> dict[str, Any]:
    """Some classes (llava_hf) say ``device_map=""`` for one device, which transformers 5 refuses;
    several processes need it, since it makes them take a device each. Others look for a GPU
    unless told otherwise, whatever the device."""
    takes, _ = parameters(arguments.base_class)
    device = str(values.get("device", takes.get("device", "cuda")))
    if "device_map" in values or "device_map" not in takes:
        return values
    if takes["device_map"] != "" and device != "cpu":
        return values
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        return values
    return {**values, "device_map": device}


def _name_tasks_after(base: str) -> None:
    """Tasks keep prompts for certain models and look them up by the name of ``--model``; let them
    see the wrapped one's."""

    def model_name(manager: TaskManager) -> Any:
        name = vars(manager).get("model_name")
        return base if name == "tokprune" else name

    def set_name(manager: TaskManager, name: Any) -> None:
        vars(manager)["model_name"] = name

    TaskManager.model_name = property(model_name, set_name)  # type: ignore[assignment]


class Tokprune(lmms):
    """Model ``tokprune`` of lmms-eval, where ``--force_simple`` is given.

    No object of this class is ever made: :meth:`create_from_arg_string` returns one of a class
    derived from the wrapped model's.
    """

    force_simple = True

    @classmethod
    def create_from_arg_string(  # type: ignore[override]
        cls, arg_string: str, additional_config: dict[str, Any] | None = None
    ) -> Any:
        """The wrapped model, patched.

        Raises:
            ValueError, TypeError, OSError, ImportError: as
                :func:`~tokprune.integrations.lmms_eval.arguments.read_arguments`, before any
                weight is read.
            UnsupportedModelError: the wrapped class holds no model that can be patched.
        """
        return make(read_arguments(arg_string, cls.force_simple), additional_config)


class TokpruneChat(Tokprune):
    """Model ``tokprune`` of lmms-eval: wraps the chat class of a model where it has one."""

    is_simple = False
    force_simple = False
