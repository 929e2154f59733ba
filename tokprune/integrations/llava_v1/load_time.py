"""Load-time patch of the original ``llava`` package (LLaVA 1.2.x on transformers 4.37).

From the command line, around any script that loads its model by
``llava.model.builder.load_pretrained_model``::

    python -m patches.llava --method flowcut --keep 128 -- \\
        -m llava.eval.model_vqa_loader --model-path … --question-file … --answers-file …

From Python, before the script's modules are imported::

    import patches.llava
    with patches.llava.installed("flowcut", keep=128) as traces:
        ...

Method and engine are tokprune's; all that happens here is that every model which the package's
loader returns is handed to :func:`tokprune.patch`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tokprune.api import patch
from tokprune.methods.base import Method
from tokprune.methods.registry import make_method
from tokprune.trace import Trace


@contextmanager
def installed(method: str | Method, **options: Any) -> Iterator[list[Trace]]:
    """Inside this block ``llava.model.builder.load_pretrained_model`` returns patched models.

    Modules that take the function by ``from … import`` must be imported inside the block.

    Args:
        method: a method name with ``options``, or a method object (see :func:`tokprune.patch`).

    Yields:
        The traces of the models loaded so far, in their order.

    Raises:
        ValueError, TypeError: bad method or option; nothing is loaded then.
        ImportError: the ``llava`` package is missing.
        tokprune.UnsupportedModelError: (when a model is loaded) it cannot be patched; says why.
    """
    made = make_method(method, **options)
    import llava.model.builder as builder

    original = builder.load_pretrained_model
    traces: list[Trace] = []

    @functools.wraps(original)
    def load_pretrained_model(*args: Any, **kwargs: Any) -> Any:
        loaded = original(*args, **kwargs)
        traces.append(patch(loaded[1], made))  # tokenizer, model, image_processor, context_len
        return loaded

    builder.load_pretrained_model = load_pretrained_model
    try:
        yield traces
    finally:
        builder.load_pretrained_model = original
