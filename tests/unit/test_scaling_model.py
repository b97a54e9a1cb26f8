"""The scaling model: its parts against numbers worked out by hand, and the published prediction against its own report."""

import importlib
import json
import re
import sys

import pytest
from helpers.command import ROOT

from imaml_dist.algorithms.record import TaskRecord

BENCHMARKS, PAGE, REPORT = ROOT / "benchmarks", ROOT / "docs" / "performance.md", ROOT / "docs" / "scaling.json"


@pytest.fixture(scope="module")
def model():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield importlib.import_module("scaling_model")
    del sys.modules["scaling_model"]


@pytest.fixture(scope="module")
def report():
    return json.loads(REPORT.read_text())


@pytest.mark.parametrize(
    ("chunks", "world", "rows"),
    [
        (4, 1, 1),  # one worker holds the whole tree
        (3, 1, 1),
        (4, 8, 1),  # aligned powers of two: a node each
        (1, 1024, 1),
        (3, 2, 2),  # rows 0-2 are the nodes 0-1 and 2; rows 3-5 are 3 and 4-5
        (5, 3, 3),  # rows 5-9 are 5, 6-7 and 8-9
        (7, 4, 3),  # rows 7-13 are 7, 8-11 and 12-13
    ],
)
def test_rows_of_a_worker(model, chunks, world, rows):
    assert model.most_rows(chunks, world) == rows


@pytest.mark.parametrize(
    ("parameters", "rows", "world", "sent"),
    [
        (100, 1, 1, 0),
        (100, 1, 2, 4 * 2 * 50),  # half to the other, half to the other again
        (100, 2, 4, 4 * 3 * 25 * 3),
        (101, 1, 4, 4 * 2 * 26 * 3),  # segments are equally long
        (3, 1, 1024, 4 * 2 * 1 * 1023),
    ],
)
def test_bytes_of_a_reduction(model, parameters, rows, world, sent):
    assert model.reduction_bytes(parameters, rows, world) == sent
    assert model.reduction_messages(rows, world) == (rows + 1) * (world - 1)


def test_bytes_of_the_facts(model):
    assert model.facts_bytes(16, 1) == 0
    assert model.facts_bytes(16, 5) == 8 * len(TaskRecord.names()) * 16 * 4


@pytest.mark.parametrize(
    ("lateness", "world", "slowest"),
    [
        ((), 1024, 1.0),
        ((0.9, 1.1), 1, 1.0),
        ((0.9, 1.1), 2, 1.05),  # three of four pairs hold the slow one
        ((1.1, 0.9), 3, 0.9 / 8 + 1.1 * 7 / 8),
        ((0.5, 1.0, 1.5), 2, (1 * 0.5 + 3 * 1.0 + 5 * 1.5) / 9),
        ((0.5, 1.0, 1.5), 1024, 1.5),
    ],
)
def test_the_slowest_of_so_many(model, lateness, world, slowest):
    assert model.expected_slowest(lateness, world) == pytest.approx(slowest)


def test_a_line_is_found_again_and_the_relative_error_counts(model):
    alpha, beta = 3e-4, 2e-9
    points = [(m, b, alpha * m + beta * b) for m in (2, 4) for b in (1e4, 1e6, 1e8)]
    assert model.fit(points) == pytest.approx((alpha, beta))
    # alpha alone, seen as 1 and as 3: the least of (a - 1)^2 + (a / 3 - 1)^2 is at 4/3 / (10/9).
    assert model.fit([(1, 0, 1), (1, 0, 3), (0, 1, 7)]) == pytest.approx((1.2, 7.0))
    assert model.fit_slope([(1, 1), (1, 3)]) == pytest.approx(1.2)


def test_neither_a_message_nor_a_byte_takes_less_than_nothing(model):
    assert model.fit([(1, 1, 1), (1, 2, 4)])[0] == 0.0
    assert model.fit([(1, 1, 4), (1, 2, 1)])[1] == 0.0
    with pytest.raises(ValueError, match="told apart"):
        model.fit([(1, 2, 1), (2, 4, 3)])


def test_a_step_of_four_workers_worked_out_by_hand(model):
    inputs = model.Inputs(
        compute=2.0,
        rest=0.5,
        alpha=0.01,
        beta=0.001,
        gamma=0.1,
        parameters=100,
        chunks=2,
        chunk=5,
        lateness=(0.9, 1.1),
    )
    row = model.predicted(inputs, 4)
    assert row["rows"] == 1
    assert row["wait"] == pytest.approx(2.0 * (0.9 / 16 + 1.1 * 15 / 16 - 1.0))
    assert row["reduce"] == pytest.approx(0.01 * 6 + 0.001 * 4 * 2 * 25 * 3)
    assert row["facts"] == pytest.approx(0.01 * 6 + 0.001 * 8 * len(TaskRecord.names()) * 10 * 3)
    assert row["plan"] == pytest.approx(0.1 * 3 * 3)
    assert row["step"] == pytest.approx(2.5 + row["wait"] + row["reduce"] + row["facts"] + row["plan"])
    assert row["efficiency"] == pytest.approx(2.5 / row["step"])
    assert model.predicted(inputs, 1)["step"] == 2.5
    assert model.predicted(inputs, 1)["efficiency"] == 1.0


def test_what_is_given_takes_the_place_of_what_was_measured(model):
    inputs = model.Inputs(1, 1, 1, 1, 1, 1, 1, 1, (1.0,))
    assert model.changed(inputs, compute=None, alpha=0.0, lateness=()) == model.Inputs(1, 1, 0.0, 1, 1, 1, 1, 1, ())


def test_the_published_report_gives_its_own_prediction(model, report):
    found = model.prediction(model.inputs_of(report))
    assert [row["workers"] for row in found] == [2**n for n in range(11)]
    for row, published in zip(found, report["prediction"], strict=True):
        assert row == pytest.approx(published)


def published(first):
    """Rows of the page's table whose first column has that name, as texts."""
    text = PAGE.read_text().split(f"\n\n| {first} |")[1].split("\n\n")[0]
    return [re.split(r"\s*\|\s*", line.strip("| ")) for line in text.splitlines()[2:]]


def test_the_published_tables_are_those_of_the_report(model, report):
    here = model.inputs_of(report)
    even = model.changed(here, lateness=())
    assumed = model.changed(even, **ASSUMED)
    rows = published("workers")
    assert len(rows) == len(model.WORLDS)
    for cells, world in zip(rows, model.WORLDS, strict=True):
        own, late, gpu = (model.predicted(inputs, world) for inputs in (even, here, assumed))
        assert cells == [
            f"{world:,}",
            *(f"{1e3 * own[part]:.0f}" for part in ("reduce", "facts", "plan", "step")),
            *(f"{100 * row['efficiency']:.0f} %" for row in (own, late)),
            f"{1e3 * gpu['step']:.0f}",
            f"{100 * gpu['efficiency']:.0f} %",
        ]


ASSUMED = {"compute": 0.2, "rest": 0.01, "alpha": 2e-5, "beta": 1e-9 / 12.5, "parameters": 10_000_000}
"""As on the page, for GPUs."""
