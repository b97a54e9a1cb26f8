"""Is it an implicit gradient? What the meta-gradient of a run's tasks is made of, and how far from the truth it is.

Everything is done in float64 at the run's own meta-parameters, with its own inner solver, Lambda and linear solver. The truth is
`F(theta) = L_query(phi*(theta))` by central differences, with `phi*` solved far beyond what training does (`core.differences`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor

from imaml_dist.algorithms.imaml import IMAML
from imaml_dist.algorithms.learner import MetaLearner
from imaml_dist.algorithms.part import Part
from imaml_dist.algorithms.problem import Samples, TaskProblem
from imaml_dist.algorithms.record import TaskRecord, task_outcome
from imaml_dist.core.curvature import Matvec
from imaml_dist.core.differences import central_differences, nearby_minimiser
from imaml_dist.core.linear.solution import Outcome
from imaml_dist.core.outcome import TaskOutcome
from imaml_dist.core.proximal.protocol import Proximal
from imaml_dist.core.spectrum import Ritz, lanczos
from imaml_dist.errors import InputError
from imaml_dist.tasks.episode import EpisodeBatch, TaskSource

LANCZOS_STEPS = 50
DIRECTIONS = 4

GOAL = 1e-8
"""Stationarity that the reference solve is asked for ..."""

SOLVED = 1e-6
"""... and the one that counts as solved; a network with kinks may have no point below it."""

AGREE = 0.1
"""Relative error of the differences, above which there is no derivative to compare with."""

STEP = 1e-4
"""Length of the larger move of theta, in units of `||phi* - theta||`."""


class System(StrEnum):
    """What the Ritz values say of `H + Lambda` at phi."""

    POSITIVE_DEFINITE = "positive_definite"
    """The smallest one, less its bound, is above rounding: an eigenvalue lies there, and none was found below it."""
    NOT_POSITIVE_DEFINITE = "not_positive_definite"
    """The smallest one is negative beyond rounding, which proves it."""
    UNDECIDED = "undecided"
    """Neither, or there is no system."""

    @staticmethod
    def of(found: Ritz) -> System:
        """Of a single task."""
        if bool(found.positive):
            return System.POSITIVE_DEFINITE
        return System.NOT_POSITIVE_DEFINITE if bool(found.not_positive) else System.UNDECIDED


class Reference(StrEnum):
    """What became of the comparison with central differences."""

    COMPARED = "compared"
    EXCLUDED = "excluded"
    """The run itself leaves such a task out of the mean (`outcome` says why)."""
    UNSOLVED = "unsolved"
    """No `phi*` was found with a stationarity of at most `SOLVED`."""
    NO_MINIMISER = "no_minimiser"
    """`H + Lambda` is proved not to be positive definite at the stationary point that was found."""
    MOVED_UNSOLVED = "moved_unsolved"
    """An inner solve at a moved theta failed."""
    FLAT = "flat"
    """All differences are zero, so that there is nothing that an error could be relative to."""
    NO_DERIVATIVE = "no_derivative"
    """`difference_error` is above `AGREE`."""


@dataclass(frozen=True)
class TaskDiagnosis:
    """One task; nan where a number does not exist.

    Attributes:
        task: its number.
        outcome: name of its `TaskOutcome`.
        stationarity: `||grad G(phi)|| / ||grad G(theta)||` where the run's inner solver ends.
        distance: `||phi - theta||`.
        smallest, largest: Ritz values of `H + Lambda` at phi, of what adapts, and within which bound of each an eigenvalue lies.
        system: what they say.
        gauss_newton_smallest, gauss_newton_largest: Ritz values of the Gauss-Newton matrix + Lambda.
        solve: name of the linear solver's `Outcome`.
        iterations, residual: of that solve.
        cosine: of the meta-gradient g to the first-order one.
        reference: what became of the comparison.
        reference_stationarity: the one that `phi*` reached.
        reference_distance: `||phi - phi*|| / ||phi* - theta||`.
        reference_smallest: smallest Ritz value of `H + Lambda` at `phi*`.
        error: `sqrt(mean_k (d'g - q_k)^2 / mean_k q_k^2)` over random directions d, q the central differences. It estimates
            `||g - g*|| / ||g*||`, with `DIRECTIONS` = 4 of them to a factor of about two.
        difference_error: the same between q and the differences of twice the step, or those before the last Newton step of the
            inner solves, whichever is larger: how exact q is, as far as these can show (`core.differences.Quotients`).
    """

    task: int
    outcome: str
    stationarity: float = math.nan
    distance: float = math.nan
    smallest: float = math.nan
    smallest_bound: float = math.nan
    largest: float = math.nan
    largest_bound: float = math.nan
    system: System = System.UNDECIDED
    gauss_newton_smallest: float = math.nan
    gauss_newton_largest: float = math.nan
    solve: str | None = None
    iterations: int = 0
    residual: float = math.nan
    cosine: float = math.nan
    reference: Reference = Reference.EXCLUDED
    reference_stationarity: float = math.nan
    reference_distance: float = math.nan
    reference_smallest: float = math.nan
    error: float = math.nan
    difference_error: float = math.nan

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return asdict(self)


def diagnose(
    learner: MetaLearner,
    source: TaskSource,
    tasks: int,
    *,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> list[TaskDiagnosis]:
    """Diagnose tasks 0 .. `tasks` - 1 of step 0 of a source, one after the other; a task's numbers depend on nothing but it.

    Args:
        learner: of `IMAML`, in float64.
        source: of episodes in float64.
        tasks: >= 1.
        device: of the learner's model.
        progress: called with (tasks done, tasks in all).

    Raises:
        InputError: the learner's algorithm solves no linear system, or its parameters are not float64.
    """
    if not isinstance(learner.algorithm, IMAML):
        raise InputError(
            f"algorithm: {type(learner.algorithm).__name__} given, but only IMAML has an implicit gradient to diagnose; give a run of imaml"
        )
    if (theta := learner.meta_parameters()).dtype != torch.float64:
        raise InputError(
            f"the model's parameters are {theta.dtype}, central differences need float64; use model.double()"
        )
    found = []
    for task in range(tasks):
        found.append(_diagnosed(learner, learner.algorithm, source.episodes(0, range(task, task + 1)).to(device)))
        if progress is not None:
            progress(task + 1, tasks)
    return found


def _diagnosed(learner: MetaLearner, algorithm: IMAML, episode: EpisodeBatch) -> TaskDiagnosis:
    task = int(episode.index)
    usable, valid = learner.usable(episode)
    if not bool(valid):
        return TaskDiagnosis(task, TaskOutcome.BAD_EPISODE.name)
    problem = learner.problem(usable, learner.meta_parameters())
    part = algorithm.part(problem)
    proximal = algorithm.proximal(part.problem)
    inner, meta = algorithm.meta_gradient(problem)
    exclude = getattr(algorithm.solver, "on_negative_curvature", "truncate") == "exclude"
    outcome = TaskOutcome(int(task_outcome(inner, meta, valid, exclude)))
    record = TaskRecord.of(torch.zeros(1), inner, meta, problem.query_accuracy(), problem.anchor)
    random, phi = _random(int(episode.key), DIRECTIONS + 1, inner.params), inner.params[:, part.places]
    start = random[:1, part.places]
    hessian = _extremes(part.problem.linearise("hessian")(phi).curvature, proximal, start)
    gauss_newton = _extremes(part.problem.gauss_newton(phi), proximal, start)
    diagnosis = TaskDiagnosis(
        task,
        outcome.name,
        stationarity=float(record.stationarity),
        distance=float(record.distance),
        smallest=float(hessian.smallest),
        smallest_bound=float(hessian.smallest_bound),
        largest=float(hessian.largest),
        largest_bound=float(hessian.largest_bound),
        system=System.of(hessian),
        gauss_newton_smallest=float(gauss_newton.smallest),
        gauss_newton_largest=float(gauss_newton.largest),
        solve=Outcome(int(record.cg_outcome)).name,
        iterations=int(record.cg_iterations),
        residual=float(record.cg_residual),
        cosine=float(record.cosine),
    )
    if outcome is not TaskOutcome.OK:
        return diagnosis
    at_once = 1 if learner.execution == "loop" else 2 * DIRECTIONS
    return _compared(diagnosis, algorithm, part, proximal, phi, meta.gradient[0], random, at_once)


def _compared(
    diagnosis: TaskDiagnosis,
    algorithm: IMAML,
    part: Part,
    proximal: Proximal,
    phi: Tensor,
    gradient: Tensor,
    random: Tensor,
    at_once: int,
) -> TaskDiagnosis:
    """The diagnosis with what follows from `phi*`."""
    problem, theta = part.problem, part.problem.anchor
    first = torch.linalg.vector_norm(problem.linearise("hessian")(theta).gradient, dim=-1)
    best, left = nearby_minimiser(problem.support_loss, theta, phi, GOAL * first, proximal=proximal, damping=1.0)
    reached = 0.0 if float(left) == 0 else float(left / first)
    system = _extremes(problem.linearise("hessian")(best).curvature, proximal, random[:1, part.places])
    moved = float(torch.linalg.vector_norm(best - theta))
    diagnosis = replace(
        diagnosis,
        reference_stationarity=reached,
        reference_smallest=float(system.smallest),
        reference_distance=float(torch.linalg.vector_norm(phi - best)) / moved if moved else 0.0,
    )
    if not reached <= SOLVED:
        return replace(diagnosis, reference=Reference.UNSOLVED)
    if System.of(system) is System.NOT_POSITIVE_DEFINITE:
        return replace(diagnosis, reference=Reference.NO_MINIMISER)
    directions = random[1:]
    found = central_differences(
        lambda rows: algorithm.part(_repeated(part.whole, rows)).problem,
        part.whole.anchor[0],
        best[0],
        directions,
        STEP * (moved or 1.0) / directions.shape[1] ** 0.5,  # a Gaussian direction is about sqrt(P) long
        proximal=proximal,
        at_once=at_once,
    )
    if not bool(torch.stack([found.values, found.wide, found.rough]).isfinite().all()):
        return replace(diagnosis, reference=Reference.MOVED_UNSOLVED)
    if not bool(found.values.any()):
        return replace(diagnosis, reference=Reference.FLAT)
    own = max(_relative(found.wide, found.values), _relative(found.rough, found.values))
    if own > AGREE:
        return replace(diagnosis, reference=Reference.NO_DERIVATIVE, difference_error=own)
    error = _relative(directions @ gradient, found.values)
    return replace(diagnosis, reference=Reference.COMPARED, error=error, difference_error=own)


def _repeated(problem: TaskProblem, rows: Tensor) -> TaskProblem:
    """A single task at every one of the meta-parameters `[R, P]`."""

    def repeated(value: Tensor) -> Tensor:
        return value.expand(len(rows), *value.shape[1:]).contiguous()

    def all_of(samples: Samples) -> Samples:
        key = None if samples.key is None else repeated(samples.key)
        return Samples(repeated(samples.x), repeated(samples.y), key)

    support, query = all_of(problem.support), all_of(problem.query)
    return replace(problem, anchor=rows, support=support, query=query, query_outputs=[])


def _extremes(curvature: Matvec, proximal: Proximal, start: Tensor) -> Ritz:
    """Of `C + Lambda`."""
    return lanczos(lambda p: proximal.add_to(curvature(p), p), start, LANCZOS_STEPS)


def _relative(guess: Tensor, truth: Tensor) -> float:
    """`||guess - truth|| / ||truth||`, truth not zero."""
    return float(torch.linalg.vector_norm(guess - truth) / torch.linalg.vector_norm(truth))


def _random(key: int, rows: int, like: Tensor) -> Tensor:
    """Gaussian rows `[rows, P]` that follow from a task's key alone."""
    drawn = torch.randn(rows, like.shape[1], generator=torch.Generator().manual_seed(key), dtype=like.dtype)
    return drawn.to(like.device)
