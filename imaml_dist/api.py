"""What `imaml_dist` offers by name."""

from imaml_dist.algorithms.anil import ANIL
from imaml_dist.algorithms.fomaml import FOMAML
from imaml_dist.algorithms.imaml import IMAML
from imaml_dist.algorithms.inner import LBFGS, Adam, GradientDescent, Momentum, NewtonCG
from imaml_dist.algorithms.learner import MetaLearner
from imaml_dist.algorithms.linear import ConjugateGradient, Direct, Dual, Minres, Neumann, Nystrom
from imaml_dist.algorithms.loss import cross_entropy, mean_squared_error
from imaml_dist.algorithms.maml import MAML
from imaml_dist.algorithms.meta_sgd import MetaSGD
from imaml_dist.algorithms.reptile import Reptile
from imaml_dist.algorithms.strength import ProximalStrength
from imaml_dist.core.curvature import gauss_newton_operator, hessian_operator
from imaml_dist.core.implicit import MetaGradient, implicit_meta_gradient
from imaml_dist.core.inner.gradient_descent import gradient_descent
from imaml_dist.core.inner.lbfgs import lbfgs
from imaml_dist.core.inner.newton_cg import newton_cg
from imaml_dist.core.linear.conjugate_gradient import conjugate_gradient
from imaml_dist.core.linear.direct import direct
from imaml_dist.core.linear.dual import dual_gauss_newton
from imaml_dist.core.linear.minres import minres
from imaml_dist.core.linear.neumann import neumann
from imaml_dist.core.linear.nystrom import nystrom, nystrom_preconditioner
from imaml_dist.core.linear.solution import LinearSolution, Outcome
from imaml_dist.core.linear.system import ProximalSystem
from imaml_dist.core.outcome import TaskOutcome
from imaml_dist.core.proximal.diagonal import DiagonalProximal, PerLayerProximal
from imaml_dist.core.proximal.kronecker import KroneckerProximal
from imaml_dist.core.proximal.low_rank import LowRankProximal
from imaml_dist.core.proximal.scalar import ScalarProximal
from imaml_dist.core.unrolled import unrolled_meta_gradient
from imaml_dist.core.vector import ParameterLayout
from imaml_dist.errors import ImamlError
from imaml_dist.models.conv4 import Conv4
from imaml_dist.models.functional import FunctionalModel
from imaml_dist.models.mlp import MLP
from imaml_dist.tasks.episode import EpisodeBatch, TaskSource
from imaml_dist.training.evaluation import Evaluation, evaluate

__all__ = [
    "ANIL",
    "FOMAML",
    "IMAML",
    "LBFGS",
    "MAML",
    "MLP",
    "Adam",
    "ConjugateGradient",
    "Conv4",
    "DiagonalProximal",
    "Direct",
    "Dual",
    "EpisodeBatch",
    "Evaluation",
    "FunctionalModel",
    "GradientDescent",
    "ImamlError",
    "KroneckerProximal",
    "LinearSolution",
    "LowRankProximal",
    "MetaGradient",
    "MetaLearner",
    "MetaSGD",
    "Minres",
    "Momentum",
    "Neumann",
    "NewtonCG",
    "Nystrom",
    "Outcome",
    "ParameterLayout",
    "PerLayerProximal",
    "ProximalStrength",
    "ProximalSystem",
    "Reptile",
    "ScalarProximal",
    "TaskOutcome",
    "TaskSource",
    "conjugate_gradient",
    "cross_entropy",
    "direct",
    "dual_gauss_newton",
    "evaluate",
    "gauss_newton_operator",
    "gradient_descent",
    "hessian_operator",
    "implicit_meta_gradient",
    "lbfgs",
    "mean_squared_error",
    "minres",
    "neumann",
    "newton_cg",
    "nystrom",
    "nystrom_preconditioner",
    "unrolled_meta_gradient",
]
