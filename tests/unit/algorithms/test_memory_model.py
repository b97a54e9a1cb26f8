"""What a call will take is predicted from what calls took, and calls are cut so that it fits; memory does not grow with steps."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from imaml_dist import IMAML, ConjugateGradient, Dual, EpisodeBatch, GradientDescent, MetaLearner
from imaml_dist.algorithms import memory
from imaml_dist.algorithms.memory import SHARE, MemoryModel, can_measure, free_bytes, part_sizes
from imaml_dist.core.curvature import GaussNewton
from imaml_dist.core.outcome import TaskOutcome
from imaml_dist.errors import NoRoomError
from imaml_dist.models.conv4 import Conv4

CPU, MB = torch.device("cpu"), 1_000_000
measured = pytest.mark.skipif(
    not can_measure(CPU), reason="this kernel or C library does not tell the peak of a process"
)


@pytest.fixture(autouse=True)
def one_thread():
    """Small work is shared out at a loss, and on a busy machine at a great one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def model(monkeypatch):
    """One that knows how to measure, wherever the tests run."""
    monkeypatch.setattr(memory, "can_measure", lambda device: True)
    return MemoryModel(CPU)


@pytest.fixture
def free(monkeypatch):
    """Sets what is free."""
    return lambda size: monkeypatch.setattr(memory, "free_bytes", lambda device: size)


@pytest.mark.parametrize(
    ("tasks", "sizes"),
    [(1, [1]), (2, [2]), (3, [3]), (4, [4, 2]), (5, [5, 3]), (8, [8, 4, 3, 2]), (9, [9, 5, 3]), (12, [12, 8, 4, 3, 2])],
)
def test_parts_are_of_about_one_size_and_never_of_a_single_task(tasks, sizes):
    assert part_sizes(tasks) == sizes


@pytest.mark.parametrize("at_once", [3, 5, 9, 40])
def test_no_task_is_left_alone(at_once, model, free):
    model.measured = {2: 2.0}
    free(at_once / SHARE["cpu"])
    for tasks in range(1, 40):
        left, taken = tasks, []
        while left:
            taken.append(model.next_call(left))
            left -= taken[-1]
        assert min(2, tasks) <= min(taken) <= max(taken) <= at_once


@pytest.mark.parametrize(
    ("seen", "tasks", "expected"),
    [
        ({2: 200.0}, 8, 800.0),  # one point: a = 0
        ({2: 300.0, 6: 700.0}, 4, 500.0),  # a = 100, b = 100
        ({2: 300.0, 6: 700.0}, 12, 1400.0),  # beyond what was measured a = 0
        ({2: 300.0, 6: 290.0}, 4, 300.0),  # more tasks never take less
    ],
)
def test_memory_is_affine_in_the_number_of_tasks(seen, tasks, expected, model):
    model.measured = seen
    assert model.bytes(tasks) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("available", "expected"), [(1600.0, 8), (1590.0, 4), (801.0, 4), (600.0, 3), (400.0, 2), (210.0, 2)]
)
def test_the_largest_part_whose_prediction_is_within_the_share_is_computed(available, expected, model, free):
    model.measured = {2: 200.0}
    free(available)
    assert model.next_call(8) == expected


def test_less_than_the_smallest_part_is_told_in_a_sentence(model, free):
    model.measured = {2: 200.0}
    free(199.0)
    with pytest.raises(NoRoomError, match="2 tasks takes 2e-07 GB of memory, and 2e-07 GB are free"):
        model.next_call(8)


def test_a_gpu_has_the_last_word(model, free):
    model._device, model.measured = torch.device("cuda"), {2: 200.0}
    free(1.0)
    assert model.next_call(8) == 2


def test_free_blocks_of_the_heap_are_given_back_before_a_call_is_cut(model, monkeypatch):
    model.measured, left = {2: 200.0}, [100.0]
    monkeypatch.setattr(memory, "free_bytes", lambda device: left[0])
    monkeypatch.setattr(memory, "give_back", lambda device: left.__setitem__(0, 1600.0))
    assert model.next_call(8) == 8


def test_a_size_that_failed_is_not_tried_again(model, free):
    model.measured = {2: 0}
    free(1.0)
    model.failed(9)
    assert model.next_call(9) == 5
    model.failed(5)
    assert model.next_call(9) == 3
    model.failed(3)
    assert model.next_call(9) == 3  # the smallest there is


@pytest.mark.parametrize(("trial", "probes"), [(None, True), (0, False), (1_000, False), (10 * MB, True)])
def test_a_few_tasks_come_first_only_where_all_of_them_might_not_fit(trial, probes, monkeypatch, free):
    monkeypatch.setattr(memory, "can_measure", lambda device: True)
    free(1_000 * MB)
    model = MemoryModel(CPU, trial)
    assert model.needs_probe(8) == probes
    assert not model.needs_probe(3)
    model.measured = {2: 1}
    assert not model.needs_probe(8)


