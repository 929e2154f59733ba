#!/usr/bin/env python3
"""Train the embedded model ("mini") from scratch, on CPU or CUDA; resumes where it stopped.

    python3 scripts/dev.py shell -- python scripts/train_mini.py --out runs/mini

Phases: ``language`` and ``vision`` are independent of each other (on two cores, run them side by
side with ``--phase`` and ``--threads 1``), ``joint`` starts from both. What
comes out is described in tokprune/models/mini/README.md.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from mini_training.attention import use_for
from mini_training.joint import train_joint
from mini_training.language import train_language
from mini_training.model import build_model, save
from mini_training.symbols import Symbols
from mini_training.vision import train_vision
from safetensors.torch import load_file

PHASES = ("language", "vision", "joint")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/mini"))
    parser.add_argument("--phase", choices=PHASES, help="only this one (default: all in turn)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--save", type=Path, help="write the model folder here when all is done")
    parser.add_argument("--language-scenes", type=int, default=22_000)
    parser.add_argument("--vision-scenes", type=int, default=26_000)
    parser.add_argument("--vision-lr", type=float, default=3e-3)
    parser.add_argument("--joint-scenes", type=int, default=6_800)
    parser.add_argument("--joint-lr", type=float, default=1.2e-3)
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--check-batches", type=int, default=4, help="batches of a check")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    model = build_model()
    use_for(model, device)
    symbols = Symbols(model.get_input_embeddings().weight)
    if options.phase in (None, "language"):
        train_language(model, symbols, options.out / "language", options.language_scenes,
                       options.lr, device, checked=options.check_batches)  # fmt: skip
    if options.phase in (None, "vision"):
        train_vision(model, symbols, options.out / "vision", options.vision_scenes,
                     options.vision_lr, device)  # fmt: skip
    if options.phase in (None, "joint"):
        train_joint(model, symbols, options.out, options.joint_scenes, options.joint_lr, device,
                    checked=options.check_batches)  # fmt: skip
    if options.save is not None:
        ship(options.out, options.save)
    return 0


def ship(out: Path, folder: Path) -> None:
    """Write the model folder from the float32 masters: those of the last phase, and of the tower's
    layers behind the feature layer, which it leaves alone."""
    model = build_model()
    state = {
        **load_file(out / "vision" / "state.safetensors"),
        **load_file(out / "joint" / "state.safetensors"),
    }
    parts = {"tower": model.model.vision_tower, "projector": model.model.multi_modal_projector,
             "language": model.model.language_model}  # fmt: skip
    with torch.no_grad():
        for part, module in parts.items():
            for name, p in module.named_parameters():
                if (saved := state.get(f"master.{part}.{name}")) is not None:
                    p.copy_(saved)
    save(model, folder)


if __name__ == "__main__":
    sys.exit(main())
