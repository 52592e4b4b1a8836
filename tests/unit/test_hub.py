"""Push, pull and fetch against a hub on this machine that speaks huggingface_hub's protocol."""

from __future__ import annotations

import base64
import hashlib
import http.server
import io
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import huggingface_hub
import pytest
import torch
import yaml
from PIL import Image
from rich.console import Console
from safetensors.torch import save
from typer.testing import CliRunner

from guardbench import hub
from guardbench.cli import app, main
from guardbench.distilled import load_distilled, save_distilled
from guardbench.errors import GuardbenchError
from guardbench.hub import fetch_dataset
from guardbench.hub_set import Wish, pull, push, write_push
from guardbench.models import build_model
from guardbench.progress import Progress
from guardbench.record_files import load_record, save_record
from guardbench.store import atomic_folder, require_free

GOLDEN = Path(__file__).parents[1] / "golden" / "record-v3.json"
REPO = "jane/set"
FILES = {
    "README.md",
    "preview.png",
    "data/train.parquet",
    "guardbench/manifest.json",
    "guardbench/images.safetensors",
}
QUIET = Progress()


# --- a hub ----------------------------------------------------------------------------------------


@dataclass
class Repository:
    """`branches` name commits, and a commit is its files; `private` hides it from strangers."""

    private: bool = False
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)

    def commit(self, files: dict[str, bytes], branch: str = "main") -> str:
        parent = self.branches.get(branch, "")
        words = json.dumps([parent, {path: git_sha(files[path]) for path in sorted(files)}])
        oid = hashlib.sha1(words.encode(), usedforsecurity=False).hexdigest()
        self.commits[oid], self.branches[branch] = files, oid
        return oid

    def files(self, branch: str = "main") -> dict[str, bytes]:
        return self.commits[self.branches[branch]]


def git_sha(content: bytes) -> str:
    head = f"blob {len(content)}\0".encode()
    return hashlib.sha1(head + content, usedforsecurity=False).hexdigest()


def large(path: str) -> bool:
    return path.endswith((".parquet", ".safetensors", ".png"))


class RefusalError(Exception):
    def __init__(self, status: int, code: str | None = None, message: str = "") -> None:
        super().__init__(status, code, message)
        self.status, self.code, self.message = status, code, message


class Hub(http.server.ThreadingHTTPServer):
    """Repositories in memory; `asked` keeps every request, the rest says how it misbehaves.

    Attributes:
        broken: paths whose content is answered with an error.
        listed: path -> the size that listings tell instead of the true one.
        swapped: path -> the content that is sent instead of the listed one.
        ignored: paths that a .gitignore would keep out of a commit.
        moves: someone else commits just before ours.
        stored: large files, by SHA-256.
        fetched: paths whose content was asked for, in order.
    """

    daemon_threads = True
    writer, reader = "hf_writer", "hf_reader"

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, Repository] = {}
        self.asked: list[tuple[str, str]] = []
        self.broken: set[str] = set()
        self.listed: dict[str, int] = {}
        self.swapped: dict[str, bytes] = {}
        self.ignored: set[str] = set()
        self.moves = False
        self.stored: dict[str, bytes] = {}
        self.named: dict[str, str] = {}  # SHA-256 -> path
        self.fetched: list[str] = []

    @property
    def port(self) -> int:
        return int(self.server_address[1])

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def put(self, files: dict[str, bytes], repo: str = REPO, branch: str = "main") -> str:
        self.repos.setdefault(repo, Repository())
        for content in files.values():
            self.stored[hashlib.sha256(content).hexdigest()] = content
        return self.repos[repo].commit(files, branch)


