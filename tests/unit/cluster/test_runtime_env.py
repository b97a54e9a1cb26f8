"""What travels with a job: what was listed, and no secret, wherever it lies."""

import json
import zipfile

import pytest
from ray._private.runtime_env.packaging import create_package
from ray._private.runtime_env.validation import parse_and_validate_env_vars

from cluster.runtime_env import may_travel, runtime_env, staged, travelling
from imaml_dist.errors import InputError

CANARY = "CANARY-9d1f"

SECRETS = (
    "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE", "AWS_SHARED_CREDENTIALS_FILE",
    "AWS_WEB_IDENTITY_TOKEN_FILE", "MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD",
    "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "KUBECONFIG", "HOME", "PATH", "GITHUB_TOKEN", "HF_TOKEN", "PGPASSWORD",
    "WANDB_API_KEY", "xAWS_REGION", "AWS_REGION_SECRET", "RAY_TRAIN", "SSH_AUTH_SOCK",
)  # fmt: skip


def test_no_secret_of_the_environment_travels(tmp_path):
    environment = {name: f"{CANARY}-{name}" for name in SECRETS} | {"AWS_REGION": "eu-1", "RAY_TRAIN_X_S": "3"}
    described = runtime_env(tmp_path, environment)
    assert CANARY not in json.dumps(described)
    assert described["env_vars"] == {"AWS_REGION": "eu-1", "RAY_TRAIN_X_S": "3"}
    assert parse_and_validate_env_vars(described["env_vars"]) == described["env_vars"]


@pytest.mark.parametrize("name", SECRETS)
def test_each_of_them_stays(name):
    assert not may_travel(name)


@pytest.mark.parametrize("name", ["MLFLOW_TRACKING_URI", "AWS_ENDPOINT_URL_S3"])
def test_a_url_with_credentials_is_refused_and_not_repeated(name):
    with pytest.raises(InputError, match=name) as caught:
        travelling({name: f"https://me:{CANARY}@example.org"})
    assert CANARY not in str(caught.value)


def packed(folder, target):
    """Name -> text of every file that Ray would send."""
    create_package(str(folder), target, include_gitignore=True, excludes=runtime_env(folder, {})["excludes"])
    with zipfile.ZipFile(target) as archive:
        return {name: archive.read(name).decode() for name in archive.namelist() if not name.endswith("/")}


def test_ray_leaves_behind_what_is_excluded(tmp_path):
    folder = tmp_path / "work"
    (folder / "mine").mkdir(parents=True)
    (folder / "mine" / "model.py").write_text("x = 1\n")
    for name in (".env", ".env.production", ".git/config", ".aws/credentials", ".ssh/id", ".netrc", "a/server.pem", "tls.key",
                 ".kube/config", ".config/gcloud/x.json", "a/.docker/config.json", ".git-credentials",
                 "mlflow.db", "runs/tiny/summary.json", "data/index.json", ".venv/lib/x.py", "a/__pycache__/x.pyc"):  # fmt: skip
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(CANARY)
    assert packed(folder, tmp_path / "packed.zip") == {"mine/model.py": "x = 1\n"}


def test_a_staged_folder_travels_as_the_folder_does_with_more_files(tmp_path):
    folder = tmp_path / "work"
    (folder / "mine").mkdir(parents=True)
    (folder / "mine" / "model.py").write_text("x = 1\n")
    (folder / "own").write_text("theirs")
    (folder / "ignored.txt").write_text(CANARY)
    (folder / ".gitignore").write_text("*.txt\n*.yaml\n")
    (folder / ".env").write_text(CANARY)
    with staged(folder, {"own": "ours"}) as made:
        assert packed(made, tmp_path / "packed.zip") == {"mine/model.py": "x = 1\n", "own": "ours"}
    assert not made.exists()
    assert (folder / "own").read_text() == "theirs"


def test_modules_that_lie_elsewhere_come_along(tmp_path):
    package = tmp_path / "elsewhere" / "mine"
    package.mkdir(parents=True)
    with pytest.raises(InputError, match="no __init__"):
        runtime_env(tmp_path, {}, [package])
    (package / "__init__.py").touch()
    assert runtime_env(tmp_path, {}, [package], ["*.bin"])["py_modules"] == [str(package)]
    with pytest.raises(InputError, match="is not a folder"):
        runtime_env(tmp_path / "none", {})
