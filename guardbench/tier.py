"""The dev tier: a protocol measured sooner, for work in progress; its numbers are never official.

Attacks search in bf16 where the device gains by it, and a break counts only where the float32 model is
broken. They meet a stratified subset of the protocol's test images, an equal share a class.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from guardbench.errors import GuardbenchError
from guardbench.protocol import Protocol, TestImages
from guardbench.records import Tier

DEV_IMAGES = 200


def sample_size(protocol: Protocol, classes: int, tier: Tier, images: int | None) -> int | None:
    """How many test images the tier measures; None for the official one, which measures them all.

    Args:
        classes: K of the dataset; every class has the same share.
        images: as the user wants; by default 200, and never more than an attack measures officially,
            nor than half of the protocol's, so that every class has its share.

    Raises:
        GuardbenchError: `images` is no multiple of K, more than there are, or not of the dev tier.
    """
    if tier == "official":
        if images is not None:
            raise GuardbenchError(
                f"--images {images}: the official tier measures all images of protocol {protocol.id}; "
                "say --tier dev too."
            )
        return None
    per_seed = [spec.images_per_seed for spec in protocol.attacks if spec.images_per_seed]
    if images is None:
        images = max(1, min(DEV_IMAGES, protocol.test.count // 2, *per_seed) // classes) * classes
    if images % classes or not 0 < images <= protocol.test.count:
        raise GuardbenchError(
            f"--images {images}: must be a multiple of the {classes} classes, at most the "
            f"{protocol.test.count} test images of protocol {protocol.id}."
        )
    return images


def measured(protocol: Protocol, sample: int | None) -> Protocol:
    """The protocol as a tier measures it: in the dev tier every attack meets all of the subset."""
    if sample is None:
        return protocol
    attacks = [spec.model_copy(update={"images_per_seed": None}) for spec in protocol.attacks]
    return protocol.model_copy(update={"test": TestImages(count=sample), "attacks": tuple(attacks)})


SMOKE_IMAGES = 50


def smoke(protocol: Protocol) -> Protocol:
    """A protocol of a few minutes that shows whether students learn and attacks run, and no more.

    One student, a tenth of the epochs, PGD (or the first attack) and a Square of 500 queries.
    """
    kept = [spec for spec in protocol.attacks if spec.kind == "pgd"][:1] or [protocol.attacks[0]]
    square = [spec for spec in protocol.attacks if spec.kind == "square"][:1]
    kept += [
        spec.model_copy(update={"params": {**spec.params, "queries": 500}})
        for spec in square
        if spec is not kept[0]
    ]
    student = protocol.student
    fewer = {"seeds": student.seeds[:1], "epochs": max(1, student.epochs // 10)}
    return protocol.model_copy(
        update={
            "id": f"{protocol.id}-smoke",
            "title": f"{protocol.title}, smoke test"[:200],
            "rank_by": kept[0].name,
            "student": student.model_copy(update=fewer),
            "test": TestImages(count=protocol.test.count),
            "attacks": tuple(spec.model_copy(update={"images_per_seed": None}) for spec in kept),
        }
    )


def stratified(labels: Sequence[int], sample: int, classes: int) -> list[int]:
    """The positions of the subset, in order: of each class its first `sample / classes` images.

    Args:
        labels: of the protocol's test images in its hashed order, so that the first ones of a class
            are a fair draw of it.
        sample: a multiple of `classes`.

    Raises:
        GuardbenchError: a class has fewer images.
    """
    share, held = sample // classes, Counter(labels)
    least = min(held[label] for label in range(classes))
    if least < share:
        raise GuardbenchError(
            f"--images {sample}: a class has only {least} of the protocol's test images; say at most "
            f"--images {least * classes}."
        )
    seen: Counter[int] = Counter()
    kept = []
    for place, label in enumerate(labels):
        seen[label] += 1
        if seen[label] <= share:
            kept.append(place)
    return kept


def dev_text(sample: int, whole: int) -> str:
    """The dev tier in words, for a plan."""
    return f"dev, unofficial: {sample} of {whole} test images, an equal share a class"
