"""The command line: one module a verb. Nothing here imports torch before a verb needs it."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer

import guardbench
from guardbench.cli import leaderboard, robustbench, site, submission
from guardbench.cli.attacks import attacks
from guardbench.cli.compare import compare
from guardbench.cli.convert import convert
from guardbench.cli.curve import curve
from guardbench.cli.diagnose import diagnose
from guardbench.cli.doctor import doctor
from guardbench.cli.evaluate import evaluate
from guardbench.cli.methods import methods
from guardbench.cli.options import process_rank
from guardbench.cli.pull import pull
from guardbench.cli.push import push
from guardbench.cli.run import run
from guardbench.cli.show import show
from guardbench.cli.suite import suite
from guardbench.errors import GuardbenchError, PeerError
from guardbench.interrupts import heard, wanted

app = typer.Typer(
    name="guardbench",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Benchmark adversarially robust dataset distillation: distil, train, attack, rank.\n\n"
    "Example: guardbench run --method guard --dataset digits",
)
app.command()(run)
app.command()(suite)
app.command()(evaluate)
app.command()(curve)
app.command()(methods)
app.command()(diagnose)
app.command()(attacks)
app.command()(show)
app.command()(compare)
app.command()(convert)
app.command()(doctor)
app.command()(push)
app.command()(pull)
app.add_typer(leaderboard.app, name="leaderboard")
app.add_typer(submission.app, name="submission")
app.add_typer(robustbench.app, name="robustbench")
app.add_typer(site.app, name="site")


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(guardbench.__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Options before the verb."""


def main() -> None:
    """The entry point: bad input is one line and exit code 2; a signal is one line and 130 or 143."""
    with heard():
        try:
            sys.exit(app(standalone_mode=False))  # the code of a verb that ends with typer.Exit
        except PeerError:
            sys.exit(2)
        except GuardbenchError as error:
            _fail(str(error))
        except typer.Abort:
            _fail("aborted")
        except RuntimeError as error:
            if "torch" not in sys.modules or wanted():  # its peers have heard the same signal
                raise
            from guardbench.devices import out_of_memory
            from guardbench.processes import lost_peer

            if out_of_memory(error):
                _fail(_MEMORY)
            words = lost_peer(error)
            if words is None:
                raise
            _fail(words, at_once=True)
        except MemoryError:
            _fail(_MEMORY)
        except OSError as error:
            if error.filename is None:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
                    raise
                # What was buffered would be tried again as Python ends, with a traceback.
                sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115
                _fail(
                    f"a file, or what is printed, cannot be written: {error.strerror}; free some space, or "
                    "write elsewhere."
                )
            _fail(
                f"{error.filename}: {error.strerror}; mend that (permissions, a broken link, the disk), or "
                "name another folder."
            )
        except Exception as error:
            words = _mistyped(error)
            if words is None:
                raise
            if type(error).__name__ == "NoArgsIsHelpError":
                sys.exit(2)  # it has printed the help already
            _fail(words)


_MEMORY = (
    "memory ran out; what was saved stays, and the same command goes on from it. Free some, or take less at "
    "once: --set squeeze.accumulate=4, --set recover.images_a_batch=10, or another --device."
)


def _mistyped(error: Exception) -> str | None:
    """What click says of a command line that no verb takes; None for other errors.

    Typer brings a click of its own, or not, by its version, so the class cannot be named here.
    """
    say, context = getattr(error, "format_message", None), getattr(error, "ctx", None)
    if say is None:
        return None
    words = " ".join(str(say()).split())
    words += "" if words[-1:] in (".", "?") else "."
    return f"{words} See {context.command_path} --help." if context else words


def _fail(words: str, *, at_once: bool = False) -> NoReturn:
    """Prints the line and exits with 2.

    Args:
        at_once: without torch's own end, which aborts at times where a peer is gone.
    """
    from guardbench.fields import printable

    who = f"process {process_rank()}: " if process_rank() else ""
    typer.echo(f"{who}error: {printable(words, 4000)}", err=True)
    if at_once:
        sys.stdout.flush()
        os._exit(2)
    sys.exit(2)
