"""Part (b): the bench on models of published shapes."""

from __future__ import annotations

import time
from typing import Any

import torch

from gpu_parts.journal import Journal
from gpu_parts.models import Models
from gpu_parts.plan import Item

#: trials that are measured side by side; more would spread their rounds over too long a time
TOGETHER = 4


def run_item(item: Item, models: Models, seconds: float, journal: Journal) -> None:
    """Every method and budget of an item in small groups, most wanted first, until the time is
    over; a group that fails is tried method by method."""
    end = time.perf_counter() + seconds
    if not seconds:
        journal.skip("bench", f"bench/{item.name}", "the time was over")
        return
    groups: list[tuple[tuple[str, ...], Any]] = []
    with journal.part("bench", f"bench/{item.name}/model") as own:
        model = models.get(item.shape)
        refused: dict[str, str] = {}
        for keep in item.keeps:
            fitting = _fitting(item.methods, keep, model, refused)
            groups += [
                (tuple(fitting[n : n + TOGETHER]), keep) for n in range(0, len(fitting), TOGETHER)
            ]
        own["result"] = {"shape": item.shape, "refused": refused}
    late = []
    while groups:
        methods, keep = groups.pop(0)
        left = end - time.perf_counter()
        name = f"bench/{item.name}/{'+'.join(methods)}@{keep:.3g}"
        if left <= 0:
            late.append(name)
            continue
        with journal.part("bench", name) as own:
            own["item"] = item.name
            own["result"] = _bench(item, models, methods, keep, left / (len(groups) + 1))
        if own["status"] == "failed":
            _forget_failure(models)
            if len(methods) > 1:
                groups = [((method,), keep) for method in methods] + groups
    if late:
        reason = f"the time was over before {', '.join(n.split('/')[-1] for n in late)}"
        journal.skip("bench", f"bench/{item.name}/rest", reason)


def _fitting(methods: tuple[str, ...], keep: Any, model: Any, refused: dict[str, str]) -> list[str]:
    """Methods that the model can have at a budget; adds to ``refused`` why others cannot."""
    from tokprune.bench.run import trials_of
    from tokprune.families import family_of

    family = family_of(model)
    facts = family.facts(model, family.parts(model))
    fitting: list[str] = []
    for name in methods:
        try:
            (trial,) = trials_of([name], [keep], facts.decoder_layers)
            trial.method.on(facts).plan(facts)
        except (TypeError, ValueError) as error:
            refused[f"{name}@{keep:.3g}"] = str(error)
        else:
            fitting.append(name)
    return fitting


def _bench(
    item: Item, models: Models, methods: tuple[str, ...], keep: Any, seconds: float
) -> dict[str, Any]:
    from tokprune.bench.run import bench

    image, frames = models.picture(item.shape)
    return bench(
        models.get(item.shape), methods, [keep], image=image, frames=frames, rounds=item.rounds,
        new_tokens=item.new_tokens, batch_sizes=item.batch_sizes, text_tokens=(item.text_tokens,),
        parts=item.parts, seconds=max(seconds, 0.001), name=f"random weights {item.shape}",
    )  # fmt: skip


def _forget_failure(models: Models) -> None:
    """Memory that a failed measurement still held."""
    import gc

    gc.collect()
    if models.device.type == "cuda":
        torch.cuda.empty_cache()
