"""The yardstick of every numerical test: our error against float64, beside eager PyTorch's own."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor


def relative_error(value: Tensor, exact: Tensor) -> float:
    """Norm-relative error of ``value`` against float64 ``exact``."""
    assert value.shape == exact.shape, f"{tuple(value.shape)}, expected {tuple(exact.shape)}"
    scale = exact.norm().item()
    difference = (value.detach().cpu().double() - exact.detach().cpu().double()).norm().item()
    return difference / scale if scale > 0 else difference


def assert_as_good_as_eager(
    ours: Mapping[str, Tensor],
    exact: Mapping[str, Tensor],
    eager: Sequence[tuple[Mapping[str, Tensor], Mapping[str, Tensor]]],
    dtype: torch.dtype,
) -> None:
    """Each of ``ours`` may err 1.5 times as much as eager does, plus one ulp of ``dtype``.

    Args:
        eager: (values, exact values) of eager PyTorch, one pair a draw of the inputs. The rounding error
            of a short sum is itself random, so eager's is taken as its largest over the draws.
    """
    for name, value in ours.items():
        own = relative_error(value, exact[name])
        theirs = max(relative_error(e[name], x[name]) for e, x in eager)
        bound = 1.5 * theirs + torch.finfo(dtype).eps
        assert own <= bound, f"{name}: error {own:.3e}, eager's {theirs:.3e}, bound {bound:.3e}"


Draws = Sequence[tuple[Mapping[str, Tensor], Mapping[str, Tensor]]]
"""(values, exact values), one pair a draw of the inputs."""


def assert_typically_as_good_as_eager(ours: Draws, eager: Draws, dtype: torch.dtype) -> None:
    """The median error of each of ``ours`` over draws is at most 1.5 times eager's on the same ones, plus one ulp.

    For sums that nearly cancel in some draws: there one draw of ours beside the largest of eager's says little.
    """
    assert len(ours) == len(eager) >= 40
    for name in ours[0][0]:
        own, theirs = (
            statistics.median(relative_error(v[name], x[name]) for v, x in draws)
            for draws in (ours, eager)
        )
        bound = 1.5 * theirs + torch.finfo(dtype).eps
        assert own <= bound, f"{name}: median {own:.3e}, eager's {theirs:.3e}, bound {bound:.3e}"


def assert_threads_do_not_change_bits(call: Callable[[], Tensor]) -> None:
    """``call`` returns the same tensor with any number of threads."""
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            found.append(call())
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(y, found[0]) for y in found)
