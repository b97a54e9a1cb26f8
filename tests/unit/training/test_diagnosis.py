"""A diagnosis tells the implicit gradient from what only looks like it, and says of every task why it is or is not compared."""

import dataclasses
import math

import pytest
import torch
from torch import nn

from imaml_dist import FOMAML, IMAML, ConjugateGradient, EpisodeBatch, GradientDescent, MetaLearner, NewtonCG
from imaml_dist.algorithms.strength import ProximalStrength
from imaml_dist.core import differences
from imaml_dist.errors import InputError
from imaml_dist.training import diagnosis
from imaml_dist.training.diagnosis import Reference, System, TaskDiagnosis, diagnose
from imaml_dist.training.verdict import FACTS, summarised, verdict

EXACT_INNER = NewtonCG(steps=40, cg_iterations=60, operator="hessian", tolerance=1e-13)
EXACT_SOLVE = ConjugateGradient(max_iterations=200, operator="hessian", rtol=1e-13)


class Noise:
    """A `TaskSource` of 3-way episodes of random vectors; task 1 is `bad` where asked for."""

    def __init__(self, bad=False):
        self.bad = bad

    def episodes(self, step, tasks):
        generator = torch.Generator().manual_seed(7)
        x = torch.randn(2, 10, 6, 4, generator=generator, dtype=torch.float64)[:, list(tasks)]
        x[:, [self.bad and task == 1 for task in tasks]] = torch.nan
        y = torch.arange(3).repeat(len(tasks), 2)
        return EpisodeBatch(x[0], y, x[1], y, index=torch.tensor(list(tasks)))


def learner(inner=EXACT_INNER, solver=EXACT_SOLVE, lam=0.3, activation=nn.Tanh, execution="vmap", hidden=8):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, hidden), activation(), nn.Linear(hidden, 3)).double()
    return MetaLearner(model, IMAML(lam, inner, solver), execution=execution)


def dense_system(subject, task):
    """`H + Lambda` at the phi of a task, by torch's own dense Hessian."""
    problem = subject.problem(Noise().episodes(0, range(task, task + 1)), subject.meta_parameters())
    phi = subject.algorithm.adapt(problem).params[0]
    hessian = torch.autograd.functional.hessian(lambda row: problem.support_loss(row[None]).sum(), phi)
    return hessian + 0.3 * torch.eye(len(phi), dtype=phi.dtype)


@pytest.mark.parametrize("execution", ["vmap", "loop"])
def test_solved_exactly_it_is_the_implicit_gradient(execution):
    found = diagnose(learner(execution=execution), Noise(), 3)
    assert [task.task for task in found] == [0, 1, 2]
    for task in found:
        assert (task.outcome, task.solve, task.reference) == ("OK", "CONVERGED", "compared")
        assert task.stationarity < 1e-12 and task.residual < 1e-12 and task.reference_distance < 1e-8
        assert task.error < 1e-6 and task.difference_error < 1e-6
        eigenvalues = torch.linalg.eigvalsh(dense_system(learner(), task.task))
        assert task.smallest == pytest.approx(float(eigenvalues[0]), abs=task.smallest_bound + 1e-9)
        assert task.largest == pytest.approx(float(eigenvalues[-1]), rel=1e-9)
        assert task.gauss_newton_smallest == pytest.approx(0.3, rel=1e-9)  # 67 parameters, 18 outputs
        assert task.reference_smallest == pytest.approx(task.smallest, rel=1e-6)
    said = verdict(summarised(found))
    assert (
        "stationarity <= 0.05 on 100% of tasks; H + Lambda positive definite on 100%, proved not to be on 0%, undecided on 0%"
        in said
    )
    assert said.endswith("this is the implicit gradient.")


def test_any_lambda_is_compared_with_its_own_truth():
    for kind in ("diagonal", "kronecker"):
        subject = learner(lam=ProximalStrength(kind=kind, init=0.3, learn=True))
        with torch.no_grad():
            for parameter in subject.own.values():
                parameter += 0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)).double()
        (found,) = diagnose(subject, Noise(), 1)
        assert found.reference is Reference.COMPARED and found.error < 1e-6, kind


def test_what_is_not_solved_has_an_error_and_its_cause_is_told_apart():
    one_step = ConjugateGradient(max_iterations=1, operator="hessian")
    rough_inner = diagnose(learner(inner=GradientDescent(0.1, 2), lam=1.0), Noise(), 3)
    rough_solve = diagnose(learner(solver=one_step), Noise(), 3)
    for task in rough_inner:
        assert task.reference is Reference.COMPARED and task.error > 0.05 and task.difference_error < 1e-6
        assert task.stationarity > 0.1 and task.residual < 1e-12 and task.reference_distance > 0.1
    for task in rough_solve:  # one step of CG from zero: the first-order direction
        assert task.reference is Reference.COMPARED and task.error > 0.1
        assert task.stationarity < 1e-12 and task.residual > 0.05 and task.iterations == 1
        assert task.cosine == pytest.approx(1.0, abs=1e-12)
    said = verdict(summarised(rough_solve))
    assert "is the implicit gradient" not in said
    assert "with a median cosine of 1.0000 it is nearly the first-order one" in said


def test_gauss_newton_is_an_approximation_and_its_error_is_seen():
    found = diagnose(learner(solver=ConjugateGradient(max_iterations=200, rtol=1e-13)), Noise(), 3)
    for task in found:
        assert task.residual < 1e-12 and task.stationarity < 1e-12
        assert 1e-4 < task.error < 1


