"""Each rule speaks above its threshold with its figure, and not at it; the report page says it or says that all is well."""

import html
import json
import math
import re

import pytest

from imaml_dist.config.algorithm import IMAMLConfig
from imaml_dist.reporting.cautions import ALL_WELL, FIGURES, all_well, approximation, cautions, in_short
from imaml_dist.reporting.report import write_report

WELL = {
    "stationarity": 0.05,
    "cg_residual": 0.1,
    "cosine": 0.99,
    "cg_converged": 0,
    "cg_max_iterations": 8,
    "cg_negative_curvature": 8,
    "cg_non_finite": 0,
    "excluded": 0,
    "accepted": 16,
}

RULES = [
    ({"stationarity": 0.0501}, "stationarity 0.05, should be at most 0.05"),
    ({"stationarity": 0.86}, "stationarity 0.86, should be at most 0.05"),
    ({"cg_residual": 0.51}, "residual of the linear solve 0.51, should be at most 0.5"),
    ({"cg_residual": 1.3}, "residual of the linear solve 1.3, should be at most 0.5"),
    ({"cg_negative_curvature": 9, "cg_max_iterations": 7}, "negative curvature in 56% of the linear solves, should be at most 50%"),
    ({"cosine": 0.9951}, "cosine to the first-order gradient 0.9951, should be at most 0.99"),
    ({"excluded": 1, "accepted": 15}, "6.2% of the tasks excluded, should be at most 1%"),
]  # fmt: skip


def run_of(late, early=WELL, steps=40):
    """Records whose last tenth is `late`."""
    return [{"step": step} | (late if step >= steps - steps // 10 else early) for step in range(steps)]


@pytest.mark.parametrize(("bad", "says"), RULES)
def test_each_rule_speaks_of_the_end_of_the_run_alone(bad, says):
    (found,) = cautions(run_of(WELL | bad))
    assert found.short == says
    assert found.meaning.endswith(".") and found.advice.endswith(".")
    assert cautions(run_of(WELL, early=WELL | bad)) == []
    assert in_short(run_of(WELL | bad)) == says


def test_at_the_thresholds_nothing_is_said():
    for records in (run_of(WELL), run_of(WELL | {"cg_residual": 0.5})):
        assert cautions(records) == [] and in_short(records) == "no warning"


def test_all_is_well_only_where_every_figure_is_there_and_good():
    assert all_well(run_of(WELL)) == ALL_WELL
    rough = all_well(run_of(WELL | {"cg_residual": 0.3}))
    assert "the linear system is solved roughly at best (residual 0.3, solved is at most 0.1)" in rough
    for key, name in FIGURES.items():
        for value in (None, math.nan):
            records = run_of(WELL | {key: value})
            assert cautions(records) == []
            assert f"too few of them to call it one: {name}, not recorded" in all_well(records)
            assert in_short(records) == f"no warning, but not recorded: {name}"
    records = run_of(WELL)
    records[-1] |= {"cosine": None}  # a step that was skipped
    assert all_well(records) == ALL_WELL


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"solver": {"operator": "hessian"}}, ""),
        ({"solver": {"kind": "minres"}}, ""),
        ({}, "the Gauss-Newton matrix, positive semi-definite, stands in for the Hessian: at best"),
        ({"solver": {"kind": "dual"}}, "the Gauss-Newton matrix"),
        ({"solver": {"operator": "hessian", "damping": 0.25}}, "solver.damping adds 0.25 to the diagonal: at best"),
        ({"solver": {"operator": "hessian"}, "lam_offset": 10.0}, "lam_offset adds 10 to lambda"),
        ({"solver": {"operator": "hessian"}, "reference_inner": True}, "has no proximal term"),
    ],
)
def test_a_system_that_is_not_the_inner_problems_is_called_an_approximation(given, says):
    said = approximation(IMAMLConfig(**given))
    assert says in said and bool(said) == bool(says)


def test_several_rules_speak_together_and_one_bad_step_is_none():
    worst = {key: value for bad, _ in RULES for key, value in bad.items()}
    assert len(cautions(run_of(WELL | worst))) == 5
    records = run_of(WELL)
    records[-1] |= {"stationarity": 9.0, "cg_residual": 9.0, "cosine": 1.0}
    assert cautions(records) == []


@pytest.mark.parametrize("records", [[], [{"step": 0, "stationarity": None, "query_accuracy": 0.5}]])
def test_without_figures_nothing_is_claimed(records):
    assert cautions(records) is None and in_short(records) == "-"


def page_of(tmp_path, kind, records):
    (tmp_path / "config.yaml").write_text(f"name: demo\nalgorithm: {{kind: {kind}}}\n")
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    text = re.sub(r"<[^>]+>", " ", write_report(tmp_path).read_text())
    return " ".join(html.unescape(text).split())


def test_the_page_warns_in_plain_words_or_says_that_all_is_well(tmp_path):
    page = page_of(tmp_path, "imaml", run_of(WELL | {"stationarity": 0.86, "cosine": 0.9951}))
    assert "Judged by the last tenth of training, the implicit gradient of this run is not one" in page
    assert "Stationarity 0.86, should be at most 0.05. Adaptation ends far from a minimum" in page
    assert (
        "Cosine to the first-order gradient 0.9951" in page and "Residual of the linear solve 0.5, should" not in page
    )
    assert ALL_WELL not in page
    page = page_of(tmp_path, "imaml", run_of(WELL))
    assert ALL_WELL in page and "should be at most" not in page
    assert "at best its gradient is the implicit gradient of that approximation" in page
    page = page_of(tmp_path, "imaml, solver: {operator: hessian}", run_of(WELL | {"cg_residual": 0.3}))
    assert ALL_WELL not in page and "should be at most" not in page and "at best its gradient" not in page
    assert "the linear system is solved roughly" in page


def test_a_configuration_that_cannot_be_read_is_said(tmp_path):
    summary = {"name": "demo", "algorithm": "imaml", "way": 5, "shot": 1, "meta_steps": 40}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    page = page_of(tmp_path, "imaml, lamb: 3", run_of(WELL))
    assert (
        "Which curvature and which damping its linear system has is not known, for config.yaml cannot be read" in page
    )


@pytest.mark.parametrize("kind", ["maml", "fomaml", "reptile"])
def test_other_algorithms_are_not_judged_by_it(tmp_path, kind):
    page = page_of(tmp_path, kind, run_of(WELL | {"stationarity": 0.86}))
    assert ALL_WELL not in page and "at best its gradient" not in page and "should be at most" not in page
