"""Data of a submission that lie elsewhere, fetched once: a Hub dataset at a commit, or an address."""

from __future__ import annotations

import ipaddress
import socket
from pathlib import Path
from urllib.parse import urlsplit

from guardbench import canonical
from guardbench.data.catalog import dataset_info
from guardbench.data.download import fetch
from guardbench.data.files import cache_root
from guardbench.errors import GuardbenchError
from guardbench.progress import Progress
from guardbench.submissions.form import Submission
from guardbench.submissions.read import most_of


def fetch_data(form: Submission, cache_dir: Path | None, progress: Progress) -> Path | None:
    """Fetches what a form's `[data]` table points to.

    Args:
        cache_dir: see `data.files.cache_root`; what is fetched is kept there by its digest.

    Returns:
        The folder with the files; None where the data lie in the submission itself.

    Raises:
        GuardbenchError: it cannot be reached, is too large, or is not what its digest says.
    """
    data = form.data
    limit = most_of(form, dataset_info(form.dataset))[1]
    root = cache_root(cache_dir) / "submissions"
    if data.url is not None and data.sha256 is not None:
        require_public(data.url)
        folder = root / data.sha256[:32]
        target = folder / f"data.{data.url.rpartition('.')[2]}"
        fetch(data.url, target, hexdigest=data.sha256, limit=limit, progress=progress)
        return folder
    if data.repo is not None and data.revision is not None:
        from guardbench.hub import fetch_dataset

        into = root / canonical.digest([data.repo, data.revision])[:32]
        if into.is_dir():  # it appears whole, and a commit never changes
            return into
        return fetch_dataset(data.repo, data.revision, into, limit=limit, progress=progress)
    return None


def require_public(url: str) -> None:
    """Refuses an address of this machine or its own network, which a stranger's form must not reach.

    Raises:
        GuardbenchError: such an address, or a host that cannot be found.
    """
    parts = urlsplit(url)
    try:
        found = socket.getaddrinfo(parts.hostname or "", parts.port or 443, type=socket.SOCK_STREAM)
    except OSError as error:
        raise GuardbenchError(
            f"{url}: its host cannot be found ({error.strerror or error})."
        ) from error
    for *_, address in found:
        if not ipaddress.ip_address(str(address[0]).partition("%")[0]).is_global:
            raise GuardbenchError(
                f"{url}: is no public address; put the file where all can get it."
            )
