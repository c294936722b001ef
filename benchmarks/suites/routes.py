"""Ten layers that decide, by each route and direction, beside the vendor's convolution alone.

A layer is a block of the FiLMed U-Net as it runs in training: an affine is pending on its input, its own
output is left pending. The vendor's convolution reads and writes plain maps, with no norm, activation or FiLM;
the composed route is that convolution with our passes around it. A time counts only behind a right result: each
route is compared with float64 on a crop of the layer first.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import fastfilm

from ..counted import emulation, inside, verdicts
from ..counted.deciding_layers import SUBJECTS, Subject
from ..counted.inside import float32_products
from ..counted.roofline import DTYPES, Ceilings, Work, convolution, ulp
from ..measure.harness import Effort, paired, paired_ratio, without_search
from ..measure.journal import DeviceLost
from ..measure.providers import one_line
from ..measure.record import ERROR_FACTOR, FAILED, NO_TIME, SKIPPED, Row, relative_error
from ..measure.session import Case, Session
from ..measure.table import align, milliseconds, ratio
from ..subjects import blocks
from ..subjects.blocks import Tensors
from ..subjects.layers import WANTED, LayerStep, steady

EMULATED = "FASTFILM_EMULATED_LIBRARY"
"""Environment variable: the CUDA kernels built for the host, which then stand in for a GPU's."""

VENDOR = "vendor"
DIRECTIONS: dict[str, tuple[str, ...]] = {
    "forward": WANTED,
    "input gradient": ("input",),
    "weight gradient": ("weight",),
    "both gradients": ("input", "weight"),
}
"""Direction -> the gradients that its graph asks for; the forward pass keeps what a training step needs."""

RAW = "raw output"
Results = dict[str, Tensor]

OURS = "cuda/fused"
ROUTES = ("triton/fused", "triton/composed", OURS)
MMA, WGMMA = "cuda-mma", "cuda-wgmma"
KINDS = {MMA: "mma", WGMMA: "wgmma"}
"""The route ``OURS`` by one kind of kernels -> what they multiply by: two routes where both kinds run."""

LAUNCHED = {
    "forward": ("fprop",),
    "input gradient": ("dgrad",),
    "weight gradient": ("wgrad",),
    "both gradients": ("dgrad", "wgrad"),
}
"""Direction -> the CUDA convolutions that are timed."""

HUNG = 20.0
"""Seconds after which a kind of kernels, all compiled beforehand, is taken for one that does not come back."""

EFFORT = Effort(min_rounds=7, max_rounds=15, seconds=0.25)
QUICK = 4
"""Layers of a quick run."""
CHECKED = {2: 64, 3: 32}
"""Side of the crop that is compared with float64: several tiles, and halves that 16 divides as the whole map's."""


@contextlib.contextmanager
def scope(route: str) -> Iterator[None]:
    """``route`` in force."""
    name, _, form = (OURS if route in KINDS else route).partition("/")
    kind = inside.multiplying(KINDS[route]) if route in KINDS else contextlib.nullcontext()
    with fastfilm.backend(name, form), kind:
        yield


def routes(device: str, dtype: str) -> tuple[list[str], dict[str, str]]:
    """The routes that run here, and why the others do not; on a CPU without any of them its own backend's.

    Where CUDA convolutions multiply by warpgroups too, each kind is a route of its own.
    """
    reasons = {r: inside.why_not(r, device, DTYPES[dtype]) for r in ROUTES}
    missing = {r: reason for r, reason in reasons.items() if reason is not None}
    usable = [r for r in ROUTES if r not in missing]
    if OURS in usable and "wgmma" in inside.instructions(DTYPES[dtype]):
        usable[usable.index(OURS) :] = KINDS
    return usable or ["cpu/composed"], missing


def why_not(subject: Subject, dtype: str, direction: str, route: str) -> str | None:
    """Why a layer has no row of a route; None if it has. A kernel by mma must not stand for one by wgmma."""
    if route != WGMMA:
        return None
    for kernel in LAUNCHED[direction]:
        reason = inside.why_left_out(f"{verdicts.SM90}{kernel}", DTYPES[dtype])
        if reason is None and _by(subject, dtype, kernel, "always") != "wgmma":
            reason = f"no {kernel} by wgmma takes this layer"
        if reason is not None:
            return reason
    return None


