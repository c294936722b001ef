"""Floor, estimate, measured time and limiter of every layer of the model suite's networks; several GPUs."""

from __future__ import annotations

from ..counted.deciding_layers import Block
from ..counted.roofline import Layer, work
from ..measure import table
from ..measure.harness import median_call
from ..measure.session import Case, Session
from ..subjects import expected_time
from ..subjects.layers import LayerStep, steady
from ..subjects.networks import Network
from .model import networks

GPUS = (1, 2, 4, 8)
MODES = ("training", "inference")


def run(session: Session) -> None:
    """Prints a table for each network, dtype and mode, and adds its lines to the record."""
    for network in networks(session):
        parameters = sum(p.numel() for p in network.build().parameters())
        for dtype in session.dtypes:
            found = {}
            for mode in MODES:
                measured = measure(session, network, dtype, mode)
                found[mode] = expected_time.lines(
                    network, mode, dtype, session.ceilings, measured, fused=session.device == "cuda"
                )
                show(session, network, dtype, mode, found[mode])
            forward, training = (sum(line.seconds for line in found[m]) for m in reversed(MODES))
            steps = expected_time.planned(forward, training, parameters, GPUS)
            print("\nthe estimated training step under DDP, all-reduce at NVLink 4's assumed rate:")
            print(
                "\n".join(
                    table.align([expected_time.PARALLEL_HEAD, *expected_time.parallel_rows(steps)])
                )
            )


def block_of(network: Network, layer: Layer) -> Block:
    """The layer with its network's norm, activation and order."""
    return Block(layer, network.batch, network.norm, network.act, network.order)


def measure(session: Session, network: Network, dtype: str, mode: str) -> dict[Layer, float]:
    """Median seconds of each distinct layer as the automatic choice runs it, while the budget lasts."""
    found: dict[Layer, float] = {}
    for layer in network.layers():
        if session.budget.spent():
            break
        session.say(f"explain: {layer.label}, {mode}, {dtype}")
        block = block_of(network, layer)
        step, _ = steady(LayerStep(block, session.device, dtype, mode), session.device)
        found[layer] = median_call(step, session.clock, session.effort)
    return found


def show(
    session: Session, network: Network, dtype: str, mode: str, found: list[expected_time.Line]
) -> None:
    """The table of one network; a row of the record for each line."""
    print(f"\n{network.case}, {mode}, {dtype}: time of each layer, all its occurrences together")
    print("\n".join(table.align([expected_time.HEAD, *expected_time.rows(found)])))
    for line in found:
        case = Case(
            "explain",
            f"{network.case}: {line.layer.label}",
            mode,
            dtype,
            extra={
                "network": network.case,
                "layer": line.layer.label,
                "count": line.count,
                "estimate_s": line.seconds,
                "limiter": line.estimate.limiter,
                "route": line.route,
                "terms_s": {
                    n: line.count * getattr(line.estimate.terms, n)
                    for n in ("dram", "l2", "matrix", "launch")
                },
            },
        )
        row = session.row(case, "fastfilm", median_s=line.measured, floor_s=line.floor)
        least = work([line.layer] * line.count, network.batch, dtype, mode, session.ceilings)
        row.extra["flops_per_byte"] = least.flops / least.bytes
        if line.measured:
            row.fraction_of_floor = line.floor / line.measured
            row.tflops = least.flops / line.measured / 1e12
            row.gbps = least.bytes / line.measured / 1e9
        session.record.add(row)
