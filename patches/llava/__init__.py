"""Load-time patch of the original ``llava`` package; the code is in tokprune's integrations."""

from tokprune.integrations.llava_v1.load_time import installed

__all__ = ["installed"]
