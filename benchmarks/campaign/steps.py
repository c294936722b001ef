"""The steps of a campaign, in order of importance, as data."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..counted.verdicts import SM90

ROOT = Path(__file__).resolve().parents[2]
BEFOREHAND = "build/prepared"
PREPARED = ROOT / BEFOREHAND
"""What is compiled beforehand."""

ESSENTIAL_TESTS = (
    "tests/kernels/test_kernels.py::test_padding_is_zero_after_the_affine",
    "tests/kernels/test_kernels.py::test_one_pixel_maps_and_batch_of_one",
    "tests/kernels/test_kernels.py::test_two_runs_give_the_same_bits",
    "tests/kernels/test_kernels.py::test_mean_a_thousand_times_the_deviation",
    "tests/kernels/test_kernels.py::test_gamma_zero_negative_and_different_per_sample",
    "tests/kernels/test_kernels.py::test_every_shipped_tile_computes_the_same",
    "tests/kernels/test_kernels.py::test_awkward_channel_counts",
    "tests/kernels/test_kernels.py::test_evaluation_with_running_statistics",
    "tests/kernels/test_kernels.py::test_every_kernel_size_stride_and_dtype",
    "tests/cuda/test_backend.py",
    "tests/cuda/test_graphs.py",
)
"""GPU tests that run first: what a wrong kernel would break."""

ESSENTIAL = 540.0
"""Seconds that the GPU's steps before ``users-command`` may take together, start and report included."""


@dataclass(frozen=True)
class Step:
    """A process of the campaign, in the checkout's folder.

    Attributes:
        command: its arguments, split at spaces; ``{work}`` stands for the campaign's own folder, ``{minutes}`` for
            a soft limit, ``{python}`` for the interpreter, ``{arch}`` for the target of the CUDA kernels.
        seconds: when it is ended.
        least: it is not started with less time left.
        after: steps without whose success it has no use.
        rows: whether it writes ``{work}/steps/NAME.json`` with "rows".
        setup: makes what the others need, so that a campaign that goes on does it again.
        serves: the steps that need what a set-up makes; empty: all.
        tells: the last line that it prints belongs into the report.
        checks: its result holds for the sources that it saw, so that it is done again where they have changed.
        beside: it times nothing, so that those that follow one another run at the same time.
        environment: variables of its own.
    """

    name: str
    why: str
    command: str
    seconds: float
    least: float = 8.0
    after: tuple[str, ...] = ("package",)
    rows: bool = False
    setup: bool = False
    serves: tuple[str, ...] = ()
    tells: bool = False
    checks: bool = False
    beside: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)

    def arguments(self, values: Mapping[str, str]) -> list[str]:
        """The command line, with the values of what stands in braces."""
        return [filled(part, values) for part in self.command.split()]


def filled(text: str, values: Mapping[str, str]) -> str:
    """``text`` with the values of what stands in braces."""
    for name, value in values.items():
        text = text.replace(f"{{{name}}}", value)
    return text


BUILD = "{python} setup.py -q build --build-lib {work}/site --build-temp {work}/temp"
INTERPRETER = {"TRITON_INTERPRET": "1"}


def _suite(name: str, why: str, seconds: float, more: str, **options: object) -> Step:
    """A suite of the benchmarks, the one of its name unless ``suite`` says another."""
    suite = options.pop("suite", name)
    command = (
        f"{{python}} benchmarks/run.py --suite {suite} --json {{work}}/steps/{name}.json"
        f" --plot {{work}}/steps/{name}.png --journal {{work}}/steps/{name}.journal"
        f" --ceilings {{work}}/steps/ceilings.json {more}"
    )
    if "--minutes" not in more:
        command += " --minutes {minutes}"
    return Step(name, why, command, seconds, rows=True, **options)  # type: ignore[arg-type]


def _tests(nodes: Sequence[str], gpu: bool, seconds: int) -> str:
    command = "{python} -m pytest -v -p no:cacheprovider --continue-on-collection-errors"
    command += " -o addopts=--import-mode=importlib -o pythonpath="
    command += " -m gpu" if gpu else ""  # without a GPU the tests that need one skip
    # plugins are used where they are: a GPU test is mostly compilation, which the host's cores share
    if importlib.util.find_spec("xdist") and gpu:
        command += " -n 12"
    if importlib.util.find_spec("pytest_timeout"):
        command += f" --timeout={seconds} --timeout-method=thread"
    return f"{command} {' '.join(nodes)}"


def _package() -> Step:
    left_out = {"FASTFILM_CPU": "0", "FASTFILM_CUDA": "0"}
    why = "the Python part, into the campaign's own folder"
    return Step("package", why, BUILD, 10, after=(), setup=True, environment=left_out)


def _sanitizer(tool: str) -> Step:
    families = [f"{kind}{f}" for kind in ("", SM90) for f in ("fprop", "dgrad", "wgrad")]
    checks = ",".join(f"cuda:{f}:bfloat16" for f in families)
    command = (
        f"compute-sanitizer --tool {tool} --error-exitcode 9 --target-processes all {{python}}"
    )
    command += f" -m benchmarks.counted.kernel_checks {checks} --few"
    why = f"compute-sanitizer {tool} on the CUDA convolutions, of both kinds"
    return Step(tool, why, command, 80, after=("kernels",), checks=True, beside=True)


def steps(device: str) -> list[Step]:
    """The steps for "cuda", or of the dry form for "cpu"."""
    return _cuda() if device == "cuda" else _cpu()


