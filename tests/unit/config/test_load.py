"""Configuration: what is accepted, and that every refusal names the path, the value, and what to do."""

import pytest

from imaml_dist.config.inner import GradientDescentConfig, LBFGSConfig
from imaml_dist.config.load import build_config, load_config, to_yaml
from imaml_dist.errors import ConfigError


def config(*overrides, **raw):
    return build_config({"name": "t", **raw}, overrides)


def test_defaults_are_the_honest_implicit_gradient_that_trains():
    c = config()
    assert (c.algorithm.kind, c.algorithm.lam, c.outer.lr) == ("imaml", 0.1, 3e-3)
    assert (c.algorithm.solver.operator, c.algorithm.solver.max_iterations) == ("gauss_newton", 5)


def test_numbers_in_scientific_notation_are_numbers(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("name: t\nouter: {lr: 1e-6, clip: 5E+1}\nalgorithm: {lam: 2}\n")
    c = load_config(path, ["algorithm.inner.lr=1.5e-2"])
    assert (c.outer.lr, c.outer.clip, c.algorithm.lam, c.algorithm.inner.lr) == (1e-6, 50.0, 2.0, 0.015)


def test_resolved_configuration_reads_back_as_itself(tmp_path):
    path = tmp_path / "c.yaml"
    c = config("run.max_seconds=7.5", "algorithm.preset=paper", "model.kind=mlp")
    path.write_text(to_yaml(c))
    assert load_config(path) == c


@pytest.mark.parametrize("text", ["1e5", "-2E+3", ".5e3", "010", "1:30", "true", "2020-01-01", "💡"])
def test_resolved_text_reads_back_as_text(tmp_path, text):
    path = tmp_path / "c.yaml"
    c = build_config({"name": "t", "data": {"url": text}, "tracking": {"experiment": text}})
    path.write_text(to_yaml(c), encoding="utf-8")
    assert load_config(path) == c


def test_configuration_is_frozen():
    with pytest.raises(ValueError, match="frozen"):
        config().run.steps = 3


def test_preset_fills_only_what_the_user_leaves_open():
    c = config("algorithm.preset=paper")
    assert (c.algorithm.lam, c.algorithm.solver.operator, c.outer.lr, c.algorithm.inner.steps) == (
        2.0,
        "hessian",
        1e-3,
        16,
    )
    assert config("algorithm.preset=paper", "data.way=20").algorithm.inner.steps == 25
    c = config("algorithm.preset=paper", "algorithm.lam=0.3", "outer.lr=0.01", "algorithm.solver.operator=gauss_newton")
    assert (c.algorithm.lam, c.algorithm.solver.operator, c.outer.lr) == (0.3, "gauss_newton", 0.01)


def test_one_switch_changes_the_algorithm_but_never_drops_an_override():
    raw = {"kind": "imaml", "lam": 0.3, "inner": {"steps": 7}}
    c = config("algorithm.kind=fomaml", algorithm=raw)
    assert (c.algorithm.kind, c.algorithm.inner.steps) == ("fomaml", 7)
    with pytest.raises(ConfigError, match=r"algorithm\.lam: is not a known field"):
        config("algorithm.kind=fomaml", "algorithm.lam=0.2", algorithm=raw)


@pytest.mark.parametrize("kind", ["maml", "fomaml", "reptile", "anil", "meta_sgd"])
def test_a_solver_is_refused_where_an_algorithm_has_none(kind):
    for override in (
        "algorithm.solver.max_iterations=3",
        "algorithm.solver.kind=dual",
        "algorithm.solver={kind: dual}",
    ):
        with pytest.raises(ConfigError, match=r"algorithm\.solver: is not a known field") as caught:
            config(f"algorithm.kind={kind}", override, algorithm={"kind": "imaml", "lam": 2.0, "solver": {"rtol": 0.1}})
        assert "\n" not in str(caught.value) and caught.value.exit_code == 2


def test_an_override_keeps_no_field_whose_name_only_begins_like_it():
    with pytest.raises(ConfigError, match=r"algorithm\.lam_offset: is not a known field") as caught:
        config("algorithm.kind=maml", "algorithm.lam_offset=1.0", algorithm={"kind": "imaml", "lam": 0.3})
    assert "\n" not in str(caught.value), "the file's lam is dropped, as ever"


def test_a_model_of_the_users_own_keeps_its_fields():
    c = config("model={kind: 'my.package:make', width: 3}")
    assert (c.model.kind, c.model.options) == ("my.package:make", {"width": 3})


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("run.stepps=3", r"run\.stepps: is not a known field; did you mean run\.steps\?"),
        ("algorithm.lamda=3", r"did you mean algorithm\.lam\?"),
        ("algorithm.solver.max_iteration=3", r"did you mean algorithm\.solver\.max_iterations\?"),
        ("lam=3", r"lam: is not a known field; did you mean algorithm\.lam\?"),
        ("validat.every=3", r"did you mean validate\?"),
        ("algorithm.lam=0", r"algorithm\.lam: 0 given, should be greater than 0"),
        ("algorithm.lam=-1.5", r"algorithm\.lam: -1\.5 given, should be greater than 0"),
        ("algorithm.lam=.nan", r"algorithm\.lam: nan given, should be a finite number"),
        (
            "algorithm.lam='0.1'",
            r"algorithm\.lam: '0\.1' given, should be a number, or a mapping of init, kind, layers, learn",
        ),
        ("algorithm.lam=[1]", r"algorithm\.lam: \[1\] given, should be a number, or a mapping"),
        ("algorithm=maml", r"algorithm: 'maml' given, should be a mapping whose kind is 'imaml', 'maml'"),
        ("warm_start=runs/a", r"warm_start: 'runs/a' given, should be a mapping of path, skip"),
        ("algorithm.lam=true", r"algorithm\.lam: True given"),
        ("algorithm.lam=", r"algorithm\.lam: null given"),
        ("run.steps=1.5", r"run\.steps: 1\.5 given, should be a valid integer"),
        ("run.steps=0", r"run\.steps: 0 given, should be greater than or equal to 1"),
        ("outer.optimizer=adm", r"outer\.optimizer: 'adm' given, should be 'adam', 'adamw' or 'sgd'"),
        ("algorithm.kind=imalm", r"algorithm\.kind: 'imalm' given, should be 'imaml', 'maml'"),
        ("model.kind=resnet", r"model\.kind: 'resnet' given, should be 'conv4', 'mlp' or a factory"),
        ("run.chunk=3", r"run\.tasks_per_step: 16 given, must be a multiple of run\.chunk = 3"),
        ("data.way=1", r"data\.way: 1 given, should be greater than or equal to 2"),
        ("data.pool=4", r"data\.pool: 4 given, must be at least data\.way = 5, or null for all classes"),
        ("data.pool_steps=0", r"data\.pool_steps: 0 given, should be greater than or equal to 1"),
        ("data.augment.crop=-1", r"data\.augment\.crop: -1 given, should be greater than or equal to 0"),
        ("data.augment.rotate=181", r"data\.augment\.rotate: 181 given, should be less than or equal to 180"),
        ("data.augment.colour=1.5", r"data\.augment\.colour: 1\.5 given, should be less than or equal to 1"),
        ("data.augment.flip=1", r"data\.augment\.flip: 1 given, should be a valid boolean"),
        ("data.augment.color=0.1", r"data\.augment\.color: is not a known field; did you mean data\.augment\.colour\?"),
        ("data.augment=flip", r"data\.augment: 'flip' given, should be a mapping of colour, crop, flip"),
        ("run=3", r"run: 3 given"),
        ("run.steps=010", r"run\.steps: '010' given"),
        ("run.max_seconds=1:30", r"run\.max_seconds: '1:30' given"),
        ("model.kind=[1]", r"model\.kind: \[1\] given"),
        ("algorithm.kind={}", r"algorithm\.kind: \{\} given"),
        ("a..b=1", r"expected section\.field=value"),
        ("run.threads=2147483648", r"run\.threads: 2147483648 given, should be less than or equal to 1024"),
        ("run.steps", r"--set run\.steps: expected section\.field=value"),
        ("run.steps=[", r"not valid YAML"),
        ("name.x=1", r"'name' is the value 't', not a section"),
        ("name=../x", r"name: '\.\./x' given"),
    ],
)
def test_refusals_name_path_value_and_remedy(override, says):
    with pytest.raises(ConfigError, match=says) as caught:
        config(override)
    assert "\n" not in str(caught.value), "one sentence"
    assert "pydantic" not in str(caught.value)


