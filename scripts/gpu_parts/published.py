"""Figures that others published of their own methods and machines, to set ours beside.

Read from their papers, not measured here; never mixed into a table of ours.
"""

#: share of the ideal's prefill speed-up that we ask of every method
BAR = 0.95

FIGURES = (
    "MSDG, LLaVA-NeXT at 160 tokens on an A800: prefill 7.8 ×, total 2.6 ×",
    "GleanVID, Qwen3-VL-8B, a video at 25 %: total 1.32 ×",
    "achieved ÷ ideal prefill: SIEVE 0.71–0.84, SparseVLM 0.27–0.66, FlashVID 0.69, FastVID 0.91",
)
