"""Started twice by `torchrun`: what each process computes on its part, against the whole on its own."""

import contextlib
import time
from contextlib import ExitStack
from fractions import Fraction
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Timer

import torch
from accelerate import Accelerator
from torch import nn

from guardbench import locks, scoring
from guardbench.batch_norm import synchronised
from guardbench.distilled import save_distilled, told_by_main
from guardbench.models import build_model
from guardbench.processes import Processes
from guardbench.progress import Progress
from guardbench.protocol import load_protocol
from guardbench.regularisers.base import Batch, build_regulariser
from guardbench.runtime import Run
from guardbench.scoring import Costs, score
from guardbench.scoring_plan import plan_scoring
from guardbench.stages import StageFolder
from guardbench.threat import ThreatModel

REGULARISERS = (
    {"kind": "none"},
    {"kind": "curvature", "weight": 0.7, "h": "4/255"},
    {"kind": "curvature-double", "weight": 0.7, "h": "4/255"},
    {"kind": "gradient-norm", "weight": 0.1},
    {"kind": "pgd", "steps": 2},
    {"kind": "trades", "steps": 2},
    {"kind": "fbf"},
    {"kind": "pgd-released", "steps": 2},
)


def network() -> nn.Module:
    model = build_model("convnet-d3-bn-small", channels=3, classes=10, resolution=8, seed=1)
    return model.double().train()


def step(
    processes: Processes | None, words: dict[str, object], images: int
) -> dict[str, torch.Tensor]:
    """One squeeze step's loss, gradients and running statistics, of the batch or of a part of it."""
    generator = torch.Generator().manual_seed(3)
    x = torch.rand(images, 3, 8, 8, generator=generator, dtype=torch.float64)
    y = torch.randint(10, (images,), generator=generator)
    model = network()
    regulariser = build_regulariser(words, ThreatModel(norm="linf", eps=Fraction(8, 255)))
    whole = Batch(model=model, images=x, labels=y, generator=torch.Generator().manual_seed(4))
    if processes is None:
        value = sum(regulariser.backward(whole))
    else:
        mine = processes.share(images)
        batch = Batch(
            model=model, images=x[mine], labels=y[mine], part=(images, mine),
            generator=torch.Generator().manual_seed(4), total=processes.total,
        )  # fmt: skip
        with synchronised(model, processes):
            value = processes.total(sum(regulariser.backward(batch)))
        processes.sum_gradients(model)
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": value, **found, **dict(model.named_buffers())}


def wait_for_a_lock(accelerator: Accelerator) -> None:
    """Both wait while another run is at a stage, the second told now and then that the first still waits."""
    locks._POLL_S, locks._MINUTE = 0.05, 0.1
    told = []
    with TemporaryDirectory() as name:
        run = Run(accelerator=accelerator, workspace=Path(name), seed=0, progress=Progress())
        folder = run.stage("squeeze", "teachers", {})
        from_main = folder.processes.from_main
        folder.processes.from_main = lambda work: (told.append(1), from_main(work))[1]
        with ExitStack() as other:
            if run.processes.main:
                other.enter_context(locks.locked(folder.path / ".lock", print))
                Timer(1.0, other.pop_all().close).start()
            with folder.claimed() as stored:
                assert stored is None
    assert len(told) > 5, told


