"""Configuration -> the algorithm's records. A configuration section and its record have the same field names."""

from __future__ import annotations

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
from imaml_dist.config.algorithm import AlgorithmConfig, StrengthConfig

ALGORITHMS = {"imaml": IMAML, "maml": MAML, "fomaml": FOMAML, "reptile": Reptile, "anil": ANIL, "meta_sgd": MetaSGD}

INNER = {
    "gradient_descent": inner_records.GradientDescent,
    "momentum": inner_records.Momentum,
    "adam": inner_records.Adam,
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


def make_algorithm(config: AlgorithmConfig) -> Algorithm:
    """The algorithm's record."""
    facts: dict[str, Any] = _facts(config, "inner", "solver", "lam", "preset", "head")
    facts["inner"] = INNER[config.inner.kind](**_facts(config.inner))
    if config.kind == "imaml":
        facts["solver"] = SOLVERS[config.solver.kind](**_facts(config.solver))
        lam = config.lam
        facts["lam"] = ProximalStrength(**lam.model_dump()) if isinstance(lam, StrengthConfig) else lam
    if config.kind == "anil":
        facts["head"] = tuple(config.head)
    algorithm: Algorithm = ALGORITHMS[config.kind](**facts)
    return algorithm


def _facts(section: BaseModel, *besides: str) -> dict[str, Any]:
    return section.model_dump(exclude={"kind", *besides})
