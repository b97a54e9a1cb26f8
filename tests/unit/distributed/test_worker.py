"""The training loop of real tiny runs: which steps are skipped, when it gives up, and how it begins warm."""

import json
import shutil

import pytest
import torch
from helpers.runs import Spoilt, spoilt_worker, tiny, train_alone
from safetensors.torch import save_file
from torch import nn

from imaml_dist.algorithms.learner import TaskGradients
from imaml_dist.distributed.chunks import chunks_of
from imaml_dist.distributed.group import Alone
from imaml_dist.distributed.meta_test import shared_accuracy
from imaml_dist.distributed.ray_train import _absolute
from imaml_dist.distributed.reduction import tree_sum
from imaml_dist.distributed.resumption import resume
from imaml_dist.distributed.stop import Stop
from imaml_dist.distributed.worker import Worker
from imaml_dist.errors import CheckpointError, ConfigError, InputError, TrainingError
from imaml_dist.tracking import metrics_file
from imaml_dist.training import checkpoints
from imaml_dist.training.meta_parameters import MetaParameters
from imaml_dist.training.outer import learning_rate, make_optimizer
from imaml_dist.training.run_directory import RunDirectory
from imaml_dist.training.state import MetaState, sha256_of
from imaml_dist.training.writer import RunWriter

ALONE = ("validate.tasks=0", "evaluate.tasks=0")


def begun(config, path):
    run = RunDirectory(path)
    run.begin(config)
    return run


def begin(worker):
    """Bring the worker to where it begins."""
    resume(worker.config, worker.run, worker.group, worker.learner, worker.state, None, None)


def records(path):
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def tensors_of(path):
    return checkpoints.load_newest(path / "checkpoints")[0]


def model_hash(tensors):
    return sha256_of({n: t for n, t in tensors.items() if n.startswith("model.")})


def test_a_step_is_skipped_at_more_than_half_bad_tasks_and_then_everything_stands_still(data, tmp_path):
    """8 tasks a step. Step 1: 4 are bad, applied. Steps 2 and 3: 5 and 8 are bad, skipped. Step 4 goes on where 1 ended."""
    config = tiny(data, *ALONE, "outer.schedule=linear", steps=5, checkpoint_every=1, keep=9)
    begun(config, tmp_path / "run")
    spoilt_worker(config, tmp_path / "run", Alone(), {1: 4, 2: 5, 3: 8}).run_to_end()
    found = records(tmp_path / "run")
    assert [r["step_skipped"] for r in found] == [0, 0, 1, 1, 0]
    assert [r["updates"] for r in found] == [1, 2, 2, 2, 3]
    assert [r["accepted"] for r in found] == [8, 4, 3, 0, 8]
    assert [r["excluded_bad_episode"] for r in found if "excluded_bad_episode" in r] == [4, 5, 8]
    assert [r["lr"] for r in found] == [learning_rate(config.outer, updates, 5) for updates in (0, 1, 2, 2, 2)]
    states = [checkpoints.load(path) for path in sorted((tmp_path / "run" / "checkpoints").iterdir())]
    hashes = [sha256_of(tensors) for tensors, _ in states]
    assert len(set(hashes)) == 3
    assert hashes[1] == hashes[2] == hashes[3], "parameters and optimiser"
    assert [facts["updates"] for _, facts in states] == [1, 2, 2, 2, 3]
    assert [facts["skipped_in_a_row"] for _, facts in states] == [0, 0, 1, 2, 0]


@pytest.mark.parametrize("bad", [0, 1, 3])
def test_the_mean_of_a_step_with_bad_tasks_is_bit_equal_to_that_of_the_accepted_ones(data, tmp_path, bad):
    """8 tasks in chunks of 2. The tree stays as it is; a bad task is a zero in it and does not count."""
    config = tiny(data, *ALONE, steps=1)
    begun(config, tmp_path / "run")
    worker = spoilt_worker(config, tmp_path / "run", Alone(), {0: bad})
    clean = worker.train_source.source
    chunks = [worker.learner.task_gradients(clean.episodes(0, chunk)) for chunk in chunks_of(8, 2)]
    assert all(bool(chunk.accepted.all()) for chunk in chunks)
    rows = torch.stack([chunk.rows for chunk in chunks])
    rows.view(8, -1)[:bad] = 0.0
    expected = tree_sum(torch.stack([tree_sum(chunk) for chunk in rows])) / (8 - bad)
    applied = []
    worker.state.apply = lambda gradient, rate: applied.append(gradient)
    worker._episodes = (worker.train_source.episodes(0, chunk) for chunk in chunks_of(8, 2))
    record = worker._meta_step(0)
    assert record["accepted"] == 8 - bad
    assert torch.equal(applied[0], expected)
    torch.testing.assert_close(expected, rows.view(8, -1)[bad:].double().mean(0).float(), rtol=1e-4, atol=1e-6)


