"""The calls of ``generate`` that run on a patched model, and what their options mean for it."""

from __future__ import annotations

import copy
import functools
import inspect
import threading
import warnings
from collections.abc import Sequence
from typing import Any

#: options that make ``generate`` guess tokens, and check them together with its prompt
_ASSISTED = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit")
_CHUNKS = "prefill_chunk_size"


class Generations:
    """Stands before ``generate`` of one model, which is a method: no hook reaches it. ``visual``:
    names of the arguments that images and videos are passed by; ``alone``: the method at work,
    where it prunes the cache when the prompt has gone through, so that nothing can be guessed
    together with it."""

    def __init__(self, model: Any, visual: Sequence[str], alone: str | None = None) -> None:
        self.model, self.visual, self.alone = model, visual, alone
        self._thread = threading.local()
        self._own: Any = None
        self._before: Any = None

    @property
    def _prompts(self) -> list[int | None]:
        """Tokens of the prompts of the running calls of this thread that guess, innermost last;
        None: of one that does not."""
        stack: list[int | None] = self._thread.__dict__.setdefault("prompts", [])
        return stack

    def guesses(self, total: int) -> int:
        """How many of ``total`` tokens, cached ones included, are guesses behind the prompt."""
        prompt = self._prompts[-1] if self._prompts else None
        return 0 if prompt is None else max(0, total - prompt)

    def install(self) -> None:
        self._before, original = self.model.__dict__.get("generate"), self.model.generate
        signature = inspect.signature(original)

        @functools.wraps(original)
        def generate(*args: Any, **kwargs: Any) -> Any:
            call = signature.bind(*args, **kwargs).arguments
            options = call.pop("kwargs", {})
            config = call.get("generation_config") or self.model.generation_config
            given = {**call, **options}
            ids = given.get("inputs", given.get("input_ids"))
            assisted = [
                name for name in _ASSISTED
                if given.get(name, getattr(config, name, None)) is not None
            ]  # fmt: skip
            guesses = bool(assisted)
            if any(given.get(name) is not None for name in self.visual):
                # the images of a piece cannot be compressed for a question in another one, and
                # what is left of the prompt is short
                without = [_CHUNKS]
                if assisted and self.alone is not None:
                    warnings.warn(
                        f"{self.alone} prunes the KV cache of a prompt, so no token can be guessed "
                        f"together with it: decoded without {', '.join(assisted)}",
                        stacklevel=2,
                    )
                    without, guesses = [*without, *assisted], False
                call, options = self._leave_out(without, call, options)
            self._prompts.append(ids.shape[1] if ids is not None and guesses else None)
            try:
                return original(**call, **options)
            finally:
                self._prompts.pop()

        self._own = self.model.__dict__["generate"] = generate

    def _leave_out(
        self, names: list[str], call: dict[str, Any], options: dict[str, Any]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """A call of ``generate`` without some of its options, wherever they are set."""
        config = call.get("generation_config")
        default = self.model.generation_config
        for name in names:
            if getattr(config, name, None) is not None:
                config = copy.deepcopy(config)
                setattr(config, name, None)
                call = {**call, "generation_config": config}
            call = {n: value for n, value in call.items() if n != name}
            if options.get(name, getattr(default, name, None)) is not None:
                options = {**options, name: None}
        return call, options

    def remove(self) -> None:
        if self.model.__dict__.get("generate") is not self._own:
            return  # somebody has put another one before it, which calls it
        del self.model.__dict__["generate"]
        if self._before is not None:
            self.model.__dict__["generate"] = self._before
