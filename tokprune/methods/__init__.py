"""Published recipes, one file each; ``repr`` of a method is its configuration."""

from tokprune.methods.base import Method, Preset, available_methods, make_method, register_method
from tokprune.methods.fastv import FastV
from tokprune.methods.random import Random

__all__ = ["FastV", "Method", "Preset", "Random", "available_methods", "make_method",
           "register_method"]  # fmt: skip
