"""The benchmarks that published tables name: their tasks in lmms-eval, sizes and tolerances.

Names are those of lmms-eval's tasks without the split (``gqa``, ``mmbench_en``, ``textvqa``); a
paper's own label is kept beside them in every row.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

#: what the sizes below come from
SIZES = (
    "Sizes: the data sets as lmms-eval loads them (dataset cards of lmms-lab; POPE 3 × 3,000; "
    "MMBench with its rotated options). A finished run says how many questions it really had."
)


@dataclass(frozen=True)
class Metric:
    """A published figure as lmms-eval reports it. ``keys``: names in its results, added up where
    there are several; ``factor``: turns its unit into the ledger's; ``mean``: the mean of the
    question scores × ``factor`` is the same figure."""

    keys: tuple[str, ...]
    factor: float = 100.0
    mean: bool = True


@dataclass(frozen=True)
class Benchmark:
    """``tasks``: split → lmms-eval task, the usual one first (none: not run here); ``questions``:
    split → number; ``metrics``: by the ledger's names; ``full``: a perfect score; ``tolerances``:
    stated ones, by metric, where no binomial error applies; ``needs``: what a run needs beyond
    model and data, in words."""

    name: str
    label: str
    tasks: Mapping[str, str] = field(default_factory=dict)
    questions: Mapping[str, int] = field(default_factory=dict)
    metrics: Mapping[str, Metric] = field(default_factory=dict)
    full: float = 100.0
    tolerances: Mapping[str, float] = field(default_factory=dict)
    needs: Mapping[str, str] = field(default_factory=dict)

    def split_of(self, split: str | None) -> str | None:
        """A named split, or the usual one."""
        return split if split is not None else next(iter(self.tasks), None)

    def task(self, split: str | None = None) -> str | None:
        """lmms-eval's task for a split (None: the usual one); None where there is none."""
        wanted = self.split_of(split)
        return None if wanted is None else self.tasks.get(wanted)

    def size(self, split: str | None = None) -> int | None:
        """Number of questions, None where we do not know it."""
        wanted = self.split_of(split)
        return None if wanted is None else self.questions.get(wanted)

    def tolerance(
        self, value: float, metric: str, questions: int | None = None, split: str | None = None
    ) -> float | None:
        """How far a repetition may lie from ``value``, in its unit: twice the binomial standard
        error of an accuracy on that many questions, or a stated figure.

        Args:
            value: published.
            metric: its name.
            questions: answered; default: the size of the split.

        Returns:
            None where neither is known.
        """
        if metric in self.tolerances:
            return self.tolerances[metric]
        known = self.metrics.get(metric)
        n = questions if questions is not None else self.size(split)
        if known is None or metric in _NOT_SHARES or not n or not 0 <= value <= self.full:
            return None
        share = value / self.full
        return 2 * self.full * math.sqrt(share * (1 - share) / n)


_NOT_SHARES = frozenset({"CIDEr", "CIDEr ×100"})

_SERVER = "answers are judged by a submission server"
_JUDGE = "answers are judged by a language model (an API key)"
_ACCURACY = {"accuracy": Metric(("exact_match",))}


def _captions(prefix: str) -> dict[str, Metric]:
    key = (f"{prefix}_CIDEr",)
    return {"CIDEr": Metric(key, 1.0, False), "CIDEr ×100": Metric(key, 100.0, False)}


_MME = {
    "perception": Metric(("mme_perception_score",), 1.0, False),
    "cognition": Metric(("mme_cognition_score",), 1.0, False),
    "perception + cognition": Metric(("mme_perception_score", "mme_cognition_score"), 1.0, False),
}
#: batch size alone moved MME by about 10 points (LLaVA #1928), both ways
_MME_TOLERANCE = dict.fromkeys(_MME, 20.0)

