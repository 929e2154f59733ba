"""Golden checks of pyramiddrop: one drop of a batch, and a decoder that drops in stages."""

import torch

import tokprune
from golden_checks.case import Case, assert_equal
from golden_checks.models import load_llama, one_prompt, padded_embeds, run
from golden_checks.staged import check_end, check_stages, decode_steps, image_of
from golden_checks.transprune import _rotate
from tokprune.methods.pyramiddrop import PyramidDrop
from tokprune.operators.attention import attention_rows
from tokprune.operators.topk import segment_topk


def _heads(case: Case, name: str) -> torch.Tensor:
    """Queries or keys [B, H, L, h] of the layer that ranks, in float32."""
    p = case.parameters
    x = case["features"].float()
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + p["rms_norm_eps"])
    x = (x * case["layernorm_weight"]) @ case[name].float().T
    return torch.stack(
        [
            _rotate(row.unflatten(-1, (-1, p["head_dim"])).transpose(0, 1), at, p["rope_theta"])
            for row, at in zip(x, case["position_ids"])
        ]
    )


def check_rank_drop(case: Case) -> None:
    p, features = case.parameters, case["features"]
    batch, length, width = features.shape
    stage, ratios = p["stage"], p["ratios"]
    method = PyramidDrop(tuple(ratios[1:]), prune_before=range(1, len(ratios)))
    now = [int(n * ratios[stage]) for n in p["image_tokens_original"]]
    segment = torch.full((batch, length), -1)
    for b, (start, n) in enumerate(zip(p["image_start"], now)):
        if start >= 0:
            segment[b, start : start + n] = 0
    budget = [[method.count(stage, n)] if n else [0] for n in p["image_tokens_original"]]
    rows = torch.tensor([text + n - 1 for text, n in zip(p["prompt_len_text_only"], now)])
    mask = case["attention_mask"] if "attention_mask" in case else torch.ones(batch, length)
    allowed = (torch.arange(length) <= rows[:, None]) & (mask != 0)
    query = _heads(case, "q_proj")[torch.arange(batch), :, rows][:, :, None]
    attention = attention_rows(query, _heads(case, "k_proj"), None, allowed[:, None])
    kept = segment_topk(attention[:, :, 0].mean(1), segment, torch.tensor(budget))
    alive = (kept | (segment < 0)) & (mask != 0)
    lengths = alive.sum(1).tolist()
    new = torch.zeros(batch, max(lengths), width)  # padded on the right, as the official code does
    for b, n in enumerate(lengths):
        index = alive[b].nonzero().view(-1)
        case.equal(index, f"keep_{b}")
        new[b, :n] = features[b, index]
        if (positions := case.output("new_position_ids")) is not None:
            assert_equal(positions[b, :n], torch.arange(n), f"new_position_ids of row {b}")
        if (own := case.output("new_attention_mask")) is not None:
            assert_equal(own[b].nonzero().view(-1), torch.arange(n), f"mask of row {b}")
    case.equal(new, "new_features")


def check_e2e(case: Case) -> None:
    """Prefill and steps from embeddings, alone and as a row of a left-padded batch."""
    p, image = case.parameters, image_of(case)
    alone = one_prompt(case["inputs_embeds"], image)
    method = PyramidDrop(tuple(p["ratios"]), prune_before=tuple(p["layer_list"]))
    for attention in ("eager", "sdpa"):
        model = load_llama(case.weights(), p["config"], attention)
        if "logits_unpruned" in case:
            case.close(run(model, alone).prefill, "logits_unpruned")
        for gap, inputs in ((0, alone), (3, padded_embeds(alone["inputs_embeds"], image, 3))):
            rows = len(inputs["inputs_embeds"])
            steps = decode_steps(case, rows)
            with tokprune.compress(model, method) as trace:
                got = run(model, inputs, embeds=steps)
            check_stages(case, trace.last, gap, p["layer_list"])
            check_end(case, trace.last, got, gap, len(steps))


CHECKS = {"pyramiddrop.e2e_llama": check_e2e, "pyramiddrop.rank_drop": check_rank_drop}
