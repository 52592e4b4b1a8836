"""Every method under baselines/ keeps the contract: a whole file, runnable recipes, a source each."""

from typing import get_args

import pytest
from accelerate import Accelerator

from guardbench.data.catalog import dataset_info
from guardbench.distillers.base import Task, tables
from guardbench.errors import GuardbenchError
from guardbench.methods import (
    load_method,
    measured,
    method_names,
    methods_folder,
    overridden,
)
from guardbench.progress import Progress
from guardbench.protocol import load_protocol, protocol_ids
from guardbench.records import LabelKind
from guardbench.registry import DISTILLERS, REGULARISERS, resolve
from guardbench.regularisers.base import build_regulariser
from guardbench.runtime import Run


def test_the_papers_pair_is_there() -> None:
    assert {"guard", "sre2l"} <= set(method_names())
    for protocol in protocol_ids():  # and may be run wherever anything is measured
        measured = load_protocol(protocol)
        for name in ("guard", "sre2l"):
            assert load_method(name).recipe(measured.dataset, measured.resolution)


@pytest.mark.parametrize("name", method_names())
@pytest.mark.parametrize("protocol", protocol_ids())
def test_every_method_plans_under_every_protocol_at_every_ipc(tmp_path, name, protocol) -> None:
    method, measured = load_method(name), load_protocol(protocol)
    if f"{measured.dataset}@{measured.resolution}" not in method.recipes:
        with pytest.raises(GuardbenchError, match="has no recipe for") as caught:
            method.recipe(measured.dataset, measured.resolution)
        assert "\n" not in str(caught.value)
        return
    recipe = method.recipe(measured.dataset, measured.resolution)
    assert recipe.source
    build_regulariser(recipe.regulariser, measured.threat.model)
    info = dataset_info(measured.dataset)
    run = Run(accelerator=Accelerator(cpu=True), workspace=tmp_path, seed=0, progress=Progress())
    for ipc in measured.ipc:
        task = Task(
            run=run,
            method=method,
            recipe=recipe,
            dataset=measured.dataset,
            resolution=measured.resolution,
            channels=info.channels,
            classes=tuple(str(k) for k in range(info.num_classes)),
            train_images=info.train_count,
            train_digest="0" * 64,
            ipc=ipc,
            threat=measured.threat.model,
        )
        distiller = resolve(DISTILLERS, "distiller", method.distiller)()
        assert tables(distiller.params), "a distiller tells what --set may name"
        assert distiller.label_kind(task) in get_args(LabelKind)
        assert distiller.image_count(task) > 0
        stages, refusal = [], f"{ipc}"
        try:
            stages = distiller.plan(task)
        except GuardbenchError as error:  # this IPC is beyond the method, and it says why
            refusal = str(error)
        assert stages or (f"IPC {ipc}" in refusal and len(refusal) > 10 and "\n" not in refusal)
        assert all(stage.passes > 0 for stage in stages)
    assert not list(tmp_path.iterdir()), "a plan writes nothing"


@pytest.mark.parametrize(
    ("name", "base"),
    [(name, "sre2l") for name in method_names() if name.startswith(("guard", "sre2l-"))]
    + [("cda-guard", "cda"), ("dc-guard", "dc")],
)
def test_a_method_with_a_regulariser_is_its_base_in_all_else(name: str, base: str) -> None:
    """A teacher of another length would be compared as well, and not the regulariser alone."""
    method, plain = load_method(name), load_method(base)
    assert method.distiller == plain.distiller
    assert method.recipes.keys() == plain.recipes.keys()
    for key, recipe in method.recipes.items():
        assert recipe.regulariser["kind"] != "none"
        assert plain.recipes[key].regulariser == {"kind": "none"}
        assert recipe.params == plain.recipes[key].params


@pytest.mark.parametrize(
    ("name", "kind", "weight"),
    [
        ("guard", "curvature", 1.0),
        ("cda-guard", "curvature", 1.0),
        ("dc-guard", "curvature", 1.0),
        ("guard-released", "curvature", 1e-4),
        ("guard-double", "curvature-double", 5.0),
    ],
)
def test_each_form_of_guard_has_one_meaning_at_every_size(name, kind, weight) -> None:
    for key, recipe in load_method(name).recipes.items():
        h = load_method("guard").recipes[key].regulariser["h"]
        assert recipe.regulariser == {"kind": kind, "weight": weight, "h": h}, key