def _by(subject: Subject, dtype: str, kernel: str, when: str) -> str:
    layer = subject.block.layer
    sizes = (layer.cin, layer.cout), layer.size, layer.kernel, layer.stride
    return inside.instruction_of(kernel, DTYPES[dtype], subject.block.batch, *sizes, when=when)


def chosen(subject: Subject, dtype: str, direction: str) -> bool:
    """Whether the extension by itself takes the kernels by wgmma for all that a direction launches."""
    return all(
        _by(subject, dtype, kernel, "where faster") == "wgmma" for kernel in LAUNCHED[direction]
    )


class Truth:
    """What a layer computes on a crop, in float64, and the errors that eager PyTorch makes there.

    A sign in front of an activation that rounding has turned changes gradients by more than all other errors
    together. So the raw output is compared by itself, and everything behind it with float64 at the very raw output
    that was found, as operators define their gradients.
    """

    def __init__(self, subject: Subject, device: str, dtype: str) -> None:
        self.make = partial(step_of, subject, device, dtype)
        self.ulp = ulp(dtype)
        eager = self._plain(DTYPES[dtype])
        exact = self._plain(torch.float64, eager[RAW])
        self.eager = {n: relative_error([eager[n]], [t]) for n, t in exact.items()}

    def _plain(
        self, dtype: torch.dtype, at: Tensor | None = None, wanted: tuple[str, ...] = WANTED
    ) -> Results:
        """Results by PyTorch alone in ``dtype``; ``at``: a raw output to take the place of the convolution's."""
        step = self.make(wanted=wanted)
        block, t = step.block, step.t.to(dtype, "channels-last", grad=False)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        raws = [_like(raw, dtype) for raw in step.raws]
        coefs = [_like(coef, wide) for coef in step.coefs]
        assert step.t.bias is not None
        t.weight, t.bias = _like(step.t.weight, dtype), _like(step.t.bias, dtype)
        pending = zip(raws, coefs, strict=True)
        first = not block.layer.input_grad
        parts = raws if first else [inside.defined_map(*p, block.act) for p in pending]
        x = inside.joined([*parts])
        assert isinstance(x, Tensor)
        y = found = blocks.convolve(block.layer, x, t.weight, t.bias)
        if at is not None:
            y = y + (at.to(dtype) - y.detach())
        tail = blocks.eager_tail if at is None else blocks.definition_tail
        return _results(found, tail(block, y, t), _named(raws, coefs, t), t.upstream)

    def compare(self, route: str, direction: str) -> tuple[float, float, str | None]:
        """Error and eager's error of the result nearest to its bound, and what is wrong if it is beyond."""
        step = self.make(route, DIRECTIONS[direction])
        v, y = inside.output_of(step.output(), step.t.bias)
        leaves = _named(step.raws, step.coefs, step.t) if direction != "forward" else {}
        with step.backward():
            found = _results(y, v, leaves, step.t.upstream)
        exact = self._plain(torch.float64, y, DIRECTIONS[direction])
        judged = []
        for name, value in found.items():
            error, eager = relative_error([value], [exact[name]]), self.eager[name]
            bound = ERROR_FACTOR * eager + self.ulp
            if not error <= bound:  # a NaN is above every bound
                return error, eager, f"wrong {name}: error {error:.1e}, allowed {bound:.1e}"
            judged.append((error / bound, error, eager))
        return *max(judged)[1:], None


