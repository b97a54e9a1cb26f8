"""Freed memory is kept: a process stops asking the system for the pages of every new tensor."""

import resource
import subprocess
import sys

from imaml_dist.kernels.memory import keep_freed_memory

CODE = """
import resource, sys, torch
from imaml_dist.kernels.memory import keep_freed_memory
torch.set_num_threads(1)
if sys.argv[1] == "keep":
    assert keep_freed_memory()
def work():
    for _ in range(50):
        torch.ones(4 << 20)
work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
work()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(mode: str) -> int:
    done = subprocess.run([sys.executable, "-c", CODE, mode], capture_output=True, text=True, check=True)
    return int(done.stdout)


def test_freed_memory_is_used_again_where_the_c_library_is_glibc():
    if not keep_freed_memory():
        return
    assert faults("keep") < 1000
    pages = 50 * (16 << 20) // resource.getpagesize()
    assert faults("plain") > 0.5 * pages or faults("plain") < 1000  # a system may hand out huge pages
