"""Models of transformers whose images cannot be pruned here, and why."""

from __future__ import annotations

_NOT_IN_SEQUENCE = "its images never enter the prompt: "
_QUERIES = (
    "a fixed, small number of query tokens stands for an image whatever its size, and nothing of "
    "the redundancy that pruning removes is left in them"
)
_ENCODER_DECODER = (
    "it is an encoder–decoder, whose decoder reads the image by cross-attention: "
    "there are no visual tokens in its prompt that could go"
)
_CROSS = _NOT_IN_SEQUENCE + "its decoder reads them by cross-attention in layers of their own"
_DISCRETE = "its images are discrete tokens of the vocabulary, written into the prompt as text is"
_HYBRID = (
    "its decoder mixes attention with layers that keep a state instead of keys ({what}), which "
    "is not supported yet beyond Qwen3.5"
)
_MLA = (
    "its decoder's attention ({what}) caches something else than keys and values of every token, "
    "which is not supported yet"
)
_LATENT = "multi-head latent attention, MLA"
_NOT_YET = "it is not supported yet: {what}"
_GRIDS = "how its tokens stand on images of any size ({what}) is not written down yet"
_LLAVA_LIKE = "it is built like LLaVA with another vision encoder ({what})"
_UNSEEN = "how its encoder makes tokens of an image has not been looked at"
_FEW = "its encoder compresses an image to few tokens itself ({what})"

