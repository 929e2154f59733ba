"""For the environment of the vLLM tests: lets a torchvision that was built for CUDA be imported
beside a torch for the CPU.

Such a torchvision stops at ``operator torchvision::nms does not exist``: the library that has its
operators cannot be loaded. Declared, though not there, they do no harm: transforms, which are all
that image processors use, need none of them.
"""

import importlib.abc
import sys

#: what was declared goes with the object that declared it
_declared = []


class _Declare(importlib.abc.MetaPathFinder):
    """Waits for torchvision to be imported, declares its operators, and steps aside."""

    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            library = torch.library.Library("torchvision", "DEF")
            for operator in ("nms", "qnms"):
                library.define(f"{operator}(Tensor dets, Tensor scores, float limit) -> Tensor")
            _declared.append(library)


sys.meta_path.insert(0, _Declare())
