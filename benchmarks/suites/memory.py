"""Bytes a FiLMed U-Net keeps for its backward pass: a count, the same on every machine."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch

import fastfilm

from .. import providers
from ..eager import FilmForm
from ..networks import NETWORKS
from ..record import FAILED
from ..session import Case, Session
from ..step import Step
from .model import one_hot, twin

LIMIT = 0.75
"""Most that fastfilm may keep, as a part of what eager with broadcast γ and β keeps."""

FORMS: tuple[tuple[str, FilmForm], ...] = (
    ("eager", "broadcast"),
    ("paper", "expanded"),
    ("eager-no-film", "none"),
)

NETWORK = replace(NETWORKS[0], batch=1)


def run(session: Session) -> None:
    """One forward pass of each form, float32, with saved-tensor hooks."""
    torch.manual_seed(0)
    case = Case("memory", NETWORK.case, "training", "float32", extra={"filters": 64, "depth": 4})
    session.say(f"memory: {NETWORK.case}")
    image = torch.randn(1, 1, *NETWORK.size).to(session.device)
    batch = (image, one_hot(1, session.device), image)
    model = NETWORK.build().to(session.device)
    step = partial(Step, mode="training", dtype="float32")
    steps = {}
    for name, form in FORMS:
        network = model if form == "broadcast" else NETWORK.build(form).to(session.device)
        if form == "expanded":
            network.load_state_dict(model.state_dict())
        steps[name] = step(network, *batch)
    usable, missing = providers.backends(session.device)
    ours = twin(model).to(session.device)
    for name in usable:
        scope = partial(fastfilm.backend, name)
        steps[f"fastfilm-{name}"] = step(ours, *batch, layout="channels-last", scope=scope)
    eager_bytes = steps["eager"].saved()
    expected = steps["eager"].forward().detach()
    for name, one in steps.items():
        kept = one.saved()
        part = kept / eager_bytes
        row = session.row(case, name, saved_bytes=kept, note=f"{part:.2f} of eager's")
        row.extra["saved_ratio"] = part
        if name.startswith("fastfilm"):
            out = one.forward()
            row.extra["max_abs_diff"] = float((out - expected).detach().abs().max())
            if name != "fastfilm-reference" and not part <= LIMIT:
                row.status, row.note = FAILED, f"{row.note}; at most {LIMIT} allowed"
        session.record.add(row)
    for name, reason in missing:
        session.skip(case, f"fastfilm-{name}", reason)
