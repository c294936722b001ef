"""Every call uses the values that its tensors hold then, also those that came there unseen by PyTorch."""

from __future__ import annotations

import contextlib
import copy
import ctypes
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import fastfilm
from fastfilm.ops.block import PreparedWeight

from ..support.yardstick import relative_error

X = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))


class Case(NamedTuple):
    """A module and what else a call of it reads; ``rows`` are metadata of an open ``with`` block."""

    module: nn.Module
    call: Callable[[nn.Module, Tensor, Sequence[Tensor]], Tensor]
    beside: Sequence[Tensor] = ()
    rows: Tensor | None = None

    def tensors(self) -> list[Tensor]:
        given = () if self.rows is None else (self.rows,)
        all_of_them = *self.module.parameters(), *self.module.buffers(), *self.beside, *given
        return [t for t in all_of_them if t.is_floating_point()]

    def now(self, x: Tensor = X) -> Tensor:
        with torch.no_grad():
            return self.call(self.module, x, self.beside)

    def exact(self, x: Tensor = X) -> Tensor:
        """Eager PyTorch in float64 on copies of the values of now."""
        twin = copy.deepcopy(self.module).double()
        with torch.no_grad(), fastfilm.backend("reference", "eager"):
            return self.call(twin, x.double(), [t.double() for t in self.beside])


def scattered(module: nn.Module) -> nn.Module:
    """In evaluation, with values in which any change shows."""
    with torch.no_grad():
        for t in (*module.parameters(), *module.buffers()):
            if t.is_floating_point():
                t.copy_(torch.rand(t.shape) * 0.5 + 0.5)
                if t.dim() > 1:
                    t.sub_(0.75)
    return module.eval()


def filmed(module: nn.Module, x: Tensor, beside: Sequence[Tensor]) -> Tensor:
    return module(x, *beside)  # type: ignore[no-any-return]


def own(**options: Any) -> Case:
    module = scattered(fastfilm.ConvNormFiLM2d(4, 6, **options))
    return Case(module, filmed, torch.rand(2, 2, 6).unbind())


def deferred(**options: Any) -> Case:
    def call(module: nn.Module, x: Tensor, beside: Sequence[Tensor]) -> Tensor:
        return module(x, *beside, deferred="always").tensor()  # type: ignore[no-any-return]

    return own(**options)._replace(call=call)


def layers() -> nn.Sequential:
    first = nn.Conv2d(4, 6, 3, padding=1), nn.BatchNorm2d(6), nn.PReLU(6)
    second = nn.Conv2d(6, 6, 3, bias=False), nn.GroupNorm(2, 6), nn.SiLU(), nn.Dropout2d(0.5)
    return nn.Sequential(*first, *second)


def converted() -> Case:
    return Case(fastfilm.convert(scattered(layers()), verbose=False), filmed)


class Encoder(nn.Module):
    """Features with a table of its own."""

    out_features = 3

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.rand(2, 3))
        self.norm = nn.BatchNorm1d(3)

    def forward(self, rows: Tensor) -> Tensor:
        return self.norm(rows.to(self.table.dtype) @ self.table)  # type: ignore[no-any-return]


def conditioned(convert: bool, with_encoder: bool) -> Case:
    """Called inside one ``with`` block, which stays open."""
    module: nn.Module = layers()
    if convert:
        fastfilm.convert(module, verbose=False)
    size = {"encoder": Encoder()} if with_encoder else {"metadata_size": 2}
    module = scattered(fastfilm.condition(module, **size, where="all"))  # type: ignore[arg-type]
    return Case(module, filmed, rows=torch.rand(2, 2))


def network() -> Case:
    torch.manual_seed(0)
    options: Any = {"depth": 2, "base_filters": 4, "metadata_size": 2}
    return Case(scattered(fastfilm.FiLMedUNet(4, 2, **options)), filmed, [torch.rand(2, 2)])


def modulated() -> Case:
    """γ and β made once, by the caller's own act; they are tensors like others."""
    case = network()
    with torch.no_grad():
        patient: Any = case.module.modulate(case.beside[0])  # type: ignore[operator]
    film = [t for pair in patient.film for t in pair if t is not None]

    def call(module: nn.Module, x: Tensor, beside: Sequence[Tensor]) -> Tensor:
        pairs = iter(beside)
        made = [
            (None, None) if gamma is None else (next(pairs), next(pairs))
            for gamma, _ in patient.film
        ]
        return module(x, type(patient)(made, 2))  # type: ignore[no-any-return]

    return Case(case.module, call, film)