_KNOWN = (
    Benchmark("gqa", "GQA", {"testdev": "gqa"}, {"testdev": 12578}, _ACCURACY),
    Benchmark(
        "mmbench_en", "MMBench",
        {"dev": "mmbench_en_dev", "test": "mmbench_en_test"}, {"dev": 4329},
        {"accuracy": Metric(("gpt_eval_score",), 1.0, False)}, needs={"test": _SERVER},
    ),
    Benchmark(
        "mmbench_cn", "MMBench-CN",
        {"dev": "mmbench_cn_dev", "test": "mmbench_cn_test"}, {"dev": 4329},
        {"accuracy": Metric(("gpt_eval_score",), 1.0, False)}, needs={"test": _SERVER},
    ),
    Benchmark("mme", "MME", {"test": "mme"}, {"test": 2374}, _MME, math.inf, _MME_TOLERANCE),
    Benchmark(
        "pope", "POPE", {"test": "pope"}, {"test": 9000},
        {"accuracy or F1": Metric(("pope_accuracy",))},
    ),
    Benchmark("scienceqa_img", "ScienceQA-IMG", {"test": "scienceqa_img"}, {"test": 2017},
              _ACCURACY),
    Benchmark("textvqa", "TextVQA", {"val": "textvqa_val", "test": "textvqa_test"},
              {"val": 5000}, _ACCURACY, needs={"test": _SERVER}),
    Benchmark("vizwiz_vqa", "VizWiz", {"val": "vizwiz_vqa_val", "test": "vizwiz_vqa_test"},
              {"val": 4319, "test": 8000}, _ACCURACY, needs={"test": _SERVER}),
    Benchmark("vqav2", "VQAv2", {"val": "vqav2_val", "test": "vqav2_test"},
              {"val": 214354, "test-dev": 107394}, _ACCURACY,
              needs={"test": _SERVER, "test-dev": _SERVER}),
    Benchmark("seedbench", "SEED-Bench", {"test": "seedbench"}, {"test": 17990},
              {"accuracy": Metric(("seed_all",))}),
    Benchmark("seedbench_image", "SEED-Bench, images", {"test": "seedbench"}, {},
              {"accuracy": Metric(("seed_image",), 100.0, False)}),
    Benchmark("mmvet", "MM-Vet", {"test": "mmvet"}, {"test": 218},
              {"accuracy": Metric(("gpt_eval_score",), 1.0, False)}, needs={"test": _JUDGE}),
    Benchmark("mmmu", "MMMU", {"val": "mmmu_val"}, {"val": 900},
              {"accuracy": Metric(("mmmu_acc",))}),
    Benchmark("ok_vqa", "OK-VQA", {"val": "ok_vqa_val2014"}, {"val": 5046}, _ACCURACY),
    Benchmark("a_okvqa", "A-OKVQA", metrics=_ACCURACY),
    Benchmark("ocrbench", "OCRBench", {"test": "ocrbench"}, {"test": 1000},
              {"accuracy": Metric(("ocrbench_accuracy",), 1000.0)}, 1000.0),
    Benchmark("chartqa", "ChartQA", {"test": "chartqa"}, {"test": 2500},
              {"accuracy": Metric(("relaxed_overall",))}),
    Benchmark("docvqa", "DocVQA", {"val": "docvqa_val", "test": "docvqa_test"}, {"val": 5349},
              {"accuracy": Metric(("anls",))}, needs={"test": _SERVER}),
    Benchmark("ai2d", "AI2D", {"test": "ai2d"}, {"test": 3088}, _ACCURACY),
    Benchmark("mmstar", "MMStar", {"val": "mmstar"}, {"val": 1500},
              {"accuracy": Metric(("average",), 100.0, False)}),
    Benchmark("realworldqa", "RealWorldQA"),
    Benchmark("coco2014_cap", "COCO 2014 captions", {"val": "coco2014_cap_val"},
              metrics=_captions("coco")),
    Benchmark("coco2017_cap", "COCO 2017 captions", {"val": "coco2017_cap_val"},
              metrics=_captions("coco")),
    Benchmark("coco_cap", "COCO captions (year not stated)", metrics=_captions("coco")),
    Benchmark("flickr30k", "Flickr30k captions", {"test": "flickr30k_test"},
              metrics=_captions("flickr")),
    Benchmark("nocaps", "NoCaps", {"val": "nocaps_val"}, metrics=_captions("nocaps")),
    Benchmark("hrbench8k", "HR-Bench 8K"),
    # grounding: boxes, for which there is no task here
    *(Benchmark(name, label) for name, label in (
        ("refcoco", "RefCOCO"), ("refcoco+", "RefCOCO+"), ("refcocog", "RefCOCOg"),
        ("hallusionbench", "HallusionBench"),
    )),
    # video: the models that tokprune supports take images
    *(Benchmark(name, label) for name, label in (
        ("videomme", "VideoMME"), ("egoschema", "EgoSchema"), ("mlvu", "MLVU"),
        ("longvideobench", "LongVideoBench"), ("activitynetqa", "ActivityNet-QA"),
        ("seedbench_video", "SEED-Bench, video"), ("mvbench", "MVBench"), ("nextqa", "NExT-QA"),
        ("intentqa", "IntentQA"), ("tgif", "TGIF-QA"), ("msvd", "MSVD"), ("msrvtt", "MSR-VTT"),
    )),
    # retrieval and classification
    *(Benchmark(name, label) for name, label in (
        ("msvd_retrieval", "MSVD retrieval"), ("msrvtt_retrieval", "MSR-VTT 9k retrieval"),
        ("lsmdc_retrieval", "LSMDC retrieval"),
        ("activitynet_retrieval", "ActivityNet retrieval"),
        ("flickr30k_retrieval", "Flickr30k retrieval"), ("imagenet", "ImageNet-1k"),
    )),
    # figures of several benchmarks, or of none
    Benchmark("average", "average over the table"),
    Benchmark("vtc_hard", "VTC-Bench, hard group"),
    Benchmark("vtc_cells", "VTC-Bench, all cells"),
    Benchmark("efficiency", "a cost of the model, no benchmark named"),
)  # fmt: skip

