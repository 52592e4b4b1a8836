"""Distilled sets on the Hub: the exact artifact, beside a copy of 8-bit images that `datasets` reads.

| in the repository | what |
|---|---|
| `guardbench/manifest.json`, `images.safetensors`, `teacher.safetensors` | the artifact, byte for byte |
| `data/train.parquet` | the same images as PNGs, with labels, in Hugging Face's image layout |
| `README.md`, `preview.png` | the card |
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, get_token
from huggingface_hub.errors import (
    GatedRepoError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils.tqdm import (
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
)
from pydantic import ValidationError

from guardbench import hub
from guardbench.distilled import (
    IMAGES,
    MANIFEST,
    PREVIEW,
    TEACHER,
    Manifest,
    load_distilled,
)
from guardbench.errors import GuardbenchError
from guardbench.fields import printable
from guardbench.hub import answered, check_repo, check_revision, commit_of, downloaded, named_files
from guardbench.hub_card import ARTIFACT, CARD, LICENCE, TABLE, Facts, card_text, check_licence
from guardbench.hub_table import check_pictures, draw_preview, write_table
from guardbench.json_files import first_problem
from guardbench.progress import Progress
from guardbench.records import ResultRecord
from guardbench.store import atomic_folder, read_text, require_free, write_text

MANIFEST_LIMIT = 4 << 20
IMAGES_LIMIT = 16 << 30
TEACHER_LIMIT = 4 << 30
KNOWN = (CARD, PREVIEW, TABLE, *(f"{ARTIFACT}/{name}" for name in (MANIFEST, IMAGES, TEACHER)))
# What a repository that was made in the browser begins with.
_EMPTY = frozenset({".gitattributes", CARD})


@dataclass(frozen=True)
class Wish:
    """What to push where.

    Attributes:
        folder: a distilled set, as `save_distilled` writes it.
        repo: `OWNER/NAME`.
        private: a new repository is made private; a public one is refused.
        branch: to push to, made where it is missing; None for the main one.
        licence: an identifier of the Hub's.
        record: of this very set, for the card.
    """

    folder: Path
    repo: str
    private: bool = False
    branch: str | None = None
    licence: str = LICENCE
    record: ResultRecord | None = None


@dataclass(frozen=True)
class Pushed:
    """What was pushed: the manifest, the commit, the page, and whether anything was new."""

    manifest: Manifest
    commit: str
    url: str
    changed: bool


@dataclass(frozen=True)
class Pulled:
    """What was pulled: the manifest, from which commit, and whether the folder is new."""

    manifest: Manifest
    commit: str
    fresh: bool


def write_push(wish: Wish, into: Path, progress: Progress) -> Manifest:
    """Writes to `into` what `push` would send, and asks nothing of the network.

    Raises:
        GuardbenchError: `wish` cannot be pushed, or `into` is not an empty or new folder.
    """
    require_free(into, option="--dry-run")
    with atomic_folder(into, option="--dry-run") as part:
        manifest, files = _files(wish, part, progress)
        for path, file in files.items():
            if part not in file.parents:
                (part / path).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, part / path)
    return manifest


def push(wish: Wish, progress: Progress) -> Pushed:
    """Sends a distilled set to the Hub in one commit: all of it, or nothing.

    A repository that is missing is made. One that holds anything but a distilled set is refused; one
    that holds another distilled set gets the new one as its next commit.

    Raises:
        GuardbenchError: the set or a name is wrong, there is no token, the Hub refuses, or what it
            holds after the commit is not what was sent.
    """
    with tempfile.TemporaryDirectory(prefix="guardbench-push-") as scratch:
        manifest, files = _files(wish, Path(scratch), progress)
        with answered(wish.repo):
            if get_token() is None:
                raise GuardbenchError(
                    f"{wish.repo}: no token; log in with `hf auth login`, or set HF_TOKEN to one that "
                    "may write."
                )
        parent = _head_of(wish)
        held = named_files(wish.repo, parent, KNOWN)
        if f"{ARTIFACT}/{MANIFEST}" not in held:
            _refuse_others(wish.repo, parent)
        commit = _commit(
            wish, manifest, files, parent, sorted(held.keys() - files.keys()), progress
        )
        _confirm(wish.repo, commit, files)
    url = f"{hub.client().endpoint}/datasets/{wish.repo}"
    return Pushed(manifest, commit, url, commit != parent)


def pull(repo: str, into: Path, *, revision: str | None, progress: Progress) -> Pulled:
    """Fetches a pushed set to `into`: the artifact alone, every digest checked, and a preview drawn anew.

    The folder appears whole or not at all, and has the digest of the one that was pushed.

    Args:
        repo: `OWNER/NAME`.
        into: a folder that is not there yet, is empty, or holds this very set already.
        revision: a branch, a tag or a commit; the main branch by default.
        progress: where the stage is shown.

    Raises:
        GuardbenchError: `into` holds something else; no such repository or revision; there is no
            distilled set in it, or one that is damaged, too large or names other files.
    """
    check_repo(repo)
    if revision is not None:
        check_revision(revision)
    own = load_distilled(into).manifest if (into / MANIFEST).is_file() else None
    if own is None:
        require_free(into)
    commit = commit_of(repo, revision)
    paths = {name: f"{ARTIFACT}/{name}" for name in (MANIFEST, IMAGES, TEACHER)}
    listed = named_files(repo, commit, paths.values())
    manifest = _their_manifest(repo, commit, listed, into)
    if own is not None:
        if own.sha256 == manifest.sha256:
            return Pulled(manifest, commit, fresh=False)
        raise GuardbenchError(
            f"{into}: another distilled set is there already ({own.sha256[:12]}, and {repo} holds "
            f"{manifest.sha256[:12]}); choose another folder with --output."
        )
    wanted = [paths[MANIFEST], *(paths[name] for name in sorted(manifest.files))]
    _check_sizes(repo, manifest, listed, wanted)
    with (
        downloaded(repo, commit, [listed[path] for path in wanted], into, progress) as arrived,
        atomic_folder(into) as part,
    ):
        for path in wanted:
            arrived[path].replace(part / Path(path).name)
        _check_arrived(repo, part)
    return Pulled(manifest, commit, fresh=True)


def _files(wish: Wish, scratch: Path, progress: Progress) -> tuple[Manifest, dict[str, Path]]:
    """All that is pushed: path in the repository -> file, made in `scratch` or of the set's folder."""
    check_repo(wish.repo)
    check_licence(wish.licence)
    if wish.branch is not None:
        check_revision(wish.branch)
    distilled = load_distilled(wish.folder)
    manifest = distilled.manifest
    check_pictures(distilled, str(wish.folder))
    if manifest.files.keys() - {IMAGES, TEACHER}:
        raise GuardbenchError(
            f"{wish.folder / MANIFEST}: files: names files that are not known here."
        )
    record = wish.record
    if record is not None and record.artifact.sha256 != manifest.sha256:
        raise GuardbenchError(
            f"--record: it is of the set {record.artifact.sha256[:12]}, and {wish.folder} is "
            f"{manifest.sha256[:12]}; give the record of this set, or none."
        )
    files = {f"{ARTIFACT}/{name}": wish.folder / name for name in (MANIFEST, *manifest.files)}
    for path in (TABLE, PREVIEW, CARD):
        files[path] = scratch / path
    table_bytes = write_table(files[TABLE], distilled, progress)
    draw_preview(files[PREVIEW], distilled)
    facts = Facts(
        repo=wish.repo,
        branch=wish.branch,
        licence=wish.licence,
        images=len(distilled.images),
        table_bytes=table_bytes,
        file_bytes=files[TABLE].stat().st_size,
        record=record,
    )
    write_text(files[CARD], card_text(manifest, facts))
    return manifest, files


