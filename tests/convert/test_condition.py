"""``fastfilm.condition``: FiLM in models that have none."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastfilm

from .test_convert import Branches, DoubleConv, PreActivation, Residual, Small

X = torch.randn(3, 1, 16, 16, generator=torch.Generator().manual_seed(0))
ROWS = [[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]]


def trained(model: nn.Module, seed: int = 0) -> nn.Module:
    """A conditioned model whose generator is not the identity any more."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in fastfilm.generator_parameters(model):
            p.copy_(torch.randn(p.shape, generator=generator) * 0.5)
    return model


def small(converted: bool = False, **options: Any) -> nn.Module:
    """A conditioned U-Net."""
    torch.manual_seed(0)
    model: nn.Module = Small().eval()
    if converted:
        fastfilm.convert(model, verbose=False)
    return fastfilm.condition(model, 2, **{"where": "all", **options})


@pytest.mark.parametrize("converted", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_the_first_output_is_the_models_own_to_the_last_bit(
    converted: bool, training: bool
) -> None:
    torch.manual_seed(0)
    model = Small().train(training)
    if converted:
        fastfilm.convert(model, verbose=False)
    expected = copy.deepcopy(model)(X)
    fastfilm.condition(model, metadata_size=2, where="all")
    assert torch.equal(model(X, ROWS), expected)


@pytest.mark.parametrize("order", ["conv-norm-film-act", "conv-norm-act-film"])
def test_film_acts_where_the_order_says(order: str) -> None:
    torch.manual_seed(0)
    block = DoubleConv(1, 4).eval()
    plain = copy.deepcopy(block).double_conv
    model = trained(fastfilm.condition(block, 2, where=["double_conv.3"], order=order))
    found = model.film_generator(ROWS, 3)
    gamma, beta = (t[:, :, None, None] for t in found["double_conv.3"])
    y = plain[4](plain[3](plain[2](plain[1](plain[0](X)))))
    expected = plain[5](gamma * y + beta) if order.endswith("act") else gamma * plain[5](y) + beta
    assert torch.equal(model(X, ROWS), expected)
    fastfilm.convert(model, verbose=False)
    torch.testing.assert_close(model(X, ROWS), expected, rtol=1e-5, atol=1e-5)


def residual() -> nn.Module:
    return Residual(4)


def pre_activation() -> nn.Module:
    return PreActivation(4)


@pytest.mark.parametrize("make", [residual, pre_activation])
def test_fused_film_equals_film_layer_by_layer(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model = trained(fastfilm.condition(make(), 2, where="all"))
    fused = fastfilm.convert(model, copy=True, verbose=False)
    x = torch.randn(3, 4, 6, 7, 8)
    grads = []
    for m in (model, fused):
        y = m(x, ROWS)
        torch.manual_seed(1)
        (y * torch.randn(y.shape)).sum().backward()
        grads.append([y, *(p.grad for p in m.parameters() if p.grad is not None)])
    assert len(grads[0]) == len(grads[1]) > 8
    for a, b in zip(*grads, strict=True):
        # what a bias in front of a norm gets is rounding only
        torch.testing.assert_close(
            a, b, rtol=1e-4, atol=2e-5 * float(a.detach().abs().max()) + 1e-4
        )


def test_every_sample_gets_its_own_row() -> None:
    for converted in (False, True):
        model = trained(small(converted))
        with torch.no_grad():
            whole = model(X, ROWS)
            for i, row in enumerate(ROWS):
                torch.testing.assert_close(
                    model(X[i : i + 1], row), whole[i : i + 1], rtol=1e-4, atol=1e-4
                )
            swapped = model(X, ROWS[::-1])
        assert not torch.allclose(whole[0], swapped[0])


def test_metadata_come_as_argument_keyword_or_from_a_block() -> None:
    model = trained(small())
    expected = model(X, ROWS)
    assert torch.equal(model(X, metadata=ROWS), expected)
    with fastfilm.metadata(ROWS):
        assert torch.equal(model(X), expected)
        with fastfilm.metadata([ROWS[1]]):
            torch.testing.assert_close(model(X), model(X, [ROWS[1]] * 3))
        assert torch.equal(model(X, torch.tensor(ROWS)), expected)
    with pytest.raises(TypeError, match="metadata is missing"):
        model(X)


def test_metadata_of_a_block_follow_changes_of_the_generator() -> None:
    model = trained(small(converted=True))
    with fastfilm.metadata(ROWS[0]), torch.no_grad():
        first = model(X)
        assert torch.equal(model(X), first)
        trained(model, seed=1)
        assert torch.equal(model(X), model(X, ROWS[0]))
        assert not torch.equal(model(X), first)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([[1.0, 0.0]] * 2, r"metadata must have shape \(3, 2\), \(1, 2\) or \(2,\), got \(2, 2\)"),
        ([1.0, 0.0, 0.0], r"metadata must have shape .* got \(1, 3\)"),
        ([float("nan"), 0.0], "metadata must be finite"),
    ],
)
def test_rows_that_do_not_fit_the_batch_are_refused(rows: Any, message: str) -> None:
    model = small()
    with pytest.raises(ValueError, match=message):
        model(X, rows)
    with pytest.raises(ValueError, match=message), fastfilm.metadata(rows):
        model(X)


