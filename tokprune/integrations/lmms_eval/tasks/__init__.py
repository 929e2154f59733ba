"""Tasks and scores for lmms-eval."""

from pathlib import Path

#: folder for ``--include_path``
TASKS = Path(__file__).parent / "yaml"
