"""Students x attacks, on students whose answers are known beforehand."""

import dataclasses
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import nn

from guardbench import canonical, evaluation, scoring, scoring_plan
from guardbench.attacks.apgd import APGD
from guardbench.attacks.autoattack import AutoAttack
from guardbench.attacks.base import run_verified
from guardbench.attacks.fab import FAB
from guardbench.attacks.searched import searchable
from guardbench.attacks.square import Square
from guardbench.data.dataset import RealDataset
from guardbench.errors import GuardbenchError
from guardbench.evaluation import plan_evaluation
from guardbench.models import batch_norms, build_model
from guardbench.progress import Progress
from guardbench.protocol import AttackSpec, load_protocol
from guardbench.records import Engine
from guardbench.runtime import Run
from guardbench.scoring import attack_batch
from guardbench.scoring_plan import taken_over


def make_run(tmp_path) -> Run:
    return Run(accelerator=Accelerator(cpu=True), workspace=tmp_path, seed=0, progress=Progress())


def small_protocol(count: int = 60, per_seed: int = 20):
    base = load_protocol("digits")
    attacks = tuple(
        a.model_copy(
            update={
                "images_per_seed": per_seed if a.images_per_seed else None,
                "params": {"queries": 50} if a.kind == "square" else {"steps": 10, "step": "4/255"},
            }
        )
        for a in base.attacks
        if a.kind in ("pgd", "square")
    )
    return base.model_copy(
        update={
            "id": "small",
            "attacks": attacks,
            "rank_by": "pgd100",
            "student": base.student.model_copy(update={"seeds": (0, 1)}),
            "test": base.test.model_copy(update={"count": count, "sha256": None}),
        }
    )


