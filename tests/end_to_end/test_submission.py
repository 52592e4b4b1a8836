"""A submission from an empty folder to a row on a board, as its author types it; and in CI's steps."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from command import clean_environment, guardbench, quick_protocol
from safetensors.torch import save_file

import guardbench as package
from guardbench.data.dataset import load_split
from guardbench.progress import Progress
from guardbench.record_files import load_record

ROOT = Path(package.__file__).parents[1]
NEW = (
    "submission", "new", "submissions/mine", "--title", "Mine", "--author", "A. Nobody", "--dataset",
    "digits", "--resolution", "8", "--ipc", "1", "--labels", "hard", "--licence", "CC0-1.0",
    "--made", "The mean image of every class.", "--kind", "safetensors",
)  # fmt: skip


def class_means(path: Path) -> None:
    train = load_split(
        "digits", "train", resolution=8, data_dir=None, cache_dir=None, progress=Progress()
    )
    means = [train.batch((train.labels == c).nonzero().flatten()).mean(0) for c in range(10)]
    save_file({"images": torch.stack(means), "labels": torch.arange(10)}, path)


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    folder = tmp_path_factory.mktemp("submission")
    made = guardbench(*NEW, cwd=folder)
    assert made.returncode == 0, made.stderr
    class_means(folder / "submissions" / "mine" / "images.safetensors")
    quick_protocol(folder)
    words = "submission", "score", "submissions/mine", "--protocol", "quick.toml"
    return folder, words, guardbench(*words, cwd=folder)


def test_a_new_form_says_which_files_belong_beside_it(tmp_path) -> None:
    made = guardbench(*NEW, cwd=tmp_path)
    assert made.stdout.splitlines() == [
        "wrote submissions/mine/submission.toml",
        "to be put there:",
        "  images.safetensors: images [10, 1, 8, 8], float32 in [0, 1] or uint8, not normalised",
        "  images.safetensors: labels [10], whole numbers from 0 to 9 (0 0, 1 1, 2 2, ...)",
        "then: guardbench submission check submissions/mine",
    ]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"--title": None, "--ipc": None}, "error: say --title, --ipc; nobody is here to be asked."),
        ({"--dataset": "digit"}, "error: unknown dataset 'digit'. Did you mean digits?"),
        ({"--made": "briefly"}, 'error: the form: made: must have at least 20 characters, not "briefly".'),
        ({"--kind": "hub"}, "error: say --repo, --revision; nobody is here to be asked."),
    ],
)  # fmt: skip
def test_a_form_that_is_wrong_is_not_written(tmp_path, changes, said) -> None:
    options = {**dict(zip(NEW[3::2], NEW[4::2], strict=True)), **changes}
    words = [word for pair in options.items() if pair[1] is not None for word in pair]
    made = guardbench(*NEW[:3], *words, cwd=tmp_path)
    assert made.returncode == 2
    assert made.stderr.startswith(said)
    assert not [*tmp_path.iterdir()]


def test_a_setting_that_no_protocol_measures_is_told(tmp_path) -> None:
    made = guardbench(
        *NEW, "--resolution", "9", "--labels", "soft", "--kind", "folder", cwd=tmp_path
    )
    assert made.returncode == 0, made.stderr
    assert "note: no protocol measures digits at 9 px, IPC 1" in made.stdout
    assert "  soft.safetensors: soft [10, 10], probabilities" in made.stdout
    assert "images/<class>/<name>.png: 1 of 9 px in each of 10 folders" in made.stdout


def test_without_images_the_check_says_what_is_missing(tmp_path) -> None:
    assert guardbench(*NEW, cwd=tmp_path).returncode == 0
    found = guardbench("submission", "check", "submissions/mine", "--json", "x.json", cwd=tmp_path)
    assert found.returncode == 1
    assert "images.safetensors: No such file or directory; add it." in found.stdout
    (problem,) = json.loads((tmp_path / "x.json").read_text())["problems"]
    assert problem["file"] == "images.safetensors"


def test_it_gets_a_row_with_its_references(scored) -> None:
    folder, _, result = scored
    assert result.returncode == 0, result.stderr
    assert "ok: nothing is wrong" in result.stdout
    assert "IOR" in result.stdout
    (path,) = folder.glob("guardbench-runs/records/quick/ipc1/mine-seed0.json")
    record = load_record(path)
    assert (record.method.name, record.method.distiller) == ("mine", "submission")
    assert record.artifact.label_kind == "hard"
    for run in record.seeds:
        assert set(run.references) == {"random", "plain", "random-plain"}
    board = json.loads((folder / "guardbench-runs/leaderboards/quick/ipc1.json").read_text())
    (row,) = board["tracks"]["hard"]
    assert row["method"]["title"] == "Mine"


def test_a_second_time_nothing_is_trained_and_the_record_is_the_same(scored) -> None:
    folder, words, _ = scored
    (path,) = folder.glob("guardbench-runs/records/quick/ipc1/mine-seed0.json")
    before = load_record(path).result_sha256
    again = guardbench(*words, cwd=folder)
    assert again.returncode == 0, again.stderr
    assert "nothing is left to do" in again.stdout
    assert load_record(path).result_sha256 == before


def test_what_is_packed_scores_the_same(scored) -> None:
    folder, words, _ = scored
    packed = guardbench("submission", "pack", "submissions/mine", cwd=folder)
    assert packed.returncode == 0, packed.stderr
    assert "wrote mine.zip" in packed.stdout
    words = tuple("mine.zip" if word == "submissions/mine" else word for word in words)
    again = guardbench(*words, cwd=folder)
    assert again.returncode == 0, again.stderr
    assert "nothing is left to do" in again.stdout


def test_a_submission_is_not_packed_into_itself(scored, tmp_path) -> None:
    folder, _, _ = scored
    shutil.copytree(folder / "submissions", tmp_path / "submissions")
    mine = tmp_path / "submissions" / "mine"
    before = sorted(mine.rglob("*"))
    refused = guardbench("submission", "pack", ".", cwd=mine)
    assert refused.returncode == 2
    assert "would lie in the submission itself" in refused.stderr
    assert refused.stderr.count("\n") == 1
    assert sorted(mine.rglob("*")) == before


def test_a_broken_one_is_not_scored(scored, tmp_path) -> None:
    folder, _, _ = scored
    shutil.copytree(folder / "submissions", tmp_path / "submissions")
    (tmp_path / "submissions" / "mine" / "evil.pkl").write_bytes(b"x")
    result = guardbench("submission", "score", "submissions/mine", cwd=tmp_path)
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert "evil.pkl: nothing in the form names this file" in result.stderr
    assert not (tmp_path / "guardbench-runs").exists()


def steps(workflow: str) -> dict[str, str]:
    """The shell lines of a workflow's steps by their names."""
    words = yaml.safe_load((ROOT / ".github" / "workflows" / workflow).read_text())
    (job,) = words["jobs"].values()
    return {step["name"]: step["run"] for step in job["steps"] if "run" in step}


