"""What the API process does: count the tokens that an image will leave, before it is encoded."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.parse import ImageProcessorItems

from tokprune.engine.model import ImageLayout
from tokprune.integrations.vllm.hosts import Hosts, encoded, keep_of, without_keep
from tokprune.integrations.vllm.setting import KEY

if TYPE_CHECKING:
    from vllm.multimodal.processing import BaseMultiModalProcessor as Processor
else:
    Processor = object

#: field of an image: the ``keep`` of its request
FIELD = "tokprune_keep"


class Counting(Processor):
    """Stands before the processor of a model of vLLM."""

    #: what the processor of transformers makes with one entry for each image
    per_image = "pixel_values"

    def __init__(self, info: Any, dummy_inputs: Any) -> None:
        super().__init__(info, dummy_inputs)
        self.hosts = Hosts(info.get_hf_config())

    def layout_of(self, images: Any, number: int, out: Any) -> ImageLayout:
        """How the model packs an image.

        Args:
            images: those of the request.
            number: of the image among them.
            out: what the processor of transformers made of all.
        """
        size = images.get_image_size(number)
        return self.hosts.layout(size.height, size.width)

    def get_dummy_inputs(self, *args: Any, **kwargs: Any) -> Any:
        """The image that memory is measured with leaves as much as any may."""
        inputs = super().get_dummy_inputs(*args, **kwargs)
        most = self.hosts.setting.max_keep
        if most is not None:
            inputs.hf_processor_mm_kwargs = {
                **inputs.hf_processor_mm_kwargs, KEY: {"keep": most},
            }  # fmt: skip
        return inputs

    def _apply_hf_processor_main(self, mm_items: Any, hf_kwargs: Mapping[str, object]) -> Any:
        keep = encoded(keep_of(hf_kwargs))
        made = super()._apply_hf_processor_main(mm_items, without_keep(hf_kwargs))
        if "pixel_values" in made:
            number = len(made[self.per_image])
            made[FIELD] = torch.full((number,), keep, dtype=torch.float64)
        return made

    def _get_mm_fields_config(
        self, hf_inputs: Any, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> Mapping[str, Any]:
        fields = super()._get_mm_fields_config(hf_inputs, without_keep(hf_processor_mm_kwargs))
        return {**fields, FIELD: MultiModalFieldConfig.batched("image", keep_on_cpu=True)}

    def _get_mm_hashes(self, inputs: Any) -> Any:
        """Caches that several engines share know images by these, and uuids of clients take the
        place of all else."""
        hashes = dict(super()._get_mm_hashes(inputs))
        if "image" in hashes:
            ending = f"-{KEY}-{self.hosts.setting.digest}"
            hashes["image"] = [own + ending for own in hashes["image"]]
        return hashes

    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, object], out_mm_kwargs: Any
    ) -> Sequence[Any]:
        keep = keep_of(hf_processor_mm_kwargs)
        updates = super()._get_prompt_updates(
            mm_items=mm_items,
            hf_processor_mm_kwargs=without_keep(hf_processor_mm_kwargs),
            out_mm_kwargs=out_mm_kwargs,
        )
        if self.hosts.own is None and keep is None:
            return updates

        def shorter(update: Any) -> Any:
            theirs = update.replacement

            def replacement(number: int) -> Any:
                whole = theirs(number) if callable(theirs) else theirs
                images = mm_items["image"]
                if not isinstance(images, ImageProcessorItems):
                    return whole  # features of a client's own
                layout = self.layout_of(images, number, out_mm_kwargs)
                return shortened(whole, layout.count, self.hosts.count(layout, keep))

            return replace(update, replacement=replacement)

        return [shorter(own) if own.modality == "image" else own for own in updates]


def shortened(whole: Any, count: int, left: int) -> Any:
    """What stands for an image in a prompt, a list of tokens or more details, with ``left``
    placeholders instead of ``count`` in every run of them.

    Raises:
        RuntimeError: vLLM does not make as many as the model of transformers.
    """
    alone = isinstance(whole, list)
    tokens: list[int] = whole if alone else whole.full
    every = alone or whole.is_embed is None
    embeds = [True] * len(tokens) if every else whole.is_embed(tokens).tolist()
    found: list[int] = []
    for is_embed, pairs in itertools.groupby(zip(tokens, embeds), key=lambda own: own[1]):
        run = [token for token, _ in pairs]
        if is_embed and (len(run) != count or len(set(run)) > 1):
            raise RuntimeError(
                f"tokprune in vLLM: {len(run)} placeholders for an image of which the model of "
                f"transformers makes {count} tokens; please report this"
            )
        found += run[:1] * left if is_embed else run
    return found if alone else replace(whole, full=found)
