"""Sessions for developers and CI: `nox -s tests`, or `nox -l` for all of them."""

import json
import os
import tempfile
import time
from pathlib import Path

import nox

nox.options.default_venv_backend = "uv|virtualenv"
nox.options.reuse_existing_virtualenvs = True
nox.options.sessions = ["lint", "types", "tests", "leaderboards"]

TEST = ["pytest>=8.2", "pytest-xdist>=3.6", "hypothesis>=6.100"]
LINT = ["ruff>=0.9,<1"]
TYPES = ["mypy>=1.14,<3"]
# One thread a test process: two processes of two threads each would fight for the cores.
THREADS = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


@nox.session
def lint(session: nox.Session) -> None:
    """Ruff's rules and format."""
    session.install(*LINT)
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session
def types(session: nox.Session) -> None:
    """Mypy, strict, over the package."""
    session.install("-e", ".", *TYPES)
    session.run("mypy")


@nox.session
def tests(session: nox.Session) -> None:
    """The whole suite; tests on real images run where GUARDBENCH_DATA names them."""
    session.install("-e", ".", *TEST)
    workers = ["-n", "2", "--dist", "worksteal"] if (os.cpu_count() or 1) > 1 else []
    session.run("pytest", *workers, "--durations=25", *session.posargs, env=THREADS)


@nox.session
def peers(session: nox.Session) -> None:
    """The attacks beside torchattacks, foolbox and pyautoattack; without `datasets`, see the file."""
    session.install(
        "torch", "torchvision", "torchattacks", "foolbox", "pyautoattack", "scikit-learn",
        "pydantic", "safetensors", "accelerate", "psutil", *TEST,
    )  # fmt: skip
    session.install("--no-deps", "-e", ".")
    env = {**THREADS, "GUARDBENCH_PEERS": "1"}  # a peer that cannot be imported fails
    session.run("pytest", "-s", "tests/peers", *session.posargs, env=env)


@nox.session
def site(session: nox.Session) -> None:
    """The site in a headless Chromium, which must be installed (Debian: `chromium`)."""
    session.install("-e", ".", "playwright>=1.50", "axe-playwright-python>=0.1.4", *TEST)
    session.run("pytest", "tests/browser", *session.posargs, env=THREADS)


@nox.session
def lowest(session: nox.Session) -> None:
    """The suite on the lowest direct versions that the package admits; needs uv."""
    session.run_install(
        "uv", "pip", "install", "--python", str(Path(session.bin) / "python"),
        "--resolution", "lowest-direct", "-e", ".", *TEST, external=True,
    )  # fmt: skip
    session.run("pytest", *session.posargs, env=THREADS)


@nox.session(reuse_venv=False)
def demo(session: nox.Session) -> None:
    """What a newcomer does: install the package, run the first sentence of the README; within its promise."""
    session.install(".")
    with tempfile.TemporaryDirectory() as folder:
        session.chdir(folder)
        begun = time.monotonic()
        session.run("guardbench", "run", "--method", "guard", "--dataset", "digits")
        seconds = time.monotonic() - begun
        (path,) = Path(folder).glob("guardbench-runs/records/digits/ipc10/*.json")
        peak = max(cost["peak_memory_bytes"] for cost in json.loads(path.read_text())["cost"])
    session.log(f"{seconds:.0f} s (at most 120 on two cores), {peak / 1e9:.2f} GB (at most 2)")
    if seconds > 120 or peak > 2e9:
        session.error("more than a newcomer is promised")


@nox.session
def leaderboards(session: nox.Session) -> None:
    """Rebuild every board by the package as users install it; compare with what is committed."""
    session.install(".")
    session.run("guardbench", "leaderboard", "check")
    # Outside the checkout the methods are those in the wheel.
    with tempfile.TemporaryDirectory() as folder:
        session.chdir(folder)
        session.run("guardbench", "run", "--method", "guard", "--dataset", "digits", "--dry-run")
