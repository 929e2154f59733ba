"""Pure tensor operators: scores, selections and merges that know nothing of models.

Each module lists what it offers in ``__all__``; the names that would be unclear here, or hide a
module, have a longer one.
"""

# ruff: noqa: F401, F403
from tokprune.operators.anyres import *
from tokprune.operators.attention import *
from tokprune.operators.bipartite import *
from tokprune.operators.budgets import *
from tokprune.operators.cdpruner import *
from tokprune.operators.clse import *
from tokprune.operators.coverage import *
from tokprune.operators.coverage import coverage as coverage_select
from tokprune.operators.dart import *
from tokprune.operators.dart import dart as dart_select
from tokprune.operators.diversity import *
from tokprune.operators.dpp import *
from tokprune.operators.energy import *
from tokprune.operators.flow import *
from tokprune.operators.hiprune import *
from tokprune.operators.hired import *
from tokprune.operators.holov import *
from tokprune.operators.kmedoids import *
from tokprune.operators.merging import *
from tokprune.operators.mmtok import *
from tokprune.operators.msdg import *
from tokprune.operators.mustdrop import *
from tokprune.operators.occamtoken import *
from tokprune.operators.outliers import *
from tokprune.operators.pooling import *
from tokprune.operators.priortr import *
from tokprune.operators.prunesid import *
from tokprune.operators.relevance import *
from tokprune.operators.score import *
from tokprune.operators.segments import *
from tokprune.operators.sieve import *
from tokprune.operators.sparsevlm import *
from tokprune.operators.spectral_clustering import *
from tokprune.operators.temporal import *
from tokprune.operators.topk import *
from tokprune.operators.tops import *
from tokprune.operators.transition import *
from tokprune.operators.trim import *
from tokprune.operators.visionzip import *
from tokprune.operators.visionzip import compress as visionzip_compress
from tokprune.operators.visionzip import contextual as visionzip_contextual
from tokprune.operators.visionzip import dominant as visionzip_dominant
from tokprune.operators.vispruner import *
from tokprune.operators.vscan import *
from tokprune.operators.windows import *
