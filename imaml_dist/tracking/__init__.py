"""Floor 2: what a run reports: JSON lines always, MLflow beside them."""
