"""Published recipes, one file each; ``repr`` of a method is its configuration."""

from tokprune.methods.base import Method, Preset, available_methods, make_method, register_method
from tokprune.methods.divprune import DivPrune
from tokprune.methods.fastv import FastV
from tokprune.methods.flowcut import FlowCut
from tokprune.methods.grid import Grid
from tokprune.methods.mustdrop import MustDrop
from tokprune.methods.pitome import PiToMe
from tokprune.methods.pool import Pool
from tokprune.methods.random import Random
from tokprune.methods.todre import ToDRE
from tokprune.methods.tome import ToMe
from tokprune.methods.transprune import TransPrune
from tokprune.methods.visionzip import VisionZip

__all__ = [
    "DivPrune",
    "FastV",
    "FlowCut",
    "Grid",
    "Method",
    "MustDrop",
    "PiToMe",
    "Pool",
    "Preset",
    "Random",
    "ToDRE",
    "ToMe",
    "TransPrune",
    "VisionZip",
    "available_methods",
    "make_method",
    "register_method",
]
