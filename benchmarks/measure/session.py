"""One run: its options, and the way every case takes from providers to rows."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastfilm.machine import gpu_is_lost

from ..counted.inside import float32_products
from ..counted.roofline import Ceilings, Work
from . import providers as forms
from .harness import (
    Budget,
    Call,
    Clock,
    Effort,
    TookTooLong,
    best,
    paired,
    paired_ratio,
    peak_bytes,
    time_limit,
    without_search,
)
from .journal import DeviceLost, Journal
from .providers import one_line
from .record import (
    EAGER,
    FAILED,
    NO_TIME,
    PLAUSIBLE,
    SKIPPED,
    Record,
    Row,
    relative_error,
    wrong_layout,
)

Results = list[Tensor | None]

COMPILE_LEAST = 25.0
"""Seconds that must be left for torch.compile to be tried."""

REFERENCE_SHARE = 0.3
"""Most of the time left that the reference of one case may take."""


@dataclass(frozen=True)
class Provider:
    """Something to measure.

    Attributes:
        call: does the work once.
        check: gives what is compared with the reference, where that is not the result of ``call``.
        saved: bytes kept for the backward pass, if that is of interest.
        memory: the call that peak memory is taken of, where that is not ``call``.
        note: a remark that goes with the row.
    """

    call: Callable[[], Results]
    saved: Callable[[], int] | None = None
    check: Callable[[], Results] | None = None
    note: str = ""
    memory: Callable[[], object] | None = None


@dataclass(frozen=True)
class Case:
    """What all providers of one comparison share."""

    suite: str
    case: str
    mode: str
    dtype: str
    work: Work | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.suite}: {self.case}, {self.mode}, {self.dtype}"


@dataclass
class Session:
    """Options and state of a run.

    Attributes:
        budget: when no first call of a provider is started or goes on any more.
        end: when no call at all is started any more; None: with ``budget``.
        graphs: whether the model suite also replays its steps from CUDA graphs.
        running: the case and provider at work.
        journal: what is noted of it for a process that goes on after this one.
        volume: voxels [X, Y, Z] to cut patches from, or None before they are needed.
        compile_seconds: bound of one compilation.
        slow_to_compile: compiled providers that ran into that bound on a whole network.
        baseline: providers of which the fastest is the one that ratios refer to.
        compile_kinds: compiled providers to measure; None: all.
        static_rows: file of a run of the static suite, for the gate.
        update_gate: write the gate's figures down instead of comparing with them.
    """

    device: str
    dtypes: list[str]
    quick: bool
    effort: Effort
    budget: Budget
    record: Record
    clock: Clock
    ceilings: Ceilings
    volume: str | None = None
    compile_seconds: float = 60.0
    baseline: tuple[str, ...] = EAGER
    compile_kinds: tuple[str, ...] | None = None
    static_rows: str | None = None
    update_gate: bool = False
    verbose: bool = True
    end: Budget | None = None
    graphs: bool = False
    running: tuple[Case, str] | None = None
    journal: Journal = field(default_factory=Journal)
    slow_to_compile: set[str] = field(default_factory=set)
    told: set[tuple[str, str, str]] = field(default_factory=set)

    def why_not(self, provider: str) -> str | None:
        """Why a compiled provider is left out of this run, or not tried now; None if it is tried."""
        reason = forms.why_not_compile(self.device, self.quick)
        if reason is not None:
            return reason
        kinds = self.compile_kinds
        if kinds is not None and provider not in kinds:
            return "left out of this run; --compile all measures it"
        return None if self.budget.left() >= COMPILE_LEAST else NO_TIME

    def compile(
        self,
        provider: str,
        mode: str | None,
        function: Callable[..., Any],
        first: Callable[..., object],
    ) -> tuple[Callable[..., Any] | None, str]:
        """``function`` by torch.compile in a mode, run once by ``first(compiled)``; or None and why not."""
        self.say(f"compiling for {provider}")
        seconds = min(self.compile_seconds, self.budget.left())
        made, reason = forms.compiled(function, mode, first, seconds)
        if "took longer" in reason and seconds < self.compile_seconds:
            reason = f"{NO_TIME}: {reason}"
        return made, reason

    def say(self, text: str) -> None:
        """Progress, on stderr: stdout is for the table."""
        if self.verbose:
            print(text, file=sys.stderr, flush=True)

    def row(self, case: Case, provider: str, **values: Any) -> Row:
        """A row of ``case``."""
        return Row(
            case.suite,
            case.case,
            provider,
            case.mode,
            case.dtype,
            self.device,
            extra=dict(case.extra),
            **values,
        )

    def skip(self, case: Case, provider: str, reason: str) -> None:
        """Records that a provider was left out, and why; the same reason once a suite, want of time always."""
        told = (case.suite, provider, reason)
        if told not in self.told or reason.startswith(NO_TIME):
            self.told.add(told)
            self.record.add(self.row(case, provider, status=SKIPPED, note=reason))

    def _right(self, errors: Mapping[str, float]) -> list[str]:
        """The baseline's layouts without one that computes something else."""
        known = [errors[n] for n in self.baseline if n in errors]
        least = min(known, default=0.0)
        return [n for n in self.baseline if n not in errors or not wrong_layout(errors[n], least)]

    def _yardstick(self, errors: Mapping[str, float], dtype: str) -> float | None:
        """Eager's error: the larger of its layouts' that is plausible, else the smaller."""
        known = [errors[n] for n in self.baseline if n in errors]
        plausible = [e for e in known if e <= PLAUSIBLE[dtype]]
        return max(plausible) if plausible else min(known, default=None)

    def _first_run(
        self, case: Case, name: str, provider: Provider
    ) -> tuple[Results | None, Row | None]:
        """The provider's result, or the row that says why there is none."""
        if self.budget.spent():
            return None, self.row(case, name, status=SKIPPED, note=NO_TIME)
        self.running = case, name
        failed = FAILED if name.startswith("fastfilm") else SKIPPED
        reason = self.journal.why_not(str(case), name)
        if reason is not None:
            return None, self.row(case, name, status=failed, note=reason)
        try:
            with time_limit(self.budget.left(), "the first call"), self.noting(case, name):
                return (provider.check or provider.call)(), None
        except NotImplementedError as error:
            return None, self.row(case, name, status=SKIPPED, note=one_line(error))
        except Exception as error:  # a peer that cannot run is a finding; one of ours is a failure
            if "the first call took longer" in str(error):  # a compiler may have wrapped it
                return None, self.row(
                    case, name, status=SKIPPED, note=f"{NO_TIME} for the first call"
                )
            if isinstance(error, DeviceLost):
                raise
            return None, self.row(case, name, status=failed, note=one_line(error))

    @contextlib.contextmanager
    def noting(self, case: Case, name: str, seconds: float | None = None) -> Iterator[None]:
        """Journals the block; an error in it that costs the process its GPU becomes DeviceLost."""
        with self.journal.doing(str(case), name, seconds):
            try:
                yield
                if self.device == "cuda":
                    torch.cuda.synchronize()
            except Exception as error:
                if gpu_is_lost():
                    raise DeviceLost(one_line(error)) from error
                raise

    def measure(
        self,
        case: Case,
        providers: Mapping[str, Provider],
        reference: Callable[[], Results] | None = None,
        pooled: bool = False,
        beside: Collection[str] = (),
    ) -> None:
        """Checks, then times the providers of one case side by side and adds their rows.

        Args:
            reference: the same function in float64; errors are norm-relative against it.
            pooled: whether all tensors but the first are a network's gradient, of which one norm is
                taken; otherwise the worst error of all tensors counts.
            beside: providers that are timed again for the others' sake, without a row.
        """
        key = f"{case}: {', '.join(n for n in providers if n not in beside)}"
        if self.journal.finished(key):
            return
        reason = NO_TIME if self.budget.spent() else self.journal.why_not(str(case), "rounds")
        if reason is not None:
            for name in [n for n in providers if n not in beside] if beside else ["all"]:
                self.skip(case, name, reason)
            return
        self.say(str(case))
        with float32_products(case.dtype == "tf32"):
            rows = self._measure(case, providers, reference, pooled)
        self.running = None
        for row in rows:
            if row.provider not in beside:
                self.record.add(row)
        self.journal.finish(key)

    def _truth(self, reference: Callable[[], Results]) -> tuple[Results | None, str]:
        """The reference's results, or None and why nothing can be checked."""
        try:
            most = REFERENCE_SHARE * self.budget.left()
            with without_search(), time_limit(most, "the reference"):
                return reference(), ""
        except TookTooLong as error:
            return None, f"not checked: {error}"
        except torch.OutOfMemoryError:
            return None, "not checked: the reference needs more memory than there is"

    def _measure(
        self,
        case: Case,
        providers: Mapping[str, Provider],
        reference: Callable[[], Results] | None,
        pooled: bool,
    ) -> list[Row]:
        self.running = case, "reference"
        truth, unchecked = (None, "") if reference is None else self._truth(reference)
        refused: list[Row] = []
        errors: dict[str, float] = {}
        gradients: dict[str, float] = {}
        rows: dict[str, Row] = {}
        outputs: dict[str, Tensor] = {}
        for name, provider in providers.items():
            result, row = self._first_run(case, name, provider)
            if result is None:
                assert row is not None
                refused.append(row)
                continue
            if truth is not None:
                split = 1 if pooled else len(result)
                errors[name] = relative_error(result[:split], truth[:split])
                if result[split:]:
                    gradients[name] = relative_error(result[split:], truth[split:], pooled=True)
            if result[0] is not None:
                outputs[name] = result[0].detach()
            note = "; ".join(filter(None, (provider.note, unchecked)))
            rows[name] = self.row(case, name, note=note)
            del result
            with self.noting(case, name):
                rows[name].peak_bytes = peak_bytes(provider.memory or provider.call, self.device)
                if provider.saved is not None:
                    rows[name].saved_bytes = provider.saved()
        calls: dict[str, Call] = {n: providers[n].call for n in rows}
        self.running = case, "rounds"
        with self.noting(case, "rounds"):
            times = paired(calls, self.clock, self.effort, budget=self.end or self.budget)
        right = self._right({n: max(e, gradients.get(n, 0.0)) for n, e in errors.items()})
        baseline = best(times, right)
        # the faster layout is not known where one of them was left out
        missing = [r.provider for r in refused if r.note.startswith(NO_TIME)]
        partial = [n for n in missing if n in self.baseline]
        for name, row in rows.items():
            if times[name]:
                row.timed(times[name], case.work).extra["rounds"] = len(times[name])
            else:
                row.status, row.note = SKIPPED, f"{NO_TIME}: checked, not timed"
            if name in errors:
                row.error = errors[name]
                row.eager_error = self._yardstick(errors, case.dtype)
            if name in gradients:
                row.extra["grad_error"] = gradients[name]
                row.extra["eager_grad_error"] = self._yardstick(gradients, case.dtype)
            if name in self.baseline and name not in right:
                row.status, row.note = FAILED, "this layout gives a wrong result"
            elif partial:
                row.note = "; ".join(filter(None, (row.note, f"no ratio without {partial[0]}")))
            elif baseline is not None:
                row.ratio = paired_ratio(times[baseline], times[name])
                if name != baseline and baseline in outputs:
                    row.extra["max_abs_diff"] = _difference(outputs[name], outputs[baseline])
        return [*rows.values(), *refused]


def _difference(a: Tensor, b: Tensor) -> float | None:
    if a.shape != b.shape:
        return None
    return float((a.float() - b.float()).abs().max())
