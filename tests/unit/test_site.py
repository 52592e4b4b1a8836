"""The site: every number and every hostile word of the boards, as text and nothing else."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from typer.testing import CliRunner

from guardbench import canonical
from guardbench.cli.site import app
from guardbench.ddranking import Scores
from guardbench.errors import GuardbenchError
from guardbench.leaderboard import build_workspace_boards, rebuild, write
from guardbench.metrics import worst_case
from guardbench.record_files import load_record, save_record
from guardbench.records import Outcome
from guardbench.site.build import LISTING, render, write_site
from guardbench.site.read import find_source, png_size, read_boards
from guardbench.site.serve import make_server
from guardbench.site.view import command, https

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'&{{7*7}}"  # of tests/conftest.py


class Page(HTMLParser):
    """What a browser would see: tags with attributes, text, tables, and the chart's data."""

    def __init__(self, content: bytes) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.data = ""
        self._inside: list[str] = []
        self.feed(content.decode())
        self.close()

    def handle_starttag(self, tag, attrs):
        self.text += " "
        self.tags.append((tag, dict(attrs)))
        self._inside.append("data" if dict(attrs).get("type") == "application/json" else tag)

    def handle_data(self, data):
        if self._inside and self._inside[-1] == "data" and not self.data:
            self.data = data
        else:
            self.text += data

    def named(self, *tags: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.tags if tag in tags]


@pytest.fixture(scope="module")
def boards(made_checkout):
    return read_boards(made_checkout)


@pytest.fixture(scope="module")
def files(boards):
    return render(boards)


@pytest.fixture(scope="module")
def pages(files):
    return {name: Page(content) for name, content in files.items() if name.endswith(".html")}


@pytest.fixture
def checkout(made_checkout, tmp_path):
    shutil.copytree(made_checkout, tmp_path / "copy")
    return tmp_path / "copy"


def entry_of(boards, method, protocol="digits"):
    (found,) = [
        (shown, entry)
        for shown in boards
        for entry in shown.entries
        if (entry.row.method.name, shown.board.protocol.id) == (method, protocol)
    ]
    return found


def page_of(pages, boards, method):
    shown, entry = entry_of(boards, method)
    return pages[f"{shown.folder}/{entry.slug}.html"]


def interval(found) -> str:
    return f"{found.low:.1f}\u2013{found.high:.1f}"


def words(text: str) -> str:
    return " ".join(text.split())


# --- what there is


def test_every_board_and_every_row_has_its_page(made_checkout, files, pages):
    for path in sorted(made_checkout.glob("leaderboards/*/ipc*.json")):
        board = json.loads(path.read_text(encoding="utf-8"))
        name = f"boards/{board['protocol']['id']}/ipc{board['ipc']}.html"
        shown = [attributes for attributes in pages[name].named("tr") if "data-row" in attributes]
        rows = [row for track in board["tracks"].values() for row in track]
        assert len(shown) == len(rows) > 0
        for attributes, row in zip(shown, rows, strict=True):
            slug = f"{row['method']['name']}-{canonical.digest(row['record']['path'])[:8]}"
            assert attributes["data-row"] == slug
            page = pages[f"{name.removesuffix('.html')}/{slug}.html"]
            for said in (row["record"]["path"], row["record"]["sha256"], row["storage"]["sha256"]):
                assert said in page.text
    assert len(pages) == 1 + 2 + 9
    assert sum(name.endswith(".png") for name in files) == 1


def test_every_link_of_a_page_leads_to_a_file_of_the_site(files, pages):
    for name, page in pages.items():
        for attributes in page.named("a", "link", "script", "img"):
            target = attributes.get("href") or attributes.get("src")
            if attributes.get("rel") == "noopener noreferrer nofollow ugc":
                assert target.startswith("https://example.org/")
            elif target and target.startswith("#"):
                assert target[1:] in [found.get("id") for _, found in page.tags]
            elif target:
                assert os.path.normpath(Path(name).parent / target) in files


