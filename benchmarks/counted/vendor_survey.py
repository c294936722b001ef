"""Survey of convolutions on small maps on a CPU: fastfilm's results, or PyTorch's own, against float64.

    python -m benchmarks.counted.vendor_survey --forms 30000                 # fastfilm: no form may be wrong
    python -m benchmarks.counted.vendor_survey --forms 30000 --route eager   # PyTorch's own faults on this CPU

Draws random small forms (2D and 3D, transposed, groups, strides, dilations, paddings, layouts) and computes the
values and both gradients of each, in processes of their own, since some of PyTorch's forms end the process. Prints
how many are wrong, by kind, with the smallest form of each, and writes all of them to a JSON file.
``ONEDNN_MAX_CPU_ISA`` limits the instruction set for oneDNN, ``ATEN_CPU_CAPABILITY`` for PyTorch's own kernels.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import random
import select
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastfilm.ops import reference, spec, vendor
from fastfilm.ops.spec import Geometry

ROUNDING = {"bfloat16": 2.0**-8, "float16": 2.0**-11, "float32": 2.0**-19}
"""Largest relative error of one rounding; in float32, for which the survey does not look at rounding, of 32."""

RESULTS = (
    "values",
    "gradient at the map",
    "gradient at the weight",
    "second derivative at the map",
    "second derivative at the weight",
    "second derivative at the gradient",
)
MEMORY = {"MALLOC_PERTURB_": "128", "MALLOC_MMAP_THRESHOLD_": str(1 << 30)}
"""Lets glibc fill new memory with 0x7f, which is 3.4e38 in bfloat16: values that nobody wrote show."""

SECONDS = 300.0
"""A process that takes longer counts as one that hangs."""

TOGETHER = 20
"""Forms that share a process, which takes longer to start than they take, as long as all of them are right."""


@dataclasses.dataclass(frozen=True)
class Form:
    """A convolution [N, Ci, *size] -> [N, Co, *T].

    ``channels_last``: whether map, weight and gradient at the result are.
    """

    dtype: str
    batch: int
    channels: tuple[int, int]
    groups: int
    size: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool
    output_padding: tuple[int, ...]
    channels_last: tuple[bool, bool, bool]
    seed: int

    def geometry(self) -> Geometry:
        walk = self.stride, self.padding, self.dilation
        return Geometry(*walk, self.transposed, self.output_padding, self.groups)

    def output(self) -> list[int]:
        numbers = self.stride, self.padding, self.dilation, self.transposed, self.output_padding
        return spec.conv_output_size(self.size, self.kernel, *numbers)

    def products(self) -> int:
        """Products of the convolution without its padding left out."""
        sites = self.size if self.transposed else self.output()
        pairs = self.channels[0] * self.channels[1] // self.groups
        return self.batch * pairs * math.prod(sites) * math.prod(self.kernel)

    def bound(self) -> float:
        """Largest error of a right result, in units of sqrt(sum of squared products), a sum's standard deviation.

        PyTorch's own kernels round a sum to its type after each tap of the kernel: a random walk of so many steps,
        each of 0.4 roundings (root mean square) of what has been summed by then. Four of its own standard
        deviations are 1.1 sqrt(taps) roundings; a result of a few standard deviations takes some more. A plane,
        row or tap that is left out, read twice or read elsewhere changes sums by the root of its share of the
        products; memory that nobody wrote is far off.
        """
        return ROUNDING[self.dtype] * (8 + math.sqrt(math.prod(self.kernel)))

    def operands(self) -> list[Tensor]:
        """Map, weight and gradient at the result, with random values."""
        generator = torch.Generator().manual_seed(self.seed)
        ci, co = self.channels
        pair = (ci, co // self.groups) if self.transposed else (co, ci // self.groups)
        shapes = [
            (self.batch, ci, *self.size),
            (*pair, *self.kernel),
            (self.batch, co, *self.output()),
        ]
        last = spec.channels_last_format(len(self.size) + 2)
        formats = [last if yes else torch.contiguous_format for yes in self.channels_last]
        dtype = getattr(torch, self.dtype)
        return [
            torch.randn(shape, generator=generator).to(dtype).contiguous(memory_format=layout)
            for shape, layout in zip(shapes, formats, strict=True)
        ]


def draw(random_: random.Random, dtypes: list[str]) -> Form:
    """A random small form; half of the maps have at most three positions along some axis."""
    while True:
        dims = random_.choice((2, 3, 3))
        kernel = _each(random_, dims, (1, 2, 3, 3, 3, 4, 5, 7))
        stride = _each(random_, dims, (1, 1, 1, 2, 3))
        dilation = _each(random_, dims, (1, 1, 1, 1, 2, 3))
        padding = tuple(random_.choice((0, k // 2, k // 2, random_.randint(0, k))) for k in kernel)
        size = tuple(random_.choice((1, 2, 3, random_.randint(1, 9))) for _ in range(dims))
        transposed = random_.random() < 0.25
        ci, co, groups = random_.randint(1, 48), random_.randint(1, 48), 1
        if random_.random() < 0.3:
            groups = random_.choice((2, 3, 4, 8, ci))
            ci = max(1, ci // groups) * groups
            co = ci if groups == ci else max(1, co // groups) * groups
        extra = tuple(
            random_.randrange(max(s, d)) if transposed and random_.random() < 0.3 else 0
            for s, d in zip(stride, dilation, strict=True)
        )
        form = Form(
            dtype=random_.choice(dtypes),
            batch=random_.randint(1, 3),
            channels=(ci, co),
            groups=groups,
            size=size,
            kernel=kernel,
            stride=stride,
            padding=padding,
            dilation=dilation,
            transposed=transposed,
            output_padding=extra,
            channels_last=tuple(random_.random() < 0.5 for _ in range(3)),  # type: ignore[arg-type]
            seed=random_.randrange(1 << 30),
        )
        if min(form.output()) >= 1 and form.products() <= 1 << 21:
            return form


def _each(random_: random.Random, dims: int, values: tuple[int, ...]) -> tuple[int, ...]:
    """A value for each axis, mostly the same."""
    if random_.random() < 0.5:
        return (random_.choice(values),) * dims
    return tuple(random_.choice(values) for _ in range(dims))


def results(form: Form, route: str, operands: list[Tensor]) -> Iterator[Tensor]:
    """Values and gradients at map and weight by ``route``: fastfilm, reference (which goes on to the second
    derivatives) or eager."""
    x, w, e = operands
    geometry = form.geometry()
    if route == "reference":
        x, w, e = (t.detach().requires_grad_() for t in operands)
        y = reference.convolution(x, w, None, geometry)
        yield y.detach()
        first = torch.autograd.grad(y, (x, w), e, create_graph=True)
        yield from (t.detach() for t in first)
        yield from torch.autograd.grad(first, (x, w, e), operands[:2])
        return
    if route == "fastfilm":
        yield vendor.convolution(x, w, None, geometry)
        yield from vendor.convolution_backward(e, x, w, geometry, (True, True))
        return
    yield torch.convolution(x, w, None, *geometry)
    backward = torch.ops.aten.convolution_backward.default
    yield from backward(e, x, w, None, *geometry, [True, True, False])[:2]


def measure(form: Form, route: str) -> Iterator[float]:
    """Each result's error, in the units of ``Form.bound``; infinite where it is not finite."""
    operands = form.operands()
    exact = [t.double() for t in operands]
    true_route = "reference" if route == "reference" else "eager"
    truths = results(form, true_route, exact)
    scales = results(form, true_route, [t.square() for t in exact])
    for found, true, square in zip(results(form, route, operands), truths, scales, strict=True):
        error = (found.double() - true).abs()
        relative = torch.where(error == 0, 0.0, error / square.clamp(min=0).sqrt())
        yield float(relative.nan_to_num(math.inf, math.inf).max())