def shell(lines: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs lines as GitHub's runners do."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", lines],
        cwd=cwd, env=clean_environment() | {"PATH": path} | environment,
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip


@pytest.fixture
def checkout(tmp_path) -> Path:
    """What a runner has checked out: guardbench's public files, in a repository of their own."""
    there = tmp_path / "base"
    for name in ("baselines", "leaderboards", "submissions"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, there / name)
    git(there, "init", "-q")
    commit(there, "base")
    return there


def git(folder: Path, *words: str) -> str:
    found = subprocess.run(
        ["git", "-c", "user.name=x", "-c", "user.email=x@example.org", *words],
        cwd=folder, check=True, capture_output=True, text=True,
    )  # fmt: skip
    return found.stdout.strip()


def commit(folder: Path, message: str) -> None:
    git(folder, "add", "-A")
    git(folder, "commit", "-qm", message)


def test_the_boards_workflow_passes_here_and_fails_on_a_difference(checkout) -> None:
    found = steps("boards.yml")
    assert found["install"] == "python -m pip install ."
    for name in ("rebuild", "check", "submissions"):
        result = shell(found[name], checkout)
        assert result.returncode == 0, result.stdout + result.stderr
    board = checkout / "leaderboards" / "digits" / "ipc10.json"
    board.write_text(board.read_text().replace("GUARD", "DRAUG", 1))
    commit(checkout, "somebody edits a board")
    assert shell(found["check"], checkout).returncode == 1
    assert shell(found["rebuild"], checkout).returncode == 1


def test_the_submission_workflow_checks_scores_and_writes_the_table(checkout, tmp_path) -> None:
    head = tmp_path / "head"
    git(tmp_path, "clone", "-q", str(checkout), "head")
    assert guardbench(*NEW, cwd=head).returncode == 0
    class_means(head / "submissions" / "mine" / "images.safetensors")
    commit(head, "a stranger's submission")
    refs = {"BASE": git(checkout, "rev-parse", "HEAD"), "HEAD": git(head, "rev-parse", "HEAD")}
    found = steps("submission.yml")
    assert found["install"] == "python -m pip install ./base"
    for name in ("find", "check", "score", "table"):
        result = shell(found[name], tmp_path, NUMBER="7", **refs)
        assert result.returncode == 0, result.stdout + result.stderr
    table = (tmp_path / "table" / "table.txt").read_text()
    assert "Mine (mine) on digits" in table
    assert "ok: nothing is wrong" in table
    assert "UNOFFICIAL" in table.upper()
    assert (tmp_path / "table" / "number.txt").read_text() == "7\n"
    (head / "submissions" / "mine" / "images.safetensors").unlink()
    commit(head, "it breaks")
    refs["HEAD"] = git(head, "rev-parse", "HEAD")
    assert shell(found["find"], tmp_path, NUMBER="7", **refs).returncode == 0
    assert shell(found["check"], tmp_path, **refs).returncode == 1
    assert "images.safetensors: No such file" in (tmp_path / "table" / "table.txt").read_text()


@pytest.mark.parametrize(
    "path",
    [
        "submissions/Mine/submission.toml",
        "submissions/mine/results/digits/ipc1-seed0.json",
        'submissions/mine/results/digits/ip"c.json',  # which git quotes
        "baselines/guard/results/digits/x.json",
        "leaderboards/digits/ipc1.json",
    ],
)
def test_the_submission_workflow_refuses_what_nobody_would_look_at(
    path, checkout, tmp_path
) -> None:
    head = tmp_path / "head"
    git(tmp_path, "clone", "-q", str(checkout), "head")
    (head / path).parent.mkdir(parents=True, exist_ok=True)
    (head / path).write_text("x")
    commit(head, "something")
    refs = {"BASE": git(checkout, "rev-parse", "HEAD"), "HEAD": git(head, "rev-parse", "HEAD")}
    assert shell(steps("submission.yml")["find"], tmp_path, NUMBER="7", **refs).returncode == 1


def test_the_submission_workflow_sees_what_is_moved_away_and_lets_a_set_be_withdrawn(
    checkout, tmp_path
) -> None:
    guardbench(*NEW, cwd=checkout)
    result = checkout / "submissions" / "mine" / "results" / "digits" / "ipc1-seed0.json"
    result.parent.mkdir(parents=True)
    result.write_text("{}" * 100)
    commit(checkout, "a submission that was scored")
    head = tmp_path / "head"
    git(tmp_path, "clone", "-q", str(checkout), "head")
    base = git(checkout, "rev-parse", "HEAD")
    found = steps("submission.yml")
    git(head, "mv", str(result.relative_to(checkout)), "elsewhere.json")
    commit(head, "a result is moved away")
    refs = {"BASE": base, "HEAD": git(head, "rev-parse", "HEAD")}
    assert shell(found["find"], tmp_path, NUMBER="7", **refs).returncode == 1
    git(head, "reset", "-q", "--hard", base)
    git(head, "rm", "-q", "submissions/mine/submission.toml")
    commit(head, "its author withdraws it")
    refs = {"BASE": base, "HEAD": git(head, "rev-parse", "HEAD")}
    shutil.rmtree(head / "submissions" / "mine")
    for name in ("find", "check", "score", "table"):
        result = shell(found[name], tmp_path, NUMBER="7", **refs)
        assert result.returncode == 0, result.stdout + result.stderr


def test_a_table_is_put_under_the_pull_request_that_was_scored_and_no_other(tmp_path) -> None:
    """`gh` is replaced by one that knows pull request 7 and writes down what it is told to post."""
    (tmp_path / "table").mkdir()
    (tmp_path / "table" / "number.txt").write_text("7\n")
    (tmp_path / "table" / "table.txt").write_text("row\n```\n\x1b[2J@everyone\n")
    fake = tmp_path / "bin" / "gh"
    fake.parent.mkdir()
    fake.write_text(
        '#!/bin/sh\nif [ "$1" = api ]; then [ "$2" = repos/o/r/pulls/7 ] && echo abc; '
        'else echo "$@" > posted; fi\n'
    )
    fake.chmod(0o755)
    lines = f'PATH="{fake.parent}:$PATH"\n' + steps("comment.yml")["comment"]
    assert shell(lines, tmp_path, GH_REPO="o/r", HEAD="abc").returncode == 0
    assert (tmp_path / "posted").read_text() == "pr comment 7 --body-file body.md\n"
    body = (tmp_path / "body.md").read_text()
    assert body.count("```") == 2
    assert "\x1b" not in body
    (tmp_path / "posted").unlink()
    assert shell(lines, tmp_path, GH_REPO="o/r", HEAD="another").returncode != 0
    assert not (tmp_path / "posted").exists()
