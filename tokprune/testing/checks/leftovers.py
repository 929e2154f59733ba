"""Everything a patch could leave behind in a model."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.modules import module as torch_module
from transformers import PreTrainedModel

from tokprune.testing.case import Case
from tokprune.testing.report import Fault

HOOKS = (
    "_forward_pre_hooks",
    "_forward_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_hooks",
)
#: hooks that torch calls for every module
GLOBAL_HOOKS = ("_global_forward_pre_hooks", "_global_forward_hooks", "_global_backward_hooks")


def fingerprint(model: Any) -> dict[str, Any]:
    """Hooks, attributes, config, forwards; equal for a model as it was."""
    modules = list(model.named_modules())
    return {
        "hooks": {name: [sorted(getattr(m, h)) for h in HOOKS] for name, m in modules},
        "hooks of all modules": {h: sorted(getattr(torch_module, h)) for h in GLOBAL_HOOKS},
        "attributes": {name: sorted(m.__dict__) for name, m in modules},
        "config": model.config.to_dict(),
        "attention": [
            m.config._attn_implementation for _, m in modules if isinstance(m, PreTrainedModel)
        ],
        "configs": [id(m.config) for _, m in modules if hasattr(m, "config")],
        "forward": {name: type(m).forward for name, m in modules},
    }


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """What of a fingerprint changed, in words."""
    found = []
    for what, old in before.items():
        new = after[what]
        if old == new:
            continue
        if isinstance(old, dict):
            names = [n or "the model" for n in {**old, **new} if old.get(n) != new.get(n)]
            found.append(f"{what} of {', '.join(names)}")
        else:
            found.append(what)
    return found


def leaves_nothing(case: Case) -> str:
    """After the ``compress`` block the model is what it was."""
    inputs = case.inputs()
    with torch.no_grad():
        want = case.model(**inputs).logits  # transformers installs its own hooks lazily
        before = fingerprint(case.model)
        state = {name: value.clone() for name, value in case.model.state_dict().items()}
        with case.compress():
            case.model(**inputs)
        left = differences(before, fingerprint(case.model))
        left += [f"weight {n}" for n, v in case.model.state_dict().items() if v.ne(state[n]).any()]
        if left:
            raise Fault(f"the model is not as it was before the method ran: {'; '.join(left)}")
        got = case.model(**inputs).logits
    if not torch.equal(got, want):
        raise Fault(
            "without the method the model gives other logits than before it, by up to "
            f"{(got - want).abs().max().item():.3g}"
        )
    return "no hook, attribute, setting or weight of the model is other than before"
