"""MONAI: sliding windows whose metadata are those of the sample that they come from."""

from __future__ import annotations

from typing import Any

import torch
from monai.inferers import SlidingWindowInferer
from torch import Tensor

from fastfilm.convert import metadata as given


class ConditionedSlidingWindowInferer(SlidingWindowInferer):
    """``monai.inferers.SlidingWindowInferer`` for networks that ``fastfilm.condition`` made.

    MONAI cuts the windows of all samples into batches of their own, which rows of metadata do not follow. Here
    every sample's windows run with that sample's row.

    Example:
        >>> import torch, fastfilm
        >>> from fastfilm.integrations.monai import ConditionedSlidingWindowInferer
        >>> layers = torch.nn.Conv2d(1, 4, 3, padding=1), torch.nn.InstanceNorm2d(4), torch.nn.ReLU()
        >>> net = fastfilm.condition(torch.nn.Sequential(*layers), metadata_size=2, where="all")
        >>> inferer = ConditionedSlidingWindowInferer(roi_size=(16, 16), sw_batch_size=4)
        >>> inferer(torch.randn(2, 1, 40, 24), net, metadata=[[0, 1], [1, 0]]).shape
        torch.Size([2, 4, 40, 24])
    """

    def __call__(
        self, inputs: Tensor, network: Any, *args: Any, metadata: Any = None, **kwargs: Any
    ) -> Any:
        """Output for ``inputs`` [N, C, *S]; metadata [N, M], or [1, M] or [M] for all samples.

        Raises:
            TypeError: no metadata. ValueError: a number of rows that is neither 1 nor N.
        """
        if metadata is None:
            raise TypeError("metadata is missing: inferer(inputs, network, metadata=rows)")
        rows = torch.as_tensor(metadata)
        rows = rows.unsqueeze(0) if rows.dim() < 2 else rows
        if len(rows) not in (1, len(inputs)):
            raise ValueError(
                f"metadata must have 1 row or one for each of the {len(inputs)} samples, got {len(rows)}"
            )
        outputs = []
        for i in range(len(inputs)):
            with given(rows[i : i + 1] if len(rows) > 1 else rows):
                outputs.append(super().__call__(inputs[i : i + 1], network, *args, **kwargs))
        return _joined(outputs)


def _joined(outputs: list[Any]) -> Any:
    first = outputs[0]
    if isinstance(first, dict):
        return {k: _joined([o[k] for o in outputs]) for k in first}
    if isinstance(first, (tuple, list)):
        return type(first)(_joined(list(parts)) for parts in zip(*outputs, strict=True))
    return torch.cat(outputs)
