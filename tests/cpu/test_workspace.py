"""The memory that a thread keeps for maps which the next convolution alone reads."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor

import fastfilm

pytest.importorskip("fastfilm.ops.launchers.cpu._C", reason="the C++ extension was not built")
from fastfilm.ops.launchers.cpu import kernels as cpu


def test_it_is_used_again_by_its_own_thread_only() -> None:
    like = torch.empty(1)
    first = cpu.workspace(like, (2, 3, 40, 50))
    assert first.is_contiguous(memory_format=torch.channels_last)
    again = cpu.workspace(like.bfloat16(), (1, 4, 5, 6, 7))
    assert again.dtype == torch.bfloat16 and again.data_ptr() == first.data_ptr()
    assert again.is_contiguous(memory_format=torch.channels_last_3d)
    found: list[Tensor] = []
    other = threading.Thread(target=lambda: found.append(cpu.workspace(like, (2, 3, 40, 50))))
    other.start()
    other.join()
    assert found[0].data_ptr() != first.data_ptr()


def test_large_maps_are_fresh() -> None:
    like, shape = torch.empty(1), (1, 17, 1024, 1024)
    one, two = cpu.workspace(like, shape), cpu.workspace(like, shape)
    assert one.data_ptr() != two.data_ptr()
    assert cpu.workspace(like, (1, 1, 8, 8)).untyped_storage().nbytes() <= 64 << 20


@pytest.mark.parametrize("inference", [False, True])
def test_results_and_gradients_do_not_share_it(inference: bool) -> None:
    torch.manual_seed(0)
    net = fastfilm.FiLMedUNet(1, 2, base_filters=8, depth=2, metadata_size=3).eval()
    images, metadata = torch.randn(2, 1, 1, 32, 32), torch.eye(3)[:1]
    with torch.inference_mode(inference), torch.no_grad():
        one = net(images[0], metadata)
        kept = one.clone()
        net(images[1], metadata)
        assert torch.equal(one, kept) and torch.equal(net(images[0], metadata), kept)
    # a training step between two halves of another
    net.train()
    for module in net.modules():
        if isinstance(module, fastfilm.ConvNormFiLM2d):
            module.momentum = 0.0
    alone = torch.autograd.grad(net(images[0], metadata).sum(), list(net.parameters()))
    out = net(images[0], metadata).sum()
    torch.autograd.grad(net(images[1], metadata).sum(), list(net.parameters()))
    for a, b in zip(alone, torch.autograd.grad(out, list(net.parameters())), strict=True):
        assert torch.equal(a, b)


def test_growing_it_without_memory_raises_and_the_next_call_works(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(size: int) -> torch.UntypedStorage:
        raise MemoryError(size)

    like = torch.empty(1)
    cpu.workspace(like, (1, 1, 8, 8)).fill_(1)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "UntypedStorage", full)
        with pytest.raises(MemoryError):
            cpu.workspace(like, (1, 16, 900, 900))
    assert float(cpu.workspace(like, (1, 1, 8, 8)).fill_(2).sum()) == 128
