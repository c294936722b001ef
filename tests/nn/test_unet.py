"""The networks: shapes, equivalences, metadata, copying, and bad input."""

from __future__ import annotations

import copy
import io
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fastfilm
from fastfilm.nn import FiLMedUNet, Modified3DUNet
from fastfilm.nn.attention_gate import AttentionGate3d
from fastfilm.nn.blocks import DoubleConv
from fastfilm.ops import spec


def small(**options: Any) -> FiLMedUNet:
    torch.manual_seed(0)
    defaults: dict[str, Any] = {"depth": 2, "base_filters": 4, "metadata_size": 3}
    return FiLMedUNet(1, 2, **(defaults | options))


def image(dims: int = 2, batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn((batch, 1, *(13, 11, 9)[:dims]), generator=generator)


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("norm", [None, "batch", "instance", "group", "layer"])
@pytest.mark.parametrize("order", spec.ORDERS)
def test_every_order_and_norm_trains(order: str, norm: str | None, dims: int) -> None:
    net = small(order=order, norm=norm, spatial_dims=dims, num_groups=2)
    out = net(image(dims), torch.eye(3)[:2])
    assert out.shape == (2, 2, *image(dims).shape[2:])
    out.square().mean().backward()
    for name, p in net.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all(), name
    net.eval()
    with torch.no_grad():
        ours = net(image(dims), torch.eye(3)[:2])
        with fastfilm.backend("reference"):
            reference = net(image(dims), torch.eye(3)[:2])
    torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-5)


def test_identity_generator_starts_as_the_unconditioned_twin() -> None:
    net = small(generator="identity")
    twin = small(metadata_size=0)
    twin.load_state_dict({k: v for k, v in net.state_dict().items() if not k.startswith("film.")})
    net.eval(), twin.eval()
    with torch.no_grad():
        assert torch.equal(net(image(), [[1, 0, 0], [0, 1, 0]]), twin(image()))


@pytest.mark.parametrize("order", spec.ORDERS)
def test_each_sample_gets_its_own_metadata(order: str) -> None:
    net = small(order=order).eval()
    rows = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    with torch.no_grad():
        both = net(image(), rows)
        swapped = net(image(), rows.flip(0))
        for n in range(2):
            alone = net(image()[n : n + 1], rows[n])
            torch.testing.assert_close(both[n : n + 1], alone, rtol=1e-4, atol=1e-5)
    assert (both - swapped).abs().max() > 1e-3


def test_metadata_may_be_lists_arrays_or_tensors_of_any_kind() -> None:
    net = small().eval()
    rows = [[1, 0, 0], [0, 1, 0]]
    forms = [
        rows,
        np.array(rows),
        np.array(rows, dtype=np.float32),
        torch.tensor(rows),
        torch.tensor(rows, dtype=torch.bool),
        torch.tensor(rows, dtype=torch.float64),
    ]
    with torch.no_grad():
        outputs = [net(image(), f) for f in forms]
        assert all(torch.equal(outputs[0], o) for o in outputs)
        torch.testing.assert_close(net(image(), rows[0]), net(image(), [rows[0]]))


def test_parameter_counts_are_the_papers() -> None:
    net = FiLMedUNet(1, 1, depth=3, metadata_size=3)
    assert sum(p.numel() for p in net.parameters()) == 4_878_307
    modified = Modified3DUNet(1, 1, metadata_size=3)
    assert sum(p.numel() for p in modified.parameters()) == 7_151_186


def test_hidden_weights_are_shared_and_stay_so() -> None:
    for net in (small(), copy.deepcopy(small())):
        first = net.film[0].hidden[0]
        assert all(g.hidden[0].weight is first.weight for g in net.film)
        assert all(g.hidden[0].bias is not first.bias for g in list(net.film)[1:])


