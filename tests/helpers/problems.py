"""Few-shot problems small enough for dense algebra: quadratics with a closed form, and a tanh network."""

from dataclasses import dataclass

import torch
from helpers.algebra import spd
from torch import Tensor

from imaml_dist.core.curvature import gauss_newton_operator


@dataclass(frozen=True)
class Quadratics:
    """Support loss `1/2 phi'H phi - b'phi` and query loss `1/2 ||phi - c||^2`, one of each per task.

    With `phi* = (H + lam I)^-1 (b + lam theta)` the meta-gradient is `lam (H + lam I)^-1 (phi* - c)`.
    """

    hessian: Tensor
    linear: Tensor
    target: Tensor

    @staticmethod
    def random(tasks: int, size: int, seed: int) -> "Quadratics":
        generator = torch.Generator().manual_seed(seed)
        draw = lambda: torch.randn(tasks, size, dtype=torch.float64, generator=generator)  # noqa: E731
        return Quadratics(spd(tasks, size, seed), draw(), draw())

    def support_loss(self, phi: Tensor) -> Tensor:
        return 0.5 * torch.einsum("ti,tij,tj->t", phi, self.hessian, phi) - (self.linear * phi).sum(-1)

    def query_loss(self, phi: Tensor) -> Tensor:
        return 0.5 * ((phi - self.target) ** 2).sum(-1)

    def to(self, dtype: torch.dtype) -> "Quadratics":
        return Quadratics(self.hessian.to(dtype), self.linear.to(dtype), self.target.to(dtype))

    def gauss_newton(self, at: Tensor):
        """The same support loss as least squares, `1/2 ||L'phi - L^-1 b||^2` with `H = L L'`: its Gauss-Newton matrix is H."""
        lower = torch.linalg.cholesky(self.hessian)
        targets = torch.linalg.solve_triangular(lower, self.linear.unsqueeze(-1), upper=False).squeeze(-1)
        return gauss_newton_operator(
            lambda phi: torch.einsum("tji,tj->ti", lower, phi), lambda z: 0.5 * ((z - targets) ** 2).sum(-1), at
        )

    def _system(self, lam: float) -> Tensor:
        return self.hessian + lam * torch.eye(self.linear.shape[1], dtype=torch.float64)

    def solution(self, theta: Tensor, lam: float) -> Tensor:
        return torch.linalg.solve(self._system(lam), self.linear + lam * theta)

    def meta_gradient(self, theta: Tensor, lam: float) -> Tensor:
        return lam * torch.linalg.solve(self._system(lam), self.solution(theta, lam) - self.target)


@dataclass(frozen=True)
class TanhRegression:
    """A 1-4-1 tanh network per task (P = 13) whose support Hessian is indefinite, but whose `H + lam I` is not."""

    support_x: Tensor
    support_y: Tensor
    query_x: Tensor
    query_y: Tensor

    SIZE = 13

    @staticmethod
    def random(tasks: int, seed: int) -> "TanhRegression":
        generator = torch.Generator().manual_seed(seed)
        draw = lambda *shape: torch.randn(*shape, dtype=torch.float64, generator=generator)  # noqa: E731
        return TanhRegression(draw(tasks, 7, 1), 2 * draw(tasks, 7, 1), draw(tasks, 9, 1), 2 * draw(tasks, 9, 1))

    @staticmethod
    def predict(params: Tensor, x: Tensor) -> Tensor:
        w1, b1, w2, b2 = params.split([4, 4, 4, 1], dim=-1)
        hidden = torch.tanh(x @ w1[:, None, :] + b1[:, None, :])
        return hidden @ w2[:, :, None] + b2[:, None, :]

    @staticmethod
    def mean_squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
        return ((outputs - targets) ** 2).mean((1, 2))

    def support_loss(self, params: Tensor) -> Tensor:
        return self.mean_squared_error(self.predict(params, self.support_x), self.support_y)

    def query_loss(self, params: Tensor) -> Tensor:
        return self.mean_squared_error(self.predict(params, self.query_x), self.query_y)

    def task(self, t: int) -> "TanhRegression":
        one = slice(t, t + 1)
        return TanhRegression(self.support_x[one], self.support_y[one], self.query_x[one], self.query_y[one])


def dense_hessian(objective, at: Tensor) -> Tensor:
    """`[T, P, P]` Hessians the naive way: torch's own dense Hessian of every task alone."""
    tasks, size = at.shape
    rows = []
    for t in range(tasks):

        def loss(row: Tensor, t: int = t) -> Tensor:
            return objective(torch.cat([at[:t], row[None], at[t + 1 :]]))[t]

        rows.append(torch.autograd.functional.hessian(loss, at[t]))
    return torch.stack(rows).reshape(tasks, size, size)


def dense_gauss_newton(predict, loss, at: Tensor) -> Tensor:
    """`[T, P, P]` matrices `J'SJ` the naive way, task by task."""
    rows = []
    for t in range(at.shape[0]):

        def whole(row: Tensor, t: int = t) -> Tensor:
            return torch.cat([at[:t], row[None], at[t + 1 :]])

        def outputs(row: Tensor, t: int = t) -> Tensor:
            return predict(whole(row))[t].flatten()

        everything = predict(at).detach()

        def loss_of(z: Tensor, t: int = t, everything: Tensor = everything) -> Tensor:
            shaped = z.reshape(everything[t].shape)[None]
            return loss(torch.cat([everything[:t], shaped, everything[t + 1 :]]))[t]

        jacobian = torch.autograd.functional.jacobian(outputs, at[t])
        rows.append(jacobian.T @ torch.autograd.functional.hessian(loss_of, everything[t].flatten()) @ jacobian)
    return torch.stack(rows)


def minimise(objective, anchor: Tensor, lam: float) -> Tensor:
    """As `minimise_with`, for `Lambda = lam I`."""
    return minimise_with(objective, anchor, lam * torch.eye(anchor.shape[1], dtype=anchor.dtype))


def minimise_with(objective, anchor: Tensor, matrix: Tensor, start: Tensor | None = None) -> Tensor:
    """The minimiser of `L(phi) + 1/2 (phi - theta)' Lambda (phi - theta)` per task, by dense damped Newton steps."""
    phi = (anchor if start is None else start).clone()
    identity = torch.eye(anchor.shape[1], dtype=anchor.dtype)

    def value(p: Tensor) -> Tensor:
        return objective(p) + 0.5 * ((p - anchor) @ matrix * (p - anchor)).sum(-1)

    for _ in range(100):
        at = phi.clone().requires_grad_(True)
        (gradient,) = torch.autograd.grad(value(at).sum(), at)
        size = float(gradient.abs().max())
        if size < 1e-14:
            break
        hessian = dense_hessian(value, phi)
        smallest = torch.linalg.eigvalsh(hessian)[:, :1, None]
        step = torch.linalg.solve(hessian + torch.clamp(1e-3 - smallest, min=0.0) * identity, gradient)
        length = torch.ones(anchor.shape[0], 1, dtype=anchor.dtype)
        # Close to the minimum the decrease drowns in rounding, and a plain Newton step is the accurate one.
        while size > 1e-6 and not bool((better := value(phi - length * step) <= value(phi)).all()):
            length = torch.where(better[:, None], length, 0.5 * length)
        phi = phi - length * step
    return phi
