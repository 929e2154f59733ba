"""Cells: an arm at a budget, the points of a plot."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokprune.errors import UnsupportedModelError
from tokprune.eval.sweep.budgets import Budget
from tokprune.eval.sweep.calibrate import Calibrator, Matched
from tokprune.eval.sweep.reduced_input import SMALLER, Smaller
from tokprune.eval.sweep.variants import UNBUDGETED, Arm
from tokprune.methods import Method, make_method


@dataclass(frozen=True)
class Cell:
    """One entry of run.json's ``cells`` (``entry``), and the method behind it (None: the model
    stays unpatched)."""

    entry: dict[str, Any]
    method: Method | None = None

    @property
    def id(self) -> str:
        name: str = self.entry["cell"]
        return name

    @property
    def runs(self) -> bool:
        return bool(self.entry["status"] == "ok")

    @property
    def smaller(self) -> Smaller | None:
        """What is done to pictures or videos, for ``downsample`` and ``frames``."""
        small = self.method is None and self.entry["arm"] in SMALLER
        return Smaller.of(self.entry["options"]) if small else None

    @property
    def blind(self) -> bool:
        """Whether the picture is replaced by an empty one."""
        return bool(self.entry["arm"] == "blind")

    @classmethod
    def stored(cls, entry: dict[str, Any]) -> Cell:
        """A cell as run.json has it."""
        method = None
        if entry["method"] is not None and entry["status"] == "ok":
            method = make_method(entry["method"], **_tuples(entry["options"]))
        return cls(entry, method)


def _tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _tuples(own) for name, own in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def json_options(method: Method) -> dict[str, Any]:
    """All options of a method in JSON types."""
    options: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(method)))
    if options["video_unit"] == "video":  # the default, and no matter for pictures
        del options["video_unit"]
    return options


def _equations(options: Mapping[str, float]) -> str:
    return ", ".join(f"{name}={value:.4g}" for name, value in options.items())


def cell_id(arm: str, tokens: float | None, seed: int = 0) -> str:
    """``todre@64``, ``random@64.s1``, ``none``."""
    name = arm if tokens is None else f"{arm}@{tokens:.6g}"
    return f"{name}.s{seed}" if seed else name


@dataclass(frozen=True)
class CellMaker:
    """Makes the cells of a sweep; ``common``: fields that all of them share (dtype, batch size,
    match)."""

    calibrator: Calibrator
    common: Mapping[str, Any]

    def none(self, cell: str = "none", noise: bool = False, **changes: Any) -> Cell:
        """The unpruned model."""
        tokens = self.calibrator.visual_tokens
        tokens = int(tokens) if tokens == int(tokens) else round(tokens, 3)
        return Cell({
            "cell": cell, "arm": "none", "method": None, "options": {}, "repr": "unpruned",
            "control": True, "budget": tokens, "budget_asked": tokens, **self.common,
            "seed": 0, "noise": noise, "status": "ok", "reason": None,
            "calibrated": {"tokens_last": tokens, "tokens_mean": tokens}, **changes,
        })  # fmt: skip

    def blind(self) -> Cell:
        """The unpruned model on an empty picture: what the questions alone give away."""
        return self.none("blind", arm="blind", repr="blind: a uniform grey picture")

    def id_of(self, arm: Arm, budget: Budget, seed: int) -> str:
        return cell_id(arm.name, budget.tokens(self.calibrator.visual_tokens), seed)

    def make(self, arm: Arm, budget: Budget, seed: int) -> Cell:
        """An arm at a budget; a method is matched to it by measuring."""
        tokens = budget.tokens(self.calibrator.visual_tokens)
        entry: dict[str, Any] = {
            "cell": self.id_of(arm, budget, seed), "arm": arm.name, "method": arm.method,
            "options": {}, "repr": arm.name, "control": arm.control,
            "budget": int(tokens) if tokens == int(tokens) else round(tokens, 6),
            "budget_asked": budget.asked, **self.common, "seed": seed, "noise": False,
            "status": "ok", "reason": None, "calibrated": None,
        }  # fmt: skip
        if arm.method is None:
            shrunk = self.calibrator.match_smaller(arm.unpatched, budget)
            entry |= {
                "options": shrunk.smaller.options,
                "repr": f"{arm.name}({_equations(shrunk.smaller.options)})",
                "calibrated": shrunk.measured.to_dict(),
                "reason": shrunk.reason,
                "status": "ok" if shrunk.reached else "unreachable",
            }
            return Cell(entry)
        return self._matched(entry, arm, self.calibrator.match_budget(arm, budget, seed))

    def exact(self, arm: Arm) -> Cell:
        """An arm with exactly the options given; its budget is what they are measured to leave."""
        try:
            method = arm.as_given()
            method.plan(self.calibrator.subject.facts)
            matched = Matched(method, self.calibrator.measure(method))
        except (ValueError, UnsupportedModelError) as error:
            matched = Matched(None, None, str(error))
        seen, match = matched.measured, self.common["match"]
        tokens = self.calibrator.visual_tokens if seen is None else getattr(seen, match)
        return self._matched({
            "cell": arm.name, "arm": arm.name, "method": arm.method, "options": {},
            "repr": arm.name, "control": arm.control, "budget": round(tokens, 6),
            "budget_asked": "exact", **self.common, "seed": 0, "noise": False, "status": "ok",
            "reason": None, "calibrated": None,
        }, arm, matched)  # fmt: skip

    @staticmethod
    def _matched(entry: dict[str, Any], arm: Arm, matched: Matched) -> Cell:
        if matched.reason is not None:
            entry |= {"status": "unreachable", "reason": matched.reason}
        if matched.method is None:
            entry["options"] = json.loads(json.dumps(dict(arm.options)))
            return Cell(entry)
        entry |= {"options": json_options(matched.method), "repr": repr(matched.method)}
        assert matched.measured is not None
        entry["calibrated"] = matched.measured.to_dict()
        return Cell(entry, matched.method)


def build_cells(
    maker: CellMaker,
    arms: Sequence[Arm],
    budgets: Sequence[Budget],
    seeds: Sequence[int],
    known: Mapping[str, Cell],
) -> list[Cell]:
    """Every arm at every budget; arms that draw once per seed. ``known`` cells are not measured
    again."""
    cells = []
    for arm in arms:
        if arm.name in UNBUDGETED:
            made = maker.blind if arm.name == "blind" else maker.none
            cells.append(known.get(arm.name) or made())
            continue
        if arm.exact:
            cells.append(known.get(arm.name) or maker.exact(arm))
            continue
        for budget in budgets:
            for seed in seeds if arm.draws else (0,):
                name = maker.id_of(arm, budget, seed)
                cells.append(known.get(name) or maker.make(arm, budget, seed))
    return list({cell.id: cell for cell in cells}.values())
