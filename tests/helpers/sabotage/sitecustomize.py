"""Python imports this by itself where its folder is on the path: it makes rank processes end themselves at chosen places.

`SABOTAGE` names a file of JSON: `[[rank, step, place, signal], ...]`, a signal being FLIP and HANG, too.
Each happens once, in whichever process gets there first.
A place is a phase of a meta-step, `join` (a group, whose generation stands for the step), or `commit-N` for the N-th write to disk
of a checkpoint of that step or a later one (not every one that is due is written).
"""

import json
import os
import sys
import threading
import time
from pathlib import Path

HANG, FLIP, SLOW = 0, -1, -2
"""To do nothing any more, but give signs of life; to have the last bit of a parameter flipped, and go on; to be late every time."""


def install(plan_file: Path) -> None:
    import torch
    from torch.distributed import TCPStore

    from imaml_dist.algorithms import learner
    from imaml_dist.data.ahead import Ahead
    from imaml_dist.distributed.group import ProcessGroup
    from imaml_dist.distributed.worker import Worker
    from imaml_dist.storage import local
    from imaml_dist.training import checkpoints, writer
    from imaml_dist.training.state import MetaState

    plan = [tuple(entry) for entry in json.loads(plan_file.read_text())]
    workers: list[Worker] = []

    def reach(place: str, step: int | None = None, later: bool = False) -> None:
        if not workers:
            return
        worker = workers[-1]
        strike((worker.group.rank, worker.state.step if step is None else step, place), later)

    def strike(here: tuple[int, int, str], later: bool = False) -> None:
        place = here[2]
        for entry in plan:
            if entry[3] == SLOW and here[0] == entry[0] and place == entry[2]:
                time.sleep(0.25)
            elif entry[0] == here[0] and entry[2] == place and (entry[1] == here[1] or (later and entry[1] < here[1])):
                try:
                    os.close(os.open(f"{plan_file}.{'-'.join(map(str, entry))}", os.O_CREAT | os.O_EXCL))
                except FileExistsError:
                    continue
                if entry[3] == HANG:
                    threading.Event().wait()
                if entry[3] == FLIP:
                    weight = next(workers[-1].learner.model.parameters()).data.view(-1)
                    weight[:1] = (weight[:1].view(torch.int32) ^ 1).view(torch.float32)
                    continue
                os.kill(os.getpid(), entry[3])

    def before(owner: object, name: str, place: str, later: bool = False, previous_step: bool = False) -> None:
        original = getattr(owner, name)

        def sabotaged(*args, **kwargs):
            step = workers[-1].state.step - 1 if previous_step and workers else None
            if not later:
                reach(place, step)
            result = original(*args, **kwargs)
            if later:
                reach(place, step)
            return result

        setattr(owner, name, sabotaged)

    begin = Worker.__init__

    def noted(self, *args, **kwargs):
        begin(self, *args, **kwargs)
        workers.append(self)

    Worker.__init__ = noted
    before(Ahead, "__next__", "data")
    lap = learner._Clock.lap

    def lapped(self, phase):
        reach({"inner": "inner", "query": "solve"}.get(phase, ""))
        lap(self, phase)

    learner._Clock.lap = lapped
    before(ProcessGroup, "exchange", "reduce", later=True)
    before(MetaState, "apply", "update", later=True)
    # Only rank 0 writes; another rank gets that far at the end of the step.
    before(Worker, "_end_step", "report", later=True, previous_step=True)
    before(Worker, "_agree", "checkpoint", later=True, previous_step=True)
    before(writer.RunWriter, "record", "report", previous_step=True)
    before(checkpoints, "save", "checkpoint", previous_step=True)

    tell = TCPStore.set

    def told(store, key, value):
        generation, _, rank = key.partition("/here/")
        if rank:
            strike((int(rank), int(generation), "join"))
        return tell(store, key, value)

    TCPStore.set = told

    # A checkpoint is written in the background, when the worker has gone on already.
    saving, writes = None, 0
    save = checkpoints.save

    def counted_save(folder, step, *args):
        nonlocal saving, writes
        saving, writes = step - 1, 0
        try:
            return save(folder, step, *args)
        finally:
            saving = None

    checkpoints.save = counted_save
    for owner, name in (
        (checkpoints, "atomic_write"),
        (checkpoints, "sync_folder"),
        (local, "sync_folder"),
        (os, "fsync"),
    ):
        original = getattr(owner, name)

        def counted(*args, original=original):
            nonlocal writes
            if saving is not None and threading.current_thread().name == "writer":
                reach(f"commit-{writes}", saving, later=True)
                writes += 1
            return original(*args)

        setattr(owner, name, counted)


if "SABOTAGE" in os.environ and "imaml_dist.distributed.rank" in sys.orig_argv:
    install(Path(os.environ["SABOTAGE"]))
