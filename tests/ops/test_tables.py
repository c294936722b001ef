"""Tables of measured choices: what a file may hold, whose entry counts, and what the dispatcher makes of it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastfilm.ops import choice
from fastfilm.ops.choice import Request, registry
from fastfilm.ops.launchers import triton
from fastfilm.ops.settings import tables
from fastfilm.ops.settings.tables import Entry, Table
from fastfilm.ops.spec import Geometry, Gradient, Output, Source

SHAPE: tuple[Any, ...] = (torch.bfloat16, 16, (64, 64), (3, 3), (1, 1), (320, 256))
KEY = tables.key(*SHAPE)
FUSED = Entry("triton/fused", {"fprop": (8, 16, 64, 64, 8, 2)}, {"triton/fused": 1e-3})
COMPOSED = Entry("triton/composed", {}, {"triton/composed": 2e-3})
ABOUT = {"device": "Card", "torch": "2", "triton": "3"}


def request_of(**changes: Any) -> Request:
    dtype, batch, channels, kernel, stride, output = SHAPE
    values = {"device": "cuda", "dtype": dtype, "dims": 2, "kernel": kernel, "stride": stride}
    values |= {"dilation": (1, 1), "channels": channels, "output": output, "batch": batch}
    return Request(**(values | changes))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A machine with an sm_90 GPU, as far as choices are concerned; gives the folder of the user's tables."""
    for name in ("architecture", "about"):
        monkeypatch.setattr(
            tables, name, {"architecture": lambda: "sm_90", "about": lambda: ABOUT}[name]
        )
    monkeypatch.setattr(registry, "why_not_backend", lambda b, request: None)
    monkeypatch.setattr(tables, "SHIPPED", tmp_path / "shipped")
    monkeypatch.setenv("FASTFILM_TUNED", str(tmp_path / "own"))
    forget()
    yield tmp_path
    forget()


def forget() -> None:
    tables.in_force.cache_clear()
    choice.forget()


