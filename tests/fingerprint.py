"""Everything a patch could leave behind in a model."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

HOOKS = (
    "_forward_pre_hooks",
    "_forward_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_hooks",
)


def fingerprint(model: Any) -> dict[str, Any]:
    """Hooks, attributes, config, forwards; equal for a model as it was."""
    modules = list(model.named_modules())
    return {
        "hooks": {name: [sorted(getattr(m, h)) for h in HOOKS] for name, m in modules},
        "attributes": {name: sorted(m.__dict__) for name, m in modules},
        "config": model.config.to_dict(),
        "attention": [
            m.config._attn_implementation for _, m in modules if isinstance(m, PreTrainedModel)
        ],
        "configs": [id(m.config) for _, m in modules if hasattr(m, "config")],
        "forward": {name: type(m).forward for name, m in modules},
    }
