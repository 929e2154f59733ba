"""The family interface: parts of a model, tiles of an image, order of its features."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tokprune.engine.stages import ModelFacts, Per
from tokprune.engine.tap import TapFunction, install_tap
from tokprune.errors import UnsupportedModelError

if TYPE_CHECKING:
    from tokprune.engine.entry import Entry
    from tokprune.engine.session import Session


@dataclass(frozen=True)
class Parts:
    """The modules of one model that the engine hooks.

    ``multimodal`` is the module whose forward calls ``language_model`` with the embedded prompt
    (in transformers it owns ``get_image_features``); ``rotary``: (hidden, positions [B, L]) → cos,
    sin [B, L, d]; ``encoder_layers`` have ``self_attn``, ``layer_norm2`` and ``mlp``;
    ``decoder_layers`` have ``self_attn`` (``q_proj``, ``k_proj``), ``input_layernorm``, ``mlp``.
    """

    multimodal: Any
    tower: Any
    encoder_layers: list[Any]
    projector: Any
    language_model: Any
    decoder_layers: list[Any]
    rotary: Any
    image_token_id: int
    video_token_id: int | None = None
    #: pools the frames of a video before the projector, in models that do
    resampler: Any = None

    def visual(self, input_ids: Tensor) -> Tensor:
        """[B, L] bool: which of the ids [B, L] stand for images and videos."""
        found = input_ids == self.image_token_id
        return found if self.video_token_id is None else found | (input_ids == self.video_token_id)


@dataclass(frozen=True)
class Door:
    """How the patches of an image become fewer cells, where the model pools or shrinks its tiles
    between tower and prompt.

    ``grids``: (height, width) at the language model's door of every frame of a video, or of the
    base tile and the map of all crops; their cells are numbered one grid after the other.
    ``mean``: values [tiles, N] of the tower's patches (float) → [cells], averaged as the features
    are (where those are not averaged, over the patches that the cell covers). ``nearest``
    [tiles · N] (CPU): the cell that shows each patch, −1 where it is cropped away; None for videos.
    """

    grids: tuple[tuple[int, int], ...]
    mean: Callable[[Tensor], Tensor]
    nearest: Tensor | None = None


@dataclass(frozen=True)
class ImageLayout:
    """How the feature rows of one image's tiles become its prompt tokens.

    ``packed`` [n] (CPU): for each prompt token of the image, in order, ``tile · F + row`` of the
    feature it takes (F = feature rows per tile), or −1 for a newline token. ``tiles``: number of
    tiles, base included. ``size``: (height, width) in pixels or None. ``tile_grid``: tiles (down,
    across) of the stitched picture, base excluded, (0, 0) where there is only the base.

    A video is one image: its ``frames`` (1 for a still picture) are its tiles, in order.
    ``door``: where the model pools or shrinks the tiles; ``packed`` then numbers cells at the door.
    ``projected``: rows of a tile that the projector sees, where they are not F. ``first_frame``:
    of a part of a video.
    """

    packed: Tensor
    tiles: int
    size: tuple[int, int] | None = None
    tile_grid: tuple[int, int] = (0, 0)
    frames: int = 1
    video: bool = False
    door: Door | None = None
    projected: int | None = None
    first_frame: int = 0

    def parts(self, per: Per) -> list[ImageLayout]:
        """The video cut into the parts that are compressed as one; a still picture as it is."""
        if not self.video or per == "video" or (per != "frame" and per >= self.frames):
            return [self]
        length = 1 if per == "frame" else per
        cells = int((self.packed >= 0).sum()) // self.frames
        parts = []
        for first in range(0, self.frames, length):
            last = min(first + length, self.frames)
            # newline tokens that end the video stay with its last part
            end = len(self.packed) if last == self.frames else last * cells
            own = self.packed[first * cells : end]
            door = self.door
            if door is not None:
                door = replace(door, grids=door.grids[first:last])
            parts.append(
                replace(
                    self, packed=torch.where(own < 0, own, own - first * cells),
                    tiles=last - first, frames=last - first, door=door, first_frame=first,
                )
            )  # fmt: skip
        return parts


class Family(ABC):
    """Differences between model architectures; one instance per architecture, stateless."""

    #: short name, also used by method presets
    name: str
    #: class names of the transformers models this family covers
    model_classes: tuple[str, ...]
    #: tiles and newline tokens (anyres)
    tiled: bool = False
    #: attention modules as in transformers 4.36/4.37: rotary tables of their own, masks of full
    #: shape [B, 1, queries, keys]
    old: bool = False

    @abstractmethod
    def parts(self, model: nn.Module) -> Parts: ...

    @abstractmethod
    def layouts(
        self, parts: Parts, pixel_values: Tensor, image_sizes: Any, facts: ModelFacts,
        batch_num_images: Any = None,
    ) -> list[ImageLayout]:  # fmt: skip
        """One layout per image of ``pixel_values``; host work only. ``batch_num_images``: images
        of each prompt, for families that tile single images only."""

    def video_layouts(
        self, parts: Parts, pixel_values: Tensor, facts: ModelFacts
    ) -> list[ImageLayout]:
        """One layout per video of ``pixel_values`` [videos, frames, 3, H, W]; host work only."""
        raise NotImplementedError

    @abstractmethod
    def max_tiles(self, model: nn.Module) -> int: ...

    def entry(self, session: Session) -> Entry:
        """How pictures and prompts get into a model of this family."""
        from tokprune.engine.entry import TransformersEntry

        return TransformersEntry(session)

    def tap(self, module: Any, function: TapFunction, wanted: Callable[[], bool]) -> Any:
        """Tap an attention module (:func:`tokprune.engine.tap.install_tap`)."""
        return install_tap(module, function, wanted)

    def window(self, parts: Parts, backend: str) -> int | None:
        """Width of the decoder's sliding window in tokens, or None."""
        config = parts.language_model.config
        if not getattr(config, "use_sliding_window", True):
            return None
        return getattr(config, "sliding_window", None)

    def newline(self, parts: Parts) -> Tensor | None:
        """The learned newline embedding, where the family has one."""
        return None

    def facts(self, model: nn.Module, parts: Parts) -> ModelFacts:
        config: Any = model.config
        vision = config.vision_config
        side = vision.image_size // vision.patch_size
        has_cls = tower_has_cls(parts.tower)
        strategy = config.vision_feature_select_strategy
        cls_in_features = has_cls and strategy == "full"
        tokens = side * side + int(cls_in_features)
        if not has_cls and strategy == "default":
            raise UnsupportedModelError(
                "config.vision_feature_select_strategy='default' cuts the first patch of a vision "
                f"tower without class token ({type(parts.tower).__name__}); it should be 'full'"
            )
        layers = len(parts.encoder_layers)
        tiles = self.max_tiles(model)
        newlines = side * max(tiles - 1, 0) if self.tiled else 0
        return ModelFacts(
            family=self.name,
            encoder_layers=layers,
            feature_layer=feature_layer(config.vision_feature_layer, layers),
            grid=(side, side),
            tokens_per_tile=tokens,
            has_cls=has_cls,
            cls_in_features=cls_in_features,
            max_tiles=tiles,
            tiled=self.tiled,
            max_visual_tokens=tiles * tokens + newlines,
            decoder_layers=len(parts.decoder_layers),
        )


