"""Floor 2: what a few-shot task is, as tensors."""
