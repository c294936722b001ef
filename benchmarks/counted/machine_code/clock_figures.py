"""Figures of the cost model: clocks of a tile of every CUDA convolution, by the clock model.

    python -m benchmarks.counted.machine_code.clock_figures [--library FILE] [--out fastfilm/tuning/clocks.json]

A figure belongs to an architecture, a type of products, a pass, a size of the kernel and two classes of channels:
those that a kernel produces and those that it sums over. It holds the channels that a block of threads takes of
either, and the clocks of a tile of 256 voxels. `fastfilm.tuning.cost` reads them.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from fastfilm.tuning import cost
from fastfilm.tuning.binary import resident

from ..deciding_layers import Block, Subject
from ..roofline import Layer as Sizes
from . import sass
from .clock_model import (
    CONSTANTS,
    GPUS,
    PASSES,
    TYPES,
    Kernels,
    Layer,
    Shape,
    kernel_of,
    timed,
    together,
)

CLASSES = {2: ((1, 32, 64), (1, 16, 32, 64)), 4: ((1, 32), (1, 16))}
"""Bytes of a value -> channels that a kernel produces and that it sums over; 1: fewer than `cost.NARROW`."""

NAMES = {"bf16": "bfloat16", "tf32": "tf32", "fp32": "float32"}
MAPS = {"1": ((256, 256), 16), "9": ((256, 256), 16), "27": ((128, 128, 128), 2)}
"""Taps -> size and batch of a map with many tiles."""

IMAGE = 4
"""Channels up to which nothing is pending on an input."""


def shape_of(ci: int, co: int, taps: str, dtype: str) -> Shape:
    """A layer of stride 1."""
    size, batch = MAPS[taps]
    sizes = Sizes(ci, co, size, kernel=1 if taps == "1" else 3, input_grad=ci > IMAGE)
    subject = Subject(Block(sizes, batch, "instance", "leaky_relu", "conv-norm-act-film"))
    plain = Shape.of(subject)
    return Shape(subject, plain.dims, batch, ci, co, plain.size, plain.kernel, dtype)


def figure(
    kernels: Kernels,
    module: ModuleType,
    device: str,
    dtype: str,
    name: str,
    taps: str,
    out: int,
    inner: int,
) -> tuple[int, int, float, float]:
    """Channels of a block, and the clocks of a tile: of a block alone, and the share of one of several.

    Raises:
        ValueError: a loop that the kernel must have is not recognised, or the kernel is not there.
    """
    gpu = GPUS[device]
    ci, co = (out, inner) if name == "dgrad" else (inner, out)
    shape = shape_of(ci, co, taps, dtype)
    facts = shape.facts(module, gpu, name)
    rows, columns = facts["channels"]
    code = kernels.get((name, (rows, columns)))
    if code is None:
        raise ValueError(f"the library has no {name} of {rows} by {columns} channels")
    layer = Layer(shape, name, facts, code)
    warps = layer.threads // 32
    multiply = gpu.hmma if code.on_tensor_cores else gpu.ffma
    # the blocks that take sums of the gradient end last
    times = [timed(p, warps, multiply) for p in layer.phases(0.0, layer.wgrad)]
    blocks = max(1, resident(code.registers, facts["shared_bytes"], warps, gpu.arch))
    return rows, columns, together(times, 1), together(times, blocks) / blocks


def tables(
    kernels: Kernels, module: ModuleType, device: str, dtype: str
) -> Iterator[tuple[str, dict[str, list[int]]]]:
    """``fprop 9`` (pass, taps) and so on -> ``64x16`` (channels produced and summed over) -> a figure."""
    produced, summed = CLASSES[TYPES[dtype][0]]
    for name in PASSES:
        for taps in MAPS:
            found = {}
            for out in produced:
                for inner in summed:
                    where = kernels, module, device, dtype, name, taps, out
                    rows, columns, alone, shared = figure(*where, inner)
                    more = 0.0
                    if inner == summed[-1] and name != "wgrad":
                        more = (figure(*where, inner + 3 * columns)[3] - shared) / 3
                    found[f"{out}x{inner}"] = [rows, columns, *map(round, (alone, shared, more))]
            yield f"{name} {taps}", found


def figures(library: Path) -> dict[str, Any]:
    """All that the cost model reads."""
    module = sass.load(library)
    # an H200 computes in an H100's clocks
    devices = {gpu.arch: name for name, gpu in reversed(GPUS.items())}
    rates: dict[str, float] = {}
    clocks: dict[str, Any] = {}
    for target in module.architectures.split(";"):
        arch = int(target.rstrip("af")) // 10 * 10
        if arch not in devices:
            continue
        usage = dict(sass.resources(library, f"sm_{target}"))
        kernels: dict[str, Any] = {dtype: {} for dtype in TYPES}
        for mangled, lines in sass.functions(library, f"sm_{target}"):
            for dtype, known in kernels.items():
                if found := kernel_of(mangled, lines, usage[mangled]["REG"], dtype):
                    known[found[0]] = found[1]
        rates[str(arch)] = GPUS[devices[arch]].clock
        clocks[str(arch)] = {
            NAMES[dtype]: dict(tables(known, module, devices[arch], dtype))
            for dtype, known in kernels.items()
        }
    about = (
        "made by python -m benchmarks.counted.machine_code.clock_figures; architecture -> type -> pass and taps ->"
        " channels produced x summed over -> [of a block, both; clocks of a tile of 256 voxels:"
        " of a block alone, a block's share of a multiprocessor, of one more block of channels]"
    )
    return {"about": about, "block": CONSTANTS["block"], "clock": rates, "clocks": clocks}


def text(found: dict[str, Any]) -> str:
    """JSON with a figure a line."""
    spread = json.dumps(found, indent=1)
    joined = re.sub(r"\[[\d\s,]+\]", lambda m: " ".join(m[0].split()), spread)
    joined = joined.replace("[ ", "[").replace(" ]", "]")
    return joined + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes the figures of a library's kernels."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.counted.machine_code.clock_figures", description=__doc__
    )
    parser.add_argument("--library", type=Path, help="CUDA extension; the installed one without it")
    parser.add_argument("--out", type=Path, default=cost.FIGURES, help="where to write")
    args = parser.parse_args(arguments)
    library = args.library or sass.extension()
    if library is None:
        print("the CUDA extension is not built, and --library names no other", file=sys.stderr)
        return 1
    args.out.write_text(text(figures(library)), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