def linear_model() -> nn.Module:
    """Fast, and broken often enough at the digits' radius that Square stops early."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).eval().requires_grad_(False)


def make_test_set(count: int = 80) -> RealDataset:
    rng = np.random.default_rng(0)
    return RealDataset(
        name="digits",
        split="val",
        resolution=8,
        images=rng.integers(0, 256, (count, 1, 8, 8), dtype=np.uint8),
        labels=torch.arange(count) % 10,
        ids=tuple(f"{k % 10}/{k}" for k in range(count)),
        classes=tuple("0123456789"),
        digest="0" * 64,
    )


@pytest.fixture
def evaluated(tmp_path, monkeypatch):
    """An evaluation in which training is replaced by a fixed network, and how often it attacked."""
    model = linear_model()
    calls: list[int] = []
    real = scoring.run_batch

    def train(run, _set, _student, stages, _labels, _made_from):
        for stage in stages.values():
            if stage.folder.finished() is None:
                stage.folder.begin(run.device)
                stage.folder.finish(run.device)
        return [model for _ in stages]

    def counted(attack, net, x, y, index, **kwargs):
        calls.append(len(index))
        return real(attack, net, x, y, index, **kwargs)

    monkeypatch.setattr(evaluation, "train_students", train)
    monkeypatch.setattr(scoring, "run_batch", counted)
    run, protocol, test = make_run(tmp_path), small_protocol(), make_test_set()
    order = protocol.test_indices(test.ids)
    # Labels that the network gives, but for every third image: its clean accuracy is known.
    with torch.no_grad():
        labels = model(test.batch(range(80))).argmax(1)
    labels[order[::3]] = (labels[order[::3]] + 1) % 10
    test = dataclasses.replace(test, labels=labels)
    plan = plan_evaluation(
        run,
        protocol,
        artifact="a",
        images=10,
        kind="hard",
        train_digest=None,
        test_digest=test.digest,
    )

    def go():
        made = SimpleNamespace(digest="0" * 64)
        return evaluation.evaluate(run, protocol, plan, made, None, test)

    return go, calls, model, test, order, protocol


@pytest.mark.parametrize(
    ("kind", "steps", "length"),
    [("pgd", 63, {}), ("mim", 15, {}), ("jitter", 9, {"step": 0.1}), ("spsa", 4, {"lr": 0.2})],
)
def test_an_attack_that_cannot_reach_the_edge_of_the_ball_is_refused(
    kind: str, steps: int, length: dict[str, float]
) -> None:
    """Steps of 0.25/255 (PGD) and 1/255 (MIM) by default, in a ball of 16/255; of the others, in radii."""
    protocol = small_protocol()
    params = {"steps": steps, **length}
    column = protocol.attacks[0].model_copy(update={"kind": kind, "params": params})
    longer = column.model_copy(update={"params": {**params, "steps": steps + 1}})
    scoring_plan.engines_used(protocol.model_copy(update={"attacks": (longer,)}), "guardbench")
    with pytest.raises(GuardbenchError, match=f"attack pgd100: {steps} steps of .* raise its step"):
        scoring_plan.engines_used(protocol.model_copy(update={"attacks": (column,)}), "guardbench")


@pytest.mark.parametrize(
    ("kind", "length", "longest"),
    [
        ("pgd", "step", "32/255"),
        ("mim", "step", "32/255"),
        ("jitter", "step", 2.0),
        ("spsa", "lr", 2.0),
    ],
)
def test_a_step_longer_than_the_ball_is_wide_is_refused(kind: str, length: str, longest) -> None:
    """As where levels of 255 were meant: a search that jumps from corner to corner finds little."""
    protocol = small_protocol()

    def check(value) -> None:
        column = protocol.attacks[0].model_copy(update={"kind": kind, "params": {length: value}})
        scoring_plan.engines_used(protocol.model_copy(update={"attacks": (column,)}), "guardbench")

    check(longest)
    with pytest.raises(
        GuardbenchError,
        match=r"attack pgd100: each of .* is longer than the ball .* lower its step",
    ):
        check(3 if kind in ("pgd", "mim") else 2.1)


def test_counts_are_those_of_the_network(evaluated) -> None:
    go, _, model, test, order, protocol = evaluated
    runs, costs = go()
    assert [r.seed for r in runs] == [0, 1]
    for position, run in enumerate(runs):
        assert run.clean.correct == 40
        assert run.clean.flags() == [k % 3 != 0 for k in range(60)]
        square = run.attacks["square"]
        assert (square.first, square.total) == (20 * position, 20)
        assert square.correct <= sum(run.clean.flags()[20 * position : 20 * position + 20])
    x, y = test.batch(order), test.labels[order]
    spec = protocol.attacks[0]
    attack = scoring_plan.build_attack(spec.kind, protocol.threat.model, spec.params)
    named = scoring.derive_seed(1, "attack", spec.name)
    alone = run_verified(attack, model, x, y, seed=named, batch_size=7)
    assert runs[1].attacks["pgd100"].flags() == alone.robust.tolist()
    names = ["student 0", "clean 0", "checks 0", "pgd100 0", "square 0"]
    assert [c.stage for c in costs.found[:5]] == names
    assert not any(c.shared for c in costs.found)
    assert not costs.searched


def test_verdicts_on_a_student_that_was_made_anew_are_made_anew(evaluated, tmp_path) -> None:
    """Its folder was deleted, and another device rounds otherwise: the attacks' keys are the same."""
    go, calls, *_ = evaluated
    whole, _ = go()
    attacked = len(calls)
    go()
    assert len(calls) == attacked
    paths = [
        path for path in tmp_path.glob("students/*/stage.json") if "student 0" in path.read_text()
    ]
    stored = json.loads(paths[0].read_text())
    (paths[0].parent / "student.bin").write_bytes(b"other weights")
    stored["files"] = {"student.bin": canonical.file_digest(paths[0].parent / "student.bin")}
    del stored["seal"]
    paths[0].write_text(canonical.dumps(stored))
    again, _ = go()
    assert again == whole
    assert len(calls) == attacked + attacked // 2


def test_what_is_finished_is_not_attacked_again(evaluated) -> None:
    go, calls, *_ = evaluated
    first, _ = go()
    before = len(calls)
    again, costs = go()
    assert len(calls) == before
    assert again == first
    assert all(c.shared for c in costs.found)


def test_an_added_column_moves_no_other(tmp_path) -> None:
    model, test, protocol = linear_model(), make_test_set(40), small_protocol(40)
    with torch.no_grad():
        y = model(test.batch(range(40))).argmax(1)
    square = protocol.attacks[-1]
    more = square.model_copy(update={"name": "first", "images_per_seed": None})
    found = []
    for columns in (protocol.attacks, (more, *protocol.attacks)):
        run = make_run(tmp_path / f"{len(columns)}")
        changed = protocol.model_copy(update={"attacks": columns})
        plan = scoring_plan.plan_scoring(
            run, changed, seed=3, position=0, subject="s", test_digest="d", engine="guardbench"
        )
        images = test.select(list(range(40)))
        found.append(scoring.score(run, changed, plan, model, images, y, scoring.Costs()))
    fewer, added = found
    assert added.attacks["first"].flags()[:20] != added.attacks["square"].flags(), "another seed"
    assert {name: added.attacks[name] for name in fewer.attacks} == fewer.attacks
    assert added.clean == fewer.clean