def test_bad_tasks_of_an_evaluation_are_named_on_every_rank(data, tmp_path):
    worker = Worker(tiny(data), begun(tiny(data), tmp_path / "run"), Alone())
    assert shared_accuracy(worker.config, Alone(), worker.learner, worker.val_source, 12).mean > 0
    with pytest.raises(InputError, match=r"2 of 12 tasks cannot be evaluated, .*: task 0, 1; mend"):
        shared_accuracy(worker.config, Alone(), worker.learner, Spoilt(worker.val_source, {0: 2}), 12)


def test_it_gives_up_after_so_many_skips_in_a_row_and_tells_how_their_tasks_ended(data, tmp_path):
    config = tiny(data, *ALONE, steps=20, give_up_after=3)
    begun(config, tmp_path / "run")
    # two skips do not end it, an applied step forgives them, and bad tasks of other steps are not in the message
    bad = {0: 2, 1: 8, 2: 8, 4: 8, 5: 5, 6: 6}
    with pytest.raises(TrainingError) as caught:
        spoilt_worker(config, tmp_path / "run", Alone(), bad).run_to_end()
    message = str(caught.value)
    assert "3 meta-steps in a row were skipped" in message
    assert "(their tasks ended 5 OK, 19 BAD_EPISODE)" in message
    assert "last good checkpoint is of step 6" in message
    assert caught.value.exit_code == 4

    more = tiny(data, *ALONE, steps=8, give_up_after=4)
    begun(more, tmp_path / "run")  # more patience may be had by the same run
    spoilt_worker(more, tmp_path / "run", Alone(), bad).run_to_end()
    assert records(tmp_path / "run")[-1]["updates"] == 3


def test_what_the_algorithm_learns_is_in_every_record(data, tmp_path):
    config = tiny(data, *ALONE, steps=1)
    worker = Worker(config, begun(config, tmp_path / "run"), Alone())
    summaries = {"algorithm_lam_min": 0.1, "algorithm_lam_median": 0.2, "algorithm_lam_max": 0.4}
    worker.state.parameters = MetaParameters(worker.learner.model, describe=lambda: summaries)
    worker.run_to_end()
    assert summaries.items() <= records(tmp_path / "run")[0].items()


@pytest.fixture(scope="module")
def source(data, tmp_path_factory):
    """A run of two steps."""
    path = tmp_path_factory.mktemp("source") / "run"
    config = tiny(data, *ALONE, steps=2, seed=5)
    Worker(config, begun(config, path), Alone()).run_to_end()
    return path


def test_a_run_begins_with_the_parameters_of_a_run_a_checkpoint_or_a_file(data, tmp_path, source):
    tensors = tensors_of(source)
    model = {n.removeprefix("model."): t for n, t in tensors.items() if n.startswith("model.")}
    save_file(model, tmp_path / "model.safetensors")
    places = (source, checkpoints.path_of(source / "checkpoints", 2), tmp_path / "model.safetensors")
    for number, place in enumerate(places):
        config = tiny(data, *ALONE, f"warm_start.path={place}", steps=1)
        run = begun(config, tmp_path / f"run-{number}")
        worker = Worker(config, run, Alone())
        begin(worker)
        assert model_hash(worker.state.tensors()) == model_hash(tensors)
        assert worker.state.updates == worker.state.step == 0
        assert not worker.state.optimizer.state, "the optimiser begins afresh"
        (start,) = run.starts()
        assert start["warm_start"] == {"path": str(place), "sha256": model_hash(tensors)}


def test_a_line_that_a_crash_left_half_written_is_dropped_before_the_run_goes_on(data, tmp_path):
    """At the very first step, and at that of the newest checkpoint: no whole line is dropped."""
    for begins, ends in ((0, 2), (2, 4)):
        config = tiny(data, *ALONE, steps=ends)
        run = begun(config, tmp_path / "run")
        with open(run.metrics_file, "a") as file:
            file.write(f'{{"step": {begins}, "ti')
        Worker(config, run, Alone()).run_to_end()
        assert [record["step"] for record in metrics_file.read(run.metrics_file)] == list(range(ends))


def test_skipped_layers_keep_the_initial_values_of_the_run(data, tmp_path, source):
    config = tiny(data, *ALONE, f"warm_start.path={source}", "warm_start.skip=[head]", steps=1)
    worker = Worker(config, begun(config, tmp_path / "run"), Alone())
    head = {n: v.clone() for n, v in worker.learner.model.state_dict().items() if n.startswith("head")}
    assert head, "conv4 has a head"
    begin(worker)
    warm, there = worker.learner.model.state_dict(), tensors_of(source)
    for name, value in warm.items():
        assert torch.equal(value, head.get(name, there[f"model.{name}"])), name


