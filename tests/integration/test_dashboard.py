"""The Grafana dashboard, without a Grafana: it is laid out as one reads it, and its queries are PromQL over metrics that there are."""

import itertools
import json
import re

import pytest
from helpers import promql
from helpers.command import ROOT
from helpers.gloo import run_group
from helpers.promql import Query, Selector
from helpers.ray_metrics import scraped
from helpers.runs import raw_config, tiny, train_in_a_group

from imaml_dist.tracking import metrics_file
from imaml_dist.training.run_directory import RunDirectory

BOARD = json.loads((ROOT / "k8s" / "monitoring" / "dashboard.json").read_text())
PANELS = BOARD["panels"]
TARGETS = [target for panel in PANELS for target in panel["targets"]]
SOURCE = {"type": "prometheus", "uid": "${source}"}
UNITS = {"none", "short", "s", "ops", "percent", "percentunit", "bytes"}
BY_PROMETHEUS = {"instance", "job"}
"""Labels that it gives every series."""


@pytest.fixture(scope="module")
def exported(data, tmp_path_factory):
    """`name -> label -> values`: what a real Ray node exports of a real run of two workers."""
    folder = tmp_path_factory.mktemp("run") / "run"
    raw = raw_config(data, workers=2)
    run = RunDirectory(folder)
    run.begin(tiny(data, workers=2))
    run_group(2, train_in_a_group, raw, str(folder))
    found: dict[str, dict[str, set[str]]] = {}
    for name, labels, _ in scraped(metrics_file.read(run.metrics_file)):
        for label, value in labels.items():
            found.setdefault(name, {}).setdefault(label, set()).add(value)
    return found


def read(target):
    """Its query, for one run."""
    return promql.parse(target["expr"].replace("$run", "mine"))


def test_it_is_of_a_schema_that_grafana_has_and_new_to_every_grafana():
    assert BOARD["schemaVersion"] == 39  # Grafana 11; later ones migrate it
    assert BOARD.get("id") is None and re.fullmatch(r"[a-z-]{1,40}", BOARD["uid"])
    assert BOARD["title"] and BOARD["time"].keys() == {"from", "to"}


def test_no_panel_lies_on_another_and_none_sticks_out():
    assert len({panel["id"] for panel in PANELS}) == len(PANELS) >= 6
    places = [(panel["title"], panel["gridPos"]) for panel in PANELS]
    for title, place in places:
        assert place.keys() == {"x", "y", "w", "h"} and place["w"] > 0 and place["h"] > 0, title
        assert place["x"] >= 0 and place["x"] + place["w"] <= 24, title
    for (one, a), (other, b) in itertools.combinations(places, 2):
        beside = a["x"] + a["w"] <= b["x"] or b["x"] + b["w"] <= a["x"]
        below = a["y"] + a["h"] <= b["y"] or b["y"] + b["h"] <= a["y"]
        assert beside or below, f"{one} lies on {other}"


@pytest.mark.parametrize("panel", PANELS, ids=[panel["title"] for panel in PANELS])
def test_a_panel_is_one_that_grafana_draws(panel):
    assert panel["type"] in ("timeseries", "stat") and panel["title"]
    assert panel["datasource"] == SOURCE
    assert panel["fieldConfig"]["defaults"]["unit"] in UNITS
    references = [target["refId"] for target in panel["targets"]]
    assert len(set(references)) == len(references) >= 1


def test_variables_are_there_that_are_used_and_the_source_is_one_of_them():
    variables = {variable["name"]: variable for variable in BOARD["templating"]["list"]}
    assert (variables["source"]["type"], variables["source"]["query"]) == ("datasource", "prometheus")
    assert variables["run"]["datasource"] == SOURCE and variables["run"]["multi"]
    assert set(re.findall(r"\$\{?(\w+)", json.dumps(BOARD))) == variables.keys()
    for target in TARGETS:
        assert not re.search(r"(?<!=~\")\$run", target["expr"]), "several runs are a pattern"


@pytest.mark.parametrize("target", TARGETS, ids=[target["expr"] for target in TARGETS])
def test_a_query_asks_for_what_is_exported(target, exported):
    query = read(target)
    for selector in query.selectors:
        labels = exported[selector.name]
        for label, (operator, value) in selector.matchers.items():
            assert operator in ("=", "=~")
            for one in value.split("|"):
                assert one in labels[label], f"{selector.name} has no {label}={one}, but {sorted(labels[label])}"
        ranged = re.search(rf"rate\({selector.name}[^)]*\[", target["expr"])
        assert bool(ranged) == selector.name.endswith("_total"), "of a counter its growth, of all else its value"
        shown = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
        assert shown and shown <= (labels.keys() | BY_PROMETHEUS if query.labels is None else query.labels)


def test_runs_to_choose_from_are_those_that_export(exported):
    (run,) = [variable for variable in BOARD["templating"]["list"] if variable["name"] == "run"]
    metric, label = re.fullmatch(r"label_values\((\w+), (\w+)\)", run["query"]).groups()
    assert exported[metric][label] == {"mine"}


def test_what_the_issue_of_a_run_is_about_is_on_the_board():
    names = {selector.name for target in TARGETS for selector in read(target).selectors}
    assert names >= {
        "ray_imaml_tasks_per_second",
        "ray_imaml_step_seconds",
        "ray_imaml_tasks_total",
        "ray_imaml_solves_total",
        "ray_imaml_restarts",
    }


def test_the_reader_of_queries_understands_them():
    labels = frozenset({"a", "b"})
    assert promql.parse('sum by (a, b) (rate(m{x=~"1|2", y="3"}[5m]))') == Query(
        [Selector("m", {"x": ("=~", "1|2"), "y": ("=", "3")})], labels
    )
    assert promql.parse("max(m) by (a, b) / 2").labels == labels
    assert [s.name for s in promql.parse("(a - b) * 1.5").selectors] == ["a", "b"]


@pytest.mark.parametrize(
    "wrong",
    ["", "m{", "m{a}", "m{a=1}", 'm{a="1" b="2"}', 'm{a=~"("}', "rate(m)", "rate(m[5m]", "m[5m]", "m[5]", "rate(m[m])", "sum(m[5m])",
     "sum by a (m)", "speed(m[5m])", "abs(m[5m])", "m n", "1 + 2", "m + n[5m]", "m; n", "m)"],
)  # fmt: skip
def test_the_reader_of_queries_refuses_what_prometheus_would(wrong):
    with pytest.raises((ValueError, re.error)):
        promql.parse(wrong)