def many(count: int) -> Table:
    entries = {}
    for i in range(count):
        key = tables.key(
            (torch.bfloat16, torch.float32)[i % 2],
            1 << (i // 2 % 16),
            (1 << (i // 32 % 9), 1 << (i // 288 % 9)),
            (3, 3),
            (1, 1),
            (64, 64),
        )
        tile = {"fprop": (8, 16, 64, 64, 8, 2), "dgrad": (8, 16, 64, 32, 8, 2)}
        tile["wgrad"] = (128, 64, 64, 8, 3)
        seconds = {"triton/fused": 1.25e-3, "triton/composed": 2.5e-3}
        entries[key] = Entry("triton/fused", tile, seconds)
    return Table("sm_90", ABOUT, entries)


def test_keys_round_channels_and_voxels_up_and_survive_the_file() -> None:
    assert str(KEY) == "bfloat16-2d-k3s1-ci64-co64-v2097152"
    odd = tables.key(torch.float32, 3, (1, 33), (1, 1, 1), (2, 2, 2), (5, 5, 5))
    assert str(odd) == "float32-3d-k1s2-ci1-co64-v512"
    for k in (KEY, odd):
        assert tables.parse_key(str(k)) == k


@pytest.mark.parametrize(
    "text", ["", "bfloat16-2d-k3s1-ci64-co64", "noise-2d-k3s1-ci64-co64-v8", "bfloat16-2d-k3s1-cx-co4-v8",
             "bfloat16-2d-k3s1-ci064-co64-v8"],
)  # fmt: skip
def test_text_that_is_no_key_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is no key"):
        tables.parse_key(text)


def test_a_table_survives_its_file(tmp_path: Path) -> None:
    table = Table("sm_90", ABOUT, {KEY: FUSED})
    tables.write(table, tmp_path / "a" / "sm_90.json")
    assert tables.read(tmp_path / "a" / "sm_90.json") == table
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["sm_90.json"]


@pytest.mark.parametrize(
    "change",
    [
        {"format": 2},
        {"entries": {"nonsense": {"plan": "triton/fused", "tiles": {}, "seconds": {}}}},
        {"entries": {str(KEY): {"plan": "fused", "tiles": {}, "seconds": {}}}},
        {"entries": {str(KEY): {"tiles": {}}}},
        {"entries": []},
    ],
)
def test_a_file_that_is_no_table_is_refused_by_name(tmp_path: Path, change: dict[str, Any]) -> None:
    data: dict[str, Any] = {"format": 1, "architecture": "sm_90", "measured_on": {}, "entries": {}}
    path = tmp_path / "t.json"
    path.write_text(json.dumps(data | change))
    with pytest.raises(ValueError, match=r"t\.json is not a table of measured choices"):
        tables.read(path)


def test_merging_keeps_what_is_there_and_prefers_what_is_new(tmp_path: Path) -> None:
    path = tmp_path / "sm_90.json"
    other = tables.key(torch.float16, *SHAPE[1:])
    tables.merge_into(path, Table("sm_90", ABOUT, {KEY: COMPOSED, other: COMPOSED}))
    tables.merge_into(path, Table("sm_90", {"device": "New"}, {KEY: FUSED}))
    assert tables.read(path).entries == {KEY: FUSED, other: COMPOSED}
    assert tables.read(path).measured_on == ABOUT | {"device": "New"}
    with pytest.raises(ValueError, match="holds choices for sm_90, got sm_80"):
        tables.merge_into(path, Table("sm_80"))


def test_the_users_table_stands_in_front_of_the_shipped_one(gpu: Path) -> None:
    tables.write(Table("sm_90", {}, {KEY: COMPOSED}), gpu / "shipped" / "sm_90.json")
    found = tables.measured(*SHAPE)
    assert found is not None and found.plan == "triton/composed"
    forget()
    tables.write(Table("sm_90", ABOUT, {KEY: FUSED}), gpu / "own" / "sm_90.json")
    found = tables.measured(*SHAPE)
    assert found is not None and found.plan == "triton/fused"


@pytest.mark.parametrize("change", [{"device": "Other"}, {"triton": "4"}])
def test_the_users_table_from_another_machine_is_left_out_with_a_warning(
    gpu: Path, change: dict[str, str]
) -> None:
    tables.write(Table("sm_90", ABOUT | change, {KEY: FUSED}), gpu / "own" / "sm_90.json")
    with pytest.warns(RuntimeWarning, match="is not used: it was measured with"):
        assert tables.measured(*SHAPE) is None
    assert "not used" in str(tables.describe())


def test_a_broken_table_of_the_users_does_not_stop_a_call(gpu: Path) -> None:
    path = gpu / "own" / "sm_90.json"
    path.parent.mkdir()
    path.write_text("{")
    with pytest.warns(RuntimeWarning, match="is not used"):
        assert tables.measured(*SHAPE) is None


def test_every_shipped_table_is_readable_and_of_its_architecture() -> None:
    files = sorted((Path(tables.__file__).parent / "tuned").glob("*.json"))
    assert files
    for path in files:
        table = tables.read(path)
        assert table.architecture == path.stem
        assert table.measured_on or not table.entries


@pytest.mark.parametrize("route", ["fused", "composed"])
def test_the_dispatcher_takes_what_was_measured(gpu: Path, route: str) -> None:
    entry = Entry(f"triton/{route}", {}, {})
    with tables.trying({KEY: entry}):
        assert str(choice.choose(request_of())) == f"triton/{route}"
    forget()
    assert str(choice.choose(request_of())) == "triton/composed"


def test_what_is_forced_stands_above_what_was_measured(gpu: Path) -> None:
    with tables.trying({KEY: FUSED}), choice.backend("triton", "composed"):
        assert str(choice.choose(request_of())) == "triton/composed"
    with tables.trying({KEY: FUSED}), choice.backend("reference"):
        assert str(choice.choose(request_of())) == "reference/eager"


@pytest.mark.parametrize(
    "changes",
    [
        {"transposed": True},
        {"groups": 2},
        {"dilation": (2, 2)},
        {"kernel": (3, 1)},
        {"stride": (1, 2)},
    ],
)
def test_a_convolution_that_a_key_does_not_describe_takes_no_entry(
    gpu: Path, changes: dict[str, Any]
) -> None:
    entry = Entry("reference/eager", {}, {})
    with tables.trying({KEY: entry}):
        assert choice.measured(request_of(**changes), None) is None


def test_a_measured_plan_that_cannot_serve_here_is_left_out(
    gpu: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with tables.trying({KEY: Entry("elsewhere/fused", {}, {})}):
        assert choice.choose(request_of()).backend == "triton"
    forget()
    monkeypatch.setattr(registry, "why_not_fused", lambda b, request: "no")
    with tables.trying({KEY: FUSED}):
        assert str(choice.choose(request_of())) == "triton/composed"


class OnGpu(Tensor):
    """A tensor without memory that says it is on a GPU."""

    is_cuda = True  # type: ignore[assignment]


def test_launchers_get_the_measured_tile(gpu: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="the package triton is not installed")
    from fastfilm.kernels import conv_fprop, conv_wgrad

    def on_gpu(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.bfloat16, device="meta").as_subclass(OnGpu)

    tiles: dict[str, Any] = {}

    def kernel(name: str) -> Callable[..., Any]:
        return lambda *args, config=None, **rest: tiles.update({name: config})

    monkeypatch.setattr(
        triton, "_kernels", lambda: SimpleNamespace(**{n: kernel(n) for n in tables.FAMILIES})
    )
    x, w, e = on_gpu(16, 64, 320, 256), on_gpu(64, 64, 3, 3), on_gpu(16, 64, 320, 256)
    entry = Entry("triton/fused", {"fprop": (8, 8, 64, 32, 4, 3), "wgrad": (64, 32, 64, 4, 2)}, {})
    walk, read, upstream = Geometry.ordinary((1, 1), (1, 1)), [Source(x)], Gradient(e)
    with tables.trying({KEY: entry}):
        triton.fprop(read, w, None, walk)
        triton.wgrad(upstream, read, w, walk)
        triton.dgrad(upstream, w, [Output(64, x)], (320, 256), walk)
    assert tiles["fprop"] == conv_fprop.Config(8, 8, 64, 32, 4, 3)
    assert tiles["wgrad"] == conv_wgrad.Config(64, 32, 64, 4, 2)
    assert tiles["dgrad"] is None
    triton.fprop(read, w, None, walk)
    assert tiles["fprop"] is None


def fastest(call: Callable[[], object], times: int, repeats: int = 7) -> float:
    """Least CPU seconds of one call; pauses let a burst of a neighbour's work pass."""
    found = []
    for _ in range(repeats):
        time.sleep(0.02)
        start = time.process_time()
        for _ in range(times):
            call()
        found.append((time.process_time() - start) / times)
    return min(found)


def test_loading_a_table_takes_less_than_five_milliseconds(gpu: Path) -> None:
    """On a machine that reads the bare JSON in 1.2 ms; one that is slower at that moment has as much longer."""
    table = many(400)
    assert len(table.entries) == 400
    path = gpu / "shipped" / "sm_90.json"
    tables.write(table, path)
    assert len(tables.load("sm_90")) == 400
    text = path.read_text(encoding="utf-8")
    ratios = []
    for _ in range(50):
        bare = fastest(lambda: json.loads(text), 1, repeats=3)
        ratios.append(fastest(lambda: tables.load("sm_90"), 1, repeats=3) / bare)
        if ratios[-1] < 5e-3 / 1.2e-3:
            return
    pytest.fail(f"loading took {min(ratios):.1f} times as long as reading the bare JSON")


def test_a_lookup_takes_less_than_two_microseconds(gpu: Path) -> None:
    """On a machine that builds the key in 1 µs; one that is slower at that moment has as much longer."""
    table = many(400).merged(Table("sm_90", {}, {KEY: FUSED}))
    tables.write(table, gpu / "shipped" / "sm_90.json")
    assert tables.measured(*SHAPE) is not None
    ratios = []
    for _ in range(20):
        key = fastest(lambda: tables.key(*SHAPE), 5000, repeats=3)
        ratios.append(fastest(lambda: tables.measured(*SHAPE), 5000, repeats=3) / key)
        if ratios[-1] < 2e-6 / 1e-6:
            return
    pytest.fail(f"a lookup took {min(ratios):.1f} times as long as building its key")