def isolated(forms: list[Form], route: str) -> tuple[list[list[float]], str]:
    """Errors of ``measure`` in a process of their own, as far as it lived, and how it ended ("" if well)."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        # the parent alone prints; and nothing of its exit must run here
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        try:
            for form in forms:
                os.write(writing, b"form\n")
                for error in measure(form, route):
                    os.write(writing, f"{error!r}\n".encode())
            os._exit(0)
        except BaseException as error:
            os.write(writing, f"! {type(error).__name__}: {error}"[:400].encode())
            os._exit(1)
    os.close(writing)
    text, deadline = b"", time.monotonic() + SECONDS
    while select.select([reading], [], [], max(0.0, deadline - time.monotonic()))[0]:
        part = os.read(reading, 1 << 16)
        if not part:
            break
        text += part
    else:
        os.kill(child, signal.SIGKILL)
    os.close(reading)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    said, _, raised = text.decode(errors="replace").partition("! ")
    errors = [[float(line) for line in part.split()] for part in said.split("form\n")[1:]]
    return errors, raised or ("" if status == 0 else f"ended by signal {-status}")


def verdicts(forms: list[Form], route: str) -> list[dict[str, str]]:
    """What is wrong with each result of each form (nothing: empty).

    They share a process. If one of them ends it or is wrong, each is tried again in a process of its own.
    """
    errors, ending = isolated(forms, route)
    errors += [[] for _ in range(len(forms) - len(errors))]
    found = [_wrong(form, numbers) for form, numbers in zip(forms, errors, strict=True)]
    if not ending and not any(found):
        return found
    if len(forms) > 1:
        alone = [verdicts([form], route)[0] for form in forms]
        if any(alone):
            return alone
        # wrong or ended behind the others only
        last = max(i for i, numbers in enumerate(errors) if numbers or i == 0)
        return [
            {**wrong, **({"behind others": ending} if i == last and ending else {})}
            for i, wrong in enumerate(found)
        ]
    if ending:
        found[0][RESULTS[len(errors[0])]] = ending
    return found


def _wrong(form: Form, errors: list[float]) -> dict[str, str]:
    wrong = {}
    for name, error in zip(RESULTS, errors, strict=False):
        if not math.isfinite(error):
            wrong[name] = "not finite, or not zero where zero is right"
        elif error > form.bound():
            wrong[name] = "wrong"
    return wrong


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.counted.vendor_survey", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--forms", type=int, default=1000, metavar="N")
    parser.add_argument("--route", choices=("fastfilm", "reference", "eager"), default="fastfilm")
    parser.add_argument("--dtypes", nargs="+", choices=tuple(ROUNDING), default=["bfloat16"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("vendor-survey.json"))
    given = parser.parse_args(arguments)
    if any(os.environ.get(name) != value for name, value in MEMORY.items()):
        command = [
            sys.executable,
            "-m",
            "benchmarks.counted.vendor_survey",
            *(arguments or sys.argv[1:]),
        ]
        os.execve(sys.executable, command, {**os.environ, **MEMORY})
    # no thread of OpenMP before a fork: its pool would not survive
    torch.set_num_threads(1)
    random_ = random.Random(given.seed)
    found: list[dict[str, Any]] = []
    for start in range(0, given.forms, TOGETHER):
        forms = [draw(random_, given.dtypes) for _ in range(min(TOGETHER, given.forms - start))]
        for form, wrong in zip(forms, verdicts(forms, given.route), strict=True):
            if wrong:
                about = {"wrong": wrong, "products": form.products()}
                found.append({**dataclasses.asdict(form), **about})
        done = start + len(forms)
        if done % 1000 == 0 or done == given.forms:
            print(f"{done} forms, {len(found)} wrong", flush=True)
    kinds = Counter(_kinds(found))
    for kind, count in kinds.most_common():
        smallest = min((f for f in found if kind in _kinds([f])), key=lambda f: f["products"])
        print(f"{count:5d}  {kind}; smallest: {_described(smallest)}")
    header = {
        "torch": torch.__version__,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "onednn_limit": os.environ.get("ONEDNN_MAX_CPU_ISA", ""),
        "onednn_has_bfloat16": bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()),
        **{name: getattr(given, name) for name in ("forms", "route", "dtypes", "seed")},
    }
    given.out.write_text(json.dumps({**header, "wrong": found}, indent=1) + "\n")
    print(f"{len(found)} of {given.forms} forms wrong; {given.out}")
    return 1 if found else 0


def _kinds(found: list[dict[str, Any]]) -> list[str]:
    return [
        f"{form['dtype']} {len(form['size'])}D{' transposed' * form['transposed']}, {name}: {how}"
        for form in found
        for name, how in form["wrong"].items()
    ]


def _described(form: dict[str, Any]) -> str:
    names = ("batch", "channels", "groups", "size", "kernel", "stride", "padding", "dilation")
    names += ("output_padding", "channels_last")
    return ", ".join(f"{name} {form[name]}" for name in names)


if __name__ == "__main__":
    sys.exit(main())