def attack_in_parts(accelerator: Accelerator) -> None:
    """An attack that is stopped in the midst of its third batch goes on there, on each process for itself."""
    protocol = load_protocol("digits")
    pgd = next(spec for spec in protocol.attacks if spec.kind == "pgd")
    protocol = protocol.model_copy(
        update={
            "attacks": (pgd,),
            "test": protocol.test.model_copy(update={"count": 60, "sha256": None}),
        }
    )
    scoring.images_at_a_time = lambda *_: 10  # three batches of two tens
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).eval()
    x = torch.rand(60, 1, 8, 8)
    with torch.no_grad():
        y = model(x).argmax(1)
    found, passes, processes = [], [], Processes(accelerator)
    for stopped in (False, True):
        with TemporaryDirectory() as name:
            folder = Path(processes.collect(name)[0])  # both see it
            run = Run(accelerator=accelerator, workspace=folder, seed=0, progress=Progress())
            plan = plan_scoring(
                run, protocol, seed=0, position=0, subject="s", test_digest="d", engine="guardbench"
            )
            asked, real = [], (StageFolder.due_alone, StageFolder._write)
            handle = model.register_forward_hook(lambda *_: asked.append(1))  # noqa: B023
            if stopped:
                calls = iter(range(10_000))

                def dies(folder: StageFolder, path: Path, state, *, last: bool) -> None:
                    """Late in the third batch; nothing is written before it."""
                    if state["decided"] == 40 and state["streams"] and next(calls) == 50:  # noqa: B023
                        time.sleep(1)
                        real[1](folder, path, state, last=last)  # noqa: B023
                        raise Killed

                StageFolder.due_alone = lambda folder: folder.name.startswith("pgd100")
                StageFolder._write = dies
                with contextlib.suppress(Killed):
                    score(run, protocol, plan, model, x, y, Costs())
                StageFolder.due_alone, StageFolder._write = real
                assert next(calls) == 51, "it was in the midst"
            costs = Costs()
            done = score(run, protocol, plan, model, x, y, costs)
            handle.remove()
            found.append(done.attacks["pgd100"].flags())
            passes.append(len(asked))
            assert not stopped or costs.found[-1].seconds > 1, "an earlier run's seconds count"
            left = processes.collect([*folder.rglob("checkpoint*")])  # before the folder goes
            assert left == [[], []]
    assert found[0] == found[1]
    assert 5 < sum(found[0]) < 55, "else every verdict is the same"
    assert passes[1] < passes[0] + 20, "what was done was not done again"


class Killed(BaseException):
    """In the midst of an attack."""


def tell_a_distilled_set(processes: Processes) -> None:
    """What the first process has, with labels or with a teacher, the second has as well."""
    for labelled in (False, True):
        teacher = None if labelled else build_model(
            "convnet-d3-bn-small", channels=3, classes=10, resolution=8, seed=processes.rank
        )  # fmt: skip
        generator = torch.Generator().manual_seed(processes.rank)
        with TemporaryDirectory() as name:
            found = told_by_main(
                processes,
                lambda: save_distilled(
                    Path(name),
                    images=torch.rand(20, 3, 8, 8, generator=generator),  # noqa: B023
                    hard=torch.arange(10).repeat_interleave(2),
                    soft=torch.eye(10).repeat_interleave(2, 0) if labelled else None,  # noqa: B023
                    teacher=teacher, teacher_arch="convnet-d3-bn-small",  # noqa: B023
                    dataset="digits", ipc=2, method="random", classes=tuple("0123456789"), provenance={},
                ),
            )  # fmt: skip
        tensors = [found.images, found.hard, *([] if found.soft is None else [found.soft])]
        if found.teacher is not None:
            tensors += [*found.teacher.state_dict().values()]
        assert len(tensors) > 2
        one, two = processes.collect(tensors)
        for a, b in zip(one, two, strict=True):
            assert torch.equal(a, b)


def main() -> None:
    accelerator = Accelerator(cpu=True)
    processes = Processes(accelerator)
    assert processes.count == 2
    for images in (8, 7):  # an even split and an uneven one
        for words in REGULARISERS:
            alone, shared = step(None, words, images), step(processes, words, images)
            for name, value in alone.items():
                off = float((value - shared[name]).abs().max() / (value.abs().max() + 1e-3))
                # pgd-released takes its logits in float32 whatever the network's precision.
                most = 1e-5 if words["kind"] == "pgd-released" else 1e-9
                assert off < most, (words["kind"], images, name, off)
    print("regularisers: the same on two")
    tell_a_distilled_set(processes)
    attack_in_parts(accelerator)
    print("attacks: on from their midst")
    wait_for_a_lock(accelerator)
    print("waited for a stage that another run was at")
    accelerator.end_training()


main()
