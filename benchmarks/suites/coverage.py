"""Networks of other packages before and after ``fastfilm.convert``: what is fused, how exact, how fast.

Eager PyTorch is measured twice: as packages give their networks, and with channels-last weights and images.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

import fastfilm

from ..measure.harness import paired, paired_ratio
from ..measure.record import FAILED, OK, Row, relative_error
from ..measure.session import Session
from ..subjects.zoo.small import NETWORKS, Network

MODES = ("inference", "training")


def run(session: Session) -> None:
    """Three rows a network and mode; packages that are not installed are skipped."""
    for network in NETWORKS:
        if session.budget.spent():
            return
        try:
            torch.manual_seed(0)
            model = network.build()
        except ImportError as error:
            session.say(f"coverage: {network.id} left out ({error})")
            continue
        measure(session, network, model)


def measure(session: Session, network: Network, model: nn.Module) -> None:
    """Share, error and time of one network."""
    device = session.device
    model = model.to(device)
    converted = fastfilm.convert(model, copy=True, verbose=False)
    layout = torch.channels_last if len(network.shape) == 4 else torch.channels_last_3d
    last = copy.deepcopy(model).to(memory_format=layout)
    forms = {
        "eager": (model, torch.contiguous_format),
        "eager-channels-last": (last, layout),
        "fastfilm": (converted, torch.contiguous_format),
    }
    x = torch.randn(network.shape, generator=torch.Generator().manual_seed(0)).to(device)
    exact = _output(network, copy.deepcopy(model).double(), x.double())
    errors = {
        name: relative_error(_output(network, m, x.contiguous(memory_format=f)), exact)
        for name, (m, f) in forms.items()
    }
    report = fastfilm.conversion_report(converted)
    extra = {
        "package": network.package,
        "shape": list(network.timed),
        "convolutions": len(report.convolutions),
        "fused": len(report.fused),
        "share": report.share(),
        "share_3": report.share(3),
        "left_3": [[c.name, c.reason] for c in report.left if 3 in c.kernel],
    }
    timed = torch.randn(network.timed, device=device)
    told = []
    for mode in MODES:
        calls = {
            name: _call(network, m, timed.contiguous(memory_format=f), mode)
            for name, (m, f) in forms.items()
        }
        times = paired(calls, session.clock, session.effort)
        for name, seconds in times.items():
            wrong = name == "fastfilm" and errors[name] > 1.5 * errors["eager"] + 1e-6
            row = Row("coverage", network.name, name, mode, "float32", device).timed(seconds)
            row.ratio = paired_ratio(times["eager"], seconds)
            row.error, row.eager_error = errors[name], errors["eager"]
            row.status = FAILED if wrong else OK
            row.extra = extra if name == "fastfilm" else {"package": network.package}
            session.record.add(row)
        ratios = [r.ratio for r in session.record.rows[-len(forms) :]]
        told.append(f"{ratios[2]:.2f}× ({ratios[1]:.2f}×)")
    session.say(f"coverage: {network.id} {report.share(3):.0%} {', '.join(told)}")


@torch.no_grad()
def _output(network: Network, model: nn.Module, x: Tensor) -> Tensor:
    """The first output in evaluation."""
    return network.outputs(model.eval(), x)[0]


def _call(network: Network, model: nn.Module, x: Tensor, mode: str) -> Callable[[], object]:
    return partial(_infer if mode == "inference" else _train, network, model, x)


@torch.no_grad()
def _infer(network: Network, model: nn.Module, x: Tensor) -> None:
    model.eval()
    network.outputs(model, x)


def _train(network: Network, model: nn.Module, x: Tensor) -> None:
    model.train()
    model.zero_grad()
    torch.stack([y.float().square().mean() for y in network.outputs(model, x)]).sum().backward()
