"""What `algorithm.preset` fills in where the user says nothing."""

from __future__ import annotations

from typing import Any

PRESET_FIELDS = (
    "algorithm.lam",
    "algorithm.inner",
    "algorithm.solver",
    "algorithm.reference_inner",
    "algorithm.lam_offset",
    "algorithm.adapts",
    "outer.optimizer",
    "outer.lr",
    "outer.eps",
)
"""What a preset decides."""


def fill_preset(raw: dict[str, Any]) -> dict[str, Any]:
    """`raw` with the fields of its preset added; a field that is given, there or by `--set`, wins.

    `paper` is what the paper says. `reference` is what its public code computes: an inner loop without the proximal term
    and one step on that term after it, the system `((1 + mu) I + H / (lambda + 10)) x = v` with mu = 1, Adam with an epsilon
    of 1e-3. Multiplied by c = lambda + 10 that is our system `(H + c I + c mu I) u = v`, `x = c u`: the same CG iterates.
    One case differs: where at most one CG step is asked for, the public code returns v, the first-order gradient, without a
    solve; ours takes the one step.
    """
    algorithm = raw.get("algorithm")
    preset = algorithm.get("preset") if isinstance(algorithm, dict) else None
    if preset not in ("paper", "reference"):
        return raw
    assert isinstance(algorithm, dict)
    data, outer = raw.get("data") or {}, raw.get("outer") or {}
    inner, solver = algorithm.get("inner") or {}, algorithm.get("solver") or {}
    if not all(isinstance(section, dict) for section in (data, outer, inner, solver)):
        return raw
    way, lam = data.get("way", 5), algorithm.get("lam", 2.0)
    filled: dict[str, Any] = {**algorithm, "lam": {"init": 2.0, **lam} if isinstance(lam, dict) else lam}
    if inner.get("kind", "gradient_descent") == "gradient_descent":
        inner = {"lr": 0.1, "steps": 25 if isinstance(way, int) and way >= 20 else 16, **inner}
    if solver.get("kind", "conjugate_gradient") == "conjugate_gradient":
        solver = {"operator": "hessian", "max_iterations": 5, **solver}
        if preset == "reference" and isinstance(lam, (int, float)):
            solver = {"damping": lam + 10.0, "atol": 1e-5, **solver}
    outer = {"optimizer": "adam", "lr": 1.0e-3, **outer}
    if preset == "reference":
        filled = {"reference_inner": True, "lam_offset": 10.0, **filled}
        outer = {"eps": 1.0e-3, **outer}
    return {**raw, "algorithm": {**filled, "inner": inner, "solver": solver}, "outer": outer}
