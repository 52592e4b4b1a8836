"""The site over HTTP on this machine alone."""

from __future__ import annotations

import errno
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from guardbench.errors import GuardbenchError
from guardbench.site.build import POLICY

HOST = "127.0.0.1"


class _Handler(SimpleHTTPRequestHandler):
    """Files, without folder listings and without a line a request."""

    def end_headers(self) -> None:
        rules = {**POLICY, "frame-ancestors": "'none'"}  # which a page itself cannot say
        self.send_header("Content-Security-Policy", "; ".join(f"{k} {v}" for k, v in rules.items()))
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Referrer-Policy", "no-referrer")
        self.send_header("Cache-Control", "no-cache")
        super().end_headers()

    def list_directory(self, path: Any) -> None:  # noqa: ARG002
        self.send_error(404, "Not Found")

    def log_message(self, format: str, *args: Any) -> None:
        pass


def make_server(folder: Path, port: int) -> ThreadingHTTPServer:
    """A server of `folder`, bound and not yet answering; port 0 takes any that is free.

    Raises:
        GuardbenchError: the port is taken or not to be had.
    """
    try:
        return ThreadingHTTPServer((HOST, port), partial(_Handler, directory=str(folder)))
    except OSError as error:
        why = "in use" if error.errno == errno.EADDRINUSE else f"not to be had ({error.strerror})"
        raise GuardbenchError(f"--port {port}: {why}; choose another one, or 0 for any.") from error
