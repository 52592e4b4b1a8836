"""The one error that a user can cause, and that every command prints as one line."""

from __future__ import annotations


class GuardbenchError(Exception):
    """Bad input or a bad environment, told in one line: what is wrong, where, and the way out.

    The command line prints the message and exits with 2, without a traceback.
    """


class PeerError(GuardbenchError):
    """What stopped the first process of a run, in the others: the user has been told already."""


def brief(error: BaseException, limit: int = 160) -> str:
    """The first line of another library's error, cut short; its kind when it says nothing."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:limit]


def not_now(path: object, error: Exception) -> GuardbenchError:
    """For a file that is there and cannot be read: a disk that fails once is no reason to delete anything."""
    return GuardbenchError(f"{path}: cannot be read now ({brief(error)}); run again.")