def test_only_the_generator_is_new_and_can_be_trained_alone() -> None:
    torch.manual_seed(0)
    model = Small()
    before = dict(model.state_dict())
    fastfilm.condition(model, 2, where="all")
    after = model.state_dict()
    added = [k for k in after if k not in before]
    assert added and all(k.startswith("film_generator.") for k in added)
    assert all(torch.equal(v, after[k]) for k, v in before.items())
    network, own = fastfilm.parameter_groups(model, weight_decay=1e-2, generator_weight_decay=1e-4)
    assert {id(p) for p in own["params"]} == {id(p) for p in model.film_generator.parameters()}
    assert len(network["params"]) + len(own["params"]) == len(list(model.parameters()))
    assert (network["weight_decay"], own["weight_decay"]) == (1e-2, 1e-4)
    for p in network["params"]:
        p.requires_grad_(False)
    model.eval()
    optimiser = torch.optim.Adam(fastfilm.generator_parameters(model), 0.05)
    losses = []
    for _ in range(5):
        loss = (model(X, ROWS) - 1).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss))
    assert losses[-1] < losses[0]
    for k, v in before.items():
        assert torch.equal(v, model.state_dict()[k]), k


def test_a_state_dict_goes_into_another_conditioned_model_and_into_the_plain_one() -> None:
    model, other = trained(small()), small(converted=True)
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(other(X, ROWS), model(X, ROWS), rtol=1e-4, atol=1e-4)
    missing = Small().load_state_dict(model.state_dict(), strict=False)
    assert not missing.missing_keys


@pytest.mark.parametrize("converted", [False, True])
def test_conditioned_models_copy_and_pickle(converted: bool) -> None:
    model = trained(small(converted))
    expected = model(X, ROWS)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(X, ROWS), expected)


def test_restore_keeps_film_and_runs_the_models_own_layers() -> None:
    model = trained(small())
    expected = model(X, ROWS)
    fastfilm.convert(model, verbose=False)
    assert fastfilm.conversion_report(model).share(3) == 1.0
    fastfilm.restore(model)
    assert torch.equal(model(X, ROWS), expected)


def test_where_takes_words_names_and_functions() -> None:
    def names(where: Any, **options: Any) -> list[str]:
        return list(small(where=where, **options).film_generator.sites)

    every = [f"{b}.double_conv.{i}" for b in ("inc", "down", "conv") for i in (0, 3)]
    assert names("all") == every
    assert names("conv") == every[4:]
    assert names(["inc.double_conv.3", "conv"]) == [every[1], *every[4:]]
    assert names(lambda name, layer: layer.out_channels == 16) == every[2:4]
    assert names("decoder", example_input=X) == every[4:]
    assert names("encoder", example_input=X) == every[:4]
    # a convolution that nothing is seen to follow may be named
    assert names("up") == ["up"] and names("inc.double_conv.4") == every[1:2]
    for bad in ("nothing", ["inc", "outc.weight"]):
        with pytest.raises(ValueError, match="where has no layer"):
            names(bad)
    with pytest.raises(ValueError, match="chooses no layer"):
        names(lambda name, layer: False)


