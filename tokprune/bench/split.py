"""Where the time of an answer goes, and what no language model however fast could save."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from tokprune.bench.gate import Interval
from tokprune.bench.measure import SELECTION_IN_ENCODER

#: parts of a split, which add up to ``total``
SPLIT = ("encoder", "selection", "rest_of_prefill", "decode")
_NEEDED = ("encoder", "prefill", "total")


def split(
    plain: Mapping[str, Sequence[float]], own: Mapping[str, Sequence[float]]
) -> dict[str, Any] | None:
    """Seconds of the parts of an answer, from medians, and the bound that the encoder sets.

    Args:
        plain: seconds by part of the unpruned model, round by round.
        own: those of the variant to split (``plain`` itself for the unpruned model).

    Returns:
        ``encoder`` (without the method's own code in it), ``selection`` (all of the method's own
        code), ``rest_of_prefill``, ``decode`` (what generating the further tokens adds to a
        prefill), their sum ``total``; and ``bound``, the speed-up over the unpruned model with this
        encoder and a language model that takes no time: its total ÷ this encoder, within rounds.
        Small differences of noisy numbers may be negative. None where a part was not measured.
    """
    if any(part not in times for part in _NEEDED for times in (plain, own)):
        return None
    median = {part: statistics.median(values) for part, values in own.items()}
    selection = median.get("selection", 0.0)
    inside = median.get(SELECTION_IN_ENCODER, 0.0)
    return {
        "encoder": median["encoder"] - inside,
        "selection": selection,
        "rest_of_prefill": median["prefill"] - median["encoder"] - (selection - inside),
        "decode": median["total"] - median["prefill"],
        "total": median["total"],
        "bound": Interval.of([t / e for t, e in zip(plain["total"], own["encoder"])]).to_dict(),
    }
