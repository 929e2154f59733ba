"""How the embedded model is trained; ``scripts/train_mini.py`` runs it."""
