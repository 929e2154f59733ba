"""Golden checks of transprune: transition weights, instruction attention, one pruning stage, and
a decoder that prunes in steps."""

from typing import Any

import torch

from golden_checks.case import Case, assert_close, assert_equal
from golden_checks.models import Watched, load_llama, one_prompt, padded_embeds, run
from golden_checks.staged import check_end, check_stages, decode_steps, image_of, run_recorded
from tokprune.methods.transprune import TransPrune
from tokprune.operators.attention import attention_rows, mean_rows
from tokprune.operators.topk import keep_topk, segment_topk
from tokprune.operators.transition import (
    image_share,
    instruction_rows,
    transition_score,
    transition_weight,
)


def _tolerance(case: Case) -> float:
    return 1e-2 if case.parameters["dtype"] == "torch.float16" else 1e-5


def check_transition_weight(case: Case) -> None:
    weight = transition_weight(case["before"], case["after"], normalize="batch")
    rtol = 5e-3 if case.parameters["dtype"] == "torch.float16" else 1e-5
    case.close(weight, "weight", rtol)


def _text_rows(
    q: torch.Tensor, k: torch.Tensor, after: int, scale: float | None = None
) -> torch.Tensor:
    """[H, R, L]: attention from the text at ``after`` and later, each position up to itself."""
    position = torch.arange(k.shape[1])
    return attention_rows(q, k, scale, position <= position[after:, None])


def check_iga(case: Case) -> None:
    q, k, p = case["q_text"], case["k"], case.parameters
    start, n = p["image_start"], p["image_tokens"]
    rtol = _tolerance(case)
    rows = _text_rows(q, k, start + n, p["scale"])
    case.close(rows, "attention", rtol)
    image = mean_rows(rows)[start : start + n]
    case.close(image, "image_attention", rtol)
    iga = image_share(image)
    case.close(iga, "iga", rtol)
    segment = torch.full((1, k.shape[1]), -1)
    segment[0, start : start + n] = 0
    assert_close(instruction_rows(rows[None], None, segment)[0, start : start + n], iga, "by rows")