def test_copy_pickle_and_state_dict_keep_the_output() -> None:
    net = small().eval()
    rows = [[1, 0, 0], [0, 1, 0]]
    net(image(), rows).sum().backward()
    expected = net(image(), rows)
    buffer = io.BytesIO()
    torch.save(net, buffer)
    buffer.seek(0)
    other = small(generator="identity").eval()
    fresh = small().eval()
    fresh.load_state_dict(net.state_dict())
    for twin in (copy.deepcopy(net), torch.load(buffer, weights_only=False), fresh):
        assert torch.equal(twin(image(), rows), expected)
    assert not torch.equal(other(image(), rows), expected)


def test_depth_one_and_partial_film_and_final_activation() -> None:
    net = small(depth=1, film_layers=[1, 0, 0, 1], final_activation="softmax").eval()
    out = net(image(), [[0.5, 0.2, 0.1]])
    torch.testing.assert_close(out.sum(1), torch.ones_like(out[:, 0]))
    assert (small(final_activation="sigmoid").eval()(image(), [[0, 0, 1]]) <= 1).all()


def test_deep_supervision_gives_every_decoder_level() -> None:
    net = small(deep_supervision=True, depth=3)
    x = torch.randn(2, 1, 24, 16)
    out = net(x, [[1, 0, 0]])
    assert [tuple(o.shape[2:]) for o in out] == [(24, 16), (12, 8), (6, 4)]
    sum(o.square().mean() for o in out).backward()
    assert all(p.grad is not None for p in net.heads.parameters())
    assert net.eval()(x, [[1, 0, 0]]).shape == (2, 2, 24, 16)


def test_dropout_is_random_in_training_only() -> None:
    net = small(dropout=0.5)
    rows = [[1, 0, 0]]
    assert not torch.equal(net(image(), rows), net(image(), rows))
    net.eval()
    assert torch.equal(net(image(), rows), net(image(), rows))


def test_kept_channels_are_scaled_so_that_the_mean_stays() -> None:
    block = fastfilm.ConvNormFiLM2d(1, 64, norm=None, activation=None, dropout=0.75)
    x = image()
    kept = block(x) / block.eval()(x)
    assert set(kept.detach().round().unique().tolist()) == {0.0, 4.0}


@pytest.mark.parametrize("order", spec.ORDERS)
def test_film_acts_behind_the_dropout_of_the_second_block(order: str) -> None:
    options: dict[str, Any] = {"norm": "instance", "affine": False, "activation": "relu"}
    double = DoubleConv(2, 1, 32, order=order, dropout=0.5, **options)
    v = double(image(), torch.ones(2, 32), torch.full((2, 32), 3.0))
    dropped = v.flatten(2).var(2) == 0
    assert dropped.any() and not dropped.all()
    # in front of an activation, FiLM belongs to what is dropped
    assert (v.amax((2, 3))[dropped] == (0.0 if order == "conv-norm-film-act" else 3.0)).all()


@pytest.mark.parametrize("momentum", [0.1, None])
def test_running_statistics_follow_batch_norms(momentum: float | None) -> None:
    block = fastfilm.ConvNormFiLM2d(1, 4, momentum=momentum, activation=None)
    norm = torch.nn.BatchNorm2d(4, momentum=momentum)
    for seed in range(3):
        x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
        ours = block(x)
        theirs = norm(torch.nn.functional.conv2d(x, block.weight, block.bias, padding=1))
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        torch.testing.assert_close(getattr(block, name), getattr(norm, name), rtol=1e-5, atol=1e-6)


def test_dropout_in_front_of_the_norm_drops_what_conv_dropout_norm_drops() -> None:
    block = fastfilm.ConvNormFiLM2d(
        1, 4, norm="instance", activation="relu", dropout=0.5, dropout_position="norm"
    )
    x = image()
    torch.manual_seed(3)
    ours = block(x)
    torch.manual_seed(3)
    mask = torch.bernoulli(torch.full((2, 4), 0.5)) / 0.5
    y = torch.nn.functional.conv2d(x, block.weight, block.bias, padding=1) * mask[:, :, None, None]
    theirs = torch.nn.functional.instance_norm(
        y, weight=block.norm_weight, bias=block.norm_bias
    ).relu()
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("film_layers", [[1] * 10, [1, 0, 1, 0, 0, 1, 0, 1, 0, 0], [0] * 10])
def test_modified_3d_unet_round_trip(film_layers: list[int]) -> None:
    torch.manual_seed(0)
    net = Modified3DUNet(
        1, 2, base_filters=2, metadata_size=2 if any(film_layers) else 0, film_layers=film_layers
    ).eval()
    x = torch.randn(1, 1, 16, 32, 16)
    rows = [[1, 0]] if any(film_layers) else None
    state = net.to_ivadomed()
    twin = Modified3DUNet.from_ivadomed(state, final_activation=None).eval()
    assert torch.equal(net(x, rows)[:, 1:], twin(x, rows))
    again = twin.to_ivadomed()
    assert again.keys() == state.keys() and all(torch.equal(again[k], v) for k, v in state.items())
    net.train()(x, rows).sum().backward()


