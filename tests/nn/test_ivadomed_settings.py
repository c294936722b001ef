"""Hyper-parameters that a state_dict does not hold come along with a network, or as arguments."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.subjects.eager_networks import EagerFiLMedUNet
from fastfilm.nn import ConvNormFiLM, FiLMedUNet, Modified3DUNet


def source(dims: int = 2, **norm: Any) -> nn.Module:
    """A network with ivadomed's names; ``norm``: attributes of every norm."""
    torch.manual_seed(0)
    model = EagerFiLMedUNet(depth=1, filters=4, dims=dims)
    for m in model.modules():
        if isinstance(m, (nn.BatchNorm2d, nn.InstanceNorm3d)):
            for name, value in norm.items():
                setattr(m, name, value)
    return model


def blocks(model: nn.Module) -> list[ConvNormFiLM]:
    found = [m for m in model.modules() if isinstance(m, ConvNormFiLM)]
    return [m for m in found if m.norm_layer is not None]


def trained(model: nn.Module, steps: int = 3) -> dict[str, Tensor]:
    """Running means by their sums, and the output in evaluation, after some batches."""
    rows = torch.eye(3)[:2]
    for seed in range(steps):
        x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(seed)) + 1
        model.train()(x, rows)
    means = [b.sum() for n, b in model.named_buffers() if n.endswith("running_mean")]
    with torch.no_grad():
        return {"means": torch.stack(means).sort().values, "out": model.eval()(x, rows)}


@pytest.mark.parametrize("momentum", [0.01, 0.5, None])
def test_training_goes_on_with_the_networks_own_momentum_and_eps(momentum: float | None) -> None:
    for given in (False, True):
        theirs: Any = source(momentum=momentum, eps=1e-2)
        options = {"momentum": momentum, "eps": 1e-2} if given else {}
        from_what = theirs.state_dict() if given else theirs
        ours = FiLMedUNet.from_ivadomed(from_what, **options)
        assert {(b.momentum, b.eps) for b in blocks(ours)} == {(momentum, 1e-2)}
        found, expected = trained(ours), trained(theirs)
        torch.testing.assert_close(found["means"], expected["means"], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found["out"], expected["out"], rtol=1e-3, atol=1e-4)


def test_a_state_dict_alone_gets_ivadomeds_defaults() -> None:
    net = FiLMedUNet.from_ivadomed(source(momentum=0.01).state_dict())
    assert {(b.momentum, b.eps, b.dropout) for b in blocks(net)} == {(0.1, 1e-5, 0.0)}
    assert net.final_activation == "sigmoid"


def test_dropout_and_the_final_activation_come_along() -> None:
    model: Any = source()
    model.drop = nn.Dropout2d(0.3)
    model.decoder.final_activation = "softmax"
    net = FiLMedUNet.from_ivadomed(model)
    assert {b.dropout for b in blocks(net)} == {0.3} and net.final_activation == "softmax"
    net = FiLMedUNet.from_ivadomed(model, dropout=0.1, final_activation=None)
    assert {b.dropout for b in blocks(net)} == {0.1} and net.final_activation == "none"


def test_eps_of_instance_norms_is_kept() -> None:
    assert {b.eps for b in blocks(FiLMedUNet.from_ivadomed(source(3, eps=1e-2)))} == {1e-2}


def _one(model: Any) -> Any:
    return model.get_submodule("encoder.down_path.0.conv1_bn")


def test_what_cannot_be_kept_is_refused() -> None:
    model = source()
    _one(model).momentum = 0.3
    with pytest.raises(ValueError, match="momentum must be the same in all layers"):
        FiLMedUNet.from_ivadomed(model)
    assert {b.momentum for b in blocks(FiLMedUNet.from_ivadomed(model, momentum=0.2))} == {0.2}
    model = source()
    model.get_submodule("encoder.down_path.0").conv1_bn = nn.GroupNorm(1, 4)
    with pytest.raises(ValueError, match=r"batch norm with running statistics.*got GroupNorm"):
        FiLMedUNet.from_ivadomed(model)


class Modified(nn.Module):
    """A network with the names of ivadomed's Modified3DUNet."""

    def __init__(self, state: dict[str, Tensor], momentum: float, eps: float = 1e-5) -> None:
        super().__init__()
        self.state = state
        self.norm, self.gate = nn.InstanceNorm3d(4, eps=eps), nn.BatchNorm3d(4, eps, momentum)
        self.dropout3d, self.final_activation = nn.Dropout3d(0.6), "sigmoid"

    def state_dict(self, *_: Any, **__: Any) -> Any:
        return self.state


def test_the_second_network_keeps_them_too() -> None:
    state = Modified3DUNet(1, 1, base_filters=4, attention=True).to_ivadomed()
    net = Modified3DUNet.from_ivadomed(Modified(state, 0.02))
    assert {b.dropout for b in net.inner} == {0.6} and net.final_activation == "sigmoid"
    assert {g.out.momentum for g in net.gates} == {net.gating.momentum} == {0.02}  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="eps of the norms must be 1e-5"):
        Modified3DUNet.from_ivadomed(Modified(state, 0.02, eps=1e-3))
