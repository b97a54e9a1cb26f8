"""Our CPU kernels in tests."""

import pytest

from imaml_dist.kernels import native

NATIVE = pytest.mark.skipif(not native.usable(), reason="needs a C++ compiler for our CPU kernels")
