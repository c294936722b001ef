"""Writes the table of docs/convert.md from the committed result of the suite ``coverage``.

Usage: python -m benchmarks.pages.coverage [results/coverage-cpu.json]
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from .markdown import between
from .markdown import table as markdown

HERE = Path(__file__).resolve().parents[1]
PAGE = HERE.parent / "docs" / "convert.md"

PACKAGES = {
    "monai": "MONAI",
    "dynamic_network_architectures": "nnU-Net",
    "segmentation_models_pytorch": "smp",
    "torchvision": "torchvision",
    "pytorch3dunet": "pytorch-3dunet",
}


def table(rows: list[dict[str, Any]]) -> str:
    """One line a network."""
    found = {(r["package"], r["case"], r["mode"], r["provider"]): r for r in rows}
    cells: list[tuple[str, ...]] = []

    def speed(package: str, case: str, mode: str) -> str:
        ours, last = (
            found[package, case, mode, provider]["ratio"]
            for provider in ("fastfilm", "eager-channels-last")
        )
        return f"{ours:.2f}× ({last:.2f}×)"

    for (package, case, mode, provider), row in found.items():
        if (mode, provider) != ("inference", "fastfilm"):
            continue
        shape = "×".join(map(str, row["shape"]))
        cells.append(
            (
                f"{PACKAGES[package]} {case}",
                shape,
                f"{row['fused']} of {row['convolutions']}",
                f"{row['share_3']:.0%}",
                f"{row['error']:.1e}, {row['eager_error']:.1e}",
                speed(package, case, "inference"),
                speed(package, case, "training"),
            )
        )
    head = (
        "network",
        "input",
        "fused, of all",
        "of 3×3",
        "error, eager's",
        "inference",
        "training",
    )
    return "\n".join(markdown(head, cells)).rstrip()


def left(rows: list[dict[str, Any]]) -> str:
    """What of the 3×3 convolutions is left, network by network."""
    lines = []
    for row in rows:
        if row["provider"] != "fastfilm" or row["mode"] != "inference" or not row.get("left_3"):
            continue
        parts = []
        for reason, count in Counter(reason for _, reason in row["left_3"]).most_common():
            names = [f"`{name}`" for name, why in row["left_3"] if why == reason]
            more = f" and {count - 3} more" if count > 3 else ""
            parts.append(f"{', '.join(names[:3])}{more} ({reason})")
        lines.append(f"- {PACKAGES[row['package']]} {row['case']}: {'; '.join(parts)}.")
    return "\n".join(lines)


def text(result: dict[str, Any]) -> str:
    """What stands between the marks."""
    machine, rows = result["machine"], result["rows"]
    about = (
        f"{machine.get('cpu') or machine.get('device')}, torch {machine['torch']}, load"
        f" {machine.get('load_start', machine.get('load'))} to {machine.get('load_end')},"
        f" commit {machine.get('commit')}"
    )
    return (
        f"Measured on {about}. Speed is contiguous eager's time over ours, the median over interleaved rounds; in"
        f" brackets, over that of eager with channels-last weights and images. The error is that of the output"
        f" against float64, relative to its norm.\n\n{table(rows)}\n\n"
        f"3×3 convolutions that are left:\n\n{left(rows)}\n"
    )


def main(argv: list[str]) -> None:
    """Writes the page."""
    path = Path(argv[0]) if argv else HERE / "results" / "coverage-cpu.json"
    page, result = (p.read_text(encoding="utf-8") for p in (PAGE, path))
    PAGE.write_text(between(page, "coverage", text(json.loads(result))), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
