"""What the compiler says of every shipped Triton tile, without a GPU.

Each kernel is compiled for sm_80, sm_90 and sm_100 in the variants that a network uses; registers,
stack bytes (spills), shared memory and matrix instructions are read from the binary with the tools in
Triton's own package. A 16-bit tile that spills, needs more shared memory than its target has, or lacks
the target's matrix instructions fails.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

from fastfilm.tuning.binary import MATRIX_INSTRUCTION, SHARED_LIMIT, read_binary

from . import cuda_binaries

RELU = 1  # fastfilm.kernels.common.ACT_CODES["relu"]; Triton is imported only where it is used


@dataclass(frozen=True)
class Build:
    """One kernel in one variant for one target."""

    family: str
    case: str
    arch: int
    dtype: str
    constants: tuple[tuple[str, Any], ...]
    warps: int
    stages: int
    matrix: bool


def _tile(config: Any) -> str:
    sizes = [getattr(config, f) for f in ("th", "tw", "bm", "bn", "bk", "bp") if hasattr(config, f)]
    return "x".join(map(str, sizes)) + f" w{config.warps} s{config.stages}"


VARIANTS = (
    # (dtype, depth of the kernel, pending affine, channel blocks, strides); the heaviest one first
    ("bf16", 3, True, (True, False), (1,)),
    ("bf16", 3, True, (True, False), (2,)),
    ("bf16", 1, False, (True, False), (1,)),
    ("fp16", 1, True, (True,), (1,)),
)
"""What is compiled of each tile; ``quick`` takes the first."""


def builds(quick: bool, archs: tuple[int, ...]) -> Iterator[Build]:
    """Every shipped tile in the variants above; ``quick`` keeps the heaviest for sm_90."""
    from fastfilm.kernels import pointwise

    for arch in (90,) if quick else archs:
        for variant in VARIANTS[:1] if quick else VARIANTS:
            yield from _convolutions(arch, *variant)
        for channels in (32, 64) if quick else (1, 3, 32, 64, 256):
            bs, bc, _, _ = pointwise.blocks(1 << 20, channels, 8, reduces=True)
            for family in ("apply", "apply_backward", "moments", "moments_backward"):
                constants: dict[str, Any] = {"ACT": RELU, "BS": bs, "BC": bc}
                if family.startswith("moments"):
                    constants["HAS_PRE"] = False
                if family == "moments_backward":
                    constants["HAS_DY"] = True
                case = f"{channels} channels {bs}x{bc}"
                items = tuple(constants.items())
                yield Build(family, case, arch, "bf16", items, pointwise.NUM_WARPS, 3, False)
        yield from _views(arch, quick)
        yield from _residual(arch, quick)
        for norm in ("batch",) if quick else ("none", "batch", "instance"):
            yield from _algebra(arch, norm)


def _views(arch: int, quick: bool) -> Iterator[Build]:
    """Pooling by 2, concatenation, and resizing by about 2 with its transposed taps."""
    from fastfilm.kernels import taps as views

    cases = [
        ("gather", "max pool", (1, 2, 2), {"MAXIMUM": True}),
        ("gather", "concatenate", (1, 1, 1), {"MAXIMUM": False}),
        ("gather", "linear", (1, 2, 2), {"MAXIMUM": False}),
        ("gather", "linear 3d", (2, 2, 2), {"MAXIMUM": False}),
        ("gather_backward", "concatenate", (1, 1, 1), {}),
        ("gather_backward", "linear", (1, 4, 4), {}),
        ("gather_backward", "linear 3d", (4, 4, 4), {}),
        ("maximum_backward", "max pool", (1, 2, 2), {}),
        ("maximum_backward", "max pool 3d", (2, 2, 2), {}),
    ]
    for channels in (64,) if quick else (32, 64, 256):
        for family, case, taps, more in cases:
            form = views.FORMS[family]
            bs, bc, _, _ = views.blocks((1 << 10, 1 << 10), channels, 8, form.elements)
            constants = dict(zip(("TZ", "TY", "TX"), taps, strict=True)) | more
            constants |= {"HAS_COEF": True, "ACT": RELU, "BS": bs, "BC": bc}
            constants |= form.unrolled(*taps)
            items, label = tuple(constants.items()), f"{case} {channels} channels {bs}x{bc}"
            yield Build(family, label, arch, "bf16", items, form.warps, 3, False)


def _residual(arch: int, quick: bool) -> Iterator[Build]:
    """A block's sum with a projected skip, with the skip as it is, and an activation in front of the sum."""
    from fastfilm.kernels import pointwise

    bare: dict[str, Any] = {"other_coef_ptr": None, "slope_ptr": None}
    cases: tuple[tuple[str, dict[str, Any]], ...] = (
        ("projected", {"INSIDE": True, "slope_ptr": None}),
        ("identity", {"INSIDE": True} | bare),
        ("activated", {"INSIDE": False} | bare),
    )
    for channels in (64,) if quick else (32, 64, 256):
        for case, more in cases:
            bs, bc, _, _ = pointwise.blocks(1 << 20, channels, 8, reduces=True)
            items = tuple((more | {"ACT": RELU, "BS": bs, "BC": bc}).items())
            for family in ("residual", "residual_backward"):
                label = f"{case} {channels} channels {bs}x{bc}"
                yield Build(family, label, arch, "bf16", items, pointwise.NUM_WARPS, 3, False)


