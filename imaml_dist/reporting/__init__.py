"""Floor 4: figures and the single-file HTML report (the only matplotlib import)."""
