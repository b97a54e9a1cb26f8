"""Credentials of object storage are nowhere in what a run leaves or says: when all is well, when storage refuses, in a crash."""

import json
import shutil
import signal
import tempfile
from pathlib import Path
from traceback import format_exception

import pytest
import yaml
from helpers import s3_server
from helpers.command import Command, imaml, imaml_here, wait_for_step
from helpers.fault_proxy import Fault, FaultProxy
from helpers.runs import raw_config

from imaml_dist.errors import StorageError
from imaml_dist.storage.opening import open_storage

pytestmark = pytest.mark.faults

CANARIES = ("CANARY-SECRET-KEY-77f1", "CANARY-SESSION-TOKEN-3a9c", "CANARY-KEY-ID-51d0")


@pytest.fixture
def secrets(tmp_path):
    secret, token, identity = CANARIES
    private = s3_server.environment(home=tmp_path / "home")
    return private | {
        "AWS_ACCESS_KEY_ID": identity,
        "AWS_SECRET_ACCESS_KEY": secret,
        "AWS_SESSION_TOKEN": token,
        "IMAML_CACHE": str(tmp_path / "cache"),
    }


@pytest.fixture
def config(moto_bucket, data, tmp_path):
    """A run from object storage, tracked by MLflow."""
    url, options = moto_bucket
    storage = open_storage(url, options)
    for path in data.iterdir():
        storage.write(path.name, path)
    return written(tmp_path, url, options.endpoint)


def written(folder: Path, url: str, endpoint: str, **run) -> Path:
    raw = raw_config(url, **run)
    raw["storage"] = {"endpoint": endpoint, "retry_seconds": 1.0, "read_timeout": 1.0}
    raw["tracking"] = {"mlflow": True}
    path = folder / "work" / "config.yaml"
    path.parent.mkdir(exist_ok=True)
    path.write_text(yaml.safe_dump(raw))
    return path


def assert_no_canary(output: str, *folders: Path) -> None:
    texts = [("the output", output.encode())]
    texts += [(str(p), p.read_bytes()) for folder in folders for p in folder.rglob("*") if p.is_file()]
    assert len(texts) > len(folders)
    for where, content in texts:
        for canary in CANARIES:
            assert canary.encode() not in content, f"{canary} is in {where}"


def test_of_a_run_that_ends_well(config, secrets, tmp_path):
    work = config.parent
    code, output = imaml("--debug", "train", str(config), "--run-dir", "runs/tiny", cwd=work, **secrets)
    assert code == 0, output
    assert (work / "runs" / "mlflow.db").is_file()
    assert json.loads((work / "runs" / "tiny" / "summary.json").read_text())["storage"]["s3_bytes"] > 0
    assert "object storage" in output
    assert_no_canary(output, work, tmp_path / "cache")


@pytest.mark.parametrize("kind", ["expired", "skew", "cut", "refuse"])
def test_of_a_run_that_storage_refuses(config, secrets, tmp_path, monkeypatch, kind):
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    raw = yaml.safe_load(config.read_text())
    with FaultProxy(raw["storage"]["endpoint"], Fault(kind, on="all", after=0)) as proxy:
        path = written(tmp_path, raw["data"]["url"], proxy.url)
        train = ("train", str(path), "--run-dir", "runs/tiny")
        code, output = imaml_here(*train, cwd=path.parent)
        assert code == 3, output
        assert_no_canary(output, path.parent)
        with pytest.raises(StorageError) as caught:
            imaml_here("--debug", *train, cwd=path.parent)
        assert_no_canary("".join(format_exception(caught.value)), path.parent)


@pytest.mark.slow
def test_of_ray_workers_and_of_their_crash(config, secrets, tmp_path):
    raw = yaml.safe_load(config.read_text())
    path = written(tmp_path, raw["data"]["url"], raw["storage"]["endpoint"], backend="ray", workers=2, steps=10_000)
    work, ray = path.parent, Path(tempfile.mkdtemp(prefix="r", dir="/tmp"))  # sockets have short paths
    try:
        with Command("train", str(path), "--run-dir", "runs/tiny", cwd=work, RAY_TMPDIR=str(ray), **secrets) as command:
            wait_for_step(work / "runs" / "tiny" / "metrics.jsonl", 2, command)
            command.kill(signal.SIGABRT)
            command.wait()
            assert_no_canary(command.output, work)
        assert list(ray.rglob("*.log")), "Ray's logs are looked at, too"
        assert_no_canary("", ray)
    finally:
        shutil.rmtree(ray)
