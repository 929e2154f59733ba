"""The processor of a checkpoint; for videos, also where torchvision is not installed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any

import torch
from transformers import AutoProcessor, AutoTokenizer, BatchFeature
from transformers.processing_utils import ProcessorMixin

from tokprune.families import bind
from tokprune.inputs.frame_videos import FRAME_OPTIONS
from tokprune.inputs.processor_files import video_options
from tokprune.inputs.without_torchvision import load_without_torchvision

#: families of which :class:`FramesProcessor` makes the prompts
_OF_FRAMES = ("llava-next-video", "llava-onevision")


def load_processor(path: str | PathLike[str], model: Any, hub: Mapping[str, Any]) -> Any:
    """The processor of a model's checkpoint, for images, and for videos where the model takes
    them.

    transformers' video processors need torchvision, and so do the processors that hold one. Without
    it, LLaVA-NeXT-Video and LLaVA-OneVision get a :class:`FramesProcessor`, for videos alone; all
    others get transformers' own with a video processor of ours in it
    (:func:`~tokprune.inputs.without_torchvision.load_without_torchvision`).

    Args:
        path: the checkpoint.
        hub: options of the hub.

    Raises:
        OSError: no processor there.
        ImportError: the processor needs a package that is not installed.
    """
    try:
        return AutoProcessor.from_pretrained(path, **hub)
    except ImportError:
        if bind(model).family.name in _OF_FRAMES:
            return FramesProcessor.load(path, model, hub)
        return load_without_torchvision(path, model.config, hub)


class FramesProcessor:
    """Questions about videos as model inputs, by the image processor, frame by frame.

    It stands in for transformers' processors of LLaVA-NeXT-Video and LLaVA-OneVision, takes frames
    as images, and gives the same prompts. Pixels differ from theirs where frames are resized, by
    Pillow's rounding.

    Args:
        model: it is for.
        frames: makes the pixels of a frame.
        tokenizer: knows the video token.
        video_token: what stands for a video in a text.
        chat_template: for :meth:`apply_chat_template`, or None.
    """

    def __init__(
        self, model: Any, frames: Any, tokenizer: Any, video_token: str, chat_template: str | None
    ) -> None:
        self.image_processor, self.tokenizer = frames, tokenizer
        self.video_token, self.chat_template = video_token, chat_template
        self._known = bind(model)

    @classmethod
    def load(cls, path: str | PathLike[str], model: Any, hub: Mapping[str, Any]) -> FramesProcessor:
        """From the files that transformers' processor is loaded from.

        Raises:
            OSError: no such files.
        """
        from transformers import CLIPImageProcessor  # where torchvision is missing, it says so

        told, _ = ProcessorMixin.get_processor_dict(str(path), **hub)
        options = told.get("video_processor") or video_options(path, hub)
        tokenizer = AutoTokenizer.from_pretrained(path, **hub)
        given = {"do_center_crop": False, **{n: options[n] for n in FRAME_OPTIONS if n in options}}
        return cls(
            model, CLIPImageProcessor(**given), tokenizer, told.get("video_token", "<video>"),
            told.get("chat_template") or tokenizer.chat_template,
        )  # fmt: skip

    def __call__(
        self,
        images: Any = None,
        text: Sequence[str] | str = (),
        videos: Sequence[Sequence[Any]] | None = None,
        padding: bool = False,
        return_tensors: str | None = "pt",
        add_special_tokens: bool = True,
    ) -> BatchFeature:
        """Model inputs of prompts.

        Args:
            images: None; images need transformers' own processor.
            text: prompts, one video token for each of its videos.
            videos: lists of frames (PIL images), equally many of each, in the order of the prompts.
            padding: whether prompts of different lengths are padded.
            return_tensors: "pt".
            add_special_tokens: whether the tokenizer adds those that begin a prompt.

        Returns:
            ``input_ids``, ``attention_mask`` [B, L], ``pixel_values_videos`` [videos, frames, 3,
            height, width].

        Raises:
            ImportError: there are images, and torchvision is not installed.
            ValueError: a video that is no list of frames, videos of different lengths, another
                number of videos than the prompts have places for, or another kind of tensors.
        """
        if images is not None:
            raise ImportError(
                f"images for a model of family {self._known.family.name} need torchvision, which "
                "is not installed (take it from the same build as torch); videos do without"
            )
        if return_tensors != "pt":
            raise ValueError(f"return_tensors={return_tensors!r} should be 'pt'")
        texts = [text] if isinstance(text, str) else list(text)
        for clip in videos or ():
            if not isinstance(clip, (list, tuple)) or not clip:
                raise ValueError(f"videos: {clip!r} should be a list of a video's frames")
        clips = [list(clip) for clip in videos or ()]
        places = sum(prompt.count(self.video_token) for prompt in texts)
        if places != len(clips):
            raise ValueError(
                f"videos: {len(clips)} for prompts with {places} places ({self.video_token}); they "
                "should be as many"
            )
        data: dict[str, Any] = {}
        if clips:
            if len(lengths := {len(clip) for clip in clips}) > 1:
                raise ValueError(
                    f"videos of {sorted(lengths)} frames in one batch; they should have equally "
                    "many"
                )
            pixels = torch.stack([
                self.image_processor(clip, return_tensors="pt")["pixel_values"] for clip in clips
            ])  # fmt: skip
            known = self._known
            data[known.family.video_pixels] = pixels
            layout, *_ = known.family.videos(known.parts, known.facts, data)
            tokens = self.video_token * len(layout.packed)
            texts = [prompt.replace(self.video_token, tokens) for prompt in texts]
        encoded = self.tokenizer(
            texts, padding=padding, return_tensors="pt", add_special_tokens=add_special_tokens
        )
        return BatchFeature({**encoded, **data})

    def decode(self, *args: Any, **kwargs: Any) -> Any:
        """By the tokenizer."""
        return self.tokenizer.decode(*args, **kwargs)

    def batch_decode(self, *args: Any, **kwargs: Any) -> Any:
        """By the tokenizer."""
        return self.tokenizer.batch_decode(*args, **kwargs)

    def apply_chat_template(self, messages: Any, add_generation_prompt: bool = False) -> str:
        """The text of a conversation."""
        text: str = self.tokenizer.apply_chat_template(
            messages, chat_template=self.chat_template, tokenize=False,
            add_generation_prompt=add_generation_prompt,
        )  # fmt: skip
        return text
