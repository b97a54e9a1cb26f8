"""imaml_dist: distributed meta-learning with implicit gradients.

Its names are those of `imaml_dist.api`, which is imported when the first of them is asked for: it loads torch, and many commands
have no use for torch.
"""

from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from imaml_dist.api import *  # noqa: F403
else:
    from importlib import import_module

    def __getattr__(name):
        known = name == "__all__" or not name.startswith("_")  # Python itself asks for others, such as __path__
        if known and hasattr(api := import_module("imaml_dist.api"), name):
            return getattr(api, name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__():
        return sorted({*globals(), *import_module("imaml_dist.api").__all__})