def _algebra(arch: int, norm: str) -> Iterator[Build]:
    """The coefficients of the paper's block, with and without what is optional."""
    from fastfilm.kernels import coefficients

    shape = {
        "NORM": coefficients.NORMS[norm],
        "USE_INPUT": norm != "none",
        "ORDER": coefficients.ORDERS["conv-act-norm-film"],
        "POSITION": coefficients.POSITIONS["film"],
        "BLOCK": 128,
    }
    bare = dict.fromkeys(("running_mean_ptr", "running_var_ptr", "norm_weight_ptr", "mask_ptr"))
    for case, absent in (("all", {}), ("bare", bare)):
        forward = {**shape, **absent, "UPDATE": norm != "none" and not absent}
        for family, constants in (
            ("block_coefficients", forward),
            ("block_coefficients_backward", {**shape, **absent}),
        ):
            items, label = tuple(constants.items()), f"{norm} {case}"
            yield Build(family, label, arch, "fp32", items, coefficients.NUM_WARPS, 3, False)


def _convolutions(
    arch: int,
    dtype: str,
    depth: int,
    affine: bool,
    blockings: tuple[bool, ...],
    strides: tuple[int, ...],
) -> Iterator[Build]:
    from fastfilm.kernels import conv_dgrad, conv_fprop, conv_wgrad

    for stride in strides:
        shape: dict[str, Any] = {"KD": depth, "K": 3, "STRIDE": stride}
        shape |= {"STRIDE_D": stride if depth == 3 else 1, "HAS_COEF": affine, "ACT": RELU}
        shape |= {"UPCAST": False, "PRECISION": "ieee"}
        label = f"{'3d' if depth == 3 else '2d'} {'affine' if affine else 'plain'} stride {stride}"
        for one in blockings:
            blocking = "one block" if one else "blocked"
            more = {"ONE_BLOCK": one, "WIDE": False}
            epilogue = {
                "HAS_BIAS": True,
                "MOMENTS": True,
                "HAS_PRE": False,
                "PRE_ACT": 0,
                "FINISH": False,
            }
            epilogue |= {"OUT_ACT": 0}
            for c in (c for c in conv_fprop.CONFIGS if arch in c.archs):
                tile = {"TH": c.th, "TW": c.tw, "BN": c.bn, "BK": c.bk}
                constants = shape | more | epilogue | tile
                yield _build("fprop", f"{label} {blocking} {_tile(c)}", arch, dtype, constants, c)
            for c in (c for c in conv_dgrad.CONFIGS if arch in c.archs):
                tile = {"TH": c.th, "TW": c.tw, "BN": c.bn, "BK": c.bk}
                constants = shape | more | tile
                yield _build("dgrad", f"{label} {blocking} {_tile(c)}", arch, dtype, constants, c)
        for c in conv_wgrad.CONFIGS:
            tile = {"BM": c.bm, "BN": c.bn, "BP": c.bp}
            yield _build("wgrad", f"{label} {_tile(c)}", arch, dtype, shape | tile, c)


def _build(
    family: str, case: str, arch: int, dtype: str, constants: dict[str, Any], config: Any
) -> Build:
    return Build(
        family, case, arch, dtype, tuple(constants.items()), config.warps, config.stages, True
    )