def _rotate(x: torch.Tensor, positions: torch.Tensor, theta: float) -> torch.Tensor:
    """Rotary embedding as Llama's, on [H, L, h]."""
    half = x.shape[-1] // 2
    angle = positions[:, None] * theta ** (-torch.arange(half).double() / half)
    cos, sin = angle.cos().float(), angle.sin().float()
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def _query_key(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys [H, L, h] of the layer the drop happens before, in float32."""
    p = case.parameters
    x = case["features"][0].float()
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + p["rms_norm_eps"])
    x = x * case["layernorm_weight"].float()
    positions = case["position_ids"].reshape(-1)

    def heads(name: str) -> torch.Tensor:
        y = (x @ case[name].float().T).unflatten(-1, (-1, p["head_dim"])).transpose(0, 1)
        return _rotate(y, positions, p["rope_theta"])

    return heads("q_proj"), heads("k_proj")


def check_rank_drop(case: Case) -> None:
    p, rtol = case.parameters, _tolerance(case)
    length, n = case["features"].shape[1], p["image_tokens_now"]
    start = max(p["image_start"], 0)
    lists = [case[f"ttv_{j}"] for j in range(p["num_ttv"])]
    segment = torch.full((1, length), -1)
    segment[0, start : start + n] = 0
    keep_mask = segment < 0
    if p["image_start"] < 0:  # nothing to score
        case.aside("q_proj", "k_proj", "layernorm_weight", "position_ids")
    else:
        q, k = _query_key(case)
        rows = _text_rows(q[:, start + n :], k, start + n)
        iga = image_share(mean_rows(rows)[start : start + n])
        slices = [w[0, start : start + n] for w in lists]
        ttv = transition_score(slices, torch.zeros(n), alpha=1.0)
        score = transition_score(slices, iga, alpha=0.5)
        for name, got in (("iga", iga), ("ttv", ttv), ("score", 2 * score)):
            case.close(got, name, rtol)
        keep = keep_topk(score, p["keep"]) + start
        padded = torch.zeros(1, length)
        padded[0, start : start + n] = iga
        whole = transition_score(lists, padded, 0.5, segment)
        assert_close(whole[0, start : start + n], score, "score of the whole sequence")
        chosen = segment_topk(whole, segment, torch.tensor([[p["keep"]]]))
        assert_equal(chosen[0].nonzero().view(-1), keep, "keep by segment")
        keep_mask = keep_mask | chosen
        _compare_keep(keep, case, score, start)
    sequence = keep_mask[0].nonzero().view(-1)
    if p["dtype"] == "torch.float16" and "keep_sequence" in case:
        sequence = case["keep_sequence"]  # may differ near the cut, see _compare_keep
    else:
        case.equal(sequence, "keep_sequence")
    new = {"new_features": case["features"][:, sequence]}
    new["new_position_ids"] = torch.arange(len(sequence))[None]
    new |= {f"new_ttv_{j}": w[:, sequence] for j, w in enumerate(lists)}
    for name, got in new.items():
        case.equal(got, name)


def _compare_keep(keep: torch.Tensor, case: Case, score: torch.Tensor, start: int) -> None:
    """Equal; in half precision tokens may swap whose scores are within rounding of the cut."""
    if case.parameters["dtype"] != "torch.float16":
        case.equal(keep, "keep")
        return
    if (want := case.output("keep")) is None:
        return
    assert keep.shape == want.shape
    swapped = set(keep.tolist()) ^ set(want.tolist())
    if swapped:
        cut = score[keep - start].min()
        for index in swapped:
            assert abs(score[index - start] - cut) <= 1e-2 * cut, f"token {index} is not at the cut"


def check_image_share_is_iga(case: Case) -> None:
    check_iga(case)
    rtol = _tolerance(case)
    if "image_attention" in case:
        case.close(image_share(case["image_attention"]), "iga", rtol, where="from attention")


class _Recorder(Watched):
    """Also remembers each layer's raw transitions and each step's scores."""

    def recorded(self) -> tuple[dict[int, torch.Tensor], dict[int, tuple[Any, Any, Any]]]:
        transitions: dict[int, torch.Tensor] = {}
        steps: dict[int, tuple[Any, Any, Any]] = {}
        made: Any = self.runs[-1]
        transition, before_layer = made.transition, made.before_layer

        def watched_transition(layer: int, *args: Any) -> None:
            transition(layer, *args)
            transitions[layer] = made.transitions[layer]

        def watched_before(layer: int, hidden: Any, sequence: Any, scoring: Any) -> Any:
            total = sum(made.transitions.values(), torch.zeros(sequence.segment.shape))
            keep = before_layer(layer, hidden, sequence, scoring)
            first = (sequence.segment[0] >= 0).nonzero().view(-1)
            share = image_share(total, sequence.segment, sequence.segments)
            steps[layer] = tuple(x[0, first] for x in (made.instruction, share, made.score))
            return keep

        made.transition, made.before_layer = watched_transition, watched_before
        return transitions, steps


def check_e2e(case: Case) -> None:
    """Prefill and steps from embeddings, alone and as a row of a left-padded batch."""
    image = image_of(case)
    alone = one_prompt(case["inputs_embeds"], image)
    model = load_llama(case.weights(), case.parameters["config"])
    if "logits_unpruned" in case:
        case.close(run(model, alone).prefill, "logits_unpruned")
    padded = padded_embeds(alone["inputs_embeds"], image, 3)
    for gap, normalize, inputs in (
        (0, "sample", alone),
        (0, "batch", alone),
        (3, "sample", padded),
    ):
        _check_run(case, model, gap, normalize, inputs)


def _check_run(
    case: Case, model: Any, gap: int, normalize: Any, inputs: dict[str, torch.Tensor]
) -> None:
    p = case.parameters
    prune = p["prune_layers_1based"]
    method = _Recorder(
        TransPrune(
            tuple(p["ratios"]),
            prune_before=tuple(prune),
            transition_layers=tuple(n - 1 for n in p["accumulate_layers_1based"]),
            normalize=normalize,
        )
    )
    steps = decode_steps(case, len(inputs["inputs_embeds"]))
    last, got, (transitions, scores) = run_recorded(model, method, inputs, embeds=steps)
    for layer, weight in transitions.items():
        case.close(weight[:1, gap:], f"transition_layer{layer}")
    wanted = case.numbered("transition_layer")
    assert {n for n in wanted if n < max(prune)} <= set(transitions)
    for i, (layer, kept) in enumerate(zip(prune, check_stages(case, last, gap, prune))):
        iga, ttv, score = scores[layer]
        case.close(iga, f"stage{i}_iga")
        case.close(ttv, f"stage{i}_ttv")
        case.close(2 * score, f"stage{i}_score")
        own = kept - p["image_start"]
        case.equal(own, f"stage{i}_keep_visual")
    check_end(case, last, got, gap, len(steps))


CHECKS = {
    "transprune.e2e_llama": check_e2e,
    "transprune.iga": check_image_share_is_iga,
    "transprune.rank_drop": check_rank_drop,
    "transprune.transition_weight": check_transition_weight,
}
