"""Golden checks of m3."""

from golden_checks.case import Case, assert_close, assert_equal
from tokprune.operators.pooling import exact_scales, grid_avg_pool


def check_grid_avg_pool(case: Case) -> None:
    x, side = case["x"], case.parameters["grid"]
    for scale in case.parameters["scales"]:
        got = grid_avg_pool(x, scale, official_rounding=True)
        if scale == side * side:  # nothing to pool, and so not recorded
            assert_close(got, x, f"out_{scale}")
        case.close(got, f"out_{scale}")
        if scale in exact_scales(side, side):
            assert_equal(grid_avg_pool(x, scale), got, f"{scale} without rounding")
            window = side // round(scale**0.5)
            assert_equal(grid_avg_pool(x, window=window), got, f"window {window}")


CHECKS = {"m3.grid_avg_pool": check_grid_avg_pool}
