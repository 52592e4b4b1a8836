"""Makes the records from which these boards are built, one after another; what is published is left alone.

    python leaderboards/records.py --data-dir DATA --dry-run
    python leaderboards/records.py --data-dir DATA --only imagenette-64

In a checkout, with guardbench installed from it. All share one workspace, and so teachers, experts and
whatever an interrupted run had finished: give the same command again to go on. Budgets are those of two
CPU cores; what was cut below a recipe is a `--set`, which the record lists.
"""

import argparse
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Wanted:
    """One record, and what it changes in its recipe."""

    protocol: str
    ipc: int
    method: str
    changed: tuple[str, ...] = ()

    def published(self) -> bool:
        """Whether a record of it lies under `baselines/`; one with changes has a mark in its name."""
        folder = ROOT / "baselines" / self.method / "results" / self.protocol
        mark = "-set-*" if self.changed else ""
        return any(folder.glob(f"ipc{self.ipc}{mark}-seed0.json"))

    def command(self) -> list[str]:
        """Its `guardbench run`, without where data and files lie."""
        words = ["run", "--method", self.method, "--protocol", self.protocol]
        words += ["--ipc", str(self.ipc), "--publish"]
        # On digits the comparison students cost seconds; beside the whole set they compare nothing.
        if self.protocol == "digits" and self.method != "full":
            words += ["--references"]
        for each in self.changed:
            words += ["--set", each]
        return words


def wanted(protocol: str, ipc: int, methods: str, *changed: str) -> list[Wanted]:
    """The methods, separated by spaces, at one IPC of a protocol."""
    return [Wanted(protocol, ipc, method, changed) for method in methods.split()]


# MTT's family keeps the experts and steps that two hours on two cores allow.
FEW_EXPERTS = ("experts.count=5", "experts.epochs=20", "match.iterations=300")

RECORDS = [
    *wanted("digits", 10, "guard sre2l random full sre2l-adv sre2l-trades sre2l-fbf cda cda-guard"),
    *wanted("digits", 10, "sre2l-gradnorm sre2l-adv-released herding k-center"),
    *wanted("digits", 10, "dc dc-guard dsa dm mtt tesla mat"),
    *wanted("imagenette-64", 10, "guard sre2l sre2l-adv random sre2l-gradnorm cda cda-guard"),
    *wanted("imagenette-64", 10, "sre2l-adv-released sre2l-trades sre2l-fbf herding k-center full"),
    *wanted("imagenette-64", 1, "guard sre2l sre2l-adv random"),
    *wanted("cifar10-convnet", 1, "random dc dc-guard dsa dm full"),
    *wanted("cifar10-convnet", 10, "random dm"),
    *wanted("cifar10-convnet", 10, "dc dc-guard", "match.iterations=30"),
    *wanted("cifar10-convnet", 1, "mtt tesla mat", *FEW_EXPERTS),
    # 200 epochs of squeeze and 10,000 test images a student: days on two cores, so last.
    *wanted("cifar10", 10, "sre2l guard cda cda-guard"),
]


def main() -> None:
    """Runs what is not published yet, in order."""
    words = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    words.add_argument("--data-dir", type=Path)
    words.add_argument("--output", type=Path, default=Path("guardbench-runs"), help="the workspace")
    words.add_argument("--only", help="records of this protocol")
    words.add_argument("--dry-run", action="store_true", help="list what is left, and stop")
    args = words.parse_args()
    left = [each for each in RECORDS if args.only in (None, each.protocol) and not each.published()]
    for number, each in enumerate(left, 1):
        command = each.command()
        print(f"[{number}/{len(left)}] guardbench {' '.join(command)}", flush=True)
        if args.dry_run:
            continue
        command += ["--output", str(args.output)]
        command += ["--data-dir", str(args.data_dir)] if args.data_dir else []
        done = subprocess.run([sys.executable, "-m", "guardbench", *command], cwd=ROOT)
        if done.returncode:
            sys.exit(done.returncode)


if __name__ == "__main__":
    main()
