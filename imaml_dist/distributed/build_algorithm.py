"""Configuration -> the algorithm's records. A configuration section and its record have the same field names."""

from __future__ import annotations

import math
from typing import Any

from pydantic import BaseModel

from imaml_dist.algorithms import inner as inner_records
from imaml_dist.algorithms import linear as linear_records
from imaml_dist.algorithms.algorithm import Algorithm
from imaml_dist.algorithms.anil import ANIL
from imaml_dist.algorithms.fomaml import FOMAML
from imaml_dist.algorithms.imaml import IMAML
from imaml_dist.algorithms.maml import MAML
from imaml_dist.algorithms.meta_sgd import MetaSGD
from imaml_dist.algorithms.reptile import Reptile
from imaml_dist.algorithms.strength import ProximalStrength
from imaml_dist.config.algorithm import AlgorithmConfig, ConjugateGradientConfig, StrengthConfig
from imaml_dist.training.schedule import ResidualCap, scheduled

ALGORITHMS = {"imaml": IMAML, "maml": MAML, "fomaml": FOMAML, "reptile": Reptile, "anil": ANIL, "meta_sgd": MetaSGD}

INNER = {
    "gradient_descent": inner_records.GradientDescent,
    "momentum": inner_records.Momentum,
    "adam": inner_records.Adam,
    "lbfgs": inner_records.LBFGS,
    "newton_cg": inner_records.NewtonCG,
}

SOLVERS = {
    "conjugate_gradient": linear_records.ConjugateGradient,
    "minres": linear_records.Minres,
    "neumann": linear_records.Neumann,
    "nystrom": linear_records.Nystrom,
    "dual": linear_records.Dual,
    "direct": linear_records.Direct,
}


def make_algorithm(config: AlgorithmConfig, updates: int = 0, cap: ResidualCap | None = None) -> Algorithm:
    """The algorithm's record, as of the update that follows `updates` applied ones.

    Args:
        config: of the algorithm.
        updates: applied so far.
        cap: of the linear solver's iterations, where it adapts to residuals.
    """
    facts: dict[str, Any] = _facts(config, "inner", "solver", "lam", "preset", "head", "adapts")
    facts["inner"] = INNER[config.inner.kind](**_facts(config.inner))
    if config.kind == "imaml":
        solver = _facts(config.solver, "schedule", "adapt")
        if isinstance(config.solver, ConjugateGradientConfig):
            solver["max_iterations"] = cg_steps(config.solver, updates, cap)
        facts["solver"] = SOLVERS[config.solver.kind](**solver)
        facts["adapts"] = tuple(config.adapts)
        facts["lam"] = lam = config.lam
        if isinstance(lam, StrengthConfig):
            facts["lam"] = ProximalStrength(**_strength(lam) | {"init": lam_of(lam, updates)})
    if config.kind == "anil":
        facts["head"] = tuple(config.head)
    algorithm: Algorithm = ALGORITHMS[config.kind](**facts)
    return algorithm


def lam_of(config: StrengthConfig, updates: int) -> float:
    """Lambda's initial value, or where its schedule is after so many updates."""
    return scheduled(config.init, config.schedule, updates)


def cg_steps(config: ConjugateGradientConfig, updates: int, cap: ResidualCap | None = None) -> int:
    """Iterations of the linear solver at most, after so many updates."""
    return cap.cap if cap is not None else math.floor(scheduled(config.max_iterations, config.schedule, updates) + 0.5)


def _strength(section: StrengthConfig) -> dict[str, Any]:
    return section.model_dump(exclude={"schedule"}) | {"layers": tuple(section.layers.items())}


def _facts(section: BaseModel, *besides: str) -> dict[str, Any]:
    return section.model_dump(exclude={"kind", *besides})