#: by name
BENCHMARKS: Mapping[str, Benchmark] = {b.name: b for b in _KNOWN}

#: words of papers and splits of lmms-eval's names
_ALIASES = {
    "sqa": "scienceqa_img", "sqai": "scienceqa_img", "scienceqa": "scienceqa_img",
    "sqaimg": "scienceqa_img", "mmb": "mmbench_en", "mmben": "mmbench_en", "mmbench": "mmbench_en",
    "mmbcn": "mmbench_cn", "cn": "mmbench_cn", "seed": "seedbench", "seedi": "seedbench_image",
    "vqatext": "textvqa", "vizwiz": "vizwiz_vqa", "vqa": "vqav2", "okvqa": "ok_vqa",
    "aokvqa": "a_okvqa", "mmep": "mme", "mmvet": "mmvet",
}  # fmt: skip


def find_benchmark(task: str) -> tuple[Benchmark, str | None] | None:
    """The benchmark, and the split it names (None: no split), of a task: a name of ours or of
    lmms-eval (``vqav2_val``), or a paper's label (``SQA-I``); None for others."""
    name = task.strip().lower()
    if name in BENCHMARKS:
        return BENCHMARKS[name], None
    for benchmark in _KNOWN:
        for split, task in benchmark.tasks.items():
            if task == name:
                return benchmark, split if len(benchmark.tasks) > 1 else None
    plain = _plain(name)
    if plain in _ALIASES:
        return BENCHMARKS[_ALIASES[plain]], None
    for benchmark in _KNOWN:
        if plain in (_plain(benchmark.label), _plain(benchmark.name)):
            return benchmark, None
    return None


def _plain(text: str) -> str:
    return re.sub(r"[^a-z0-9]", "", text.lower())