def test_film_layer_and_generator() -> None:
    film = fastfilm.FiLM(2, 4)
    x = image().expand(2, 4, -1, -1)
    gamma, beta = film.film([[1, 0], [0, 1]], 2)
    assert ((gamma > 0) & (gamma < 1) & (beta > 0) & (beta < 1)).all()
    expected = gamma[:, :, None, None] * x + beta[:, :, None, None]
    torch.testing.assert_close(film(x, [[1, 0], [0, 1]]), expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="preset must be one of"):
        fastfilm.FiLMGenerator(2, 4, preset="tanh")
    with pytest.raises(ValueError, match="shared weights must have shape"):
        fastfilm.FiLMGenerator(2, 4, shared=fastfilm.FiLMGenerator(3, 4))


BAD_FORWARD = [
    (image(), None, TypeError, "metadata is missing"),
    (image(), [[1, 0]], ValueError, r"metadata must have shape \(2, 3\)"),
    (image(), [[1, 0, 0]] * 3, ValueError, "metadata must have shape"),
    (image(), [[float("nan"), 0, 0]], ValueError, "metadata must be finite"),
    (image(), torch.tensor([[float("inf"), 0, 0]]), ValueError, "metadata must be finite"),
    (image(), [["astrocytoma", 0, 0]], TypeError, "metadata must be numbers"),
    (image(), [[1, 0, 0], [1, 0]], ValueError, "metadata rows must have one length"),
    (image().int(), [[1, 0, 0]], TypeError, "image must be floating point"),
    (image(3), [[1, 0, 0]], ValueError, r"image must be \[N, 1, H, W\]"),
    (image().expand(2, 3, -1, -1), [[1, 0, 0]], ValueError, "image must be"),
    (image()[..., :3], [[1, 0, 0]], ValueError, "at least 4 in every dimension"),
    ([[1.0]], [[1, 0, 0]], TypeError, "image must be a torch.Tensor"),
]