def test_a_rows_page_has_every_students_numbers(pages, boards):
    _, entry = entry_of(boards, "sre2l")
    text = words(page_of(pages, boards, "sre2l").text)
    for run in entry.record.seeds:
        assert f"seed {run.seed}" in text
        for outcome in (run.clean, *run.attacks.values()):
            assert f"{outcome.correct} of {outcome.total}" in text
            assert f"{100 * outcome.correct / outcome.total:.1f}" in text
    for name, check in entry.record.seeds[0].checks.items():
        assert f"{name}" in text
        assert f"{100 * check.value:.1f}%" in text
    for stage in {cost.stage.split(" ")[0] for cost in entry.record.cost}:
        assert stage in text
    worst = worst_case(entry.record.seeds)
    assert interval(worst.estimate) in text
    for version in entry.record.provenance.versions.values():
        assert version in text
    for digest in (entry.record.protocol_sha256, entry.record.test.data_sha256):
        assert digest in text


def test_a_lowered_row_shows_what_it_was_and_why(pages, boards):
    _, entry = entry_of(boards, "guard")
    (past,) = entry.row.history
    assert past.ranked.mean > entry.row.ranked.mean
    text = words(page_of(pages, boards, "guard").text)
    assert past.reason in text
    assert past.source.path in text
    assert f"{past.ranked.mean:.1f}% ({interval(past.ranked)})" in text
    board = pages["boards/digits/ipc10.html"]
    assert "revised" in board.text


def test_tracks_stand_apart_and_a_shared_rank_is_marked(files, boards):
    shown = entry_of(boards, "guard")[0]
    html = files[f"{shown.folder}.html"].decode()
    sections = re.findall(r'<section class="track" data-track="(\w+)".*?</section>', html, re.S)
    assert sections == ["hard", "soft", "teacher"]
    for track, section in zip(sections, html.split('<section class="track"')[1:], strict=True):
        slugs = re.findall(r'<tr data-row="([^"]+)"', section)
        assert slugs == [entry.slug for entry in shown.of(track)]
        ranks = [
            words(Page(cell.encode()).text).replace(" ", "")
            for cell in re.findall(r"<tr data-row=.*?>\s*<td.*?</td>", section, re.S)
        ]
        found = [entry.row.rank for entry in shown.of(track)]
        assert ranks == [
            "none" if rank is None else f"{rank}=" if found.count(rank) > 1 else str(rank)
            for rank in found
        ]


def test_scores_stand_on_the_board_where_there_are_any(boards):
    shown, entry = entry_of(boards, "guard", "imagenette-64")
    assert b">IOR<" not in render([shown])[f"{shown.folder}.html"].split(b"</table>")[0]
    row = entry.row.model_copy(update={"scores": Scores(ior=0.125, hlr=None, lrs=0.375, ars=None)})
    others = tuple(replace(each, row=row) if each is entry else each for each in shown.entries)
    made = render([replace(shown, entries=others)])
    board = words(Page(made[f"{shown.folder}.html"]).text)
    assert "IOR LRS ARS" in board
    assert "+12.5 0.375 none" in board
    page = words(Page(made[f"{shown.folder}/{entry.slug}.html"]).text)
    assert "IOR +12.5 points: improvement" in page
    assert "HLR not measured" in page


def test_students_beside_it_are_told_with_every_seed(boards):
    shown, entry = entry_of(boards, "guard")
    weaker = Outcome.from_flags([True] * 123 + [False] * 177)
    runs = [run.model_copy(update={"references": {"random": weaker}}) for run in entry.record.seeds]
    record = entry.record.model_copy(update={"seeds": tuple(runs)})
    made = render([replace(shown, entries=(replace(entry, record=record),))])
    text = words(Page(made[f"{shown.folder}/{entry.slug}.html"]).text)
    assert "a random subset trained the same way 41.0" in text
    assert text.count("123 of 300") == 3


def test_a_superseded_board_says_so(boards):
    shown = boards[0]
    head = shown.board.protocol.model_copy(update={"superseded_by": "digits-2"})
    old = replace(shown, board=shown.board.model_copy(update={"protocol": head}))
    made = render([old])
    assert "superseded by digits-2;" in words(Page(made[f"{shown.folder}.html"]).text)
    assert "superseded" in Page(made["index.html"]).text
    assert "superseded" not in Page(render([shown])["index.html"]).text


