"""Writes docs/baselines.md and its plot from committed results of the suite ``peers``.

Usage: python -m benchmarks.pages.baselines [results/peers-cpu.json [results/peers-cuda.json]]
"""

from __future__ import annotations

import json
import math
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from .markdown import number, table

HERE = Path(__file__).resolve().parents[1]
DOCS = HERE.parent / "docs"
SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "tf32": "tf32"}
CONVOLUTIONS = ("forward", "dgrad", "wgrad")
MARKS = {
    "eager": ("o", "#7a7a7a"),
    "eager-channels-last": ("s", "#1f5fa8"),
    "paper": ("^", "#c0842d"),
    "compile": ("D", "#4c8c6b"),
    "compile-max-autotune": ("v", "#8e5ea2"),
}

RowDict = dict[str, Any]


def usable(rows: list[RowDict]) -> list[RowDict]:
    """Rows with a time that may be shown."""
    return [r for r in rows if r["suite"] == "peers" and r["status"] == "ok" and r["median_s"]]


def having(rows: list[RowDict], **wanted: Any) -> list[RowDict]:
    """Rows with these values."""
    return [r for r in rows if all(r.get(k) == v for k, v in wanted.items())]


def fastest(rows: list[RowDict]) -> dict[tuple[str, str], RowDict]:
    """(Case, mode) -> its fastest row, in the order in which the cases come."""
    found: dict[tuple[str, str], RowDict] = {}
    for r in rows:
        key = r["case"], r["mode"]
        if key not in found or r["median_s"] < found[key]["median_s"]:
            found[key] = r
    return found


def _ms(seconds: float) -> str:
    return number(seconds * 1e3)


