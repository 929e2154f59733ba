"""Questions about images and videos as model inputs, for every family alike."""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from typing import Any, Literal

from tokprune.engine.compat import RELEASE
from tokprune.families import bind, unwrap
from tokprune.inputs.clips import Clip
from tokprune.inputs.pixel_limits import check_shape

#: what stands for an image or a video in a prompt, whatever the model's own word for it is
_PORTABLE = {"image": "<image>", "video": "<video>"}
#: markers that templates set around a place, and that are not to be doubled either
_BEFORE = r"(?:<\|vision_start\|>|<\|begin_of_image\|>|<\|begin_of_video\|>|<img>)?"
_AFTER = r"(?:<\|vision_end\|>|<\|end_of_image\|>|<\|end_of_video\|>|</img>)?"
#: prompts of processors without a chat template; ``{}`` is the question with its places
_PLAIN_FORMS = {"PaliGemmaProcessor": "{}", "PixtralProcessor": "<s>[INST]{}[/INST]"}
#: LLaVA-1.5's own form
_PLAIN_FORM = "USER: {} ASSISTANT:"
#: processors that want the images of every prompt in a list of their own
_LISTS = ("Gemma3Processor", "Gemma4Processor", "Idefics3Processor", "SmolVLMProcessor")


def prompt_text(processor: Any, question: str, images: int = 1, videos: int = 0) -> str:
    """The prompt of one question about some images and videos: by the processor's chat template,
    or in a plain form where it has none (LLaVA-1.5's; PaliGemma's and Pixtral's have their own).

    Images and videos come first, or where the question says so: ``<image>`` and ``<video>``, or the
    model's own words for them, are their places.

    Raises:
        ValueError: the question has places, but not as many as there are images or videos.
    """
    content = _content(processor, question, images, videos)
    if getattr(processor, "chat_template", None):
        text: str = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
        return text
    name = type(processor).__name__
    form = _PLAIN_FORMS.get(name, _PLAIN_FORM)
    words = {
        kind: getattr(processor, f"{kind}_token", None) or word for kind, word in _PORTABLE.items()
    }
    shown = "".join(part.get("text") or words.get(part["type"], "") for part in content)
    if form is _PLAIN_FORM and content[0]["type"] != "text":
        places = next((n for n, part in enumerate(content) if part["type"] == "text"), len(content))
        lead = "".join(words[part["type"]] for part in content[:places])
        shown = f"{lead}\n{shown[len(lead) :].lstrip(chr(10))}"
    return form.format(shown)


def _content(processor: Any, question: str, images: int, videos: int) -> list[dict[str, str]]:
    """What a chat template is given: text, images and videos in order."""
    kinds: dict[str, str] = {}
    for kind, word in _PORTABLE.items():
        own = getattr(processor, f"{kind}_token", None)
        kinds |= {word: kind, **({own: kind} if isinstance(own, str) else {})}
    words = "|".join(re.escape(word) for word in sorted(kinds, key=len, reverse=True))
    parts = re.split(f"{_BEFORE}({words}){_AFTER}", question)
    found = [kinds[word] for word in parts[1::2]]
    if not found:
        shown = ["image"] * images + ["video"] * videos
        return [*({"type": kind} for kind in shown), {"type": "text", "text": question}]
    for kind, given in (("image", images), ("video", videos)):
        if found.count(kind) != given:
            raise ValueError(
                f"prompt {question!r} has {found.count(kind)} place(s) for {kind}s, and there are "
                f"{given}; they should be as many, or the prompt without places"
            )
    content: list[dict[str, str]] = []
    for number, part in enumerate(parts):
        if number % 2:
            content.append({"type": kinds[part]})
        elif part:
            content.append({"type": "text", "text": part})
    return content