def test_a_curve_belongs_to_the_record_with_the_longest_name(checkout):
    folder = checkout / "baselines/guard/results/digits"
    other = load_record(folder / "ipc10-seed0.json")
    method = other.method.model_copy(update={"recipe_sha256": "0" * 64})  # another result
    save_record(folder / "ipc10-seed0-student1.json", other.model_copy(update={"method": method}))
    write(checkout, rebuild(checkout))
    found = {
        entry.row.record.path.rpartition("/")[2]: [name for name, _ in entry.curves]
        for shown in read_boards(checkout)
        for entry in shown.entries
        if entry.curves
    }
    assert found == {
        "ipc10-seed0.json": ["ipc10-seed0.curve.json"],
        "ipc10-seed0-student1.json": ["ipc10-seed0-student1.curve.json"],
    }


def test_curves_are_drawn_and_told_in_numbers(pages, boards):
    shown = entry_of(boards, "guard")[0]
    page = page_of(pages, boards, "guard")
    data = json.loads(page.data)
    assert [curve["label"] for curve in data["curves"]] == ["student-1", "student-0"]
    first = data["curves"][1]["points"]
    assert first[0][:3] == ["0", 0.0, 83.33]
    assert first[-1] == ["128", 128.0, 0.0, 0.0, 1.26]
    assert all(low <= mean <= high for _, _, mean, low, high in first)
    assert "student-0, 300 images, PGD-40" in page.text
    assert len(json.loads(pages[f"{shown.folder}.html"].data)["curves"]) == 2


# --- hostile words


def test_hostile_words_are_text_on_every_page(pages, boards):
    seen = 0
    for name, page in pages.items():
        for attributes in page.named("script"):
            source = attributes.get("src")
            assert (source or "").endswith(("assets/site.js", "assets/plotly.min.js")) or (
                attributes == {"type": "application/json", "id": "data"}
            )
        assert all(
            (found["src"] or "").endswith(".svg") or found.get("class") == "grid"
            for found in page.named("img")
        )
        for tag, attributes in page.tags:
            assert not [key for key in attributes if key.startswith("on") or key == "style"], (
                name,
                tag,
            )
        seen += HOSTILE in page.text
    assert seen == 2, "its board's page and its own"
    own = page_of(pages, boards, "evil")
    assert own.text.count(HOSTILE) >= 7  # title, h1, override, flag, commit, device, platform


def harmless(model):
    """The same, with an innocent word for every hostile one."""
    text = model.model_dump_json().replace(json.dumps(HOSTILE)[1:-1], "innocent")
    return type(model).model_validate_json(text)


def test_hostile_words_change_no_tag_and_no_attribute(pages, boards):
    shown = entry_of(boards, "evil")[0]
    entries = [
        replace(each, row=harmless(each.row), record=harmless(each.record))
        for each in shown.entries
    ]
    plain = render([replace(shown, entries=tuple(entries))])
    assert not [name for name, content in plain.items() if b"alert(1)" in content]
    for name in plain:
        if name.startswith("boards/") and name.endswith(".html"):
            made = [(tag, list(found)) for tag, found in Page(plain[name]).tags]
            assert made == [(tag, list(found)) for tag, found in pages[name].tags], name


def test_data_of_charts_survives_hostile_words(files, pages, boards):
    shown, entry = entry_of(boards, "evil")
    data = json.loads(pages[f"{shown.folder}.html"].data)
    (row,) = [row for row in data["rows"] if row["row"] == entry.slug]
    assert row["label"] == row["device"] == HOSTILE
    assert row["url"] == f"ipc10/{entry.slug}.html"
    raw = files[f"{shown.folder}.html"].decode().split('id="data">')[1].split("</script>")[0]
    assert "<" not in raw
    assert ">" not in raw


