"""The long list of networks, and the suite that counts how much of them runs fused."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from benchmarks import cli
from benchmarks.counted.roofline import Ceilings
from benchmarks.measure.harness import QUICK, Budget, HostClock
from benchmarks.measure.record import Record
from benchmarks.measure.session import Session
from benchmarks.subjects.zoo.every import EVERY
from benchmarks.subjects.zoo.small import NETWORKS, Network
from benchmarks.suites import shares
from tests.support.case import SLOW


def test_the_long_list_goes_on_where_the_table_ends_and_names_are_unique() -> None:
    assert EVERY[: len(NETWORKS)] == NETWORKS
    assert len(EVERY) == 140
    assert len({network.id for network in EVERY}) == len(EVERY)


@pytest.mark.parametrize("network", EVERY if SLOW else (), ids=lambda n: n.id)
def test_networks_run_forward_and_backward_in_training(network: Network) -> None:
    torch.manual_seed(0)
    try:
        model = network.build()
    except ImportError as error:
        pytest.skip(f"{network.package} is not installed ({error})")
    outputs = network.outputs(model.train(), torch.randn(network.shape))
    assert outputs and all(bool(y.isfinite().all()) for y in outputs)
    torch.stack([y.square().mean() for y in outputs]).sum().backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert grads and all(bool(g.isfinite().all()) for g in grads)


def test_outputs_are_the_floating_point_tensors_of_a_nested_result() -> None:
    y = torch.ones(1)
    found = {"maps": [y, (y, None)], "index": torch.zeros(1, dtype=torch.long), "loss": 0.0}
    network = Network("torch", "nested", nn.Identity, (1,), lambda model, x: found)
    assert [t is y for t in network.outputs(nn.Identity(), y)] == [True, True]


@dataclass
class Convolution:
    """A line of a report: as much of it as the suite reads."""

    name: str
    flops: int
    fused: bool
    reason: str = ""


class Channel(nn.Module):
    """The first channel, through a function that no block knows."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x[:, :1])


def mostly_fused() -> nn.Module:
    """A convolution with its activation, and one that stands alone, with a tenth of the products."""
    layers = nn.Conv2d(1, 9, 1), nn.ReLU(), Channel(), nn.Conv2d(1, 1, 1)
    return nn.Sequential(*layers)


class Broken(nn.Module):
    """A network that cannot be called."""

    def forward(self, x: Tensor) -> Tensor:
        raise ValueError("no such thing")


def session_of() -> Session:
    return Session(
        "cpu",
        ["float32"],
        quick=True,
        effort=QUICK,
        budget=Budget(None),
        record=Record({}),
        clock=HostClock(),
        ceilings=Ceilings(1.0, {"float32": 1.0}),
        verbose=False,
    )


def test_shares_are_counted_and_a_network_that_fails_counts_as_none(
    capsys: pytest.CaptureFixture[str],
) -> None:
    networks = (
        Network("torch", "fine", mostly_fused, (1, 1, 2, 2)),
        Network("torch", "broken", Broken, (1, 1, 2, 2)),
        Network("no_such_package", "absent", Broken, (1, 1, 2, 2)),
    )
    session = session_of()
    shares.run(session, networks)
    fine, broken, total = session.record.rows
    assert fine.extra["share"] == 0.9 and fine.extra["graphs"] == 1 and fine.extra["first_s"] > 0
    assert fine.extra["flops"] == 2 * 4 * 10
    assert fine.extra["reasons"] == {"nothing to fuse beside it": 0.1}
    assert fine.extra["left"] == [["3", "nothing to fuse beside it", 0.1]]
    assert broken.status == "FAILED" and broken.note == "no such thing" and session.record.failed
    assert total.note == (
        "fused share of the convolution FLOPs of 2 networks: at least 95% in 0, at least 80% in 1"
    )
    printed = capsys.readouterr().out
    assert printed.splitlines()[-1] == total.note and "nothing to fuse beside it 10.0%" in printed


def test_the_command_knows_the_suite() -> None:
    assert cli.parser().parse_args(["--suite", "shares"]).suite == "shares"