def test_a_resumed_run_does_not_begin_warm_again_and_needs_its_source_no_more(data, tmp_path, source):
    copy = tmp_path / "source"
    shutil.copytree(source, copy)
    expected = train_alone(tiny(data, f"warm_start.path={source}"), tmp_path / "whole")
    overrides = (f"warm_start.path={copy}",)
    train_alone(tiny(data, *overrides, steps=4), tmp_path / "parts")
    shutil.rmtree(copy)
    assert train_alone(tiny(data, *overrides), tmp_path / "parts") == expected
    starts = RunDirectory(tmp_path / "parts").starts()
    assert ["warm_start" in start for start in starts] == [True, False]
    assert expected["params"] != train_alone(tiny(data), tmp_path / "cold")["params"]
    untrained = [
        json.loads((tmp_path / name / "evaluation.json").read_text())["untrained"] for name in ("whole", "cold")
    ]
    assert untrained[0] == untrained[1], "the baseline is the plain initial network"


@pytest.mark.parametrize(
    ("override", "error", "says"),
    [
        ("data.way=4", CheckpointError, r"'head\.weight' in shape \(3, 32\), this model in \(4, 32\)|in shape"),
        ("warm_start.path=/no/such/place", ConfigError, r"warm_start\.path: there is no /no/such/place"),
    ],
)
def test_a_warm_start_that_does_not_fit_ends_the_run_before_it_begins(data, tmp_path, source, override, error, says):
    config = tiny(data, *ALONE, f"warm_start.path={source}", override)
    run = begun(config, tmp_path / "run")
    with pytest.raises(error, match=says):
        Worker(config, run, Alone()).run_to_end()
    assert not run.metrics_file.exists()


def test_ray_workers_get_paths_that_mean_the_same_to_them(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sections = _absolute(tiny(data, "data.url=blobs", "warm_start={path: runs/a, skip: [head]}"))
    assert sections["data"]["url"] == str(tmp_path / "blobs")
    assert sections["warm_start"] == {"path": str(tmp_path / "runs" / "a"), "skip": ["head"]}
    assert _absolute(tiny(data))["warm_start"]["path"] is None


def test_own_parameters_are_stepped_at_their_own_rate_without_decay_and_saved(data, tmp_path):
    """Their gradient is 1 in every task here: Adam then steps by exactly the rate."""
    config = tiny(data, *ALONE, "outer.optimizer=adamw", "outer.weight_decay=0.5", steps=2)
    worker = Worker(config, begun(config, tmp_path / "run"), Alone())
    parameters = MetaParameters(worker.learner.model, {"lam": nn.Parameter(torch.tensor([0.25]))}, 0.01)
    worker.state = MetaState(parameters, make_optimizer(parameters, config.outer))
    model_alone = worker.learner.task_gradients

    def with_own(episodes):
        out = model_alone(episodes)
        return TaskGradients(torch.cat([out.rows, torch.ones(len(episodes), 1)], 1), out.tasks, out.seconds)

    worker.learner.task_gradients = with_own
    worker.run_to_end()
    saved = tensors_of(tmp_path / "run")["algorithm.lam"]
    torch.testing.assert_close(saved, torch.tensor([0.25 - 2 * 0.01]), rtol=1e-6, atol=0)


def test_patience_ends_a_run_at_the_same_step_on_any_way_there_and_tests_the_best_checkpoint(data, tmp_path):
    config = tiny(data, "validate.patience=2", "outer.lr=1e-12", steps=60)
    run = begun(config, tmp_path / "run")
    assert Worker(config, run, Alone()).run_to_end() is Stop.PLATEAU
    _, facts = checkpoints.load_newest(run.checkpoints)
    assert facts["best"]["step"] == 3, "nothing can become better"
    assert facts["ledger"]["steps"] == 3 + 2 * 3
    assert json.loads(run.evaluation_file.read_text())["step"] == 3
    assert Worker(config, run, Alone()).run_to_end() is Stop.PLATEAU, "and does not go on when it is asked again"
    assert checkpoints.load_newest(run.checkpoints)[1]["ledger"] == facts["ledger"]


def test_a_checkpoint_is_written_at_the_latest_after_some_minutes(data, tmp_path):
    config = tiny(data, *ALONE, "run.checkpoint_minutes=1e-9", steps=4, checkpoint_every=100, keep=9)
    run = begun(config, tmp_path / "run")
    worker = Worker(config, run, Alone())
    saved = []
    checkpoint = RunWriter.checkpoint
    worker_steps = lambda pen, step, *rest: (saved.append(step), checkpoint(pen, step, *rest))  # noqa: E731
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunWriter, "checkpoint", worker_steps)
        worker.run_to_end()
    assert saved == [1, 2, 3, 4]


def test_patience_without_validation_is_refused(data):
    with pytest.raises(ConfigError, match=r"validate.patience: 2 given, but validate.tasks = 0 validates nothing"):
        tiny(data, "validate.patience=2", "validate.tasks=0")
