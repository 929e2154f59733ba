"""Scripts of the original ``llava`` package, unmodified, compressed; see ``patches/README.md``."""
