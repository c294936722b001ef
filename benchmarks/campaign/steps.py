"""The steps of a campaign, in order of importance, as data."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

ESSENTIAL_TESTS = (
    "tests/test_kernels.py::test_padding_is_zero_after_the_affine",
    "tests/test_kernels.py::test_one_pixel_maps_and_batch_of_one",
    "tests/test_kernels.py::test_two_runs_give_the_same_bits",
    "tests/test_kernels.py::test_mean_a_thousand_times_the_deviation",
    "tests/test_kernels.py::test_gamma_zero_negative_and_different_per_sample",
    "tests/test_kernels.py::test_every_shipped_tile_computes_the_same",
    "tests/test_kernels.py::test_awkward_channel_counts",
    "tests/test_kernels.py::test_evaluation_with_running_statistics",
    "tests/test_kernels.py::test_every_kernel_size_stride_and_dtype",
    "tests/test_cuda_backend.py",
    "tests/test_cuda_graphs.py",
)
"""GPU tests that run first: what a wrong kernel would break."""


@dataclass(frozen=True)
class Step:
    """A process of the campaign.

    Attributes:
        command: its arguments; ``{out}`` stands for the campaign's folder, ``{minutes}`` for its own soft limit.
        seconds: when it is ended.
        least: it is not started with less time left.
        after: steps without whose success it has no use.
        rows: whether it writes ``{out}/steps/NAME.json``.
        environment: variables of its own.
    """

    name: str
    why: str
    command: tuple[str, ...]
    seconds: float
    least: float = 10.0
    after: tuple[str, ...] = ()
    rows: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)

    def arguments(self, out: Path, seconds: float) -> list[str]:
        """The command line for a folder and the time that there is."""
        # a process of its own needs some seconds to start and to write what it has
        minutes = max(0.05, (0.85 * seconds - 5) / 60)
        values = {"{out}": str(out), "{minutes}": f"{minutes:.2f}"}
        parts = list(self.command)
        for name, value in values.items():
            parts = [part.replace(name, value) for part in parts]
        return parts


def _python(*command: str) -> tuple[str, ...]:
    return (sys.executable, *command)


def _suite(
    name: str,
    suite: str,
    device: str,
    why: str,
    seconds: float,
    *more: str,
    minutes: str = "{minutes}",
    **options: object,
) -> Step:
    command = _python(
        str(ROOT / "benchmarks" / "run.py"), "--suite", suite, "--device", device,
        "--json", f"{{out}}/steps/{name}.json", "--plot", f"{{out}}/steps/{name}.png",
        "--minutes", minutes, "--ceilings", "{out}/steps/ceilings.json", *more,
    )  # fmt: skip
    return Step(name, why, command, seconds, rows=True, **options)  # type: ignore[arg-type]


def _tests(nodes: Sequence[str], marked: str = "gpu") -> tuple[str, ...]:
    # without the plugins that pyproject.toml asks for: they need not be installed where a GPU is
    # a GPU test is mostly compilation, which the host's cores share
    several = ("-n", "8") if importlib.util.find_spec("xdist") and marked == "gpu" else ()
    return _python(
        "-m", "pytest", *several, "-v", "-o", "addopts=--import-mode=importlib", "-p", "no:cacheprovider",
        "--continue-on-collection-errors", "-m", marked, *nodes,
    )  # fmt: skip


def steps(device: str) -> list[Step]:
    """The steps for "cuda", or of the dry form for "cpu"."""
    return _cuda() if device == "cuda" else _cpu()


BUILD = {"FASTFILM_CUDA": "auto", "FASTFILM_CPU": "0"}
"""The CUDA kernels are built where there is an nvcc; those for a CPU would take a minute and measure nothing."""

BF16 = ("--dtype", "bfloat16")


def _cuda() -> list[Step]:
    tune = _python(
        "-m", "fastfilm", "tune", "--minutes", "{minutes}", "--candidates", "10", "--missing"
    )
    volume = ("--size", "128x128x128", "--batch", "2", "--filters", "32")
    built = ("build",)
    return [
        Step(
            "build",
            "the C++ extension and, with nvcc, the CUDA kernels",
            _python("-m", "pip", "install", "-e", ".", "--no-build-isolation", "--no-deps"),
            150,
            environment=BUILD,
        ),
        Step("info", "versions, devices, backends", _python("-m", "fastfilm", "info"), 40),
        Step(
            "check",
            "every backend and route against float64",
            _python("-m", "fastfilm", "check", "--quick"),
            90,
            after=built,
        ),
        _suite("ceilings", "ceilings", "cuda", "copy, L2, launch and matrix products", 40),
        Step("tests", "the essential GPU tests", _tests(ESSENTIAL_TESTS), 75, after=built),
        Step("tune-2d", "tiles and plans of the 2D network", tune, 75, 25, built),
        Step("tune-3d", "tiles and plans of the 3D network", (*tune, *volume), 75, 25, built),
        _suite(
            "model", "model", "cuda", "whole networks", 130,
            *BF16, "--compile", "none", least=30, after=built,
        ),
        _suite(
            "layers", "explain", "cuda", "floor, estimate and time of each layer", 50, *BF16,
            least=15, after=built,
        ),
        _suite("ops", "ops", "cuda", "single blocks", 50, *BF16, "--compile", "none", after=built),
        _suite(
            "model-compile", "model", "cuda", "whole networks beside torch.compile", 110, *BF16,
            "--compile", "default", least=50, after=built,
        ),
        _suite(
            "converted", "converted", "cuda", "nnU-Net's and MONAI's networks", 60, *BF16,
            "--compile", "none", least=25, after=built,
        ),
        _suite(
            "profile", "profile", "cuda", "the three slowest layers", 75, *BF16,
            "--explained", "{out}/steps/layers.json", least=25, after=built,
        ),
        _suite(
            "model-max-autotune", "model", "cuda", "beside torch.compile max-autotune", 240, *BF16,
            "--compile", "max-autotune", least=90, after=built,
        ),
        _suite("scaling", "scaling", "cuda", "size and batch", 60, *BF16, least=20, after=built),
        _suite(
            "converted-compile", "converted", "cuda", "beside nnU-Net's own compiled default", 150,
            *BF16, "--compile", "default", least=60, after=built,
        ),
        _suite("memory", "memory", "cuda", "bytes kept, maps moved", 40, least=15, after=built),
        Step("all-tests", "every GPU test", _tests(("tests",)), 600, 30, built),
        _suite("static", "static", "cuda", "spills and matrix instructions", 60, "--quick"),
        _suite(
            "model-float32", "model", "cuda", "whole networks in float32", 60, "--dtype", "float32",
            "--compile", "none", least=30, after=built,
        ),
    ]  # fmt: skip


def _cpu() -> list[Step]:
    quick = ("--quick", "--dtype", "float32")
    interpreter = {"TRITON_INTERPRET": "1"}
    return [
        Step("info", "versions, devices, backends", _python("-m", "fastfilm", "info"), 60),
        Step(
            "tests",
            "an essential test in Triton's interpreter",
            _tests(ESSENTIAL_TESTS[:1], marked="not gpu"),
            60,
        ),
        _suite("ceilings", "ceilings", "cpu", "copy, cache, call and matrix product", 60, *quick),
        Step(
            "tune",
            "candidates compiled, pruned and checked in Triton's interpreter",
            _python(
                "-m", "fastfilm", "tune", "--dry", "--minutes", "{minutes}", "--shapes", "1",
                "--candidates", "1", "--size", "8x8", "--batch", "1", "--filters", "8", "--depth", "1",
                "--dtype", "float32",
            ),
            90,
            environment=interpreter,
        ),
        _suite("model", "model", "cpu", "tiny networks, and their layers", 60, "--explain", *quick),
        _suite("ops", "ops", "cpu", "single blocks", 60, *quick, minutes="0.08"),
        _suite("converted", "converted", "cpu", "tiny networks", 60, *quick, minutes="0.08"),
        _suite(
            "profile", "profile", "cpu", "the three slowest layers", 40, *quick,
            "--explained", "{out}/steps/model.json",
        ),
        _suite("scaling", "scaling", "cpu", "size and batch", 60, *quick, minutes="0.2"),
        _suite("static", "static", "cpu", "spills and matrix instructions", 90, "--quick"),
        _suite(
            "gate", "gate", "cpu", "counts that may not grow", 60,
            "--static", "{out}/steps/static.json", environment=interpreter,
        ),
    ]  # fmt: skip
