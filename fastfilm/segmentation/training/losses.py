"""Losses over what is known: a label that was not annotated in a case costs that case nothing.

The values come from MONAI's losses without reduction. Every term is a mean over its known entries (sample and
label) in the whole batch, over all processes and accumulated parts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from monai import losses as ml
from torch import Tensor

from ..config.sections import Training

Term = Callable[[Tensor, Tensor], Tensor]


class KnownLoss:
    """The training loss.

    Args:
        config: which terms.
        exclusive: channel 0 is background and labels exclude each other (softmax); else each channel has a
            sigmoid.

    With ``exclusive``, classes that are not known in a sample are merged with its background: the voxels that are
    labelled background may be theirs, so only the probability of "none of the known ones" is asked for.
    """

    def __init__(self, config: Training, exclusive: bool) -> None:
        self.exclusive = exclusive
        act: dict[str, Any] = {"softmax" if exclusive else "sigmoid": True, "reduction": "none"}
        if exclusive:
            act["include_background"] = False
        alpha, gamma = config.tversky_alpha, config.focal_gamma
        soft: dict[str, Any] = {"use_softmax": True} if exclusive else {}
        terms: dict[str, Term] = {
            # the same small numbers above and below: an empty label predicted empty costs nothing
            "dice": ml.DiceLoss(smooth_nr=1e-5, smooth_dr=1e-5, **act),
            "tversky": ml.TverskyLoss(alpha=alpha, beta=1 - alpha, **act),
            "generalised_dice": ml.GeneralizedDiceLoss(**act),
            "focal": ml.FocalLoss(gamma=gamma, reduction="none", **soft),
            "ce": _softmax_ce if exclusive else _sigmoid_ce,
        }
        self.terms = {name: terms[name] for name in config.loss}
        # these have one value a sample, whatever the number of labels
        self.by_sample = {"generalised_dice"} | ({"ce", "focal"} if exclusive else set())

    def weights(self, known: Tensor) -> dict[str, Tensor]:
        """Entries of each term that ``known`` [N, K] leaves: what the sums are divided by."""
        samples, entries = known.any(1).sum(), known.sum()
        return {n: samples if n in self.by_sample else entries for n in self.terms}

    def __call__(
        self,
        logits: Tensor | Sequence[Tensor],
        masks: Tensor,
        known: Tensor,
        totals: dict[str, Tensor],
    ) -> Tensor:
        """The sum of each term's known entries over ``totals``, summed over the terms.

        Args:
            logits: [N, K, *S] (K + 1 with the background), or a list of them from full size to coarse (deep
                supervision), whose losses count 1, 1/2, 1/4 …
            masks: [N, K, *S], 0 or 1.
            known: [N, K] bool, best on the CPU.
            totals: entries of the whole batch, from ``weights``; the losses of its parts then add up.
        """
        if isinstance(logits, Tensor):
            return self._one(logits, masks, known, totals)
        shares = torch.tensor([0.5**i for i in range(len(logits))])
        shares = shares / shares.sum()
        losses = [
            float(w) * self._one(x, _resized(masks, x.shape[2:]), known, totals)
            for w, x in zip(shares, logits, strict=True)
        ]
        return torch.stack(losses).sum()

    def _one(
        self, logits: Tensor, masks: Tensor, known: Tensor, totals: dict[str, Tensor]
    ) -> Tensor:
        logits = logits.float()
        loss = logits.new_zeros(())
        for labels, rows in _patterns(known, logits.device):
            x, y = logits[rows], masks[rows][:, labels].to(logits.dtype)
            x, y = self._merged(x, y, labels) if self.exclusive else (x[:, labels], y)
            for name, term in self.terms.items():
                # [N, K, *S], [N, K] or [N, 1]: means over space, summed over entries
                values = term(x, y)
                values = values.flatten(2).mean(2) if values.dim() > 2 else values
                loss = loss + values.sum() / totals[name].clamp(min=1)
        return loss

    @staticmethod
    def _merged(x: Tensor, y: Tensor, labels: list[int]) -> tuple[Tensor, Tensor]:
        """Logits and one-hot masks of background and the known labels."""
        others = [c for c in range(x.shape[1]) if c - 1 not in labels]
        background = x[:, others].logsumexp(1, keepdim=True)
        x = torch.cat([background, x[:, [c + 1 for c in labels]]], 1)
        return x, torch.cat([1 - y.amax(1, keepdim=True), y], 1)


def _patterns(known: Tensor, device: torch.device) -> list[tuple[list[int], Tensor]]:
    """Samples with the same known labels: (labels, positions); samples that know none are left out."""
    found: dict[tuple[bool, ...], list[int]] = {}
    for i, row in enumerate(known.tolist()):
        found.setdefault(tuple(row), []).append(i)
    return [
        ([k for k, on in enumerate(row) if on], torch.tensor(rows, device=device))
        for row, rows in found.items()
        if any(row)
    ]


def _resized(masks: Tensor, size: Sequence[int]) -> Tensor:
    if tuple(masks.shape[2:]) == tuple(size):
        return masks
    return torch.nn.functional.interpolate(masks.float(), tuple(size), mode="nearest-exact")


def _sigmoid_ce(x: Tensor, y: Tensor) -> Tensor:
    return torch.nn.functional.binary_cross_entropy_with_logits(x, y, reduction="none")


def _softmax_ce(x: Tensor, y: Tensor) -> Tensor:
    """[N, 1, *S]"""
    return -(torch.log_softmax(x, 1) * y).sum(1, keepdim=True)
