"""Runs whose directory lies in object storage: the bits of a run in a folder, whatever storage does, and no folder in common."""

import json
import os
import shutil
import signal
import threading
import time

import pytest
from helpers.command import Command, imaml
from helpers.fault_proxy import Fault, FaultProxy
from helpers.gloo import run_group
from helpers.runs import raw_config, seen_elsewhere, tiny, train_alone, write_config
from helpers.s3_server import environment

from imaml_dist.config.load import build_config
from imaml_dist.distributed.build import resolve
from imaml_dist.distributed.group import Alone, ProcessGroup
from imaml_dist.distributed.worker import Worker
from imaml_dist.errors import CheckpointError, ConfigError, InputError, LeaseLostError, StorageError
from imaml_dist.storage.lease import Lease
from imaml_dist.storage.opening import open_storage
from imaml_dist.storage.options import StorageOptions
from imaml_dist.tracking import metrics_file
from imaml_dist.training import run_directory, workspace
from imaml_dist.training.remote_run import open_run


@pytest.fixture(scope="module")
def gold(data, tmp_path_factory):
    return train_alone(tiny(data), tmp_path_factory.mktemp("gold") / "run")


def train(config, url, options, fresh=False):
    """As `imaml train` with the local backend does, in this process."""
    run = open_run(url, options)
    run.check_usable()
    with run.driving() as held:
        assert held
        run.begin(config, fresh=fresh)
        with run.following():
            Worker(config, run, Alone()).run_to_end()
        run.collect()
    return run


def test_the_bits_are_those_of_a_folder(bucket, data, gold, tmp_path):
    url, options = bucket
    run = train(tiny(data), f"{url}/runs/a", options)
    assert seen_elsewhere(f"{url}/runs/a", options) == (gold, list(range(6)))
    left = {name for name, _ in open_storage(f"{url}/runs/a", options).names()}
    assert "stop" not in left
    assert run.checkpoint_steps() == [3, 4, 6], "the newest three; step 3 was the best by validation"
    assert train(tiny(data, steps=8), f"{url}/runs/a", options).starts()[-1]["step"] == 6, "it goes on"