def _markdown(head: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    return "\n".join(table(head, body)).rstrip()


def network_table(rows: list[RowDict]) -> str:
    """Whole networks: every provider's time, and the best against the floor."""
    rows = [r for r in rows if r.get("kind") == "network"]
    names = list(dict.fromkeys(r["provider"] for r in rows))
    groups: dict[tuple[str, str, str], dict[str, RowDict]] = defaultdict(dict)
    for r in rows:
        groups[r["case"], r["mode"], r["dtype"]][r["provider"]] = r
    body = []
    for (case, mode, dtype), found in groups.items():
        best = min(found.values(), key=lambda r: r["median_s"])
        times = [_ms(found[n]["median_s"]) if n in found else "" for n in names]
        rate = f"{best['tflops']:.3g}"
        of_floor = f"{100 * best['fraction_of_floor']:.0f} %"
        body.append([case, mode, SHORT[dtype], *times, rate, of_floor])
    head = ["network, patch, batch", "mode", "dtype", *(f"{n}, ms" for n in names)]
    return _markdown([*head, "best, TFLOP/s", "best, of the floor"], body)


def layer_table(rows: list[RowDict], dtype: str, limit: int = 40) -> str:
    """Layers in the order of the file: the best peer's convolutions, and what a block adds."""
    layers: dict[str, dict[str, RowDict]] = defaultdict(dict)
    kinds = [r for r in having(rows, dtype=dtype) if r.get("kind") in ("convolution", "block")]
    for r in fastest(kinds).values():
        layers[_layer_key(r)][f"{r['kind']} {r['mode']}"] = r
    body = []
    for name, found in list(layers.items())[:limit]:
        some = next(iter(found.values()))
        cells = [name, str(sum(some["networks"].values()))]
        for mode in CONVOLUTIONS:
            r: RowDict | None = found.get(f"convolution {mode}")
            text = f"{_ms(r['median_s'])} ({100 * r['fraction_of_floor']:.0f} %)" if r else ""
            cells.append(text + (" cl" if r and r["provider"] == "eager-channels-last" else ""))
        for mode, parts in (("forward", ("forward",)), ("backward", ("dgrad", "wgrad"))):
            block = found.get(f"block {mode}")
            alone = [found[f"convolution {p}"] for p in parts if f"convolution {p}" in found]
            total = sum(a["median_s"] for a in alone)
            cells.append(f"{block['median_s'] / total:.2f}×" if block and total else "")
        body.append(cells)
    head = ["layer", "uses", "forward, ms", "dgrad, ms", "wgrad, ms"]
    return _markdown([*head, "block / conv, forward", "block / conv, backward"], body)


def _layer_key(r: RowDict) -> str:
    return r["case"].removesuffix(" batch").removesuffix(" instance")


def gains(rows: list[RowDict]) -> list[list[str]]:
    """Best end-to-end gain: a network's best time over that of its convolutions at their best."""
    body = []
    networks = {(r["case"], r["dtype"]) for r in rows if r.get("kind") == "network"}
    for case, dtype in sorted(networks):
        for mode, kinds in (("training", CONVOLUTIONS), ("inference", ("forward",))):
            whole = fastest(having(rows, kind="network", dtype=dtype)).get((case, mode))
            spent, known, total = _convolution_time(rows, case, dtype, kinds)
            if whole is None or not spent:
                continue
            part = f"{known} of {total}"
            if known < total:
                body.append([case, mode, SHORT[dtype], _ms(whole["median_s"]), "", part, ""])
                continue
            gain = f"{whole['median_s'] / spent:.2f}×"
            cells = [case, mode, SHORT[dtype], _ms(whole["median_s"]), _ms(spent), part, gain]
            body.append(cells)
    return body


def _convolution_time(
    rows: list[RowDict], case: str, dtype: str, kinds: tuple[str, ...]
) -> tuple[float, int, int]:
    """Seconds of a network's convolutions, each by its best peer; how many were measured."""
    convolutions = [r for r in having(rows, kind="convolution") if case in r["networks"]]
    layers = {r["case"]: r["networks"][case] for r in convolutions}
    best = fastest(having(convolutions, dtype=dtype))
    whole = having(rows, kind="network", case=case)
    total = whole[0].get("layers", len(layers)) if whole else len(layers)
    complete = [n for n in layers if (n, "forward") in best and (n, kinds[-1]) in best]
    spent = sum(
        layers[n] * best[n, k]["median_s"] for n in complete for k in kinds if (n, k) in best
    )
    return spent, len(complete), total


def reading(rows: list[RowDict], dtype: str) -> str:
    """What the figures say, in sentences."""
    by_case = fastest(having(rows, kind="convolution", dtype=dtype))
    cost: dict[str, float] = defaultdict(float)
    excess: dict[str, float] = defaultdict(float)
    for (case, _), r in by_case.items():
        uses = sum(r["networks"].values())
        cost[case] += uses * r["median_s"]
        excess[case] += uses * max(r["median_s"] - r["floor_s"], 0.0)
    total = sum(cost.values())
    if not total:
        return ""
    heavy = sorted(cost, key=lambda c: -cost[c])[:5]
    worth = sorted(excess, key=lambda c: -excess[c])[:5]
    found = fastest(having(rows, kind="block", dtype=dtype, mode="forward")).values()
    pairs = [(r, by_case.get((_layer_key(r), "forward"))) for r in found]
    blocks = sorted(r["median_s"] / alone["median_s"] for r, alone in pairs if alone)
    layouts = [r["provider"] for r in by_case.values()]
    last = 100 * layouts.count("eager-channels-last") / len(layouts)
    text = [
        f"- **Where the time goes ({SHORT[dtype]}).** Of the convolutions' time, counted as often"
        " as the five networks use them,"
        f" {100 * sum(cost[c] for c in heavy) / total:.0f} % is in five"
        " layers: " + "; ".join(f"{c} ({100 * cost[c] / total:.0f} %)" for c in heavy) + ".",
        "- **Which layers are worth a kernel.** The most time above the floor, at the best peer, is"
        " in " + "; ".join(f"{c} ({100 * excess[c] / total:.0f} % of all)" for c in worth) + ".",
        f"- **Layout.** Channels-last is the faster layout in {last:.0f} % of the convolutions.",
    ]
    if blocks:
        low, middle, high = blocks[0], blocks[len(blocks) // 2], blocks[-1]
        text.append(
            "- **What the rest of a block costs.** Norm, activation and FiLM make a block's forward"
            f" pass {middle:.2f} times as long as its convolution (median; {low:.2f}–{high:.2f})."
        )
    return "\n".join(text)


def plot(rows: list[RowDict], machine: RowDict, path: Path) -> None:
    """Fraction of the floor over channels and over resolution, a line a provider."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    dtypes = [d for d in SHORT if having(rows, kind="block", dtype=d)]
    figure, axes = plt.subplots(
        len(dtypes), 2, figsize=(10, 3.3 * len(dtypes) + 0.7), squeeze=False, layout="constrained"
    )
    for line, dtype in zip(axes, dtypes, strict=True):
        chosen = having(rows, kind="block", dtype=dtype, mode="forward")
        _lines(line[0], chosen, lambda r: r["cout"], "output channels")
        _lines(line[1], chosen, lambda r: math.prod(r["size"]), "input pixels or voxels a sample")
        line[0].set_ylabel(f"{SHORT[dtype]}: fraction of the floor")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)
    figure.supxlabel(
        "Blocks (convolution, norm, activation, FiLM), forward. Line: median over the layers;"
        f" points: single layers.\n{machine['device_name']}, {machine['threads']} threads,"
        f" torch {machine['torch']}; 1 is the roofline floor of this run's ceilings.",
        fontsize=8,
        color="#444444",
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _lines(axis: Any, rows: list[RowDict], x: Any, label: str) -> None:
    for provider, (mark, colour) in MARKS.items():
        points: dict[int, list[float]] = defaultdict(list)
        for r in rows:
            if r["provider"] == provider:
                points[x(r)].append(r["fraction_of_floor"])
        if not points:
            continue
        xs = sorted(points)
        flat = [(k, v) for k in xs for v in points[k]]
        axis.plot(*zip(*flat, strict=True), mark, color=colour, alpha=0.25, markersize=3.5)
        middle = [sorted(points[k])[len(points[k]) // 2] for k in xs]
        axis.plot(xs, middle, f"-{mark}", color=colour, label=provider, markersize=5, linewidth=1.4)
    axis.set_xscale("log", base=2)
    axis.set_ylim(bottom=0)
    axis.axhline(1, color="black", linewidth=0.8, linestyle=":")
    axis.set_xlabel(label)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)


def versions(machine: RowDict) -> str:
    """The machine of a table in one paragraph."""
    rates = ", ".join(f"{SHORT[k]} {v:.3g}" for k, v in machine["matrix_tflops"].items())
    return (
        f"{machine['device_name']}, {machine['threads']} threads of {machine['cores']} cores, load"
        f" {machine['load']} at the start and {machine.get('load_end')} at the end;"
        f" torch {machine['torch']}, triton {machine['triton']}, python {machine['python']},"
        f" driver {machine['driver']}; commit {machine['commit']}. Ceilings of the run:"
        f" copy {machine['copy_gbps']:.3g} GB/s, matrix product {rates} TFLOP/s."
        f" Command: `{machine['command']}`."
    )


HEAD = """# Baselines: what the peers reach, layer by layer

How close PyTorch's own convolutions come to the limit on the layers of segmentation U-Nets, and
what a block's norm, activation and FiLM cost on top. This decides where a convolution of our own
must win and where the vendor's stays. None of fastfilm's kernels takes part.

This page is written by `python -m benchmarks.pages.baselines` from the files under
`benchmarks/results/`; [benchmarks.md](benchmarks.md) defines every column. Times are medians of
interleaved rounds; the floor is the larger of traffic over copy bandwidth and arithmetic over the
matrix rate, both measured in the same run.
"""

NO_CUDA = """## CUDA

There is no CUDA table yet: this suite has not run on a GPU. It makes one,

    python benchmarks/run.py --suite peers --device cuda --minutes 25 \\
        --json benchmarks/results/peers-cuda.json
    python -m benchmarks.pages.baselines

with tf32, AMP in bfloat16 and float16, and torch.compile (default and max-autotune) as further
providers, at the full patch and batch sizes. Nothing on this page says anything about a GPU: a
CPU's ratio of arithmetic to bandwidth is another one, and so are the layers it argues for.
"""


BUSY_NOTE = """**This machine was busy with other work, and not evenly so.**
The providers of one case share their rounds, so ratios between them hold; absolute times, fractions
of the floor and all that compares one case with another are rough. A gain below 1 in the table
below says no more than that. Repeat the run on a quiet machine before deciding anything by it."""

GAIN_NOTE = """The network's best measured time over the summed times of its convolutions, each at
its best peer, with everything else free. A network and its layers are not timed in the same rounds:
a change of the machine's load between them is in these figures. No gain is stated where a layer was
not measured."""

LAYER_NOTE = """The best peer's time and its fraction of the floor; cl: channels-last was the faster
layout. Uses: how often the five networks hold the layer. The last two columns are the whole block's
time over that of its bare convolutions."""


WRONG_NOTE = """These rows have no speed-up, and their time is in no figure above. On a CPU,
PyTorch 2.13's `instance_norm` reads a channels-last gradient as if it were contiguous when the
batch is 1: every gradient of the block is then wrong, in float64 too. With a batch of 2, or with a
contiguous gradient, it is right."""


def section(data: dict[str, Any], title: str, image: str) -> str:
    """Everything about one results file."""
    rows, machine = usable(data["rows"]), data["machine"]
    name = f"baselines-{image}.png"
    plot(rows, machine, DOCS / "img" / name)
    dtypes = [d for d in SHORT if any(r["dtype"] == d for r in rows)]
    parts = [f"## {title}", versions(machine)]
    if max(machine.get("load") or 0, machine.get("load_end") or 0) > machine["cores"]:
        parts.append(BUSY_NOTE)
    parts.append("### Reading")
    parts += [text for d in dtypes if (text := reading(rows, d))]
    parts += [
        "### The best possible end-to-end gain",
        GAIN_NOTE,
        _markdown(
            ["network", "mode", "dtype", "network, ms", "convolutions, ms", "layers", "gain"],
            gains(rows),
        ),
        f"![fraction of the floor over channels and resolution](img/{name})",
        "### Whole networks",
        network_table(rows),
    ]
    for d in dtypes:
        if layers := layer_table(rows, d):
            parts += [f"### Layers, {SHORT[d]}", LAYER_NOTE, layers]
    failed = [r for r in data["rows"] if r["status"] == "FAILED"]
    if failed:
        cells = [[r["provider"], r["case"], r["mode"], SHORT[r["dtype"]]] for r in failed]
        for cell, r in zip(cells, failed, strict=True):
            cell += [f"{r['error']:.1e}", f"{r['eager_error']:.1e}"]
        head = ["provider", "case", "mode", "dtype", "error", "eager's error"]
        parts += ["### Wrong results of peers", WRONG_NOTE, _markdown(head, cells)]
    return "\n\n".join(parts)


def main(paths: list[str]) -> int:
    """Writes the page; returns the exit status."""
    files = [Path(p) for p in paths] or [
        HERE / "results" / "peers-cpu.json",
        HERE / "results" / "peers-cuda.json",
    ]
    titles = (("CPU, small patches", "cpu"), ("CUDA", "cuda"))
    parts = [HEAD]
    for path, (title, image) in zip(files, titles, strict=False):
        if path.is_file():
            parts.append(section(json.loads(path.read_text()), title, image))
        elif image == "cpu":
            print(f"benchmarks.pages.baselines: no such file: {path}", file=sys.stderr)
            return 2
    if len(parts) < 3:
        parts.append(NO_CUDA)
    (DOCS / "baselines.md").write_text("\n".join(p.strip() + "\n" for p in parts))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
