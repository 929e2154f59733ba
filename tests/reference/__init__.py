"""Slow, obvious versions: plain PyTorch and loops as the papers describe them, whole attention maps
and N×N matrices included. Tests compare operators and methods with them, ``bench_operators.py``
times operators against them. Operators that no method runs are here alone.
"""
