"""Coefficients that a convolution writes beside its output, against the reference in float64."""

from __future__ import annotations

import itertools
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from fastfilm.ops import reference
from fastfilm.ops.spec import Behind, Geometry, Kind, NormInput, Pending, Source, TailTensors
from tests.support import emulated
from tests.support.emulated import close, cuda, draw, extension, library
from tests.support.kind import kind_of

__all__ = ["cuda", "extension", "library"]

pytestmark = pytest.mark.skipif(emulated.compiler() is None, reason="needs a C++ compiler")

SAMPLES, CHANNELS, SIZE = 3, 40, (18, 20)
WALK = Geometry.ordinary((1, 1), (1, 1))
ORDERS = ("conv-norm-film-act", "conv-norm-act-film", "conv-act-norm-film")
FORMS = [
    (norm, order, position, own)
    for norm, order, position, own in itertools.product(
        ("none", "batch", "instance"), ORDERS, ("end", "film", "norm"), (False, True)
    )
    if norm != "none" or (position != "norm" and not own)
]
BARE = [f for f in FORMS if f[2] != "norm"]


def block(norm: str, order: str, position: str, own: bool, wide: bool = False) -> Kind:
    """A block whose norm takes its ``own`` statistics, and moves the running ones, or has known ones."""
    return kind_of(
        norm=norm,
        order=order,
        dropout_position=position,
        training=own,
        uses_input=own,
        update=own,
        activation="leaky_relu",
        slope=0.0,
        batch=SAMPLES,
        channels=CHANNELS,
        count=SIZE[0] * SIZE[1],
        wide=wide,
    )


def tensors_of(absent: bool, dtype: torch.dtype, running: bool) -> TailTensors:
    """All of a block's tensors in a type, or only those that it cannot do without."""
    n, c = SAMPLES, CHANNELS
    mean = draw(c, seed=1, dtype=dtype) if running else None
    var = draw(c, seed=2).abs().to(dtype) + 0.5 if running else None
    if absent:
        return TailTensors(running_mean=mean, running_var=var)
    return TailTensors(
        running_mean=mean,
        running_var=var,
        norm_weight=draw(c, seed=3, dtype=dtype),
        norm_bias=draw(c, seed=4, dtype=dtype),
        bias=draw(c, seed=5),
        gamma=draw(n, c, seed=6, dtype=dtype),
        beta=draw(1, c, seed=7, dtype=dtype),
        dropout_mask=(draw(n, c, seed=8) > -0.5).to(dtype) * 1.25,
        slope=draw(1, seed=9),
    )


def convolved(
    cuda: Any, kind: Kind, tensors: TailTensors, finish: str | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """y, the moments and the coefficients; y finished by the coefficients and an activation ``finish``."""
    x, weight = draw(SAMPLES, 8, *SIZE), draw(CHANNELS, 8, 3, 3, seed=10)
    coef = torch.full((7, SAMPLES, CHANNELS), float("nan"))
    seen = NormInput() if kind.uses_input else None
    behind = Behind(kind, 0.3, tensors, coef)
    assert cuda.covers_behind(behind, x)
    pending = None if finish is None else Pending(coef, finish)
    given = [Source(x)], weight, None, WALK, seen, pending
    return *cuda.fprop(*given, behind=behind), coef


@pytest.mark.parametrize(
    ("form", "absent"),
    [*itertools.product(FORMS, [False]), *itertools.product(BARE, [True])],
    ids=lambda v: "-".join(map(str, v)) if isinstance(v, tuple) else "bare" if v else "all",
)
def test_coefficients_behind_a_convolution(
    extension: ModuleType, form: tuple[str, str, str, bool], absent: bool
) -> None:
    norm, *_, own = form
    dtype = torch.float32 if absent else torch.bfloat16
    kind, wide = block(*form), block(*form, wide=True)
    tensors = tensors_of(absent, dtype, running=norm != "none")
    exact_tensors = TailTensors(*(None if t is None else t.double() for t in tensors))
    with emulated.installed(extension) as cuda:
        _, stats, coef = convolved(cuda, kind, tensors)
    if own:
        exact_tensors = exact_tensors._replace(stats=stats.double())
    exact = reference.of_block(wide, exact_tensors, torch.device("cpu"), 0.3)
    for row, right in zip(coef, exact, strict=True):
        close(row, right, torch.float32)
    for moved, right in zip(tensors[:2], exact_tensors[:2], strict=True):
        if moved is not None and right is not None:
            close(moved, right, dtype)


@pytest.mark.parametrize("norm", ["batch", "instance"])
def test_the_order_of_blocks_and_threads_does_not_change_a_bit(
    extension: ModuleType, norm: str
) -> None:
    kind = block(norm, ORDERS[1], "end", True)
    found = []
    with emulated.installed(extension) as cuda:
        for seed in (0, 7, 8):
            extension.set_seed(seed)
            tensors = tensors_of(False, torch.float32, running=True)
            found.append((*convolved(cuda, kind, tensors), *tensors[:2]))
    extension.set_seed(0)
    for others in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], others, strict=True))


def test_known_coefficients_finish_the_map_of_the_same_call(cuda: Any) -> None:
    kind = block("batch", ORDERS[1], "end", False)
    tensors = tensors_of(False, torch.float32, running=True)
    y, _, coef = convolved(cuda, kind, tensors)
    finished, _, _ = convolved(cuda, kind, tensors, "prelu")
    close(finished, reference.materialise(y.double(), coef.double(), "prelu"), torch.float32)


def test_running_statistics_tell_autograd_that_they_moved(cuda: Any) -> None:
    kind = block("batch", ORDERS[1], "end", True)
    rows = torch.zeros(CHANNELS, 2)
    tensors = TailTensors(running_mean=rows[:, 0], running_var=torch.ones(CHANNELS))
    assert tensors.running_mean is not None and tensors.running_var is not None
    before = tensors.running_var._version
    convolved(cuda, kind, tensors)
    assert tensors.running_var._version > before
    assert tensors.running_mean.abs().min() > 0, "a strided statistic was not written back"
    assert not rows[:, 1].any()


def test_blocks_that_are_not_covered(cuda: Any) -> None:
    x, coef = draw(SAMPLES, 8, *SIZE), torch.empty(7, SAMPLES, CHANNELS)
    bare = tensors_of(True, torch.float32, running=True)
    for norm, position, tensors in (
        ("layer", "end", bare),
        ("batch", "norm", bare),
        ("batch", "end", bare._replace(gamma=torch.ones(CHANNELS, dtype=torch.float64))),
    ):
        kind = block(norm, ORDERS[1], position, True)
        assert not cuda.covers_behind(Behind(kind, 0.1, tensors, coef), x)
