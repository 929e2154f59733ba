"""Sweeps on the machines of a Ray cluster. Ray places the workers, moves what they answer and tells
when one is lost; what they answer is decided in the process that writes the run folder."""