def test_only_what_tells_something_new_is_measured(model, monkeypatch):
    monkeypatch.setattr(memory, "peak_bytes", lambda device: lambda: 7)
    for tasks in (3, 4, 3, 5, 6, 2, 11, 12):
        with model.watched(tasks):
            pass
    assert list(model.measured) == [3, 6, 12]
    with pytest.raises(torch.OutOfMemoryError), model.watched(48):
        raise torch.OutOfMemoryError
    assert 48 not in model.measured


def test_where_nothing_can_be_measured_nothing_is_cut(monkeypatch):
    monkeypatch.setattr(memory, "can_measure", lambda device: False)
    model = MemoryModel(CPU)
    with model.watched(2):
        pass
    assert (model.needs_probe(64), model.next_call(64)) == (False, 64)


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


MEMINFO = {"proc/meminfo": "MemTotal: 8000 kB\nMemFree: 1000 kB\nMemAvailable: 4000 kB\n"}


def group(version: int, folder: str, most: str, used: int, cache: int, active: int = 0) -> dict[str, str]:
    base, names = {
        1: ("sys/fs/cgroup/memory", ("limit_in_bytes", "usage_in_bytes", "total_inactive_file", "total_active_file")),
        2: ("sys/fs/cgroup", ("max", "current", "inactive_file", "active_file")),
    }[version]
    at = f"{base}/{folder}/memory".replace("//", "/")
    return {
        f"{at}.{names[0]}": f"{most}\n",
        f"{at}.{names[1]}": f"{used}\n",
        f"{at}.stat": f"anon 5\nfile 9000\nshmem 7\n{names[2]} {cache}\n{names[3]} {active}\n",
    }


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 4_096_000),
        ({"proc/self/cgroup": "0::/\n"}, 4_096_000),
        ({"proc/self/cgroup": "0::/a/b\n", **group(2, "a/b", "max", 9, 0), **group(2, "a", "3000", 1200, 200)}, 2000),
        ({"proc/self/cgroup": "0::/a/b\n", **group(2, "a/b", "900", 100, 0), **group(2, "a", "3000", 1200, 200)}, 800),
        (
            {"proc/self/cgroup": "0::/\n", **group(2, "", "5000", 1000, 50)},
            4050,
        ),  # a container that sees its own group as the root
        # Files that were read twice are given up, too.
        ({"proc/self/cgroup": "0::/a\n", **group(2, "a", "3000", 2900, 200, 600)}, 900),
        ({"proc/self/cgroup": "4:memory:/a\n", **group(1, "a", "700", 600, 10, 300)}, 410),
        ({"proc/self/cgroup": "3:cpu:/x\n4:memory:/a\n0::/\n", **group(1, "a", "700", 100, 10)}, 610),
        # Version 1 in a container: the path is the host's, the group is where the root is.
        ({"proc/self/cgroup": "4:memory:/docker/0f\n", **group(1, "", "700", 100, 10)}, 610),
        ({"proc/self/cgroup": "4:memory:/a\n", **group(1, "a", str((1 << 63) - 4096), 100, 0)}, 4_096_000),
    ],
)
def test_free_is_the_smaller_of_the_systems_and_the_control_groups(files, expected, tmp_path):
    assert free_bytes(CPU, write(tmp_path, {**MEMINFO, **files})) == expected


TENSOR = """
import torch
from imaml_dist.algorithms.memory import peak_bytes
added = peak_bytes(torch.device("cpu"))
torch.ones(10_000_000)
print(added())
"""


@measured
def test_this_machine_tells_what_is_free_and_what_a_tensor_takes():
    """In a process of its own: a heap that other tests have used may have room that cannot be given back."""
    assert free_bytes(CPU) > 0
    done = subprocess.run([sys.executable, "-c", TENSOR], capture_output=True, text=True, check=True)
    assert 38 * MB < int(done.stdout) < 60 * MB


class Wide(nn.Module):
    """Few parameters and large activations: 2 MB each for a task of 1000 samples, 10 MB of them alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2, 512), nn.Tanh(), nn.Linear(512, 2))

    def forward(self, x):
        return self.layers(x)


def wide(tasks: int) -> tuple[MetaLearner, EpisodeBatch]:
    torch.manual_seed(0)
    learner = MetaLearner(
        Wide(), IMAML(1.0, GradientDescent(0.1, 1), ConjugateGradient(max_iterations=1)), execution="vmap"
    )
    x, y = torch.randn(tasks, 1000, 2), torch.arange(1000).remainder(2).expand(tasks, -1)
    return learner, EpisodeBatch(x, y, x, y, index=torch.arange(tasks))


CUT = """
import sys, torch
from test_memory_model import MB, memory, wide
from imaml_dist.core.outcome import TaskOutcome
from imaml_dist.algorithms.memory import peak_bytes
torch.set_num_threads(1)
limit, sizes = 220 * MB, []
learner, episodes = wide(24)
learner.preflight(episodes[:1])
learner._trial = 0  # no probe: the first call is with all tasks
added = peak_bytes(torch.device("cpu"))
whole = learner.task_gradients(episodes)
uncut, compute = added(), learner._compute

