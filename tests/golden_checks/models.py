"""Whole models of golden cases: weights into transformers classes, runs, and what methods saw."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextForConditionalGeneration,
)

import tokprune
from golden_checks.case import Case
from tokprune.engine.contracts import DecoderRun, ImageTokens, ModelFacts, Plan, Selection
from tokprune.methods.base import Method

CLASSES = {"llava": LlavaForConditionalGeneration, "llava_next": LlavaNextForConditionalGeneration}

# ------------------------------------------------------------------------------- weights


def canonical(name: str) -> str:
    """A parameter's name without the wrappers that differ between checkpoints and versions:
    ``language_model.model.norm.weight`` (hub), ``model.language_model.norm.weight`` (loaded) and
    ``model.norm.weight`` (bare Llama) are all ``norm.weight``."""
    wrappers = ("model", "language_model", "vision_model")
    return ".".join(part for part in name.split(".") if part not in wrappers)


def fill(model: nn.Module, weights: dict[str, Tensor], without: Sequence[str] = ()) -> None:
    """Copy weights into every parameter of a model, whatever its version calls them.

    Args:
        without: canonical prefixes of parameters that the weights do not have.

    Raises:
        AssertionError: a parameter without weight, a weight without parameter, or two weights
            or two parameters of one canonical name.
    """
    given = {canonical(name): value for name, value in weights.items()}
    assert len(given) == len(weights), "two weights of one name"
    own = {canonical(name): p for name, p in model.named_parameters()}
    assert len(own) == len(list(model.named_parameters())), "two parameters of one name"
    own = {name: p for name, p in own.items() if not name.startswith(tuple(without))}
    buffers = {canonical(name) for name, _ in model.named_buffers()}
    missing, unknown = set(own) - set(given), set(given) - set(own) - buffers
    unknown = {name for name in unknown if not name.endswith(("position_ids", "inv_freq"))}
    if "lm_head.weight" not in own:  # tied to the embedding: the same parameter
        unknown.discard("lm_head.weight")
    assert not missing, f"no weight for {sorted(missing)}"
    assert not unknown, f"no parameter for {sorted(unknown)}"
    with torch.no_grad():
        for name, p in own.items():
            assert p.shape == given[name].shape, f"{name}: {p.shape} != {given[name].shape}"
            p.copy_(given[name])


def _rope(config: dict[str, Any]) -> dict[str, Any]:
    """A text config whose rotary base both transformers generations read."""
    config = dict(config)
    rope = config.pop("rope_parameters", None) or {}
    theta = config.pop("rope_theta", rope.get("rope_theta", 10000.0))
    assert rope.get("rope_type", "default") == "default", rope
    if hasattr(LlamaConfig(), "rope_parameters"):
        config["rope_parameters"] = {"rope_type": "default", "rope_theta": theta}
    else:
        config["rope_theta"] = theta
    return config


def load_llava(weights: dict[str, Tensor], config: dict[str, Any], attention: str = "sdpa") -> Any:
    """A LLaVA or LLaVA-NeXT model from hub-named weights and a config dictionary."""
    config = {**config, "text_config": _rope(config["text_config"])}
    kind = config.pop("model_type")
    for name in ("transformers_version", "architectures", "dtype", "torch_dtype"):
        config.pop(name, None)
    made: Any = AutoConfig.for_model(kind, **config)
    made._attn_implementation = attention
    model = CLASSES[kind](made).eval()
    fill(model, weights)
    return model


def load_llama(weights: dict[str, Tensor], config: dict[str, Any], attention: str = "sdpa") -> Any:
    """A LLaVA around bare Llama weights; its tower and projector are there for the class only."""
    config = _rope(config)
    config.pop("model_type", None)
    vision = CLIPVisionConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=1,
        image_size=128, patch_size=2, projection_dim=8,  # 4096 tokens: any keep fits
    )  # fmt: skip
    made = LlavaConfig(
        vision_config=vision,
        text_config=LlamaConfig(**config),
        image_token_index=config["vocab_size"] - 1,
    )
    made._attn_implementation = attention
    model = LlavaForConditionalGeneration(made).eval()
    fill(model, weights, without=("vision_tower", "multi_modal_projector"))
    return model


# ------------------------------------------------------------------------------- inputs


def suffixes(case: Case, name: str) -> list[str]:
    """Suffixes of a case's samples: "" alone, ".0", ".1", … where there are several."""
    if name in case:
        return [""]
    found = sorted(int(key[len(name) + 1 :]) for key in case.t if key.startswith(f"{name}."))
    assert found == list(range(len(found))), found
    assert found
    return [f".{i}" for i in found]