def test_where_minimisers_lie_on_kinks_nothing_is_compared_and_it_is_said():
    found = diagnose(learner(activation=nn.ReLU, hidden=40), Noise(), 3)
    unsolved = [task for task in found if task.reference is Reference.UNSOLVED]
    assert unsolved
    assert all(task.reference_stationarity > 1e-6 and math.isnan(task.error) for task in unsolved)
    summary = summarised(unsolved)
    assert summary["counts"]["references"]["unsolved"] == len(unsolved) and summary["error"]["tasks"] == 0
    assert f"central differences exist for 0 of {len(unsolved)} tasks only" in verdict(summary)


class Deaf(nn.Linear):
    """A network that does not listen to its parameters."""

    def forward(self, x):
        return super().forward(x) * 0.0


@pytest.mark.parametrize("why", [Reference.FLAT, Reference.MOVED_UNSOLVED, Reference.NO_DERIVATIVE])
def test_every_reason_against_the_differences_has_its_name(why, monkeypatch):
    subject = learner()
    if why is Reference.FLAT:
        subject = MetaLearner(Deaf(4, 3).double(), IMAML(0.3, EXACT_INNER, EXACT_SOLVE))
    elif why is Reference.MOVED_UNSOLVED:
        monkeypatch.setattr(differences, "ENOUGH", 0.0)  # so that no inner solve is exact enough
    else:
        monkeypatch.setattr(diagnosis, "AGREE", 0.0)  # nor any difference
    (found,) = diagnose(subject, Noise(), 1)
    assert found.reference is why and math.isnan(found.error)
    assert (found.difference_error > 0) == (why is Reference.NO_DERIVATIVE)


def test_a_bad_task_is_counted_and_changes_no_other():
    whole, spoilt = (diagnose(learner(), Noise(bad), 3) for bad in (False, True))
    assert (spoilt[1].outcome, spoilt[1].reference) == ("BAD_EPISODE", "excluded")
    assert (spoilt[0], spoilt[2]) == (whole[0], whole[2])
    counts = summarised(spoilt)["counts"]
    assert counts["outcomes"] == {"BAD_EPISODE": 1, "OK": 2} and counts["solves"] == {"CONVERGED": 2}
    assert (counts["tasks"], counts["stationary"], counts["positive_definite"]) == (3, 2, 2)
    assert (counts["not_positive_definite"], counts["undecided"]) == (0, 1)


def test_progress_is_told():
    told = []
    diagnose(learner(inner=GradientDescent(0.1, 1)), Noise(bad=True), 2, progress=lambda *done: told.append(done))
    assert told == [(1, 2), (2, 2)]


def test_what_has_no_implicit_gradient_is_refused():
    subject = MetaLearner(nn.Linear(4, 3).double(), FOMAML(GradientDescent(0.1, 1)))
    with pytest.raises(InputError, match="algorithm: FOMAML given, but only IMAML has an implicit gradient"):
        diagnose(subject, Noise(), 1)
    with pytest.raises(InputError, match=r"torch.float32, central differences need float64; use model.double\(\)"):
        diagnose(MetaLearner(nn.Linear(4, 3), IMAML()), Noise(), 1)


def _task(**facts):
    usual = {"solve": "CONVERGED", "stationarity": 0.01, "system": System.POSITIVE_DEFINITE, "cosine": 0.8}
    return TaskDiagnosis(0, "OK", **usual | {"reference": Reference.COMPARED, "error": 0.05} | facts)


@pytest.mark.parametrize(
    ("tasks", "says"),
    [
        ([_task()] * 4, "undecided on 0%; median error of the meta-gradient 0.05 over the 4 of 4 tasks that can be compared "
         "(90% of these: <= 0.05): this is the implicit gradient."),
        ([_task(error=0.3)] * 4, "this is a rough approximation of the implicit gradient."),
        ([_task(error=0.8)] * 4, "this is not the implicit gradient."),
        ([_task(cosine=0.995)] * 4, "; with a median cosine of 0.9950 it is nearly the first-order one."),
        ([_task(system=System.NOT_POSITIVE_DEFINITE)] + [_task(stationarity=0.2)] * 3,
         "on 25% of tasks; H + Lambda positive definite on 75%, proved not to be on 25%, undecided on 0%;"),
        ([_task(system=System.UNDECIDED), _task()], "positive definite on 50%, proved not to be on 0%, undecided on 50%;"),
        ([_task()] * 2 + [_task(reference=Reference.FLAT, error=math.nan)], "over the 2 of 3 tasks that can be compared (90% of these"),
        ([_task()] + [_task(reference=Reference.NO_MINIMISER, error=math.nan)] * 2, "central differences exist for 1 of 3 tasks only"),
        ([TaskDiagnosis(0, "NON_FINITE")] * 2, "central differences exist for 0 of 2 tasks only"),
    ],
)  # fmt: skip
def test_the_verdict_is_what_the_numbers_say(tasks, says):
    assert says in verdict(summarised(tasks))


def test_quantiles_are_those_of_the_tasks_that_have_the_number():
    tasks = [_task(error=value) for value in (*torch.linspace(0, 1, 21).tolist(), math.nan)]
    found = summarised(tasks)
    assert set(found) == {*FACTS, "counts"}
    names = {field.name for field in dataclasses.fields(TaskDiagnosis)}
    assert set(FACTS) < names and set(_task().to_dict()) == names
    expected = {"tasks": 21, "p5": 0.05, "median": 0.5, "p90": 0.9, "p95": 0.95}
    assert found["error"] == pytest.approx(expected)
