"""Pure tensor operators: scores, selections and merges that know nothing of models."""

from tokprune.operators.anyres import (
    flowcut_pack,
    stitched_bounds,
    tile_windows,
    unpad_bounds,
    visionzip_pack,
)
from tokprune.operators.attention import attention_rows, mean_rows, repeat_heads
from tokprune.operators.bipartite import (
    bipartite_soft_matching,
    kth_bipartite,
    parse_r,
    random_bipartite,
    ratio_bsm,
    removed_by_ratio,
)
from tokprune.operators.diversity import (
    center_pivot,
    cls_pivot,
    cls_scores,
    cosine_distance,
    divprune,
    divprune_from_distance,
    farthest_pivot,
    k_center,
    max_sum,
    min_distance,
    random_pivot,
    selection_radius,
    summed_similarity,
)
from tokprune.operators.energy import energy_bsm, pitome
from tokprune.operators.fastv import last_row_scores, row_scores
from tokprune.operators.fastv import select as fastv_select
from tokprune.operators.flow import (
    FlowKeep,
    FlowTerms,
    accumulate,
    attn_terms,
    encoder_keep,
    flow_score,
    global_query_terms,
    llm_select,
    prune_count,
    text_terms,
)
from tokprune.operators.merging import (
    MergePlan,
    compose_groups,
    proportional_bias,
)
from tokprune.operators.mustdrop import (
    cache_policy,
    dual_filter,
    filter_score,
    key_mask,
    key_tokens,
    text_attention,
)
from tokprune.operators.pooling import (
    exact_scales,
    grid_avg_pool,
    grid_sample,
    nested_scales,
    random_sample,
    sequential_sample,
    share,
)
from tokprune.operators.relevance import (
    cross_modal_ratio,
    ratio_from_rows,
    ratio_rows,
    should_drop,
)
from tokprune.operators.spectral import assign_dropped, spectral_distance
from tokprune.operators.topk import keep_topk, rank, segment_topk
from tokprune.operators.transition import (
    image_share,
    instruction_attention,
    instruction_rows,
    transition_score,
    transition_weight,
)
from tokprune.operators.visionzip import Compressed, Contextual
from tokprune.operators.visionzip import compress as visionzip_compress
from tokprune.operators.visionzip import contextual as visionzip_contextual
from tokprune.operators.visionzip import dominant as visionzip_dominant
from tokprune.operators.windows import (
    WindowMerge,
    spatial_merge,
    spatial_merge_fixed,
    window_similarity,
)

__all__ = [
    "Compressed",
    "Contextual",
    "FlowKeep",
    "FlowTerms",
    "MergePlan",
    "WindowMerge",
    "accumulate",
    "assign_dropped",
    "attention_rows",
    "attn_terms",
    "bipartite_soft_matching",
    "cache_policy",
    "center_pivot",
    "cls_pivot",
    "cls_scores",
    "compose_groups",
    "cosine_distance",
    "cross_modal_ratio",
    "divprune",
    "divprune_from_distance",
    "dual_filter",
    "encoder_keep",
    "energy_bsm",
    "exact_scales",
    "farthest_pivot",
    "fastv_select",
    "filter_score",
    "flow_score",
    "flowcut_pack",
    "global_query_terms",
    "grid_avg_pool",
    "grid_sample",
    "image_share",
    "instruction_attention",
    "instruction_rows",
    "k_center",
    "keep_topk",
    "key_mask",
    "key_tokens",
    "kth_bipartite",
    "last_row_scores",
    "llm_select",
    "max_sum",
    "mean_rows",
    "min_distance",
    "nested_scales",
    "parse_r",
    "pitome",
    "proportional_bias",
    "prune_count",
    "random_bipartite",
    "random_pivot",
    "random_sample",
    "rank",
    "ratio_bsm",
    "ratio_from_rows",
    "ratio_rows",
    "removed_by_ratio",
    "repeat_heads",
    "row_scores",
    "segment_topk",
    "selection_radius",
    "sequential_sample",
    "share",
    "should_drop",
    "spatial_merge",
    "spatial_merge_fixed",
    "spectral_distance",
    "stitched_bounds",
    "summed_similarity",
    "text_attention",
    "text_terms",
    "tile_windows",
    "transition_score",
    "transition_weight",
    "unpad_bounds",
    "visionzip_compress",
    "visionzip_contextual",
    "visionzip_dominant",
    "visionzip_pack",
    "window_similarity",
]
