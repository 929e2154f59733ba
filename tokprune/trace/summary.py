"""A trace as a plain-text table and as JSON types."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from tokprune.trace.flops import Macs, encoder_rows, prefill_macs, unpruned_macs
from tokprune.trace.provenance import image_stages

if TYPE_CHECKING:
    from tokprune.engine.images import ImageRecord
    from tokprune.engine.model import ModelFacts
    from tokprune.trace import ImageTrace, PrefillTrace, Trace


def visual_per_layer(prefill: PrefillTrace) -> list[list[int]]:
    """Visual tokens per decoder layer and batch row."""
    return [[sum(row) for row in layer.counts] for layer in prefill.layers]


def nothing_removed(prefill: PrefillTrace) -> bool:
    """Whether every layer saw, and every cache layer holds, the full prompt."""
    full = prefill.original_counts
    lengths = [n + p for n, p in zip(prefill.original_lengths, prefill.past_lengths())]
    return (
        all(row == full for row in visual_per_layer(prefill))
        and not any(record.history for record in prefill.records)
        and (
            not prefill.kv_itemsize
            or all(prefill.kv_entries(layer) == lengths for layer in prefill.layers)
        )
    )


# ------------------------------------------------------------------------------- JSON


def to_dict(trace: Trace) -> dict[str, Any]:
    head = {"method": trace.method, "prefills": trace.prefills, "recorded": trace.last is not None}
    if trace.last is None:
        return head
    prefill = trace.last
    macs, unpruned = prefill_macs(prefill), unpruned_macs(prefill)
    visual = visual_per_layer(prefill)
    return {
        **head,
        "nothing_removed": nothing_removed(prefill),
        "limits": _limits(prefill.facts),
        "batch": len(prefill.original_lengths),
        "past": prefill.past,
        "decode_steps": prefill.decode_steps,
        "visual_tokens_in": prefill.original_counts,
        "visual_tokens_out": visual[-1],
        "mean_visual_tokens": _mean([n for row in visual for n in row]),
        "tokens_in": list(prefill.original_lengths),
        "images": [
            {
                "row": image.row,
                "image": image.number,
                "tokens_in": len(image.columns),
                "columns": [int(image.columns[0]), int(image.columns[-1])],
                "tiles": None if image.record is None else image.record.layout.tiles,
                **_grid(prefill, image),
                "stages": [stage.to_dict() for stage in image_stages(prefill, image)],
            }
            for image in prefill.images
        ],
        "encoder": _encoder(prefill, macs),
        "decoder": _decoder(prefill, macs),
        "macs": macs.to_dict(),
        "macs_unpruned": unpruned.to_dict(),
        "kv_bytes": sum(prefill.kv_bytes()),
        "kv_bytes_unpruned": prefill.kv_bytes_unpruned(),
    }


def _grid(prefill: PrefillTrace, image: ImageTrace) -> dict[str, Any]:
    """Cells of a tile (or frame) that tokens are named by; the frames of a video."""
    record, tower = image.record, prefill.facts.tower
    grids = [] if tower is None else [tower.grid]
    if record is not None and record.token_grid is not None:
        grids = list(dict.fromkeys(record.token_grid.grids))
    if not grids:
        return {}
    if record is None:
        return {"grid": list(grids[0])}
    told: dict[str, Any] = {"grid": list(grids[0])}
    if len(grids) > 1:
        told["map"] = list(grids[1])
    if record.layout.video:
        told["frames"] = [record.layout.first_frame, record.layout.frames]
    return told


def _positions(position: Tensor) -> list[list[Any]]:
    """Of every batch row a number, or (t, h, w), for each token."""
    if position.dim() == 2:
        return position.tolist()  # type: ignore[no-any-return]
    return position.permute(1, 2, 0).tolist()  # type: ignore[no-any-return]


def _encoder(prefill: PrefillTrace, macs: Macs) -> list[dict[str, Any]]:
    """Per encoder layer: rows of each tile of each image, class tokens included; where no stage
    works in the encoder, rows of what attends to each other, and of each frame."""
    rows = [_rows(prefill, record) for record in prefill.records]
    return [
        {
            "layer": layer,
            "attention_rows": [image[layer][0] for image in rows],
            "mlp_rows": [image[layer][1] for image in rows],
            "macs": macs.encoder[layer],
        }
        for layer in range(len(rows[0]) if rows else 0)
    ]


def _rows(prefill: PrefillTrace, record: ImageRecord) -> list[tuple[list[int], list[int]]]:
    """Per encoder layer: rows of an image in its attention and in its MLP."""
    if prefill.facts.tower is not None:
        return prefill.tower_rows(record)
    return encoder_rows(prefill.shape, record)


def _decoder(prefill: PrefillTrace, macs: Macs) -> list[dict[str, Any]]:
    """Per decoder layer; ``columns`` and ``positions`` list the real tokens of each row."""
    kv, places, entries = prefill.kv_bytes(), {}, []
    for number, layer in enumerate(prefill.layers):
        key = (layer.column, layer.position)  # tensors hash by identity
        if key not in places:
            pairs = zip(layer.column.tolist(), _positions(layer.position))
            kept = [[(c, p) for c, p in zip(cs, ps) if c >= 0] for cs, ps in pairs]
            places[key] = ([[c for c, _ in r] for r in kept], [[p for _, p in r] for r in kept])
        entries.append(
            {
                "layer": number,
                "visual": [list(row) for row in layer.counts],
                "total": list(layer.lengths),
                "columns": places[key][0],
                "positions": places[key][1],
                "kv_entries": prefill.kv_entries(layer),
                "kv_bytes": kv[number],
                "macs": macs.decoder[number],
            }
        )
    return entries


# ------------------------------------------------------------------------------- text


def summary(trace: Trace) -> str:
    title = trace.method or "no method"
    if trace.last is None:
        return (
            f"{title}\nNo prefill with images was recorded: run the patched model on a prompt with "
            "an image first (text-only prompts pass through untouched)."
        )
    prefill = trace.last
    macs, unpruned = prefill_macs(prefill), unpruned_macs(prefill)
    rows = len(prefill.original_lengths)
    lines = [title, f"{_count(rows, 'prompt')} with {_visuals(prefill)}"]
    if rows > 1:
        lines[1] += "; tokens: means per prompt, KV and FLOPs: the whole batch"
    if nothing_removed(prefill):
        lines.append("NOTHING WAS REMOVED: every layer saw all visual tokens.")
    lines += _limits(prefill.facts)
    return "\n".join([*lines, _table(prefill, macs), *_totals(prefill, macs, unpruned)])


def _limits(facts: ModelFacts) -> list[str]:
    """What budgets count and what is promised, where a family differs from the others."""
    lines = []
    if facts.per_tile:
        lines.append("Every tile counts as an image: the model cannot tell which are of one image.")
    if facts.attention_layers is not None:
        lines.append(
            "Layers of linear attention ran on the shorter sequence: a token that was dropped left "
            "their recurrence."
        )
    return lines


def _visuals(prefill: PrefillTrace) -> str:
    """ "2 images", "1 image and 1 video"."""
    found = [v[0].record for row in range(len(prefill.original_lengths))
             for v in prefill.visuals(row)]  # fmt: skip
    videos = sum(record is not None and record.layout.video for record in found)
    told = [(len(found) - videos, "image"), (videos, "video")]
    return " and ".join(_count(n, noun) for n, noun in told if n)


def _table(prefill: PrefillTrace, macs: Macs) -> str:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    kv = prefill.kv_bytes()
    unit, size = ("MiB", 2**20) if max(kv, default=0) >= 2**20 // 10 else ("KiB", 2**10)
    table = Table(box=box.ASCII2, show_edge=False)
    table.add_column("layers")
    for name in ("visual tokens", "total tokens", f"KV {unit}", "share of FLOPs"):
        table.add_column(name, justify="right")

    def share(part: int) -> str:
        return f"{100 * part / macs.total:.1f} %"

    prompts = len(prefill.original_lengths)
    for first, last, patches, total in _encoder_runs(prefill):
        table.add_row(
            f"encoder {_span(first, last)}",
            _number(patches / prompts),
            _number(total / prompts),
            "",
            share(sum(macs.encoder[first : last + 1])),
        )
    if prefill.records:
        table.add_row("projector", "", "", "", share(macs.projector))
    for first, last in _decoder_runs(prefill):
        layer = prefill.layers[first]
        held = sum(kv[first : last + 1])
        table.add_row(
            f"decoder {_span(first, last)}",
            _number(sum(map(sum, layer.counts)) / prompts),
            _number(sum(layer.lengths) / prompts),
            f"{held / size:.1f}" if prefill.kv_itemsize else "no cache",
            share(sum(macs.decoder[first : last + 1])),
        )
    rest = macs.patch_embedding + macs.pooling + macs.lm_head
    table.add_row("embedding, head", "", "", "", share(rest))
    out = io.StringIO()
    Console(file=out, width=100, color_system=None, force_terminal=False).print(table)
    return "\n".join(line.rstrip() for line in out.getvalue().rstrip().splitlines())


def _encoder_runs(prefill: PrefillTrace) -> list[tuple[int, int, int, int]]:
    """Runs of encoder layers with equal MLP rows: (first, last, patches, rows)."""
    records, tower, shape = prefill.records, prefill.facts.tower, prefill.shape
    if not records:
        return []
    every = [_rows(prefill, record) for record in records]
    tiles = sum(len(rows[0][1]) for rows in every if rows)
    classes = tiles * (shape.class_tokens if tower is None else int(tower.has_cls))
    runs: list[tuple[int, int, int, int]] = []
    for layer in range(len(shape.encoder)):
        total = sum(sum(rows[layer][1]) for rows in every)
        if runs and runs[-1][3] == total:
            runs[-1] = (runs[-1][0], layer, *runs[-1][2:])
        else:
            runs.append((layer, layer, total - classes, total))
    return runs


def _decoder_runs(prefill: PrefillTrace) -> list[tuple[int, int]]:
    """Runs of decoder layers with equal counts and equal KV entries."""
    keys = [(seen.counts, seen.lengths, prefill.kv_entries(seen)) for seen in prefill.layers]
    runs: list[tuple[int, int]] = []
    for layer, key in enumerate(keys):
        if runs and keys[runs[-1][0]] == key:
            runs[-1] = (runs[-1][0], layer)
        else:
            runs.append((layer, layer))
    return runs


def _totals(prefill: PrefillTrace, macs: Macs, unpruned: Macs) -> list[str]:
    visual = visual_per_layer(prefill)
    before = sum(prefill.original_counts)
    prompts = len(prefill.original_lengths)
    last = sum(visual[-1])
    mean = _mean([sum(row) for row in visual])
    lines = [
        "",
        f"visual tokens      {_number(before / prompts)} -> {_number(last / prompts)} "
        f"({_percent(last, before)})",
        f"per decoder layer  {_number(last / prompts)} after the last pruning, "
        f"{_number(mean / prompts)} on average over all layers ({_percent(mean, before)})",
        f"prefill FLOPs      {_si(2 * unpruned.total)} -> {_si(2 * macs.total)} "
        f"({_percent(macs.total, unpruned.total)}; FLOPs = 2 x MACs, scoring not counted)",
        f"decode step FLOPs  {_si(2 * unpruned.decode_step)} -> {_si(2 * macs.decode_step)} "
        f"({_percent(macs.decode_step, unpruned.decode_step)})",
    ]
    if prefill.kv_itemsize:
        now, full = sum(prefill.kv_bytes()), prefill.kv_bytes_unpruned()
        lines.append(f"KV cache           {_bytes(full)} -> {_bytes(now)} ({_percent(now, full)})")
    return lines


def _mean(values: Sequence[float]) -> float:
    return sum(values) / max(len(values), 1)


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}{'' if n == 1 else 's'}"


def _span(first: int, last: int) -> str:
    return str(first) if first == last else f"{first}-{last}"


def _number(value: float) -> str:
    return str(round(value)) if value == round(value) else f"{value:.1f}"


def _percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "-"


def _si(value: float) -> str:
    for unit in ("", "K", "M", "G", "T"):
        if value < 1000 or unit == "T":
            break
        value /= 1000
    return f"{value:.3g} {unit}".rstrip() if value < 1000 else f"{value:.0f} {unit}"


def _bytes(value: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024 or unit == "GiB":
            break
        value /= 1024
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
