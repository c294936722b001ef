"""The passes over a map on the host: the kernels' sources, compiled against ``csrc/emulation``, against float64.

Run once plainly and once under AddressSanitizer and UBSan; with the threads of a block in order and shuffled.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from fastfilm.ops import reference, spec
from tests.support import emulated
from tests.support.emulated import (
    LIBRARY,
    TOLERANCE,
    build_folder,
    close,
    cuda,
    draw,
    extension,
    gradients,
    library,
)
from tests.support.yardstick import relative_error

__all__ = ["cuda", "extension", "library"]

pytestmark = pytest.mark.skipif(emulated.compiler() is None, reason="needs a C++ compiler")

DTYPES = tuple(TOLERANCE)

SANITIZED = (
    "any_channel_count or bad_arguments or misaligned or two_to_the_31"
    " or (shuffled and (stride_2 or two_sources or finished or any_shape))"
)
"""Tests of three files that run under the sanitizers too."""


def check_pointwise(cuda: Any, shape: tuple[int, ...], dtype: torch.dtype, act: str) -> None:
    """apply, moments and their gradients."""
    y, dv = draw(*shape, dtype=dtype), draw(*shape, seed=1, dtype=dtype)
    coef, pre = draw(7, *shape[:2], seed=2), draw(2, shape[1], seed=3).abs()
    dstats = draw(2, *shape[:2], seed=4)

    close(cuda.apply(y, coef, act), reference.materialise(y.double(), coef.double(), act), dtype)
    dy, dcoef = cuda.apply_backward(dv, y, coef, act)
    exact = gradients(lambda y, coef: reference.materialise(y, coef, act), (y, coef), dv)
    close(dy, exact[0], dtype)
    close(dcoef, exact[1], torch.float32)

    for given in (None, pre):
        wide = None if given is None else given.double()
        stats = cuda.moments(y, given, act)
        close(stats, reference.moments(y.double(), wide, act), torch.float32)
        e, dpre = cuda.moments_backward(dv, dstats, y, stats, given, act)
        arguments = (y,) if given is None else (y, given)
        exact = gradients(
            lambda y, *p: reference.moments(y, *(p or (None,)), act), arguments, dstats
        )
        close(e, exact[0] + dv.double(), dtype)
        if given is not None:
            close(dpre[0], (exact[0] + dv.double()).flatten(2).sum((0, 2)), torch.float32, 3)
            assert (dpre[1] - exact[1][1]).norm() <= 1e-5 * (1 + exact[1][1].norm())


SHAPES = [(2, 64, 9, 8), (2, 3, 5, 7), (1, 24, 3, 4, 5), (3, 260, 2, 3), (1, 1, 1, 1)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_pointwise_passes_on_any_shape(
    cuda: Any, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    check_pointwise(cuda, shape, dtype, "silu")


@pytest.mark.parametrize("act", spec.ACTIVATIONS)
def test_every_activation_and_its_gradient(cuda: Any, act: str) -> None:
    for dtype in (torch.float32, torch.float16):
        check_pointwise(cuda, (2, 16, 5, 6), dtype, act)


def test_a_map_of_several_blocks_is_summed_whole(cuda: Any) -> None:
    check_pointwise(cuda, (2, 12, 40, 61), torch.bfloat16, "relu")


def test_a_mean_of_a_thousand_sigma_costs_no_digits(cuda: Any) -> None:
    y = draw(1, 8, 30, 41) + 1000
    exact = reference.moments(y.double(), None, "none")
    stats = cuda.moments(y, None, "none")
    assert relative_error(stats[1], exact[1]) < 1e-4


def test_passes_in_place_and_on_misaligned_maps(cuda: Any) -> None:
    y, coef = draw(1, 8, 5, 6, dtype=torch.float16), draw(7, 1, 8)
    exact = cuda.apply(y, coef, "elu")
    # one element further: whole chunks no longer lie on 16 bytes
    moved = torch.empty(y.numel() + 1, dtype=y.dtype)[1:].as_strided(y.shape, y.stride())
    assert torch.equal(cuda.apply(moved.copy_(y), coef, "elu", in_place=True), exact)
    assert torch.equal(moved, exact)


def test_the_order_of_the_threads_does_not_change_a_bit(cuda: Any, extension: Any) -> None:
    y, dv, coef = draw(2, 24, 20, 30), draw(2, 24, 20, 30, seed=1), draw(7, 2, 24)
    first = cuda.apply_backward(dv, y, coef, "gelu")
    extension.set_seed(99)
    second = cuda.apply_backward(dv, y, coef, "gelu")
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_bad_arguments_are_named(extension: ModuleType) -> None:
    y, coef = draw(1, 8, 4, 4), draw(7, 1, 8)
    with emulated.installed(extension) as cuda:
        with pytest.raises(ValueError, match="y must be dense in channels-last order, got shape"):
            cuda.apply(y.contiguous(), coef, "relu")
        with pytest.raises(TypeError, match="y must be float16, bfloat16 or float32, got"):
            cuda.apply(y.double(), coef, "relu")
        with pytest.raises(ValueError, match=r"coef must have shape \(7, 1, 8\), got \(7, 1, 7\)"):
            cuda.apply(y, coef[..., :7], "relu")
        with pytest.raises(ValueError, match=r"dv must be \(1, 8, 4, 4\) of torch.float32, got"):
            cuda.apply_backward(y.half(), y, coef, "relu")
        with pytest.raises(ValueError, match="act must be one of none, relu"):
            cuda.apply(y, coef, "mish")
    where = (y.data_ptr(), coef.data_ptr(), y.data_ptr())
    for arguments, message in (
        (((0, *where[1:]), (0, 0, 1, 16, 8, 0)), "y is null"),
        (((where[0] + 1, *where[1:]), (0, 0, 1, 16, 8, 0)), "y must be aligned to 4 bytes"),
        (((where[0], where[1] + 2, where[2]), (0, 0, 1, 16, 8, 0)), "coef must be aligned to 4"),
        ((where, (1, 0, 1, 16, 8, 0)), "dtype must be 0"),
        ((where, (0, 9, 1, 16, 8, 0)), r"act must be in \[0, 6\], got 9"),
        ((where, (0, 0, 1, 2**62, 8, 0)), "s must be in"),
        ((where, (0, 0, 0, 16, 8, 0)), "n must be in"),
    ):
        with pytest.raises(ValueError, match=message):
            extension.apply(*arguments[0], *arguments[1])


@pytest.mark.skipif(bool(os.environ.get(LIBRARY)), reason="this is the sanitized run")
def test_all_of_this_under_address_and_undefined_behaviour_sanitizers(
    library: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    compiler = str(emulated.compiler())
    runtimes = []
    for name in ("libasan.so", "libubsan.so"):
        command = [compiler, f"-print-file-name={name}"]
        found = subprocess.run(command, capture_output=True, text=True).stdout.strip()
        if not Path(found).is_absolute():
            pytest.skip(f"the compiler has no {name}")
        runtimes.append(found)
    built = emulated.build(
        build_folder(tmp_path_factory) / "sanitized", ("-O1", *emulated.SANITIZE)
    )
    environment = os.environ | {
        LIBRARY: str(built),
        "LD_PRELOAD": " ".join(runtimes),
        # Python's own memory is not the subject
        "ASAN_OPTIONS": "detect_leaks=0",
    }
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", __file__]
    others = ("test_convolution.py", "test_sm90.py")
    command += [*(str(Path(__file__).with_name(name)) for name in others), "-k", SANITIZED]
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=emulated.ROOT
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
