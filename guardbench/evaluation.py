"""Students x attacks: how accurate is a model trained on this distilled dataset?

Nothing here knows who made the dataset. Attacks see float32 students in eval mode; each outcome is
counted by `run_verified`'s harness, image by image. Attacks search a faster copy of the
student; the verdicts are the student's own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from guardbench.attacks.base import Attack, plan_batches, run_batch, score_clean
from guardbench.attacks.build import build_attack
from guardbench.canonical import derive_seed
from guardbench.data.dataset import RealDataset
from guardbench.distilled import DistilledDataset
from guardbench.distillers.base import PlannedStage
from guardbench.models import Classifier, folded
from guardbench.protocol import AttackSpec, Protocol, list_digest
from guardbench.records import Artifact, Outcome, SeedRun, StageCost, TestSet
from guardbench.runtime import Run, stage_cost
from guardbench.training import plan_relabel, plan_student, relabel, train_student


@dataclass(frozen=True)
class SeedPlan:
    """The stages of one student: its training, its clean score, its attacks in the protocol's order."""

    seed: int
    position: int
    student: PlannedStage
    clean: PlannedStage
    attacks: tuple[PlannedStage, ...]


@dataclass(frozen=True)
class EvaluationPlan:
    """All stages that answer the question for one distilled dataset under one protocol."""

    labels: PlannedStage | None
    seeds: tuple[SeedPlan, ...]

    @property
    def stages(self) -> list[PlannedStage]:
        """In the order in which they run."""
        found = [] if self.labels is None else [self.labels]
        for plan in self.seeds:
            found += [plan.student, plan.clean, *plan.attacks]
        return found


def plan_evaluation(
    run: Run,
    protocol: Protocol,
    *,
    artifact: str,
    images: int,
    teacher: bool,
    test_digest: str | None,
) -> EvaluationPlan:
    """Plans the evaluation of a distilled dataset; needs no images.

    Args:
        artifact: key of what makes the dataset, so that all stages hang on it.
        images: how many the distilled dataset has.
        teacher: whether a teacher labels its views.
        test_digest: of the decoded validation images; None while they have not been decoded.
    """
    student = protocol.student
    labels = plan_relabel(run, artifact, student, images) if teacher else None
    return EvaluationPlan(
        labels,
        tuple(
            _plan_seed(run, protocol, seed, position, artifact, images, test_digest)
            for position, seed in enumerate(student.seeds)
        ),
    )


def _plan_seed(
    run: Run,
    protocol: Protocol,
    seed: int,
    position: int,
    artifact: str,
    images: int,
    test_digest: str | None,
) -> SeedPlan:
    student = plan_student(run, artifact, protocol.student, images, seed)
    on = {"student": student.folder.key, "test": test_digest, "list": protocol.test.sha256,
          "protocol": protocol.id}  # fmt: skip
    clean = PlannedStage(
        run.stage(
            f"clean {seed}", "attacks", {"stage": "clean", **on, "images": protocol.test.count}
        ),
        f"{protocol.test.count} images",
        protocol.test.count / 3,
        fp32=True,
    )
    attacks = []
    for spec in protocol.attacks:
        build_attack(spec.kind, protocol.threat.model, spec.params)  # refuses a wrong one early
        first, count = protocol.slice_of(spec, position)
        words = {
            "stage": "attack",
            **on,
            "threat": protocol.threat.model_dump(),
            "attack": spec.model_dump(mode="json"),
            "first": first,
            "images": count,
            "seed": seed,
        }
        before = shared_square(protocol, spec)
        if before is not None:
            words["after"] = before.model_dump(mode="json")
        folder = run.stage(f"{spec.name} {seed}", "attacks", words)
        attacks.append(PlannedStage(folder, f"{count} images", count * _passes(spec), fp32=True))
    return SeedPlan(seed, position, student, clean, tuple(attacks))


def _passes(spec: AttackSpec) -> float:
    """Rough forward+backward passes a test image, for the expected time alone.

    A pass without gradients in the weights is about two thirds of one with them, a forward one
    third; about half of the images leave early because they are wrong or broken.
    """
    steps = spec.params.get("steps", {"pgd": 100, "mim": 20, "cw": 50, "fgsm": 1}.get(spec.kind, 0))
    full = {
        "square": float(spec.params.get("queries", 5000)) / 3,
        # APGD-CE 100, APGD-T 9 x 100, FAB-T 9 x 100 passes and Square's 5,000 forwards.
        "autoattack": 1900 * 2 / 3 + 5000 / 3,
    }.get(spec.kind, float(steps) * 2 / 3)
    return full / 2


def evaluate(
    run: Run,
    protocol: Protocol,
    plan: EvaluationPlan,
    distilled: DistilledDataset,
    test: RealDataset,
) -> tuple[tuple[SeedRun, ...], tuple[StageCost, ...]]:
    """Trains the protocol's students on a distilled dataset and attacks them.

    Args:
        plan: of `plan_evaluation`; finished stages are read, not run.
        test: the dataset's validation split; only the protocol's images are measured.

    Returns:
        One SeedRun a student, and what each stage cost.

    Raises:
        GuardbenchError: the test images are not the protocol's, or an attack broke its own rules.
    """
    order = protocol.test_indices(test.ids)
    x, y = test.batch(order), test.labels[order]
    costs = _Costs()
    if plan.labels is not None:
        with costs.of(plan.labels):
            relabel(run, distilled, protocol.student, plan.labels)
    runs = []
    for seed in plan.seeds:
        with costs.of(seed.student):
            model = train_student(
                run, distilled, protocol.student, seed.seed, seed.student, plan.labels
            )
        with costs.of(seed.clean):
            clean = _score(run, model, x, y, seed.clean)
        fast = folded(model, x[:1].to(run.device))
        outcomes: dict[str, Outcome] = {}
        for spec, stage in zip(protocol.attacks, seed.attacks, strict=True):
            with costs.of(stage):
                before = shared_square(protocol, spec)
                outcomes[spec.name] = _attack(
                    run, protocol, spec, seed, stage, model, fast, x, y,
                    clean if before is None else outcomes[before.name],
                    without_square=before is not None,
                )  # fmt: skip
        runs.append(SeedRun(seed=seed.seed, clean=clean, attacks=outcomes))
    return tuple(runs), tuple(costs.found)


