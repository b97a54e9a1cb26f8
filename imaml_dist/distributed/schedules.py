"""The algorithm as it is at a point of a run, where its numbers follow a schedule or the residuals."""

from __future__ import annotations

from imaml_dist.algorithms.learner import MetaLearner
from imaml_dist.config.algorithm import AlgorithmConfig, ConjugateGradientConfig, IMAMLConfig, StrengthConfig
from imaml_dist.distributed.build_algorithm import cg_steps, lam_of, make_algorithm
from imaml_dist.tracking.metrics_file import Record
from imaml_dist.training.schedule import ResidualCap
from imaml_dist.training.state import MetaState


def first_cap(algorithm: AlgorithmConfig) -> ResidualCap | None:
    """The cap that a run begins with, if it adapts."""
    if not isinstance(algorithm, IMAMLConfig) or not isinstance(algorithm.solver, ConjugateGradientConfig):
        return None
    return None if algorithm.solver.adapt is None else ResidualCap(algorithm.solver.max_iterations)


def follow(algorithm: AlgorithmConfig, learner: MetaLearner, state: MetaState) -> None:
    """Give the learner the algorithm of the state's next update."""
    if _varies(algorithm):
        learner.algorithm = make_algorithm(algorithm, state.updates, state.cap)


def count(algorithm: AlgorithmConfig, state: MetaState, residual: float) -> None:
    """Let the residual of an update that was applied move the cap, if it adapts."""
    if state.cap is not None:
        assert isinstance(algorithm, IMAMLConfig) and isinstance(algorithm.solver, ConjugateGradientConfig)
        assert algorithm.solver.adapt is not None
        state.cap = state.cap.after(residual, algorithm.solver.adapt)


def values(algorithm: AlgorithmConfig, state: MetaState) -> Record:
    """For the metrics of the state's next update: what changes, and nothing of what does not."""
    if not isinstance(algorithm, IMAMLConfig):
        return {}
    lam, solver = algorithm.lam, algorithm.solver
    found: Record = {}
    if isinstance(lam, StrengthConfig) and lam.schedule is not None:
        found["algorithm_lam"] = lam_of(lam, state.updates)
    if isinstance(solver, ConjugateGradientConfig) and (solver.schedule is not None or solver.adapt is not None):
        found["algorithm_cg_steps"] = cg_steps(solver, state.updates, state.cap)
    return found


def _varies(algorithm: AlgorithmConfig) -> bool:
    if not isinstance(algorithm, IMAMLConfig):
        return False
    lam, solver = algorithm.lam, algorithm.solver
    return (isinstance(lam, StrengthConfig) and lam.schedule is not None) or (
        isinstance(solver, ConjugateGradientConfig) and (solver.schedule is not None or solver.adapt is not None)
    )
