"""`guardbench evaluate`: any classifier on any protocol, without distillation."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from guardbench.checks import flags
from guardbench.classifiers import Source, fingerprint, open_classifier
from guardbench.data.catalog import dataset_info
from guardbench.data.dataset import load_split
from guardbench.data.locate import locate
from guardbench.devices import make_accelerator
from guardbench.errors import GuardbenchError
from guardbench.evaluation import measured_indices, measured_test
from guardbench.filing import engine_mark
from guardbench.imported import Imported
from guardbench.pipeline import choose_protocol
from guardbench.progress import Progress
from guardbench.protocol import Protocol
from guardbench.provenance import provenance
from guardbench.record_files import load_any_record, save_record
from guardbench.records import ClassifierRecord, Engine, SeedRun, Tier
from guardbench.runtime import Run
from guardbench.scoring import Costs, score
from guardbench.scoring_plan import engines_used, plan_scoring
from guardbench.store import check_writable, explained
from guardbench.tier import sample_size

NEAR_CHANCE = 1.5


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a user asks for; the fields are the options of `guardbench evaluate`."""

    protocol: str
    source: Source
    student: int
    seed: int
    engine: Engine
    tier: Tier
    images: int | None
    device: str
    data_dir: Path | None
    cache_dir: Path | None
    output: Path


@dataclass(frozen=True)
class Prepared:
    """A classifier that is ready to be scored, before any test image is decoded.

    Attributes:
        sample: images of the dev tier, None for the official one.
    """

    request: Request
    protocol: Protocol
    run: Run
    imported: Imported
    sample: int | None

    @property
    def record_path(self) -> Path:
        """Where the record goes."""
        folder = self.request.output / "classifiers" / self.protocol.id
        student = f"-student{self.request.student}" if self.request.student else ""
        engine = engine_mark(self.request.engine)
        tier = "" if self.sample is None else "-dev"
        return (
            folder
            / f"{self.imported.described.name}-seed{self.request.seed}{student}{engine}{tier}.json"
        )


def prepare(request: Request, progress: Progress) -> Prepared:
    """Checks what can be checked and builds the classifier; writes nothing.

    Raises:
        GuardbenchError: unknown names, missing data, weights that do not fit, an unwritable output.
    """
    request.source.require_one()
    protocol = choose_protocol(None, request.protocol)
    students = len(protocol.student.seeds)
    if request.student >= students:
        raise GuardbenchError(
            f"--student {request.student}: protocol {protocol.id} has {students}, counted from 0."
        )
    classes = dataset_info(protocol.dataset).num_classes
    sample = sample_size(protocol, classes, request.tier, request.images)
    locate(protocol.dataset, request.data_dir, cache_dir=request.cache_dir)
    accelerator = make_accelerator(request.device, "fp32", protocol.resolution)
    run = Run(
        accelerator=accelerator, workspace=request.output, seed=request.seed, progress=progress
    )
    run.processes.from_main(lambda: check_writable(request.output))
    engines_used(protocol, request.engine)  # refuses an attack that cannot be built
    imported = open_classifier(request.source, protocol, run.device, request.cache_dir)
    prepared = Prepared(request, protocol, run, imported, sample)
    run.processes.from_main(lambda: _refuse_another(prepared))
    return prepared


def _refuse_another(prepared: Prepared) -> None:
    """Two files of one name must not overwrite each other's records."""
    path = prepared.record_path
    if not path.is_file():
        return
    before = load_any_record(path)
    if not isinstance(before, ClassifierRecord):
        return
    ours, theirs = prepared.imported.described, before.classifier
    if prepared.request.source.python is not None:  # a function that changes is measured anew
        theirs = theirs.model_copy(
            update={"weights_sha256": ours.weights_sha256, "parameters": ours.parameters}
        )
    if before.protocol_sha256 != prepared.protocol.digest:
        raise GuardbenchError(
            f"{path}: was measured under another protocol of the name {before.protocol}; say --name, or "
            "delete it."
        )
    if theirs != ours:
        raise GuardbenchError(
            f"{path}: holds another classifier of that name ({before.classifier.arch}); say --name, or "
            "delete it."
        )


def assess(prepared: Prepared) -> tuple[ClassifierRecord, Path]:
    """Scores the classifier under the protocol and writes its record; resumes what is finished.

    Returns:
        The record and its path.
    """
    request, protocol, run = prepared.request, prepared.protocol, prepared.run
    sample = prepared.sample
    with explained(request.output):
        with run.processes.local_first():
            test = load_split(
                protocol.dataset,
                "val",
                resolution=protocol.resolution,
                data_dir=request.data_dir,
                cache_dir=request.cache_dir,
                progress=run.progress,
                per_class=1,
            )
        run.require_alike(
            validation_images=test.digest,
            protocol=protocol.digest,
            classifier=prepared.imported.described.weights_sha256,
            student=request.student,
            engine=request.engine,
            tier=request.tier,
        )
        order = measured_indices(protocol, test, sample)
        x, y = test.select(order), test.labels[order]
        model = prepared.imported.model
        plan = plan_scoring(
            run,
            protocol,
            seed=request.seed,
            position=request.student,
            subject=run.processes.from_main(
                lambda: fingerprint(prepared.imported, x[:8], y[:8], run.device)
            ),
            test_digest=test.digest,
            engine=request.engine,
            sample=sample,
        )
        costs = Costs()
        seed = score(run, protocol, plan, model, x, y, costs)
        record = ClassifierRecord(
            tier=request.tier,
            protocol=protocol.id,
            protocol_sha256=protocol.digest,
            dataset=protocol.dataset,
            resolution=protocol.resolution,
            test=measured_test(protocol, test, sample),
            seeds=(seed,),
            cost=tuple(costs.found),
            provenance=provenance(
                run,
                engines_used(protocol, request.engine),
                costs.commits,
                costs.searched,
                trained=False,
            ),
            flags=(
                *_near_chance(seed, dataset_info(protocol.dataset).num_classes),
                *flags((seed,)),
            ),
            classifier=prepared.imported.described,
        )
        run.processes.from_main(lambda: save_record(prepared.record_path, record))
    return record, prepared.record_path


def _near_chance(seed: SeedRun, classes: int) -> tuple[str, ...]:
    share = seed.clean.correct / seed.clean.total
    if share > NEAR_CHANCE / classes:
        return ()
    return (
        f"clean accuracy {100 * share:.1f}% is near chance: the normalisation or the order of the "
        "classes may be wrong",
    )
