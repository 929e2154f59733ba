"""The model under test, with everything that is known of it before the first question."""

from __future__ import annotations

import dataclasses
import gc
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tokprune.checkpoint import check_place
from tokprune.eval.sweep.identity import checkpoint_hash
from tokprune.families import BoundModel, bind
from tokprune.loading import load
from tokprune.models import resolve


@dataclass(frozen=True)
class LoadedModel(BoundModel):
    """A loaded model and its processor."""

    #: folder or hub name, as typed
    name: str
    processor: Any
    device: torch.device
    #: "float32", …
    dtype: str

    @classmethod
    def load(
        cls,
        name: str,
        dtype: str = "auto",
        device: str = "auto",
        trust_remote_code: bool = False,
    ) -> LoadedModel:
        """Load a checkpoint for answering.

        Raises:
            ValueError: no CUDA device where one is wanted.
            OSError: no such checkpoint, or a broken file in it.
            UnsupportedModelError: not of a supported class.
        """
        place = device
        if device == "auto":
            place = "cuda" if torch.cuda.is_available() else "cpu"
        elif device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device=cuda: no CUDA device is available")
        path = resolve(os.path.expanduser(name))
        check_place(path)
        model, processor = load(
            path, processor=True, dtype=dtype,
            trust_remote_code=trust_remote_code,
        )  # fmt: skip
        if dtype == "auto" and place == "cpu" and model.dtype == torch.float16:
            model = model.float()  # CPUs have no fast half precision
        model = model.to(place).eval()
        processor.tokenizer.padding_side = "left"
        return cls(
            **vars(bind(model)),
            name=name,
            processor=processor,
            device=model.device,
            dtype=str(model.dtype).removeprefix("torch."),
        )

    def released(self) -> LoadedModel:
        """What is known of it, without the model itself, whose memory is handed back."""
        bare: Any = {"model": None, "processor": None, "parts": None}
        facts = dataclasses.replace(self, **bare)
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return facts

    def describe(self) -> dict[str, Any]:
        """The ``model`` entry of run.json."""
        return {
            "name": self.name,
            "class": type(self.model).__name__,
            "family": self.family.name,
            "hash": checkpoint_hash(self.folder()),
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "visual_tokens": self.facts.max_visual_tokens,
            "decoder_layers": self.facts.decoder_layers,
            "dtype": self.dtype,
        }

    def folder(self) -> Path:
        """The folder it was loaded from, or its snapshot in the hub's cache."""
        home = Path(self.model.name_or_path)
        if home.is_dir():
            return home
        from transformers.utils import cached_file

        config = cached_file(str(self.model.name_or_path), "config.json")
        assert config is not None
        return Path(config).parent