def with_videos(facts: ModelFacts, parts: Parts, frame_grid: tuple[int, int]) -> ModelFacts:
    """Facts of a model that takes videos, too: how many frames they have nobody knows, but no more
    tokens than the decoder has positions."""
    positions = getattr(parts.language_model.config, "max_position_embeddings", 0)
    return replace(
        facts, videos=True, frame_grid=frame_grid,
        max_visual_tokens=max(facts.max_visual_tokens, positions),
    )  # fmt: skip


def feature_layer(setting: int | list[int], layers: int) -> int | None:
    """0-based encoder layer whose output a transformers ``vision_feature_layer`` names.

    ``hidden_states`` has L+1 entries, the first being the embeddings, hence −2 → layer L−2.
    None for a list of layers.
    """
    if not isinstance(setting, int):
        return None
    return (setting if setting >= 0 else layers + 1 + setting) - 1


def tower_has_cls(tower: nn.Module) -> bool:
    """Whether the vision tower's row 0 is a class token (CLIP yes, SigLIP no)."""
    inner = getattr(tower, "vision_model", tower)
    return hasattr(inner.embeddings, "class_embedding")


def encoder_layers_of(tower: nn.Module) -> list[nn.Module]:
    """The blocks of a CLIP or SigLIP tower, under 4.x and 5.x layouts."""
    inner = getattr(tower, "vision_model", tower)
    encoder = getattr(inner, "encoder", None)
    layers = list(getattr(encoder, "layers", []))
    names = ("self_attn", "layer_norm1", "layer_norm2", "mlp")
    if not layers or not all(hasattr(layers[0], n) for n in names):
        raise UnsupportedModelError(
            f"vision tower {type(tower).__name__} is not supported: expected a CLIP or SigLIP "
            "vision model (blocks with self_attn, layer_norm1, layer_norm2, mlp)"
        )
    return layers


