"""The reference engine: pyautoattack's own answers, and nothing else in the process moved."""

from __future__ import annotations

import logging
import sys
from fractions import Fraction
from pathlib import Path

import pyautoattack
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from typer.testing import CliRunner

import guardbench
from guardbench.attacks.autoattack import AutoAttack
from guardbench.attacks.base import run_verified
from guardbench.attacks.square import Square
from guardbench.cli import app
from guardbench.data.dataset import load_split
from guardbench.errors import GuardbenchError
from guardbench.progress import Progress
from guardbench.protocol import load_protocol
from guardbench.record_files import load_any_record
from guardbench.threat import Norm, ThreatModel

LINF = ThreatModel("linf", Fraction(1, 40))
L2 = ThreatModel("l2", Fraction(1, 8))
L1 = ThreatModel("l1", Fraction(1))


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def _quick(monkeypatch):
    """A tenth of the iterations, whoever asks for AutoAttack: for tests that want no strength."""
    run = pyautoattack.AutoAttack.run_standard_evaluation

    def quick(self, *arguments, **options):
        self.square.n_queries = min(self.square.n_queries, 100)
        for part in (self.apgd, self.apgd_targeted, self.fab):
            part.n_iter = part.n_iter_orig = 10
        return run(self, *arguments, **options)

    monkeypatch.setattr(pyautoattack.AutoAttack, "run_standard_evaluation", quick)


def linear(classes: int, size: int = 6, scale: float = 1.0) -> nn.Module:
    torch.manual_seed(classes)
    layer = nn.Linear(size * size, classes)
    with torch.no_grad():
        layer.weight.mul_(scale)
        layer.bias.copy_(-0.5 * layer.weight.sum(1))  # grey is undecided, so labels vary
    return nn.Sequential(nn.Flatten(), layer).eval()