def _like(t: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy in ``dtype`` that is differentiated if ``t`` is."""
    return t.detach().to(dtype).clone().requires_grad_(t.requires_grad)


def _named(raws: Sequence[Tensor], coefs: Sequence[Tensor], t: Tensors) -> dict[str, Tensor]:
    """What a direction may differentiate, by name."""
    named: dict[str, Tensor | None] = {f"gradient of input {i}": raw for i, raw in enumerate(raws)}
    named |= {f"gradient of coefficients {i}": coef for i, coef in enumerate(coefs)}
    named |= {"gradient of weight": t.weight, "gradient of bias": t.bias}
    return {name: leaf for name, leaf in named.items() if leaf is not None and leaf.requires_grad}


def _results(y: Tensor, v: Tensor, leaves: Mapping[str, Tensor], upstream: Tensor) -> Results:
    """Raw output, finished output, and the gradients of the leaves."""
    found = torch.autograd.grad(v, list(leaves.values()), upstream) if leaves else ()
    return {RAW: y.detach(), "output": v.detach(), **dict(zip(leaves, found, strict=True))}


def step_of(
    subject: Subject, device: str, dtype: str, route: str = "", wanted: tuple[str, ...] = WANTED
) -> LayerStep:
    """The layer by a route (that of the automatic choice without one); the same numbers each time.

    Gradients alone by wgmma stand behind a forward pass by mma: a fault of the one kernel is not the other's.
    """
    torch.manual_seed(0)
    within = partial(scope, route) if route else contextlib.nullcontext
    options = {"scope": within, "resized": subject.resized, "wanted": wanted}
    if route == WGMMA and wanted != WANTED:
        options |= {"scope": partial(scope, MMA), "backward": within}
    return LayerStep(subject.block, device, dtype, "training", **options)  # type: ignore[arg-type]


def work_of(subject: Subject, direction: str, dtype: str, ceilings: Ceilings) -> Work:
    """Arithmetic and compulsory traffic of a direction: weight and maps once, a resized one at its own size."""
    block, layer = subject.block, subject.block.layer
    c = convolution(layer, block.batch, dtype)
    coarse = subject.resized * math.prod((s + 1) // 2 for s in layer.size)
    read = block.batch * (coarse + (layer.cin - subject.resized) * math.prod(layer.size))
    count = 2 if direction == "both gradients" else 1
    moved = count * (c.itemsize * read + c.w_bytes) + c.y_bytes
    arithmetic = count * c.flops
    floor = max(moved / ceilings.bandwidth, arithmetic / ceilings.rate(dtype))
    return Work(arithmetic, moved, floor)


def vendor_call(subject: Subject, device: str, dtype: str, direction: str) -> Callable[[], object]:
    """The vendor's convolution of a direction, on plain maps."""
    t, layer = step_of(subject, device, dtype, wanted=()).t, subject.block.layer
    if direction == "forward":
        return partial(blocks.convolve, layer, t.x, t.weight)
    ones, zeros = [1] * subject.dims, [0] * subject.dims
    mask = [direction != "weight gradient", direction != "input gradient", False]
    geometry = (None, ones, [(layer.kernel - 1) // 2] * subject.dims, ones, False, zeros, 1)
    backward = torch.ops.aten.convolution_backward
    return partial(backward, t.upstream, t.x, t.weight, *geometry, mask)


def route_call(
    subject: Subject, device: str, dtype: str, direction: str, route: str
) -> tuple[Callable[[], object], str]:
    """A route's call for a direction, as ``steady`` gives it."""
    step = step_of(subject, device, dtype, route, DIRECTIONS[direction])
    if direction == "forward":
        return steady(step.forward, device)
    return steady(step.gradients, device, before=step.forward)


def run(session: Session) -> None:
    """Measures and prints one layer after the other, in the first of the dtypes asked for."""
    library = os.environ.get(EMULATED) if session.device == "cpu" else None
    there = library is not None and Path(library).exists()
    module = emulation.load(Path(str(library))) if there else None
    emulated = contextlib.nullcontext() if module is None else emulation.serving(module)
    dtype = session.dtypes[0]
    with emulated, float32_products(dtype == "tf32"):
        usable, missing = routes(session.device, dtype)
        for route, reason in missing.items():
            case = Case("routes", "every layer", "all", dtype)
            session.skip(case, f"fastfilm-{route}", reason)
        for subject in SUBJECTS[: QUICK if session.quick else None]:
            chosen = subject if session.device == "cuda" else subject.tiny()
            measure(session, chosen, dtype, usable)


def measure(session: Session, subject: Subject, dtype: str, usable: Sequence[str]) -> None:
    """The rows of one layer, and its lines on stdout."""
    begun, lines = time.monotonic(), []
    crop = subject.sized(CHECKED[subject.dims])
    truth: Truth | None = None
    for direction in DIRECTIONS:
        if not subject.block.layer.input_grad and direction in ("input gradient", "both gradients"):
            continue
        work = work_of(subject, direction, dtype, session.ceilings)
        case = Case("routes", subject.name, direction, dtype, work)
        if session.budget.spent():
            session.record.add(session.row(case, "fastfilm", status=SKIPPED, note=NO_TIME))
            print(f"routes: {subject.name}: {direction} and what follows {NO_TIME}", flush=True)
            break
        if session.journal.finished(str(case)):
            continue
        session.say(f"routes: {subject.name}, {direction}")
        with without_search():
            truth = truth or Truth(crop, session.device, dtype)
        lines.append((direction, _direction(session, case, subject, truth, usable)))
    if lines:
        seconds = time.monotonic() - begun
        print(f"\n{subject.name}, {dtype} ({seconds:.1f} s)")
        print("\n".join(table(lines, usable)), flush=True)


def _direction(
    session: Session, case: Case, subject: Subject, truth: Truth, usable: Sequence[str]
) -> list[Row]:
    rows: list[Row] = []
    calls: dict[str, Callable[[], object]] = {}
    arguments = subject, session.device, case.dtype, case.mode
    slow = subject.dims == 3 or subject.resized > 0
    compiled = KINDS if session.device == "cuda" else ()
    for route in (VENDOR, *usable):
        if route == "triton/fused" and session.quick and slow and inside.interpreting():
            session.skip(
                case, f"fastfilm-{route}", "left out of a quick run: slow in the interpreter"
            )
            continue
        row = session.row(case, route if route == VENDOR else f"fastfilm-{route}")
        rows.append(row)
        reason = why_not(subject, case.dtype, case.mode, route)
        if reason is not None:
            row.status, row.note = SKIPPED, reason
            continue
        if route == WGMMA:
            row.extra["chosen"] = chosen(subject, case.dtype, case.mode)
        failed = SKIPPED if route == VENDOR else FAILED
        reason = session.journal.why_not(str(case), row.provider)
        if reason is not None:
            row.status, row.note = failed, reason
            continue
        try:
            with session.noting(case, row.provider, HUNG if route in compiled else None):
                if route == VENDOR:
                    call, row.extra["timed"] = steady(vendor_call(*arguments), session.device)
                else:
                    with without_search():
                        row.error, row.eager_error, reason = truth.compare(route, case.mode)
                    if reason is not None:
                        row.status, row.note = FAILED, reason
                        continue
                    call, row.extra["timed"] = route_call(*arguments, route)
                if session.device == "cuda":
                    call()  # an error of the device belongs to this route
            calls[row.provider] = call
        except DeviceLost:
            raise  # the process that comes after this one measures the case again
        except NotImplementedError as error:
            row.status, row.note = SKIPPED, one_line(error)
        except Exception as error:  # one kernel's failure must not cost the others' rows
            row.status, row.note = failed, one_line(error)
    if session.device == "cuda":
        with session.noting(case, "rounds"):
            times = paired(calls, session.clock, EFFORT)
    else:
        times = {name: [session.clock.time(call, 1)] for name, call in calls.items()}
    for row in rows:
        if row.provider in times:
            _fill(session, row, case, times[row.provider], times.get(VENDOR))
        session.record.add(row)
    session.journal.finish(str(case))
    return rows


def _fill(
    session: Session, row: Row, case: Case, seconds: list[float], vendor: list[float] | None
) -> None:
    work = case.work
    assert work is not None
    row.timed(seconds, work)
    assert row.tflops is not None and row.gbps is not None
    row.ratio = None if vendor is None else paired_ratio(vendor, seconds)
    row.extra |= {
        "rounds": len(seconds),
        "fraction_of_rate": row.tflops * 1e12 / session.ceilings.rate(case.dtype),
        "fraction_of_bandwidth": row.gbps * 1e9 / session.ceilings.bandwidth,
    }


def table(lines: Sequence[tuple[str, Sequence[Row]]], usable: Sequence[str]) -> list[str]:
    """A line a direction: ms, TFLOP/s and the vendor's time over its own, of the vendor and each route."""
    head, cells = ["ms, TFLOP/s, vendor / this", VENDOR, *usable], []
    for direction, rows in lines:
        found = {r.provider.removeprefix("fastfilm-"): r for r in rows}
        cells.append([direction, *(_cell(found.get(name)) for name in head[1:])])
    return align([head, *cells])


def _cell(row: Row | None) -> str:
    if row is None:
        return "-"
    if row.median_s is None or row.tflops is None:
        return row.status
    return f"{milliseconds(row.median_s)} {row.tflops:.3g} {ratio(row)}"
