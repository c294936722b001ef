"""Batches spread over processes: synchronised batch norm, DDP and FSDP on two gloo processes."""

from __future__ import annotations

import copy
import socket
import traceback
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import fastfilm
from fastfilm.nn import sync_batch_norm

pytestmark = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(), reason="needs torch.distributed, gloo"
)

SPLIT = (3, 1)
"""Samples of the two processes."""

ORDERS = ("conv-norm-film-act", "conv-norm-act-film", "conv-act-norm-film")


def _process(rank: int, port: int, queue: Any, work: Callable[[int], Any]) -> None:
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, 2, rank == 0)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    try:
        queue.put((rank, None, work(rank)))
    except BaseException:
        queue.put((rank, traceback.format_exc(), None))
    # the queue is read before a process that the other one needs is gone
    dist.barrier()
    dist.destroy_process_group()


def on_two(work: Callable[[int], Any]) -> list[Any]:
    """``work(rank)`` of two processes; raises what one of them raised."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    context = mp.get_context("fork")
    queue = context.SimpleQueue()
    processes = [context.Process(target=_process, args=(r, port, queue, work)) for r in range(2)]
    for p in processes:
        p.start()
    results: list[Any] = [None, None]
    try:
        for _ in processes:
            rank, error, value = queue.get()
            assert error is None, f"rank {rank}: {error}"
            results[rank] = value
    finally:
        for p in processes:
            p.join(0.0 if any(r is None for r in results) else 20.0)
            p.kill()
    return results


class Net(nn.Module):
    """Blocks of every order with batch norm and FiLM."""

    def __init__(self, norm: str = "batch") -> None:
        super().__init__()
        channels = (2, 4, 5, 3)
        self.blocks = nn.ModuleList(
            fastfilm.ConvNormFiLM2d(a, b, norm=norm, activation="silu", order=order)
            for a, b, order in zip(channels, channels[1:], ORDERS, strict=False)
        )
        self.film = nn.Linear(3, 2 * sum(channels[1:]))

    def forward(self, x: Tensor, rows: Tensor) -> Tensor:
        films = self.film(rows).split([2 * b.out_channels for b in self.blocks], 1)  # type: ignore[misc]
        for block, film in zip(self.blocks, films, strict=True):
            gamma, beta = film.chunk(2, 1)
            x = block(x, gamma, beta, deferred=block is not self.blocks[-1])
        return x


def batch() -> tuple[Tensor, Tensor, Tensor]:
    """Images (of different means, so that processes disagree on theirs), metadata and targets of all processes."""
    generator = torch.Generator().manual_seed(1)
    n = sum(SPLIT)
    x = torch.randn(n, 2, 7, 6, generator=generator) + torch.arange(n).reshape(n, 1, 1, 1)
    return x, torch.rand(n, 3, generator=generator), torch.randn(n, 3, 7, 6, generator=generator)


def net(norm: str = "batch") -> Net:
    torch.manual_seed(0)
    return Net(norm)


def numbers(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """Loss, gradients and buffers; plain numbers that travel between processes."""
    found = {"loss": loss.detach()}
    found |= {f"d {n}": p.grad for n, p in model.named_parameters() if p.grad is not None}
    found |= dict(model.named_buffers())
    return {k: v.clone().numpy() for k, v in found.items()}  # type: ignore[misc]


def trained(model: nn.Module, call: Callable[..., Tensor], rank: int | None, steps: int = 2) -> Any:
    """Loss, gradients and buffers after some steps on a process's share; on the whole batch for None."""
    x, rows, target = batch()
    if rank is not None:
        x, rows, target = (t.split(SPLIT)[rank] for t in (x, rows, target))
    losses = []
    for _ in range(steps):
        model.zero_grad()
        loss = (call(x, rows) - target).square().sum()
        loss.backward()
        losses.append(loss.detach())
    return numbers(model, torch.stack(losses))


def assert_same(processes: list[Any], whole: Any, scale: float = 1.0) -> None:
    """The processes' losses and gradients add up to the whole batch's, and their statistics are its own."""
    assert processes[0].keys() == processes[1].keys() == whole.keys()
    for name, expected in whole.items():
        expected = torch.from_numpy(expected) if expected.ndim else torch.tensor(expected)
        a, b = (torch.as_tensor(p[name]) for p in processes)
        if name == "loss":
            torch.testing.assert_close(a + b, expected, rtol=1e-5, atol=1e-5)
        elif name.startswith("d ") and scale == 1.0:
            torch.testing.assert_close(a + b, expected, rtol=2e-4, atol=2e-3)
        elif name.startswith("d "):
            assert torch.equal(a, b)
            torch.testing.assert_close(a * scale, expected, rtol=2e-4, atol=2e-3)
        else:
            torch.testing.assert_close(a, b)
            torch.testing.assert_close(a, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("backend", "switch"),
    [
        (None, sync_batch_norm),
        ("reference", sync_batch_norm),
        (None, nn.SyncBatchNorm.convert_sync_batchnorm),
    ],
)
def test_two_processes_with_uneven_batches_are_one_with_the_whole_batch(
    backend: str | None, switch: Callable[[nn.Module], nn.Module]
) -> None:
    def work(rank: int) -> Any:
        with fastfilm.backend(backend):
            model = switch(net())
            return trained(model, model, rank)

    with fastfilm.backend(backend):
        whole = trained(model := net(), model, None)
        assert_same(on_two(work), whole)


