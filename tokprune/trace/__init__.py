"""What compression did: the record of a prefill, and what is read from it."""

from tokprune.trace.record import ImageTrace, LayerTrace, PrefillTrace, Trace

__all__ = ["ImageTrace", "LayerTrace", "PrefillTrace", "Trace"]
