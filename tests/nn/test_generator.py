"""The generator of γ and β where its parameters have 16 bits."""

from __future__ import annotations

import copy

import pytest
import torch

from fastfilm.nn import FiLMGenerator


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("preset", ["paper", "identity"])
def test_16_bit_parameters_round_no_more_than_their_type(dtype: torch.dtype, preset: str) -> None:
    torch.manual_seed(0)
    made = FiLMGenerator(3, 10, preset=preset)
    torch.nn.init.normal_(made.last.weight, std=0.3)
    made = made.to(dtype)
    metadata = torch.rand(4, 3)
    found = made(metadata.to(dtype))
    exact = copy.deepcopy(made).double()(metadata.to(dtype).double())
    for ours, truth in zip(found, exact, strict=True):
        assert ours.dtype == dtype
        assert (ours.double() - truth).abs().max() <= torch.finfo(dtype).eps * truth.abs().max()
    sum(t.float().sum() for t in found).backward()
    assert all(p.grad is not None and p.grad.dtype == dtype for p in made.parameters())
    # a hook sees its layer's own type
    seen = []
    made.hidden[0].register_forward_hook(lambda layer, given, out: seen.append(out.dtype))
    again = made(metadata.to(dtype))
    assert seen == [dtype]
    for ours, before in zip(again, found, strict=True):
        torch.testing.assert_close(ours, before, rtol=3e-2, atol=3e-2)