def decoder_layers_of(language_model: Any) -> list[nn.Module]:
    """The blocks of a Llama-like decoder."""
    layers = list(getattr(language_model, "layers", []))
    if (
        not layers
        or not all(hasattr(layers[0], n) for n in ("self_attn", "input_layernorm", "mlp"))
        or not all(hasattr(layers[0].self_attn, n) for n in ("q_proj", "k_proj", "v_proj"))
    ):
        raise UnsupportedModelError(
            f"decoder {type(language_model).__name__} is not supported: expected Llama, Mistral "
            "or Qwen2 (blocks with input_layernorm, self_attn.{q,k,v}_proj, mlp)"
        )
    kinds = set(getattr(language_model.config, "layer_types", None) or [])
    if len(kinds) > 1:
        raise UnsupportedModelError(
            f"decoder {type(language_model).__name__} mixes attention kinds ({sorted(kinds)}); "
            "supported are decoders that slide in every layer or in none"
        )
    if hasattr(layers[0].self_attn, "q_norm"):
        raise UnsupportedModelError(
            f"decoder {type(language_model).__name__} normalises its queries and keys; "
            "supported decoders are Llama, Mistral and Qwen2"
        )
    return layers


def llava_parts(model: Any) -> Parts:
    """Parts of LLaVA-shaped models (LLaVA-1.5, LLaVA-NeXT) in transformers ≥ 4.57."""
    multimodal = model.model
    language_model = multimodal.language_model
    return Parts(
        multimodal=multimodal,
        tower=multimodal.vision_tower,
        encoder_layers=encoder_layers_of(multimodal.vision_tower),
        projector=multimodal.multi_modal_projector,
        language_model=language_model,
        decoder_layers=decoder_layers_of(language_model),
        rotary=language_model.rotary_emb,
        image_token_id=model.config.image_token_id,
    )


_FAMILIES: dict[str, Family] = {}
_REFUSED: dict[str, str] = {}


def register_family(family: Family) -> None:
    """Make a family known; later registrations of the same model class win."""
    for name in family.model_classes:
        _FAMILIES[name] = family


def refuse_model(name: str, reason: str) -> None:
    """Say why models of this class cannot be patched, where there is more to say than that they
    are unknown."""
    _REFUSED[name] = reason


def supported_models() -> list[str]:
    """Names of the transformers model classes that can be patched."""
    return sorted(_FAMILIES)


def family_of(model: nn.Module) -> Family:
    """Family of a model.

    Raises:
        UnsupportedModelError: the model's class is refused (says why) or not known (lists those
            that are).
    """
    for cls in type(model).__mro__:
        if cls.__name__ in _FAMILIES:
            return _FAMILIES[cls.__name__]
        if cls.__name__ in _REFUSED:
            raise UnsupportedModelError(
                f"model {cls.__name__} is not supported: {_REFUSED[cls.__name__]}"
            )
    raise UnsupportedModelError(
        f"model {type(model).__name__} is not supported; known model classes: "
        + ", ".join(supported_models())
    )
