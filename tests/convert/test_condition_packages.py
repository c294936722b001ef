"""``fastfilm.condition`` on networks of other packages: exact at the start, and able to learn from metadata."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastfilm


def dynunet() -> tuple[nn.Module, Tensor]:
    nets = pytest.importorskip("monai.networks.nets")
    net = nets.DynUNet(
        2, 1, 1, [3, 3, 3], [1, 2, 2], [2, 2], filters=[8, 16, 16], norm_name="INSTANCE"
    )
    return net, torch.randn(4, 1, 16, 16)


def residual_encoder_unet() -> tuple[nn.Module, Tensor]:
    unet = pytest.importorskip("dynamic_network_architectures.architectures.unet")
    net = unet.ResidualEncoderUNet(
        1,
        3,
        (4, 8, 8),
        nn.Conv3d,
        3,
        (1, 2, 2),
        (1, 1, 1),
        1,
        (1, 1),
        conv_bias=True,
        norm_op=nn.InstanceNorm3d,
        norm_op_kwargs={"affine": True, "eps": 1e-5},
        nonlin=nn.LeakyReLU,
        nonlin_kwargs={"inplace": True},
    )
    return net, torch.randn(4, 1, 8, 8, 8)


def smp_unet() -> tuple[nn.Module, Tensor]:
    if not hasattr(torch.ops.torchvision, "nms"):
        library = torch.library.Library("torchvision", "FRAGMENT")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        globals()["_library"] = library
    smp = pytest.importorskip("segmentation_models_pytorch")
    net = smp.Unet(
        "resnet18",
        encoder_weights=None,
        encoder_depth=3,
        decoder_channels=(16, 8, 8),
        in_channels=1,
    )
    return net, torch.randn(4, 1, 16, 16)


NETWORKS = [dynunet, residual_encoder_unet, smp_unet]
KINDS = torch.tensor([[1.0, 0.0], [0.0, 1.0]])


@pytest.mark.parametrize("make", NETWORKS)
@pytest.mark.parametrize("training", [False, True])
def test_the_first_output_is_the_networks_own_to_the_last_bit(
    make: Callable[[], tuple[nn.Module, Tensor]], training: bool
) -> None:
    torch.manual_seed(0)
    net, x = make()
    net.train(training)
    state = copy.deepcopy(net.state_dict())
    with torch.no_grad():
        expected = net(x)
    net.load_state_dict(state)
    conditioned = fastfilm.condition(net, metadata_size=2)
    rows = KINDS[torch.tensor([0, 1, 1, 0])]
    with torch.no_grad():
        assert torch.equal(conditioned(x, rows), expected)
    net.load_state_dict(state, strict=False)
    fastfilm.convert(conditioned, verbose=False)
    with torch.no_grad():
        first = conditioned(x, rows)
    torch.testing.assert_close(first, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("make", NETWORKS)
def test_conditioned_networks_learn_what_plain_ones_cannot(
    make: Callable[[], tuple[nn.Module, Tensor]],
) -> None:
    """Kind 0 asks for the bright part of the image, kind 1 for the dark: without the kind it is a coin toss."""

    def final_loss(conditioned: bool) -> float:
        torch.manual_seed(0)
        net, x = make()
        if conditioned:
            fastfilm.condition(net, 2)
        fastfilm.convert(net, verbose=False)
        optimiser = torch.optim.Adam(net.parameters(), 1e-2)
        # every image comes with both kinds, so that a network without metadata has nothing to go by
        images = torch.cat([x[:2], x[:2]])
        kinds = torch.tensor([0, 0, 1, 1])
        bright = (
            F.avg_pool2d(images, 3, 1, 1) if x.dim() == 4 else F.avg_pool3d(images, 3, 1, 1)
        ) > 0
        target = (bright ^ kinds.view(-1, *[1] * (x.dim() - 1)).bool()).float()
        losses = []
        for _ in range(60):
            y = net(images, KINDS[kinds]) if conditioned else net(images)
            loss = F.binary_cross_entropy_with_logits(y[:, :1], target)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(float(loss))
        return min(losses)

    assert final_loss(False) > 0.69
    assert final_loss(True) < 0.45
