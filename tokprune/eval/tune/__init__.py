"""Tuning: methods × options × schedules × compositions, searched on some questions at every budget,
and reported on others."""