def image_inputs(case: Case, tails: Sequence[str], ids: str = "input_ids") -> dict[str, Tensor]:
    """Model inputs of some samples of a LLaVA case, left-padded to one batch."""
    rows = [case[ids + tail].view(-1) for tail in tails]
    longest = max(len(row) for row in rows)
    pad = [longest - len(row) for row in rows]
    inputs = {
        "input_ids": torch.stack([_left(row, gap) for row, gap in zip(rows, pad)]),
        "attention_mask": torch.stack([_left(torch.ones_like(r), g) for r, g in zip(rows, pad)]),
    }
    pixels = [case["pixel_values" + tail].float() for tail in tails]
    if case.parameters["config"]["model_type"] == "llava_next":
        pixels = [x if x.dim() == 5 else x[None] for x in pixels]
        tiles = max(x.shape[1] for x in pixels)
        empty = (0, 0, 0, 0, 0, 0)
        pixels = [nn.functional.pad(x, (*empty, 0, tiles - x.shape[1])) for x in pixels]
        inputs["image_sizes"] = torch.cat([_image_size(case, tail) for tail in tails])
    inputs["pixel_values"] = torch.cat(pixels)
    return inputs


def _image_size(case: Case, tail: str) -> Tensor:
    """(height, width) [1, 2], from a tensor or from the parameters."""
    ends = {"": False, "_hw": False, "_wh": True}
    for name, turned in [
        (x + end, ends[end]) for x in ("image_sizes", "image_size") for end in ends
    ]:
        if name + tail in case:
            size = case[name + tail].view(1, 2).long()
        elif name in case or name in case.parameters:  # of all samples
            given = case.get(name)
            size = torch.as_tensor(case.parameters[name] if given is None else given).view(-1, 2)
            size = size[int(tail[1:]) if tail and len(size) > 1 else 0][None].long()
        else:
            continue
        return size.flip(1) if turned else size
    raise AssertionError(f"{case.path}: no image size")


def greedy_tokens(
    case: Case, tails: Sequence[str], tokens: str = "tokens", logits: str = "logits"
) -> Tensor | None:
    """[B, steps] tokens that were fed after the prompts: as recorded, or the likeliest by the
    recorded logits; None where no sample has either. A sample without gets zeros: nothing of its
    steps is there to compare."""
    rows: list[Tensor | None] = []
    for tail in tails:
        if tokens + tail in case:
            rows.append(case[tokens + tail].view(-1))
        elif logits + tail in case:
            rows.append(case[logits + tail][:-1].argmax(-1))
        else:
            rows.append(None)
    known = [row for row in rows if row is not None]
    if not known:
        return None
    steps = min(len(row) for row in known)
    nothing = torch.zeros_like(known[0][:steps])
    return torch.stack([nothing if row is None else row[:steps] for row in rows])


def _left(x: Tensor, gap: int) -> Tensor:
    return nn.functional.pad(x, (0,) * (2 * (x.dim() - 1)) + (gap, 0))


def one_prompt(embeds: Tensor, image: slice) -> dict[str, Tensor]:
    """A prompt of embeddings [1, L, d], alone in its batch; ``image``: columns of its image. Adds
    ``visual`` [1, L]."""
    visual = torch.zeros(1, embeds.shape[1], dtype=torch.bool)
    visual[:, image] = True
    mask = torch.ones(1, embeds.shape[1], dtype=torch.long)
    return {"inputs_embeds": embeds, "attention_mask": mask, "visual": visual}


def padded_embeds(embeds: Tensor, image: slice, gap: int, seed: int = 0) -> dict[str, Tensor]:
    """A prompt of embeddings [1, L, d] as row 0 of a left-padded batch, ``gap`` padding columns;
    row 1 is another prompt, without padding. Adds ``visual`` [2, L + gap]."""
    length, width = embeds.shape[1:]
    generator = torch.Generator().manual_seed(seed)
    other = torch.randn(1, length + gap, width, generator=generator)
    mask = torch.ones(2, length + gap, dtype=torch.long)
    mask[0, :gap] = 0
    visual = torch.zeros(2, length + gap, dtype=torch.bool)
    visual[0, image.start + gap : image.stop + gap] = True
    visual[1, image.start + 1 : image.stop] = True
    filler = torch.randn(1, gap, width, generator=generator)
    row = torch.cat([filler, embeds], dim=1)
    return {"inputs_embeds": torch.cat([row, other]), "attention_mask": mask, "visual": visual}


