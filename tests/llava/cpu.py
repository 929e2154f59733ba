"""Run something as ``python -m MODULE`` would, on a machine without a GPU: scripts of the llava
package name the device 'cuda' themselves. ``python cpu.py MODULE [ARGS]...``"""

from __future__ import annotations

import runpy
import sys
from typing import Any

import torch

_to = torch.Tensor.to


def to(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    args = tuple("cpu" if a == "cuda" else a for a in args)
    kwargs = {k: "cpu" if isinstance(v, str) and v == "cuda" else v for k, v in kwargs.items()}
    return _to(tensor, *args, **kwargs)


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.Tensor.to = to  # type: ignore[assignment]
    torch.Tensor.cuda = lambda tensor, *_: tensor  # type: ignore[method-assign]
    sys.argv = sys.argv[1:]
    sys.path[0] = ""
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