def test_a_decoder_that_names_do_not_show_has_to_be_told() -> None:
    model = nn.Sequential(
        DoubleConv(1, 4),
        nn.MaxPool2d(2),
        DoubleConv(4, 4),
        nn.Upsample(scale_factor=2),
        DoubleConv(4, 4),
    )
    with pytest.raises(ValueError, match="pass example_input"):
        fastfilm.condition(model, 2)
    fastfilm.condition(model, 2, example_input=X)
    assert list(model.film_generator.sites) == ["4.double_conv.0", "4.double_conv.3"]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, TypeError, "metadata_size or encoder must be given"),
        ({"metadata_size": 0}, ValueError, "metadata_size must be a positive integer, got 0"),
        ({"metadata_size": 2, "order": "film"}, ValueError, "order must be one of"),
        ({"metadata_size": 2, "order": "conv-act-norm-film"}, ValueError, "order must be"),
        ({"metadata_size": 2, "generator": "x"}, ValueError, "generator must be one of"),
        ({"encoder": [1]}, TypeError, r"encoder must be a torch\.nn\.Module, got list"),
        ({"encoder": nn.ReLU()}, ValueError, "how many features the encoder gives"),
    ],
)
def test_wrong_options_are_named(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    model = Small()
    with pytest.raises(error, match=message):
        fastfilm.condition(model, where="all", **options)


def test_models_that_cannot_take_film_are_refused() -> None:
    with pytest.raises(ValueError, match="no convolution with a norm or an activation"):
        fastfilm.condition(nn.Sequential(nn.Conv2d(1, 1, 3)), 2, where="all")
    with pytest.raises(ValueError, match="conditioned already"):
        fastfilm.condition(small(), 2)
    with pytest.raises(TypeError, match="got dict"):
        fastfilm.condition({}, 2)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="not conditioned"):
        fastfilm.parameter_groups(Small())


