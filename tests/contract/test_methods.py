"""Every method under baselines/ keeps the contract: a whole file, runnable recipes, a source each."""

import pytest
from accelerate import Accelerator

from guardbench.data.catalog import dataset_info
from guardbench.distillers.base import Task
from guardbench.errors import GuardbenchError
from guardbench.methods import load_method, method_names, methods_folder
from guardbench.progress import Progress
from guardbench.protocol import load_protocol, protocol_ids
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
    assert "digits@8" in method.recipes, "the embedded dataset is where anyone tries a method"
    if f"{measured.dataset}@{measured.resolution}" not in method.recipes:
        with pytest.raises(GuardbenchError, match="has no recipe for"):
            method.recipe(measured.dataset, measured.resolution)
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
        stages = resolve(DISTILLERS, "distiller", method.distiller)().plan(task)
        assert stages
        assert all(stage.passes > 0 for stage in stages)
    assert not list(tmp_path.iterdir()), "a plan writes nothing"


def test_guard_is_sre2l_with_the_regulariser_in_its_squeeze() -> None:
    guard, sre2l = load_method("guard"), load_method("sre2l")
    assert guard.distiller == sre2l.distiller
    assert guard.recipes.keys() == sre2l.recipes.keys()
    for key, recipe in guard.recipes.items():
        assert recipe.regulariser["kind"] == "curvature"
        assert sre2l.recipes[key].regulariser == {"kind": "none"}
        assert recipe.params["recover"] == sre2l.recipes[key].params["recover"]


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
    text = (methods_folder() / "guard" / "method.toml").read_text()
    lines = [line for line in text.splitlines() if not line.startswith(f"{field} =")]
    (tmp_path / "guard").mkdir()
    (tmp_path / "guard" / "method.toml").write_text("\n".join(lines))
    monkeypatch.setattr("guardbench.methods.methods_folder", lambda: tmp_path)
    with pytest.raises(GuardbenchError, match=rf"method\.toml.*{field}"):
        load_method("guard")
