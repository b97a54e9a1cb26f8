"""Our CPU kernels against torch's functions and their derivatives, task by task; and how they are compiled and kept."""

import os
import shutil
import subprocess
import sys

import pytest
import torch
from helpers.kernels import NATIVE
from torch.autograd import gradcheck, gradgradcheck
from torch.func import vmap
from torch.nn import functional as F

from imaml_dist.errors import KernelError
from imaml_dist.kernels import native

pytestmark = NATIVE

CONVOLUTIONS = {  # (channels, outputs, image, kernel, stride, padding)
    "grey": (1, 20, (8, 8), (3, 3), 2, 1),
    "many-channels": (5, 17, (6, 7), (3, 3), 1, 1),
    "uneven": (2, 3, (7, 5), (2, 3), 2, 0),
    "wide-padding": (3, 2, (4, 4), (3, 3), 3, 2),
    "pointwise": (40, 4, (3, 3), (1, 1), 1, 0),
}


def random(*shape, dtype=torch.float64, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=dtype)


def convolution(name, tasks=2, images=3, dtype=torch.float64):
    channels, outputs, image, kernel, stride, padding = CONVOLUTIONS[name]
    tensors = (
        random(tasks, images, channels, *image, dtype=dtype),
        random(tasks, outputs, channels, *kernel, dtype=dtype, seed=1),
        random(tasks, outputs, dtype=dtype, seed=2),
    )
    return [tensor.requires_grad_() for tensor in tensors], stride, padding


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolution_is_that_of_torch_for_every_task_and_twice_differentiable(name):
    (x, k, b), stride, padding = convolution(name)
    expected = torch.stack([F.conv2d(x[t], k[t], b[t], stride, padding) for t in range(2)])
    torch.testing.assert_close(native.conv2d(x, k, b, stride, padding), expected, rtol=1e-12, atol=1e-12)
    assert gradcheck(lambda *a: native.conv2d(*a, stride, padding), (x, k, b))
    assert gradgradcheck(lambda *a: native.conv2d(*a, stride, padding), (x, k, b))
    without = native.conv2d(x, k, None, stride, padding)
    torch.testing.assert_close(without, expected - b[:, None, :, None, None], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("images", [4, 60])
@pytest.mark.parametrize("name", ["grey", "many-channels"])
def test_float32_convolutions_of_few_and_of_many_images_keep_their_digits(name, images):
    (x, k, b), stride, padding = convolution(name, images=images)

    def derivatives(function, *given):
        y = function(*given)
        first = torch.autograd.grad(y.pow(2).mean(), given, create_graph=True)
        return [y, *first, *torch.autograd.grad(sum(part.pow(2).mean() for part in first), given)]

    def each(x, k, b):
        return torch.stack([F.conv2d(x[t], k[t], b[t], stride, padding) for t in range(2)])

    expected = derivatives(each, x, k, b)
    given = [tensor.detach().float().requires_grad_() for tensor in (x, k, b)]
    found = derivatives(lambda *a: native.conv2d(*a, stride, padding), *given)
    for ours, theirs in zip(found, expected, strict=True):
        assert float((ours.double() - theirs).detach().norm() / theirs.detach().norm()) < 1e-5


@pytest.mark.parametrize("activation", ["identity", "relu"])
@pytest.mark.parametrize("channels", [3, 18])
def test_batch_normalisation_is_that_of_torch_for_every_task_and_twice_differentiable(channels, activation):
    x, gamma, beta = random(2, 3, channels, 2, 4), random(2, channels, seed=1), random(2, channels, seed=2)
    given = [tensor.requires_grad_() for tensor in (x, gamma, beta)]
    expected = torch.stack([F.batch_norm(x[t], None, None, gamma[t], beta[t], True) for t in range(2)])
    assert expected.abs().min() > 1e-4  # no place so near the rectifier's kink that differences would cross it
    expected = expected.relu() if activation == "relu" else expected
    torch.testing.assert_close(native.batch_norm(*given, 1e-5, activation), expected, rtol=1e-12, atol=1e-12)
    assert gradcheck(lambda *a: native.batch_norm(*a, 1e-5, activation), given, fast_mode=channels > 3)
    assert gradgradcheck(lambda *a: native.batch_norm(*a, 1e-5, activation), given, fast_mode=channels > 3)


def test_a_rectified_nan_stays_one_and_a_zero_lets_nothing_back():
    x, gamma = random(1, 2, 3, 2, 2), torch.tensor([[1.0, 0.0, 1.0]], dtype=torch.float64)
    x[0, 0, 2, 0, 0] = torch.nan
    x.requires_grad_()
    y = native.batch_norm(x, gamma, torch.zeros_like(gamma), 1e-5, "relu")
    assert y[0, :, 2].isnan().all() and not y[0, :, :2].isnan().any()
    (back,) = torch.autograd.grad(y.sum(), x)
    assert (back[0, :, 1] == 0).all()  # y = 0 there, and torch's rectifier has derivative 0 at 0


def test_a_third_derivative_of_batch_normalisation_is_refused_and_not_wrong():
    x, gamma = random(1, 3, 2, 2, 2).requires_grad_(), random(1, 2).requires_grad_()
    (first,) = torch.autograd.grad(native.batch_norm(x, gamma, gamma, 1e-5).pow(3).sum(), x, create_graph=True)
    assert torch.autograd.grad(first.pow(2).sum(), x, retain_graph=True)[0].shape == x.shape
    with pytest.raises(RuntimeError, match="no third derivative"):
        torch.autograd.grad(first.pow(2).sum(), x, create_graph=True)


@pytest.mark.parametrize("activation", ["relu", "silu", "gelu", "softplus"])
@pytest.mark.parametrize(("dtype", "images"), [(torch.float32, 10), (torch.float32, 40), (torch.float64, 40)])
def test_a_task_has_the_bits_that_it_has_alone_with_any_number_of_threads(dtype, images, activation):
    (x, k, b), stride, padding = convolution("many-channels", tasks=5, images=images, dtype=dtype)
    gamma = random(5, 17, dtype=dtype)

    def results(rows):
        given = [tensor.detach()[rows].requires_grad_() for tensor in (x, k, b, gamma)]
        y = native.batch_norm(native.conv2d(*given[:3], stride, padding), given[3], given[2], 1e-5, activation)
        first = torch.autograd.grad(y.pow(2).sum(), given, create_graph=True)
        second = torch.autograd.grad(sum(part.pow(2).sum() for part in first), given)
        return [y, *first, *second]

    before = torch.get_num_threads()
    together = results(slice(None))
    try:
        torch.set_num_threads(2)
        threaded = results(slice(None))
    finally:
        torch.set_num_threads(before)
    for t in range(5):
        alone = results(slice(t, t + 1))
        for one, all_of_them, parallel in zip(alone, together, threaded, strict=True):
            assert torch.equal(one[0], all_of_them[t])
            assert torch.equal(one[0], parallel[t])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_a_task_that_threads_share_has_the_bits_of_one_thread(name, dtype):
    (x, k, b), stride, padding = convolution(name, tasks=1, images=100, dtype=dtype)
    gamma = random(1, k.shape[1], dtype=dtype)

    def results(threads):
        before = torch.get_num_threads()
        try:
            torch.set_num_threads(threads)
            given = [tensor.detach().requires_grad_() for tensor in (x, k, b, gamma)]
            y = native.conv2d(*given[:3], stride, padding)
            z = native.batch_norm(y, given[3], given[2], 1e-5, "relu")
            weights = random(*z.shape, dtype=dtype)
            first = torch.autograd.grad((z * weights).sum(), given, create_graph=True)
            # Without their sums over all that torch takes, whose order is its own.
            return [
                y,
                z,
                *first[:2],
                *torch.autograd.grad(first[:2], given[:2], [random(*f.shape, dtype=dtype) for f in first[:2]]),
            ]
        finally:
            torch.set_num_threads(before)

    alone = results(1)
    for threads in (2, 3):
        assert all(torch.equal(one, other) for one, other in zip(alone, results(threads), strict=True))


SHARES = """
import time, torch
from imaml_dist.kernels import native
native.load()
torch.set_num_threads(2)
x, k = (torch.randn(1, 100, 28, 28, 16).permute(0, 1, 4, 2, 3) for _ in "xk")
x, k, gamma = x.requires_grad_(), torch.randn(1, 16, 16, 3, 3, requires_grad=True), torch.ones(1, 16, requires_grad=True)
y = native.conv2d(x, k, None, 1, 1)
z, back = native.batch_norm(y, gamma, gamma, 1e-5, "relu"), torch.ones_like(y)
for work in (
    lambda: native.conv2d(x, k, None, 1, 1),
    lambda: torch.autograd.grad(y, x, back, retain_graph=True),
    lambda: torch.autograd.grad(y, k, back, retain_graph=True),
    lambda: native.batch_norm(y, gamma, gamma, 1e-5, "relu"),
    lambda: torch.autograd.grad(z, y, back, retain_graph=True),
):
    work()
    own, all_of_them = time.thread_time(), time.process_time()
    for _ in range(10):
        work()
    own, all_of_them = time.thread_time() - own, time.process_time() - all_of_them
    print(1 - own / all_of_them)
"""


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="needs two cores")
def test_a_second_thread_takes_its_share_of_one_task():
    if "-fopenmp" not in native._flags(native._compiler()):
        pytest.skip("needs GNU's OpenMP")
    environment = {**os.environ, "OMP_WAIT_POLICY": "passive"}  # or waiting would count as work
    done = subprocess.run([sys.executable, "-c", SHARES], env=environment, capture_output=True, text=True, check=True)
    shares = [float(share) for share in done.stdout.split()]
    assert len(shares) == 5 and min(shares) > 0.2, shares


