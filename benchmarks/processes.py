"""Two one-thread processes against one one-thread process, stage by stage: how many times as fast.

    python benchmarks/processes.py --protocol imagenette-64 --images 200 --data-dir DATA

Both are `guardbench run` of GUARD from nothing, shortened, in workspaces of their own, one after the other
and `--rounds` times, since a machine's speed drifts; seconds are those of the records' stages, of all rounds
together. What two cores can give at all is what two such runs reach that know nothing of each other, side by
side: they share caches, memory and the processor's clock. Needs two cores, and nothing beside it.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import guardbench
from guardbench.record_files import load_record

LAUNCHER = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
GROUPS = {
    "squeeze": ("squeeze",),
    "recover": ("recover",),
    "relabel": ("relabel",),
    "students": ("student",),
    "checks": ("checks",),
    "attacks": ("clean", "pgd100", "fgsm", "mim", "cw"),
    "evaluation": ("clean", "checks", "pgd100", "fgsm", "mim", "cw"),
}


def seconds(
    words: argparse.Namespace, folder: Path, name: str, launcher: list[str]
) -> Counter[str]:
    """Seconds of each group of stages of one run."""
    command = [sys.executable, *launcher, "-m", "guardbench", "run", "--method", "guard"]
    command += [
        "--protocol",
        str(folder / "short.toml"),
        "--ipc",
        "10",
        "--output",
        str(folder / name),
    ]
    command += ["--set", f"squeeze.epochs={words.epochs}"]
    command += ["--set", f"recover.iterations={words.iterations}"]
    command += ["--set", "recover.images_a_batch=50"]  # the same batches on one and on two
    for value in words.set:
        command += ["--set", value]
    command += ["--data-dir", str(words.data_dir)] if words.data_dir else []
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, env=one_thread, stdout=subprocess.DEVNULL)
    (path,) = (folder / name).glob("records/**/*.json")
    costs = load_record(path).cost
    at_once = {"student": 2} if launcher else {}  # two students, side by side
    return Counter(
        {
            group: sum(
                c.seconds / at_once.get(c.stage.split()[0], 1)
                for c in costs
                if c.stage.split()[0] in stages
            )
            for group, stages in GROUPS.items()
        }
    )


def shortened(protocol: str, images: int) -> str:
    """A packaged protocol as `short`: two students, few images, without Square and AutoAttack."""
    text = (Path(guardbench.__file__).parent / "protocols" / f"{protocol}.toml").read_text()
    for pattern, new in {
        r'^id = ".*"': 'id = "short"',
        r"^seeds = .*": "seeds = [0, 1]",
        r"^epochs = .*": "epochs = 20",
        r"^count = .*": f"count = {images}",
        r"^sha256 = .*\n": "",
        r'^rank_by = ".*"': 'rank_by = "pgd100"',
    }.items():
        text = re.sub(pattern, new, text, flags=re.MULTILINE)
    head, *columns = text.split("[[attacks]]")
    kept = [column for column in columns if "images_per_seed" not in column]
    return "[[attacks]]".join([head, *kept])


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    words.add_argument("--protocol", required=True, help="a packaged one")
    words.add_argument("--images", type=int, default=200)
    words.add_argument("--epochs", type=int, default=1, help="of the squeeze")
    words.add_argument("--iterations", type=int, default=40, help="of recover")
    words.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="STAGE.FIELD=VALUE",
        help="of the recipe, as `guardbench run --set`: squeeze.batch_size=256, squeeze.sync_bn=false",
    )
    words.add_argument("--rounds", type=int, default=1)
    words.add_argument("--data-dir", type=Path)
    args = words.parse_args()
    one: Counter[str] = Counter()
    two: Counter[str] = Counter()
    apart: Counter[str] = Counter()
    for _ in range(args.rounds):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            (folder / "short.toml").write_text(shortened(args.protocol, args.images))
            one += seconds(args, folder, "one", [])
            two += seconds(args, folder, "two", LAUNCHER)
            with ThreadPoolExecutor(2) as both:
                for found in both.map(partial(seconds, args, folder, launcher=[]), "ab"):
                    apart += found
    for group in GROUPS:
        ratio, most = one[group] / two[group], 4 * one[group] / apart[group]
        print(f"{group:<11} {one[group]:8.1f} s on one, {two[group]:8.1f} s on two, "
              f"{ratio:.2f} times; two runs apart {most:.2f}")  # fmt: skip


if __name__ == "__main__":
    main()