@pytest.mark.parametrize(("resumed_by", "left"), [(8, [8, 8]), (5, [5, 5, 5, 1]), (64, [16])])
def test_an_interrupted_attack_goes_on_at_its_next_image(
    evaluated, monkeypatch, tmp_path, resumed_by: int, left: list[int]
) -> None:
    """On another device, too, where a batch has another size: every image is attacked once."""
    go, calls, *_ = evaluated
    monkeypatch.setattr(scoring, "images_at_a_time", lambda *_: 8)
    monkeypatch.setattr(scoring.PlannedStage, "__eq__", object.__eq__)
    monkeypatch.setattr("guardbench.stages.CHECKPOINT_EVERY_S", -1.0)
    counted = scoring.run_batch

    def dies(*args, **kwargs):
        if len(calls) == 3:
            raise KeyboardInterrupt
        return counted(*args, **kwargs)

    monkeypatch.setattr(scoring, "run_batch", dies)
    with pytest.raises(KeyboardInterrupt):
        go()
    monkeypatch.setattr(scoring, "run_batch", counted)
    monkeypatch.setattr(scoring, "images_at_a_time", lambda *_: resumed_by)
    runs, _ = go()
    assert calls[: 3 + len(left)] == [8, 8, 8, *left], "40 images in all, none twice"
    shutil.rmtree(tmp_path)
    unbroken, _ = go()
    assert runs == unbroken


@pytest.mark.parametrize(("noise", "place"), [(0.0, 30), (0.1, 8)])
def test_an_attack_column_killed_in_the_midst_of_its_batch_ends_the_same(
    evaluated, monkeypatch, tmp_path, noise: float, place: int
) -> None:
    """All of Square's twenty images are one batch; it is killed after some passes.

    A network whose answers are random goes on with the draws that would have come next.
    """
    from guardbench.attacks import square

    go, _, model, *_ = evaluated
    model.register_forward_hook(lambda _, __, answer: answer + noise * torch.randn_like(answer))
    monkeypatch.setattr("guardbench.stages.CHECKPOINT_EVERY_S", -1.0)
    real, queries = square._Search.advance, []

    def dies(self, model, rows):
        if len(queries) == place:
            raise KeyboardInterrupt
        queries.append(len(rows["image"]))
        return real(self, model, rows)

    monkeypatch.setattr(square._Search, "advance", dies)
    with pytest.raises(KeyboardInterrupt):
        go()
    (checkpoint,) = tmp_path.rglob("checkpoint.pt")
    first = [*queries]

    def goes_on(self, model, rows):
        queries.append(len(rows["image"]))
        return real(self, model, rows)

    monkeypatch.setattr(square._Search, "advance", goes_on)
    resumed, _ = go()
    assert not checkpoint.exists()
    together = queries[:]
    shutil.rmtree(tmp_path)
    queries.clear()
    unbroken, _ = go()
    assert [run.attacks for run in resumed] == [run.attacks for run in unbroken]
    assert queries[:place] == first
    assert together == queries, "every query once, in both students' columns"


def test_the_dev_tier_searches_in_bf16_and_says_so(evaluated, monkeypatch, tmp_path) -> None:
    *_, test, _, protocol = evaluated
    torch.manual_seed(0)
    layers = nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)
    net = nn.Sequential(nn.Flatten(), *layers).eval().requires_grad_(False)
    monkeypatch.setattr(scoring_plan, "bf16_gains", lambda _kind, _resolution: True)
    with torch.no_grad():
        answers = net(test.batch(range(80))).argmax(1)
    run = make_run(tmp_path / "dev")
    x = test.select(list(range(40)))
    pgd = protocol.attacks[0].model_copy(update={"params": {"steps": 10, "step": "1/100"}})
    protocol = protocol.model_copy(
        update={"attacks": (pgd, *protocol.attacks[1:]),
                "threat": protocol.threat.model_copy(update={"eps": "1/25"})}
    )  # fmt: skip
    found = {}
    for sample in (40, None):
        plan = scoring_plan.plan_scoring(
            run, protocol, seed=0, position=0, subject="s", test_digest="d", engine="guardbench",
            sample=sample,
        )  # fmt: skip
        costs, rows = scoring.Costs(), 40 if sample else 60
        images = x if sample else test.select(list(range(60)))
        found[sample] = scoring.score(run, protocol, plan, net, images, answers[:rows], costs)
        assert costs.searched == ({"bf16"} if sample else set())
    dev, official = found[40].attacks, found[None].attacks
    assert (dev["square"].first, dev["square"].total) == (0, 40)
    pairs = [*zip(dev["pgd100"].flags(), official["pgd100"].flags()[:40], strict=True)]
    assert sum(a != b for a, b in pairs) <= 1
    assert 5 < sum(a for a, _ in pairs) < 35


