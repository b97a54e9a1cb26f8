"""Floor 3: what a run consists of: meta-state, outer optimiser, checkpoints, evaluation, run directory."""