# ------------------------------------------------------------------------------- runs


@dataclass
class Run:
    """One prefill with cached steps: ``logits`` [B, 1 + steps, V] (last prompt token, then every
    step), ``prefill`` [B, L', V], ``cache``; ``entered`` and ``hidden`` [B, L', D]: what the
    prefill gave to the first layer and what the final norm made of it; ``outputs`` of each
    decoder layer in prefill."""

    logits: Tensor
    prefill: Tensor
    cache: Any
    entered: Tensor
    hidden: Tensor
    outputs: list[Tensor]

    def cache_lengths(self) -> list[int]:
        """Keys in each layer's cache after the run (steps included)."""
        return [layer.keys.shape[-2] for layer in self.cache.layers]


@torch.no_grad()
def run(
    model: Any,
    inputs: dict[str, Tensor],
    tokens: Tensor | None = None,
    embeds: Sequence[Tensor] | None = None,
) -> Run:
    """Prefill, then steps on the cache fed with ``tokens`` [B, steps] or with ``embeds``
    ([B, 1, d] per step). Positions are counted as ``generate`` does. Patch the model before."""
    decoder = model.model.language_model
    seen: dict[str, Tensor] = {}
    outputs: list[Tensor] = []

    def first(module: Any, args: Any, kwargs: Any) -> None:
        seen.setdefault("entered", args[0] if args else kwargs["hidden_states"])

    def layer_end(module: Any, args: Any, output: Any) -> None:
        if len(outputs) < len(decoder.layers):
            outputs.append(output[0] if isinstance(output, tuple) else output)

    def last(module: Any, args: Any, output: Tensor) -> None:
        seen.setdefault("hidden", output)

    handles = [
        decoder.layers[0].register_forward_pre_hook(first, with_kwargs=True),
        decoder.norm.register_forward_hook(last),
        *[layer.register_forward_hook(layer_end) for layer in decoder.layers],
    ]
    inputs = dict(inputs)
    visual = inputs.pop("visual", None)
    mask = inputs["attention_mask"]
    context = _nothing() if visual is None else tokprune.visual_positions(visual)
    try:
        with context:
            out = model(**inputs, position_ids=(mask.cumsum(1) - 1).clamp(min=0), use_cache=True)
            prefill, rows = out.logits, [out.logits[:, -1]]
            steps = len(embeds) if embeds is not None else 0
            steps = tokens.shape[1] if tokens is not None else steps
            for i in range(steps):
                mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
                new = {"input_ids": tokens[:, i : i + 1]} if tokens is not None else {}
                if embeds is not None:
                    new = {"inputs_embeds": embeds[i]}
                out = model(
                    **new, attention_mask=mask, position_ids=mask.cumsum(1)[:, -1:] - 1,
                    past_key_values=out.past_key_values, use_cache=True,
                )  # fmt: skip
                rows.append(out.logits[:, -1])
    finally:
        for handle in handles:
            handle.remove()
    return Run(
        torch.stack(rows, 1), prefill, out.past_key_values, seen["entered"], seen["hidden"], outputs
    )


@contextmanager
def _nothing() -> Any:
    yield


# ------------------------------------------------------------------------------- methods


@dataclass(frozen=True)
class Watched(Method):
    """A method at work, remembering what its stages saw: ``images`` of the newest prompt before
    selection, and the decoder ``runs``, newest last. ``forced``: selections to use instead."""

    name: ClassVar[str] = "watched"
    inner: Method
    images: list[ImageTokens] = field(default_factory=list)
    runs: list[DecoderRun] = field(default_factory=list)
    plans: list[Plan] = field(default_factory=list)
    forced: list[Tensor] = field(default_factory=list)

    def plan(self, facts: ModelFacts) -> Plan:
        plan = self.inner.on(facts).plan(facts)
        self.plans.append(plan)
        for stage in plan.prompt:
            self._watch_prompt(stage)
        for decoder in plan.decoder:
            self._watch_decoder(decoder)
        return plan

    def _watch_prompt(self, stage: Any) -> None:
        select = stage.select

        def watched(images: Sequence[ImageTokens]) -> Any:
            self.images[:] = images
            return [Selection(index) for index in self.forced] or select(images)

        stage.select = watched

    def _watch_decoder(self, stage: Any) -> None:
        start = stage.start

        def watched() -> DecoderRun:
            made = start()
            self.runs.append(made)
            return made

        stage.start = watched