@pytest.mark.parametrize(
    "text",
    [
        "https://example.org",
        "https://example.org/a?b=c&d#e",
        "https://arxiv.org:443/abs/1",
        "https://[::1]/x",
    ],
)
def test_an_https_address_is_a_link(text):
    assert https(text) == text


@pytest.mark.parametrize(
    "text",
    [
        "javascript:alert(1)", "http://example.org", "data:text/html,x", "//example.org", "HTTPS://example.org",
        "https://", "https:///path", "https://good.org@evil.org/", "https://a b.org", "https://a.org/\"onclick=",
        "https://a.org/<b>", "https://\u0430.org", "https://a.org:x/", "https://[::1", "https://a.org\\@b.org",
        " https://a.org", "https://a.org\n", "Xue et al., AAAI 2025", "",
    ],
)  # fmt: skip
def test_anything_else_is_text(text):
    assert https(text) is None


def test_links_of_a_submission(pages, boards):
    links = [
        found["href"]
        for found in page_of(pages, boards, "stranger").named("a")
        if "ugc" in (found.get("rel") or "")
    ]
    assert links == ["https://example.org/code", "https://example.org/paper.pdf"]
    evil = page_of(pages, boards, "evil")
    assert not [found for found in evil.named("a") if "ugc" in (found.get("rel") or "")]
    assert "javascript:alert(3)" in evil.text
    assert "https://user@example.org/" in evil.text


def test_a_page_may_load_nothing_but_the_sites_own_files(pages):
    for page in pages.values():
        (policy,) = [
            m["content"]
            for m in page.named("meta")
            if m.get("http-equiv") == "Content-Security-Policy"
        ]
        rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
        assert rules["default-src"] == "'none'"
        assert rules["script-src"] == rules["img-src"] == "'self'"
        assert rules["base-uri"] == rules["form-action"] == "'none'"


def test_our_own_assets_name_no_other_place(files):
    for name in ("assets/site.js", "assets/site.css", "assets/icon.svg"):
        text = files[name].decode().replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?:|//\w+\.|@import|url\(|eval\(|innerHTML", text), name


# --- the command


def typed(entry, **changes):
    record = entry.record.model_copy(update=changes)
    return shlex.split(command(record, area=entry.row.area, path=entry.row.record.path))


def alone(entry):
    """Its students, without those that they are compared with."""
    return tuple(run.model_copy(update={"references": {}}) for run in entry.record.seeds)


def test_the_command_measures_the_row_again(boards):
    ours, theirs = (entry_of(boards, name)[1] for name in ("mat", "stranger"))
    assert typed(ours, seeds=alone(ours)) == [
        "guardbench", "run", "--method", "mat", "--protocol", "digits", "--ipc", "10", "--seed", "0",
        "--set", "squeeze.epochs=5", "--precision", "fp32",
    ]  # fmt: skip
    assert typed(theirs, seeds=alone(theirs)) == [
        "guardbench", "submission", "score", "submissions/stranger", "--protocol", "digits",
        "--no-references", "--precision", "fp32",
    ]  # fmt: skip


def test_the_command_says_what_is_no_default(boards):
    _, entry = entry_of(boards, "guard")
    runs = tuple(
        run.model_copy(update={"references": {"random": run.clean}}) for run in entry.record.seeds
    )
    made = entry.record.provenance.model_copy(update={"engines": {"square": "reference"}})
    found = typed(entry, protocol="mine", seeds=runs, provenance=made)
    assert found[found.index("--protocol") + 1] == "protocols/mine.toml"
    assert "--references" in found
    assert found[-2:] == ["--engine", "reference"]


@pytest.mark.parametrize(
    ("precision", "said"), [("bf16", "bf16"), ("fp16, images fp32", "fp16"), ("mps", None)]
)
def test_the_command_measures_in_the_same_precision(boards, precision, said):
    _, entry = entry_of(boards, "mat")
    made = entry.record.provenance.model_copy(update={"precision": {"distillation": precision}})
    found = typed(entry, provenance=made)
    assert ("--precision" in found) == (said is not None)
    assert said is None or found[found.index("--precision") + 1] == said


