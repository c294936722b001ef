"""Kernels that are left out by name: what runs instead, and what a forced call says."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from types import ModuleType

import pytest
import torch

import fastfilm
from benchmarks.counted.emulation import serving
from fastfilm.ops import choice
from fastfilm.ops.choice import BACKENDS, Request, choosing
from fastfilm.ops.launchers import available
from fastfilm.ops.settings import left_out
from fastfilm.ops.spec import Geometry, Gradient, Output, Source
from tests.support import emulated
from tests.support.case import Case
from tests.support.emulated import extension, library
from tests.support.yardstick import relative_error

__all__ = ["extension", "library"]

BF16 = torch.bfloat16
REQUEST = Request(
    "cuda", BF16, 2, (3, 3), (1, 1), (1, 1), channels=(64, 64), output=(256, 256), batch=16
)


@pytest.fixture
def emulation(extension: ModuleType) -> Iterator[ModuleType]:
    """The CUDA backend on CPU tensors, by the emulation."""
    with serving(extension) as launchers:
        yield launchers


def test_entries_are_read_and_pack_stands_for_all_that_it_serves() -> None:
    found = left_out.parse(" cuda:wgrad , triton:dgrad:bfloat16,")
    assert {str(e) for e in found} == {"cuda:wgrad", "triton:dgrad:bfloat16"}
    packed = {str(e) for e in left_out.parse("cuda:pack:float16")}
    assert packed == {f"cuda:{f}:float16" for f in ("pack", "fprop", "dgrad", "wgrad")}
    assert left_out.parse("") == frozenset()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("cudnn", "BACKEND must be one of triton, cuda"),
        ("cuda:gather", "FAMILY must be one of fprop"),
        ("cuda:sm90_pack", "FAMILY must be one of fprop, .*, sm90_fprop, sm90_dgrad, sm90_wgrad"),
        ("triton:sm90_fprop", "FAMILY must be one of fprop"),
        ("triton:fprop:float64", "DTYPE must be one of float16"),
        ("triton:fprop:float32:2d", "BACKEND:FAMILY:DTYPE"),
    ],
)
def test_an_entry_that_means_nothing_is_refused(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        left_out.parse(text)


def test_a_forward_kernel_left_out_takes_its_type_off_the_fused_route(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    triton = replace(BACKENDS["triton"], unavailable=lambda: None)
    monkeypatch.setitem(BACKENDS, "triton", triton)
    monkeypatch.setattr(available, "interpreting", lambda: False)
    other = replace(REQUEST, dtype=torch.float16)
    with left_out.without("triton:fprop:bfloat16"):
        assert "left out" in str(choice.why_not_fused(triton, REQUEST))
        assert choice.why_not_fused(triton, other) is None
        assert str(choice.choose(REQUEST)) == "triton/composed"
        with fastfilm.backend("triton", "fused"), pytest.raises(NotImplementedError, match="left"):
            choice.choose(REQUEST)
    with left_out.without("triton"):
        assert str(choice.choose(REQUEST)) == "reference/eager"
    assert choice.why_not_fused(triton, REQUEST) is None


CALL = Case(norm="instance", running=False, size=(5, 6))


needs_compiler = pytest.mark.skipif(emulated.compiler() is None, reason="needs a C++ compiler")


@needs_compiler
@pytest.mark.parametrize("family", sorted(left_out.FAMILIES["cuda"].keys() - emulated.WARPGROUPS))
def test_what_is_left_out_never_runs_and_the_rest_does_its_work(
    family: str, emulation: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    # the automatic choice falls on the CUDA kernels, as a measured table makes it
    monkeypatch.setattr(choosing, "automatic", lambda device: "cuda")
    monkeypatch.setattr(choosing, "UNMEASURED", "fused")
    left = [e.family for e in left_out.parse(f"cuda:{family}")]
    for name in (n for f in left for n in left_out.FAMILIES["cuda"][str(f)]):
        if not name.startswith("covers"):

            def faulty(*args: object, **options: object) -> None:
                raise AssertionError("a kernel that is left out has run")

            monkeypatch.setattr(emulation, name, faulty)
    exact = CALL.run("reference", None, torch.float64, storage=BF16)
    eager = CALL.run("reference", None, BF16)
    with left_out.without(f"cuda:{family}:bfloat16"):
        found = CALL.run(None, None, BF16)
    for name, true in exact.items():
        bound = 3 * relative_error(eager[name], true) + torch.finfo(BF16).eps
        assert relative_error(found[name], true) <= bound, name


@needs_compiler
@pytest.mark.parametrize("family", ["dgrad", "wgrad", "moments", "pointwise"])
def test_a_forced_call_of_a_kernel_that_is_left_out_raises(
    family: str, emulation: ModuleType
) -> None:
    route = "composed" if family in ("moments", "pointwise") else "fused"
    with left_out.without(f"cuda:{family}:float32"), pytest.raises(NotImplementedError) as raised:
        CALL.run("cuda", route, torch.float32)
    assert f"cuda:{family}:float32 is left out by FASTFILM_WITHOUT" in str(raised.value)
    with left_out.without(f"cuda:{family}:bfloat16"):
        CALL.run("cuda", route, torch.float32)


WARPGROUPS = sorted(emulated.WARPGROUPS)


def launched(extension: ModuleType, text: str, dtype: torch.dtype) -> list[str]:
    """All kernels of a step by warpgroups on sm_90, without those of ``text``; the step's results are right."""
    exact = CALL.run("reference", None, torch.float64, storage=dtype)
    eager = CALL.run("reference", None, dtype)
    with emulated.sm90_device(), left_out.without(text):
        extension.launches()
        found = CALL.run("cuda", "fused", dtype)
    for name, true in exact.items():
        bound = 3 * relative_error(eager[name], true) + torch.finfo(dtype).eps
        assert relative_error(found[name], true) <= bound, name
    return list(extension.launches())


