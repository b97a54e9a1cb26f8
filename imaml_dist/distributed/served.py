"""The code of a registered model: MLflow copies this file into the model, and runs it to load the model."""

from imaml_dist.distributed.adapted import load
from imaml_dist.tracking.pyfunc import serve

serve(load)
