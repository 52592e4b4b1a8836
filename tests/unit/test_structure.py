"""The house: imports point from the later rooms to the earlier ones, and each package has one door."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import guardbench

ROOT = Path(guardbench.__file__).parent

# Rooms in order; a module may import only from rooms at or before its own.
ROOMS = [
    ["errors", "canonical", "threat", "interrupts", "fields"],
    ["store", "locks", "progress", "figures", "commit"],
    [
        "toml_files",
        "protocol",
        "methods",
        "suite_file",
        "migrations",
        "records",
        "json_files",
        "record_files",
        "metrics",
        "ddranking",
        "registry",
        "meaning",
    ],
    ["paired", "board", "board_files", "board_words", "reassessment", "tier", "curve_files"],
    ["published", "hub"],
    ["ranking", "leaderboard", "board_diff", "compare", "report", "diagnosed"],
    ["filing", "site"],
    ["processes", "devices", "sealed", "stages", "runtime", "provenance"],
    ["data"],
    ["ball", "models", "batch_norm", "normalisation", "tensor_files"],
    ["distilled", "imported", "regularisers"],
    ["hub_card", "hub_table", "hub_set"],
    ["curvature"],
    ["distillers"],
    ["views", "labels"],
    ["training"],
    ["attacks"],
    ["checks", "classifiers", "shift"],
    ["scoring_plan", "scoring", "curve", "diagnosis", "forecast"],
    ["references"],
    ["evaluation"],
    ["pipeline", "assessment"],
    ["suite", "suite_run", "suite_table", "doctor"],
    ["submissions"],
    ["cli", "__main__"],
]
LIGHT = 7  # rooms before this one never import torch
ONLY_DOORS = {
    "pyautoattack": "attacks/reference.py",
    "robustbench": "attacks/robustbench.py",
    "matplotlib": "figures.py",
    "sklearn": "data/source.py",
    "jinja2": "site/build.py",
    "plotly": "site/build.py",
}
FILES = sorted(ROOT.rglob("*.py"))


def room_of(name: str) -> int:
    for number, room in enumerate(ROOMS):
        if name in room:
            return number
    raise AssertionError(f"guardbench.{name} has no room; give it one here and in the design")


def imports(path: Path) -> set[str]:
    """Every module that a file imports, inside functions too, but not those for type checkers."""
    found: set[str] = set()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    skipped: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            skipped |= {inner for part in node.body for inner in ast.walk(part)}
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= names if node.module == "guardbench" else {node.module}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_never_point_up(path: Path) -> None:
    parts = path.relative_to(ROOT).with_suffix("").parts
    if parts == ("__init__",):
        return
    own = room_of(parts[0])
    for name in imports(path):
        head, *rest = name.split(".")
        if head == "guardbench" and rest and not rest[0].startswith("__version"):
            assert room_of(rest[0]) <= own, f"{path.name} reaches up to {name}"
        if head in ("torch", "torchvision", "accelerate"):
            assert own >= LIGHT, f"{path.name} imports {head}"
        if head in ONLY_DOORS:
            assert str(path.relative_to(ROOT).as_posix()) == ONLY_DOORS[head]


def test_help_loads_no_torch() -> None:
    code = (
        "import sys\nfrom guardbench.cli import app\n"
        "try: app(['--help'])\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'pydantic', 'numpy', 'datasets', 'matplotlib', 'huggingface_hub'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def verbs() -> list[str]:
    """All that can be typed after `guardbench`, groups and their verbs."""
    import typer

    from guardbench.cli import app

    root = typer.main.get_command(app)
    found = []
    for name, command in root.commands.items():
        found += [name, *(f"{name} {inner}" for inner in getattr(command, "commands", {}))]
    return found


@pytest.mark.parametrize("verb", verbs())
def test_every_verb_explains_itself_with_an_example(verb: str) -> None:
    from typer.testing import CliRunner

    from guardbench.cli import app

    result = CliRunner().invoke(app, [*verb.split(), "--help"])
    assert result.exit_code == 0
    assert f"guardbench {verb.split()[0]}" in result.output.partition("Example")[2]


WITH_GENERATOR = {"rand", "randn", "randint", "randperm", "normal", "multinomial", "bernoulli",
                  "uniform_", "normal_", "bernoulli_", "exponential_", "random_"}  # fmt: skip
WITHOUT = {"rand_like", "randn_like", "randint_like", "dropout", "Dropout", "shuffle", "seed"}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_nothing_is_drawn_but_from_a_generator_with_a_seed_of_its_own(path: Path) -> None:
    for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Attribute):
            continue
        name, where = call.func.attr, f"{path.name}:{call.lineno}: {ast.unparse(call.func)}"
        owner = ast.unparse(call.func.value)
        if name in WITH_GENERATOR and owner != "rng":  # which is numpy's own generator
            assert "generator" in [word.arg for word in call.keywords], where
        assert name not in WITHOUT, where
        if owner in ("np.random", "numpy.random", "random"):
            assert name in ("default_rng", "Random"), where
            assert call.args, f"{where}: without a seed"


def test_durations_are_of_clocks_that_never_jump() -> None:
    """The wall clock is read where people see it: by a lock, for its holder, and by `assess`."""
    reads = ("time.time(", "datetime.now(", "utcnow(", "date.today(")
    found = {p.name for p in FILES for read in reads if read in p.read_text(encoding="utf-8")}
    assert found == {"locks.py", "leaderboard.py"}


def test_no_path_of_this_machine_is_named() -> None:
    """Neither where this checkout lies, nor the environment that runs it, nor a home folder."""
    machine = [str(ROOT.parent), sys.prefix, str(Path.home())]
    for path in FILES:
        text = path.read_text(encoding="utf-8")
        assert not [place for place in machine if f"{place}/" in text], path
