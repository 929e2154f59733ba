"""Videos as lists of frames, for transformers' processors where torchvision is not installed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import BatchFeature
from transformers.video_utils import VideoMetadata

#: of a video processor's config: what happens to every frame
FRAME_OPTIONS = (
    "crop_size", "do_center_crop", "do_convert_rgb", "do_normalize", "do_rescale", "do_resize",
    "image_mean", "image_std", "resample", "rescale_factor", "size",
)  # fmt: skip


class FrameVideos:
    """Stands in for a video processor: frames of one size, each made into pixels by Pillow.

    Args:
        options: config of the video processor (or of the image processor, in older checkpoints).
    """

    #: what processors ask of theirs
    num_frames: int | None = None
    fps: float | None = None
    model_input_names: tuple[str, ...] = ("pixel_values_videos",)

    def __init__(self, options: Mapping[str, Any]) -> None:
        self.options = {
            "do_center_crop": False, **{n: options[n] for n in FRAME_OPTIONS if n in options}
        }  # fmt: skip

    def __call__(
        self,
        videos: Sequence[Sequence[Any]],
        video_metadata: Any = None,
        return_metadata: bool = False,
        **kwargs: Any,
    ) -> BatchFeature:
        """Pixels of videos.

        Args:
            videos: lists of frames (PIL images).
            video_metadata: of each, what :class:`transformers.video_utils.VideoMetadata` holds.
            return_metadata: hand it on, under its name.
            kwargs: others that processors pass on, which change nothing here.

        Raises:
            ValueError: a video that is no list of frames, or videos that do not fit together.
        """
        for clip in videos:
            if not isinstance(clip, (list, tuple)) or not clip:
                raise ValueError(f"videos: {clip!r} should be a list of a video's frames")
        data: dict[str, Any] = dict(self.pixels([list(clip) for clip in videos]))
        if return_metadata:
            told = video_metadata or [None] * len(videos)
            data["video_metadata"] = [_metadata(own, clip) for own, clip in zip(told, videos)]
        return BatchFeature(data)

    def pixels(self, videos: list[list[Any]]) -> dict[str, Tensor]:
        """``pixel_values_videos`` [videos, frames, 3, height, width]."""
        if len(lengths := {len(clip) for clip in videos}) > 1:
            raise ValueError(
                f"videos of {sorted(lengths)} frames in one batch; they should have equally many"
            )
        return {"pixel_values_videos": torch.stack([self._shown(clip) for clip in videos])}

    def _shown(self, frames: list[Any], **changes: Any) -> Tensor:
        """[frames, 3, height, width]"""
        from transformers import CLIPImageProcessor

        own = CLIPImageProcessor(**{**self.options, **changes})
        shown: Tensor = own(frames, return_tensors="pt")["pixel_values"]
        return shown


class PatchedVideos(FrameVideos):
    """The same for Qwen-VL and GLM-4V, whose videos are patches of some frames together.

    Args:
        options: config of the video processor.
        by_frame: the limits of pixels hold for every frame, and not for all of them together.
    """

    model_input_names = ("pixel_values_videos", "video_grid_thw")

    def __init__(self, options: Mapping[str, Any], by_frame: bool) -> None:
        super().__init__(options)
        self.by_frame = by_frame
        self.patch_size: int = options["patch_size"]
        self.merge_size: int = options.get("merge_size", 2)
        self.temporal_patch_size: int = options.get("temporal_patch_size", 2)
        unit = (self.patch_size * self.merge_size) ** 2  # transformers' defaults: 128 to 768 tokens
        size = {"shortest_edge": 128 * unit, "longest_edge": 768 * unit}
        size |= options.get("size") or {}
        for edge, name in (("shortest_edge", "min_pixels"), ("longest_edge", "max_pixels")):
            if options.get(name) is not None:
                size[edge] = options[name]
        self.size: dict[str, int] = size

    def pixels(self, videos: list[list[Any]]) -> dict[str, Tensor]:
        """``pixel_values_videos`` [patches, 3 · frames in a patch · patch²] of all videos, four
        patches that become a token one after the other, and ``video_grid_thw`` [videos, 3]."""
        found = [self._patches(clip) for clip in videos]
        grids = torch.tensor([grid for _, grid in found])
        return {
            "pixel_values_videos": torch.cat([patches for patches, _ in found]),
            "video_grid_thw": grids,
        }

    def _patches(self, frames: list[Any]) -> tuple[Tensor, tuple[int, int, int]]:
        t, p, m = self.temporal_patch_size, self.patch_size, self.merge_size
        width, height = frames[0].size
        rows, columns = fitted(
            height, width, p * m, self.size["shortest_edge"], self.size["longest_edge"],
            *((1, 1) if self.by_frame else (len(frames), t)),
        )  # fmt: skip
        frames = frames + frames[-1:] * (-len(frames) % t)
        shown = self._shown(
            frames, size={"height": rows, "width": columns}, do_resize=True, do_center_crop=False
        )
        grid = (len(frames) // t, rows // p, columns // p)
        cut = shown.view(grid[0], t, 3, grid[1] // m, m, p, grid[2] // m, m, p)
        patches = cut.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(math.prod(grid), -1)
        return patches, grid


def fitted(
    height: int, width: int, unit: int, least: int, most: int, frames: int = 1, step: int = 1
) -> tuple[int, int]:
    """(height, width) in whole units that is nearest to a size, with between ``least`` and
    ``most`` pixels in all frames together (rounded to whole steps), and about the same shape."""
    if frames > 1 and min(height, width) < unit:
        grow = unit / min(height, width)
        height, width = int(height * grow), int(width * grow)
    rows, columns = (round(side / unit) * unit for side in (height, width))
    pixels = max(step, round(frames / step) * step) * rows * columns
    scale = math.sqrt(frames * height * width / (most if pixels > most else least))
    if pixels > most:
        rows, columns = (max(unit, int(side / scale / unit) * unit) for side in (height, width))
    elif pixels < least:
        rows, columns = (math.ceil(side / scale / unit) * unit for side in (height, width))
    return rows, columns


def _metadata(told: Any, frames: Sequence[Any]) -> Any:
    if told is None:
        return VideoMetadata(total_num_frames=len(frames), frames_indices=[*range(len(frames))])
    return VideoMetadata(**told) if isinstance(told, Mapping) else told