def images(model: nn.Module, count: int, size: int = 6) -> tuple[Tensor, Tensor]:
    x = 0.3 + 0.4 * torch.rand(count, 1, size, size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return x, model(x).argmax(1)


def exact_case(classes: int, norm: Norm, size: int):
    """A linear model, images, a radius that half of them survive, and distance / radius, [N]."""
    model = linear(classes, size)
    x, y = images(model, 60, size)
    with torch.no_grad():
        logits, weight = model(x).double(), model[1].weight.double()
    between = (weight[y][:, None] - weight).abs()
    dual = between.sum(2) if norm == "linf" else between.square().sum(2).sqrt()
    gaps = (logits.gather(1, y[:, None]) - logits) / dual
    distance = gaps.scatter(1, y[:, None], torch.inf).amin(1)
    eps = Fraction(float(distance.quantile(0.5))).limit_denominator(10**5)
    return model, x, y, ThreatModel(norm, eps), distance / float(eps)


@pytest.mark.parametrize(("norm", "classes"), [("linf", 4), ("linf", 12), ("l2", 6)])
def test_autoattack_reaches_the_exact_answer(norm, classes, monkeypatch):
    model, x, y, threat, ratio = exact_case(classes, norm, 6)
    clear = (ratio - 1).abs() > 0.01
    x, y, robust = x[clear][:20], y[clear][:20], ratio[clear][:20] > 1
    assert 5 < robust.sum() < 15
    run = pyautoattack.square.SquareAttack.perturb

    def short(self, *arguments):  # the three parts before it are exact here
        self.n_queries = 50
        return run(self, *arguments)

    monkeypatch.setattr(pyautoattack.square.SquareAttack, "perturb", short)
    outcome = run_verified(AutoAttack(threat=threat, engine="reference"), model, x, y, seed=0)
    assert torch.equal(outcome.robust, robust)


class Small(nn.Module):
    """A model on a device that holds six images."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.sizes: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.sizes.append(len(x))
        if len(x) > 6:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate more than there is")
        return self.model(x)


def test_where_memory_runs_out_the_package_gets_fewer_images_at_a_time():
    model, x, y, threat, ratio = exact_case(4, "linf", 6)
    clear = (ratio - 1).abs() > 0.01
    x, y, robust = x[clear][:20], y[clear][:20], ratio[clear][:20] > 1
    assert 5 < robust.sum() < 15
    small = Small(model).eval()
    found = AutoAttack(threat=threat, engine="reference", square=False).perturb(small, x, y, seed=0)
    assert torch.equal(model(found).argmax(1) == y, robust)
    assert [size for size in small.sizes if size > 6] == [20, 10], "each size is tried once"


def test_square_comes_close_from_above():
    model, x, y, threat, ratio = exact_case(3, "linf", 8)
    attack = Square(threat=threat, queries=1500, engine="reference")
    robust = run_verified(attack, model, x, y, seed=0).robust
    assert (robust >= (ratio > 1)).all()
    assert not robust[ratio < 0.75].any()
    assert 25 < robust.sum() < 40


def network(classes: int = 10) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, classes)
    ).eval()


@pytest.mark.usefixtures("_quick")
@pytest.mark.parametrize("threat", [LINF, L2, L1], ids=str)
def test_equal_to_the_package_called_directly(threat):
    model = network()
    x, y = images(model, 8, size=8)
    x = torch.cat([x, torch.zeros(1, 1, 8, 8), torch.ones(1, 1, 8, 8)])
    y = model(x).argmax(1)
    y[0] = (y[0] + 1) % 10
    norm = {"linf": "Linf", "l2": "L2", "l1": "L1"}[threat.norm]
    reference = pyautoattack.AutoAttack(model, norm=norm, eps=float(threat.eps), seed=7)
    expected, _ = reference.run_standard_evaluation(x, y, batch_size=10)
    # l2 and l1 go through pyautoattack whatever the engine is called.
    attack = AutoAttack(threat=threat, engine="reference" if norm == "Linf" else "guardbench")
    assert torch.equal(attack.perturb(model, x, y, seed=7), expected)
    assert 0 < (expected != x).flatten(1).any(1).sum() < 10
    outcome = run_verified(attack, model, x, y, seed=7)
    assert not outcome.robust[0]

    reference = pyautoattack.AutoAttack(
        model, norm=norm, eps=float(threat.eps), seed=7, version="custom", attacks=["square"]
    )
    reference.square.n_queries = 60
    expected, _ = reference.run_standard_evaluation(x, y, batch_size=10)
    found = Square(threat=threat, queries=60, engine=attack.engine).perturb(model, x, y, seed=7)
    assert torch.equal(found, expected)


def test_square_asks_as_often_as_it_is_told():
    count = 0

    class Counting(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            nonlocal count
            count += 1
            return torch.tensor([1.0, 0.0]).repeat(len(x), 1)

    x, y = torch.rand(2, 1, 8, 8), torch.zeros(2, dtype=torch.int64)
    for queries in (1, 41):
        Square(threat=LINF, queries=queries, engine="reference").perturb(
            Counting().eval(), x, y, seed=0
        )
    few, count = count, 0
    Square(threat=LINF, engine="reference").perturb(Counting().eval(), x, y, seed=0)
    assert count - few == 5000 - 42 - (few - 42) // 2


@pytest.mark.usefixtures("_quick")
@pytest.mark.parametrize(
    "attack",
    [
        AutoAttack(threat=LINF, engine="reference"),
        Square(threat=LINF, queries=20, engine="reference"),
        AutoAttack(threat=LINF, square=False),
        Square(threat=LINF, queries=20),
    ],
    ids=repr,
)
def test_the_rest_of_the_process_is_left_alone(attack, capfd):
    model = network()
    with torch.no_grad():
        model[3].weight.zero_()  # zero gradients make the package warn
    x, y = images(model, 5, size=8)
    random = torch.get_rng_state()
    sys.settrace(tracer := lambda *_: None)
    try:
        found = attack.perturb(model, x, y, seed=1)
        assert sys.gettrace() is tracer
    finally:
        sys.settrace(None)
    assert torch.equal(torch.get_rng_state(), random)
    assert capfd.readouterr() == ("", "")
    assert all(weight.requires_grad and weight.grad is None for weight in model.parameters())
    torch.manual_seed(123)  # and what is random outside does not reach inside
    assert torch.equal(attack.perturb(model, x, y, seed=1), found)


@pytest.mark.usefixtures("_quick")
def test_the_warnings_of_the_package_reach_our_log(caplog):
    model = nn.Sequential(network(), nn.Softmax(1)).eval()
    x, y = images(model, 3, size=8)
    with caplog.at_level(logging.INFO, logger="guardbench"):
        AutoAttack(threat=LINF, engine="reference").perturb(model, x, y, seed=1)
    assert any("probability distribution" in record.message for record in caplog.records)
    assert {record.name for record in caplog.records} == {"guardbench.attacks.reference"}


def test_under_four_classes_is_one_clear_line():
    model = linear(3)
    x, y = images(model, 4)
    attack = AutoAttack(threat=LINF, engine="reference")
    with pytest.raises(GuardbenchError, match="needs at least 4 classes for its DLR loss, not 3"):
        run_verified(attack, model, x, y, seed=0)
    assert AutoAttack(threat=LINF, version="rand").perturb(model, x, y, seed=0).shape == x.shape
    with pytest.raises(GuardbenchError, match="version must be one of standard, plus, rand"):
        AutoAttack(threat=LINF, version="fast")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("threat", "classes", "apgd", "fab"),
    [(LINF, 4, 3, 3), (LINF, 10, 9, 9), (L2, 12, 9, 9), (L1, 12, 5, 9), (L1, 5, 4, 4)],
    ids=str,
)
def test_targets_are_the_official_number_or_all_other_classes(
    threat, classes, apgd, fab, monkeypatch
):
    asked: list[tuple[int, int, int]] = []

    def listen(self, x, y, *, batch_size):
        targets = self.apgd_targeted.n_target_classes, self.fab.n_target_classes
        asked.append((*targets, self.square.n_queries))
        assert batch_size == len(x)
        return x, y

    monkeypatch.setattr(pyautoattack.AutoAttack, "run_standard_evaluation", listen)
    model = network(classes)
    attack = AutoAttack(threat=threat, engine="reference")
    attack.perturb(model, *images(model, 3, size=8), seed=0)
    assert asked == [(apgd, fab, 5000)]


@pytest.mark.usefixtures("_quick")
@pytest.mark.parametrize("version", ["standard", "plus", "rand"])
def test_square_can_be_left_out(version, monkeypatch):
    model = network()
    x, y = images(model, 3, size=8)
    ran: list[str] = []
    run = pyautoattack.AutoAttack.run_standard_evaluation

    def listen(self, *arguments, **options):
        ran.extend(self.attacks_to_run)
        return run(self, *arguments, **options)

    monkeypatch.setattr(pyautoattack.AutoAttack, "run_standard_evaluation", listen)
    attack = AutoAttack(threat=LINF, version=version, square=False, engine="reference")
    attack.perturb(model, x, y, seed=0)
    assert "square" not in ran
    assert ran[0] == "apgd-ce"


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize(
    ("version", "expected"),
    [
        ("standard", ["apgd ce, 1 x 1", "apgd-t", "fab-t, 1", "square"]),
        ("plus", ["apgd ce, 5 x 1", "apgd dlr, 5 x 1", "fab, 5", "square", "apgd-t", "fab-t, 1"]),
        ("rand", ["apgd ce, 1 x 20", "apgd dlr, 1 x 20"]),
    ],
)
def test_each_version_runs_its_parts_on_what_is_left(version, expected, norm, monkeypatch):
    """Croce & Hein's README: `rand` with 20 gradients a step, `plus` with 5 restarts and untargeted parts."""
    ran: list[str] = []

    def listen(self, x, _):
        assert len(x) == 3, "each part gets every image that no part has broken"
        ran.append(
            words[type(self).__name__].format(self, "-t" if getattr(self, "targeted", 0) else "")
        )
        return x.clone()

    words = {
        "APGDAttack": "apgd {0.loss}, {0.n_restarts} x {0.eot_iter}",
        "APGDAttack_targeted": "apgd-t",
        "FABAttack_PT": "fab{1}, {0.n_restarts}",
        "SquareAttack": "square",
    }
    for part in words:
        monkeypatch.setattr(getattr(pyautoattack.autoattack, part), "perturb", listen)
    model = network()
    attack = AutoAttack(threat=ThreatModel(norm, LINF.eps), version=version, engine="reference")
    x, y = images(model, 3, size=8)
    assert torch.equal(attack.perturb(model, x, y, seed=0), x)
    assert ran == expected


@pytest.mark.usefixtures("_quick")
@pytest.mark.parametrize("engine", ["guardbench", "reference"])
def test_a_model_that_answers_nan_at_adversarial_images_alone_is_one_clear_line(engine):
    """It is right on whole 255ths, as test images are, and NaN off them: no verdict, however it ends."""

    class Cracked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network()

        def forward(self, x: Tensor) -> Tensor:
            off = ((255 * x).round() - 255 * x).abs().flatten(1).amax(1) > 1e-3
            return torch.where(off[:, None], torch.nan, self.network(x))

    model = Cracked().eval()
    x = (255 * images(model.network, 6, size=8)[0]).round() / 255
    y = model(x).argmax(1)
    assert model(x).isfinite().all()
    attack = AutoAttack(threat=LINF, engine=engine)
    with pytest.raises(GuardbenchError, match=r"answers NaN at an image that AutoAttack") as error:
        run_verified(attack, model, x, y, seed=0)
    assert "\n" not in str(error.value)


def linear_digits() -> nn.Module:
    """Logistic regression of scikit-learn."""
    digits = load_digits()
    pixels, labels = digits.images[:900].reshape(900, -1) / 16, digits.target[:900]
    fitted = LogisticRegression(C=0.05, max_iter=300).fit(pixels, labels)
    layer = nn.Linear(64, 10)
    layer.weight.data = torch.tensor(fitted.coef_, dtype=torch.float32)
    layer.bias.data = torch.tensor(fitted.intercept_, dtype=torch.float32)
    return nn.Sequential(nn.Flatten(), layer)


@pytest.mark.usefixtures("_quick")
@pytest.mark.parametrize(
    ("norm", "eps", "asked"),
    [("linf", "16/255", "reference"), ("l2", "0.4", "guardbench"), ("l1", "1.5", "guardbench")],
)
def test_a_record_says_that_pyautoattack_ran(norm, eps, asked, tmp_path, monkeypatch):
    """`guardbench evaluate` from the words to the file; each image's own distance bounds the verdict."""
    monkeypatch.chdir(tmp_path)
    text = (Path(guardbench.__file__).parent / "protocols" / "digits.toml").read_text()
    head, column = text.partition("[[attacks]]")[0], text.rpartition("[[attacks]]")[2]
    square = '[[attacks]]\nname = "square"\nkind = "square"\nparams = { queries = 50 }\n\n'
    text = f"{head}{square}[[attacks]]{column}"
    for old, new in {
        'id = "digits"': 'id = "quick"',
        'norm = "linf"\neps = "16/255"': f'norm = "{norm}"\neps = "{eps}"',
        "count = 300": "count = 10",
        'sha256 = "': '# sha256 = "',
        "images_per_seed = 100\n": "",
        "seeds = [0, 1, 2]": "seeds = [0]",
    }.items():
        assert old in text, old
        text = text.replace(old, new)
    (tmp_path / "quick.toml").write_text(text)
    words = ["evaluate", "--protocol", "quick.toml", "--python", f"{__name__}:linear_digits"]
    result = CliRunner().invoke(app, [*words, "--name", "lr", "--engine", asked])
    assert result.exit_code == 0, result.output
    (path,) = (tmp_path / "guardbench-runs" / "classifiers").rglob("*.json")
    record = load_any_record(path)
    assert record.provenance.engines == {"square": "reference", "autoattack": "reference"}
    (seed,) = record.seeds
    # An image can only be broken where the nearest boundary, [0, 1] or not, lies in the ball.
    protocol, model = load_protocol("quick.toml"), linear_digits()
    test = load_split(
        "digits", "val", resolution=8, data_dir=None, cache_dir=None, progress=Progress()
    )
    order = protocol.test_indices(test.ids)
    with torch.no_grad():
        y, logits, weight = test.labels[order], model(test.batch(order)), model[1].weight
    apart = weight[y][:, None] - weight[None]
    dual = {"linf": 1, "l2": 2, "l1": torch.inf}[norm]
    gaps = (logits.gather(1, y[:, None]) - logits) / torch.linalg.vector_norm(apart, dual, dim=2)
    distance = gaps.scatter(1, y[:, None], torch.inf).amin(1)
    assert seed.clean.flags() == (distance > 0).tolist()
    found = torch.tensor(seed.attacks["autoattack"].flags())
    far = distance > float(protocol.threat.model.eps)
    assert found[far].all()
    assert far.sum() <= found.sum() < seed.clean.correct
    assert seed.attacks["square"].correct >= found.sum()


@pytest.mark.usefixtures("_quick")
@pytest.mark.parametrize("count", [0, 1, 2])
@pytest.mark.parametrize("threat", [LINF, L2, L1], ids=str)
def test_few_images(count, threat):
    model = network()
    x, y = images(model, 2, size=8)
    engine = "reference"
    for attack in (
        AutoAttack(threat=threat, engine=engine),
        Square(threat=threat, queries=10, engine=engine),
    ):
        outcome = run_verified(attack, model, x[:count], y[:count], seed=0)
        assert outcome.robust.shape == (count,)


@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_sizes_that_square_cannot_tile_are_told_apart_exactly(norm):
    threat = ThreatModel(norm, Fraction(1, 2))
    refused, crashed = [], []
    for size in (4, 5, 8, 12, 13, 14, 18, 20, 24, 28, 32):
        model = linear(2, size)
        x, y = images(model, 2, size)
        try:
            Square(threat=threat, queries=2).perturb(model, x, y, seed=0)
        except GuardbenchError:
            refused.append(size)
        engine = pyautoattack.AutoAttack(
            model, norm=norm.upper(), eps=0.5, seed=0, version="custom", attacks=["square"]
        )
        engine.square.n_queries = 2
        try:
            engine.run_standard_evaluation(x, y)
        except (RuntimeError, ZeroDivisionError):
            crashed.append(size)
    with pytest.raises(GuardbenchError, match="cannot tile 14 x 14"):
        AutoAttack(threat=threat).perturb(linear(4, 14), *images(linear(4, 14), 2, 14), seed=0)
    assert refused == crashed == [4, 12, 14, 18, 24]
