"""What tests of several folders share."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'&{{7*7}}"
"""A text that would run, load or break out somewhere, were it not escaped."""


@pytest.fixture(scope="session")
def made_checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout whose boards have all that a site can show, built from the records of this one.

    On `digits` at IPC 10: two baselines, of which one has a curve, a picture and a later assessment,
    three more tracks' and origins' rows, one row of changed settings, and one whose every text is
    `HOSTILE`. On `imagenette-64`: the two baselines.
    """
    from PIL import Image

    from guardbench.curve_files import Curve, Point, save_curve
    from guardbench.leaderboard import rebuild, write
    from guardbench.methods import methods_folder
    from guardbench.metrics import worst_case
    from guardbench.reassessment import AssessedSeed, Assessment, assessment_path, save_assessment
    from guardbench.record_files import load_record, save_record
    from guardbench.records import Outcome, ResultRecord

    root = tmp_path_factory.mktemp("checkout")
    kept = {}
    for name in ("guard", "sre2l"):
        for protocol in ("digits", "imagenette-64"):
            path = Path(name) / "results" / protocol / "ipc10-seed0.json"
            kept[name, protocol] = load_record(methods_folder() / path)
            save_record(root / "baselines" / path, kept[name, protocol])
    guard = kept["guard", "digits"]

    def weaker(outcome: Outcome, every: int) -> Outcome:
        """Every so many images fewer are right."""
        flags = [right and place % every != 0 for place, right in enumerate(outcome.flags())]
        return Outcome.from_flags(
            flags,
            first=outcome.first,
            bounded=outcome.bounded,
            max_distance=outcome.max_distance,
        )

    def add(area: str, name: str, title: str, kind: str, every: int, **changes: object) -> None:
        words = guard.model_dump()
        for run, measured in zip(words["seeds"], guard.seeds, strict=True):
            found = {attack: weaker(o, every) for attack, o in measured.attacks.items()}
            run["attacks"] = {attack: o.model_dump() for attack, o in found.items()}
        words["method"] |= {"name": name, "title": title}
        words["artifact"]["label_kind"] = kind
        for key, value in changes.items():
            words[key] = {**words[key], **value} if isinstance(value, dict) else value
        path = root / area / name / "results" / "digits" / "ipc10-seed0.json"
        save_record(path, ResultRecord(**words))

    add("baselines", "random", "Random subset", "hard", 2, cost=())
    add("baselines", "herding", "Herding", "hard", 3)
    add("submissions", "stranger", "Stranger's set", "soft", 4)
    own = {**guard.method.model_dump(), "name": "mat", "title": "Tuned", "official": False}
    add("baselines", "mat", "Tuned", "teacher", 5, method=own, overrides=("squeeze.epochs=5",))
    evil = {**guard.method.model_dump(), "name": "evil", "title": HOSTILE, "official": False}
    add(
        "submissions",
        "evil",
        HOSTILE,
        "teacher",
        6,
        method=evil,
        overrides=(f"a.b={HOSTILE}",),
        flags=(HOSTILE,),
        provenance={"device": HOSTILE, "platform": HOSTILE, "commit": HOSTILE, "python": HOSTILE},
        cost=[{**stage.model_dump(), "device": HOSTILE} for stage in guard.cost],
    )
    for name, paper, code in (
        ("stranger", "https://example.org/paper.pdf", "https://example.org/code"),
        ("evil", "javascript:alert(3)", "https://user@example.org/" + HOSTILE),
    ):
        text = f"paper = '''{paper}'''\ncode = '''{code}'''\n"
        (root / "submissions" / name / "submission.toml").write_text(text, encoding="utf-8")

    record = root / "baselines/guard/results/digits/ipc10-seed0.json"
    radii = ("0", "4/255", "8/255", "16/255", "32/255", "64/255", "128/255")
    counts = (250, 236, 214, 150, 44, 3, 0)
    curve = Curve(
        classifier="student-0", weights_sha256=None, protocol=guard.protocol,
        protocol_sha256=guard.protocol_sha256, norm="linf", steps=40, total=300,
        points=tuple(Point(eps=e, correct=c) for e, c in zip(radii, counts, strict=True)),
        guardbench="0.1.0", device="cpu: test",
    )  # fmt: skip
    save_curve(record.with_name("ipc10-seed0.curve.json"), curve)
    harder = curve.model_copy(update={"classifier": "student-1", "total": 290})
    save_curve(record.with_name("ipc10-seed0-student1.curve.json"), harder)
    picture = io.BytesIO()
    Image.new("RGB", (120, 80), (200, 30, 60)).save(picture, "PNG")
    record.with_suffix(".png").write_bytes(picture.getvalue())

    found = worst_case(guard.seeds)
    assert found is not None
    assessment = Assessment(
        result_sha256=guard.result_sha256, attack="an adaptive attack", made_by="somebody",
        date="2026-01-02", source="https://example.org/break",
        seeds=tuple(
            AssessedSeed(seed=run.seed, outcome=weaker(run.attacks["autoattack"], 7))
            for run in guard.seeds
        ),
    )  # fmt: skip
    save_assessment(assessment_path(record, "adaptive"), assessment)
    write(root, rebuild(root))
    return root
