"""Losses over annotated labels only: a label that was not annotated in a case does not enter that case's loss.

The values come from MONAI's losses without reduction. Each term is a mean over its known entries (pairs of sample
and label) in the whole batch, over all processes and accumulated parts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..config.sections import Training

Term = Callable[[Tensor, Tensor], Tensor]


class KnownLoss:
    """The training loss.

    With ``exclusive``, the classes that are not annotated in a sample are merged with its background, as its
    background voxels may belong to them.

    Args:
        config: names and parameters of the terms.
        exclusive: whether labels exclude each other and channel 0 is background (softmax); otherwise each channel
            has a sigmoid.
    """

    def __init__(self, config: Training, exclusive: bool) -> None:
        from monai import losses as ml  # two seconds of import, which only a training pays

        self.exclusive = exclusive
        act: dict[str, Any] = {"softmax" if exclusive else "sigmoid": True, "reduction": "none"}
        if exclusive:
            act["include_background"] = False
        alpha, gamma = config.tversky_alpha, config.focal_gamma
        soft: dict[str, Any] = {"use_softmax": True} if exclusive else {}
        terms: dict[str, Term] = {
            # with equal constants in numerator and denominator, an empty label predicted empty has no loss
            "dice": ml.DiceLoss(smooth_nr=1e-5, smooth_dr=1e-5, **act),
            "tversky": ml.TverskyLoss(alpha=alpha, beta=1 - alpha, **act),
            "generalised_dice": ml.GeneralizedDiceLoss(**act),
            "focal": ml.FocalLoss(gamma=gamma, reduction="none", **soft),
            "ce": _softmax_ce if exclusive else torch.nn.BCEWithLogitsLoss(reduction="none"),
        }
        self.terms = {name: terms[name] for name in config.loss}
        # these have one value per sample, for any number of labels
        self.by_sample = {"generalised_dice"} | ({"ce", "focal"} if exclusive else set())

    def weights(self, known: Tensor) -> dict[str, Tensor]:
        """The number of each term's known entries, by ``known`` [N, K]: the divisor of its sum."""
        samples, entries = known.any(1).sum(), known.sum()
        return {n: samples if n in self.by_sample else entries for n in self.terms}

    def __call__(
        self,
        logits: Tensor | Sequence[Tensor],
        masks: Tensor,
        known: Tensor,
        totals: dict[str, Tensor],
    ) -> Tensor:
        """The sum over all terms of their known entries' sum divided by ``totals``, a scalar.

        Args:
            logits: [N, K, *S] (K + 1 with the background), or a list of them from full size to coarse (deep
                supervision), with weights in the ratio 1, 1/2, 1/4 …
            masks: [N, K, *S], 0 or 1.
            known: [N, K], bool, preferably on the CPU.
            totals: numbers of entries of the whole batch, from ``weights``; the losses of its parts then add up.
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
        """Logits and one-hot masks of the background and the known labels; other classes join the background."""
        others = [c for c in range(x.shape[1]) if c - 1 not in labels]
        background = x[:, others].logsumexp(1, keepdim=True)
        x = torch.cat([background, x[:, [c + 1 for c in labels]]], 1)
        return x, torch.cat([1 - y.amax(1, keepdim=True), y], 1)


def _patterns(known: Tensor, device: torch.device) -> list[tuple[list[int], Tensor]]:
    """Known labels and positions of the samples that have the same ones; samples without any are left out."""
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


def _softmax_ce(x: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy [N, 1, *S] of logits and one-hot masks [N, K, *S]."""
    return -(torch.log_softmax(x, 1) * y).sum(1, keepdim=True)
