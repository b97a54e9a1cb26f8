"""`imaml freeze-tasks`: write the tasks of an evaluation down, so that others can evaluate on exactly these."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from imaml_dist.config.load import load_config
from imaml_dist.data.frozen import freeze, publish
from imaml_dist.distributed.build import make_source, open_dataset, storage_options
from pipelines import console
from pipelines.evaluate import check_choice


def freeze_tasks(path: Path, overrides: Sequence[str], out: str, split: str, tasks: int) -> None:
    """Write the manifest of the tasks that `imaml evaluate` takes under a configuration.

    Raises:
        InputError: no such configuration, data set or split, or something else lies at `out`.
        StorageError: storage fails.
    """
    check_choice(split, tasks)
    config = load_config(path, overrides)
    content = freeze(make_source(config, open_dataset(config), split, training=False), tasks)
    new = publish(out, content, storage_options(config))
    digest = hashlib.sha256(content).hexdigest()
    console.out.print(
        f"{out}: {tasks} tasks of the {split} split, sha256 {digest[:12]}" + ("" if new else "; it is there already"),
        soft_wrap=True,
    )
