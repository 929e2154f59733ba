"""A model plug-in for lmms-eval: ``--model tokprune --model_args base=llava_hf,method=todre,…``.

lmms-eval finds it through the entry point ``tokprune`` of the group ``lmms_eval.models``. Nothing
but lmms-eval itself is imported until the model is asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lmms_eval.models.registry_v2 import ModelManifest


def manifest() -> ModelManifest:
    """What lmms-eval registers: the name, and the classes for ``--force_simple`` and without."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(
        model_id="tokprune",
        simple_class_path="tokprune.integrations.lmms_eval.model.Tokprune",
        chat_class_path="tokprune.integrations.lmms_eval.model.TokpruneChat",
    )
