"""Published cells: matched by method, dataset, IPC and column, and doubted where they contradict."""

import re

import pytest
from typer.testing import CliRunner

from guardbench.cli import app
from guardbench.methods import MethodFile, Published, load_method, method_names, methods_folder
from guardbench.published import contradictions, reproduced
from guardbench.record_files import load_record


def with_cells(*rows: tuple[int, dict[str, float]]) -> MethodFile:
    published = tuple(
        Published(
            dataset="imagenette",
            ipc=ipc,
            resolution=224,
            source=f"They, 2025, table {k}",
            cells=cells,
        )
        for k, (ipc, cells) in enumerate(rows)
    )
    return load_method("guard").model_copy(update={"published": published})


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([(10, {"clean": 50.0, "pgd100": 40.0, "square": 45.0})], None),
        ([(10, {"clean": 50.0, "mim": 50.01})], "50.01 under mim is above 50.0 clean"),
        ([(10, {"cw": 41.47}), (10, {"cw": 58.67})], "cw is 41.47 in one table and 58.67"),
        ([(10, {"cw": 41.47}), (50, {"cw": 58.67})], None),
        ([(10, {"square": 19.0, "pgd100": 31.0})], "19.0 under Square is below 31.0"),
        ([(10, {"square": 19.0, "autoattack": 20.0})], "20.0 under AutoAttack is above 19.0"),
        ([(10, {"pgd100": 57.5, "autoattack": 64.84})], "64.84 under AutoAttack is above 57.5"),
        ([(10, {"pgd100": 57.5, "autoattack": 58.4})], None),
    ],
)
def test_a_contradiction_is_told(rows: list, said: str | None) -> None:
    lines = contradictions([with_cells(*rows)])
    assert len(lines) == (said is not None)
    assert said is None or said in lines[0]


def test_the_known_contradictions_of_guards_paper_are_found() -> None:
    lines = "\n".join(contradictions(load_method(name) for name in method_names()))
    assert "guard, imagenette, IPC 10: cw is 41.47 in one table and 58.67 in another" in lines
    assert "sre2l, imagenette, IPC 100" in lines
    assert "guard-double" not in lines, "its cells are guard's"
    assert "tesla, imagenette, IPC 50: 27.21 under AutoAttack is above 25.34 under Square" in lines
    assert "guard, imagenette, IPC 100: 64.84 under AutoAttack is above 57.5 under PGD-100" in lines


def test_a_gap_is_here_minus_paper_in_points() -> None:
    path = methods_folder() / "guard" / "results" / "imagenette-64" / "ipc10-seed0.json"
    record = load_record(path)
    clean = 100 * sum(run.clean.correct / run.clean.total for run in record.seeds) / 3
    method = with_cells((10, {"clean": 60.0, "nothing": 1.0}), (50, {"clean": 1.0}))
    (cell,) = reproduced([method], [record])
    assert (cell.column, cell.published) == ("clean", 60.0)
    assert cell.gap == pytest.approx(float(clean) - 60.0)
    assert not reproduced([load_method("sre2l")], [record])


def test_robust_accuracies_at_another_radius_have_no_gap() -> None:
    path = methods_folder() / "guard" / "results" / "imagenette-64" / "ipc10-seed0.json"
    record = load_record(path)
    method = with_cells((10, {"clean": 60.0, "pgd100": 40.0}))
    assert [cell.column for cell in reproduced([method], [record])] == ["clean", "pgd100"]
    digits = record.model_copy(update={"protocol": "digits"})
    assert [cell.column for cell in reproduced([method], [digits])] == ["clean"]


def test_two_papers_may_disagree() -> None:
    rows = [(10, {"clean": 28.3}), (10, {"clean": 29.96})]
    method = with_cells(*rows)
    assert contradictions([method])
    other = method.published[1].model_copy(update={"source": "Others, 2021, table 1"})
    assert not contradictions(
        [method.model_copy(update={"published": (method.published[0], other)})]
    )


def test_on_the_command_line() -> None:
    runner = CliRunner()
    shown = runner.invoke(app, ["compare", "--paper"], env={"COLUMNS": "160"})
    assert shown.exit_code == 0
    assert "57.93" in shown.output
    assert "contradicts itself" in shown.output
    listed = runner.invoke(app, ["methods"], env={"COLUMNS": "200"})
    for name in method_names():
        assert name in listed.output


def test_methods_tell_what_each_is_made_of_and_what_of_it_is_measured() -> None:
    listed = CliRunner().invoke(app, ["methods"], env={"COLUMNS": "1000"}).output
    found = {}
    for name, lines in re.findall(r"^(\S+): .*\n((?:  .*\n)+)", listed, re.MULTILINE):
        found[name] = dict(line.strip().split(maxsplit=1) for line in lines.splitlines())
        results = methods_folder() / name / "results"
        for path in results.glob("*/*-seed0.json"):
            assert f"{path.parent.name} {path.stem}" in found[name]["measured"]
        if not results.exists():
            assert found[name]["measured"] == "nothing yet"
    assert list(found) == method_names()
    for name, made_of in {
        "guard": ("sre2l", "curvature", "arXiv:2403.10045"),
        "sre2l": ("sre2l", "none", "arXiv:2306.13092"),
        "dc-guard": ("dc", "curvature", "(GUARD on DC)"),
    }.items():
        words = found[name]
        assert (words["distiller"], words["regulariser"]) == made_of[:2]
        assert made_of[2] in words["source"]


def test_a_method_shows_every_setting_of_its_recipes() -> None:
    shown = CliRunner().invoke(app, ["methods", "sre2l"], env={"COLUMNS": "1000"}).output
    recipes = dict(re.findall(r"^(\S+@\d+)\n((?:  .*\n)+)", shown, re.MULTILINE))
    method = load_method("sre2l")
    assert recipes.keys() == method.recipes.keys()
    for key, text in recipes.items():
        lines = text.splitlines()
        assert f"  source       {method.recipes[key].source}" in lines
        for table, words in method.recipes[key].params.items():
            for word, value in words.items():
                assert f"  {table}.{word} = {value}" in lines
        assert any(line.startswith("  recover.r_bn = ") for line in lines)
    assert "  regulariser.kind = none" in recipes["digits@8"].splitlines()
    assert "  recover.r_bn = 0.1" in recipes["digits@8"].splitlines()


@pytest.mark.parametrize("arguments", [[], ["a"], ["a", "b", "c"], ["--paper", "--json", "x", "a"]])
def test_wrong_arguments_are_one_line(arguments: list[str], monkeypatch, capsys) -> None:
    from guardbench.cli import main

    monkeypatch.setattr("sys.argv", ["guardbench", "compare", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
