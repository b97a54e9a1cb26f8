"""The house rules of imports, read from the syntax tree of every file: floors, vendor rooms, no circles."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

FLOORS = {
    "imaml_dist.errors": 0,
    "imaml_dist.core": 1,
    "imaml_dist.kernels": 1,
    "imaml_dist.models": 2,
    "imaml_dist.tasks": 2,
    "imaml_dist.storage": 2,
    "imaml_dist.tracking": 2,
    "imaml_dist.config": 3,
    "imaml_dist.algorithms": 3,
    "imaml_dist.data": 3,
    "imaml_dist.training": 3,
    "imaml_dist.distributed": 4,
    "imaml_dist.reporting": 4,
    "imaml_dist.sweeps": 4,
    "cluster": 5,
    "pipelines": 5,
}
"""Room -> floor. A module may import rooms of its own floor or below."""

VENDOR_ROOMS = {
    "boto3": {"imaml_dist.storage"},
    "botocore": {"imaml_dist.storage"},
    "mlflow": {"imaml_dist.tracking"},
    "psutil": {"imaml_dist.tracking"},
    "webdataset": {"imaml_dist.data"},
    "matplotlib": {"imaml_dist.reporting"},
    "jinja2": {"imaml_dist.reporting"},
    "ray": {"imaml_dist.distributed", "cluster"},
    "kubernetes": {"cluster"},
    "optuna": {"imaml_dist.sweeps"},
    "pydantic": {"imaml_dist.config", "imaml_dist.distributed", "cluster"},  # fields that users write
    "yaml": {"imaml_dist.config", "cluster"},
    "safetensors": {"imaml_dist.training"},
    "PIL": {"imaml_dist.data"},
    "fontTools": {"imaml_dist.data"},
    "numpy": {"imaml_dist.data", "imaml_dist.reporting", "imaml_dist.tracking", "pipelines"},
    "typer": {"pipelines"},
    "rich": {"pipelines"},
}

TORCH_ONLY = ("imaml_dist.core", "imaml_dist.kernels", "imaml_dist.models", "imaml_dist.tasks", "imaml_dist.algorithms")
"""What a bare machine with torch must be able to import: torch, the standard library, and each other."""


def modules():
    for package in ("imaml_dist", "cluster", "pipelines"):
        for path in sorted((ROOT / package).rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            yield name.removesuffix(".__init__"), path


def imports_of(source: str):
    """(imported dotted name, is relative) for every import anywhere in a file, also inside functions."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, False) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or "", node.level > 0
            yield from ((f"{node.module}.{alias.name}", node.level > 0) for alias in node.names)


def room_of(name: str) -> str | None:
    return next((room for room in FLOORS if name == room or name.startswith(room + ".")), None)


def violations(name: str, source: str) -> list[str]:
    """What a module's imports break, in words."""
    found = []
    room = room_of(name)
    for imported, relative in imports_of(source):
        top = imported.split(".")[0]
        target = room_of(imported)
        if relative:
            found.append(f"{name}: relative import of {imported!r}")
        if top in ("cluster", "pipelines") and name.startswith("imaml_dist"):
            found.append(f"{name} imports {imported}: the library knows neither cluster nor pipelines")
        if name.startswith("cluster") and top == "imaml_dist" and room_of(imported) != "imaml_dist.errors":
            found.append(f"{name} imports {imported}: cluster knows nothing of meta-learning")
        if room and target and FLOORS[target] > FLOORS[room]:
            found.append(f"{name} (floor {FLOORS[room]}) imports {imported} (floor {FLOORS[target]}): imports go down")
        if top in VENDOR_ROOMS and room not in VENDOR_ROOMS[top]:
            found.append(f"{name} imports {top}, which only {sorted(VENDOR_ROOMS[top])} may")
        if room in TORCH_ONLY and top not in sys.stdlib_module_names and top not in ("torch", "imaml_dist"):
            found.append(f"{name} imports {top}: this room is for torch and the standard library")
    return found


def test_every_module_keeps_the_rules():
    assert [v for name, path in modules() for v in violations(name, path.read_text())] == []


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("imaml_dist.core.vector", "import ray"),
        ("imaml_dist.core.vector", "def f():\n    import ray"),
        ("imaml_dist.core.vector", "import numpy"),
        ("imaml_dist.core.vector", "from imaml_dist.config.schema import RunConfig"),
        ("imaml_dist.training.state", "from imaml_dist.distributed import worker"),
        ("imaml_dist.training.state", "import mlflow"),
        ("imaml_dist.data.dataset", "import boto3"),
        ("imaml_dist.distributed.worker", "from pipelines import console"),
        ("cluster.session", "from imaml_dist.training.state import MetaState"),
        ("pipelines.train", "import matplotlib.pyplot"),
        ("imaml_dist.models.mlp", "from . import conv4"),
        ("imaml_dist.tasks.episode", "from imaml_dist.algorithms import learner"),
    ],
)
def test_a_forbidden_import_is_caught(module, line):
    assert violations(module, line)


def test_no_circles():
    graph = {name: {imported for imported, _ in imports_of(path.read_text())} for name, path in modules()}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, f"import circle: {' -> '.join((*trail, name))}"
        if name in graph and name not in done:
            for target in graph[name]:
                visit(target, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_every_file_says_its_one_idea_and_none_is_a_drawer():
    for name, path in modules():
        assert ast.get_docstring(ast.parse(path.read_text())), f"{name} has no docstring"
        assert path.stem not in ("utils", "common", "base", "helpers", "misc"), name
        assert len(path.read_text().splitlines()) <= 330, f"{name} is too long for one idea"


HEAVY = ["torch", "ray", "mlflow", "boto3", "webdataset", "matplotlib", "pydantic", "safetensors", "yaml", "PIL"]


@pytest.mark.parametrize(
    ("code", "loaded"),
    [
        ("import imaml_dist; imaml_dist.__version__", []),
        ("import pipelines.cli", []),  # so that --help and the shell's completion are there at once
        ("import imaml_dist.storage.opening", []),
        ("from imaml_dist import *; MetaLearner, implicit_meta_gradient", ["torch"]),
    ],
)
def test_importing_loads_what_is_used_and_nothing_else(code, loaded):
    code = f"{code}\nimport sys\nprint([m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == str(loaded)


def test_the_library_offers_its_names_and_no_others():
    import imaml_dist
    from imaml_dist import api

    assert all(getattr(imaml_dist, name) is getattr(api, name) for name in api.__all__)
    assert {"__version__", *api.__all__} <= set(dir(imaml_dist))
    with pytest.raises(AttributeError, match="'imaml_dist' has no attribute 'MetaLerner'"):
        _ = imaml_dist.MetaLerner
    with pytest.raises(ImportError, match="cannot import name 'MetaLerner'"):
        from imaml_dist import MetaLerner  # noqa: F401


def test_nothing_executes_data():
    forbidden = (
        "pickle.load",
        "torch.load(",
        "yaml.load(",
        "eval(",
        "exec(",
        "shell=True",
        "os.system",
        "allow_pickle=True",
    )
    for name, path in modules():
        for number, line in enumerate(path.read_text().splitlines(), start=1):
            hit = [f for f in forbidden if f in line.replace(".eval(", "")]
            assert not hit, f"{name}:{number}: {line.strip()}"
