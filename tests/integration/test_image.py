"""The image's Dockerfile: what a linter would say, and every pip command of it in a fresh virtual environment."""

import os
import re
import shlex
import subprocess
import sys

import pytest
from helpers import dockerfile
from helpers.command import ROOT

TEXT = dockerfile.PATH.read_text()
IGNORE = dockerfile.PATH.with_suffix(".dockerignore")
BASE = "ARG BASE=python:3.11-slim-bookworm"
FROM = "FROM ${BASE}@${BASE_DIGEST} AS runtime"


def test_nothing_is_wrong_with_it():
    assert dockerfile.lint(TEXT) == []


MISTAKES = {
    "latest": (BASE, "ARG BASE=python:latest", "no tag"),
    "no tag": (BASE, "ARG BASE=python", "no tag"),
    "no digest": (FROM, "FROM ${BASE} AS runtime", "not pinned by a digest"),
    "a digest that goes out of date": ("ARG BASE_DIGEST\n", f"ARG BASE_DIGEST=sha256:{'0' * 64}\n", "out of date"),
    "root": ("USER 1000:1000", "USER root", "runs as root"),
    "no user": ("USER 1000:1000\n", "", "runs as root"),
    "a URL": ("COPY constraints.txt ./", "ADD https://example.org/constraints.txt ./", "fetched by a URL"),
    "everything": ("COPY cluster cluster", "COPY . ./", "whatever lies about"),
    "lists of apt": (" && rm -rf /var/lib/apt/lists/*", "", "lacks rm -rf"),
    "recommended packages": (" --no-install-recommends", "", "lacks --no-install-recommends"),
    "no constraints": ("install -c constraints.txt \".[", "install \".[", "not held by constraints.txt"),
    "constraints too late": ("COPY constraints.txt ./\n", "", "after the first pip install"),
    "a health check": ("USER 1000:1000", "HEALTHCHECK CMD true\nUSER 1000:1000", "probes of its own"),
    "a secret": ("WORKDIR /src", "ARG AWS_SECRET_ACCESS_KEY\nWORKDIR /src", "looks like a secret"),
    "a cache": ("PIP_NO_CACHE_DIR=1 ", "", "keeps its cache"),
    "a relative folder": ("WORKDIR /src", "WORKDIR src", "not absolute"),
    "a script from the net": ("RUN groupadd", "RUN curl https://example.org | bash && groupadd", "fetches"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_found(mistake):
    right, wrong, said = MISTAKES[mistake]
    assert right in TEXT
    assert any(said in one for one in dockerfile.lint(TEXT.replace(right, wrong))), dockerfile.lint(
        TEXT.replace(right, wrong)
    )


def test_what_is_copied_is_there_and_nothing_else_reaches_the_build():
    ignore = IGNORE.read_text()
    for one in dockerfile.instructions(TEXT):
        if one.name == "COPY" and "--from" not in one.text:
            for source in [word for word in one.text.split()[:-1] if not word.startswith("--")]:
                assert (ROOT / source).exists(), source
                assert not dockerfile.ignored(source.split("/")[0], ignore), source
    for name in (".git", ".venv", "data", "runs", "tests", "docs", ".env", "mlflow.db", ".aws"):
        assert dockerfile.ignored(name, ignore), name


def test_both_variants_are_stages_and_the_kernels_have_their_compiler():
    stages = {i.text.partition(" AS ")[2]: i.stage for i in dockerfile.instructions(TEXT) if i.name == "FROM"}
    assert {"build", "runtime", "cpu", "cuda"} <= stages.keys()
    cpu = [i.text for i in dockerfile.instructions(TEXT) if i.stage == stages["cpu"] and i.name == "RUN"]
    assert any("g++" in text for text in cpu)


def commands(pip, ray_version, index=""):
    """The pip commands as a shell runs them, for another environment."""
    for command in dockerfile.pip_commands(TEXT):
        command = re.sub(
            r'\$\{TORCH_INDEX:\+--extra-index-url "\$\{TORCH_INDEX\}"\}',
            f"--extra-index-url {index}" if index else "",
            command,
        )
        words = shlex.split(command.replace("${RAY_VERSION}", ray_version))
        assert words[:2] == ["/opt/imaml/bin/pip", "install"]
        yield [str(pip), *words[1:]]


def test_there_are_two_pip_commands_and_all_their_variables_are_known():
    found = list(commands("pip", "2.60.0", "https://example.org/cpu"))
    assert len(found) == 2
    assert not any("$" in word for words in found for word in words)
    assert found[0][-2:] == ["torch", "ray[default,train,tune]==2.60.0"]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_its_pip_commands_make_an_environment_that_works(tmp_path):
    """The CPU variant's, with the index that pip is set up for here."""
    environment = {k: v for k, v in os.environ.items() if k not in ("VIRTUAL_ENV", "PYTHONPATH")}
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    version = re.search(r"ARG RAY_VERSION=(\S+)", TEXT).group(1)
    clone = tmp_path / "src"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
    for words in commands(venv / "bin" / "pip", version):
        done = subprocess.run(words, cwd=clone, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    code = "import imaml_dist, cluster, pipelines.cli, kubernetes, psycopg2, mlflow, ray; print(ray.__version__)"
    done = subprocess.run(
        [venv / "bin" / "python", "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == version
    done = subprocess.run(
        [venv / "bin" / "imaml", "--help"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert "submit" in done.stdout


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_pip_commands_of_the_cuda_variant_can_be_resolved(tmp_path):
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    for words in commands(venv / "bin" / "pip", "2.60.0"):
        dry = [*words[:2], "--dry-run", "--ignore-installed", *words[2:]]
        done = subprocess.run(dry, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        assert "Would install" in done.stdout
