"""What ``scripts/gpu_check.py`` is made of, one idea a file."""
