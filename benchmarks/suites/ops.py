"""Single blocks: fastfilm's op beside eager PyTorch, the paper's form and torch.compile."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

import fastfilm

from ..counted.deciding_layers import Block
from ..counted.inside import COEF_ROWS, defined_map, float32_products
from ..counted.roofline import DTYPES, Layer, work, yardstick
from ..measure import providers
from ..measure.record import NO_TIME
from ..measure.session import Case, Provider, Session
from ..subjects import blocks
from ..subjects.blocks import Tensors
from . import tails

PAPER, NNUNET, FILM = "conv-act-norm-film", "conv-norm-act-film", "conv-norm-film-act"


def cases(session: Session) -> list[Block]:
    """Representative blocks, the most telling first; sized for the device."""
    if session.device == "cuda":
        return [
            Block(Layer(64, 64, (320, 256)), 16, "batch", "relu", PAPER),
            Block(Layer(32, 32, (128, 128, 128)), 2, "instance", "leaky_relu", NNUNET),
            Block(Layer(1, 64, (320, 256), input_grad=False), 16, "batch", "relu", PAPER),
            Block(Layer(256, 256, (80, 64)), 16, "batch", "relu", PAPER),
            Block(Layer(64, 64, (320, 256)), 16, "group", "silu", FILM),
            Block(Layer(64, 128, (64, 64, 64), stride=2), 2, "instance", "leaky_relu", NNUNET),
        ]
    scale = 64 if session.quick else 96
    deep = 16 if session.quick else 24
    return [
        Block(Layer(64, 64, (scale, scale)), 2, "batch", "relu", PAPER),
        Block(Layer(32, 32, (deep, deep, deep)), 2, "instance", "leaky_relu", NNUNET),
        Block(Layer(1, 64, (2 * scale, scale), input_grad=False), 2, "batch", "relu", PAPER),
        Block(Layer(256, 256, (scale // 4, scale // 4)), 2, "batch", "relu", PAPER),
        Block(Layer(64, 64, (scale, scale)), 2, "group", "silu", FILM),
    ]


def apply_pass(session: Session, dtype: str) -> None:
    """The pass that writes a pending map: its bandwidth beside a copy's."""
    shape = (16, 64, 320, 256) if session.device == "cuda" else (2, 64, 96, 96)
    y = torch.randn(shape, device=session.device).to(DTYPES[dtype])
    y = providers.channels_last(y)
    coef = torch.rand(COEF_ROWS, *shape[:2], device=session.device)
    case = Case("ops", f"apply {'×'.join(map(str, shape))}", "forward", dtype)
    with torch.no_grad():
        # two ways to the same number: the definition where it is checked, the kernel where it is timed
        candidates = {
            "eager-channels-last": Provider(lambda: [defined_map(y, coef, "relu")]),
            "fastfilm": Provider(lambda: [fastfilm.materialise(y, coef, "relu")]),
        }
        exact = coef.double()
        session.measure(case, candidates, lambda: [defined_map(y.double(), exact, "relu")])
    moved = 2 * y.numel() * y.element_size()
    for row in session.record.rows[-2:]:
        if row.case == case.case and row.median_s:
            row.gbps = moved / row.median_s / 1e9
            row.extra["fraction_of_copy"] = moved / row.median_s / session.ceilings.bandwidth


def run(session: Session) -> None:
    """Everything in every dtype, torch.compile last."""
    plain(session)
    compiled(session)


def plain(session: Session) -> None:
    """Small passes, then every block, forward and forward with backward."""
    for dtype in session.dtypes:
        if session.budget.spent():
            session.skip(Case("ops", "small passes", "inference", dtype), "all", NO_TIME)
            continue
        apply_pass(session, dtype)
        tails.measure(session, dtype)
    _each(session, _plain, "all")


def compiled(session: Session) -> None:
    """torch.compile on every block, timed beside the plain ones."""
    _each(session, _compiled, "compile")


def _each(session: Session, measure: Callable[[Session, Block, Case], None], who: str) -> None:
    for dtype in session.dtypes:
        for block in cases(session):
            for mode in ("forward", "forward+backward"):
                case = Case(
                    "ops",
                    f"{block.layer.label} b{block.batch} {block.norm} {block.order}",
                    mode,
                    dtype,
                    work([block.layer], block.batch, dtype, mode, session.ceilings),
                )
                if session.budget.spent():
                    session.skip(case, who, NO_TIME)
                else:
                    measure(session, block, case)


def _eager(block: Block, source: Tensors, case: Case) -> dict[str, Provider]:
    """Both layouts in plain PyTorch."""
    function, storage = partial(blocks.eager, block), DTYPES[case.dtype]
    plain, last = source.to(storage), source.to(storage, "channels-last")
    return {
        "eager": provider(function, plain, case.mode),
        "eager-channels-last": provider(function, last, case.mode),
    }


def _truth(session: Session, block: Block, source: Tensors, case: Case) -> list[Tensor | None]:
    exact = source.to(DTYPES[yardstick(session.device, case.dtype)])
    return blocks.results(partial(blocks.definition, block), exact, case.mode)


def _plain(session: Session, block: Block, case: Case) -> None:
    storage = DTYPES[case.dtype]
    source = blocks.make(block, session.device, storage)
    last = source.to(storage, "channels-last")
    expanded = partial(blocks.eager, block, expanded=True)
    candidates = _eager(block, source, case)
    if session.device == "cuda":
        candidates["fastfilm"] = provider(partial(blocks.fused, block), last, case.mode)
    candidates["paper"] = provider(expanded, source.to(storage), case.mode)
    usable, missing = providers.backends(session.device)
    for name in usable:
        candidates[f"fastfilm-{name}"] = provider(_forced(block, name), last, case.mode)
    session.measure(case, candidates, partial(_truth, session, block, source, case))
    for name, reason in missing:
        session.skip(case, f"fastfilm-{name}", reason)


def _compiled(session: Session, block: Block, case: Case) -> None:
    kinds = {}
    for name, kind in providers.compile_modes(session.device).items():
        reason = session.why_not(name)
        if reason is None:
            kinds[name] = kind
        else:
            session.skip(case, name, reason)
    if not kinds:
        return
    storage = DTYPES[case.dtype]
    source = blocks.make(block, session.device, storage)
    last = source.to(storage, "channels-last")
    candidates: dict[str, Provider] = {}
    # compiled in the mode it is timed in: a training graph is another program
    first = partial(blocks.results, t=last, mode=case.mode)
    for name, kind in kinds.items():
        with float32_products(case.dtype == "tf32"):
            function, reason = session.compile(name, kind, partial(blocks.eager, block), first)
        if function is None:
            session.skip(case, name, reason)
        else:
            candidates[name] = provider(function, last, case.mode)
    if candidates:
        eager = _eager(block, source, case)
        reference = partial(_truth, session, block, source, case)
        session.measure(case, eager | candidates, reference, beside=eager)


def provider(function: Callable[[Tensors], Tensor], t: Tensors, mode: str) -> Provider:
    """A block function on its tensors."""
    saved = None if mode == "forward" else partial(blocks.saved, function, t)
    return Provider(partial(blocks.results, function, t, mode), saved)


def _forced(block: Block, backend: str) -> Callable[[Tensors], Tensor]:
    def function(t: Tensors) -> Tensor:
        with fastfilm.backend(backend):
            return blocks.fused(block, t)

    return function
