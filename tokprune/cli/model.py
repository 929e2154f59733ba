"""Load the model that a command line names."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any

from tokprune.cli.app import BadInput
from tokprune.cli.values import Device, Dtype


def place_of(device: Device) -> str:
    """Where to run: "cuda" or "cpu"."""
    import torch

    available = torch.cuda.is_available()
    if device is Device.cuda and not available:
        raise BadInput("--device cuda: no CUDA device is available")
    if device is Device.auto:
        return "cuda" if available else "cpu"
    return device.value


def quiet() -> None:
    """transformers says errors only, and draws no bars where nobody sees them."""
    import transformers

    transformers.logging.set_verbosity_error()
    if not sys.stderr.isatty():
        transformers.logging.disable_progress_bar()


@contextlib.contextmanager
def naming_option() -> Iterator[None]:
    """Errors about ``model X`` become errors about ``--model X``."""
    try:
        yield
    except (OSError, ValueError) as error:
        if not str(error).startswith("model "):
            raise
        raise BadInput(f"--{error}") from None


def load_model(
    path: str, place: str, dtype: Dtype, method: Any = None, **options: Any
) -> tuple[Any, Any]:
    """Model, with the method at work, and processor."""
    from tokprune.loading import load

    quiet()
    path = os.path.expanduser(path)
    with naming_option():
        model, processor = load(path, method, processor=True, dtype=dtype.value, **options)
    return model.to(place).eval(), processor