def _head_of(wish: Wish) -> str:
    """The commit to push on; makes the repository and the branch where they are missing."""
    api = hub.client()
    with answered(wish.repo):
        try:
            info = api.dataset_info(wish.repo)
        except GatedRepoError:
            raise
        except RepositoryNotFoundError:
            visibility = True if wish.private else None
            api.create_repo(wish.repo, repo_type="dataset", private=visibility, exist_ok=True)
            info = api.dataset_info(wish.repo)
        if wish.private and not info.private:
            raise GuardbenchError(
                f"{wish.repo}: it is there already and is public; make it private in its settings at "
                "the Hub, push to another name, or leave out --private."
            )
        if wish.branch is not None:
            try:
                api.dataset_info(wish.repo, revision=wish.branch)
            except RevisionNotFoundError:
                api.create_branch(wish.repo, branch=wish.branch, repo_type="dataset", exist_ok=True)
    return commit_of(wish.repo, wish.branch)


def _refuse_others(repo: str, commit: str) -> None:
    """Raises a GuardbenchError where a repository without a distilled set holds something else."""
    with answered(repo):
        entries = hub.client().list_repo_tree(repo, revision=commit, repo_type="dataset")
        other = next((entry.path for entry in entries if entry.path not in _EMPTY), None)
    if other is not None:
        raise GuardbenchError(
            f"{repo}: it holds something else than a distilled set ({printable(other, 80)}); push to "
            "another name."
        )


