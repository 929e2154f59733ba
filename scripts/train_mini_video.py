#!/usr/bin/env python3
"""Train the embedded video model ("mini-video") from mini's weights; resumes where it stopped.

    python3 scripts/dev.py shell -- python scripts/train_mini_video.py --out runs/mini-video

Phases: ``vision`` and ``language`` are independent of each other, ``joint`` starts from both. What
comes out is described in tokprune/models/mini-video/README.md.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from mini_training.attention import use_for
from mini_training.video_joint import restore_video, train_video_joint
from mini_training.video_language import train_video_language
from mini_training.video_model import build_video_model, save_video
from mini_training.video_symbols import VideoSymbols
from mini_training.video_vision import train_video_vision

PHASES = ("vision", "language", "joint")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/mini-video"))
    parser.add_argument("--phase", choices=PHASES, help="only this one (default: all in turn)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--vision-clips", type=int, default=6_000)
    parser.add_argument("--vision-lr", type=float, default=2e-3)
    parser.add_argument("--language-clips", type=int, default=22_000)
    parser.add_argument("--language-lr", type=float, default=3e-3)
    parser.add_argument("--joint-clips", type=int, default=3_750)
    parser.add_argument("--joint-lr", type=float, default=1e-3)
    parser.add_argument(
        "--language-checked", type=int, default=40, help="clips per type in a check"
    )
    parser.add_argument("--joint-checked", type=int, default=6, help="clips per type in a check")
    parser.add_argument("--save", type=Path, help="write the model folder here when all is done")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    model = build_video_model()
    use_for(model, device)
    symbols = VideoSymbols(model.get_input_embeddings().weight)
    if options.phase in (None, "vision"):
        train_video_vision(model, symbols, options.out / "vision", options.vision_clips,
                           options.vision_lr, device)  # fmt: skip
    if options.phase in (None, "language"):
        train_video_language(model, symbols, options.out / "language", options.language_clips,
                             options.language_lr, device,
                             checked=options.language_checked)  # fmt: skip
    if options.phase in (None, "joint"):
        train_video_joint(model, symbols, options.out, options.joint_clips, options.joint_lr,
                          device, checked=options.joint_checked)  # fmt: skip
    if options.save is not None:
        model = build_video_model()
        restore_video(model, *(options.out / phase for phase in PHASES))
        save_video(model, options.save)
    return 0


if __name__ == "__main__":
    sys.exit(main())