learner._trial = None
learner._memory.clear()
learner._compute = lambda usable, *rest: (sizes.append(len(usable)), compute(usable, *rest))[1]
memory.free_bytes = lambda device: limit
added = peak_bytes(torch.device("cpu"))
parts = learner.task_gradients(episodes)
assert torch.equal(parts.rows, whole.rows) and (parts.tasks.outcome == int(TaskOutcome.OK)).all()
sys.stdout.write(f"{limit} {uncut} {added()} {min(sizes)} {max(sizes)}")
"""


@measured
def test_tasks_that_would_exceed_what_is_free_are_cut_to_fit_with_the_same_bits():
    # A process of its own: the kernel's peak is that of all threads together.
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n{CUT}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    limit, uncut, cut, smallest, largest = map(float, done.stdout.split())
    assert cut < limit < uncut
    assert 2 <= smallest <= largest < 24


@measured
@pytest.mark.parametrize(("gigabytes", "expected"), [(4, [2, 4]), (64, [4])])
def test_what_fits_in_one_call_is_computed_in_one_also_after_a_look_at_two_tasks(
    gigabytes, expected, free, monkeypatch
):
    learner, episodes = wide(4)
    learner.preflight(episodes[:1])
    learner._trial = 50 * MB  # whatever this process's heap, used by other tests, made of it
    free(gigabytes << 30)
    compute, sizes = learner._compute, []
    monkeypatch.setattr(
        learner, "_compute", lambda usable, *rest: (sizes.append(len(usable)), compute(usable, *rest))[1]
    )
    learner.task_gradients(episodes)
    assert sizes == expected


@measured
def test_what_cannot_fit_is_not_tried_on_a_cpu(free, monkeypatch):
    learner, episodes = wide(4)
    learner.task_gradients(episodes[:2])
    (model,) = learner._memory.values()
    model.measured = {2: 100 * MB}
    free(1)
    monkeypatch.setattr(learner, "_compute", lambda *given: pytest.fail("it was tried"))
    with pytest.raises(NoRoomError, match=r"2 tasks takes .* GB of memory, and 1e-09 GB are free"):
        learner.task_gradients(episodes)


def test_dual_solves_too_large_for_one_call_are_made_in_parts(monkeypatch):
    torch.manual_seed(0)
    learner = MetaLearner(nn.Linear(4, 3).double(), IMAML(1.0, GradientDescent(0.1, 1), Dual()), execution="vmap")
    x, y = torch.randn(8, 6, 4).double(), torch.arange(6).remainder(3).expand(8, -1)
    episodes = EpisodeBatch(x, y, x, y, index=torch.arange(8))
    whole, factors = learner.task_gradients(episodes), GaussNewton.factors
    size = 6 * 2 * 15 * 8  # rows, parameters, bytes
    monkeypatch.setattr(GaussNewton, "factors", lambda self: factors(self, max_bytes=4 * size))
    parts = learner.task_gradients(episodes)
    assert (parts.tasks.outcome == int(TaskOutcome.OK)).all()
    torch.testing.assert_close(parts.rows, whole.rows, rtol=1e-12, atol=1e-12)


def tensors_at_once(learner: MetaLearner, episodes: EpisodeBatch) -> int:
    """Bytes of tensors alive together at the most; no allocator between."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        learner.task_gradients(episodes)
    assert profiler.profiler is not None
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    alive = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        alive += event.nbytes()
        most = max(most, alive)
    return most


@pytest.mark.parametrize("operator", ["hessian", "gauss_newton"])
def test_memory_grows_neither_with_inner_steps_nor_with_those_of_conjugate_gradient(operator):
    x = torch.rand(2, 20, 1, 28, 28, generator=torch.Generator().manual_seed(1))
    y = torch.arange(20).remainder(4).expand(2, -1)
    episodes = EpisodeBatch(x, y, x.flip(-1), y, index=torch.arange(2))

    def most(steps: int, iterations: int) -> int:
        torch.manual_seed(0)
        solver = ConjugateGradient(max_iterations=iterations, operator=operator)
        learner = MetaLearner(
            Conv4((1, 28, 28), 4, channels=8), IMAML(20.0, GradientDescent(0.01, steps), solver), execution="vmap"
        )
        learner.preflight(episodes[:1])
        return tensors_at_once(learner, episodes)

    assert most(16, 3) <= 1.05 * most(1, 3)
    assert most(2, 12) <= 1.1 * most(2, 1)