def model_inputs(
    processor: Any,
    texts: Sequence[str],
    images: Sequence[Sequence[Any]] = (),
    videos: Sequence[Sequence[Clip | list[Any]]] = (),
    *,
    model: Any = None,
    padding: bool = False,
) -> Any:
    """Model inputs of a batch of prompts.

    Args:
        processor: of the model.
        texts: prompts (:func:`prompt_text`).
        images: of every prompt its images, as :func:`tokprune.inputs.pictures.read_picture` gives
            them; () where no prompt has any. They go to the processor as they are: processors do
            not turn photos as their EXIF data say.
        videos: of every prompt its videos: clips, or lists of frames.
        model: what it takes and the processor leaves out is added (:func:`add_token_types`).
        padding: whether prompts of different lengths are padded.

    Raises:
        ImportError: these inputs need a package that is not installed.
        ValueError: videos that cannot stand in one batch; an image too long and thin to be
            processed.
    """
    for number, image in enumerate((image for own in images for image in own), 1):
        check_shape(processor, image, f"image {number}")
    given: dict[str, Any] = {"images": None}
    if any(images):
        lists = type(processor).__name__ in _LISTS
        given["images"] = (
            [list(own) for own in images] if lists else [image for own in images for image in own]
        )
    clips = [clip for own in videos for clip in own]
    if clips:
        given["videos"] = [clip.frames if isinstance(clip, Clip) else clip for clip in clips]
        for number, frames in enumerate(given["videos"], 1):
            check_shape(processor, frames[0], f"video {number}", video=True)
        if getattr(processor, "video_processor", None) is not None:
            # the frames are chosen already, and stood at known times
            given["do_sample_frames"] = False
            timed = [clip for clip in clips if isinstance(clip, Clip)]
            if len(timed) == len(clips):
                given["video_metadata"] = [clip.metadata() for clip in timed]
                if RELEASE < (5, 0) and type(processor).__name__ == "Qwen2_5_VLProcessor":
                    given["fps"] = [clip.shown_fps for clip in timed]  # it asks for nothing else
    begin = getattr(getattr(processor, "tokenizer", None), "bos_token", None)
    if begin and texts[0].startswith(begin):  # the template has it already
        given["add_special_tokens"] = False
    inputs = processor(text=list(texts), padding=padding, return_tensors="pt", **given)
    return inputs if model is None else add_token_types(model, inputs)


def add_token_types(model: Any, inputs: Any) -> Any:
    """Say which tokens are images and videos, where the model wants to be told and the inputs do
    not: without ``mm_token_type_ids`` models with M-RoPE in transformers 5 silently take
    positions on one axis, and without ``token_type_ids`` images of Gemma 3 are read as text."""
    takes = inspect.signature(type(unwrap(model)).forward).parameters
    missing = [
        name
        for name in ("mm_token_type_ids", "token_type_ids")
        if name in takes and inputs.get(name) is None
    ]
    if missing:
        known = bind(model)
        visual = known.family.placeholders(known.parts, inputs)
        for name in missing:
            # all of a PaliGemma prompt is the prefix, 0
            prefix = name == "token_type_ids" and known.family.name == "paligemma"
            inputs[name] = visual * 0 if prefix else visual
    return inputs


def encode(
    processor: Any,
    questions: Sequence[str],
    visuals: Sequence[Any],
    device: Any,
    media: Literal["image", "video"] = "image",
    model: Any = None,
) -> Any:
    """Model inputs of a batch, padded at the left.

    Args:
        visuals: one a question: an image or a list of some, or the list of a video's frames (PIL
            images; equally many frames in all videos of a batch).
        media: which of the two.
        model: as for :func:`model_inputs`.
    """
    video = media == "video"
    shown = [visual if isinstance(visual, list) and not video else [visual] for visual in visuals]
    images, videos = ([], shown) if video else (shown, [])
    texts = [
        prompt_text(processor, question, images=0 if video else len(own), videos=int(video))
        for question, own in zip(questions, shown, strict=True)
    ]
    made = model_inputs(processor, texts, images, videos, model=model, padding=True)
    return made.to(device)
