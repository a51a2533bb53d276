"""A plan as a table for people and one line of JSON for programs."""

from __future__ import annotations

from typing import Any

import torch

from .plan import Plan
from .sizes import GIB

_RULE = "-" * 72


def plan_facts(plan: Plan) -> dict[str, Any]:
    """All figures: bytes, seconds, operations and the price's currency."""
    return {
        "parameters": plan.step.parameters,
        "trained": list(plan.step.trained),
        "trained_parameters": plan.step.trained_parameters,
        "micro_batch": plan.step.batch,
        "accumulation": plan.accumulation,
        "gpus": plan.machine.gpus,
        "memory": {name: round(size) for name, size in plan.memory.items()},
        "memory_total": round(plan.total_memory),
        "memory_step": plan.step.peak,
        "memory_validation": plan.step.validation_peak,
        "activations": plan.step.activations,
        "fits": plan.fits,
        "would_fit": None if plan.fit is None else vars(plan.fit),
        "flops_per_sample": _operation_facts(plan),
        "samples": plan.samples,
        "run_samples": plan.run_samples,
        "speed": {
            name: _speed_facts(plan, flops)
            for name, flops in (("as_configured", plan.flops), ("from_caches", plan.flops_from_caches))
            if flops
        },
        "disk": plan.disk,
    }


def _operation_facts(plan: Plan) -> dict[str, Any]:
    step, counted = plan.step, plan.flops is not None
    return {
        "forward": step.forward if counted else None,
        "backward": step.backward if counted else None,
        "encoding": step.encoding if counted else None,
        "total": plan.flops,
        "not_counted": list(step.uncounted),
    }


def _speed_facts(plan: Plan, flops: float) -> dict[str, float]:
    run, one_pass = plan.days(plan.run_samples, flops), plan.days(plan.samples, flops)
    return {
        "samples_per_second": plan.samples_per_second(flops),
        "days_of_the_run": run,
        "days_of_one_pass": one_pass,
        "cost_of_the_run": plan.cost(run),
        "cost_of_one_pass": plan.cost(one_pass),
    }


def plan_table(plan: Plan) -> str:
    """The same figures to read."""
    lines = [*_models(plan), _RULE, *_memory(plan), _RULE, *_speed(plan), _RULE, *_disk(plan)]
    return "\n".join(lines)


def _row(name: str, value: str, note: str = "") -> str:
    return f"{name:<34}{value:>16}  {note}".rstrip()


def _size(size: float) -> str:
    for unit, scale in (("TiB", 2**40), ("GiB", GIB), ("MiB", 2**20)):
        if size >= 0.995 * scale:
            return f"{size / scale:,.2f} {unit}"
    return f"{size / 2**10:,.1f} KiB"


def _operations(count: float) -> str:
    return f"{count / 1e12:,.3f} T" if count >= 1e11 else f"{count / 1e9:,.3f} G"


def _models(plan: Plan) -> list[str]:
    trained = plan.step.trained
    rows = [(name, count) for name, count in plan.step.parameters.items() if count]
    lines = [
        _row(f"parameters: {name}", f"{count:,}", "trained" if name in trained else "frozen")
        for name, count in rows
    ]
    return [*lines, _row("trained parameters", f"{plan.step.trained_parameters:,}")]


def _memory(plan: Plan) -> list[str]:
    machine, step = plan.machine, plan.step
    lines = [
        f"memory of one GPU, {step.batch} samples at once x {plan.accumulation} (accumulation) x"
        f" {machine.gpus} GPUs"
    ]
    lines += [_row(f"  {name}", _size(size)) for name, size in plan.memory.items() if size >= 2**10]
    left = machine.memory * GIB - plan.total_memory
    lines.append(_row("  in all", _size(plan.total_memory), f"of {machine.memory:g} GiB"))
    if plan.fits:
        lines.append(f"  fits, {_size(left)} left")
    elif plan.fit is not None:
        lines.append(
            f"  DOES NOT FIT. optimizer.accumulation={plan.fit.accumulation} ({plan.fit.micro_batch} samples"
            f" at once) would, with {_size(plan.fit.memory)}"
        )
    else:
        lines.append(
            "  DOES NOT FIT, and no smaller micro-batch would: use GPUs with more memory or smaller models"
        )
    if step.activations:
        shares = ", ".join(
            f"{name} {_size(size)}" for name, size in step.activations.items() if size >= 2**20
        )
        lines.append(f"  kept for the backward pass: {shares or 'below 1 MiB'}")
    return lines


def _speed(plan: Plan) -> list[str]:
    machine = plan.machine
    if plan.flops is None:
        return [
            f"operations, time and cost: not counted, because PyTorch {torch.__version__} has operators that"
            f" are not known here ({', '.join(plan.step.uncounted)})"
        ]
    lines = ["operations for a sample (a multiplication with its addition counts as two)"]
    lines += [_row(f"  forward: {name}", _operations(count)) for name, count in plan.step.forward.items()]
    lines.append(_row("  backward", _operations(plan.step.backward)))
    lines.append(f"at {machine.tflops:g} TFLOP/s x {machine.utilisation:g} x {machine.gpus} GPUs")
    speeds = [("as configured", plan.flops)]
    if plan.flops_from_caches is not None and plan.flops_from_caches < plan.flops:
        speeds.append(("from prepared caches", plan.flops_from_caches))
    for name, flops in speeds:
        lines.append(_row(f"  {name}", f"{plan.samples_per_second(flops):,.1f}/s", "samples"))
        for what, samples in (("the run", plan.run_samples), ("one pass", plan.samples)):
            days = plan.days(samples, flops)
            price = f", cost {plan.cost(days):,.0f}" if machine.price else ""
            lines.append(_row(f"    {what}", f"{days:,.2f} days", f"{samples:,} samples{price}"))
    return lines


def _disk(plan: Plan) -> list[str]:
    lines = [f"disk, {plan.samples:,} samples"]
    return lines + [_row(f"  {name}", _size(size)) for name, size in plan.disk.items()]