def test_a_column_is_taken_over_only_where_it_is_a_part_on_the_same_images() -> None:
    protocol = load_protocol("imagenette-64")
    by_name = {a.name: a for a in protocol.attacks}
    auto, square = by_name["autoattack"], by_name["square"]

    def taken(*columns: AttackSpec, engine: Engine = "guardbench") -> list[str]:
        changed = protocol.model_copy(update={"attacks": columns})
        return [each.name for each in taken_over(changed, columns[-1], engine)]

    assert taken(*protocol.attacks) == ["square"]
    assert taken(by_name["mim"], by_name["pgd100"]) == []
    assert taken(square, auto, engine="reference") == []
    assert taken(auto, square) == [], "a later column has no verdicts yet"
    for other in ({"images_per_seed": 50}, {"params": {"queries": 100}}):
        assert taken(square.model_copy(update=other), auto) == []
    for version in ({"version": "plus"}, {"square": False}):
        assert taken(square, auto.model_copy(update={"params": version})) == []

    def apgd(**params: object) -> AttackSpec:
        name = f"apgd-{params.get('loss', 'ce')}"
        update = {"name": name, "kind": "apgd", "params": params}
        return auto.model_copy(update=update)

    targeted = apgd(loss="dlr-targeted")
    assert taken(apgd(), square, targeted, auto) == ["apgd-ce", "square", "apgd-dlr-targeted"]
    assert taken(apgd(steps=50), apgd(loss="dlr"), auto) == []


def test_parts_that_ran_before_give_the_ensembles_verdict() -> None:
    """AutoAttack is broken-by-any-of-four, so its verdict cannot depend on the order of the four."""
    torch.manual_seed(0)
    model = linear_model()
    x = torch.rand(40, 1, 8, 8)
    with torch.no_grad():
        y = model(x).argmax(1)
    threat = load_protocol("digits").threat.model
    threat = dataclasses.replace(threat, eps=threat.eps / 4)
    whole = run_verified(AutoAttack(threat=threat), model, x, y, seed=1)
    assert 0 < int(whole.robust.sum()) < 40, "an eps at which some survive"
    for parts in ((Square(threat=threat),), (APGD(threat=threat), FAB(threat=threat))):
        alive = torch.ones(40, dtype=torch.bool)
        for part in parts:
            alive &= run_verified(part, model, x, y, seed=2).robust
        rest = AutoAttack(threat=threat, without=parts)
        assert len(rest.parts()) == 4 - len(parts)
        assert torch.equal(
            whole.robust, run_verified(rest, model, x, y, seed=1, clean=alive).robust
        )


@pytest.mark.parametrize("columns", [("apgd",), ("square", "apgd"), ()])
def test_a_record_with_columns_that_are_taken_over_has_the_ensembles_verdict(
    tmp_path, columns: tuple[str, ...]
) -> None:
    model, test = linear_model(), make_test_set(40)
    with torch.no_grad():
        answers = model(test.batch(range(40))).argmax(1)
    answers[::4] = (answers[::4] + 1) % 10
    base = load_protocol("digits")
    (auto,) = (spec for spec in base.attacks if spec.kind == "autoattack")
    others = tuple(auto.model_copy(update={"name": kind, "kind": kind}) for kind in columns)
    columned = tuple(
        spec.model_copy(update={"images_per_seed": 20, "params": {}}) for spec in (*others, auto)
    )
    protocol = base.model_copy(
        update={"attacks": columned, "threat": base.threat.model_copy(update={"eps": "16/255"}),
                "test": base.test.model_copy(update={"count": 40, "sha256": None})}
    )  # fmt: skip
    run = make_run(tmp_path)
    plan = scoring_plan.plan_scoring(
        run, protocol, seed=3, position=1, subject="s", test_digest="d", engine="guardbench"
    )
    x, costs = test.select(range(40)), scoring.Costs()
    found = scoring.score(run, protocol, plan, model, x, answers, costs).attacks
    assert {cost.stage: cost.after for cost in costs.found if cost.after} == (
        {"autoattack 3": columns} if columns else {}
    )
    threat = protocol.threat.model
    whole = run_verified(
        AutoAttack(threat=threat), model, x[torch.arange(20, 40)], answers[20:], seed=9
    )
    assert found["autoattack"].flags() == whole.robust.tolist()
    assert 0 < found["autoattack"].correct < 15
    assert found["autoattack"].first == 20