def test_the_command_keeps_the_seed_and_leaves_out_what_was_no_choice(boards):
    _, entry = entry_of(boards, "mat")
    record = entry.record.model_copy(
        update={"overrides": ("train=120 of 9469 images", "squeeze.epochs=5")}
    )
    path = "records/digits/ipc10/mat-seed3-reference.json"
    found = shlex.split(command(record, area="baselines", path=path))
    assert found[found.index("--seed") + 1] == "3"
    assert [found[k + 1] for k, word in enumerate(found) if word == "--set"] == ["squeeze.epochs=5"]


def test_a_hostile_setting_stays_one_word_of_the_command(boards):
    _, entry = entry_of(boards, "evil")
    found = shlex.split(command(entry.record, area="baselines", path=entry.row.record.path))
    assert f"a.b={HOSTILE}" in found


def test_the_command_parses(boards):
    from guardbench.cli import app as whole

    for name in ("guard", "mat", "stranger"):
        words = typed(entry_of(boards, name)[1])
        result = CliRunner().invoke(whole, [*words[1:], "--help"])
        assert result.exit_code == 0
        context = CliRunner().invoke(whole, [*words[1:], "--no-such-option"])
        assert "No such option: --no-such-option" in context.output


# --- the same bytes


def test_another_folder_and_another_hash_seed_give_the_same_bytes(files, checkout, tmp_path):
    code = (
        "import sys; from pathlib import Path; from guardbench.site.read import read_boards;"
        "from guardbench.site.build import render, write_site;"
        "write_site(Path(sys.argv[2]), render(read_boards(Path(sys.argv[1]))))"
    )
    (checkout / "baselines/guard").touch()
    subprocess.run(
        [sys.executable, "-c", code, str(checkout), str(tmp_path / "site")],
        check=True, env={**os.environ, "PYTHONHASHSEED": "7", "TZ": "Asia/Tokyo"},
    )  # fmt: skip
    for name, content in files.items():
        assert (tmp_path / "site" / name).read_bytes() == content, name


def test_a_second_build_touches_nothing(files, tmp_path):
    assert write_site(tmp_path, files) == len(files)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert write_site(tmp_path, files) == 0
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_what_is_gone_is_removed_and_what_is_not_ours_stays(files, boards, tmp_path):
    write_site(tmp_path, files)
    (tmp_path / "CNAME").write_text("boards.example.org", encoding="utf-8")
    fewer = render(boards[:1])
    gone = files.keys() - fewer.keys()
    assert write_site(tmp_path, fewer) == len(gone) + 1  # and the index is another
    assert not [name for name in gone if (tmp_path / name).exists()]
    assert (tmp_path / "CNAME").exists()


def test_a_file_of_somebody_else_is_not_overwritten(files, tmp_path):
    (tmp_path / "index.html").write_text("mine", encoding="utf-8")
    with pytest.raises(GuardbenchError, match=r"index\.html: is there and not of an earlier build"):
        write_site(tmp_path, files)
    assert [path.name for path in tmp_path.iterdir()] == ["index.html"]


def test_a_tampered_list_removes_nothing_outside_the_site(files, tmp_path):
    site, outside = tmp_path / "site", tmp_path / "outside.html"
    outside.write_text("kept", encoding="utf-8")
    write_site(site, files)
    inside = site / "notes.txt"
    inside.write_text("kept", encoding="utf-8")
    names = json.loads((site / LISTING).read_text(encoding="utf-8"))
    names += [
        "../outside.html",
        "boards/../../outside.html",
        str(outside),
        "notes.txt",
        5,
        None,
        "assets",
    ]
    (site / LISTING).write_text(json.dumps(names), encoding="utf-8")
    write_site(site, files)
    assert outside.exists()
    assert inside.exists()
    (site / LISTING).write_text("{", encoding="utf-8")
    with pytest.raises(GuardbenchError, match="not the list of files of an earlier build"):
        write_site(site, files)


# --- other inputs


