"""Vision towers of golden cases, on their own: weights, and runs with encoder stages hooked in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel
from transformers.models.clip.modeling_clip import CLIPEncoderLayer

from golden_checks.models import fill
from tokprune.engine.contracts import EncoderStage, ModelFacts, TowerFacts, TowerInput
from tokprune.engine.encoder import EncoderHooks, TowerPass
from tokprune.families.base import encoder_layers_of


def clip_tower(
    weights: dict[str, Tensor], config: dict[str, Any], attention: str = "sdpa"
) -> CLIPVisionModel:
    """A CLIP vision tower from weights named as in any transformers 4.x or 5.x."""
    config = {k: v for k, v in config.items() if k != "model_type"}
    made = CLIPVisionConfig(**config)
    made._attn_implementation = attention
    model = CLIPVisionModel(made).eval()
    fill(model, weights)
    return model


class Classifier(nn.Module):
    """A timm-like image classifier out of CLIP encoder blocks: class token, position embedding,
    blocks, norm, class token to logits."""

    def __init__(self, config: dict[str, Any], attention: str = "sdpa") -> None:
        super().__init__()
        width, patch = config["hidden_size"], config["patch_size"]
        self.side = config["image_size"] // patch
        made = CLIPVisionConfig(
            hidden_size=width,
            intermediate_size=config["intermediate_size"],
            num_hidden_layers=config["num_hidden_layers"],
            num_attention_heads=config["num_attention_heads"],
            layer_norm_eps=config["layer_norm_eps"],
            hidden_act=config["hidden_act"],
        )
        made._attn_implementation = attention
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        self.positions = nn.Parameter(torch.empty(1, self.side**2 + 1, width))
        self.layers = nn.ModuleList(
            CLIPEncoderLayer(made) for _ in range(config["num_hidden_layers"])
        )
        self.norm = nn.LayerNorm(width, config["layer_norm_eps"])
        self.head = nn.Linear(width, config["num_labels"])

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.patches(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.positions
        for layer in self.layers:
            masks = {"causal_attention_mask": None} if _old_layers() else {}
            out = layer(x, attention_mask=None, **masks)
            x = out[0] if isinstance(out, tuple) else out
        return self.head(self.norm(x)[:, 0])


def _old_layers() -> bool:
    return "causal_attention_mask" in CLIPEncoderLayer.forward.__code__.co_varnames


#: parts of ViTForImageClassification's names and what :class:`Classifier` calls them
_VIT_NAMES = (
    ("vit.embeddings.patch_embeddings.projection", "patches"),
    ("vit.embeddings.cls_token", "cls_token"),
    ("vit.embeddings.position_embeddings", "positions"),
    ("vit.encoder.layer.", "layers."),
    ("attention.attention.query", "self_attn.q_proj"),
    ("attention.attention.key", "self_attn.k_proj"),
    ("attention.attention.value", "self_attn.v_proj"),
    ("attention.output.dense", "self_attn.out_proj"),
    ("intermediate.dense", "mlp.fc1"),
    ("output.dense", "mlp.fc2"),
    ("layernorm_before", "layer_norm1"),
    ("layernorm_after", "layer_norm2"),
    ("vit.layernorm", "norm"),
    ("classifier", "head"),
)


def vit_classifier(
    weights: dict[str, Tensor], config: dict[str, Any], attention: str = "sdpa"
) -> Classifier:
    """An image classifier from the weights of a ViTForImageClassification (4.57 names)."""
    model = Classifier(config, attention).eval()
    renamed = {}
    for name, value in weights.items():
        for theirs, ours in _VIT_NAMES:
            name = name.replace(theirs, ours)
        renamed[name] = value
    fill(model, renamed)
    return model


@dataclass
class TowerRun:
    """One run of a tower: ``hidden[i]`` the input of block i, the last entry the output of the
    last block; ``output`` of the module; ``tower``: what the stages did."""

    hidden: list[Tensor]
    output: Any
    tower: TowerPass

    @property
    def counts(self) -> Tensor:
        return torch.tensor([x.shape[1] for x in self.hidden])

    def merge_counts(self) -> Tensor:
        """Rows after each reduction."""
        return torch.tensor([tokens.rows for _, tokens in self.tower.history])

    def groups(self) -> Tensor:
        """[reductions, B, T]: row that holds each input token, class token included."""
        groups = [tokens.group for _, tokens in self.tower.history]
        return torch.stack([nn.functional.pad(g, (1, 0)) for g in groups])


def side_of(config: dict[str, Any]) -> int:
    """Patches along the edge of a tower's picture."""
    return int(config["image_size"] // config["patch_size"])


def tower_facts(layers: int, side: int, feature_layer: int) -> ModelFacts:
    """A tower with class token, read at one layer (class token cut), as a LLaVA-1.5 has it."""
    patches = side * side
    tower = TowerFacts(layers, feature_layer, (side, side), patches, True, cls_in_features=False)
    return ModelFacts("llava-1.5", decoder_layers=1, max_visual_tokens=patches, tower=tower)


@torch.no_grad()
def run_tower(
    model: nn.Module, pixels: Tensor, stages: Sequence[EncoderStage], facts: ModelFacts
) -> TowerRun:
    """Run a tower (CLIP, SigLIP or :class:`Classifier`) with encoder stages at work in it."""
    own = isinstance(model, Classifier)
    layers: list[Any] = list(model.layers) if own else encoder_layers_of(model)
    assert facts.tower is not None
    own_tiles = TowerInput(facts.tower, tuple(range(len(pixels))), pixels.device)
    tower = TowerPass(tuple(stages), own_tiles)
    hidden: list[Tensor] = []

    def before(module: Any, args: Any, kwargs: Any) -> None:
        hidden.append(args[0] if args else kwargs["hidden_states"])

    def after(module: Any, args: Any, output: Any) -> None:
        hidden.append(output[0] if isinstance(output, tuple) else output)

    embeddings = getattr(getattr(model, "vision_model", model), "embeddings", None)
    hooks = EncoderHooks(layers, tuple(stages), lambda: tower, embeddings=embeddings)
    handles = hooks.install()
    handles += [x.register_forward_pre_hook(before, with_kwargs=True) for x in layers]
    handles.append(layers[-1].register_forward_hook(after))
    try:
        output = model(pixels)
        tower.finish()
    finally:
        for handle in handles:
            handle.remove()
    return TowerRun(hidden, output, tower)