CASES: dict[str, Callable[[], Case]] = {
    "batch": lambda: own(norm="batch"),
    "batch, deferred": lambda: deferred(norm="batch", activation="prelu"),
    "batch behind the activation": lambda: own(norm="batch", order="conv-act-norm-film"),
    "instance": lambda: own(norm="instance", order="conv-norm-act-film"),
    "instance, running": lambda: own(norm="instance", track_running_stats=True),
    "group": lambda: own(norm="group", num_groups=2, activation="prelu"),
    "none": lambda: own(norm=None),
    "converted": converted,
    "conditioned": lambda: conditioned(False, True),
    "conditioned and converted": lambda: conditioned(True, False),
    "network": network,
    "network, modulated": modulated,
}


def by_optimiser(kind: Any, **options: Any) -> Callable[[list[Tensor]], None]:
    def change(tensors: list[Tensor]) -> None:
        parameters = [t for t in tensors if isinstance(t, nn.Parameter)]
        optimiser = kind(parameters, lr=0.1, fused=True, **options)
        for p in parameters:
            p.grad = torch.full_like(p, 0.5)
        optimiser.step()
        optimiser.zero_grad()

    return change


def each(write: Callable[[Tensor, Tensor], Any]) -> Callable[[list[Tensor]], None]:
    """``write`` of every tensor and the values that it is to have."""

    def change(tensors: list[Tensor]) -> None:
        for t in tensors:
            write(t, 0.7 * t.detach().clone() + 0.1)

    return change


def set_data(t: Tensor, values: Tensor) -> None:
    t.data = values


def with_other_strides(t: Tensor, values: Tensor) -> None:
    """Every other value of a larger tensor, and the axes the other way round."""
    turned = values.permute(*reversed(range(values.dim())))
    t.data = torch.stack([turned, turned], -1)[..., 0].permute(*reversed(range(values.dim())))


def by_numpy(t: Tensor, values: Tensor) -> None:
    t.detach().numpy()[...] = values.numpy()


def by_dlpack(t: Tensor, values: Tensor) -> None:
    torch.from_dlpack(t.detach()).copy_(values)


def by_address(t: Tensor, values: Tensor) -> None:
    """As a replayed CUDA graph writes: to memory."""
    if t.is_contiguous():
        ctypes.memmove(t.data_ptr(), values.data_ptr(), t.nbytes)
    else:
        by_numpy(t, values)


def by_swap(t: Tensor, values: Tensor) -> None:
    torch.utils.swap_tensors(t, nn.Parameter(values) if isinstance(t, nn.Parameter) else values)


def by_foreach(tensors: list[Tensor]) -> None:
    torch._foreach_mul_([t.data for t in tensors], 0.7)
    torch._foreach_copy_([t.data for t in tensors], [t.detach() + 0.1 for t in tensors])


def by_vector(tensors: list[Tensor]) -> None:
    parameters = [t for t in tensors if isinstance(t, nn.Parameter)]
    values = torch.cat([t.detach().flatten() for t in parameters])
    nn.utils.vector_to_parameters(0.7 * values + 0.1, parameters)


def by_all_reduce(tensors: list[Tensor]) -> None:
    """Two ranks in two threads."""
    store = dist.HashStore()
    others = [torch.full_like(t, 0.1) for t in tensors]

    def rank(number: int, mine: list[Tensor]) -> None:
        group = dist.ProcessGroupGloo(store, number, 2, timedelta(seconds=60))
        for t in mine:
            group.allreduce([t.detach()]).wait()

    threads = [threading.Thread(target=rank, args=a) for a in ((0, tensors), (1, others))]
    for t in threads:
        t.start()
    for t in threads:
        t.join()