def _commit(
    wish: Wish,
    manifest: Manifest,
    files: Mapping[str, Path],
    parent: str,
    stale: list[str],
    progress: Progress,
) -> str:
    """Uploads `files` and removes `stale` ones in one commit on `parent`; gives the new commit."""
    size = sum(file.stat().st_size for file in files.values())
    console = progress.console
    if console is not None:
        console.print(
            f"upload {len(files)} files, {size / 1e6:.1f} MB, to {wish.repo}",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )
    # On a terminal huggingface_hub draws a bar for each file, beside which ours would have no place.
    with answered(wish.repo), _bars(shown=console is not None and console.is_terminal):
        done = hub.client().create_commit(
            wish.repo,
            [
                *(CommitOperationDelete(path) for path in stale),
                *(CommitOperationAdd(path, file) for path, file in files.items()),
            ],
            commit_message=f"{manifest.dataset} distilled by {manifest.method}, IPC {manifest.ipc} "
            f"({manifest.sha256[:12]})",
            repo_type="dataset",
            revision=wish.branch,
            parent_commit=parent,
        )
    return done.oid


@contextmanager
def _bars(*, shown: bool) -> Iterator[None]:
    """Keeps huggingface_hub's own progress bars off the screen where they are not to be shown."""
    hide = not shown and not are_progress_bars_disabled()
    if hide:
        disable_progress_bars()
    try:
        yield
    finally:
        if hide:
            enable_progress_bars()


def _confirm(repo: str, commit: str, files: Mapping[str, Path]) -> None:
    """Looks at what the Hub holds now: a `.gitignore` there, say, makes it leave out files in silence."""
    held = named_files(repo, commit, files)
    for path, file in sorted(files.items()):
        there = held.get(path)
        if there is None or there.size != file.stat().st_size:
            raise GuardbenchError(
                f"{repo}: {path} is not there as sent after commit {commit[:12]}; remove what keeps it "
                "out (a .gitignore?) and push again."
            )


def _their_manifest(
    repo: str, commit: str, listed: Mapping[str, hub.RemoteFile], into: Path
) -> Manifest:
    """The manifest of the set in `repo`, which may name the artifact's files and no others."""
    remote = listed.get(f"{ARTIFACT}/{MANIFEST}")
    if remote is None:
        raise GuardbenchError(
            f"{repo}: it holds no distilled set of guardbench at {commit[:12]} "
            f"({ARTIFACT}/{MANIFEST} is missing)."
        )
    if remote.size > MANIFEST_LIMIT:
        raise GuardbenchError(
            f"{repo}: {remote.path} has {remote.size} bytes, over the limit of {MANIFEST_LIMIT}."
        )
    place = into.resolve().with_name(f"{into.resolve().name}.manifest")
    with downloaded(repo, commit, [remote], place, Progress()) as arrived:
        words = read_text(arrived[remote.path], what="manifest", limit=MANIFEST_LIMIT)
    try:
        manifest = Manifest.model_validate_json(words, strict=True)
    except ValidationError as error:
        raise GuardbenchError(f"{repo}: {remote.path}: {first_problem(error)}.") from error
    needed = {IMAGES, TEACHER} if manifest.label_kind == "teacher" else {IMAGES}
    if manifest.files.keys() != needed:
        odd = printable(", ".join(sorted(manifest.files.keys() ^ needed)), 120)
        raise GuardbenchError(
            f"{repo}: {remote.path}: files: must be {' and '.join(sorted(needed))} (differs by {odd})."
        )
    return manifest


def _check_sizes(
    repo: str, manifest: Manifest, listed: Mapping[str, hub.RemoteFile], wanted: list[str]
) -> None:
    """Raises a GuardbenchError where a file is missing, or larger than its manifest lets it be."""
    limits = {IMAGES: IMAGES_LIMIT, TEACHER: TEACHER_LIMIT, MANIFEST: MANIFEST_LIMIT}
    if manifest.ipc:
        classes = len(manifest.classes)
        values = manifest.channels * manifest.resolution**2
        row = 4 * values + 8 + (4 * classes if manifest.label_kind != "hard" else 0)
        limits[IMAGES] = min(IMAGES_LIMIT, manifest.ipc * classes * row + (1 << 20))
    for path in wanted:
        remote, limit = listed.get(path), limits[Path(path).name]
        if remote is None:
            raise GuardbenchError(f"{repo}: {path} is missing, which its manifest names.")
        if remote.size > limit:
            raise GuardbenchError(
                f"{repo}: {path} has {remote.size} bytes where at most {limit} can be of use; not fetched."
            )


def _check_arrived(repo: str, part: Path) -> None:
    """Checks digests and tensors of a pulled set, in the words of its repository; draws the preview."""
    try:
        distilled = load_distilled(part)
        check_pictures(distilled, f"{part}/{MANIFEST}")
    except GuardbenchError as error:
        raise GuardbenchError(
            f"{repo}: {printable(str(error).replace(str(part), ARTIFACT), 400)}"
        ) from error
    draw_preview(part / PREVIEW, distilled)
