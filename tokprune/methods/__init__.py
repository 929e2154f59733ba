"""Published recipes, one file each; ``repr`` of a method is its configuration."""

from tokprune.engine.contracts import Attention, ImageTokens, KeepDecision, SequenceView
from tokprune.methods.base import Method, Preset
from tokprune.methods.cdpruner import CDPruner
from tokprune.methods.centerclip import CenterCLIP
from tokprune.methods.clip_relevance import ClipRelevance
from tokprune.methods.dart import DART
from tokprune.methods.divprune import DivPrune
from tokprune.methods.evs import EVS
from tokprune.methods.fastervlm import FasterVLM
from tokprune.methods.fastv import FastV
from tokprune.methods.flowcut import FlowCut
from tokprune.methods.grid import Grid
from tokprune.methods.m3 import M3
from tokprune.methods.mmtok import MMTok, QuestionWords
from tokprune.methods.mustdrop import MustDrop
from tokprune.methods.options import AtLeast, Range
from tokprune.methods.pitome import PiToMe
from tokprune.methods.pool import Pool
from tokprune.methods.pyramiddrop import PyramidDrop
from tokprune.methods.random import Random
from tokprune.methods.registry import available_methods, image_methods, make_method, register_method
from tokprune.methods.scoring import DecoderScorer, PromptScorer, PromptSelector
from tokprune.methods.sparsevlm import SparseVLM
from tokprune.methods.todre import ToDRE
from tokprune.methods.tome import ToMe
from tokprune.methods.transprune import TransPrune
from tokprune.methods.trim import TRIM
from tokprune.methods.visionzip import VisionZip

__all__ = [
    "DART",
    "EVS",
    "M3",
    "TRIM",
    "AtLeast",
    "Attention",
    "CDPruner",
    "CenterCLIP",
    "ClipRelevance",
    "DecoderScorer",
    "DivPrune",
    "FastV",
    "FasterVLM",
    "FlowCut",
    "Grid",
    "ImageTokens",
    "KeepDecision",
    "MMTok",
    "Method",
    "MustDrop",
    "PiToMe",
    "Pool",
    "Preset",
    "PromptScorer",
    "PromptSelector",
    "PyramidDrop",
    "QuestionWords",
    "Random",
    "Range",
    "SequenceView",
    "SparseVLM",
    "ToDRE",
    "ToMe",
    "TransPrune",
    "VisionZip",
    "available_methods",
    "image_methods",
    "make_method",
    "register_method",
]
