"""The process of one trial of a sweep: `imaml train` that ends with its keeper.

python -m pipelines.trial MLFLOW_PARENT CONFIG RUN_DIRECTORY KEEPERS_PROCESS_ID

MLFLOW_PARENT may be empty: the sweep has none, or its server is away.
"""

from __future__ import annotations

import sys

from imaml_dist.distributed.orphans import end_with_parent
from pipelines.cli import main

if __name__ == "__main__":
    parent, config, run, keeper = sys.argv[1:]
    end_with_parent(int(keeper))
    sys.argv[1:] = ["train", config, "--run-dir", run, *(["--mlflow-parent", parent] if parent else [])]
    main()
