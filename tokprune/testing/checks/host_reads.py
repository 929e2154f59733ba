"""Whether a forward reads values back from the device.

The model runs on the meta device, where tensors have shapes but no values: whatever reads one
(``.item()``, ``.tolist()``, ``nonzero``, a boolean index, an ``if``) raises. Two reads of every
prefill are stood in for: where the images are in the prompt (once, at its start), and whether the
features were finite (at its end).
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import transformers
from torch import Tensor

from tokprune.api import compress
from tokprune.engine import entry, session
from tokprune.engine.cache import cache_argument
from tokprune.families import bind
from tokprune.testing.case import Case

#: host-side inputs of the models
_ON_HOST = ("image_sizes", "batch_num_images")


def can_find_host_reads() -> bool:
    """transformers 4 reads the placeholders itself."""
    return not transformers.__version__.startswith("4.")


@contextmanager
def without_values(model: Any, inputs: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """``model`` on the meta device, for good, and ``inputs`` there, without their attention mask;
    inside the block it takes them, compressed or not, as long as nothing else reads a value."""
    bound = bind(model)
    kind = bound.family.placeholders(bound.parts, inputs)
    read = entry.read_layout
    with ExitStack() as stack:

        def stand_in(module: object, name: str, value: object) -> None:
            if hasattr(module, name):
                stack.enter_context(mock.patch.object(module, name, value))

        stand_in(entry, "read_layout", lambda v, mask, past, *rest: read(kind, None, past, *rest))
        stand_in(session, "_check_finite", lambda finite: None)
        # the models' own comparison of placeholders and features
        for cls in type(model).__mro__:
            stand_in(sys.modules[cls.__module__], "torch_compilable_check", lambda *a, **k: None)
        model.to("meta")
        moved = {n: v if n in _ON_HOST else v.to("meta") for n, v in inputs.items()}
        moved.pop("attention_mask", None)
        yield moved


def host_read(case: Case) -> str | None:
    """Where a prefill or a cached step first needs a value on the host, in words; None: nowhere.

    ``case.model`` is moved to the meta device, for good.
    """
    model, inputs = case.model, case.inputs()
    step = torch.zeros(len(inputs["input_ids"]), 1, dtype=torch.long, device="meta")
    with without_values(model, inputs) as moved:
        try:
            with compress(model, case.method, validate=False), torch.no_grad():
                out = model(**moved, use_cache=True)
                cache = {cache_argument(model): out.past_key_values}
                model(input_ids=step, use_cache=True, **cache)
        except (RuntimeError, NotImplementedError) as error:
            if not any(word in str(error).lower() for word in ("meta", "data-dependent")):
                raise
            first: BaseException = error  # a look for the reason of it reads as well
            while first.__context__ is not None:
                first = first.__context__
            return _place(first)
    return None


def _place(error: BaseException) -> str:
    """File, line and code of the innermost frame outside torch, einops and transformers."""
    others = ("torch", "transformers", "einops", "unittest")
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not any(f"/site-packages/{name}/" in frame.filename for name in others)
    ]
    frame = frames[-1]
    return f"{'/'.join(Path(frame.filename).parts[-3:])}:{frame.lineno}, {frame.line!r}"