def test_an_encoder_sees_the_metadata_as_they_come() -> None:
    class Types(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(4, 5)

        def forward(self, kinds: Any) -> Tensor:
            return self.table(torch.as_tensor(kinds))

    torch.manual_seed(0)
    model = fastfilm.condition(Small().eval(), encoder=Types(), where="all")
    trained(model)
    whole = model(X, [0, 3, 1])
    torch.testing.assert_close(model(X[1:2], [3]), whole[1:2], rtol=1e-4, atol=1e-4)
    whole.sum().backward()
    assert model.film_generator.encoder.table.weight.grad[3].abs().sum() > 0


class Standardised(nn.Conv2d):
    """A convolution whose forward does more than its class's."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return nn.functional.conv2d(x, weight, self.bias)


@torch.no_grad()
@pytest.mark.parametrize(
    "make",
    [
        lambda: Standardised(4, 6, 3),
        lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"),
        lambda: nn.Conv2d(4, 6, (2, 4), padding="same"),
    ],
)
def test_convolutions_that_no_group_computes_run_by_themselves(
    make: Callable[[], nn.Module],
) -> None:
    torch.manual_seed(0)
    first = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU()
    plain = nn.Sequential(*first, make(), nn.BatchNorm2d(6), nn.LeakyReLU(0.1)).eval()
    made = fastfilm.convert(plain, copy=True, verbose=False)
    made = fastfilm.condition(made, metadata_size=2, where="all")
    torch.testing.assert_close(made(X, ROWS), plain(X), rtol=1e-4, atol=1e-5)


def test_threads_see_their_own_metadata() -> None:
    """While one thread compiles, a call of another may run as it is without conversion, and round otherwise."""
    model = trained(small(converted=True))
    with torch.no_grad():
        expected = [model(X, row) for row in ROWS]
    wrong: list[int] = []

    def work(i: int) -> None:
        with torch.no_grad(), fastfilm.metadata(ROWS[i]):
            for _ in range(20):
                if not torch.allclose(model(X), expected[i], rtol=1e-4, atol=1e-5):
                    wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert wrong == []


@pytest.mark.parametrize("replicas", [2, 3])
def test_replicas_of_data_parallel_get_their_own_rows(replicas: int) -> None:
    """What ``DataParallel`` does with a network, on one device: chunks of the batch, replicas in threads."""
    model = trained(small())
    expected = model(X, ROWS)

    def replicate(module: nn.Module) -> list[nn.Module]:
        children = {n: replicate(m) for n, m in module._modules.items() if m is not None}
        copies = [module._replicate_for_data_parallel() for _ in range(replicas)]
        for j, twin in enumerate(copies):
            for n, made in children.items():
                twin._modules[n] = made[j]
            twin._parameters.update(module._parameters)
        return copies

    for _ in range(2):
        with fastfilm.metadata(ROWS):
            copies = replicate(model)
            chunks = X.chunk(replicas)
            outputs: list[Any] = [None] * len(chunks)

            def run(j: int, copies: Any = copies, chunks: Any = chunks, out: Any = outputs) -> None:
                out[j] = copies[j](chunks[j]).detach()

            threads = [threading.Thread(target=run, args=(j,)) for j in range(len(chunks))]
            for t in threads:
                t.start()
            for t in threads:
                t.join()
        torch.testing.assert_close(torch.cat(outputs), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("converted", [False, True])
def test_film_is_never_left_out_silently(converted: bool) -> None:
    model = trained(fastfilm.condition(Branches(), 2, where="all"))
    if converted:
        fastfilm.convert(model, verbose=False)
    x = torch.randn(3, 2, 8, 8)
    model(x, ROWS)
    model.norm.register_forward_hook(lambda *a: None)
    model.deep = False
    before = model(x, ROWS)[0]
    assert not torch.equal(before, model(x, ROWS[::-1])[0])
    model.norm = nn.LayerNorm([8, 8])
    with pytest.raises(RuntimeError, match="FiLM at 'conv' is left out: the layer 'norm'"):
        model(x, x, metadata=ROWS)
    with pytest.raises(RuntimeError, match="outside of its conditioned network's forward"):
        small().inc(X)


@pytest.mark.parametrize("converted", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_conditioned_models_compile_to_one_graph(training: bool, converted: bool) -> None:
    import torch._dynamo as dynamo

    graphs: list[Any] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    model = trained(small(converted)).train(training)
    expected = copy.deepcopy(model)(X, torch.tensor(ROWS))
    dynamo.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    torch.testing.assert_close(compiled(X, torch.tensor(ROWS)), expected, rtol=1e-4, atol=1e-4)
    other = torch.tensor(ROWS[::-1])
    torch.testing.assert_close(compiled(X, other), model(X, other), rtol=1e-3, atol=1e-3)
    assert len(graphs) == 1


def test_film_of_a_converted_model_is_part_of_its_blocks() -> None:
    model = trained(small(converted=True))
    model(X, torch.tensor(ROWS))
    report = fastfilm.conversion_report(model)
    groups = {c.name: c.group for c in report.convolutions}
    sites = model.film_generator.sites
    assert all("film" in groups[name] for name in sites) and len(sites) == 6
    assert report.graphs == 1


def test_conditioned_models_export_with_metadata_as_an_input() -> None:
    model, rows = trained(small(converted=True)), torch.tensor(ROWS)
    program = torch.export.export(model, (X, rows))
    assert not [n for n in program.graph.nodes if "fastfilm" in str(n.target)]
    for given in (rows, rows.flip(0)):
        torch.testing.assert_close(
            program.module()(X, given), model(X, given), rtol=1e-4, atol=1e-4
        )