def test_no_boards_give_an_index_that_says_so(tmp_path):
    (tmp_path / "baselines").mkdir()
    write(tmp_path, rebuild(tmp_path))
    made = render(read_boards(tmp_path))
    assert sorted(made) == ["assets/icon.svg", "assets/site.css", "assets/site.js", "index.html"]
    assert "No boards yet" in Page(made["index.html"]).text


def test_a_workspace_shows_the_pictures_of_its_artifacts(made_checkout, tmp_path):
    record = load_record(made_checkout / "baselines/guard/results/digits/ipc10-seed0.json")
    manifest = {"any": "words", "n": 1}
    artifact = record.artifact.model_copy(update={"sha256": canonical.digest(manifest)})
    record = record.model_copy(update={"artifact": artifact})
    save_record(tmp_path / "records/digits/ipc10/guard-seed0.json", record)
    folder = tmp_path / "images/0123456789abcdef/distilled"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    picture = made_checkout / "baselines/guard/results/digits/ipc10-seed0.png"
    shutil.copy(picture, folder / "preview.png")
    build_workspace_boards(tmp_path)
    (shown,) = read_boards(tmp_path, workspace=True)
    (entry,) = shown.entries
    made = render([shown])
    assert made[f"{shown.folder}/{entry.slug}.png"] == picture.read_bytes()
    page = Page(made[f"{shown.folder}/{entry.slug}.html"])
    (shape,) = [
        (found["width"], found["height"])
        for found in page.named("img")
        if found.get("class") == "grid"
    ]
    assert shape == ("120", "80")


def test_a_protocol_that_is_not_here_still_has_its_board(checkout, monkeypatch):
    from guardbench.site import read

    monkeypatch.setattr(read, "protocol_ids", list)
    boards = read_boards(checkout)
    assert all(shown.protocol is None for shown in boards)
    text = Page(render(boards)["boards/digits/ipc10.html"]).text
    assert "Attacks pgd100, fgsm, mim, cw, square, autoattack" in words(text)


def spoil_index(root):
    (root / "leaderboards/index.json").unlink()


def spoil_board(root):
    (root / "leaderboards/digits/ipc10.json").write_text("{", encoding="utf-8")


def spoil_board_missing(root):
    (root / "leaderboards/digits/ipc10.json").unlink()


def spoil_record(root):
    path = root / "baselines/guard/results/digits/ipc10-seed0.json"
    path.write_text(path.read_text(encoding="utf-8") + "\n", encoding="utf-8")


def spoil_record_missing(root):
    (root / "baselines/guard/results/digits/ipc10-seed0.json").unlink()


def spoil_picture(root):
    with (root / "baselines/guard/results/digits/ipc10-seed0.png").open("ab") as stream:
        stream.write(b"<script>")


def spoil_curve(root):
    path = root / "baselines/guard/results/digits/ipc10-seed0.curve.json"
    words = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**words, "protocol_sha256": "0" * 64}), encoding="utf-8")


def spoil_path(root):
    path = root / "leaderboards/digits/ipc10.json"
    text = path.read_text(encoding="utf-8")
    path.write_text(
        text.replace("baselines/guard/results", "../../guard/results"), encoding="utf-8"
    )


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (spoil_index, "index.json: no boards here; run `guardbench leaderboard build`"),
        (spoil_board, "ipc10.json: not a valid board"),
        (spoil_board_missing, "ipc10.json: cannot read board"),
        (spoil_record, "ipc10-seed0.json: not the record that its board was built from; run"),
        (spoil_record_missing, "ipc10-seed0.json: not a plain file inside"),
        (spoil_picture, "ipc10-seed0.png: not a PNG"),
        (spoil_curve, "0.curve.json: protocol_sha256: 000000000000, the record beside it has 1af6d6d4ae03"),
        (spoil_path, "not a plain file inside"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)  # fmt: skip
def test_bad_input_is_one_line_and_writes_nothing(checkout, tmp_path, spoil, said):
    spoil(checkout)
    result = CliRunner().invoke(
        app, ["build", "--root", str(checkout), "--output", str(tmp_path / "site")]
    )
    assert isinstance(result.exception, GuardbenchError)
    assert said in str(result.exception)
    assert "\n" not in str(result.exception)
    assert not (tmp_path / "site").exists()


