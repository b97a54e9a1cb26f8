"""When the metrics of a run say that its implicit gradient is not one: every rule, with its threshold and what to do."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from imaml_dist.config.algorithm import IMAMLConfig
from imaml_dist.reporting.drawing import finite
from imaml_dist.reporting.reading import OUTCOMES
from imaml_dist.training.verdict import FIRST_ORDER, STATIONARY, UNSOLVED

MOST = 0.5
"""Share of the tasks whose linear solve may meet negative curvature."""

EXCLUDED = 0.01
"""Share of the tasks that may be excluded."""

SOLVED = 0.1
"""Residual up to which the linear system counts as solved; from there to `UNSOLVED` it is neither praised nor warned of."""

FIGURES = {
    "stationarity": "stationarity",
    "cg_residual": "residual of the linear solve",
    "cosine": "cosine to the first-order gradient",
}
"""Without any one of these nobody can say that all is well."""

ALL_WELL = (
    "By these figures it is one: the inner problem is solved, the linear system too, and the curvature turns the gradient. "
    "imaml diagnose measures its error."
)


@dataclass(frozen=True)
class Caution:
    """One thing that is not as the implicit function theorem wants it.

    Attributes:
        short: the figure and its threshold, in a few words.
        meaning: what it means for the gradient, a sentence.
        advice: what to do, a sentence.
    """

    short: str
    meaning: str
    advice: str


def cautions(records: Sequence[Mapping[str, Any]]) -> list[Caution] | None:
    """What the last tenth of a run of `imaml` gives reason to doubt; None where no meta-step has recorded how it was solved.

    Figures are medians over the steps of the last tenth, shares are of their tasks.

    Args:
        records: of `metrics.jsonl`, in order of step.
    """
    late = _last(records)
    stationarity, residual, cosine = (_median(late, key) for key in ("stationarity", "cg_residual", "cosine"))
    solves = sum(_sum(late, key) for key in OUTCOMES)
    if stationarity is None and residual is None and not solves:
        return None
    found = []
    if stationarity is not None and stationarity > STATIONARY:
        found.append(
            Caution(
                f"stationarity {stationarity:.2g}, should be at most {STATIONARY}",
                "Adaptation ends far from a minimum of the inner objective, and only at a minimum does the formula hold.",
                "Let the head alone adapt (algorithm.adapts), take inner.kind lbfgs or newton_cg with a tolerance, more inner steps, or a "
                "larger lam; "
                "a network with kinks (ReLU, max pooling) may have no such minimum.",
            )
        )
    if residual is not None and residual > UNSOLVED:
        found.append(
            Caution(
                f"residual of the linear solve {residual:.2g}, should be at most {UNSOLVED}",
                "The linear system is hardly solved: the gradient is some way from the first-order one, but not at the implicit one.",
                "Raise solver.max_iterations or lam, take operator gauss_newton, or solver.kind dual, which is exact.",
            )
        )
    negative = _sum(late, "cg_negative_curvature")
    if solves and negative / solves > MOST:
        found.append(
            Caution(
                f"negative curvature in {negative / solves:.0%} of the linear solves, should be at most {MOST:.0%}",
                "The system is not positive definite where adaptation ends, so that end is no minimum, and most tasks take the fallback "
                "that solver.on_negative_curvature names.",
                "Let the head alone adapt (algorithm.adapts), whose system is positive definite; or solve the inner problem first "
                "(stationarity above), raise lam, or take operator gauss_newton.",
            )
        )
    if cosine is not None and cosine > FIRST_ORDER:
        found.append(
            Caution(
                f"cosine to the first-order gradient {cosine:.4f}, should be at most {FIRST_ORDER}",
                "The curvature hardly turns the gradient: this is nearly first-order MAML at the price of an implicit gradient.",
                "Lower lam or raise solver.max_iterations; or take algorithm.kind fomaml, which costs less.",
            )
        )
    excluded, tasks = _sum(late, "excluded"), _sum(late, "excluded") + _sum(late, "accepted")
    if tasks and excluded / tasks > EXCLUDED:
        found.append(
            Caution(
                f"{excluded / tasks:.1%} of the tasks excluded, should be at most {EXCLUDED:.0%}",
                "Their data, inner solve or linear solve cannot be used, and the mean is over the others alone.",
                "metrics.jsonl counts the reasons (excluded_*): mend the data, or lower the inner solver's rate.",
            )
        )
    return found


def all_well(records: Sequence[Mapping[str, Any]]) -> str:
    """What is said where `cautions` has found none: that all is well, or why that is more than the figures say."""
    if missing := _missing(records):
        return (
            f"No figure warns, but there are too few of them to call it one: {', '.join(missing)}, not recorded in at least half of the "
            "last steps. imaml diagnose measures its error."
        )
    residual = _median(_last(records), "cg_residual")
    if residual is not None and residual > SOLVED:
        return (
            "No figure warns: the inner problem is solved, and the curvature turns the gradient. But the linear system is solved "
            f"roughly at best (residual {residual:.2g}, solved is at most {SOLVED}). imaml diagnose measures the error of the gradient."
        )
    return ALL_WELL


def approximation(algorithm: IMAMLConfig) -> str:
    """Of what a run's gradient can at best be the implicit one, where its system is not `H + Lambda`; empty where it is."""
    solver = algorithm.solver
    parts = []
    if solver.kind == "dual" or solver.operator == "gauss_newton":
        parts.append("the Gauss-Newton matrix, positive semi-definite, stands in for the Hessian")
    if solver.damping:
        parts.append(f"solver.damping adds {solver.damping:g} to the diagonal")
    if algorithm.lam_offset:
        parts.append(f"lam_offset adds {algorithm.lam_offset:g} to lambda")
    if algorithm.reference_inner:
        parts.append("the inner problem that is descended has no proximal term")
    if not parts:
        return ""
    return (
        f"In the linear system of this run {', and '.join(parts)}: at best its gradient is the implicit gradient of that approximation, "
        "not of the inner problem itself."
    )


def in_short(records: Sequence[Mapping[str, Any]]) -> str:
    """One line for a table."""
    found = cautions(records)
    if found is None:
        return "-"
    if not found and (missing := _missing(records)):
        return f"no warning, but not recorded: {', '.join(missing)}"
    return "; ".join(caution.short for caution in found) or "no warning"


def _last(records: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    """The last tenth."""
    return records[-max(1, len(records) // 10) :]


def _missing(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names of the figures that at least half of the last tenth's steps have not, or not as a finite number."""
    late = _last(records)
    return [
        name
        for key, name in FIGURES.items()
        if 2 * sum(finite(record.get(key)) is not None for record in late) <= len(late)
    ]


def _median(records: Sequence[Mapping[str, Any]], key: str) -> float | None:
    values = [value for record in records if (value := finite(record.get(key))) is not None]
    return statistics.median(values) if values else None


def _sum(records: Sequence[Mapping[str, Any]], key: str) -> float:
    return sum(finite(record.get(key)) or 0.0 for record in records)