@pytest.mark.slow
def test_places_of_images_that_lie_far_apart_are_found(tmp_path):
    """A block of rows that spans more than 2^31 values: of a file with a hole in it, of which hardly anything is read."""
    images, channels, side = 510, 33, 360
    values = torch.from_file(str(tmp_path / "images"), shared=True, size=images * side * side * channels)
    x = values.view(1, images, side, side, channels).permute(0, 1, 4, 2, 3)
    x[0, -1, :, 0, 0] = torch.arange(33.0)
    k = torch.zeros(1, 2, channels, 1, 1, requires_grad=True)
    (found,) = torch.autograd.grad(native.conv2d(x, k, None, side, 0).sum(), k)
    assert torch.equal(found[0, :, :, 0, 0], torch.arange(33.0).expand(2, -1))


def test_they_can_be_mapped_over_tasks_with_any_axis_and_shared_arguments():
    (x, k, b), stride, padding = convolution("uneven")
    expected = torch.stack([F.conv2d(x[t], k[0], b[t], stride, padding) for t in range(2)])
    mapped = vmap(lambda x, b: native.conv2d(x, k[0], b, stride, padding), in_dims=(2, 0), out_dims=1)
    torch.testing.assert_close(mapped(x.movedim(0, 2), b).movedim(1, 0), expected, rtol=1e-12, atol=1e-12)
    single = native.conv2d(x[1], k[0], b[1], stride, padding)
    torch.testing.assert_close(single, expected[1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("tasks", [1, 3])
@pytest.mark.parametrize("norm", [False, True])
def test_layers_in_place_may_follow(norm, tasks):
    x, k, gamma = random(tasks, 4, 3, 6, 6), random(tasks, 5, 3, 3, 3), random(tasks, 5)

    def gradients(change):
        given = [tensor.clone().requires_grad_() for tensor in (x, k, gamma)]
        y = native.conv2d(*given[:2], None, 1, 0)
        y = change(native.batch_norm(y, given[2], given[2], 1e-5) if norm else y)
        return torch.autograd.grad(y.pow(2).sum(), given, materialize_grads=True)

    for ours, expected in zip(gradients(torch.relu_), gradients(torch.relu), strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=0)


def test_misuse_is_refused():
    (x, k, b), stride, padding = convolution("uneven")
    with pytest.raises(RuntimeError, match=r"kernels \[T, o, c, kh, kw\]"):
        native.conv2d(x, k[:, :, :1], b, stride, padding)
    with pytest.raises(RuntimeError, match="smaller than its kernel"):
        native.conv2d(x[..., :1], k, b, stride, 0)
    with pytest.raises(RuntimeError, match=r"bias \[T, o\]"):
        native.conv2d(x, k, b[:, :1], stride, padding)
    with pytest.raises(RuntimeError, match=r"batch_norm takes"):
        native.batch_norm(x, b, b, 1e-5)
    assert not native.takes(x.half(), k.half())
    assert not native.takes(x, k.float())
    assert native.takes(x, k, None)


def load_in_a_process(folder, **environment):
    """What a fresh process says when it loads the kernels, kept in `folder`."""
    code = "from imaml_dist.kernels import native; print(native.is_compiled()); native.load(); print('loaded')"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, native.FOLDER: str(folder), **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.split(), done.stderr.strip().splitlines()[-1:]


def test_they_are_compiled_once_and_again_where_the_result_was_damaged(tmp_path):
    native.load()  # compiled by the first test of all that came here
    compiled = native._library(native._compiler())
    folder = tmp_path / "kept"
    folder.mkdir(mode=0o700)
    library = folder / compiled.name
    shutil.copy(compiled, library)
    inode = library.stat().st_ino
    assert load_in_a_process(folder) == (["True", "loaded"], [])
    assert library.stat().st_ino == inode, "compiled again, it would be another file"
    library.write_bytes(b"damaged")
    assert load_in_a_process(folder) == (["True", "loaded"], [])
    assert library.stat().st_size > 100_000
    assert [path.name for path in folder.iterdir()] == [library.name], "nothing else is left behind"


def test_what_is_missing_is_said_in_a_sentence(tmp_path):
    _, (error,) = load_in_a_process(tmp_path, CXX="no-such-compiler")
    assert "KernelError: there is no C++ compiler 'no-such-compiler' (from CXX)" in error
    _, (error,) = load_in_a_process(tmp_path, CXX="false")
    assert "KernelError: the CPU kernels cannot be compiled (exit code 1)" in error
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    _, (error,) = load_in_a_process(tmp_path / "open")
    assert "can be written by others, so nothing is loaded from there" in error
    (tmp_path / "file").write_text("")
    _, (error,) = load_in_a_process(tmp_path / "file")
    assert "cannot keep compiled kernels" in error


class Compiler:
    """One that says its version, and does nothing more than what it is told to; it counts how often it was asked."""

    def __init__(self, path, does, version="one"):
        path.write_text(
            f'#!/bin/sh\n[ "$1" = --version ] && echo {version} && exit\necho asked >> "$0.calls"\n{does}\n'
        )
        path.chmod(0o755)
        self.path, self.calls = path, path.with_name(f"{path.name}.calls")

    def asked(self, folder):
        """How often so far, after a process that tries thrice to load the kernels; and what that says in the end."""
        code = "from imaml_dist.kernels import native; print([native.usable() for _ in range(3)]); native.load()"
        environment = {**os.environ, native.FOLDER: str(folder), "CXX": str(self.path)}
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
        )
        assert done.stdout == "[False, False, False]\n"
        return len(self.calls.read_text().splitlines()), done.stderr.strip().splitlines()[-1]


def test_a_compiler_that_failed_is_tried_again_only_when_its_marker_is_deleted_or_something_changed(tmp_path):
    folder, does = tmp_path / "kept", 'echo "error: too old" >&2; exit 1'
    compiler = Compiler(tmp_path / "compiler", does)
    announced, (error,) = load_in_a_process(folder, CXX=str(compiler.path))
    (marker,) = folder.iterdir()
    assert announced == ["False"]
    assert "the CPU kernels cannot be compiled (error: too old); use run.execution: vmap" in error
    assert error.endswith(f"it is tried again once {marker} is deleted")
    assert compiler.asked(folder) == (1, error)
    assert load_in_a_process(folder, CXX=str(compiler.path)) == ([], [error]), "no compilation is announced"
    marker.unlink()
    assert compiler.asked(folder) == (2, error)
    assert Compiler(compiler.path, does, version="two").asked(folder)[0] == 3
    assert len(list(folder.iterdir())) == 2


@pytest.mark.parametrize(
    "does",
    ['echo "g++: fatal error: Killed signal terminated program cc1plus" >&2; exit 1', "kill -9 $$"],
    ids=["what-it-calls", "itself"],
)
def test_a_compiler_that_was_killed_is_tried_again_by_the_next_process_only(tmp_path, does):
    folder, compiler = tmp_path / "kept", Compiler(tmp_path / "compiler", does)
    assert [compiler.asked(folder)[0] for _ in range(2)] == [1, 2]
    assert not list(folder.iterdir())


def test_kernels_that_cannot_be_loaded_are_not_compiled_again(tmp_path):
    damaged = 'while [ "$1" != -o ]; do shift; done; echo damaged > "$2"'
    folder, compiler = tmp_path / "kept", Compiler(tmp_path / "compiler", damaged)
    calls, error = compiler.asked(folder)
    assert calls == 1 and "the compiled kernels cannot be loaded" in error
    assert compiler.asked(folder) == (1, error)


def test_a_failure_that_cannot_be_written_down_is_remembered_by_the_process(tmp_path, monkeypatch):
    folder, compiler = tmp_path / "kept", Compiler(tmp_path / "compiler", "exit 1")
    monkeypatch.setenv(native.FOLDER, str(folder))
    native._library(str(compiler.path)).with_suffix(".failed").mkdir()
    assert compiler.asked(folder)[0] == 1


def test_the_sentences_are_errors_of_the_environment():
    assert KernelError("x").exit_code == 3
