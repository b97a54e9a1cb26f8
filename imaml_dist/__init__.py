"""imaml_dist: distributed meta-learning with implicit gradients. Importing it loads torch and no other vendor."""

from imaml_dist.algorithms.learner import MetaLearner, cross_entropy
from imaml_dist.algorithms.records import FOMAML, IMAML, ConjugateGradient, GradientDescent
from imaml_dist.core.curvature import gauss_newton_operator, hessian_operator
from imaml_dist.core.implicit import MetaGradient, implicit_meta_gradient
from imaml_dist.core.inner.gradient_descent import gradient_descent
from imaml_dist.core.linear.conjugate_gradient import conjugate_gradient
from imaml_dist.core.linear.solution import LinearSolution, Outcome
from imaml_dist.core.outcome import TaskOutcome
from imaml_dist.core.proximal.scalar import ScalarProximal
from imaml_dist.core.vector import ParameterLayout
from imaml_dist.errors import ImamlError
from imaml_dist.models.conv4 import Conv4
from imaml_dist.models.functional import FunctionalModel
from imaml_dist.models.mlp import MLP
from imaml_dist.tasks.episode import EpisodeBatch, TaskSource
from imaml_dist.training.evaluation import Evaluation, evaluate

__all__ = [
    "FOMAML",
    "IMAML",
    "MLP",
    "ConjugateGradient",
    "Conv4",
    "EpisodeBatch",
    "Evaluation",
    "FunctionalModel",
    "GradientDescent",
    "ImamlError",
    "LinearSolution",
    "MetaGradient",
    "MetaLearner",
    "Outcome",
    "ParameterLayout",
    "ScalarProximal",
    "TaskOutcome",
    "TaskSource",
    "conjugate_gradient",
    "cross_entropy",
    "evaluate",
    "gauss_newton_operator",
    "gradient_descent",
    "hessian_operator",
    "implicit_meta_gradient",
]