def test_several_errors_are_one_line_each():
    with pytest.raises(ConfigError) as caught:
        config("run.steps=0", "algorithm.lam=0")
    assert len(str(caught.value).splitlines()) == 2


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("name: a\nname: b\n", "key 'name' stands twice"),
        ("name: &x a\nrun: *x\n", "aliases are not allowed"),
        ("- a\n", "a configuration is a mapping"),
        ("", "a configuration is a mapping"),
        ("name: [\n", "line 2 is not valid YAML"),
        ("name: !!python/object/apply:os.system ['true']\n", "not valid YAML"),
        ("data: {}\n", "name: is missing"),
    ],
)
def test_bad_files_are_refused(tmp_path, text, says):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=says):
        load_config(path)


def test_missing_and_binary_files_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="no configuration file"):
        load_config(tmp_path / "none.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="UTF-8"):
        load_config(tmp_path / "binary.yaml")


def test_every_algorithm_inner_solver_and_linear_solver_is_one_switch():
    raw = {
        "kind": "imaml",
        "lam": 0.3,
        "inner": {"lr": 0.2, "steps": 7},
        "solver": {"operator": "hessian", "rtol": 0.1},
    }
    for kind in ("maml", "fomaml", "reptile", "anil", "meta_sgd"):
        c = config(f"algorithm.kind={kind}", algorithm=raw)
        assert (c.algorithm.kind, c.algorithm.inner.lr, c.algorithm.inner.steps) == (kind, 0.2, 7)
    for kind in ("minres", "neumann", "nystrom", "direct"):
        c = config(f"algorithm.solver.kind={kind}", algorithm=raw)
        assert (c.algorithm.solver.kind, c.algorithm.solver.operator) == (kind, "hessian")
    assert config("algorithm.solver.kind=dual", algorithm=raw).algorithm.solver.kind == "dual"
    # Another inner solver's rate and steps mean something else, so its own defaults hold.
    assert config("algorithm.inner.kind=adam", algorithm=raw).algorithm.inner.lr == 0.01
    assert config("algorithm.inner.kind=newton_cg", "algorithm.inner.steps=3", algorithm=raw).algorithm.inner.steps == 3
    with pytest.raises(
        ConfigError, match=r"algorithm\.inner\.kind: 'newton_cg' given, should be 'gradient_descent', 'm"
    ):
        config("algorithm.kind=maml", "algorithm.inner.kind=newton_cg", algorithm=raw)


@pytest.mark.parametrize("kind", ["maml", "fomaml", "reptile", "anil", "meta_sgd"])
def test_an_inner_solver_that_is_for_a_proximal_term_makes_way_for_another_algorithms_descent(kind):
    raw = {"kind": "imaml", "inner": {"kind": "lbfgs", "steps": 7}}
    assert config(f"algorithm.kind={kind}", algorithm=raw).algorithm.inner == GradientDescentConfig()
    taken = config(f"algorithm.kind={kind}", "algorithm.inner.lr=0.2", algorithm=raw).algorithm.inner
    assert taken == GradientDescentConfig(lr=0.2)
    chosen = config("algorithm.kind=fomaml", "algorithm.inner={kind: lbfgs, steps: 7}", algorithm=raw)
    assert chosen.algorithm.inner == LBFGSConfig(steps=7)
    with pytest.raises(ConfigError, match=r"algorithm\.inner\.kind: 'lbgfs' given"):
        config(f"algorithm.kind={kind}", algorithm={"kind": "imaml", "inner": {"kind": "lbgfs"}})


@pytest.mark.parametrize("kind", ["maml", "reptile", "anil", "meta_sgd"])
def test_a_tolerance_is_refused_where_every_inner_step_is_taken(kind):
    overrides = f"algorithm.kind={kind}", "algorithm.inner.tolerance=0.1"
    with pytest.raises(
        ConfigError, match=rf"algorithm\.inner\.tolerance: 0\.1 given, but '{kind}' takes all"
    ) as caught:
        config(*overrides)
    assert "\n" not in str(caught.value) and caught.value.exit_code == 2
    assert config(overrides[0]).algorithm.inner.tolerance == 0
    for stops in ("imaml", "fomaml"):
        assert config(f"algorithm.kind={stops}", overrides[1]).algorithm.inner.tolerance == 0.1


def test_lambda_is_a_number_or_a_section():
    assert config("algorithm.lam=2").algorithm.lam == 2.0
    c = config("algorithm.lam={kind: diagonal, init: 2.0, learn: true, lr: 1e-2}")
    assert (c.algorithm.lam.kind, c.algorithm.lam.init, c.algorithm.lam.learn, c.algorithm.lam.lr) == (
        "diagonal",
        2.0,
        True,
        0.01,
    )
    c = config("algorithm.lam.learn=true", algorithm={"lam": 0.3})
    assert (c.algorithm.lam.kind, c.algorithm.lam.init, c.algorithm.lam.learn) == ("scalar", 0.3, True)
    for wrong, message in [
        ("-1", r"algorithm\.lam: -1 given, should be greater than 0"),
        ("abc", r"algorithm\.lam: 'abc' given, should be a number, or a mapping of init"),
        ("{kind: diag}", r"algorithm\.lam\.kind: 'diag' given, should be 'scalar'"),
        ("{init: 0}", r"algorithm\.lam\.init: 0 given, should be greater than 0"),
    ]:
        with pytest.raises(ConfigError, match=message):
            config(f"algorithm.lam={wrong}")


def test_choosing_a_preset_drops_what_the_file_says_in_its_place_but_no_override():
    raw = {"lam": 0.1, "inner": {"lr": 0.2, "steps": 7}, "solver": {"operator": "gauss_newton"}}
    c = config("algorithm.preset=paper", "algorithm.inner.steps=9", algorithm=raw, outer={"lr": 0.5, "warmup": 3})
    assert (c.algorithm.lam, c.algorithm.solver.operator, c.algorithm.inner) == (
        2.0,
        "hessian",
        GradientDescentConfig(lr=0.1, steps=9),
    )
    assert (c.outer.lr, c.outer.warmup) == (1e-3, 3)
    in_the_file = config(algorithm=raw | {"preset": "paper"})
    assert (in_the_file.algorithm.lam, in_the_file.algorithm.inner.lr) == (0.1, 0.2)


@pytest.mark.parametrize(
    ("preset", "override"),
    [
        ("paper", "algorithm.inner.steps=16"),
        ("paper", "algorithm.solver.max_iterations=5"),
        ("paper", "algorithm.lam.init=2.0"),
        ("reference", "algorithm.lam_offset=10.0"),
        ("reference", "outer.eps=1e-3"),
    ],
)
def test_an_override_of_what_a_preset_says_anyway_changes_nothing(preset, override):
    """Nothing of the file comes back with it, in either order."""
    raw = {
        "lam": 0.003,
        "inner": {"kind": "lbfgs", "steps": 80, "tolerance": 3e-5},
        "solver": {"kind": "conjugate_gradient", "max_iterations": 30, "rtol": 3e-4},
    }
    alone = config(f"algorithm.preset={preset}", algorithm=raw, outer={"lr": 3e-3, "eps": 1e-5})
    for overrides in ((f"algorithm.preset={preset}", override), (override, f"algorithm.preset={preset}")):
        c = config(*overrides, algorithm=raw, outer={"lr": 3e-3, "eps": 1e-5})
        lam = c.algorithm.lam if isinstance(c.algorithm.lam, float) else c.algorithm.lam.init
        assert lam == alone.algorithm.lam == 2.0
        assert (c.algorithm.inner, c.algorithm.solver, c.outer) == (
            alone.algorithm.inner,
            alone.algorithm.solver,
            alone.outer,
        )


def test_a_lambda_of_another_shape_begins_at_the_presets_strength():
    for c in (
        config("algorithm.lam.learn=true", algorithm={"preset": "paper"}),
        config("algorithm.preset=paper", "algorithm.lam={kind: diagonal, learn: true}", algorithm={"lam": 0.3}),
    ):
        assert (c.algorithm.lam.init, c.algorithm.lam.learn) == (2.0, True)
    assert config("algorithm.lam.init=0.5", algorithm={"preset": "paper"}).algorithm.lam.init == 0.5


def test_reference_preset_is_the_public_code_in_our_terms():
    """((1 + mu) I + H / (lam + 10)) x = v with mu = 1 is, times c = lam + 10, our system with lambda c and damping c."""
    c = config("algorithm.preset=reference")
    assert (c.algorithm.lam, c.algorithm.reference_inner, c.algorithm.lam_offset) == (2.0, True, 10.0)
    assert (c.algorithm.solver.damping, c.algorithm.solver.atol, c.algorithm.solver.operator) == (12.0, 1e-5, "hessian")
    assert (c.outer.lr, c.outer.eps) == (1e-3, 1e-3)
    assert config("algorithm.preset=reference", "algorithm.lam=5.0").algorithm.solver.damping == 15.0
    with pytest.raises(ConfigError, match=r"algorithm\.lam: .* take a number"):
        config("algorithm.preset=reference", "algorithm.lam={kind: diagonal}")
