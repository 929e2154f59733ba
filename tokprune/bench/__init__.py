"""What compression costs and saves in time and memory, against no compression and the ideal.

:func:`tokprune.bench.measure.measure_cells` times arms on one batch; importing this package
imports nothing heavy.
"""
