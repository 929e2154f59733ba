"""How likely a continuation is: requests of tasks with choices, at what a method left of their
prompt. Most models of lmms-eval answer none, and the others look for logits at the places of the
whole prompt, so they are answered here, in the same way for all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from PIL import Image

from tokprune.engine.labels import IGNORED
from tokprune.inputs.prompts import model_inputs, prompt_text
from tokprune.likelihood import log_likelihood

#: what lmms-eval's models call their processor
_PROCESSORS = ("processor", "_processor", "_image_processor")


def processor_of(lm: Any) -> Any:
    """The processor of the wrapped model.

    Raises:
        NotImplementedError: it has none of transformers'.
    """
    found = (getattr(lm, name, None) for name in _PROCESSORS)
    processor = next((p for p in found if hasattr(p, "tokenizer")), None)
    if processor is None:
        raise NotImplementedError(
            f"{type(lm).__name__} holds no processor of transformers, which loglikelihood requests "
            "take; use tasks that generate"
        )
    return processor


@torch.inference_mode()
def answer(
    lm: Any, model: Any, request: Any, change: Callable[[Any], Any] | None
) -> tuple[float, bool]:
    """Of one request the loss, as lmms-eval's models give it (mean over the tokens of the
    continuation; it takes the choice of the smallest), and whether greedy decoding says the same.

    Args:
        change: what becomes of an image (a control), None: nothing.

    Raises:
        NotImplementedError: a request with something other than images.
    """
    context, target, see, number, task, split = request.args
    doc = lm.task_dict[task][split][number]
    continuation = target if isinstance(target, str) else str(target(doc))
    images = []
    for image in (see(doc) if callable(see) else see) or []:
        if not isinstance(image, Image.Image):
            raise NotImplementedError(
                f"loglikelihood requests take images, and task {task!r} gives "
                f"{type(image).__name__}: {str(image)[:80]!r}"
            )
        image = image.convert("RGB")
        images.append(image if change is None else change(image))
    processor = processor_of(lm)
    prompt = prompt_text(processor, context, images=len(images))
    if not (prompt[-1:].isspace() or continuation[:1].isspace()):
        continuation = f" {continuation}"
    made = [
        model_inputs(processor, [text], [images], model=model)
        for text in (prompt, prompt + continuation)
    ]
    before, whole = (len(inputs["input_ids"][0]) for inputs in made)
    labels = made[1]["input_ids"].clone()
    labels[:, : min(before, whole - 1)] = IGNORED
    device, dtype = model.device, model.dtype
    inputs = {
        name: value.to(device, dtype) if value.is_floating_point() else value.to(device)
        for name, value in made[1].items()
    }
    found = log_likelihood(model, inputs, labels.to(device))
    return -float(found.mean[0]), bool(found.all_greedy[0])
