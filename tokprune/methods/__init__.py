"""Published recipes, one file each; ``repr`` of a method is its configuration."""

from tokprune.engine.contracts import Attention, ImageTokens, KeepDecision, SequenceView
from tokprune.methods.apet import ApET
from tokprune.methods.base import Method, Preset
from tokprune.methods.cdpruner import CDPruner
from tokprune.methods.centerclip import CenterCLIP
from tokprune.methods.clip_relevance import ClipRelevance
from tokprune.methods.clse import CLSE
from tokprune.methods.dart import DART
from tokprune.methods.divprune import DivPrune
from tokprune.methods.evs import EVS
from tokprune.methods.fastervlm import FasterVLM
from tokprune.methods.fastv import FastV
from tokprune.methods.ficoco import FiCoCo
from tokprune.methods.flowcut import FlowCut
from tokprune.methods.grid import Grid
from tokprune.methods.hiprune import HiPrune
from tokprune.methods.hired import HiRED
from tokprune.methods.holov import HoloV
from tokprune.methods.m3 import M3
from tokprune.methods.mmtok import MMTok, QuestionWords
from tokprune.methods.msdg import MSDG
from tokprune.methods.mustdrop import MustDrop
from tokprune.methods.occamtoken import OccamToken
from tokprune.methods.options import AtLeast, Range
from tokprune.methods.pitome import PiToMe
from tokprune.methods.pool import Pool
from tokprune.methods.priortr import PriorTR
from tokprune.methods.prumerge import PruMerge
from tokprune.methods.prunesid import PruneSID
from tokprune.methods.pyramiddrop import PyramidDrop
from tokprune.methods.random import Random
from tokprune.methods.registry import available_methods, image_methods, make_method, register_method
from tokprune.methods.scope import SCOPE
from tokprune.methods.score import SCoRe
from tokprune.methods.scoring import DecoderScorer, PromptScorer, PromptSelector
from tokprune.methods.sieve import SIEVE
from tokprune.methods.sparsevlm import SparseVLM
from tokprune.methods.todre import ToDRE
from tokprune.methods.tome import ToMe
from tokprune.methods.tops import TOPS
from tokprune.methods.transprune import TransPrune
from tokprune.methods.trim import TRIM
from tokprune.methods.v2drop import V2Drop
from tokprune.methods.visionzip import VisionZip
from tokprune.methods.vispruner import VisPruner
from tokprune.methods.vscan import VScan

__all__ = [
    "CLSE",
    "DART",
    "EVS",
    "M3",
    "MSDG",
    "SCOPE",
    "SIEVE",
    "TOPS",
    "TRIM",
    "ApET",
    "AtLeast",
    "Attention",
    "CDPruner",
    "CenterCLIP",
    "ClipRelevance",
    "DecoderScorer",
    "DivPrune",
    "FastV",
    "FasterVLM",
    "FiCoCo",
    "FlowCut",
    "Grid",
    "HiPrune",
    "HiRED",
    "HoloV",
    "ImageTokens",
    "KeepDecision",
    "MMTok",
    "Method",
    "MustDrop",
    "OccamToken",
    "PiToMe",
    "Pool",
    "Preset",
    "PriorTR",
    "PromptScorer",
    "PromptSelector",
    "PruMerge",
    "PruneSID",
    "PyramidDrop",
    "QuestionWords",
    "Random",
    "Range",
    "SCoRe",
    "SequenceView",
    "SparseVLM",
    "ToDRE",
    "ToMe",
    "TransPrune",
    "V2Drop",
    "VScan",
    "VisPruner",
    "VisionZip",
    "available_methods",
    "image_methods",
    "make_method",
    "register_method",
]
