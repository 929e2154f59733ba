"""What goes into a model: prompts, images and frames."""
