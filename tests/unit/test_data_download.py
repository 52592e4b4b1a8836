"""The downloader against a server on this machine that misbehaves in each of the usual ways."""

from __future__ import annotations

import dataclasses
import hashlib
import http.server
import io
import os
import re
import socket
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

import guardbench
from guardbench.data import catalog, download
from guardbench.data.catalog import CATALOG, Archive
from guardbench.data.dataset import load_split
from guardbench.data.download import fetch, unpack
from guardbench.errors import GuardbenchError
from guardbench.progress import Progress

CONTENT = bytes(range(256)) * 4000


class Server(http.server.ThreadingHTTPServer):
    """Serves `content`; `ranges` and `cuts` say how badly; `asked` keeps the Range headers."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.content = CONTENT
        self.kind = "application/octet-stream"
        self.ranges = True
        self.cuts: list[int] = []
        self.asked: list[str | None] = []
        self.status = 200
        self.shift = 0
        self.announced = True

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/file.bin"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        server = self.server
        asked = self.headers.get("Range")
        server.asked.append(asked)
        size, start = len(server.content), 0
        if server.status != 200:
            self.send_error(server.status)
            return
        if asked and server.ranges:
            start = int(re.findall(r"\d+", asked)[0])
            if start >= size:
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{size}")
                self.end_headers()
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start + server.shift}-{size - 1}/{size}")
        else:
            self.send_response(200)
        self.send_header("Content-Type", server.kind)
        if server.announced:
            self.send_header("Content-Length", str(size - start))
        self.end_headers()
        body = server.content[start:]
        self.wfile.write(body[: server.cuts.pop(0)] if server.cuts else body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(download, "PAUSE_S", 0.0)
    monkeypatch.setenv("no_proxy", "*")
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def md5(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def get(server: Server, target: Path, *, digest: str = md5(CONTENT)) -> None:
    fetch(server.url, target, hexdigest=digest, limit=2_000_000, progress=Progress(), timeout=5)


def refused(server: Server, target: Path, *, digest: str = md5(CONTENT)) -> str:
    with pytest.raises(GuardbenchError) as caught:
        get(server, target, digest=digest)
    assert "\n" not in str(caught.value)
    assert not target.exists()
    return str(caught.value)


def test_whole_file_and_then_no_request(server: Server, tmp_path: Path) -> None:
    target = tmp_path / "new" / "file.bin"
    get(server, target)
    assert target.read_bytes() == CONTENT
    get(server, target)
    assert server.asked == [None]
    assert [path.name for path in target.parent.iterdir()] == ["file.bin"]


def test_cut_connections_are_resumed_where_they_broke(server: Server, tmp_path: Path) -> None:
    server.cuts = [300_000, 1, 400_000]
    get(server, tmp_path / "file.bin")
    assert (tmp_path / "file.bin").read_bytes() == CONTENT
    assert server.asked == [None, "bytes=300000-", "bytes=300001-", "bytes=700001-"]


def test_unfinished_download_is_kept_and_continued_by_the_next_call(
    server: Server, tmp_path: Path
) -> None:
    server.cuts = [500_000, 0, 0, 0]
    said = refused(server, tmp_path / "file.bin")
    assert "500000 bytes are kept" in said
    assert (tmp_path / "file.bin.part").stat().st_size == 500_000
    server.asked.clear()
    get(server, tmp_path / "file.bin")
    assert server.asked == ["bytes=500000-"]
    assert (tmp_path / "file.bin").read_bytes() == CONTENT


def test_server_that_ignores_range_starts_again(server: Server, tmp_path: Path) -> None:
    server.ranges = False
    server.cuts = [300_000]
    get(server, tmp_path / "file.bin")
    assert server.asked == [None, "bytes=300000-"]
    assert (tmp_path / "file.bin").read_bytes() == CONTENT


def test_server_that_sends_another_range_starts_again(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file.bin.part").write_bytes(CONTENT[:1000])
    server.shift = 7
    get(server, tmp_path / "file.bin")
    assert server.asked == ["bytes=1000-", None]
    assert (tmp_path / "file.bin").read_bytes() == CONTENT


def test_part_that_is_already_whole(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file.bin.part").write_bytes(CONTENT)
    get(server, tmp_path / "file.bin")
    assert (tmp_path / "file.bin").read_bytes() == CONTENT


def test_part_that_is_longer_than_the_file(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file.bin.part").write_bytes(CONTENT + b"more")
    get(server, tmp_path / "file.bin")
    assert (tmp_path / "file.bin").read_bytes() == CONTENT


def test_wrong_digest_is_told_and_removed(server: Server, tmp_path: Path) -> None:
    server.content = CONTENT[:-1] + b"x"
    said = refused(server, tmp_path / "file.bin")
    assert md5(CONTENT) in said
    assert md5(server.content) in said
    assert list(tmp_path.iterdir()) == []


def test_damaged_target_is_fetched_again(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file.bin").write_bytes(b"half")
    get(server, tmp_path / "file.bin")
    assert (tmp_path / "file.bin").read_bytes() == CONTENT


def test_web_page_instead_of_the_file(server: Server, tmp_path: Path) -> None:
    server.kind, server.content = "text/html; charset=utf-8", b"<html>quota exceeded</html>"
    assert "web page" in refused(server, tmp_path / "file.bin")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("announced", [True, False])
def test_more_than_the_file_can_be_is_not_kept(
    server: Server, tmp_path: Path, announced: bool
) -> None:
    server.content, server.announced = CONTENT * 3, announced
    assert "at most 2000000 are expected" in refused(server, tmp_path / "file.bin")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("status", [403, 404, 503])
def test_refusal_by_the_server(server: Server, tmp_path: Path, status: int) -> None:
    server.status = status
    assert f"answered {status}" in refused(server, tmp_path / "file.bin")


def test_nobody_listens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = time.monotonic()
    with pytest.raises(GuardbenchError, match=r"cannot be reached.*refused"):
        fetch(
            f"http://127.0.0.1:{port}/x",
            tmp_path / "x",
            hexdigest="0" * 32,
            limit=9,
            progress=Progress(),
        )
    assert time.monotonic() - started < 5


def test_server_that_says_nothing_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("no_proxy", "*")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/x"
        with pytest.raises(GuardbenchError, match=r"cannot be reached.*timed out"):
            fetch(
                url, tmp_path / "x", hexdigest="0" * 32, limit=9, progress=Progress(), timeout=0.3
            )


def test_other_kinds_of_address_are_refused(tmp_path: Path) -> None:
    with pytest.raises(GuardbenchError, match="only http"):
        fetch(
            "file:///etc/passwd", tmp_path / "x", hexdigest="0" * 32, limit=9, progress=Progress()
        )


def tar_of(entries: dict[str, bytes]) -> bytes:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w:gz") as tar:
        for name, content in entries.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return sink.getvalue()


def zip_of(entries: dict[str, bytes]) -> bytes:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return sink.getvalue()


@pytest.mark.parametrize(("ending", "pack"), [("tgz", tar_of), ("zip", zip_of)])
def test_archive_appears_whole_or_not_at_all(tmp_path: Path, ending: str, pack: object) -> None:
    assert callable(pack)
    archive = Archive(f"http://x/data.{ending}", "", 0, "data")
    file, folder = tmp_path / f"data.{ending}", tmp_path / "data"

    def attempt(content: bytes) -> None:
        file.write_bytes(content)
        unpack(file, folder, archive, Progress())

    for entries in ({"data/a": b"1", "../out": b"2"}, {"other/a": b"1"}):
        with pytest.raises(GuardbenchError, match=f"data.{ending}"):
            attempt(pack(entries))
    whole = pack({"data/a": b"1" * 5000, "data/b/c": os.urandom(5000)})
    with pytest.raises(GuardbenchError, match="cannot be unpacked"):
        attempt(whole[: len(whole) // 2])
    assert [path.name for path in tmp_path.iterdir()] == [file.name]
    assert not (tmp_path.parent / "out").exists()
    attempt(whole)
    assert (folder / "a").read_bytes() == b"1" * 5000
    attempt(pack({"data/a": b"2"}))
    assert (folder / "a").read_bytes() == b"1" * 5000, "who comes second finds it there"


def test_links_out_of_a_tar_are_refused(tmp_path: Path) -> None:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w:gz") as tar:
        member = tarfile.TarInfo("data/link")
        member.type, member.linkname = tarfile.SYMTYPE, "../../../etc"
        tar.addfile(member)
    (tmp_path / "data.tgz").write_bytes(sink.getvalue())
    archive = Archive("http://x/data.tgz", "", 0, "data")
    with pytest.raises(GuardbenchError, match="cannot be unpacked"):
        unpack(tmp_path / "data.tgz", tmp_path / "data", archive, Progress())


@pytest.fixture
def imagenette_archive() -> bytes:
    image = io.BytesIO()
    Image.new("RGB", (9, 9)).save(image, "JPEG")
    return tar_of(
        {
            f"imagenette2/{split}/{key}/0.JPEG": image.getvalue()
            for split in ("train", "val")
            for key in CATALOG["imagenette"].classes
        }
    )


def test_load_split_downloads_once(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, imagenette_archive: bytes
) -> None:
    monkeypatch.delenv("GUARDBENCH_DATA", raising=False)
    server.content = imagenette_archive
    archive = Archive(
        server.url.replace("file.bin", "imagenette2.tgz"), md5(imagenette_archive), 1, "imagenette2"
    )
    info = dataclasses.replace(CATALOG["imagenette"], archive=archive)
    monkeypatch.setitem(catalog.CATALOG, "imagenette", info)
    console = Console(record=True, width=200)
    for split in ("train", "val"):
        data = load_split(
            "imagenette",
            split,
            resolution=8,
            data_dir=None,
            cache_dir=tmp_path,
            progress=Progress(console),
        )
        assert len(data) == 10
    assert len(server.asked) == 1
    shown = console.export_text()
    assert "download imagenette2.tgz" in shown
    assert "unpack imagenette2.tgz" in shown
    # The archive has done its duty.
    left = sorted(path.name for path in (tmp_path / "downloads").iterdir())
    assert [name for name in left if not name.startswith(".")] == ["imagenette2"]


def test_off_line_is_one_line_with_all_that_helps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/imagenette2.tgz"
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.delenv("GUARDBENCH_DATA", raising=False)
    archive = Archive(url, "0" * 32, 1, "imagenette2")
    info = dataclasses.replace(CATALOG["imagenette"], archive=archive)
    monkeypatch.setitem(catalog.CATALOG, "imagenette", info)
    with pytest.raises(GuardbenchError) as caught:
        load_split(
            "imagenette",
            "train",
            resolution=8,
            data_dir=None,
            cache_dir=tmp_path,
            progress=Progress(),
        )
    said = str(caught.value)
    assert "\n" not in said
    for part in ("imagenette", url, str(tmp_path / "downloads"), "--data-dir", "GUARDBENCH_DATA"):
        assert part in said


def test_killed_download_is_resumed_by_another_process(server: Server, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from guardbench.data.download import fetch;"
        "from guardbench.progress import Progress;"
        "fetch(sys.argv[1], Path(sys.argv[2]), hexdigest='0'*32, limit=10**7, progress=Progress(),"
        " timeout=60)"
    )
    # Headers promise more than comes, and the connection stays open: the client hangs in a read.
    with socket.create_server(("127.0.0.1", 0)) as slow:
        url = f"http://127.0.0.1:{slow.getsockname()[1]}/x"
        victim = subprocess.Popen(
            [sys.executable, "-c", code, url, str(tmp_path / "file.bin")],
            env={
                **os.environ,
                "PYTHONPATH": str(Path(guardbench.__file__).parents[1]),
                "no_proxy": "*",
            },
        )
        slow.settimeout(60)
        connection, _ = slow.accept()
        with connection:
            connection.recv(4096)
            head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(CONTENT)}\r\n\r\n".encode()
            connection.sendall(head + CONTENT[:700_000])
            part = tmp_path / "file.bin.part"
            deadline = time.monotonic() + 60
            while not part.is_file() or part.stat().st_size < 1 << 18:
                assert time.monotonic() < deadline
                time.sleep(0.02)
            victim.kill()
            victim.wait(60)
    kept = part.stat().st_size
    get(server, tmp_path / "file.bin")
    assert server.asked == [f"bytes={kept}-"]
    assert (tmp_path / "file.bin").read_bytes() == CONTENT
