"""A report is one escaped, reproducible page, and says what is missing when a run is not over."""

from __future__ import annotations

import base64
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from imaml_dist.errors import InputError
from imaml_dist.reporting import drawing, figures
from imaml_dist.reporting.report import write_report

WAY, SHOT, QUERY = 5, 1, 15
HOSTILE_NAME = """a "b" 'c' <img src=x onerror=alert(1)>"""
HOSTILE_CLASS = r"<script>/$\frac{x$"
VOID = {"meta", "link", "br", "img", "hr", "input"}


class _Nesting(HTMLParser):
    """Open elements, and every name and attribute that was met."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.names: set[str] = set()
        self.ids: list[str] = []
        self.targets: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._meet(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._meet(tag, attrs)

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def _meet(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.add(tag)
        assert not any(name.startswith("on") for name, _ in attrs)
        self.ids += [value or "" for name, value in attrs if name == "id"]
        self.targets += [value or "" for name, value in attrs if name in ("href", "src", "xlink:href")]


def _record(generator: np.random.Generator, step: int, steps: int, first_order: bool) -> dict[str, Any]:
    t = step / steps
    record: dict[str, Any] = {
        "step": step,
        "time": 1.7e9 + 0.4 * step,
        "meta_loss": 1.6 * math.exp(-5 * t),
        "query_accuracy": 0.2 + 0.75 * (1 - math.exp(-9 * t)) + generator.normal(0, 0.02),
        "stationarity": 0.05 * math.exp(generator.normal(0, 0.2)) + 0.2 * math.exp(-20 * t),
        "distance": 0.4 + math.sqrt(t) + generator.normal(0, 0.05),
        "excluded": 0,
        "tasks_per_second": 42 + generator.normal(0, 2),
        "seconds_step": 0.38,
        "seconds_data": 0.012,
        "seconds_inner": 0.19,
        "seconds_reduce": 0.02,
        "seconds_outer": 0.006,
        "world_size": 2,
    }
    solve = {"cg_residual": 0.25 * math.exp(-2 * t), "cosine": 0.9 + 0.06 * t, "seconds_solve": 0.13}
    counts = {"cg_converged": 3, "cg_max_iterations": 12, "cg_negative_curvature": 1, "cg_non_finite": 0}
    record |= dict.fromkeys(solve | counts) if first_order else solve | counts
    if step % (steps // 10) == steps // 10 - 1:
        record |= {"val_accuracy": record["query_accuracy"] - 0.01, "val_ci95": 0.01}
    return record


def _accuracies(generator: np.random.Generator, a: float, b: float) -> dict[str, Any]:
    tasks = np.round(generator.beta(a, b, 600) * WAY * QUERY) / (WAY * QUERY)
    ci95 = 1.96 * tasks.std(ddof=1) / math.sqrt(600)
    return {"mean": float(tasks.mean()), "ci95": float(ci95), "per_task": tasks.tolist()}


def _write_run(run: Path, algorithm: str = "imaml", steps: int = 200, name: str = "demo") -> Path:
    generator = np.random.default_rng(0)
    run.mkdir()
    (run / "config.yaml").write_text(f"name: demo\nalgorithm: {{kind: {algorithm}}}\n# </pre><b>\n")
    records = [_record(generator, step, steps, algorithm == "fomaml") for step in range(steps)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    trained, untrained = _accuracies(generator, 40, 2.4), _accuracies(generator, 11, 13)
    labels = np.repeat(np.arange(WAY), QUERY)
    guesses = np.where(generator.random(len(labels)) < 0.9, labels, (labels + 1) % WAY)
    ink = (generator.random((WAY * (SHOT + QUERY), 28, 28, 1)) > 0.8).astype(np.uint8) * 255
    support, query = (base64.b64encode(part.tobytes()).decode() for part in (ink[: WAY * SHOT], ink[WAY * SHOT :]))
    episode = {
        "classes": ["Tifinagh/character45", HOSTILE_CLASS, "名前/\x07\ud800", "a" * 300, "b"],
        "shape": [28, 28, 1],
        "support": support,
        "support_labels": list(range(WAY)),
        "query": query,
        "query_labels": labels.tolist(),
        "predictions": guesses.tolist(),
        "untrained_predictions": [0] * len(labels),
    }
    common = {"way": WAY, "shot": SHOT}
    evaluation = {"split": "test", **common, "query": QUERY, "tasks": 600, "trained": trained, "untrained": untrained}
    (run / "evaluation.json").write_text(json.dumps(evaluation | {"episode": episode}))
    summary = {
        "name": name,
        "algorithm": algorithm,
        "dataset": {"name": "omniglot", "fingerprint": "a3d3" * 16},
        **common,
        "meta_steps": steps,
        "test_accuracy": trained["mean"],
        "ci95": trained["ci95"],
        "untrained_accuracy": untrained["mean"],
        "untrained_ci95": untrained["ci95"],
        "seconds": 812.4,
        "best_step": 1 + max((r for r in records if "val_accuracy" in r), key=lambda r: r["val_accuracy"])["step"],
        "versions": {"imaml_dist": "1.0.0", "torch": "2.5.1"},
        "environment": {"platform": "Linux", "cpus": 2, "device": "<cpu>"},
        "mlflow": {"uri": "sqlite:///mlflow.db", "run_id": "4c1e"},
    }
    (run / "summary.json").write_text(json.dumps(summary))
    return run


def _page(run: Path) -> str:
    path = write_report(run)
    assert path == run / "report.html"
    text = path.read_text(encoding="utf-8")
    parser = _Nesting()
    parser.feed(text)
    parser.close()
    assert parser.open == []
    assert not parser.names & {"script", "iframe", "link", "object"}
    assert len(parser.ids) == len(set(parser.ids)), "figures share an id"
    assert all(target.startswith(("#", "data:image/png;base64,")) for target in parser.targets)
    assert {target[1:] for target in parser.targets if target.startswith("#")} <= set(parser.ids)
    assert set(re.findall(r"url\(#([^)]*)\)", text)) <= set(parser.ids)
    return text


def test_a_finished_run_is_one_page_without_outside_references(tmp_path: Path) -> None:
    run = _write_run(tmp_path / "run")
    before = {path.name for path in run.iterdir()}
    text = _page(run)
    assert {path.name for path in run.iterdir()} - before == {"report.html"}
    assert "http://" not in re.sub(r'xmlns(:\w+)?="[^"]*"', "", text) and "https://" not in text
    assert "@import" not in text and "url(http" not in text
    assert len(text.encode()) < 1_500_000
    assert "The two 95% intervals are disjoint: meta-training made the network better by" in text
    assert text.count("<svg") == 10
    assert "→ 2" in text


def test_lambda_and_cg_steps_are_drawn_where_they_change(tmp_path: Path) -> None:
    run = _write_run(tmp_path / "run")
    assert "Lambda and CG steps along the run" not in _page(run)
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for number, record in enumerate(records):
        record |= {"algorithm_lam": 0.1 + number / 100, "algorithm_cg_steps": 2 + number // 100}
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    text = _page(run)
    assert text.count("<svg") == 12
    assert "Lambda over meta-steps: 0.1 at first, 2.09 at the end." in text
    assert "CG steps at most over meta-steps: 2 at first, 3 at the end." in text


def test_the_same_run_gives_the_same_bytes(tmp_path: Path) -> None:
    run = _write_run(tmp_path / "run")
    first = write_report(run).read_bytes()
    assert write_report(run).read_bytes() == first
    again = _write_run(tmp_path / "other")
    assert write_report(again).read_bytes() == first


def test_names_and_class_keys_are_escaped(tmp_path: Path) -> None:
    text = _page(_write_run(tmp_path / "run", name=HOSTILE_NAME))
    assert "<script" not in text and "<img" not in text and "<cpu>" not in text and "</pre><b>" not in text
    assert "&lt;script&gt;" in text and "&lt;img src=x" in text and "&#34;b&#34;" in text
    assert "$\\frac{x$" in text  # as it is, not as mathematics


@pytest.mark.parametrize("lines", [0, 1, 2, 7])
def test_a_run_in_progress_says_what_is_missing(tmp_path: Path, lines: int) -> None:
    run = _write_run(tmp_path / "run")
    (run / "summary.json").unlink()
    (run / "evaluation.json").unlink()
    kept = (run / "metrics.jsonl").read_text().splitlines(keepends=True)[:lines]
    (run / "metrics.jsonl").write_text("".join(kept) + '{"step": 7, "query_acc')
    text = _page(run)
    assert "is in progress or was stopped" in text and f"{lines} of 2000 meta-steps" in " ".join(text.split())
    assert "There is no test accuracy" in text and "No drawn episode" in text
    assert ("No meta-step is recorded yet" in text) == (lines == 0)


def test_a_run_without_metrics_is_reported(tmp_path: Path) -> None:
    run = _write_run(tmp_path / "run")
    (run / "metrics.jsonl").unlink()
    assert "No meta-step is recorded yet" in _page(run)


def test_summary_alone_still_gives_the_headline(tmp_path: Path) -> None:
    run = _write_run(tmp_path / "run")
    accuracy = json.loads((run / "summary.json").read_text())["test_accuracy"]
    (run / "evaluation.json").unlink()
    text = _page(run)
    assert f"{accuracy:.1%}" in text and "The accuracies of single test tasks are missing" in text


def test_overlapping_intervals_are_called_so(tmp_path: Path) -> None:
    run = _write_run(tmp_path / "run")
    evaluation = json.loads((run / "evaluation.json").read_text())
    evaluation["untrained"] = evaluation["trained"]
    (run / "evaluation.json").write_text(json.dumps(evaluation))
    assert "intervals overlap" in _page(run)


def test_both_kinds_of_accuracy_are_shown_and_explained(tmp_path: Path) -> None:
    run = _write_run(tmp_path / "run")
    assert "inductive" not in _page(run).lower()
    evaluation, summary = (json.loads((run / name).read_text()) for name in ("evaluation.json", "summary.json"))
    for who, mean in (("trained", 0.8125), ("untrained", 0.3125)):
        evaluation[who]["inductive"] = {"mean": mean, "ci95": 0.0125, "per_task": [mean] * 600}
    (run / "evaluation.json").write_text(json.dumps(evaluation))
    text = _page(run)
    assert "inductive 81.2% ± 1.25%" in text and "inductive 31.2% ± 1.25%" in text
    assert "each query image alone, with statistics from the support set" in text
    (run / "evaluation.json").unlink()
    summary |= {"test_accuracy_inductive": 0.7, "ci95_inductive": 0.01}
    (run / "summary.json").write_text(json.dumps(summary))
    text = _page(run)
    assert "inductive 70.0% ± 1.00%" in text and text.count("<small>inductive") == 1


def test_a_warm_start_and_skipped_steps_are_among_the_facts(tmp_path: Path) -> None:
    run = _write_run(tmp_path / "run")
    assert "warm start" not in _page(run)
    summary = json.loads((run / "summary.json").read_text())
    summary |= {"warm_start": {"path": "runs/<other>", "sha256": "abc123"}, "skipped_steps": 17}
    (run / "summary.json").write_text(json.dumps(summary))
    text = _page(run)
    assert "runs/&lt;other&gt;, sha256 abc123" in text
    assert re.search(r"skipped steps</th><td>17<", text)


def test_what_the_algorithm_learned_is_drawn_where_there_is_something(tmp_path: Path) -> None:
    run = _write_run(tmp_path / "run")
    assert "What the algorithm learned" not in _page(run)
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for record in records:
        record |= {f"algorithm_{HOSTILE_CLASS}_{w}": v for w, v in (("min", 0.1), ("median", 0.2), ("max", 0.3))}
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    text = _page(run)
    assert "What the algorithm learned" in text and text.count("<svg") == 11
    assert "&lt;script&gt;" in text and "<script" not in text


def test_first_order_runs_have_no_implicit_gradient_to_judge(tmp_path: Path) -> None:
    text = _page(_write_run(tmp_path / "run", "fomaml"))
    assert "This section does not apply" in text
    assert "Residual of the linear solve" not in text and "How the linear solves ended" not in text


def test_numbers_that_are_not_finite_leave_gaps(tmp_path: Path) -> None:
    run = _write_run(tmp_path / "run")
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for record in records[::3]:
        record |= {"cg_residual": math.nan, "query_accuracy": None, "distance": math.inf, "cg_converged": "many"}
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    page = _page(run)
    assert "nan" not in re.sub(r"base64,\S*", "", page).lower().split()


def test_a_restart_repeats_steps_and_the_last_line_counts(tmp_path: Path) -> None:
    run = _write_run(tmp_path / "run")
    once = write_report(run).read_bytes()
    lines = (run / "metrics.jsonl").read_text()
    stale = json.loads(lines.splitlines()[150]) | {"query_accuracy": 0.0}
    (run / "metrics.jsonl").write_text(json.dumps(stale) + "\n" + lines)
    assert write_report(run).read_bytes() == once


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("summary.json", '{"name": ', "summary.json is not valid JSON"),
        ("summary.json", "[]", "summary.json holds list"),
        ("summary.json", '{"name": "x"}', "summary.json: a field is missing"),
        ("evaluation.json", "nonsense", "evaluation.json is not valid JSON"),
        ("evaluation.json", '{"episode": {"shape": [28, 28, 1]}}', "evaluation.json: the episode cannot be read"),
        ("evaluation.json", '{"trained": {"mean": "high"}}', "not made of numbers"),
        ("metrics.jsonl", '{"step": 0}\n{"st\n{"step": 2}\n', "metrics.jsonl line 2"),
        ("metrics.jsonl", '{"loss": 0}\n', "metrics.jsonl line 1"),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, name: str, content: str, said: str) -> None:
    run = _write_run(tmp_path / "run")
    (run / name).write_text(content)
    with pytest.raises(InputError, match=re.escape(said)):
        write_report(run)
    assert not (run / "report.html").exists()


def test_a_directory_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a run directory"):
        write_report(tmp_path)


def test_an_episode_whose_parts_do_not_fit_is_refused() -> None:
    images = np.zeros((5, 8, 8, 1), dtype=np.uint8)
    with pytest.raises(InputError, match="differ in number"):
        figures.episode_image(["a"], images, [0] * 5, images, [0] * 5, [0] * 4)


def test_colour_images_are_drawn_as_they_are_and_large_ones_shrunk() -> None:
    images = np.full((5, 84, 84, 3), 200, dtype=np.uint8)
    figure = figures.episode_image(["a"], images, [0] * 5, images, [0] * 5, [0] * 5)
    canvas = np.asarray(figure.axes[0].images[0].get_array())
    assert canvas.shape[0] < 84 and set(np.unique(canvas)) == {200, 255}


def test_long_curves_are_thinned_by_averaging() -> None:
    values = np.arange(10_000, dtype=np.float64)
    thinned = drawing.thin(values)
    assert len(thinned) <= drawing.MAX_POINTS
    assert thinned[0] == values[:13].mean() and thinned[-1] == values[-(10_000 % 13) :].mean()
    assert np.allclose(drawing.running_mean(np.ones(300), 15), 1.0)


def test_a_learning_curve_is_a_plain_figure(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    records = [_record(generator, step, 10_000, False) for step in range(10_000)]
    figure = figures.learning_curve(records, 5, 9000)
    assert all(len(np.asarray(line.get_xdata())) <= drawing.MAX_POINTS for line in figure.axes[0].lines)
    figure.savefig(tmp_path / "curve.png", dpi=60)
    assert (tmp_path / "curve.png").stat().st_size > 1000


def test_the_best_checkpoint_is_marked_at_its_own_validation() -> None:
    """A checkpoint is named by the meta-steps before it, the record of the last of them by a number less."""
    records = [_record(np.random.default_rng(0), step, 500, False) for step in range(500)]
    axes = figures.learning_curve(records, 5, 450).axes[0]
    (ring,) = [line for line in axes.lines if line.get_markersize() == 10]
    assert (*ring.get_xdata(), *ring.get_ydata()) == (449, records[449]["val_accuracy"])
    (dotted,) = [line for line in axes.lines if line.get_linestyle() == ":"]
    assert set(dotted.get_xdata()) == {449}
    assert "best checkpoint, step 450" in [text.get_text() for text in axes.texts]


def test_a_run_that_goes_on_names_its_best_checkpoint_as_a_finished_one_does(tmp_path: Path) -> None:
    run = _write_run(tmp_path / "run")
    best = json.loads((run / "summary.json").read_text())["best_step"]
    assert f"best checkpoint, step {best}<" in _page(run)
    (run / "summary.json").unlink()
    text = _page(run)
    assert f"best checkpoint, step {best}<" in text and "at step 200" in text


def test_a_run_without_validation_has_no_best_checkpoint(tmp_path: Path) -> None:
    run = _write_run(tmp_path / "run")
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for record in records:
        record.pop("val_accuracy", None)
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps(summary | {"best_step": -1}))
    text = _page(run)
    assert "best checkpoint, step" not in text
    assert re.search(r"best step</th><td>–<", text)
