"""The command line as a user types it, and a protocol that it is through with in seconds."""

import os
import subprocess
import sys
from pathlib import Path

from guardbench.protocol import _folder


def guardbench(*words: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "guardbench", *words],
        cwd=cwd,
        env=clean_environment() | environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def clean_environment() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if not k.startswith("GUARDBENCH_")} | {
        "COLUMNS": "100"
    }


def quick_protocol(folder: Path) -> Path:
    """The digits protocol with one short column of each kind: the same stages in seconds."""
    text = (_folder() / "digits.toml").read_text()
    for old, new in {
        'id = "digits"': 'id = "quick"',
        "seeds = [0, 1, 2]": "seeds = [0, 1]",
        "epochs = 300": "epochs = 60",
        "count = 300": "count = 100",
        "images_per_seed = 100": "images_per_seed = 20",
        "queries = 5000": "queries = 40",
        "steps = 100": "steps = 10",
        'rank_by = "autoattack"': 'rank_by = "pgd100"',
        'sha256 = "': '# sha256 = "',
    }.items():
        assert old in text, old
        text = text.replace(old, new)
    # AutoAttack's budget is fixed; it has a test of its own, and the demo runs it whole.
    head, _, _ = text.partition('[[attacks]]\nname = "autoattack"')
    path = folder / "quick.toml"
    path.write_text(head)
    return path