def test_it_goes_on_from_the_newest_checkpoint_that_verifies(moto_bucket, data, gold, tmp_path):
    url, options = moto_bucket
    train(tiny(data, steps=4), url, options)
    storage = open_storage(url, options)
    name = "checkpoints/step-00000004/state.safetensors"
    whole = bytearray(storage.read(name))
    whole[len(whole) // 2] ^= 1
    storage.write(name, bytes(whole))
    with pytest.raises(CheckpointError, match=f"{url}/checkpoints/step-00000004/state.safetensors has sha256"):
        open_run(url, options).load_checkpoint(4)
    run = train(tiny(data), url, options)
    start = run.starts()[-1]
    assert start["step"] == 3
    assert len(start["rejected"]) == 1
    assert seen_elsewhere(url, options) == (gold, list(range(6)))


@pytest.mark.parametrize("name", ["manifest.json", "state.json", "state.safetensors"])
@pytest.mark.parametrize("how", ["missing", "empty", "cut", "longer", "huge"])
def test_a_checkpoint_that_is_damaged_is_refused_by_its_url(moto_bucket, data, name, how):
    url, options = moto_bucket
    train(tiny(data, "evaluate.tasks=0", steps=2), url, options)
    storage = open_storage(url, options)
    path = f"checkpoints/step-00000002/{name}"
    content = storage.read(path)
    if how == "missing":
        storage.remove(path)
    else:
        changed = {"empty": b"", "cut": content[:-1], "longer": content + b" ", "huge": content + bytes(100_000)}
        storage.write(path, changed[how])
    with pytest.raises(CheckpointError, match=f"{url}/checkpoints/step-00000002"):
        open_run(url, options).load_checkpoint(2)


@pytest.mark.parametrize("kind", ["503", "refuse", "lose", "reset"])
def test_storage_that_fails_again_and_again_changes_nothing(moto_bucket, data, gold, tmp_path, kind):
    url, options = moto_bucket
    asked = ("GET",) if kind == "reset" else ("PUT", "GET", "HEAD", "DELETE")  # whose answers have a body
    faults = [Fault(kind, on=on, every=2 if on == "GET" else 4, after=100) for on in asked]
    train(tiny(data, steps=3), url, options)
    with FaultProxy(options.endpoint, *faults) as proxy:
        train(tiny(data), url, StorageOptions(endpoint=proxy.url, retry_seconds=30.0))
        assert proxy.counts[kind] > 0
    assert seen_elsewhere(url, options) == (gold, list(range(6)))


def test_storage_that_is_away_does_not_stop_meta_steps_and_is_owed_nothing_in_the_end(moto_bucket, data, tmp_path):
    """Every write of a checkpoint fails, without patience, until the last step has been taken."""
    url, options = moto_bucket
    impatient = StorageOptions(endpoint=options.endpoint, retry_seconds=0.0)
    config, run = tiny(data, "evaluate.tasks=0", steps=12), open_run(url, impatient)
    real = run._objects.storage.write
    failing = []

    def write(name, content, *, only_if=None):
        steps = metrics_file.reached(run.metrics_file)
        if name.startswith("checkpoints/") and steps < 12:
            failing.append(steps)
            raise StorageError("away")
        return real(name, content, only_if=only_if)

    run._objects.storage.write = write
    with run.driving():
        run.begin(config)
        Worker(config, run, Alone()).run_to_end()
    assert failing
    assert max(open_run(url, options).checkpoint_steps()) == 12
    assert seen_elsewhere(url, options)[1] == list(range(12))


def test_storage_that_stays_away_ends_the_run_with_what_to_do(moto_bucket, data):
    url, options = moto_bucket
    config, run = (
        tiny(data, "evaluate.tasks=0"),
        open_run(url, StorageOptions(endpoint=options.endpoint, retry_seconds=0)),
    )
    real = run._objects.storage.write

    def write(name, content, *, only_if=None):
        if name.startswith("checkpoints/"):
            raise StorageError("away")
        return real(name, content, only_if=only_if)

    run._objects.storage.write = write
    with run.driving():
        run.begin(config)
        with pytest.raises(StorageError, match=f"{url} cannot be written .away.; mend that and run the same"):
            Worker(config, run, Alone()).run_to_end()
    train(config, url, options)
    assert seen_elsewhere(url, options)[1] == list(range(6))


def write_on(run, storage):
    """Whatever a process still does that does not know yet."""
    with run.writing(0.0) as held:
        assert held
        storage.write(run.writer_lock.name, b"{}")  # what another holder would do
        metrics_file.append(run.metrics_file, {"step": 1})
        for write in (
            lambda: run.save_checkpoint(1, {}, {"ledger": {"steps": 1}}),
            run.secure_metrics,
            lambda: run.record_start({}),
        ):
            with pytest.raises(LeaseLostError, match="took this one for dead"):
                write()
        time.sleep(2.5)  # a thread brings metrics every second
        pieces = [storage.read(name) for name, _ in storage.names("metrics/")]
        assert pieces == [b'{"step": 0, "of": "the other"}\n']
        assert run.checkpoint_steps() == []


def test_one_that_was_taken_for_dead_writes_nothing_more(moto_bucket, data):
    url, options = moto_bucket
    config = tiny(data, "evaluate.tasks=0")
    run = open_run(url, options)
    run.begin(config)
    storage = open_storage(url, options)
    storage.write("metrics/000000000000-0123abcd.jsonl", b'{"step": 0, "of": "the other"}\n')
    with pytest.raises(LeaseLostError):
        write_on(run, storage)
    assert storage.read(run.writer_lock.name) == b"{}", "and leaves the lock to its holder"


def test_training_ends_when_another_process_writes_the_run(moto_bucket, data):
    url, options = moto_bucket
    config, run = tiny(data, "evaluate.tasks=0", steps=10**6), open_run(url, options)
    run.begin(config)
    threading.Timer(3.0, lambda: open_storage(url, options).write(run.writer_lock.name, b"{}")).start()
    with pytest.raises(LeaseLostError, match="let that one finish"):
        Worker(config, run, Alone()).run_to_end()


def test_a_process_that_is_killed_while_it_begins_leaves_what_is_in_storage(moto_bucket, data, gold):
    """Its folder is that of the next one, and holds only a part."""
    url, options = moto_bucket
    train(tiny(data, steps=4), url, options)
    run = open_run(url, options)
    real = run._objects.pull

    def killed(*files):
        raise KeyboardInterrupt

    run._objects.pull = killed
    lease_left = Lease.release
    Lease.release = Lease.leave  # a killed process gives nothing back
    try:
        with pytest.raises(KeyboardInterrupt), run.writing(0.0):
            pass
    finally:
        Lease.release = lease_left
    run._objects.pull = real
    run.metrics_file.unlink()
    run.begin(tiny(data))
    Worker(tiny(data), run, Alone()).run_to_end()
    assert seen_elsewhere(url, options)[1] == list(range(6))


@pytest.mark.parametrize("away", range(1, 6))
def test_fresh_that_is_broken_off_can_be_given_again(moto_bucket, data, away):
    url, options = moto_bucket
    train(tiny(data, "evaluate.tasks=0", steps=2), url, options)
    run = open_run(url, options)
    real, left = run._objects.storage.remove, [away]

    def remove(name):
        left[0] -= 1
        if left[0] == 0:
            raise StorageError("away")
        real(name)

    run._objects.storage.remove = remove
    with pytest.raises(StorageError, match="away"):
        run.begin(tiny(data, "outer.lr=0.5"), fresh=True)
    again = open_run(url, options)
    again.check_usable()
    again.begin(tiny(data, "outer.lr=0.5"), fresh=True)
    assert again.checkpoint_steps() == []


def test_fresh_does_not_clear_what_is_still_written_to(moto_bucket, data, monkeypatch):
    url, options = moto_bucket
    monkeypatch.setattr(run_directory, "WRITER_WAIT_S", 0.1)
    config = tiny(data, collective_timeout=1)
    run = open_run(url, options)
    run.begin(config)
    with open_run(url, options).writing(0), pytest.raises(StorageError, match="still written to"):
        run.begin(config, fresh=True)
    assert open_storage(url, options).read("config.yaml")
    run.begin(config, fresh=True)


def in_a_group(raw, url, options, folder):
    """One rank, in a folder that no other sees."""
    group = ProcessGroup()
    own = folder / str(group.rank)
    own.mkdir()
    config = resolve(build_config(raw), cuda=False)
    Worker(config, open_run(url, options, own), group).run_to_end()


def test_ranks_need_no_folder_in_common(moto_bucket, data, gold, tmp_path):
    url, options = moto_bucket
    open_run(url, options).begin(tiny(data, workers=2, steps=3))
    run_group(2, in_a_group, raw_config(data, workers=2, steps=3), url, options, tmp_path)
    for rank in (0, 1):
        shutil.rmtree(tmp_path / str(rank))
    open_run(url, options).begin(tiny(data, workers=2))
    run_group(2, in_a_group, raw_config(data, workers=2), url, options, tmp_path)
    assert seen_elsewhere(url, options) == (gold, list(range(6)))
    assert not list((tmp_path / "1").iterdir()), "what rank 0 reads it tells the others"


def test_fresh_starts_over_and_leaves_what_is_not_the_runs(moto_bucket, data, gold, tmp_path):
    url, options = moto_bucket
    train(tiny(data, "outer.lr=0.5"), f"{url}/a", options)
    open_storage(url, options).write("b/config.yaml", b"another's")
    with pytest.raises(ConfigError, match=r"outer.lr: 0.003 given, but the run in s3://.*/a was begun with 0.5"):
        train(tiny(data), f"{url}/a", options)
    train(tiny(data), f"{url}/a", options, fresh=True)
    assert seen_elsewhere(f"{url}/a", options) == (gold, list(range(6)))
    assert open_storage(url, options).read("b/config.yaml") == b"another's"


def test_a_run_that_goes_on_has_no_results_in_storage(moto_bucket, data):
    url, options = moto_bucket
    run = open_run(url, options)
    run.begin(tiny(data))
    run.write_json(run.summary_file, {})
    run.share(run.summary_file)
    run.withdraw_results()
    assert {name for name, _ in open_storage(url, options).names()} == {"config.yaml"}


def test_what_holds_no_run_is_left_alone(moto_bucket, data):
    url, options = moto_bucket
    open_storage(url, options).write("holiday.jpg", b"")
    with pytest.raises(
        InputError, match=f"{url} is not empty and holds no run .it holds 'holiday.jpg'.; choose another"
    ):
        open_run(url, options).check_usable()


def commanded(data, tmp_path, moto, **run):
    """Configuration and environment of a command."""
    config = write_config(tmp_path / "tiny.yaml", data, **run)
    return config, environment(home=tmp_path, AWS_ENDPOINT_URL_S3=moto, TMPDIR=str(tmp_path / "tmp"))


def test_the_commands(moto, moto_bucket, data, gold, tmp_path):
    url, options = moto_bucket
    (tmp_path / "tmp").mkdir()
    config, env = commanded(data, tmp_path, moto, steps=400)
    again = ("train", str(config), "--run-dir", f"{url}/r")
    with Command(*again, cwd=tmp_path, **env) as command:
        deadline = time.monotonic() + 120
        while not open_run(f"{url}/r", options).checkpoint_steps():
            assert command.process.poll() is None, command.wait()
            assert time.monotonic() < deadline
            time.sleep(0.2)
        command.kill(signal.SIGINT)
        assert command.wait() == 130, command.output
        assert f"the same command goes on from the last checkpoint: {url}/r" in command.output
    reached = max(open_run(f"{url}/r", options).checkpoint_steps())
    with Command(*again, cwd=tmp_path, **env) as command:  # killed this time, in mid-run
        while max(open_run(f"{url}/r", options).checkpoint_steps()) <= reached + 2:
            assert command.process.poll() is None, command.wait()
            time.sleep(0.1)
        command.kill(signal.SIGKILL)
    whole = max(open_run(f"{url}/r", options).checkpoint_steps())
    code, output = imaml(*again, "--set", f"run.steps={whole + 2}", cwd=tmp_path, **env)
    assert code == 0, output
    assert "found" not in output
    found, steps = seen_elsewhere(f"{url}/r", options)
    assert steps == list(range(whole + 2))
    assert found == train_alone(tiny(data, steps=whole + 2), tmp_path / "alone")
    code, output = imaml(*again, "--set", f"run.steps={whole + 2}", cwd=tmp_path, **env)
    assert code == 0
    assert f"{url}/r is finished" in output
    code, output = imaml("evaluate", f"{url}/r", "--tasks", "5", "--json", "e.json", cwd=tmp_path, **env)
    assert code == 0, output
    assert json.loads((tmp_path / "e.json").read_text())["tasks"] == 5
    storage = open_storage(f"{url}/r", options)
    storage.remove("report.html")
    code, output = imaml("report", f"{url}/r", cwd=tmp_path, **env)
    assert (code, output.strip()) == (0, f"{url}/r/report.html")
    assert b"<html" in storage.read("report.html")
    summary = json.loads(storage.read("summary.json"))
    assert summary["params_sha256"] == found["params"]
    code, output = imaml("evaluate", f"{url}/nothing", cwd=tmp_path, **env)
    assert (code, output.strip()) == (
        2,
        f"imaml: {url}/nothing holds no run (no config.yaml); give the --run-dir of a training run",
    )
    left = [path.name for path in (tmp_path / "tmp").glob("imaml-run-*")]
    assert len(left) <= 1, "only the killed command could not clear up"


def test_a_folder_of_a_process_that_is_gone_is_removed_by_the_next(tmp_path, monkeypatch):
    monkeypatch.setattr(workspace.tempfile, "tempdir", str(tmp_path))
    gone, young = tmp_path / "imaml-run-gone", tmp_path / "imaml-run-young"
    for folder in (gone, young):
        folder.mkdir()
        (folder / "file").touch()
    os.utime(gone, (1, 1))
    first = workspace.new_workspace()
    assert not gone.exists()
    assert young.exists()
    os.utime(first, (1, 1))
    second = workspace.new_workspace()
    assert first.exists(), "its process lives"
    assert first != second