def test_the_batch_of_an_attack_is_fixed_by_the_resolution_alone() -> None:
    assert [attack_batch(r) for r in (8, 32, 64, 224)] == [256, 256, 256, 64]


class NormFirst(nn.Module):
    """Its BN is defined behind a convolution and applied before it, so folding changes the answer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)
        self.lift, self.head = nn.Conv2d(1, 4, 1), nn.Linear(4, 10)
        self.norm.running_mean.fill_(0.3)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        behind = self.norm(self.lift(images))
        return self.head(self.conv(behind[:, :1]).mean((2, 3)))


def test_attacks_search_a_faster_copy_only_where_it_answers_the_same() -> None:
    images = torch.rand(4, 1, 8, 8)
    odd = NormFirst().eval()
    assert searchable(odd, images) is odd
    plain = build_model("convnet-d3-bn", channels=1, classes=10, resolution=8, seed=0).eval()
    fast = searchable(plain, images)
    assert not batch_norms(fast)
    with torch.no_grad():
        torch.testing.assert_close(fast(images), plain(images), rtol=1e-4, atol=1e-5)
    noisy = nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.Dropout()).train()
    assert searchable(noisy, images) is noisy


def test_what_was_found_on_other_images_is_not_taken_over(tmp_path) -> None:
    """A protocol of the user's own has no list's digest, so the number of images tells."""
    keys = []
    for count in (20, 40):
        plan = scoring_plan.plan_scoring(
            make_run(tmp_path), small_protocol(count), seed=0, position=0, subject="s", test_digest="d",
            engine="guardbench",
        )  # fmt: skip
        keys += [{stage.folder.name: stage.folder.key for stage in plan.stages}]
    assert small_protocol(20).id == small_protocol(40).id
    assert small_protocol(20).test.sha256 is small_protocol(40).test.sha256 is None
    same = {name for name, key in keys[0].items() if keys[1][name] == key}
    assert same == {"square 0"}, "it is of 20 images in both; clean, checks and the rest are of all"


def test_an_unfinished_attack_begins_anew_where_a_clean_verdict_is_another_now(
    evaluated, monkeypatch, tmp_path
) -> None:
    """The clean pass was deleted and made again on a device that rounds otherwise."""
    go, calls, *_ = evaluated
    counted, verdicts = scoring.run_batch, scoring.clean_verdicts
    monkeypatch.setattr(scoring, "images_at_a_time", lambda *_: 8)
    monkeypatch.setattr("guardbench.stages.CHECKPOINT_EVERY_S", -1.0)

    def dies(*args, **kwargs):
        if len(calls) == 3:
            raise KeyboardInterrupt
        return counted(*args, **kwargs)

    def others(*args):
        right = verdicts(*args)
        right[1] = False  # one of those that have their verdict
        return right

    with monkeypatch.context() as patched:
        patched.setattr(scoring, "run_batch", dies)
        with pytest.raises(KeyboardInterrupt):
            go()
    for path in tmp_path.glob("attacks/*/stage.json"):
        if '"clean 0"' in path.read_text():
            shutil.rmtree(path.parent)
    monkeypatch.setattr(scoring, "clean_verdicts", others)
    calls.clear()
    resumed, _ = go()
    assert calls[:5] == [8, 8, 8, 8, 7]
    shutil.rmtree(tmp_path)
    unbroken, _ = go()
    for one, other in zip(resumed, unbroken, strict=True):
        assert (one.clean, one.attacks) == (other.clean, other.attacks)
    assert not resumed[0].clean.flags()[1]
