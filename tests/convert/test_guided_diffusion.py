"""The U-Net of guided diffusion written anew: it runs, and checkpoints change none of its gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.guided_diffusion import GroupNorm32, UNetModel, exact, small, stirred

FORMS: dict[str, dict[str, Any]] = {
    "scale and shift": {},
    "added": {"use_scale_shift_norm": False},
    "residual resampling": {"resblock_updown": True},
    "pooled": {"conv_resample": False, "use_new_attention_order": True},
    "classes": {"num_classes": 4},
    "3D": {"dims": 3},
}


def images(model: UNetModel, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Arguments of a call."""
    dims = 3 if isinstance(model.input_blocks[0][0], torch.nn.Conv3d) else 2
    x = torch.randn(2, 1, *(8,) * dims, generator=torch.Generator().manual_seed(1))
    found = {"x": x.to(dtype).requires_grad_(), "timesteps": torch.tensor([3, 700])}
    if model.num_classes is not None:
        found["y"] = torch.tensor([0, 2])
    return found


def step(model: UNetModel, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Output and gradients of one training step."""
    arguments = images(model, dtype)
    torch.manual_seed(2)
    output = model.train()(**arguments)
    weights = torch.cos(torch.arange(output.numel(), dtype=dtype)).reshape(output.shape)
    leaves = {"x": arguments["x"], **dict(model.named_parameters())}
    grads = torch.autograd.grad((output * weights).sum(), list(leaves.values()))
    return {"output": output.detach(), **dict(zip(leaves, grads, strict=True))}


def error(found: dict[str, Tensor], truth: dict[str, Tensor]) -> tuple[float, str]:
    """The worst norm-relative error and its tensor; one without a gradient but rounding counts as small."""
    least = 1e-2 * max(float(v.norm()) for v in truth.values())
    return max(
        (float((found[n] - v).norm()) / max(float(v.norm()), least), n) for n, v in truth.items()
    )


@pytest.mark.parametrize("form", FORMS)
def test_checkpoints_give_the_same_gradients(form: str) -> None:
    torch.manual_seed(0)
    model = stirred(small(**FORMS[form]))
    twin = small(use_checkpoint=True, **FORMS[form])
    twin.load_state_dict(model.state_dict())
    plain, again = step(model), step(twin)
    assert plain["output"].shape == (2, 2, *images(model)["x"].shape[2:])
    assert all(bool(v.any()) for v in plain.values())
    worst, name = error(again, plain)
    assert worst < 1e-5, name


def test_the_float64_form_computes_the_same_function() -> None:
    torch.manual_seed(0)
    model = stirred(small(use_checkpoint=True))
    truth = step(exact(model), torch.float64)
    assert all(v.dtype == torch.float64 for v in truth.values())
    worst, name = error(step(model), truth)
    assert worst < 1e-5, name


def test_it_starts_at_zero_as_published() -> None:
    model = small()
    assert not model(**images(model)).any()
    with pytest.raises(ValueError, match="if and only if"):
        model(**images(model), y=torch.zeros(2, dtype=torch.long))


def test_norms_compute_in_float32() -> None:
    norm, x = GroupNorm32(2, 4), torch.randn(2, 4, 5, 5).bfloat16()
    expected = torch.nn.functional.group_norm(x.float(), 2).bfloat16()
    assert torch.equal(norm(x), expected)