def test_without_synchronisation_two_processes_differ() -> None:
    def work(rank: int) -> Any:
        return trained(model := net(), model, rank)

    found = on_two(work)
    means = [torch.from_numpy(f["blocks.0.norm_layer.running_mean"]) for f in found]
    assert (means[0] - means[1]).abs().max() > 1e-3


def test_it_does_what_sync_batch_norm_of_pytorch_keeps_in_its_running_statistics() -> None:
    """PyTorch's own layer runs on GPUs only: its statistics are those of BatchNorm2d on the whole batch."""
    x = batch()[0]

    def work(rank: int) -> Any:
        torch.manual_seed(0)
        block = fastfilm.ConvNormFiLM2d(2, 4, sync_group=True, momentum=None, activation=None)
        block(x.split(SPLIT)[rank])
        return numbers(block, torch.zeros(1))

    torch.manual_seed(0)
    block = fastfilm.ConvNormFiLM2d(2, 4, activation=None)
    norm = nn.BatchNorm2d(4, momentum=None)
    norm(nn.functional.conv2d(x, block.weight, block.bias, padding=1))
    for found in on_two(work):
        for name in ("running_mean", "running_var"):
            torch.testing.assert_close(
                torch.from_numpy(found[f"norm_layer.{name}"]), getattr(norm, name)
            )


def test_ddp_on_uneven_batches_is_one_process_on_the_whole_batch() -> None:
    def work(rank: int) -> Any:
        model = sync_batch_norm(net())
        return trained(model, DistributedDataParallel(model), rank)

    whole = trained(model := net(), model, None)
    # DDP takes the mean of the processes' gradients
    assert_same(on_two(work), whole, scale=2.0)


def test_compiled_ddp_is_one_process_on_the_whole_batch() -> None:
    def work(rank: int) -> Any:
        torch._dynamo.reset()
        model = sync_batch_norm(net())
        compiled = torch.compile(DistributedDataParallel(model), backend="aot_eager")
        return trained(model, compiled, rank)

    whole = trained(model := net(), model, None)
    assert_same(on_two(work), whole, scale=2.0)


def test_instance_norm_needs_no_synchronisation() -> None:
    def work(rank: int) -> Any:
        model = sync_batch_norm(net("instance"))
        assert all(b.sync_group is None for b in model.blocks)  # type: ignore[union-attr]
        return trained(model, DistributedDataParallel(model), rank)

    whole = trained(model := net("instance"), model, None)
    assert_same(on_two(work), whole, scale=2.0)


def test_evaluation_does_not_communicate() -> None:
    def work(rank: int) -> Any:
        model = sync_batch_norm(net()).eval()
        # only one of them calls the network: a collective would wait for the other one
        return trained(model, model, None) if rank == 0 else None

    whole = trained(model := net().eval(), model, None)
    found = on_two(work)[0]
    for name, expected in whole.items():
        torch.testing.assert_close(torch.as_tensor(found[name]), torch.as_tensor(expected))


def test_a_process_may_have_no_samples_or_one_value() -> None:
    def work(rank: int) -> Any:
        results = []
        for sizes, size in (((4, 0), 5), ((3, 1), 1)):
            torch.manual_seed(0)
            block = fastfilm.ConvNormFiLM2d(2, 4, sync_group=True, activation="silu")
            x = batch()[0][..., :size, :size].split(sizes)[rank].requires_grad_()
            loss = block(x).pow(3).sum()
            loss.backward()
            results.append(numbers(block, loss))
        return results

    found = on_two(work)
    for case, size in enumerate((5, 1)):
        torch.manual_seed(0)
        block = fastfilm.ConvNormFiLM2d(2, 4, activation="silu")
        loss = block(batch()[0][..., :size, :size]).pow(3).sum()
        loss.backward()
        assert_same([f[case] for f in found], numbers(block, loss))


def test_without_a_process_group_it_is_plain_batch_norm() -> None:
    assert not dist.is_initialized()
    plain = trained(model := net(), model, None)
    synced = trained(model := sync_batch_norm(net()), model, None)
    for name, expected in plain.items():
        assert torch.equal(torch.as_tensor(synced[name]), torch.as_tensor(expected))


@pytest.mark.parametrize("switch", [sync_batch_norm, nn.SyncBatchNorm.convert_sync_batchnorm])
def test_a_switched_network_is_copied_and_keeps_its_switch(switch: Any) -> None:
    model = copy.deepcopy(switch(net()))
    assert all(b.sync_group is True for b in model.blocks)
    # layers of PyTorch's would make DDP refuse CPUs
    assert not any(isinstance(m, nn.SyncBatchNorm) for m in model.modules())
    assert model.state_dict().keys() == net().state_dict().keys()
    assert switch(net("instance")).blocks[0].sync_group is None