class Handler(http.server.BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        self.answer()

    do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815

    def read(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        pieces = []
        while size := int(self.rfile.readline(), 16):
            pieces.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(pieces)

    def answer(self) -> None:
        address = urlsplit(self.path)
        path = unquote(address.path)
        self.query = parse_qs(address.query)
        self.body = self.read()
        self.server.asked.append((self.command, path))
        try:
            for pattern, act in ROUTES:
                if found := re.fullmatch(pattern, path):
                    act(self, *found.groups())
                    return
            raise RefusalError(404)
        except RefusalError as refusal:
            headers = {"X-Error-Message": refusal.message} if refusal.message else {}
            if refusal.code:
                headers["X-Error-Code"] = refusal.code
            self.send(json.dumps({"error": refusal.message}).encode(), refusal.status, headers)

    def send(
        self, content: bytes, status: int = 200, headers: dict[str, str] | None = None
    ) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def words(self, value: object) -> None:
        self.send(json.dumps(value).encode(), headers={"Content-Type": "application/json"})

    def log_message(self, *_: object) -> None:
        pass

    def token(self) -> str | None:
        found = self.headers.get("Authorization", "").removeprefix("Bearer ") or None
        if found not in (None, Hub.writer, Hub.reader):
            raise RefusalError(401, None, "Invalid credentials in Authorization header")
        return found

    def may_write(self) -> None:
        if self.token() != Hub.writer:
            raise RefusalError(403, None, "You don't have the rights")

    def repo(self, name: str) -> Repository:
        found = self.server.repos.get(name)
        if found is None or (found.private and self.token() is None):
            self.token()
            raise RefusalError(404 if self.token() else 401, "RepoNotFound", "Repository not found")
        return found

    def at(self, name: str, revision: str) -> tuple[str, dict[str, bytes]]:
        repo = self.repo(name)
        oid = repo.branches.get(revision, revision)
        if oid not in repo.commits:
            raise RefusalError(404, "RevisionNotFound", "Invalid rev id")
        return oid, repo.commits[oid]

    # What each address does, with the parts of its path.

    def info(self, name: str, revision: str | None) -> None:
        repo = self.repo(name)
        oid, files = self.at(name, revision or "main")
        names = [{"rfilename": path} for path in files]
        words = {"id": name, "sha": oid, "private": repo.private, "siblings": names}
        self.words({**words, "tags": [], "downloads": 0, "likes": 0})

    def entry(self, path: str, content: bytes) -> dict[str, object]:
        size = self.server.listed.get(path, len(content))
        words = {"type": "file", "path": path, "size": size, "oid": git_sha(content)}
        if large(path):
            sha = hashlib.sha256(content).hexdigest()
            words["lfs"] = {"oid": sha, "size": size, "pointerSize": 130}
        return words

    def tree(self, name: str, revision: str, folder: str | None) -> None:
        _, files = self.at(name, revision)
        under = f"{folder}/" if folder else ""
        if self.query.get("recursive", ["false"])[0].lower() == "true":
            shown = [path for path in files if path.startswith(under)]
            self.words([self.entry(path, files[path]) for path in shown])
            return
        inside = [path[len(under) :] for path in files if path.startswith(under)]
        folders = sorted({path.split("/")[0] for path in inside if "/" in path})
        entries = [{"type": "directory", "path": under + name, "oid": "0" * 40} for name in folders]
        plain = [under + path for path in inside if "/" not in path]
        self.words(entries + [self.entry(path, files[path]) for path in plain])

    def paths_info(self, name: str, revision: str) -> None:
        _, files = self.at(name, revision)
        kind = self.headers.get("Content-Type", "")
        words = json.loads(self.body) if "json" in kind else parse_qs(self.body.decode())
        self.words([self.entry(path, files[path]) for path in words["paths"] if path in files])

    def resolve(self, name: str, revision: str, path: str) -> None:
        oid, files = self.at(name, revision)
        if path not in files:
            raise RefusalError(404, "EntryNotFound", "Entry not found")
        content = files[path]
        sha = hashlib.sha256(content).hexdigest()
        headers = {"X-Repo-Commit": oid, "ETag": f'"{git_sha(content)}"'}
        if not large(path):
            if self.command == "GET":
                self.server.fetched.append(path)
            self.send(content, headers=headers)
            return
        # Large files lie on another host, to which no token may go.
        self.server.stored[sha] = self.server.swapped.get(path, content)
        self.server.named[sha] = path
        headers["X-Linked-Etag"] = f'"{sha}"'
        headers["X-Linked-Size"] = str(len(content))
        headers["Location"] = f"http://localhost:{self.server.port}/cdn/{sha}"
        self.send(b"", 302, headers)

    def cdn(self, sha: str) -> None:
        assert "Authorization" not in self.headers
        content, path = self.server.stored[sha], self.server.named[sha]
        self.server.fetched.append(path)
        if path in self.server.broken:
            raise RefusalError(500)
        if asked := re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(asked[1]), int(asked[2] or len(content) - 1)
            told = {"Content-Range": f"bytes {first}-{last}/{len(content)}"}
            self.send(content[first : last + 1], 206, told)
            return
        self.send(content)

    def create(self) -> None:
        words = json.loads(self.body)
        name = f"{words['organization']}/{words['name']}"
        self.may_write()
        if words["organization"] != "jane":
            raise RefusalError(403, None, "You don't have the rights to create a dataset there")
        if name in self.server.repos:
            raise RefusalError(409, None, "You already created this dataset repo")
        assert words["type"] == "dataset"
        hidden = words.get("private") or words.get("visibility") == "private"
        self.server.repos[name] = Repository(private=bool(hidden))
        self.server.put({".gitattributes": b"*.parquet filter=lfs\n"}, name)
        self.words({"url": f"{self.server.url}/datasets/{name}", "name": name})

    def branch(self, name: str, branch: str) -> None:
        self.may_write()
        repo = self.repo(name)
        repo.branches[branch] = repo.branches["main"]
        self.words({})

    def validate(self) -> None:
        head = json.loads(self.body)["content"].split("---\n")[1]
        assert isinstance(yaml.safe_load(head), dict)
        self.words({"errors": [], "warnings": []})

    def preupload(self, name: str, revision: str) -> None:
        self.may_write()
        _, files = self.at(name, revision)
        answers = []
        for asked in json.loads(self.body)["files"]:
            path = asked["path"]
            held = files.get(path)
            oid = None
            if held is not None:
                oid = hashlib.sha256(held).hexdigest() if large(path) else git_sha(held)
            mode = "lfs" if large(path) else "regular"
            out = path in self.server.ignored
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": out, "oid": oid})
        self.words({"files": answers})

    def lfs_batch(self, _: str) -> None:
        self.may_write()
        objects = []
        for asked in json.loads(self.body)["objects"]:
            words = {"oid": asked["oid"], "size": asked["size"]}
            if asked["oid"] not in self.server.stored:
                place = f"http://localhost:{self.server.port}/lfs/{asked['oid']}"
                words["actions"] = {"upload": {"href": place, "header": {}}}
            objects.append(words)
        self.words({"transfer": "basic", "objects": objects})

    def lfs_put(self, sha: str) -> None:
        assert "Authorization" not in self.headers
        assert hashlib.sha256(self.body).hexdigest() == sha
        self.server.stored[sha] = self.body
        self.send(b"")

    def commit(self, name: str, branch: str) -> None:
        self.may_write()
        if self.server.moves:
            self.server.put({**self.server.repos[name].files(), "new.txt": b"x"}, name)
        parent, files = self.at(name, branch)
        lines = [json.loads(line) for line in self.body.decode().splitlines()]
        if lines[0]["value"].get("parentCommit") != parent:
            raise RefusalError(412, None, "The head has moved")
        after = dict(files)
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                after[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                after[value["path"]] = self.server.stored[value["oid"]]
            else:
                assert line["key"] == "deletedFile"
                del after[value["path"]]
        oid = self.server.repos[name].commit(after, branch)
        self.words(
            {"commitUrl": f"{self.server.url}/datasets/{name}/commit/{oid}", "commitOid": oid}
        )


NAME = "([^/]+/[^/]+)"
ROUTES = [
    ("/api/repos/create", Handler.create),
    ("/api/validate-yaml", Handler.validate),
    (f"/api/datasets/{NAME}/preupload/(.+)", Handler.preupload),
    (f"/api/datasets/{NAME}/commit/(.+)", Handler.commit),
    (f"/api/datasets/{NAME}/branch/(.+)", Handler.branch),
    (f"/api/datasets/{NAME}/paths-info/([^/]+)", Handler.paths_info),
    (f"/api/datasets/{NAME}/tree/([^/]+)(?:/(.+))?", Handler.tree),
    (f"/api/datasets/{NAME}(?:/revision/(.+))?", Handler.info),
    (f"/datasets/{NAME}.git/info/lfs/objects/batch", Handler.lfs_batch),
    (f"/datasets/{NAME}/resolve/([^/]+)/(.+)", Handler.resolve),
    ("/lfs/([0-9a-f]{64})", Handler.lfs_put),
    ("/cdn/([0-9a-f]{64})", Handler.cdn),
]


def point_at(url: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What HF_ENDPOINT, HF_HOME and HF_HUB_DISABLE_XET would have done before the import."""
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setenv("HF_TOKEN", Hub.writer)
    constants = {
        "ENDPOINT": url,
        "HUGGINGFACE_CO_URL_TEMPLATE": url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_CACHE": str(home / "hub"),
        "HF_TOKEN_PATH": str(home / "token"),
        "AGENT_HARNESSES_PATH": str(home / "agents.json"),
    }
    for name, value in constants.items():
        monkeypatch.setattr(huggingface_hub.constants, name, value, raising=False)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path_factory) -> Iterator[Hub]:
    with Hub() as running:
        point_at(running.url, tmp_path_factory.mktemp("home"), monkeypatch)
        thread = threading.Thread(target=running.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        yield running
        running.shutdown()
        thread.join()


# --- sets -----------------------------------------------------------------------------------------

CLASSES = ("cat", "dog: big", "häst")


def make_set(folder: Path, kind: str = "hard", *, ipc: int = 2, seed: int = 0) -> Path:
    """A distilled set of 3 classes: hard and teacher 3 x 16 x 16, soft 1 x 16 x 16."""
    random = torch.Generator().manual_seed(seed)
    channels = 1 if kind == "soft" else 3
    hard = torch.arange(3).repeat_interleave(ipc)
    soft = torch.rand(3 * ipc, 3, generator=random).softmax(dim=1)
    teacher = build_model("convnet-d2-small", channels=3, classes=3, resolution=16, seed=1)
    save_distilled(
        folder,
        images=torch.rand(3 * ipc, channels, 16, 16, generator=random),
        hard=hard,
        teacher=teacher if kind == "teacher" else None,
        teacher_arch="convnet-d2-small" if kind == "teacher" else None,
        soft=soft if kind == "soft" else None,
        dataset="animals",
        ipc=ipc,
        method="made-by-hand",
        classes=CLASSES,
        provenance={"seed": 3, "stage": "by | `hand` <b>"},
    )
    return folder


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("sets")
    return {kind: make_set(folder / kind, kind) for kind in ("hard", "soft", "teacher")}


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def pushed_files(folder: Path, tmp_path: Path, **wish: object) -> dict[str, bytes]:
    """What a push of `folder` sends, to put on the hub and to bend."""
    write_push(Wish(folder, REPO, **wish), tmp_path / "dry", QUIET)
    return contents(tmp_path / "dry")


def one_line(error: BaseException) -> str:
    said = str(error)
    assert "\n" not in said
    assert said.isprintable()
    assert len(said) < 500
    return said


# --- push and pull --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["hard", "soft", "teacher"])
def test_a_pushed_set_is_pulled_with_its_digest(
    server: Hub, sets, tmp_path: Path, kind: str
) -> None:
    done = push(Wish(sets[kind], REPO), QUIET)
    expected = FILES | ({"guardbench/teacher.safetensors"} if kind == "teacher" else set())
    held = server.repos[REPO].files()
    assert set(held) == expected | {".gitattributes"}
    assert done.url == f"{server.url}/datasets/{REPO}"
    assert done.changed
    assert server.repos[REPO].branches["main"] == done.commit
    assert sum("/commit/" in path for _, path in server.asked) == 1

    into = tmp_path / "new" / "pulled"
    got = pull(REPO, into, revision=None, progress=QUIET)
    assert got.fresh
    assert got.commit == done.commit
    ours, theirs = load_distilled(sets[kind]), load_distilled(into)
    assert theirs.manifest.sha256 == ours.manifest.sha256 == done.manifest.sha256
    assert torch.equal(theirs.images, ours.images)
    for name in ("manifest.json", *ours.manifest.files):
        assert (into / name).read_bytes() == (sets[kind] / name).read_bytes()
    assert set(contents(into)) == {"manifest.json", "preview.png", *ours.manifest.files}
    assert not any(path.is_symlink() for path in into.rglob("*"))
    assert [path.name for path in into.parent.iterdir()] == ["pulled"]


def test_pull_takes_a_branch_or_a_commit(server: Hub, sets, tmp_path: Path) -> None:
    first = push(Wish(sets["hard"], REPO, branch="tries/one"), QUIET)
    second = push(Wish(sets["soft"], REPO), QUIET)
    assert server.repos[REPO].branches == {"main": second.commit, "tries/one": first.commit}
    for revision, kind in (("tries/one", "hard"), ("main", "soft"), (first.commit, "hard")):
        into = tmp_path / revision.replace("/", "-")
        got = pull(REPO, into, revision=revision, progress=QUIET)
        assert got.manifest == load_distilled(sets[kind]).manifest
    with pytest.raises(GuardbenchError, match="no such revision") as caught:
        pull(REPO, tmp_path / "x", revision="tries/two", progress=QUIET)
    one_line(caught.value)


def test_the_next_set_replaces_the_last_whole(server: Hub, sets) -> None:
    push(Wish(sets["teacher"], REPO), QUIET)
    before = len(server.repos[REPO].commits)
    push(Wish(sets["hard"], REPO), QUIET)
    assert set(server.repos[REPO].files()) == FILES | {".gitattributes"}
    assert len(server.repos[REPO].commits) == before + 1
    again = push(Wish(sets["hard"], REPO), QUIET)
    assert not again.changed
    assert len(server.repos[REPO].commits) == before + 1


def test_private_is_private_or_refused(server: Hub, sets) -> None:
    push(Wish(sets["hard"], REPO, private=True), QUIET)
    assert server.repos[REPO].private
    server.put({".gitattributes": b""}, "jane/open")
    with pytest.raises(GuardbenchError, match="is public") as caught:
        push(Wish(sets["hard"], "jane/open", private=True), QUIET)
    one_line(caught.value)
    assert set(server.repos["jane/open"].files()) == {".gitattributes"}


def test_another_dataset_is_not_overwritten(server: Hub, sets) -> None:
    server.put({"README.md": b"mine", "train/0.parquet": b"data"})
    with pytest.raises(GuardbenchError, match=r"something else than a distilled set \(train\)"):
        push(Wish(sets["hard"], REPO), QUIET)
    assert server.repos[REPO].files()["README.md"] == b"mine"
    server.put({"README.md": b"a page made in the browser", ".gitattributes": b""}, "jane/fresh")
    push(Wish(sets["hard"], "jane/fresh"), QUIET)
    assert server.repos["jane/fresh"].files()["README.md"].startswith(b"---\nlicense")


def test_what_the_hub_leaves_out_is_no_push(server: Hub, sets) -> None:
    server.ignored = {"guardbench/images.safetensors"}
    with pytest.raises(GuardbenchError, match=r"images\.safetensors is not there as sent"):
        push(Wish(sets["hard"], REPO), QUIET)


def test_two_pushes_at_once_do_not_mix(server: Hub, sets) -> None:
    push(Wish(sets["soft"], REPO), QUIET)
    server.moves = True
    with pytest.raises(GuardbenchError, match="changed at the same time"):
        push(Wish(sets["hard"], REPO), QUIET)
    manifest = server.repos[REPO].files()["guardbench/manifest.json"]
    assert manifest == (sets["soft"] / "manifest.json").read_bytes()


FAILURES = {
    "no token; log in": lambda _, patch: patch.delenv("HF_TOKEN"),
    "does not accept this token": lambda _, patch: patch.setenv("HF_TOKEN", "hf_other"),
    "it needs permission to write": lambda _, patch: patch.setenv("HF_TOKEN", Hub.reader),
    "the Hub cannot be reached": lambda server, _: server.server_close(),
    "HF_HUB_OFFLINE is set": lambda _, patch: patch.setattr(
        huggingface_hub.constants, "HF_HUB_OFFLINE", True
    ),
}


@pytest.mark.parametrize("said", FAILURES)
def test_a_push_that_cannot_be_says_why(
    server: Hub, sets, monkeypatch: pytest.MonkeyPatch, said: str
) -> None:
    FAILURES[said](server, monkeypatch)
    with pytest.raises(GuardbenchError, match=said) as caught:
        push(Wish(sets["hard"], REPO), QUIET)
    assert one_line(caught.value).startswith(REPO)
    assert "hf_" not in str(caught.value)
    assert REPO not in server.repos


def test_a_name_of_another_owner_is_refused(server: Hub, sets) -> None:
    with pytest.raises(GuardbenchError, match="permission to write"):
        push(Wish(sets["hard"], "google/set"), QUIET)
    assert server.repos == {}


# --- what datasets reads --------------------------------------------------------------------------


def check_rows(rows, folder: Path) -> None:
    from datasets import ClassLabel
    from datasets import Image as ImageFeature

    ours = load_distilled(folder)
    assert isinstance(rows.features["image"], ImageFeature)
    assert isinstance(rows.features["label"], ClassLabel)
    assert tuple(rows.features["label"].names) == CLASSES
    assert rows["label"][:] == ours.hard.tolist()
    for row, tensor in zip(rows, ours.images, strict=True):
        size = (16, 16) if len(tensor) == 1 else (16, 16, 3)
        values = torch.tensor(list(row["image"].tobytes()), dtype=torch.float32).reshape(size) / 255
        pixels = values[None] if len(tensor) == 1 else values.permute(2, 0, 1)
        assert (pixels - tensor).abs().max() <= 1 / 510 + 1e-6
    if ours.soft is None:
        assert rows.column_names == ["image", "label"]
    else:
        assert torch.equal(torch.tensor(rows["soft_label"][:]), ours.soft)


@pytest.mark.parametrize("kind", ["hard", "soft", "teacher"])
def test_datasets_reads_the_folder_and_the_table_alone(sets, tmp_path: Path, kind: str) -> None:
    from datasets import load_dataset

    folder, cache = tmp_path / "dry", str(tmp_path / "cache")
    write_push(Wish(sets[kind], REPO), folder, QUIET)
    (folder / "data" / "old.parquet").write_bytes(b"what the card does not name is not read")
    check_rows(load_dataset(str(folder), split="train", cache_dir=cache), sets[kind])
    table = str(folder / "data" / "train.parquet")
    rows = load_dataset("parquet", data_files=table, split="train", cache_dir=cache)
    check_rows(rows, sets[kind])


def test_datasets_reads_the_hub(server: Hub, sets, tmp_path: Path) -> None:
    """In a process of its own, as a reader's: the endpoint is read when the packages are imported."""
    push(Wish(sets["soft"], REPO), QUIET)
    code = (
        "import json, sys\nfrom datasets import load_dataset\n"
        f"rows = load_dataset({REPO!r}, split='train')\n"
        "first = list(rows[0]['image'].tobytes())\n"
        "print(json.dumps([rows.features['label'].names, rows['label'][:], first, "
        "type(rows.features['image']).__name__]))"
    )
    home = {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_XET": "1"}
    environment = {**os.environ, **home, "HF_HUB_OFFLINE": "0", "HF_DATASETS_OFFLINE": "0"}
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    ours = load_distilled(sets["soft"])
    pixels = (ours.images[0] * 255).round().flatten().int().tolist()
    assert json.loads(run.stdout.splitlines()[-1]) == [
        list(CLASSES), ours.hard.tolist(), pixels, "Image",
    ]  # fmt: skip


# --- the card -------------------------------------------------------------------------------------


def test_the_card_tells_what_it_is_and_escapes_what_it_is_told(sets, tmp_path: Path) -> None:
    write_push(Wish(sets["soft"], REPO, licence="cc-by-4.0", branch="b"), tmp_path / "dry", QUIET)
    text = (tmp_path / "dry" / "README.md").read_text(encoding="utf-8")
    head = yaml.safe_load(text.split("---\n")[1])
    assert head["license"] == "cc-by-4.0"
    assert head["task_categories"] == ["image-classification"]
    assert head["size_categories"] == ["n<1K"]
    assert head["dataset_info"]["splits"][0]["num_examples"] == 6
    names = head["dataset_info"]["features"][1]["dtype"]["class_label"]["names"]
    assert names == dict(zip("012", CLASSES, strict=True))
    manifest = load_distilled(sets["soft"]).manifest
    for words in (
        "animals distilled by made-by-hand, 2 images per class",
        "6 of 1 x 16 x 16",
        f"labels {manifest.label_bytes:,}",
        manifest.sha256,
        "at most 1/510",
        'load_dataset("jane/set", split="train", revision="b")',
        "guardbench pull jane/set --revision b --output",
        'kind = "hub"',
        r"| `stage` | `by \| 'hand' <b>` |",
    ):
        assert words in text
    assert "## Measured" not in text


def record_of(folder: Path):
    record = load_record(GOLDEN)
    sha256 = load_distilled(folder).manifest.sha256
    artifact = record.artifact.model_copy(update={"sha256": sha256})
    return record.model_copy(update={"artifact": artifact})


def test_the_card_has_the_numbers_of_its_own_record_only(sets, tmp_path: Path) -> None:
    record = record_of(sets["soft"])
    write_push(Wish(sets["soft"], REPO, record=record), tmp_path / "dry", QUIET)
    text = (tmp_path / "dry" / "README.md").read_text(encoding="utf-8")
    table = text.split("## Measured")[1].split("## Load it")[0]
    clean = [100 * run.clean.correct / run.clean.total for run in record.seeds]
    each = " ".join(f"{value:.1f}" for value in clean)
    assert f"| clean | {sum(clean) / len(clean):.1f} |" in table
    assert f"| {each} |" in table
    assert all(name in table for name in (*record.attack_names, "worst case", record.protocol))
    assert "square-beats-pgd" in table
    assert r"GUARD (é, \[bold\])" in text
    with pytest.raises(GuardbenchError, match="give the record of this set") as caught:
        write_push(Wish(sets["hard"], REPO, record=record), tmp_path / "other", QUIET)
    one_line(caught.value)
    assert not (tmp_path / "other").exists()


# --- hostile repositories -------------------------------------------------------------------------


def bent_manifest(**fields: object):
    def bend(files: dict[str, bytes]) -> None:
        words = {**json.loads(files["guardbench/manifest.json"]), **fields}
        files["guardbench/manifest.json"] = json.dumps(words).encode()

    return bend


def bent_tensors(change, **fields: object):
    """Other tensors under a manifest that agrees with their digest."""

    def bend(files: dict[str, bytes]) -> None:
        tensors = {
            k: v.clone() for k, v in load_bytes(files["guardbench/images.safetensors"]).items()
        }
        change(tensors)
        content = save({name: tensor.contiguous() for name, tensor in tensors.items()})
        files["guardbench/images.safetensors"] = content
        sha = {"images.safetensors": hashlib.sha256(content).hexdigest()}
        bent_manifest(files=sha, **fields)(files)

    return bend


def load_bytes(content: bytes) -> dict[str, torch.Tensor]:
    from safetensors.torch import load

    return load(content)


def replace(path: str, content: bytes):
    return lambda files: files.update({path: content})


def drop(path: str):
    return lambda files: files.pop(path)


MANIFEST, IMAGES = "guardbench/manifest.json", "guardbench/images.safetensors"
HOSTILE = {
    "no-manifest": (drop(MANIFEST), "holds no distilled set"),
    "no-images": (drop(IMAGES), "images.safetensors is missing"),
    "not-json": (replace(MANIFEST, b"import os"), "Invalid JSON"),
    "not-text": (replace(MANIFEST, b"\xff\xfe{}"), "not UTF-8"),
    "deep": (replace(MANIFEST, b"[" * 100_000), "manifest.json"),
    "long-manifest": (replace(MANIFEST, b" " * (5 << 20)), "over the limit"),
    "unknown-field": (bent_manifest(**{"run\x1b[2J": "x"}), "there is no such field"),
    "leads-out": (bent_manifest(files={"../../evil": "0" * 64}), "differs by ../../evil"),
    "more-files": (bent_manifest(files={"images.safetensors": "0", "a.pkl": "0"}), "a.pkl"),
    "terminal": (bent_manifest(files={"\x1b[31m\n": "0"}), r"\\x1b"),
    "teacher-less": (bent_manifest(label_kind="teacher", teacher_arch="resnet18"), "files: must be"),
    "changed": (bent_manifest(files={"images.safetensors": "0" * 64}), "missing or changed"),
    "too-large": (replace(IMAGES, b"x" * (3 << 20)), "at most"),
    "not-tensors": (replace(IMAGES, b"x" * 100), "missing or changed"),
    "pickle": (bent_tensors(lambda t: t.pop("labels")), "not a distilled set"),
    "negative": (bent_tensors(lambda t: t["labels"].neg_()), "labels must be int64"),
    "huge-label": (bent_tensors(lambda t: t["labels"].fill_(1 << 60)), "labels must be int64"),
    "float-labels": (bent_tensors(lambda t: t.update(labels=t["labels"].float())), "int64"),
    "no-rows": (bent_tensors(lambda t: t.update({k: v[:0] for k, v in t.items()})), "float32"),
    "other-size": (bent_tensors(lambda t: t.update(images=t["images"][..., :8])), "manifest says"),
    "nan": (bent_tensors(lambda t: t["images"].fill_(float("nan"))), "not finite"),
    "undeclared-soft": (bent_tensors(lambda t: t.update(soft=torch.eye(6))), "soft labels are there"),
    "missing-soft": (bent_tensors(lambda _: None, label_kind="soft"), "soft labels are missing"),
    "same-classes": (bent_manifest(classes=["a", "a", "b"]), "names must differ"),
    "long-class": (bent_manifest(classes=["a", "b" * 100_000, "c"]), "200 characters"),
    "two-channels": (
        bent_tensors(lambda t: t.update(images=t["images"][:, :2]), channels=2),
        "2 channels",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def honest(sets, tmp_path_factory) -> dict[str, bytes]:
    return pushed_files(sets["hard"], tmp_path_factory.mktemp("honest"))


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_set_is_refused_in_a_line(server: Hub, honest, tmp_path: Path, case: str) -> None:
    bend, said = HOSTILE[case]
    files = dict(honest)
    bend(files)
    server.put(files)
    with pytest.raises(GuardbenchError, match=said) as caught:
        pull(REPO, tmp_path / "in", revision=None, progress=QUIET)
    one_line(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_names_that_are_no_words_are_drawn_as_they_are(server: Hub, honest, tmp_path: Path) -> None:
    files = dict(honest)
    bent_manifest(classes=["$\\frac$", "\x1b[31m", "<script>"])(files)
    server.put(files)
    pull(REPO, tmp_path / "in", revision=None, progress=QUIET)
    with Image.open(tmp_path / "in" / "preview.png") as picture:
        assert picture.format == "PNG"


def test_only_the_artifact_is_fetched(server: Hub, honest, tmp_path: Path) -> None:
    files = {**honest, "guardbench/images.pt": b"pickle", "set.py": b"code", "../up": b"x"}
    server.put(files)
    pull(REPO, tmp_path / "in", revision=None, progress=QUIET)
    assert set(server.fetched) == {MANIFEST, IMAGES}
    assert b"preview" not in (tmp_path / "in" / "preview.png").read_bytes()


@pytest.mark.parametrize(
    ("swap", "said"),
    [
        (lambda content: content[:-1] + b"x", "not the SHA-256"),
        (lambda content: content[:-9], "images.safetensors|answer"),
        (lambda content: content + b"x" * (6 << 20), "more arrives than"),
    ],
    ids=["other-bytes", "short", "without-end"],
)
def test_a_transfer_that_differs_from_the_listing_is_refused(
    server: Hub, honest, tmp_path: Path, swap, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "sleep", lambda _: None)
    server.put(honest)
    server.swapped[IMAGES] = swap(honest[IMAGES])
    with pytest.raises(GuardbenchError, match=said) as caught:
        pull(REPO, tmp_path / "in", revision=None, progress=QUIET)
    one_line(caught.value)
    assert not (tmp_path / "in").exists()


def test_a_folder_that_holds_something_else_stays_as_it_is(
    server: Hub, honest, tmp_path: Path
) -> None:
    server.put(honest)
    into = tmp_path / "in"
    into.mkdir()
    assert pull(REPO, into, revision=None, progress=QUIET).fresh
    server.fetched.clear()
    assert not pull(REPO, into, revision=None, progress=QUIET).fresh
    assert IMAGES not in server.fetched

    other = make_set(tmp_path / "other", ipc=1)
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").write_text("words", encoding="utf-8")
    for place, said in ((other, "another distilled set"), (mine, "something is there already")):
        before = contents(place)
        with pytest.raises(GuardbenchError, match=said) as caught:
            pull(REPO, place, revision=None, progress=QUIET)
        one_line(caught.value)
        assert contents(place) == before


@pytest.mark.parametrize(
    "repo", ["set", "a/b/c", "../x", "jane/..", "jane/a--b", "jane/a b", "-/-", ""]
)
def test_names_that_are_no_repository_are_refused_before_anything(
    server: Hub, repo: str, tmp_path
) -> None:
    for act in (
        lambda: pull(repo, tmp_path / "in", revision=None, progress=QUIET),
        lambda: fetch_dataset(repo, "0" * 40, tmp_path / "in", limit=1, progress=QUIET),
    ):
        with pytest.raises(GuardbenchError, match="OWNER/NAME") as caught:
            act()
        one_line(caught.value)
    assert server.asked == []


# --- fetching a dataset for a submission ----------------------------------------------------------


def fetch(commit: str, into: Path, limit: int = 1 << 20) -> Path:
    return fetch_dataset(REPO, commit, into, limit=limit, progress=QUIET)


DATA = {"data/train-0.parquet": b"P" * 5000, "x/y.safetensors": b"S" * 7000}
REST = {"load.py": b"code", "m.pkl": b"pickle", "w.pt": b"pickle", "README.md": b"words"}


def test_fetch_takes_the_data_files_and_nothing_else(server: Hub, tmp_path: Path) -> None:
    commit = server.put({**DATA, **REST, "../out.txt": b"not asked for"})
    into = tmp_path / "a" / "b"
    assert fetch(commit, into) == into
    assert contents(into) == DATA
    assert sorted(server.fetched) == sorted(DATA)
    assert not any(path.is_symlink() for path in into.rglob("*"))
    assert [path.name for path in into.parent.iterdir()] == ["b"]


def test_fetch_takes_the_artifact_alone_of_what_was_pushed(server: Hub, tmp_path: Path) -> None:
    """The teacher, which may be larger than all images, is named by a form; the PNGs are a copy."""
    exact = {"guardbench/images.safetensors": b"S" * 7000}
    beside = {"guardbench/teacher.safetensors": b"T" * 90_000, "data/train.parquet": b"P" * 5000}
    commit = server.put({**exact, **beside, **REST})
    assert contents(fetch(commit, tmp_path / "in", limit=7000)) == exact


def test_fetch_looks_at_the_bytes_before_it_takes_any(server: Hub, tmp_path: Path) -> None:
    commit = server.put({**DATA, **REST})
    with pytest.raises(GuardbenchError, match="2 data files are 12000 bytes together") as caught:
        fetch(commit, tmp_path / "in", limit=11_999)
    one_line(caught.value)
    assert server.fetched == []
    fetch(commit, tmp_path / "in", limit=12_000)


@pytest.mark.parametrize("revision", ["main", "v1.0", "0" * 39, "0" * 41, "A" * 40, "x\x1b[2J"])
def test_fetch_wants_a_commit(server: Hub, tmp_path: Path, revision: str) -> None:
    server.put(DATA)
    with pytest.raises(GuardbenchError, match="is no commit") as caught:
        fetch(revision, tmp_path / "in")
    one_line(caught.value)
    assert server.asked == []


def test_a_branch_that_looks_like_a_commit_is_none(server: Hub, tmp_path: Path) -> None:
    server.put(DATA, branch="a" * 40)
    with pytest.raises(GuardbenchError, match="names a branch or tag"):
        fetch("a" * 40, tmp_path / "in")


@pytest.mark.parametrize(
    "path",
    [
        "../up.parquet", "/etc/x.parquet", "a/../../x.parquet", "a//x.parquet", "./x.parquet",
        "C:\\x.parquet", "a\\..\\x.parquet", "\x1b[2J.parquet", ".hidden/x.parquet", "a\n.parquet",
        "<img>.parquet", "b" * 130 + ".parquet", "c/" * 130 + "x.parquet", "new\u202etxt.parquet",
    ],
)  # fmt: skip
def test_fetch_refuses_paths_that_could_mean_another_place(
    server: Hub, tmp_path: Path, path: str
) -> None:
    commit = server.put({**DATA, path: b"x"})
    with pytest.raises(GuardbenchError, match="not a path that is fetched") as caught:
        fetch(commit, tmp_path / "in")
    one_line(caught.value)
    assert server.fetched == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (REST, "no .parquet or .safetensors file"),
        ({"A.parquet": b"1", "a.parquet": b"2"}, "by capitals only"),
        ({f"{k}.parquet": b"" for k in range(12)}, "12 data files, over the limit of 10"),
        ({f"{k}.txt": b"" for k in range(40)}, "more than 30 files"),
    ],
    ids=["none", "capitals", "many", "endless"],
)
def test_fetch_refuses_odd_listings(
    server: Hub, tmp_path: Path, files, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "MAX_FILES", 10)
    monkeypatch.setattr(hub, "MAX_ENTRIES", 30)
    commit = server.put(files)
    with pytest.raises(GuardbenchError, match=said) as caught:
        fetch(commit, tmp_path / "in")
    one_line(caught.value)
    assert server.fetched == []


def test_a_listing_that_lies_about_sizes_fetches_nothing_for_good(
    server: Hub, tmp_path: Path
) -> None:
    commit = server.put({"a.parquet": b"x" * (4 << 20)})
    server.listed["a.parquet"] = 10
    with pytest.raises(GuardbenchError, match="more arrives than the 10 bytes listed") as caught:
        fetch(commit, tmp_path / "in", limit=100)
    one_line(caught.value)
    assert not (tmp_path / "in").exists()


def test_an_interrupted_fetch_goes_on_with_what_has_arrived(server: Hub, tmp_path: Path) -> None:
    commit = server.put(DATA)
    server.broken = {"x/y.safetensors"}
    with pytest.raises(GuardbenchError, match="What has arrived is kept") as caught:
        fetch(commit, tmp_path / "in")
    assert "has trouble (500)" in one_line(caught.value)
    assert not (tmp_path / "in").exists()
    server.broken = set()
    server.fetched.clear()
    fetch(commit, tmp_path / "in")
    assert server.fetched == ["x/y.safetensors"]
    assert contents(tmp_path / "in") == DATA
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_private_dataset_is_fetched_with_a_token_only(
    server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = server.put(DATA)
    server.repos[REPO].private = True
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(GuardbenchError, match="no such dataset on the Hub, or a private one"):
        fetch(commit, tmp_path / "in")
    monkeypatch.setenv("HF_TOKEN", Hub.reader)
    fetch(commit, tmp_path / "in")


# --- folders that appear whole --------------------------------------------------------------------


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "folder"
    with pytest.raises(IsADirectoryError), atomic_folder(target) as part:
        part.write_text("a folder is no file", encoding="utf-8")
    assert list(target.parent.iterdir()) == []
    with atomic_folder(target) as part:
        (part / "whole").write_text("x", encoding="utf-8")
        assert not target.exists()
    assert [path.name for path in target.iterdir()] == ["whole"]
    with pytest.raises(GuardbenchError, match="--here"), atomic_folder(target, option="--here"):
        pass


def test_the_current_folder_is_no_place_for_a_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(GuardbenchError, match="choose another folder"):
        require_free(Path())


# --- the commands ---------------------------------------------------------------------------------


def test_the_commands_say_what_they_did(server: Hub, sets, tmp_path: Path) -> None:
    sha = load_distilled(sets["soft"]).manifest.sha256
    save_record(tmp_path / "record.json", record_of(sets["soft"]))
    folder, into = str(sets["soft"]), str(tmp_path / "in")
    dry = CliRunner().invoke(app, ["push", folder, REPO, "--dry-run", str(tmp_path / "dry")])
    assert dry.exit_code == 0, dry.output
    assert sha in dry.output
    assert server.asked == []
    assert set(contents(tmp_path / "dry")) == FILES

    words = ["push", folder, REPO, "--private", "--record", str(tmp_path / "record.json")]
    pushed = CliRunner().invoke(app, words)
    assert pushed.exit_code == 0, pushed.output
    assert server.repos[REPO].private
    assert b"## Measured" in server.repos[REPO].files()["README.md"]
    commit = server.repos[REPO].branches["main"]
    for said in ("upload 5 files", f"{server.url}/datasets/{REPO}", commit, sha):
        assert said in pushed.output

    pulled = CliRunner().invoke(app, ["pull", REPO, "--output", into])
    assert pulled.exit_code == 0, pulled.output
    for said in (f"download {REPO}: ", "animals at 16 px by made-by-hand", commit, into, sha):
        assert said in pulled.output
    again = CliRunner().invoke(app, ["pull", REPO, "--output", into])
    assert "is there" in again.output


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["pull", "jane/none", "--output", "in"], "no such dataset on the Hub"),
        (["pull", REPO, "--output", "in", "--revision", "a..b"], "is no revision"),
        (["push", "nowhere", REPO], "cannot read manifest"),
        (["push", "nowhere", REPO, "--license", "MIT & more"], "--license"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    server: Hub, words, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["guardbench", *words])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    told = capsys.readouterr()
    assert told.err.startswith("error: ")
    assert said in told.err
    assert len(told.err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []
    assert server.repos == {}


def test_a_terminal_sees_bars_and_a_log_does_not(server: Hub, sets, capsys) -> None:
    log = io.StringIO()
    push(Wish(sets["hard"], REPO), Progress(Console(file=log, width=100)))
    assert "\r" not in log.getvalue() + capsys.readouterr().err
    screen = Console(file=io.StringIO(), force_terminal=True)
    push(Wish(sets["soft"], REPO), Progress(screen))
    assert "train.parquet" in capsys.readouterr().err
    assert len(server.repos[REPO].commits) == 3