WAYS: dict[str, Callable[[list[Tensor]], None]] = {
    "AdamW, fused": by_optimiser(torch.optim.AdamW),
    "Adam, fused": by_optimiser(torch.optim.Adam),
    "SGD, fused": by_optimiser(torch.optim.SGD, momentum=0.9),
    "all_reduce": by_all_reduce,
    "data.copy_": each(lambda t, values: t.data.copy_(values)),
    "data =": each(set_data),
    "data = a view": each(with_other_strides),
    "vector_to_parameters": by_vector,
    "swap_tensors": each(by_swap),
    "foreach": by_foreach,
    "NumPy": each(by_numpy),
    "DLPack": each(by_dlpack),
    "memory": each(by_address),
    "in place": each(lambda t, values: t.detach().copy_(values)),
}


def assert_fresh(case: Case, change: Callable[[list[Tensor]], None]) -> None:
    given = contextlib.nullcontext() if case.rows is None else fastfilm.metadata(case.rows)
    with given:
        case.now()
        before = case.now()
        for _ in range(2):
            change(case.tensors())
            found, exact = case.now(), case.exact()
            assert relative_error(found, exact) < 2e-5
            assert relative_error(before, exact) > 1e-3
            before = found


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("way", WAYS)
def test_no_call_uses_a_value_from_before(way: str, case: str) -> None:
    torch.manual_seed(1)
    if way == "swap_tensors" and "converted" in case:
        # TorchDynamo holds weak references to the parameters of what it has compiled, and PyTorch says so
        with pytest.raises(RuntimeError, match="weakref"):
            assert_fresh(CASES[case](), WAYS[way])
        return
    assert_fresh(CASES[case](), WAYS[way])


def _shared(t: Tensor, path: Path) -> None:
    """The same values, in a file that others may map too."""
    flat = torch.from_file(str(path), shared=True, size=t.numel(), dtype=t.dtype)
    flat.copy_(t.detach().flatten())
    t.data = flat.view(t.shape)


_WRITER = """
import sys, numpy
for path in sys.argv[1:]:
    numpy.memmap(path, numpy.float32, "r+")[:] *= 0.7
"""


@pytest.mark.parametrize("case", ["batch", "converted", "conditioned and converted", "network"])
def test_another_process_may_write_to_shared_memory(case: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    made, paths = CASES[case](), []
    for i, t in enumerate(made.tensors()):
        paths.append(str(tmp_path / str(i)))
        _shared(t, tmp_path / str(i))
    command = [sys.executable, "-c", _WRITER, *paths]
    assert_fresh(made, lambda _: subprocess.run(command, check=True, timeout=60))  # type: ignore[arg-type,return-value]


def _wider(module: nn.Module) -> None:
    """The same parameter objects for 8 channels in place of 6."""
    for t in (*module.parameters(), *module.buffers()):
        if t.is_floating_point() and 6 in t.shape:
            t.data = torch.rand([8 if n == 6 else n for n in t.shape])


def _in_float64(module: nn.Module) -> None:
    for t in (*module.parameters(), *module.buffers()):
        if t.is_floating_point():
            t.data = t.detach().double() + 0.25


@pytest.mark.parametrize("change", [_wider, _in_float64])
@pytest.mark.parametrize("kind", ["own", "converted"])
def test_data_of_another_form_decide_anew(kind: str, change: Callable[[nn.Module], None]) -> None:
    torch.manual_seed(1)
    module: nn.Module = fastfilm.ConvNormFiLM2d(4, 6, norm="batch", activation="prelu")
    if kind == "converted":
        sequence = nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.PReLU())
        module = fastfilm.convert(sequence, verbose=False)
    case = Case(scattered(module), filmed)
    case.now()
    case.now()
    change(module)
    x = X.double() if change is _in_float64 else X
    found = case.now(x)
    assert relative_error(found, case.exact(x)) < (1e-13 if x.dtype == torch.float64 else 1e-5)
    assert found.shape[1] == (6 if change is _in_float64 else 8) and found.dtype == x.dtype


def test_options_count_as_they_are_at_the_call() -> None:
    case = own(norm="batch", activation="leaky_relu", slope=0.1)
    changes = {"eps": 0.5, "slope": 0.7, "activation": "elu", "padding": (0, 0), "momentum": None}
    case.now()
    for name, value in changes.items():
        setattr(case.module, name, value)
        assert relative_error(case.now(), case.exact()) < 1e-5


