"""Evaluation: benchmarks, sweeps, reports, recommendations, published figures."""
