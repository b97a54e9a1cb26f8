"""The cells of `operators.py`: which settings are tried for which method, and what is changed about the best implicit one."""

RATES = ("0.001", "0.003", "0.01")
"""Outer rates that every method is tried with."""

SETTINGS: dict[str, dict[str, list[str]]] = {
    "imaml": {f"lam {lam}": [f"algorithm.lam={lam}"] for lam in ("0.03", "0.1", "0.3")},
    "fomaml": {
        f"{steps} of {lr}": ["algorithm.kind=fomaml", f"algorithm.inner.lr={lr}", f"algorithm.inner.steps={steps}"]
        for lr, steps in (("0.1", 16), ("0.1", 5), ("0.4", 5))
    },
    "reptile": {
        f"{steps} of {lr}": ["algorithm.kind=reptile", f"algorithm.inner.lr={lr}", f"algorithm.inner.steps={steps}"]
        for lr, steps in (("0.1", 16), ("0.1", 6), ("0.03", 16))
    },
    "maml": {
        f"{steps} of {lr}": ["algorithm.kind=maml", f"algorithm.inner.lr={lr}", f"algorithm.inner.steps={steps}"]
        for lr, steps in (("0.4", 1), ("0.1", 5), ("0.4", 5))
    },
    "reference": {
        f"{steps} of {lr}": ["algorithm.preset=reference", f"algorithm.inner.lr={lr}", f"algorithm.inner.steps={steps}"]
        for lr, steps in (("0.1", 16), ("0.1", 5), ("0.4", 5))
    },
}
"""Three settings for each method; with the outer rates nine trials for each."""

HESSIAN = ["algorithm.solver.operator=hessian", "algorithm.solver.on_negative_curvature=gauss_newton"]
SILU = ["model.activation=silu"]

LBFGS8 = ["algorithm.inner.kind=lbfgs", "algorithm.inner.steps=8"]


def by_layer(body: float, head: float) -> list[str]:
    """A strength for the head alone."""
    return [f"algorithm.lam={{kind: per_layer, init: {body}, layers: {{head: {head}}}}}"]


FACTORS: dict[str, list[str]] = {
    "Hessian, else Gauss-Newton": HESSIAN,
    "Hessian, truncated": ["algorithm.solver.operator=hessian"],
    "exact Gauss-Newton (dual)": ["algorithm.solver.kind=dual"],
    "1 CG step": ["algorithm.solver.max_iterations=1"],
    "2 CG steps": ["algorithm.solver.max_iterations=2"],
    "10 CG steps": ["algorithm.solver.max_iterations=10"],
    "CG to 0.1, at most 20": ["algorithm.solver.max_iterations=20", "algorithm.solver.rtol=0.1"],
    "5 CG steps, Nystrom 5": ["algorithm.solver.preconditioner=nystrom", "algorithm.solver.rank=5"],
    "damping 0.1": ["algorithm.solver.damping=0.1"],
    "4 inner steps": ["algorithm.inner.steps=4"],
    "8 inner steps": ["algorithm.inner.steps=8"],
    "32 inner steps": ["algorithm.inner.steps=32"],
    "8 inner steps of 0.2": ["algorithm.inner.steps=8", "algorithm.inner.lr=0.2"],
    "inner tolerance 0.03": ["algorithm.inner.tolerance=0.03"],
    "L-BFGS 8": LBFGS8,
    "L-BFGS 16": ["algorithm.inner.kind=lbfgs", "algorithm.inner.steps=16"],
    "Newton-CG 3": ["algorithm.inner.kind=newton_cg", "algorithm.inner.steps=3"],
    "Nesterov 8": ["algorithm.inner={kind: momentum, lr: 0.1, steps: 8, momentum: 0.5, nesterov: true}"],
    "SiLU": SILU,
    "GELU": ["model.activation=gelu"],
    "softplus": ["model.activation=softplus"],
    "softplus, beta 4": ["model.activation=softplus", "model.softplus_beta=4.0"],
    "learned lam": ["algorithm.lam.learn=true", "algorithm.lam.lr=0.01"],
    "learned lam per layer": ["algorithm.lam.kind=per_layer", "algorithm.lam.learn=true", "algorithm.lam.lr=0.01"],
    "learned diagonal lam": ["algorithm.lam.kind=diagonal", "algorithm.lam.learn=true", "algorithm.lam.lr=0.01"],
    "lam from 1 down": ["algorithm.lam.init=1.0", "algorithm.lam.schedule={kind: linear, to: 0.1, updates: 60}"],
    "lam 1, head 0.1": by_layer(1.0, 0.1),
    "lam 1, head 0.03": by_layer(1.0, 0.03),
    "lam 3, head 0.1": by_layer(3.0, 0.1),
    "lam 0.1, head 1": by_layer(0.1, 1.0),
    "SiLU, lam 1, head 0.1, L-BFGS 8": [*SILU, *by_layer(1.0, 0.1), *LBFGS8],
    "SiLU, lam 1, head 0.1, L-BFGS 8, Hessian": [*SILU, *by_layer(1.0, 0.1), *LBFGS8, *HESSIAN],
    "SiLU, lam 1, head 0.03, L-BFGS 8": [*SILU, *by_layer(1.0, 0.03), *LBFGS8],
    "SiLU, lam 3, head 0.1, L-BFGS 8": [*SILU, *by_layer(3.0, 0.1), *LBFGS8],
    "SiLU, lam 3, head 0.1, L-BFGS 8, Hessian": [*SILU, *by_layer(3.0, 0.1), *LBFGS8, *HESSIAN],
    "SiLU, lam 1, head 0.1": [*SILU, *by_layer(1.0, 0.1)],
    "lam 1, head 0.1, L-BFGS 8": [*by_layer(1.0, 0.1), *LBFGS8],
    "lam 1": ["algorithm.lam=1.0"],
    "outer eps 1e-3": ["outer.eps=0.001"],
    "SiLU, Hessian, else Gauss-Newton": [*SILU, *HESSIAN],
    "SiLU, Hessian, L-BFGS 16": [*SILU, *HESSIAN, "algorithm.inner.kind=lbfgs", "algorithm.inner.steps=16"],
    "SiLU, 8 inner steps": [*SILU, "algorithm.inner.steps=8"],
    "SiLU, L-BFGS 8": [*SILU, *LBFGS8],
}
"""What is changed about the best of imaml's nine trials, one thing at a time, and a few things together."""


def trials(method: str) -> dict[str, list[str]]:
    """The nine of a method."""
    return {
        f"{method}, {name}, rate {rate}": [*overrides, f"outer.lr={rate}"]
        for name, overrides in SETTINGS[method].items()
        for rate in RATES
    }