LAYERS: dict[str, tuple[Callable[[], nn.Module], int, str, Any]] = {
    "eps": (lambda: layers()[:2], 1, "eps", 0.7),
    "num_groups": (lambda: layers()[3:6], 1, "num_groups", 3),
    "padding": (lambda: layers()[:3], 0, "padding", (0, 1)),
    "padding_mode": (lambda: layers()[:3], 0, "padding_mode", "circular"),
    "slope": (lambda: nn.Sequential(*layers()[:2], nn.LeakyReLU(0.1)), 2, "negative_slope", 0.8),
    "alpha": (lambda: nn.Sequential(*layers()[:2], nn.ELU()), 2, "alpha", 0.3),
    "approximate": (lambda: nn.Sequential(*layers()[:2], nn.GELU()), 2, "approximate", "tanh"),
}


@torch.no_grad()
@pytest.mark.parametrize("option", LAYERS)
def test_options_of_converted_layers_count_as_they_are_at_the_call(option: str) -> None:
    torch.manual_seed(1)
    make, index, name, value = LAYERS[option]
    plain = scattered(make())
    made: Any = fastfilm.convert(plain, copy=True, verbose=False)
    x = torch.randn(2, plain[0].in_channels, 8, 8)  # type: ignore[index]
    made(x)
    before = made(x)
    for m in (plain, made):
        setattr(m[index], name, value)
    exact = plain.double()(x.double())
    assert relative_error(made(x), exact) < 1e-5
    assert before.shape != exact.shape or relative_error(before, exact) > 1e-4


class Stages(nn.Module):
    """A forward of its own that calls ``Sequential`` children."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body, self.tail = nn.Identity(), layers(), nn.Sequential(nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        return self.tail(self.body(self.stem(x)))  # type: ignore[no-any-return]


def _squared(*given: Any) -> Tensor:
    return given[-1] ** 2  # type: ignore[no-any-return]


SURGERY: dict[str, Callable[[Any], Any]] = {
    "a layer more": lambda m: m.body.append(nn.Tanh()),
    "a layer between": lambda m: m.body.insert(1, nn.Tanh()),
    "a layer less": lambda m: m.body.__delitem__(2),
    "another layer": lambda m: m.body.__setitem__(1, nn.InstanceNorm2d(6)),
    "other layers": lambda m: setattr(m, "body", nn.Sequential(nn.Tanh())),
    "a layer for layers": lambda m: setattr(m, "body", nn.Tanh()),
    "a layer for none": lambda m: setattr(m, "stem", nn.Tanh()),
    "layers for a layer": lambda m: m.tail.__setitem__(0, nn.Sequential(nn.SiLU())),
    "a hook of a layer": lambda m: m.body[2].register_forward_hook(_squared),
    "a hook of layers": lambda m: m.body.register_forward_hook(_squared),
    "a layer's forward": lambda m: setattr(m.body[0], "forward", layers()[0].forward),
}


@torch.no_grad()
@pytest.mark.parametrize("way", SURGERY)
def test_converted_models_that_are_rebuilt_run_as_they_are(way: str) -> None:
    torch.manual_seed(1)
    plain = scattered(Stages())
    made = fastfilm.convert(plain, copy=True, verbose=False)
    made(X)
    before = made(X)
    for m in (plain, made):
        torch.manual_seed(2)
        SURGERY[way](m)
    exact = plain(X)
    torch.testing.assert_close(made(X), exact, rtol=1e-4, atol=1e-5)
    assert before.shape != exact.shape or relative_error(before, exact) > 1e-3


class Written(nn.Module):
    """A norm of a map to which the forward writes before a convolution reads the norm's output."""

    def __init__(self, write: Callable[[Tensor], Any], pooled: bool) -> None:
        super().__init__()
        self.write, self.pooled = write, pooled
        self.first, self.norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.last = nn.Conv2d(4, 6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).sin()
        y = torch.relu(self.norm(x))
        if self.pooled:
            y = nn.functional.max_pool2d(y, 2)
        self.write(x)
        return self.last(y)  # type: ignore[no-any-return]


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize(
    "write",
    [
        lambda x: x.mul_(2),
        lambda x: nn.functional.threshold(x, 0.9, -1.0, inplace=True),
        lambda x: nn.functional.threshold_(x, 0.9, -1.0),
        lambda x: x.__setitem__(0, 3.0),
    ],
)
def test_a_forward_may_write_to_a_map_that_it_has_read(
    write: Callable[[Tensor], Any], pooled: bool, gradients: bool
) -> None:
    torch.manual_seed(1)
    plain = scattered(Written(write, pooled))
    made = fastfilm.convert(plain, copy=True, verbose=False)
    with torch.set_grad_enabled(gradients):
        torch.testing.assert_close(made(X), plain(X), rtol=1e-4, atol=1e-5)