def test_where_nothing_is_named_the_checkout_or_the_workspace_here_is_taken(
    checkout, tmp_path, monkeypatch
):
    monkeypatch.chdir(checkout / "baselines/guard")
    assert find_source(None, None) == (checkout, False)
    empty = tmp_path / "empty"
    empty.mkdir()
    monkeypatch.chdir(empty)
    with pytest.raises(GuardbenchError, match="name a checkout with --root"):
        find_source(None, None)
    (empty / "guardbench-runs/leaderboards").mkdir(parents=True)
    assert find_source(None, None) == (Path("guardbench-runs"), True)
    with pytest.raises(GuardbenchError, match="drop one"):
        find_source(empty, empty)


def small_png():
    stream = io.BytesIO()
    Image.new("L", (2, 3)).save(stream, "PNG")
    return stream.getvalue()


def test_a_png_is_one_from_its_first_byte_to_its_last():
    data = small_png()
    assert png_size(data) == (2, 3)
    for cut in range(len(data)):
        assert png_size(data[:cut]) is None
    assert png_size(data + b"PK\x03\x04") is None
    for place in range(len(data)):
        assert png_size(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]) is None


@given(st.binary(max_size=200), st.binary(max_size=80))
def test_any_bytes_are_a_png_or_not(head, tail):
    for data in (head, b"\x89PNG\r\n\x1a\n" + head, small_png()[:33] + tail):
        assert png_size(data) is None


# --- the commands


def test_build_says_what_it_made(made_checkout, tmp_path):
    words = ["build", "--root", str(made_checkout), "--output", str(tmp_path / "site")]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0
    assert "boards: 2, rows: 9, files: 17 (17 written or removed)" in result.output
    assert (tmp_path / "site/index.html").is_file()
    assert "(0 written or removed)" in CliRunner().invoke(app, words).output


def test_the_server_answers_with_the_site_and_lists_no_folder(files, tmp_path):
    write_site(tmp_path, files)
    server = make_server(tmp_path, 0)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        base = f"http://127.0.0.1:{server.server_port}"
        with urllib.request.urlopen(f"{base}/boards/digits/ipc10.html", timeout=10) as answer:
            assert answer.read() == files["boards/digits/ipc10.html"]
            assert "frame-ancestors 'none'" in answer.headers["Content-Security-Policy"]
            assert answer.headers["X-Content-Type-Options"] == "nosniff"
        for folder in ("boards/digits/", "assets/", "%2e%2e/%2e%2e/etc/passwd"):
            with pytest.raises(urllib.error.HTTPError, match="404"):
                urllib.request.urlopen(f"{base}/{folder}", timeout=10)
        with pytest.raises(GuardbenchError, match=r"--port \d+: in use; choose another one"):
            make_server(tmp_path, server.server_port)
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)


@pytest.mark.skipif(os.name == "nt", reason="no SIGINT to a child")
def test_ctrl_c_ends_the_server_quietly(made_checkout, tmp_path):
    words = [
        "site",
        "serve",
        "--port",
        "0",
        "--root",
        str(made_checkout),
        "--output",
        str(tmp_path / "site"),
    ]
    with subprocess.Popen(
        [sys.executable, "-u", "-m", "guardbench", *words],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as child:  # fmt: skip
        lines = [child.stdout.readline() for _ in range(2)]
        address = re.search(r"http://127\.0\.0\.1:\d+/", lines[1])
        assert address, lines
        with urllib.request.urlopen(address[0], timeout=10) as answer:
            assert b"Boards" in answer.read()
        child.send_signal(signal.SIGINT)
        _, errors = child.communicate(timeout=20)
        assert (child.returncode, errors) == (0, "")


def test_nothing_here_loads_torch_and_help_loads_no_templates():
    code = (
        "import sys, guardbench.cli.site\n"
        "heavy = {'jinja2', 'plotly', 'pydantic'} & set(sys.modules)\n"
        "import guardbench.site.build, guardbench.site.serve\n"
        "heavy |= {'torch', 'numpy', 'plotly'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
