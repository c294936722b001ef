"""Which convolutions by warpgroup products (sm_90a) are chosen, and how they are laid out."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest

from tests.cuda.test_convolution import HALF, SINGLE, Layer
from tests.cuda.test_sm90 import KERNELS, LAYERS, described
from tests.support import emulated
from tests.support.emulated import extension, library, sm90_device

__all__ = ["extension", "library"]

pytestmark = pytest.mark.skipif(emulated.compiler() is None, reason="needs a C++ compiler")


def _instructions(cuda: Any, layer: Layer) -> list[str]:
    return [facts["instruction"] for facts in described(cuda, layer).values()]


def _reasons(cuda: Any, layer: Layer) -> list[str]:
    """Why none of the three kernels is one of warpgroup products."""
    assert _instructions(cuda, layer) == ["mma"] * 3
    return [facts["why_not_wgmma"] for facts in described(cuda, layer).values()]


WIDE = Layer((64, 64), (64, 64))
NARROW = Layer((64, 64), (8, 8))


@pytest.fixture
def launchers(extension: ModuleType) -> Iterator[ModuleType]:
    with emulated.installed(extension) as cuda:
        yield cuda


def test_warpgroups_where_they_are_faster(launchers: Any) -> None:
    with sm90_device("where faster", 132):
        assert _instructions(launchers, WIDE) == ["wgmma"] * 3
        assert _instructions(launchers, replace(WIDE, dtype=HALF, stride=2)) == ["wgmma"] * 3
        assert _instructions(launchers, Layer((16, 32, 32), (64, 64))) == ["wgmma"] * 3
        for reason in _reasons(launchers, NARROW):
            assert re.fullmatch(r"only \d+ % of their products would be of use", reason)
        assert _instructions(launchers, Layer((5, 6), (64, 64)))[:2] == ["mma"] * 2


def test_the_share_of_useful_work_decides(launchers: Any) -> None:
    found = set()
    with sm90_device("always", 132):
        forced = [described(launchers, layer) for layer in LAYERS.values()]
    with sm90_device("where faster", 132):
        for layer, facts in zip(LAYERS.values(), forced, strict=True):
            chosen = described(launchers, layer)
            for kernel in ("forward", "backward"):
                useful, instruction = facts[kernel]["useful"], chosen[kernel]["instruction"]
                assert 0 < useful <= 1
                assert instruction == ("wgmma" if useful >= 0.2 else "mma")
                found.add(instruction)
    assert found == {"mma", "wgmma"}


def test_warpgroups_always_or_never(launchers: Any) -> None:
    for layer in (WIDE, NARROW):
        with sm90_device("always"):
            assert _instructions(launchers, layer) == ["wgmma"] * 3
        with sm90_device("never"):
            assert _reasons(launchers, layer) == ["wgmma is 'never'"] * 3


@pytest.mark.parametrize("choice", ["where faster", "always"])
def test_float32_has_no_warpgroup_products(choice: str, launchers: Any) -> None:
    with sm90_device(choice):
        reasons = _reasons(launchers, replace(WIDE, dtype=SINGLE))
        assert reasons == ["warpgroup products take float16 and bfloat16"] * 3


@pytest.mark.parametrize("capability", [80, 89, 100, 120])
def test_other_gpus_have_no_warpgroup_products(
    capability: int, launchers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for choice in ("where faster", "always"):
        with sm90_device(choice):
            from fastfilm.ops.launchers.cuda import plans

            monkeypatch.setattr(plans, "_device", lambda index: (capability, 132, 232448))
            reason = f"the GPU is sm_{capability}, not sm_90"
            assert _reasons(launchers, WIDE) == [reason] * 3


def test_a_plane_that_does_not_fit_leaves_the_other_kernels(
    launchers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with sm90_device():
        from fastfilm.ops.launchers.cuda import plans

        monkeypatch.setattr(plans, "_device", lambda index: (90, 132, 60 * 1024))
        reasons = _reasons(launchers, WIDE)
        assert all(reason.endswith("into 61440 bytes of shared memory") for reason in reasons)


def test_a_choice_holds_inside_its_block(launchers: Any) -> None:
    from fastfilm.ops.launchers.cuda import plans

    with sm90_device("never"):
        with pytest.raises(KeyError), plans.wgmma("always"):
            assert _instructions(launchers, NARROW) == ["wgmma"] * 3
            raise KeyError
        assert _instructions(launchers, WIDE) == ["mma"] * 3
        with plans.wgmma("sometimes"), pytest.raises(ValueError, match="wgmma must be 'where fas"):
            described(launchers, WIDE)


def test_the_layers_have_every_kind_of_layout(launchers: Any) -> None:
    with sm90_device():
        found = [(layer, described(launchers, layer)) for layer in LAYERS.values()]
    for kernel in KERNELS:
        facts = [each[kernel] for _, each in found]
        assert all(f["instruction"] == "wgmma" for f in facts)
        assert {f["groups"] > 1 for f in facts} == {f["tiles_a_block"] > 1 for f in facts}
        assert any(f["groups"] > 1 and f["tiles_a_block"] > 1 for f in facts)
        # the tiles of a sample lie beside each other, below each other and behind each other
        for axis in range(3):
            sizes = [((1, 1, *layer.size)[-3:], each[kernel]["tile"]) for layer, each in found]
            assert any(size[axis] > 2 * tile[axis] for size, tile in sizes)
    for kernel, shifts in (("forward", {1, 2, 4}), ("backward", {1, 2})):
        facts = [each[kernel] for _, each in found]
        assert {f["shifts"] for f in facts} == shifts
        assert len({f["part"] for f in facts}) > 1
        assert {f["resident"] for f in facts} == {False, True}
        assert {f["channels"][1] for f in facts} >= {16, 32}
    assert {each["weight"]["channels"][1] for _, each in found} == {32, 64}
