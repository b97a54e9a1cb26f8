"""Our CPU kernels in tests."""

import pytest
import torch
from torch.func import vmap
from torch.nn.functional import conv2d

from imaml_dist.errors import KernelError
from imaml_dist.kernels import native


def _there_is_a_compiler() -> bool:
    """Whether there is one; if so the kernels must compile, too: that they do not is no reason to skip their tests."""
    try:
        native._compiler()
    except KernelError:
        return False
    native.load()
    return True


NATIVE = pytest.mark.skipif(not _there_is_a_compiler(), reason="needs a C++ compiler for our CPU kernels")


def _groups_keep_bits() -> bool:
    """Whether torch's convolution of many groups gives each of them the bits that it has among few, as vmapped networks need it."""
    generator = torch.Generator().manual_seed(0)
    x, w = torch.rand(9, 3, 1, 28, 28, generator=generator), torch.randn(9, 8, 1, 3, 3, generator=generator)
    convolved = vmap(lambda x, w: conv2d(x, w, padding=1))
    return all(torch.equal(convolved(x, w)[:n], convolved(x[:n], w[:n])) for n in (2, 3, 4, 8))


GROUPS_KEEP_BITS = pytest.mark.skipif(
    not _groups_keep_bits(), reason="torch's grouped convolution rounds by the number of groups on this CPU"
)