@pytest.mark.parametrize("name", ["cda", "random", "herding", "k-center"])
def test_what_is_compared_with_sre2l_has_its_teacher(name: str) -> None:
    plain = load_method("sre2l")
    for key, recipe in load_method(name).recipes.items():
        assert recipe.regulariser == plain.recipes[key].regulariser
        assert recipe.params["squeeze"] == plain.recipes[key].params["squeeze"]


PAPERS = {
    "guard", "guard-double", "guard-released",
    "sre2l", "sre2l-adv", "sre2l-adv-released", "sre2l-trades", "sre2l-fbf", "sre2l-gradnorm",
    "cda", "cda-guard", "random", "herding", "k-center", "full",
    "dc", "dc-guard", "dsa", "dm", "mtt", "tesla", "mat",
}  # fmt: skip


def test_every_method_of_the_papers_has_digits() -> None:
    assert set(method_names()) >= PAPERS
    for name in method_names():
        assert "digits@8" in load_method(name).recipes, name


def test_like_takes_over_what_a_method_does_not_say() -> None:
    trades, sre2l = load_method("sre2l-trades"), load_method("sre2l")
    assert trades.distiller == sre2l.distiller
    assert trades.recipes.keys() == sre2l.recipes.keys()
    assert trades.recipes["cifar10@32"].params == sre2l.recipes["cifar10@32"].params
    assert trades.recipes["cifar10@32"].regulariser["steps"] == 10
    assert trades.recipes["imagenette@64"].regulariser["steps"] == 3
    curriculum = {"crop_scale": [0.08, 1.0], "curriculum": "cosine"}
    recover = load_method("cda").recipes["imagenette@64"].params["recover"]
    assert recover == sre2l.recipes["imagenette@64"].params["recover"] | curriculum
    assert not [p for p in trades.published if p.cells], "sre2l's cells are not its own"


def test_every_form_of_guard_is_held_against_the_papers_cells() -> None:
    """The paper's weight is of one form, and its released code's of the other."""
    cells = load_method("guard").published
    assert len(cells) == 16
    assert load_method("guard-double").published == load_method("guard-released").published == cells


@pytest.mark.parametrize(
    ("like", "said"),
    [("sre2l-trade", "'sre2l-trade' is no other method"), ("mine", "'mine' is no other method")],
)
def test_like_nobody_is_told(tmp_path, monkeypatch, like: str, said: str) -> None:
    write_method(tmp_path, monkeypatch, f'like = "{like}"')
    with pytest.raises(GuardbenchError, match=said):
        load_method("mine")


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ('distiller = "sre2l"\nrecipes = 3', "recipes"),
        ('distiller = "sre2l"\n[recipes]\nx = 3', "recipes.x"),
        ('distiller = "sre2l"\n[recipes.x]\nsource = "s"\nparams = 3', "recipes.x.params"),
        (
            'distiller = "sre2l"\nregulariser = 3\n[recipes.x]\nsource = "s"\n[recipes.x.params]',
            "regul",
        ),
    ],
)
def test_a_malformed_file_is_one_line(tmp_path, monkeypatch, more: str, said: str) -> None:
    write_method(tmp_path, monkeypatch, more)
    with pytest.raises(GuardbenchError, match=rf"method\.toml.*{said}") as caught:
        load_method("mine")
    assert "\n" not in str(caught.value)


def write_method(tmp_path, monkeypatch, more: str) -> None:
    (tmp_path / "mine").mkdir()
    head = 'name = "mine"\ntitle = "Mine"\npaper = "none"\n'
    (tmp_path / "mine" / "method.toml").write_text(head + more)
    monkeypatch.setattr("guardbench.methods.methods_folder", lambda: tmp_path)