@needs_compiler
@pytest.mark.parametrize("family", WARPGROUPS)
def test_a_kernel_by_warpgroups_gives_its_place_to_the_one_by_mma_and_nothing_else_changes(
    family: str, extension: ModuleType, emulation: ModuleType
) -> None:
    whole = launched(extension, "", BF16)
    convolutions = emulated.WARPGROUPS | emulated.OTHERS
    assert convolutions & {*whole} == emulated.WARPGROUPS
    other = family.removeprefix(left_out.SM90)
    for entry in (f"cuda:{family}", f"cuda:{family}:bfloat16"):
        found = launched(extension, entry, BF16)
        assert convolutions & {*found} == emulated.WARPGROUPS - {family} | {other}
    # both gradients share a launch unless one of them is left out
    if other == "fprop":
        assert [other if name == family else name for name in whole] == found
    assert launched(extension, f"cuda:{family}:float16", BF16) == whole


@needs_compiler
def test_a_direct_call_runs_no_kernel_that_is_left_out(
    extension: ModuleType, emulation: ModuleType
) -> None:
    x, weight = (emulated.draw(*s, dtype=BF16) for s in ((1, 8, 6, 6), (8, 8, 3, 3)))
    geometry, size = Geometry.ordinary((1, 1), (1, 1)), (6, 6)
    call = (Gradient(x), weight, [Output(8)], [Source(x)], size, geometry)
    with emulated.sm90_device(), left_out.without("cuda:sm90_wgrad"):
        extension.launches()
        emulation.gradients(*call)
        assert {"dgrad", "wgrad"} == {*extension.launches()} & (
            emulated.WARPGROUPS | emulated.OTHERS
        )


@needs_compiler
def test_a_layout_for_the_kernel_that_takes_the_place_must_fit(emulation: ModuleType) -> None:
    from fastfilm.ops.launchers.cuda import plans

    asked = BF16, (64, 64), (3, 3), (1, 1)
    with pytest.MonkeyPatch.context() as patch:
        made = plans._plan
        patch.setattr(plans, "_device", lambda index: (90, 132, 232448))

        def checked(*given: object) -> object:
            if given[-1] == "never":
                raise RuntimeError("no layout by mma")
            return made(*given)

        patch.setattr(plans, "_plan", checked)
        assert plans.why_not(*asked) is None
        with left_out.without("cuda:sm90_dgrad:bfloat16"):
            assert plans.why_not(*asked) == "no layout by mma"