class Counting(nn.Module):
    """An encoder with state of its own, which no tensor of it tells."""

    out_features = 2

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, rows: Tensor) -> Tensor:
        self.calls += 1
        return rows * self.calls


@torch.no_grad()
def test_the_encoder_and_the_generator_run_at_every_call() -> None:
    torch.manual_seed(1)
    rows = torch.rand(2, 2)
    model = fastfilm.convert(layers(), verbose=False)
    model = scattered(fastfilm.condition(model, encoder=Counting(), where="all"))
    with fastfilm.metadata(rows):
        found = [model(X) for _ in range(3)]
    for n, out in enumerate(found, 1):
        model.film_generator.encoder.calls = n - 1  # type: ignore[union-attr]
        assert torch.equal(out, model(X, rows))
    assert not torch.equal(found[0], found[1])


@torch.no_grad()
def test_dropout_masks_and_slopes_in_a_buffer_are_read_at_every_call() -> None:
    weight, mask, slope = torch.rand(6, 4, 3, 3), torch.ones(2, 6), torch.full((1,), 0.25)
    options: Any = {"activation": "prelu", "slope": slope, "dropout_mask": mask}
    outputs = []
    for i in range(3):
        mask.numpy()[:, i] = 2.0
        slope.numpy()[:] += 0.5
        outputs.append(fastfilm.conv_norm_film(X - 0.5, weight, **options))
        twin = {k: v.double() if isinstance(v, Tensor) else v for k, v in options.items()}
        with fastfilm.backend("reference", "eager"):
            exact = fastfilm.conv_norm_film(X.double() - 0.5, weight.double(), **twin)
        assert relative_error(outputs[-1], exact) < 1e-5  # type: ignore[arg-type]


FORMS = [torch.contiguous_format, torch.channels_last]


@pytest.mark.parametrize("way", [w for w in WAYS if w != "data = a view"])
@pytest.mark.parametrize("layout", FORMS)
def test_what_is_made_of_a_weight_follows_it(way: str, layout: torch.memory_format) -> None:
    weight = nn.Parameter(torch.randn(6, 4, 3, 3).contiguous(memory_format=layout))
    prepared = PreparedWeight()

    def made() -> list[Tensor]:
        packed = prepared.pack(weight, ("form",), lambda w: 2 * w)
        cast = prepared.cast(weight, torch.bfloat16)
        of_cast = prepared.pack(cast, ("form",), lambda w: 3 * w)
        assert packed is not None and of_cast is not None
        return [packed, cast, of_cast]

    for _ in range(3):
        found, again = made(), made()
        narrow = weight.detach().bfloat16()
        for twice in (found, again):
            assert torch.equal(twice[0], 2 * weight)
            assert torch.equal(twice[1], narrow) and torch.equal(twice[2], 3 * narrow)
        WAYS[way]([weight])


def test_a_weight_of_other_strides_or_sign_has_other_values() -> None:
    weight = torch.arange(16.0).view(2, 2, 2, 2)
    prepared = PreparedWeight()

    def same(t: Tensor) -> bool:
        found = prepared.pack(t, (), lambda w: w.clone())
        return found is None or torch.equal(found, t)

    strides = weight.to(memory_format=torch.channels_last).stride()
    bytes_of_it = weight.as_strided(weight.shape, strides)
    turned = weight.to(memory_format=torch.channels_last).permute(0, 2, 3, 1)
    for t in (
        weight,
        bytes_of_it,
        weight.mT,
        turned,
        torch._neg_view(weight),
        weight.int().float(),
        weight[:1],
    ):
        assert same(t) and same(t)


def test_a_weight_written_while_it_is_prepared_is_prepared_anew() -> None:
    weight = torch.ones(2, 2, 3, 3)
    prepared = PreparedWeight()

    def make(w: Tensor) -> Tensor:
        made = 2 * w
        weight.zero_()
        return made

    prepared.pack(weight, (), make)
    found = prepared.pack(weight, (), lambda w: 2 * w)
    assert found is not None and not found.any()
