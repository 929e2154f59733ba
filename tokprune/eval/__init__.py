"""Evaluation: benchmarks, sweeps, reports, recommendations, tuning, published figures."""
