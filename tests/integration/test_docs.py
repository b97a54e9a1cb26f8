"""Every command in the README and the docs is run; every relative link leads somewhere."""

import io
import re
import shlex
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import yaml
from helpers.command import ROOT, imaml, imaml_here
from PIL import Image

from imaml_dist.data.prepare import omniglot

README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def commands(page: Path) -> list[list[str]]:
    """The commands of a page's bash blocks, in order, without comments."""
    lines = [
        line for language, text in BLOCK.findall(page.read_text()) if language == "bash" for line in text.splitlines()
    ]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """Where a reader would type the commands: the shipped configurations at the size of a test, Omniglot-shaped archives."""
    folder = tmp_path_factory.mktemp("workspace")
    (folder / "pipelines" / "configs").mkdir(parents=True)
    for path in (ROOT / "pipelines" / "configs").glob("*.yaml"):
        config = yaml.safe_load(path.read_text())
        if "space" in config:
            (folder / "pipelines" / "configs" / path.name).write_text(yaml.safe_dump(two_trials(config)))
            continue
        # The seconds are for commands that set their own number of steps.
        config["run"] |= {"steps": 2, "max_seconds": 3, "backend": "local", "tasks_per_step": 4, "chunk": 4}
        config["algorithm"]["inner"]["steps"] = 1
        config["model"]["channels"] = 4
        config["validate"]["tasks"] = config["evaluate"]["tasks"] = 4
        (folder / "pipelines" / "configs" / path.name).write_text(yaml.safe_dump(config))
    for name in "abcdefgh":
        (folder / "photos" / name).mkdir(parents=True)
        for n in range(2):
            Image.fromarray(np.full((40, 60, 3), 100 * n, np.uint8)).save(folder / "photos" / name / f"{n}.jpg")
    buffer = io.BytesIO()
    Image.fromarray(np.eye(105, dtype=np.uint8) * 255).convert("1").save(buffer, "PNG")
    archives = folder / "path" / "to" / "archives"
    archives.mkdir(parents=True)
    first = 964
    for name, numbers in zip(omniglot.ARCHIVES, (range(first), range(first, omniglot.CHARACTERS)), strict=True):
        with zipfile.ZipFile(archives / f"{name}.zip", "w") as archive:
            for c in numbers:
                for d in range(omniglot.DRAWINGS):
                    archive.writestr(
                        f"{name}/Alphabet{c // 40:02d}/character{c % 40:02d}/{c:04d}_{d:02d}.png", buffer.getvalue()
                    )
    return folder


def two_trials(sweep):
    """A shipped sweep with two trials of two meta-steps."""
    for field, space in sweep["space"].items():
        if space["kind"] == "grid":
            space["values"] = space["values"][: 1 if field == "algorithm.lam" else 2]
    trials = {} if sweep["searcher"]["kind"] == "grid" else {"trials": 2}
    return sweep | {"baseline": False, "budget": {"steps": 2, **trials}, "validation": {"tasks": 4}}


LONG = {"sweeps.md": pytest.mark.slow}
"""What `tests/integration/test_sweep.py` does, too."""


@pytest.mark.timeout(900)  # a page may have thirty commands
@pytest.mark.parametrize("page", [pytest.param(p, marks=LONG.get(p.name, ()), id=p.name) for p in PAGES if commands(p)])
def test_every_imaml_command_works(page, workspace):
    if page != README:  # whose own blocks stand for themselves
        run_python(page, workspace)
    for words in commands(page):
        if words[0] == "imaml":
            if words[1] == "submit":  # the workspace's configurations train in one process
                words += ["--set", "run.backend=ray"]
            run = imaml if words[1] in ("sweep", "submit") else imaml_here  # the first two have processes of their own
            code, output = run(*words[1:], cwd=workspace)
            assert code == 0, f"{' '.join(words)}\n{output}"
        else:
            assert words[0] == "make", f"{page.name}: nothing runs {words}"


def test_every_make_command_has_its_target(tmp_path):
    for page in PAGES:
        for words in commands(page):
            if words[0] == "make":
                done = subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, capture_output=True, text=True, check=False)
                assert done.returncode == 0, done.stderr


def run_python(page, folder):
    for language, text in BLOCK.findall(page.read_text()):
        if language == "python":
            code = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{text}"
            subprocess.run([sys.executable, "-c", code], cwd=folder, check=True, capture_output=True)


def test_every_python_block_of_the_readme_runs(tmp_path):
    run_python(README, tmp_path)


def test_the_documented_configuration_is_the_real_one():
    from imaml_dist.config.load import build_config

    page = (ROOT / "docs" / "index.md").read_text()
    (text,) = [text for language, text in BLOCK.findall(page) if language == "yaml"]
    documented = yaml.safe_load(text) | {"name": "x"}
    assert build_config(documented).model_dump(by_alias=True) == build_config({"name": "x"}).model_dump(by_alias=True)


def test_the_documented_options_of_kubernetes_are_the_real_ones():
    from cluster.kube_options import KubeOptions

    (text,) = [t for language, t in BLOCK.findall((ROOT / "docs" / "kubernetes.md").read_text()) if language == "yaml"]
    documented, image = yaml.safe_load(text), {"image": "imaml:1"}
    assert documented == KubeOptions(**image).model_dump() | {"image": "required"}


def test_the_documented_sweep_is_one():
    from imaml_dist.config.load import parse_yaml
    from imaml_dist.config.sweep import SweepConfig
    from imaml_dist.sweeps.feasible import trials_of

    (text,) = [
        text for language, text in BLOCK.findall((ROOT / "docs" / "sweeps.md").read_text()) if language == "yaml"
    ]
    assert trials_of(SweepConfig.model_validate(parse_yaml(text, "sweeps.md")), "sweeps.md") == 16


@pytest.mark.parametrize("name", ["sweep_lambda_cg.yaml", "sweep_solvers.yaml"])
def test_the_shipped_sweeps_can_be_searched(name):
    from imaml_dist.config.load_sweep import load_sweep
    from imaml_dist.sweeps.feasible import check_feasible

    assert check_feasible(load_sweep(ROOT / "pipelines" / "configs" / name))


def test_every_relative_link_leads_somewhere():
    for page in [*PAGES, ROOT / "k8s" / "README.md"]:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