_CONDITIONAL = {
    # images outside the sequence
    "Mllama": _NOT_IN_SEQUENCE
    + "the cross-attention layers of its decoder read their keys from a list of fixed length",
    "Blip": _ENCODER_DECODER,
    "Blip2": _QUERIES,
    "InstructBlip": _QUERIES,
    "InstructBlipVideo": _QUERIES,
    "Kosmos2": _QUERIES,
    "Kosmos2_5": _QUERIES,
    "Idefics2": _QUERIES,
    "Florence2": _ENCODER_DECODER,
    "Pix2Struct": _ENCODER_DECODER,
    "Udop": _ENCODER_DECODER,
    "T5Gemma2": _ENCODER_DECODER,
    "PPFormulaNet": _ENCODER_DECODER,
    "PI0": "it is a policy that answers with actions of a robot, not with text",
    # images as words
    "Chameleon": _DISCRETE,
    "Emu3": _DISCRETE,
    "Apertus1p5": _DISCRETE,
    # decoders
    "Gemma3n": "its layers take inputs of their own for each token, share keys, and run four "
    "parallel streams, so that a token cannot leave one layer alone; Gemma 3 works",
    "Gemma4Unified": _NOT_YET.format(what="images enter it without a vision encoder"),
    "Lfm2Vl": _HYBRID.format(what="short convolutions"),
    "Lfm3Vl": _HYBRID.format(what="short convolutions"),
    "Inkling": _HYBRID.format(what="short convolutions"),
    "Inkling2": _HYBRID.format(what="short convolutions"),
    "Inkling2Loop": _HYBRID.format(what="short convolutions"),
    "Qwen4Exp": _HYBRID.format(what="linear attention"),
    "MiniCPMV4_6": _HYBRID.format(what="linear attention"),
    "MiniCPMV4_7": _HYBRID.format(what="linear attention"),
    "Glm5Next": _HYBRID.format(what="linear attention"),
    "MistralLarge4": _MLA.format(what=_LATENT),
    "HYV4VL": _MLA.format(what=_LATENT),
    "Dots3Note": _MLA.format(what=_LATENT),
    "Kimi_K25": _MLA.format(what=_LATENT),
    "Llama4": _NOT_YET.format(
        what="its decoder attends in chunks, and scales queries by their place in the cache"
    ),
    # grids of their own
    "CohereCompass": _NOT_YET.format(what=_GRIDS.format(what="with features of inner layers")),
    "Cosmos3Edge": _NOT_YET.format(what=_GRIDS.format(what="M-RoPE")),
    "Cosmos3Omni": _NOT_YET.format(what=_GRIDS.format(what="with features of inner layers")),
    "Ernie4_5_VLMoe": _NOT_YET.format(what="its experts are chosen by the kind of a token"),
    "Exaone4_5_": _NOT_YET.format(what=_GRIDS.format(what="M-RoPE")),
    "GlmOcr": _NOT_YET.format(what=_GRIDS.format(what="as GLM-4V")),
    "HunYuanVL": _NOT_YET.format(what="newline, begin and end features stand among its tokens"),
    "PaddleOCRVL": _NOT_YET.format(what=_GRIDS.format(what="M-RoPE")),
    "Qwen2_5OmniThinker": _NOT_YET.format(what="sound stands among its visual tokens"),
    "Qwen3OmniMoeThinker": _NOT_YET.format(what="sound stands among its visual tokens"),
    "VideoLlama3": _NOT_YET.format(what="it drops tokens of videos itself, ahead of the decoder"),
    "LightOnOcr": _NOT_YET.format(what=_GRIDS.format(what="as Mistral 3")),
    "Ovis2": _NOT_YET.format(what="its images are mixtures of visual words, a run for every tile"),
    "QianfanOCR": _NOT_YET.format(what=_GRIDS.format(what="as InternVL")),
    "Molmo2": _NOT_YET.format(what="its pooled crops overlap"),
    "GraniteDocling": _NOT_YET.format(
        what="features of inner encoder layers are added inside its decoder"
    ),
    "Granite4Vision": _NOT_YET.format(
        what="features of inner encoder layers are added before layers of its decoder"
    ),
    # LLaVA with another vision encoder
    "VipLlava": _NOT_YET.format(what=_LLAVA_LIKE.format(what="features of five layers")),
    "FastVlm": _NOT_YET.format(what=_LLAVA_LIKE.format(what="a convolutional one")),
    "PerceptionLM": _NOT_YET.format(what=_LLAVA_LIKE.format(what="Perception Encoder")),
    "Janus": _NOT_YET.format(what=_LLAVA_LIKE.format(what="a second one makes images")),
    "DeepseekVL": _NOT_YET.format(what=_LLAVA_LIKE.format(what="SigLIP, aligned by an MLP")),
    "DeepseekVLHybrid": _NOT_YET.format(what=_LLAVA_LIKE.format(what="SigLIP and SAM together")),
    "HyperCLOVAXVisionV2": _NOT_YET.format(what=_UNSEEN),
    "Step3p7": _NOT_YET.format(what=_UNSEEN),
    # few tokens
    "Aria": _NOT_YET.format(what=_FEW.format(what="128 or 256 queries")),
    "GotOcr2": _NOT_YET.format(what=_FEW.format(what="256 for 1,024 × 1,024 pixels")),
    "DeepseekOcr2": _NOT_YET.format(what=_FEW.format(what="a compressor for documents")),
    "UnlimitedOcr": _NOT_YET.format(what=_FEW.format(what="a compressor for documents")),
    "MiniCPMOcr": _NOT_YET.format(what=_UNSEEN),
    "MuseGlimmer": _NOT_YET.format(what=_UNSEEN),
    "MuseSpark": _NOT_YET.format(what=_UNSEEN),
}

#: class name in transformers → one sentence
REFUSED: dict[str, str] = {
    **{f"{name}ForConditionalGeneration": reason for name, reason in _CONDITIONAL.items()},
    "DiffusionGemmaForBlockDiffusion": "it writes blocks of text by diffusion, and reads its "
    "prompt again for each; nothing is decoded token by token on a cache",
    "EvollaForProteinText2Text": "it reads proteins, not images",
    "FuyuForCausalLM": _NOT_YET.format(
        what="patches enter its decoder as they are, without a vision encoder"
    ),
    "GitForCausalLM": "its images stand before the prompt as a prefix that no token marks",
    "IdeficsForVisionText2Text": _CROSS,
    "MiniMaxM3SparseForConditionalGeneration": _MLA.format(what="indexed sparse attention"),
    "Mistral4ForCausalLM": _MLA.format(what=_LATENT),
    "NemotronH_Omni_Reasoning_V3": _HYBRID.format(what="Mamba"),
    "Phi4MultimodalForCausalLM": _NOT_YET.format(
        what="features enter its prompt inside an embedding module of its own"
    ),
    "VisionEncoderDecoderModel": _ENCODER_DECODER,
}
