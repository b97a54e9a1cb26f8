"""Curvature products against dense Hessians and Jacobians in float64."""

import torch
from helpers.algebra import matvec_of
from helpers.problems import Quadratics, TanhRegression, dense_hessian

from imaml_dist.core.curvature import gauss_newton_operator, hessian_operator

TASKS = 3


def _point(size):
    return torch.randn(TASKS, size, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


def test_hessian_products_equal_the_dense_hessian():
    problem, at, v = TanhRegression.random(TASKS, seed=1), _point(13), _point(13) + 1
    dense = dense_hessian(problem.support_loss, at)
    product = hessian_operator(problem.support_loss, at)
    torch.testing.assert_close(product(v), matvec_of(dense)(v), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(product(2 * v), 2 * product(v), rtol=1e-14, atol=1e-14)


def test_hessian_of_a_quadratic_is_its_matrix_and_of_a_linear_loss_zero():
    problem, at, v = Quadratics.random(TASKS, 6, seed=2), _point(6), _point(6) - 2
    torch.testing.assert_close(
        hessian_operator(problem.support_loss, at)(v), matvec_of(problem.hessian)(v), rtol=1e-12, atol=1e-12
    )
    assert (hessian_operator(lambda p: p.sum(-1), at)(v) == 0).all()


def test_gauss_newton_products_equal_the_dense_j_s_j():
    problem, at, v = TanhRegression.random(TASKS, seed=3), _point(13), _point(13) + 1
    samples = problem.support_y.shape[1]
    product = gauss_newton_operator(
        lambda p: problem.predict(p, problem.support_x), lambda o: problem.mean_squared_error(o, problem.support_y), at
    )(v)
    for t in range(TASKS):
        one = problem.task(t)
        jacobian = torch.autograd.functional.jacobian(
            lambda row: one.predict(row[None], one.support_x).flatten(), at[t]
        )
        dense = (2 / samples) * jacobian.T @ jacobian  # the squared error's own Hessian at the outputs is 2/n
        torch.testing.assert_close(product[t], dense @ v[t], rtol=1e-12, atol=1e-12)


def test_gauss_newton_is_the_hessian_where_the_model_is_linear_and_psd_where_the_hessian_is_not():
    generator = torch.Generator().manual_seed(6)
    x, y = torch.randn(TASKS, 8, 4, dtype=torch.float64, generator=generator), torch.zeros(TASKS, 8, dtype=torch.int64)

    def predict(params):
        return x @ params.reshape(TASKS, 4, 3)

    def loss(outputs):
        return -torch.log_softmax(outputs, -1).gather(-1, y[..., None]).mean((1, 2))

    at, v = _point(12), _point(12) + 1
    gauss_newton = gauss_newton_operator(predict, loss, at)
    torch.testing.assert_close(
        gauss_newton(v), hessian_operator(lambda p: loss(predict(p)), at)(v), rtol=1e-11, atol=1e-12
    )

    problem, at = TanhRegression.random(TASKS, seed=3), _point(13)
    indefinite = torch.linalg.eigvalsh(dense_hessian(problem.support_loss, at)).min()
    assert indefinite < -1e-2
    operator = gauss_newton_operator(
        lambda p: problem.predict(p, problem.support_x), lambda o: problem.mean_squared_error(o, problem.support_y), at
    )
    basis = torch.eye(13, dtype=torch.float64)
    dense = torch.stack([operator(basis[i].expand(TASKS, -1)) for i in range(13)], dim=2)
    assert torch.linalg.eigvalsh(dense).min() > -1e-12
