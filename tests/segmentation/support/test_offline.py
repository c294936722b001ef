"""Nothing is ever fetched, whatever a configuration or a model.json says."""

from __future__ import annotations

import json
import socket
import sys
import types
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("monai", reason="needs the extra [segmentation]")
pytest.importorskip("pydantic", reason="needs the extra [segmentation]")
pytest.importorskip("safetensors", reason="needs the extra [segmentation]")

from fastfilm.segmentation.config.schema import parse
from fastfilm.segmentation.config.sections import NetworkConfig
from fastfilm.segmentation.data.plan import make_plan, read_plan
from fastfilm.segmentation.images.preprocessing import Normalisation, Preprocessing
from fastfilm.segmentation.models.folder import (
    LabelInfo,
    ModelInfo,
    load_model,
    save_weights,
)
from fastfilm.segmentation.models.network import build_network
from fastfilm.segmentation.support.distributed import Processes
from fastfilm.segmentation.support.errors import UserError
from fastfilm.segmentation.support.offline import (
    offline,
    refuse_fetching,
    switched_off,
)
from fastfilm.segmentation.training.fold import Start, train

from ...support.models import make_model
from ...support.phantoms import settings, write_bids

MODULE = "monai.networks.nets.of_a_test"


class Fetcher(nn.Module):
    """Fetches as libraries do, by default, if told to, or always."""

    def __init__(
        self,
        channels: int = 1,
        out: int = 1,
        pretrained: bool = True,
        encoder_weights: str | None = "imagenet",
        pretrained_url: str | None = None,
        class_weights: Any = (1.0, 2.0),
        how: str = "",
        options: Any = None,
    ) -> None:
        super().__init__()
        self.given = (pretrained, encoder_weights, pretrained_url, class_weights, options)
        if pretrained or encoder_weights or pretrained_url or how == "urllib":
            urllib.request.urlopen("http://weights.invalid/net.pth")
        if how == "wrapped":
            try:
                urllib.request.urlopen("http://weights.invalid/net.pth")
            except Exception as error:
                raise OSError("cannot load the weights") from error
        if how == "address":
            socket.create_connection(("192.0.2.1", 443), timeout=1)
        if how == "name":
            socket.getaddrinfo("weights.invalid", 443)
        if how == "local":
            a, b = socket.socketpair()
            a.close(), b.close()
        self.conv = nn.Conv2d(channels, out, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x)


@pytest.fixture(autouse=True)
def fake(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType(MODULE)
    module.Fetcher = Fetcher  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, MODULE, module)


def build(target: str = f"{MODULE}.Fetcher", **arguments: Any) -> nn.Module:
    config = NetworkConfig(name="condition", target=target, arguments=arguments)
    return build_network(config, spatial_dims=2, in_channels=1, out_channels=1, metadata_size=0)


def test_what_fetches_is_off_when_a_network_is_built_given_or_by_default() -> None:
    nested = {"inner": [{"pretrained": True, "weights": "imagenet", "depth": 3}]}
    off = {"inner": [{"pretrained": False, "weights": None, "depth": 3}]}
    for arguments in (
        {},
        {"pretrained": True, "encoder_weights": "x", "pretrained_url": "http://weights.invalid"},
        {"pretrained": 1},
        {"pretrained": None},
    ):
        network = build(**arguments, options=nested, class_weights=[1, 2])
        assert network.given == (False, None, None, [1, 2], off)
    assert build().given[3] == (1.0, 2.0)


@pytest.mark.parametrize("how", ["urllib", "wrapped", "address", "name"])
def test_a_network_that_fetches_all_the_same_is_refused_with_the_host(how: str) -> None:
    host = "192.0.2.1" if how == "address" else "weights.invalid"
    with pytest.raises(UserError, match="nothing is ever fetched") as error:
        build(how=how)
    assert host in str(error.value) and f"{MODULE}.Fetcher" in str(error.value)


def test_the_guard_is_on_in_its_block_only_and_lets_processes_of_this_machine_talk() -> None:
    build(how="local")
    with pytest.raises(UserError), offline("it"):
        socket.getaddrinfo("weights.invalid", 1)
    with pytest.raises(ZeroDivisionError), offline("it"):
        raise ZeroDivisionError
    with socket.create_server(("127.0.0.1", 0)) as server:
        socket.create_connection(server.getsockname()).close()


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("EfficientNetBN", {"model_name": "efficientnet-b0"}),
        ("HoVerNet", {"pretrained_url": "http://weights.invalid/x.pth"}),
        ("DenseNet121", {"spatial_dims": 2, "in_channels": 1, "out_channels": 1, "pretrained": 1}),
    ],
)
def test_networks_of_monai_are_built_without_weights(name: str, arguments: dict[str, Any]) -> None:
    import importlib

    cls = getattr(importlib.import_module("monai.networks.nets"), name)
    found = switched_off(cls, arguments)
    assert not any(v for k, v in found.items() if "pretrained" in k)
    assert sum("pretrained" in k for k in found)
    assert isinstance(build(f"monai.networks.nets.{name}", **arguments), nn.Module)


def test_arguments_that_another_library_does_not_take_are_a_clear_error() -> None:
    with pytest.raises(UserError, match="BasicUNet cannot be built with these arguments"):
        build("monai.networks.nets.BasicUNet", depth=3)


def test_a_new_configuration_that_would_fetch_is_refused_and_a_model_is_loaded_without(
    tmp_path: Path,
) -> None:
    for arguments in (
        {"pretrained": True},
        {"encoder_weights": "imagenet"},
        {"weights": "DEFAULT"},
        {"options": {"model": [{"pretrained_url": "http://weights.invalid"}]}},
    ):
        with pytest.raises(UserError, match=r"network\.arguments\.\w+.*: nothing is ever fetched"):
            refuse_fetching(arguments)
    refuse_fetching({"pretrained": False, "encoder_weights": None, "class_weights": [1.0]})
    network = {
        "name": "condition",
        "target": f"{MODULE}.Fetcher",
        "arguments": {"channels": "{in}", "out": "{out}"},
        "depth": None,
    }
    root = write_bids(tmp_path / "bids", count=4)
    patch = {"patch_size": [32, 64]}
    config = parse(settings(root, network=network, metadata=[], preprocessing=patch), "test")
    make_plan(config, tmp_path / "plan")
    plan = read_plan(tmp_path / "plan")
    plan.plan.network.arguments = {"pretrained": True}
    with pytest.raises(UserError, match="nothing is ever fetched"):
        train(Start(plan, 0, tmp_path / "model"), Processes(0, 1, torch.device("cpu")))
    info = ModelInfo(
        network=NetworkConfig(
            name="condition", target=f"{MODULE}.Fetcher", arguments={"pretrained": True}
        ),
        spatial_dims=2,
        in_channels=1,
        contrasts=["FLAIR"],
        labels=[LabelInfo(name="lesion", values=[1], value=1)],
        output="channels",
        metadata={"keys": []},
        preprocessing=Preprocessing(channels=[Normalisation()]),
        patch_size=[8, 8],
    )
    make_model(tmp_path / "old")
    (tmp_path / "old" / "model.json").write_text(json.dumps(info.model_dump(mode="json")))
    save_weights(tmp_path / "old", "best", info.build(), info)
    assert load_model(tmp_path / "old").network.given[0] is False