def _kernel(family: str) -> Any:
    from fastfilm.kernels import (
        coefficients,
        conv_dgrad,
        conv_fprop,
        conv_wgrad,
        pointwise,
        residual_sum,
        spatial_moments,
        taps,
    )

    modules = {"fprop": conv_fprop, "dgrad": conv_dgrad, "wgrad": conv_wgrad}
    modules |= dict.fromkeys(("gather", "gather_backward", "maximum_backward"), taps)
    modules |= dict.fromkeys(("residual", "residual_backward"), residual_sum)
    modules |= dict.fromkeys(("block_coefficients", "block_coefficients_backward"), coefficients)
    module = modules.get(family) or (spatial_moments if family.startswith("moments") else pointwise)
    return getattr(module, f"{family}_kernel")


FLOAT32_POINTERS = {
    "coef_ptr",
    "pre_ptr",
    "out_coef_ptr",
    "part_ptr",
    "count_ptr",
    "stats_ptr",
    "dstats_ptr",
}


FLOAT32_POINTERS |= {"other_coef_ptr", "slope_ptr"}
FLOAT32_POINTERS |= {"wz_ptr", "wy_ptr", "wx_ptr"}
INTEGER_POINTERS = {"iz_ptr", "iy_ptr", "ix_ptr"}
FLOATS = {"eps", "momentum", "unbiased", "slope_value"}


def compile_one(build: Build) -> dict[str, Any]:
    """Compiles one variant and reads its binary."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = _kernel(build.family)
    constants = dict(build.constants)
    signature: dict[str, str] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        if name.endswith("_ptr"):
            kind = "fp32" if name in FLOAT32_POINTERS else build.dtype
            signature[name] = "*i32" if name in INTEGER_POINTERS else f"*{kind}"
        else:
            signature[name] = "fp32" if name in FLOATS else "i32"
        if name.endswith("_ptr") or name in ("CI", "CO", "C"):
            attributes[(i,)] = [["tt.divisibility", 16]]
    row: dict[str, Any] = {
        "suite": "static",
        "case": f"{build.family} {build.case}",
        "provider": f"sm_{build.arch}",
        "dtype": build.dtype,
    }
    try:
        compiled = triton.compile(
            ASTSource(kernel, signature, constants, attributes),
            target=GPUTarget("cuda", build.arch, 32),
            options={"num_warps": build.warps, "num_stages": build.stages},
        )
    except Exception as error:  # a tile that does not compile is a result, not a crash
        reason = str(error).strip().splitlines()
        return row | {"status": f"FAILED: {reason[0] if reason else type(error).__name__}"}
    registers, stack, matrix = read_binary(compiled.asm["cubin"], build.arch)
    row |= {
        "registers": registers,
        "stack_bytes": stack,
        "shared_bytes": compiled.metadata.shared,
        "mma": matrix,
    }
    faults = []
    if stack > 0:
        faults.append(f"spills {stack} bytes")
    if compiled.metadata.shared > SHARED_LIMIT[build.arch]:
        faults.append(f"needs {compiled.metadata.shared} of {SHARED_LIMIT[build.arch]} B shared")
    if build.matrix and matrix == 0:
        faults.append(f"no {MATRIX_INSTRUCTION[build.arch]}")
    return row | {"status": "FAILED: " + ", ".join(faults) if faults else "ok"}


def run_static(
    quick: bool, archs: tuple[int, ...] = (80, 90, 100)
) -> tuple[list[dict[str, Any]], bool]:
    """Rows of the static table, and whether every shipped tile and every CUDA kernel passed."""
    work = list(builds(quick, archs))
    # Triton decides at import whether kernels are interpreted; compiling needs fresh processes without
    context = multiprocessing.get_context("spawn")
    before = os.environ.pop("TRITON_INTERPRET", None)
    try:
        with ProcessPoolExecutor(min(os.cpu_count() or 1, 8), mp_context=context) as pool:
            try:
                rows = list(pool.map(compile_one, work, chunksize=4))
            except (
                BaseException
            ):  # the run's end among them: this process would wait for what is built
                pool.shutdown(wait=False, cancel_futures=True)
                for child in multiprocessing.active_children():
                    child.kill()
                raise
    finally:
        if before is not None:
            os.environ["TRITON_INTERPRET"] = before
    rows += cuda_binaries.rows(quick)
    return rows, all(r["status"] == "ok" for r in rows)
