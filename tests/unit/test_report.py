import io
from pathlib import Path

import pytest
from rich.console import Console
from typer import Typer
from typer.testing import CliRunner

from guardbench.cli.show import show
from guardbench.errors import GuardbenchError
from guardbench.metrics import estimate, worst_case
from guardbench.record_files import load_record, save_record
from guardbench.records import Outcome, ResultRecord
from guardbench.report import print_record

GOLDEN = Path(__file__).parents[1] / "golden"
RECORD = load_record(GOLDEN / "record-v1.json")


def printed(record, *, width=80, terminal=False, **more):
    stream = io.StringIO()
    colour = "standard" if terminal else None
    console = Console(file=stream, width=width, force_terminal=terminal, color_system=colour)
    print_record(console, record, **more)
    return stream.getvalue()


def changed(**fields):
    return ResultRecord(**{**RECORD.model_dump(), **fields})


def row(text, name):
    return next(line for line in text.splitlines() if line.startswith(name))


def test_the_table_is_the_golden_one():
    text = printed(RECORD, threat="linf 1/255", paths={"record": Path("a.json"), "png": Path("b")})
    lines = "".join(f"{line.rstrip()}\n" for line in text.splitlines())
    assert lines == (GOLDEN / "report-v1.txt").read_text(encoding="utf-8")


def test_every_measurement_shows_its_own_numbers():
    text = printed(RECORD)
    table = {"clean": [run.clean for run in RECORD.seeds]}
    for name in RECORD.attack_names:
        table[name] = [run.attacks[name] for run in RECORD.seeds]
    table["worst case"] = list(worst_case(RECORD.seeds).outcomes)
    for name, outcomes in table.items():
        found = estimate(outcomes)
        words = row(text, name).removeprefix(name).replace("*", "").split()
        assert words[:3] == [str(outcomes[0].total), "x", "3"]
        assert words[3:7] == [f"{found.mean:.1f}", f"{found.low:.1f}", "to", f"{found.high:.1f}"]
        assert words[7:] == [f"{value:.1f}" for value in found.per_seed]
    assert row(text, "cw").startswith("cw *")
    assert "* cw is not held inside the threat model (largest l2 distance 0.75)" in text


@pytest.mark.parametrize("width", [80, 100, 200])
def test_no_line_of_the_tables_is_wider_than_the_console(width):
    words = RECORD.model_dump()
    words["cost"] = [
        {**words["cost"][0], "stage": "autoattack of student 12345", "seconds": 360_000.0},
        {**words["cost"][1], "device": "NVIDIA H100 80GB HBM3 with a very long name indeed, twice"},
    ]
    words["method"]["title"] = "A title of two hundred characters " * 5 + "and its end"
    text = printed(ResultRecord(**words), width=width)
    assert max(len(line) for line in text.splitlines()) <= width


def test_ten_seeds_fold_inside_their_column():
    runs = [run.model_copy(update={"seed": k}) for k, run in enumerate(RECORD.seeds * 4)]
    text = printed(changed(seeds=runs))
    assert max(len(line) for line in text.splitlines()) <= 80
    assert "60 x 12" in text
    assert text.count("85.0") == 4


def test_a_dev_record_says_so_first_and_how_its_images_were_chosen():
    made = RECORD.provenance.model_copy(update={"precision": {"attacks": "fp32", "search": "bf16"}})
    text = " ".join(printed(changed(tier="dev", provenance=made.model_dump())).split())
    assert "tier dev, unofficial: on no board" in text.partition("measurement")[0]
    assert "Images: 60 of the protocol's, an equal share a class, the first of each" in text
    assert "Searched in bf16, judged in float32." in text
    assert "tier" not in printed(RECORD)


def test_one_seed_says_what_its_interval_leaves_out():
    text = printed(changed(seeds=RECORD.seeds[:1]))
    assert "one seed says nothing about other seeds" in text
    assert "60 x 1" in text


def test_no_common_image_is_said_and_not_invented():
    words = RECORD.model_dump()
    for run in words["seeds"]:
        run["attacks"]["pgd-100"] = Outcome.from_flags([False] * 5, first=55).model_dump()
        run["attacks"]["autoattack"] = Outcome.from_flags([False] * 5).model_dump()
    text = printed(ResultRecord(**words))
    assert "No worst case: no image was measured by every bounded attack." in text
    assert "worst case " not in text


def test_plain_where_there_is_no_terminal_and_styled_where_there_is():
    assert "\x1b" not in printed(RECORD, paths={"record": Path("[red]a[/red]")})
    assert "\x1b[" in printed(RECORD, terminal=True)


def test_words_of_a_record_are_never_markup():
    words = RECORD.model_dump()
    words["method"]["title"] = "[link=https://x.example]t[/link] [/]"
    words["flags"] = ["[red]f[/red]", "[/yellow]"]
    words["cost"][0]["stage"] = "[blink]s[/blink]"
    text = printed(ResultRecord(**words), paths={"[b]p": Path("[red]a\x1b[2J")})
    for shown in (
        "[link=https://x.example]t[/link] [/]",
        "flag: [red]f[/red]",
        "flag: [/yellow]",
        "[blink]s[/blink]",
        "[b]p  [red]a\\x1b[2J",
    ):
        assert shown in text


def test_a_reused_stage_is_marked_and_summed():
    text = printed(RECORD)
    assert row(text, "squeeze").split()[-1] == "reused"
    assert "reused" not in row(text, "recover")
    assert " ".join(row(text, "total").split()) == "total 1 min 49 s of it reused 31.2 s"
    assert "reused" not in printed(changed(cost=RECORD.cost[1:]))


def test_paths_are_never_broken():
    path = Path("/very/long") / ("x" * 150) / "record.json"
    assert f"record  {path}\n" in printed(RECORD, paths={"record": path})


def command():
    app = Typer()
    app.command()(show)
    return app


def test_show_prints_a_record_file(tmp_path):
    save_record(tmp_path / "a.json", RECORD)
    result = CliRunner().invoke(command(), [str(tmp_path / "a.json")])
    assert result.exit_code == 0
    assert "GUARD" in result.output
    assert "worst case" in result.output
    assert "threat" not in result.output.splitlines()[1]


def test_show_names_the_threat_of_a_protocol_that_it_has(tmp_path, monkeypatch):
    from types import SimpleNamespace

    from guardbench import protocol

    threat = SimpleNamespace(norm="linf", eps="1/255")
    known = SimpleNamespace(digest=RECORD.protocol_sha256, threat=threat)
    monkeypatch.setattr(protocol, "load_protocol", lambda _: known)
    save_record(tmp_path / "a.json", RECORD)
    result = CliRunner().invoke(command(), [str(tmp_path / "a.json")])
    assert "threat linf 1/255" in result.output
    known.digest = "0" * 64
    result = CliRunner().invoke(command(), [str(tmp_path / "a.json")])
    assert "threat linf" not in result.output


def test_show_of_something_else_is_one_line(tmp_path):
    (tmp_path / "a.json").write_text("{}", encoding="utf-8")
    for name in ("a.json", "absent.json"):
        result = CliRunner().invoke(command(), [str(tmp_path / name)])
        assert isinstance(result.exception, GuardbenchError)
        assert "\n" not in str(result.exception)
