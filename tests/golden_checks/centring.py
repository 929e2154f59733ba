"""Golden checks of centred geometry, and of the selectors that take it."""

from typing import Any

from torch import Tensor

from golden_checks.case import Case
from tokprune.operators.diversity import divprune
from tokprune.operators.dpp import dpp_map
from tokprune.operators.geometry import Geometry, centred_geometry


def _geometry(case: Case) -> Geometry:
    p = case.parameters
    return centred_geometry(case["features"], p["standardise"], p["norm"], eps=p["eps"])


def _gram(x: Tensor) -> Any:
    unit = x.double() / x.double().norm(dim=-1, keepdim=True).clamp(min=1e-12)
    return (unit @ unit.mT).float()


def check_geometry(case: Case) -> None:
    got = _geometry(case)
    case.close(_gram(got.centred), "gram", rtol=1e-4, atol=2e-6)
    case.close(got.distinctiveness, "distinctiveness", atol=1e-6)
    case.close(got.weight, "weight", rtol=1e-4, atol=5e-6)


def check_divprune(case: Case) -> None:
    got, p = _geometry(case), case.parameters
    weight = got.weight if p["weighted"] else None
    case.equal(divprune(got.centred, p["keep"], weight=weight), "order")


def check_cdpruner(case: Case) -> None:
    got, p = _geometry(case), case.parameters
    case.equal(dpp_map(got.centred, p["keep"], case["relevance"] * got.weight), "order")


CHECKS = {
    "centring.geometry": check_geometry,
    "centring.divprune": check_divprune,
    "centring.cdpruner": check_cdpruner,
}