SMOKE = (
    "{python} -m benchmarks.campaign.smoke --out {work}/steps/smoke.json --logs {work}/logs/smoke"
)
PROBES = "{python} -m benchmarks.campaign.probes --out {work}/steps/probes.json"
TUNE = "{python} -m fastfilm tune --minutes {minutes} --candidates 10 --missing --shapes 5"
ON_GPU = "--device cuda --dtype bfloat16"


def _cuda() -> list[Step]:
    kernels = {"FASTFILM_CPU": "0", "FASTFILM_CUDA": "1", "FASTFILM_CUDA_ARCHS": "{arch}"}
    kernels["FASTFILM_CUDA_OBJECTS"] = f"{BEFOREHAND}/objects"
    default, most = (f"{ON_GPU} --compile {form}" for form in ("default", "max-autotune"))
    alone = f"{ON_GPU} --compile none"
    users = "{python} benchmarks/run.py --json {work}/steps/users-command.json"
    return [
        _package(),
        Step("kernels", "the CUDA kernels for this GPU, from objects compiled beforehand where there are some",
             BUILD, 40, setup=True, environment=kernels),
        Step("binaries", "Triton's kernels, those compiled beforehand where their keys are this machine's",
             f"{{python}} -m benchmarks.campaign.binaries install {BEFOREHAND}/triton {{work}}/triton"
             " --minutes {minutes} --only networks,layers", 30, setup=True, tells=True),
        Step("probes", "what wgmma reads and at what rate", f"{PROBES} --folder {BEFOREHAND}", 20, after=()),
        Step("smoke", "each kernel against float64, in a process of its own", f"{SMOKE} --seconds 40", 85, 15,
             checks=True),
        _suite("ceilings", "copy, L2, launch and matrix products", 15, "--device cuda"),
        _suite("routes", "the layers that decide, by route and direction", 65, ON_GPU, least=20),
        _suite("model", "whole networks, also from CUDA graphs, and compiled", 130, f"{default} --graphs",
               least=25),
        _suite("profile", "hardware counters of the CUDA convolutions", 55, ON_GPU, after=("kernels",)),
        _sanitizer("memcheck"),
        _sanitizer("racecheck"),
        _sanitizer("synccheck"),
        Step("tests", "the essential GPU tests", _tests(ESSENTIAL_TESTS, True, 60), 80, 15, checks=True,
             beside=True),
        Step("check", "every backend and route against float64", "{python} -m fastfilm check --quick", 80,
             checks=True, beside=True),
        Step("users-command", "python benchmarks/run.py, as in the README",
             f"{users} --plot {{work}}/steps/users-command.png", 180, 60, rows=True),
        Step("tune-2d", "tiles and plans of the 2D network's costliest shapes", TUNE, 75, 25),
        Step("tune-3d", "tiles and plans of the 3D network's costliest shapes",
             f"{TUNE} --size 128x128x128 --batch 2 --filters 32", 75, 25),
        _suite("ops", "single blocks", 60, alone),
        _suite("converted", "nnU-Net's and MONAI's networks", 60, alone, least=25),
        _suite("model-compile", "whole networks beside torch.compile", 110, default, suite="model", least=50),
        _suite("model-max-autotune", "beside torch.compile max-autotune", 240, most, suite="model", least=90),
        _suite("converted-compile", "beside nnU-Net's own compiled default", 150, default, suite="converted",
               least=60),
        Step("all-tests", "every GPU test", _tests(("tests",), True, 60), 600, 30, checks=True),
    ]  # fmt: skip


def _cpu() -> list[Step]:
    quick, half = (f"--device cpu --quick --dtype {dtype}" for dtype in ("float32", "float16"))
    library = "{work}/emulated/_CUDA.so"
    emulated = {**INTERPRETER, "FASTFILM_EMULATED_LIBRARY": library}
    smoke = f"{SMOKE} --device cpu --library {library} --types bfloat16 --seconds 60"
    users = (
        "{python} benchmarks/run.py --quick --minutes 0.2 --json {work}/steps/users-command.json"
    )
    nvcc = () if shutil.which("nvcc") else ("no nvcc",)
    # on a machine that does other things too everything takes longer
    return [
        _package(),
        Step("kernels", "the CUDA kernels on the host's emulation",
             "{python} -m benchmarks.counted.emulation {work}/emulated", 200, setup=True,
             serves=("smoke", "routes")),
        Step("probes", "what the probes of wgmma expect", f"{PROBES} --self-test", 90, after=nvcc),
        Step("smoke", "each kernel against float64, in processes that may die", smoke, 180, checks=True,
             environment=INTERPRETER),
        _suite("ceilings", "copy, cache, call and matrix product", 30, quick),
        _suite("routes", "tiny layers, by route and direction", 150, f"{half} --minutes 1.2",
               environment=emulated),
        _suite("model", "tiny networks", 60, f"{quick} --compile none --minutes 0.2"),
        _suite("profile", "why there are no hardware counters", 30, quick),
        Step("tests", "an essential test in Triton's interpreter", _tests(ESSENTIAL_TESTS[:1], False, 60), 60,
             checks=True, environment=INTERPRETER),
        Step("users-command", "python benchmarks/run.py --quick",
             f"{users} --plot {{work}}/steps/users-command.png", 60, 15, rows=True),
    ]  # fmt: skip