def test_the_functions_take_a_group_as_the_modules_do() -> None:
    def block(x: Tensor, group: Any, conv: bool) -> dict[str, Tensor]:
        torch.manual_seed(0)
        x = x.clone().requires_grad_()
        weight = torch.randn(2, 2, 3, 3, requires_grad=True)
        running = {"running_mean": torch.zeros(2), "running_var": torch.ones(2)}
        options: dict[str, Any] = {"norm": "batch", "training": True, "activation": "silu"}
        options |= {"sync_group": group, **running}
        if conv:
            v = fastfilm.conv_norm_film(x, weight, **options)
        else:
            v = fastfilm.norm_film(x * weight.mean(), **options)
        v.pow(3).sum().backward()
        return {"v": v.detach(), "dx": x.grad, "dw": weight.grad, **running}  # type: ignore[dict-item]

    def work(rank: int) -> Any:
        x = batch()[0].split(SPLIT)[rank]
        groups = (True, dist.group.WORLD)
        found = [block(x, g, conv) for g, conv in zip(groups, (True, False), strict=True)]
        return [{k: t.clone().numpy() for k, t in f.items()} for f in found]

    results = on_two(work)
    for i, conv in enumerate((True, False)):
        whole = block(batch()[0], None, conv)
        parts = [{k: torch.from_numpy(t) for k, t in r[i].items()} for r in results]
        for name in ("v", "dx"):
            joined = torch.cat([p[name] for p in parts])
            torch.testing.assert_close(joined, whole[name], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(
            parts[0]["dw"] + parts[1]["dw"], whole["dw"], rtol=1e-4, atol=1e-2
        )
        for name in ("running_mean", "running_var"):
            for part in parts:
                torch.testing.assert_close(part[name], whole[name], rtol=1e-5, atol=1e-6)


def test_a_group_of_another_kind_is_refused_by_name() -> None:
    block = fastfilm.ConvNormFiLM2d(2, 4, sync_group="world")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="sync_group must be a process group"):
        block(torch.randn(2, 2, 4, 4))


def plain_net(norm: type[nn.Module]) -> nn.Module:
    """A network of PyTorch's own layers with FiLM put in, converted."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for a, b in ((2, 4), (4, 3)):
        layers += [nn.Conv2d(a, b, 3, padding=1), norm(b), nn.SiLU()]
    model = fastfilm.condition(nn.Sequential(*layers), metadata_size=3, where="all")
    with torch.no_grad():
        for parameter in fastfilm.generator_parameters(model):
            parameter.add_(0.1)
    return fastfilm.convert(model, verbose=False)


def test_a_converted_network_keeps_the_sync_batch_norm_that_is_put_in() -> None:
    """PyTorch's own runs, as without conversion; on CPUs it refuses to."""

    def work(rank: int) -> Any:
        models = [
            nn.SyncBatchNorm.convert_sync_batchnorm(plain_net(nn.BatchNorm2d)) for _ in range(2)
        ]
        with pytest.raises(ValueError, match="expected input tensor to be on GPU"):
            trained(models[0], models[0], rank)
        return trained(models[1].eval(), models[1], rank)

    whole = trained(model := plain_net(nn.BatchNorm2d).eval(), model, None)
    assert_same(on_two(work), whole)


@pytest.mark.parametrize("compiled", [False, True])
def test_ddp_trains_a_converted_and_conditioned_network(compiled: bool) -> None:
    def work(rank: int) -> Any:
        torch._dynamo.reset()
        model = plain_net(nn.InstanceNorm2d)
        wrapped: Any = DistributedDataParallel(model)
        return trained(
            model, torch.compile(wrapped, backend="aot_eager") if compiled else wrapped, rank
        )

    whole = trained(model := plain_net(nn.InstanceNorm2d), model, None)
    assert_same(on_two(work), whole, scale=2.0)


def test_fsdp_trains_a_network_as_one_process_does() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    def unet() -> fastfilm.FiLMedUNet:
        torch.manual_seed(0)
        return fastfilm.FiLMedUNet(2, 3, depth=1, base_filters=4, metadata_size=3)

    def step(model: nn.Module, rank: int | None) -> Tensor:
        x, rows, target = batch()
        if rank is not None:
            x, rows, target = (t.split(SPLIT)[rank] for t in (x, rows, target))
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3 if rank is None else 2e-3)
        (model(x, rows) - target).square().sum().backward()
        optimizer.step()
        return torch.zeros(())

    def work(rank: int) -> Any:
        mesh = init_device_mesh("cpu", (2,))
        model = sync_batch_norm(unet())
        fully_shard(model, mesh=mesh)
        step(model, rank)
        return {
            n: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().numpy()
            for n, p in model.state_dict().items()
        }

    whole = unet()
    step(whole, None)
    for found in on_two(work):
        for name, expected in whole.state_dict().items():
            torch.testing.assert_close(torch.as_tensor(found[name]), expected, rtol=1e-4, atol=1e-5)
