"""The names and numbers of the activations, which Python, the C++, CUDA and Triton kernels must share."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import fastfilm
from fastfilm.ops import spec

HEADER = Path(__file__).parents[2] / "csrc" / "activations.h"


def test_the_triton_kernels_have_the_same_numbers() -> None:
    pytest.importorskip("triton")
    from fastfilm.kernels import common

    assert common.ACT_CODES == spec.ACTIVATION_CODES


def test_the_compiled_kernels_have_one_activation_for_each_number() -> None:
    listed = re.findall(r"^ +item\((k\w+), __VA_ARGS__\)", HEADER.read_text("utf-8"), re.MULTILINE)
    assert sorted(set(spec.ACTIVATION_CODES.values())) == list(range(len(listed)))
    names = {name.replace("_", ""): number for name, number in spec.ACTIVATION_CODES.items()}
    for number, entry in enumerate(listed):
        assert names[entry.removeprefix("k").lower()] == number, f"{entry} of {HEADER.name}"


@pytest.mark.parametrize("name", [*spec.ACTIVATIONS[1:], *spec.NORMS[1:]])
def test_the_docstring_names_every_activation_and_norm(name: str) -> None:
    assert f'"{name}"' in (fastfilm.conv_norm_film.__doc__ or "")