def test_an_override_reaches_its_value_and_a_wrong_one_is_told() -> None:
    recipe = load_method("guard").recipe("digits", 8)

    def known(kind: str) -> dict[str, list[str]]:
        own = {"curvature": ["weight", "h"], "trades": ["beta", "steps", "step"]}
        return {"squeeze": ["epochs", "arch", "warmup_epochs"], "regulariser": ["kind", *own[kind]]}

    changed = overridden(
        recipe,
        ["squeeze.epochs=5", "squeeze.arch=resnet18", "regulariser.weight=0.1",
         "squeeze.warmup_epochs = 0.5"],
        known,
    )  # fmt: skip
    assert changed.params["squeeze"]["epochs"] == 5
    assert changed.params["squeeze"]["arch"] == "resnet18"
    assert changed.params["squeeze"]["warmup_epochs"] == 0.5
    assert changed.regulariser["weight"] == 0.1
    assert recipe.params["squeeze"]["epochs"] == 30
    for text, said in (
        ("squeeze.epoch=5", "Did you mean squeeze.epochs"),
        ("squeeze.epochs", "write STAGE.FIELD=VALUE"),
        ("epochs=5", "write STAGE.FIELD=VALUE"),
        ("squeeze.epochs=", "write STAGE.FIELD=VALUE"),
        ("regulariser.weight=[1]", "--set regulariser.weight=.1.: regulariser.weight"),
        ("regulariser.beta=6", "unknown --set field 'regulariser.beta'"),
        ("regulariser.weight=true", "regulariser: weight: must be a finite number, not True"),
        ("regulariser.weight=inf", "regulariser: weight: must be a finite number, not inf"),
    ):
        with pytest.raises(GuardbenchError, match=said):
            overridden(recipe, [text], known)
    with pytest.raises(GuardbenchError, match=r"squeeze\.epochs: is given twice"):
        overridden(recipe, ["squeeze.epochs=5", "squeeze.epochs=6"], known)
    # Another kind has its own parameters, whichever order they are given in.
    other = ["regulariser.beta=6", "regulariser.kind=trades", "regulariser.steps=3"]
    assert overridden(recipe, other, known).regulariser == {"kind": "trades", "beta": 6, "steps": 3}
    with pytest.raises(GuardbenchError, match=r"regulariser\.weight"):
        overridden(recipe, [*other, "regulariser.weight=1"], known)


@pytest.mark.parametrize("name", method_names())
def test_what_a_method_changes_in_another_has_a_source_of_its_own(name: str) -> None:
    method = load_method(name)
    if method.like is None:
        return
    base = load_method(method.like)
    for key, recipe in method.recipes.items():
        if key in base.recipes and recipe.model_dump(exclude={"source"}) != base.recipes[
            key
        ].model_dump(exclude={"source"}):
            assert recipe.source != base.recipes[key].source, key


@pytest.mark.parametrize("name", ["random", "herding", "k-center"])
def test_coresets_share_the_teacher_of_sre2l(name: str) -> None:
    coreset, sre2l = load_method(name), load_method("sre2l")
    for key, recipe in coreset.recipes.items():
        if "squeeze" in recipe.params:
            assert recipe.params["squeeze"] == sre2l.recipes[key].params["squeeze"], key


def test_dc_guard_is_dc_with_the_regulariser_in_its_real_gradient() -> None:
    guard, dc = load_method("dc-guard"), load_method("dc")
    assert guard.distiller == dc.distiller
    assert guard.recipes.keys() == dc.recipes.keys()
    for key, recipe in guard.recipes.items():
        assert recipe.regulariser["kind"] == "curvature"
        assert dc.recipes[key].regulariser == {"kind": "none"}
        assert recipe.params == dc.recipes[key].params


def test_registries_resolve_and_know_the_nearest_name() -> None:
    for table, what in ((DISTILLERS, "distiller"), (REGULARISERS, "regulariser")):
        for name in table:
            assert resolve(table, what, name) is not None
    with pytest.raises(GuardbenchError, match="Did you mean sre2l"):
        resolve(DISTILLERS, "distiller", "sre2")


def test_a_dataset_without_a_recipe_lists_those_there_are() -> None:
    with pytest.raises(GuardbenchError, match=r"no recipe for digits@16.*digits@8"):
        load_method("guard").recipe("digits", 16)


@pytest.mark.parametrize("field", ["distiller", "paper", "source"])
def test_a_missing_field_is_named(tmp_path, monkeypatch, field: str) -> None:
    text = (methods_folder() / "sre2l" / "method.toml").read_text()
    lines = [line for line in text.splitlines() if not line.startswith(f"{field} =")]
    (tmp_path / "sre2l").mkdir()
    (tmp_path / "sre2l" / "method.toml").write_text("\n".join(lines))
    monkeypatch.setattr("guardbench.methods.methods_folder", lambda: tmp_path)
    with pytest.raises(GuardbenchError, match=rf"method\.toml.*{field}"):
        load_method("sre2l")


def test_a_record_of_an_earlier_recipe_is_listed_as_one() -> None:
    method = load_method("guard")
    assert "digits ipc10-seed0" in measured(method)
    recipe = method.recipes["digits@8"]
    changed = recipe.model_copy(update={"regulariser": {**recipe.regulariser, "weight": 2.0}})
    found = measured(method.model_copy(update={"recipes": {"digits@8": changed}}))
    assert "digits ipc10-seed0 (an earlier recipe)" in found
    reworded = recipe.model_copy(update={"source": "elsewhere"})
    found = measured(method.model_copy(update={"recipes": {"digits@8": reworded}}))
    assert "digits ipc10-seed0" in found
