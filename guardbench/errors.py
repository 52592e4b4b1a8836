"""The one error that a user can cause, and that every command prints as one line."""

from __future__ import annotations


class GuardbenchError(Exception):
    """Bad input or a bad environment, told in one line: what is wrong, where, and the way out.

    The command line prints the message and exits with 2, without a traceback.
    """