def shared_square(protocol: Protocol, spec: AttackSpec) -> AttackSpec | None:
    """The Square column whose run AutoAttack need not repeat, if the protocol has one.

    AutoAttack standard counts an image as broken when any of its four attacks breaks it, and the last
    of them is Square with 5,000 queries. Where an earlier column is that very attack on the same
    images, its verdicts are taken over and only its survivors meet the other three. AutoAttack's
    seconds are then those of the three.
    """
    if spec.kind != "autoattack" or spec.params.get("version", "standard") != "standard":
        return None
    for other in protocol.attacks[: protocol.attacks.index(spec)]:
        same_images = other.images_per_seed == spec.images_per_seed
        if other.kind == "square" and same_images and other.params.get("queries", 5000) == 5000:
            return other
    return None


class _Costs:
    """Collects the cost of stages, and whether an earlier run had finished them."""

    def __init__(self) -> None:
        self.found: list[StageCost] = []

    def of(self, stage: PlannedStage) -> _Costs:
        self._stage, self._shared = stage, stage.folder.finished() is not None
        return self

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            stored = self._stage.folder.finished()
            assert stored is not None, self._stage.folder.name
            self.found.append(stage_cost(stored, shared=self._shared))


def attack_batch(resolution: int) -> int:
    """Images attacked at once: fixed by the resolution, since Square's draws depend on the batch."""
    return 256 if resolution <= 64 else 64


def _score(run: Run, model: Classifier, x: Tensor, y: Tensor, stage: PlannedStage) -> Outcome:
    folder = stage.folder
    stored = folder.finished()
    if stored is None:
        folder.begin(run.device)
        with run.progress.stage(folder.name, len(x), "images") as bar:
            right = score_clean(model, x, y, batch_size=attack_batch(x.shape[-1]))
            bar.advance(len(x), f"{100 * right.float().mean():.1f}% right")
        outcome = Outcome.from_flags(right.tolist())
        stored = folder.finish(run.device, outcome=outcome.model_dump(mode="json"))
    return Outcome.model_validate(stored["outcome"])


def _attack(
    run: Run,
    protocol: Protocol,
    spec: AttackSpec,
    seed: SeedPlan,
    stage: PlannedStage,
    model: Classifier,
    fast: nn.Module,
    x: Tensor,
    y: Tensor,
    before: Outcome,
    *,
    without_square: bool,
) -> Outcome:
    """Attacks the images that are right in `before`: clean, or Square's outcome for AutoAttack."""
    folder = stage.folder
    stored = folder.finished()
    if stored is not None:
        return Outcome.model_validate(stored["outcome"])
    params = {**spec.params, "square": False} if without_square else spec.params
    attack: Attack = build_attack(spec.kind, protocol.threat.model, params)
    first, count = protocol.slice_of(spec, seed.position)
    x, y = x[first : first + count], y[first : first + count]
    right = torch.tensor(before.flags()[first - before.first :][:count])
    robust, distance = right.clone(), torch.zeros(count, dtype=torch.float64)
    batches = plan_batches(right, attack_batch(x.shape[-1]))
    state = folder.begin(run.device)
    begun = 0
    if state is not None:
        begun, robust, distance = int(state["batches"]), state["robust"], state["distance"]
    named = derive_seed(seed.seed, "attack", spec.name)
    decided = int((~right).sum()) + sum(len(b) for b in batches[:begun])
    with run.progress.stage(folder.name, count, "images", decided) as bar:
        for number, index in enumerate(batches[begun:], start=begun + 1):
            outcome = run_batch(attack, model, x, y, index, seed=named, searched=fast)
            robust[index], distance[index] = ~outcome.broken, outcome.distance
            left = sum(len(b) for b in batches[number:])
            bar.advance(len(index), f"{int(robust.sum()) - left} robust so far")
            if folder.due() and left:
                folder.checkpoint({"batches": number, "robust": robust, "distance": distance})
        bar.advance(0, f"{100 * robust.float().mean():.1f}% robust")
    result = Outcome.from_flags(
        robust.tolist(),
        first=first,
        bounded=attack.threat is not None,
        max_distance=max(float(distance.max()), before.max_distance if without_square else 0.0),
    )
    folder.finish(run.device, outcome=result.model_dump(mode="json"))
    return result


def measured_artifact(distilled: DistilledDataset) -> Artifact:
    """The record's description of a distilled dataset."""
    return Artifact(
        sha256=distilled.manifest.sha256,
        label_kind=distilled.manifest.label_kind,
        image_bytes=distilled.image_bytes,
        label_bytes=distilled.manifest.label_bytes,
        images=len(distilled.images),
    )


def measured_test(protocol: Protocol, test: RealDataset) -> TestSet:
    """The record's description of the images measured."""
    order = protocol.test_indices(test.ids)
    return TestSet(
        data_sha256=test.digest,
        list_sha256=list_digest(test.ids[i] for i in order),
        total=len(order),
    )
