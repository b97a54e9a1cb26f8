"""The cells of `operators.py`: which settings are tried for which method, and what is changed about the best implicit one."""

RATES = ("0.001", "0.003", "0.01")
"""Outer rates that every method is tried with."""


def descent(kind: str, rates: tuple[tuple[str, int], ...], *more: str) -> dict[str, list[str]]:
    """A method with so many steps of descent of each rate."""
    return {
        f"{steps} of {lr}": [kind, *more, f"algorithm.inner={{kind: gradient_descent, lr: {lr}, steps: {steps}}}"]
        for lr, steps in rates
    }


SETTINGS: dict[str, dict[str, list[str]]] = {
    "imaml": {f"lam {lam}": [f"algorithm.lam={lam}"] for lam in ("0.001", "0.003", "0.01")},
    "fomaml": descent("algorithm.kind=fomaml", (("0.1", 16), ("0.1", 5), ("0.4", 5))),
    "reptile": descent("algorithm.kind=reptile", (("0.1", 16), ("0.1", 6), ("0.03", 16))),
    "anil": descent("algorithm.kind=anil", (("0.1", 16), ("0.4", 5), ("0.4", 16))),
    "reference": descent("algorithm.preset=reference", (("0.1", 16), ("0.1", 5), ("0.4", 5))),
    "maml": descent("algorithm.kind=maml", (("0.1", 16), ("0.1", 5), ("0.4", 5))),
}
"""Three settings for each method; with the outer rates nine trials for each."""

GAUSS_NEWTON = ["algorithm.solver.operator=gauss_newton"]
RELU = ["model.activation=relu"]
ALL = ["algorithm.adapts=[]"]
DESCENT16 = ["algorithm.inner={kind: gradient_descent, lr: 0.1, steps: 16}"]
CG5 = ["algorithm.solver.max_iterations=5", "algorithm.solver.rtol=0"]
LBFGS8 = ["algorithm.inner={kind: lbfgs, steps: 8}"]
CG8 = ["algorithm.solver.max_iterations=8", "algorithm.solver.rtol=0"]
FALLBACK = ["algorithm.solver.on_negative_curvature=gauss_newton"]
FORMER = [*ALL, "algorithm.lam=0.1", *DESCENT16, *GAUSS_NEWTON, *CG5]
"""What was the default before: everything adapts, 16 steps of descent, Gauss-Newton."""


def by_layer(body: float, head: float) -> list[str]:
    """Everything adapts, with a strength for the head and one for the features; the true Hessian, L-BFGS."""
    strengths = f"algorithm.lam={{kind: per_layer, init: {body}, layers: {{head: {head}}}}}"
    return [*ALL, strengths, *LBFGS8, *CG8, *FALLBACK]


FACTORS: dict[str, list[str]] = {
    "all adapt, lam 0.1, descent 16, Gauss-Newton, ReLU": [*FORMER, *RELU],
    "all adapt, lam 0.1, descent 16, Gauss-Newton": FORMER,
    "all adapt, lam 0.1, descent 16, Hessian": [*FORMER, "algorithm.solver.operator=hessian", *FALLBACK],
    "all adapt, lam 0.1, L-BFGS 16, Hessian": [
        *FORMER,
        "algorithm.inner={kind: lbfgs, steps: 16}",
        "algorithm.solver.operator=hessian",
        *FALLBACK,
    ],
    "all adapt, lam 0.1, descent 16, dual": [*FORMER, "algorithm.solver={kind: dual}"],
    "all adapt, features 3, head 0.03": by_layer(3.0, 0.03),
    "all adapt, features 30, head 0.03": by_layer(30.0, 0.03),
    "all adapt, features 300, head 0.03": by_layer(300.0, 0.03),
    "all adapt, features 300, head 0.03, Gauss-Newton": [*by_layer(300.0, 0.03), *GAUSS_NEWTON],
    "all adapt, features 300, head 0.03, ReLU": [*by_layer(300.0, 0.03), *RELU],
    "exact solve (dual)": ["algorithm.solver={kind: dual}"],
    "1 CG step": ["algorithm.solver.max_iterations=1"],
    "2 CG steps": ["algorithm.solver.max_iterations=2", "algorithm.solver.rtol=0"],
    "5 CG steps": CG5,
    "CG to 1e-6, at most 60": ["algorithm.solver.max_iterations=60", "algorithm.solver.rtol=0.000001"],
    "5 CG steps, Nystrom 5": [*CG5, "algorithm.solver.preconditioner=nystrom", "algorithm.solver.rank=5"],
    "damping 0.1": ["algorithm.solver.damping=0.1"],
    "L-BFGS 8": ["algorithm.inner.steps=8"],
    "L-BFGS to 1e-2, CG too": ["algorithm.inner.tolerance=0.01", "algorithm.solver.rtol=0.01"],
    "L-BFGS to 1e-3, CG too": ["algorithm.inner.tolerance=0.001", "algorithm.solver.rtol=0.001"],
    "descent 16": DESCENT16,
    "Newton-CG 3": ["algorithm.inner={kind: newton_cg, steps: 3, cg_iterations: 10}"],
    "Nesterov 16": ["algorithm.inner={kind: momentum, lr: 0.1, steps: 16, momentum: 0.7, nesterov: true}"],
    "ReLU": RELU,
    "GELU": ["model.activation=gelu"],
    "softplus": ["model.activation=softplus"],
    "softplus, beta 4": ["model.activation=softplus", "model.softplus_beta=4.0"],
    "lam 0.03": ["algorithm.lam=0.03"],
    "lam 0.1": ["algorithm.lam=0.1"],
    "lam 1": ["algorithm.lam=1.0"],
    "learned lam": ["algorithm.lam.learn=true", "algorithm.lam.lr=0.01"],
    "learned diagonal lam": ["algorithm.lam.kind=diagonal", "algorithm.lam.learn=true", "algorithm.lam.lr=0.01"],
    "lam from 1 down": ["algorithm.lam.init=1.0", "algorithm.lam.schedule={kind: linear, to: 0.003, updates: 60}"],
    "outer eps 1e-3": ["outer.eps=0.001"],
}
"""What is changed about the best of imaml's nine trials: what adapts, and how its problem and its system are solved."""


def trials(method: str) -> dict[str, list[str]]:
    """The nine of a method."""
    return {
        f"{method}, {name}, rate {rate}": [*overrides, f"outer.lr={rate}"]
        for name, overrides in SETTINGS[method].items()
        for rate in RATES
    }
