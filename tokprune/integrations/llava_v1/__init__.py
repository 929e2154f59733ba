"""The original ``llava`` package (LLaVA 1.2.x): its classes on transformers 4.37.

Images and text meet in ``prepare_inputs_labels_for_multimodal``, which ``generate`` and the
forward both call, and which gives the decoder one tensor of embeddings. So that is where
compression gets in (:mod:`~tokprune.integrations.llava_v1.entry`), and the package's own packing
is asked where every feature goes (:mod:`~tokprune.integrations.llava_v1.packing`).
"""
