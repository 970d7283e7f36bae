"""Which versions of the packages it works with the tests ran with, and one warning where others are loaded."""

from __future__ import annotations

import functools
import sys
import warnings

# By minor version. Add one when `make test`, or `make test-gpu`, has passed with it.
TESTED = {
    "torch": ("2.11", "2.13", "2.14"),
    "triton": ("3.6", "3.8", "3.9"),
    "transformers": ("5.22", "5.23", "5.24"),
    "peft": ("0.21",),
    "kernels": ("0.17",),
}


def warn_of_untested() -> None:
    """Warns of every loaded package of `TESTED` whose version is not there, once for each in a process."""
    for package in TESTED:
        version = getattr(sys.modules.get(package), "__version__", None)
        if version is not None:
            _warn(package, version)


@functools.cache
def _warn(package: str, version: str) -> None:
    tested = TESTED[package]
    if ".".join(version.split(".")[:2]) not in tested:
        warnings.warn(
            f"scattermoe-lora was tested with {package} {' and '.join(tested)}, and this is {version}, which may "
            "differ: compare a step with the untouched model before you rely on it",
            stacklevel=4,
        )
