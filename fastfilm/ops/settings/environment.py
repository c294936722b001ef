"""The environment variables, their values, and the check of both when the operators are imported."""

from __future__ import annotations

import os
from typing import NamedTuple

SWITCH = ("0", "1")


class Variable(NamedTuple):
    """A variable, its values (none listed: any text; ``int``: a positive number) and what it does."""

    name: str
    values: tuple[str, ...] | type[int] | None
    meaning: str


VARIABLES = (
    Variable(
        "FASTFILM_BACKEND",
        ("reference", "triton", "cuda", "cpu"),
        "forces a backend for every call",
    ),
    Variable("FASTFILM_ROUTE", ("fused", "composed", "eager"), "forces a route for every call"),
    Variable("FASTFILM_STRICT", SWITCH, "1: a kernel that fails raises instead of falling back"),
    Variable("FASTFILM_WITHOUT", None, "kernels that are left out, such as cuda:wgrad:bfloat16"),
    Variable("FASTFILM_TUNED", None, "the folder of the user's measured choices"),
    Variable("FASTFILM_CPU", SWITCH, "at install time, 0: leaves the C++ extension out"),
    Variable(
        "FASTFILM_CUDA",
        ("0", "1", "auto"),
        "at install time, 0: no CUDA kernels, 1: an error without them",
    ),
    Variable("FASTFILM_CUDA_ARCHS", None, "at install time: targets of the CUDA kernels"),
    Variable("FASTFILM_CUDA_OBJECTS", None, "at install time: folder of compiled CUDA kernels"),
    Variable("TRITON_INTERPRET", SWITCH, "1: Triton's interpreter, on CPU tensors"),
    Variable("FASTFILM_GOLDEN", None, "tests: the folder of the golden arrays"),
    Variable("FASTFILM_SLOW_TESTS", SWITCH, "tests, 1: the slow ones run too"),
    Variable("FASTFILM_FUZZ_EXAMPLES", int, "tests: draws of the fuzz test"),
    Variable("FASTFILM_NNUNET_TABLE", None, "nnU-Net trainer: metadata of the cases"),
    Variable("FASTFILM_NNUNET_COLUMNS", None, "nnU-Net trainer: columns of the table"),
    Variable(
        "FASTFILM_NNUNET_WHERE", ("decoder", "encoder", "all"), "nnU-Net trainer: FiLM's place"
    ),
    Variable("FASTFILM_NNUNET_META", None, "nnU-Net prediction: values of all cases"),
    Variable("FASTFILM_NNUNET_EPOCHS", int, "nnU-Net trainer: a shorter run"),
    Variable("FASTFILM_NNUNET_ITERATIONS", int, "nnU-Net trainer: a shorter epoch"),
)


def installed(package: str) -> str:
    """Version of a package, without importing it."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def read(name: str) -> str | None:
    """Value of a variable of ``VARIABLES``; None where it is not set or empty.

    Raises:
        ValueError: a value that the variable cannot have; names it.
    """
    (values,) = (v.values for v in VARIABLES if v.name == name)
    value = os.environ.get(name) or None
    if value is None or values is None:
        return value
    if isinstance(values, tuple):
        if value not in values:
            raise ValueError(f"{name} must be one of {', '.join(values)}, got {value!r}")
    elif not value.isdecimal() or int(value) < 1:
        raise ValueError(f"{name} must be a positive integer, got {value!r}")
    return value


def check() -> None:
    """ValueError naming the first variable that holds something it cannot hold."""
    for variable in VARIABLES:
        read(variable.name)