@pytest.mark.parametrize(
    ("x", "rows", "error", "message"), BAD_FORWARD, ids=[b[3][:24] for b in BAD_FORWARD]
)
def test_bad_forward_arguments(x: Any, rows: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        small()(x, rows)


BAD_CONSTRUCTION = [
    ({"depth": 0}, "depth must be"),
    ({"spatial_dims": 1}, "spatial_dims must be"),
    ({"film_layers": [1] * 10}, "film_layers must be 6 switches"),
    ({"film_layers": [1, 0, 0, 2, 0, 0]}, "film_layers must be 6 switches"),
    ({"metadata_size": 0, "film_layers": [1] * 6}, "metadata_size is 0"),
    ({"metadata_size": -1}, "metadata_size must be"),
    ({"norm": "bn"}, "norm must be one of"),
    ({"norm": "group", "num_groups": 3}, "num_groups must divide"),
    ({"activation": "mish"}, "activation must be one of"),
    ({"order": "film"}, "order must be one of"),
    ({"dropout": 1.0}, "dropout must be in"),
    ({"final_activation": "relu"}, "final_activation must be one of"),
    ({"generator": "modern"}, "preset must be one of"),
]


@pytest.mark.parametrize(
    ("options", "message"), BAD_CONSTRUCTION, ids=[b[1] for b in BAD_CONSTRUCTION]
)
def test_bad_construction(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(**options)


def test_unconditioned_network_refuses_metadata_and_modified_refuses_sizes() -> None:
    with pytest.raises(ValueError, match="no FiLM layers"):
        small(metadata_size=0)(image(), [[1, 0, 0]])
    with pytest.raises(ValueError, match="divisible by 16"):
        Modified3DUNet(1, 1, base_filters=2)(torch.randn(1, 1, 24, 16, 16))
    with pytest.raises(ValueError, match="padding must be given"):
        fastfilm.ConvNormFiLM2d(1, 1, 2)
    with pytest.raises(ValueError, match="must have 5 dimensions"):
        fastfilm.ConvNormFiLM3d(1, 1)(torch.randn(1, 1, 4, 4))


def test_autocast_trains_the_network() -> None:
    net = small(norm="instance")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = net(image(), [[1, 0, 0]])
    assert out.dtype == torch.bfloat16
    out.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


def test_a_modulation_stands_for_its_metadata_and_is_computed_once() -> None:
    net = fastfilm.FiLMedUNet(1, 1, depth=2, base_filters=4, metadata_size=3).eval()
    patches = torch.randn(3, 4, 1, 16, 16)
    row = [0.0, 1.0, 0.0]
    calls: list[str] = []
    generators = [g for g in net.film if isinstance(g, fastfilm.FiLMGenerator)]
    for g in generators:
        g.register_forward_hook(lambda *_: calls.append("made"))
    with torch.no_grad():
        patient = net.modulate(row)
        found = [net(p, patient) for p in patches]
        assert len(calls) == len(generators) > 0
        for p, v in zip(patches, found, strict=True):
            assert torch.equal(v, net(p, row))


def test_the_output_follows_what_it_comes_from() -> None:
    net = fastfilm.FiLMedUNet(1, 1, depth=1, base_filters=4, metadata_size=2).eval()
    x = torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        patient = net.modulate([[1, 0], [0, 1]])
        before = net(x, patient)
        # weights, running statistics (in place) and γ itself
        net.encoder[0].first.norm_weight.mul_(2)
        changed = net(x, patient)
        assert not torch.equal(changed, before)
        net.train()(x, patient)
        again = net.eval()(x, patient)
        assert not torch.equal(again, changed)
        patient.film[0][0].mul_(3)
        assert not torch.equal(net(x, patient), again)
        copied = copy.deepcopy(net)
        assert torch.equal(copied(x, patient), net(x, patient))
    out = net(x, patient)  # with gradients
    out.sum().backward()
    assert net.encoder[0].first.norm_weight.grad is not None


def test_a_modulation_that_does_not_fit_is_refused() -> None:
    net = fastfilm.FiLMedUNet(1, 1, depth=1, base_filters=4, metadata_size=2)
    other = fastfilm.FiLMedUNet(1, 1, depth=2, base_filters=4, metadata_size=2)
    with pytest.raises(ValueError, match="this network's modulate"):
        net(torch.randn(1, 1, 8, 8), other.modulate([1, 0]))
    with pytest.raises(ValueError, match="1 or 2 rows, got 3"):
        net(torch.randn(2, 1, 8, 8), net.modulate(torch.rand(3, 2)))
    with pytest.raises(ValueError, match="metadata must have shape"):
        net.modulate([1, 0, 0])


def test_the_weights_of_a_gate_keep_their_corners() -> None:
    gate = AttentionGate3d(1, 1).eval()
    with torch.no_grad():
        for p in gate.parameters():
            p.zero_()
        for p in (gate.phi.weight, gate.psi.weight, gate.out.weight, gate.out.norm_weight):
            p.fill_(1.0)
        signal = torch.rand(1, 1, 3, 3, 3) * 5
        found = gate(torch.ones(1, 1, 4, 4, 4), signal)
    corners = (..., slice(None, None, 3), slice(None, None, 3), slice(None, None, 3))
    expected = torch.sigmoid(signal[..., ::2, ::2, ::2])
    assert torch.allclose(found[corners], expected, atol=1e-5)
