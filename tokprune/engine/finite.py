"""NaN and infinite features: one error, whatever a method's own arithmetic makes of them.

Whether features are finite is read at the end of a prefill, so that nothing waits for a device.
Where a method stumbles over them before that, the look is taken then.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tokprune.errors import NonFiniteFeaturesError


def not_finite() -> NonFiniteFeaturesError:
    return NonFiniteFeaturesError(
        "the embedded prompt (pixel_values through vision tower and projector, or inputs_embeds) "
        "holds NaN or infinite values; no ranking of tokens means anything there. Check "
        "pixel_values, and the dtype (float16 may overflow: try bfloat16)"
    )


def guarded(hook: Callable[..., Any], seen: Callable[[], Any]) -> Callable[..., Any]:
    """A hook whose exceptions become :class:`NonFiniteFeaturesError` where what it worked on was
    not finite.

    Args:
        hook: runs stages of a method.
        seen: what it works on: a tensor, or anything else where nothing is known.
    """

    @functools.wraps(hook)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return hook(*args, **kwargs)
        except Exception as error:
            blame(error, seen())
            raise

    return run


def blame(error: Exception, *seen: Any) -> None:
    """Raise :class:`NonFiniteFeaturesError` from an exception if any of these tensors holds NaN or
    infinity, or is the False of a look that was taken before."""
    if isinstance(error, NonFiniteFeaturesError):
        return
    for tensor in seen:
        if isinstance(tensor, Tensor):
            fine = tensor if tensor.dtype == torch.bool else tensor.isfinite()
            if not bool(fine.all()):
                raise not_finite() from error
