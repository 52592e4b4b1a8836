"""`guardbench evaluate` as a user types it, on a classifier that no part of guardbench has made."""

import re
import subprocess
from pathlib import Path

import pytest
import torch
from command import guardbench

from guardbench.errors import GuardbenchError
from guardbench.protocol import _folder
from guardbench.record_files import load_any_record, load_record
from guardbench.records import ClassifierRecord

LINEAR = """
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

def network(scale=1.0):
    digits = load_digits()
    pixels = digits.images[:900].reshape(900, -1) / 16
    fitted = LogisticRegression(C=0.05, max_iter=300).fit(pixels, digits.target[:900])
    layer = torch.nn.Linear(64, 10)
    layer.weight.data = scale * torch.tensor(fitted.coef_, dtype=torch.float32)
    layer.bias.data = scale * torch.tensor(fitted.intercept_, dtype=torch.float32)
    return torch.nn.Sequential(torch.nn.Flatten(), layer)
"""


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """A linear classifier of scikit-learn under a protocol of four short attacks."""
    folder = tmp_path_factory.mktemp("evaluate")
    text = (_folder() / "digits.toml").read_text()
    for old, new in {
        'id = "digits"': 'id = "quick"',
        "images_per_seed = 100": "images_per_seed = 30",
        "queries = 5000": "queries = 100",
        "count = 300": "count = 90",
        'rank_by = "autoattack"': 'rank_by = "pgd100"',
        'sha256 = "': '# sha256 = "',
    }.items():
        assert old in text, old
        text = text.replace(old, new)
    targeted = '[[attacks]]\nname = "apgd-t"\nkind = "apgd"\nparams = { loss = "dlr-targeted" }\n'
    head, _, _ = text.partition('[[attacks]]\nname = "autoattack"')
    (folder / "quick.toml").write_text(head + targeted)
    (folder / "linear.py").write_text(LINEAR)
    return folder, evaluate(folder)


def evaluate(folder: Path, *more: str) -> subprocess.CompletedProcess[str]:
    words = "evaluate", "--protocol", "quick.toml", "--python", "linear:network", "--name", "lr"
    return guardbench(*words, *more, cwd=folder)


def the_record(folder: Path) -> ClassifierRecord:
    record = load_any_record(folder / "guardbench-runs" / "classifiers" / "quick" / "lr-seed0.json")
    assert isinstance(record, ClassifierRecord)
    return record


def test_the_table_and_the_record_say_the_same(evaluated) -> None:
    folder, result = evaluated
    assert result.returncode == 0, result.stderr
    record = the_record(folder)
    (seed,) = record.seeds
    assert record.classifier.arch == "linear:network"
    assert record.classifier.parameters == 650
    assert record.provenance.engines == {"square": "guardbench", "apgd-t": "guardbench"}
    assert record.flags == ()
    assert 75 < seed.clean.correct <= 90
    shown = re.search(r"^clean +90 x 1 +([\d.]+)", result.stdout, re.MULTILINE)
    assert shown is not None
    assert float(shown[1]) == round(100 * seed.clean.correct / 90, 1)
    assert guardbench("show", str(next(folder.rglob("lr-seed0.json"))), cwd=folder).returncode == 0


def test_apgd_on_all_targets_reaches_the_exact_robust_accuracy(evaluated, monkeypatch) -> None:
    """Of a linear model it is known: for each other class, the worst corner of the box in [0, 1]."""
    from fractions import Fraction

    from guardbench.data.dataset import load_split
    from guardbench.progress import Progress
    from guardbench.protocol import load_protocol

    folder, _ = evaluated
    protocol = load_protocol(str(folder / "quick.toml"))
    test = load_split(
        "digits", "val", resolution=8, data_dir=None, cache_dir=None, progress=Progress()
    )
    order = protocol.test_indices(test.ids)
    x, y = test.batch(order).double(), test.labels[order]
    monkeypatch.syspath_prepend(str(folder))
    import linear

    layer = linear.network()[1].double()
    eps = float(Fraction(protocol.threat.model.eps))
    robust = []
    for image, label in zip(x.flatten(1), y, strict=True):
        away = layer.weight - layer.weight[label]
        worst = torch.where(away > 0, image + eps, image - eps).clamp(0, 1)
        gaps = (away * worst).sum(1) + layer.bias - layer.bias[label]
        gaps[label] = -torch.inf
        robust.append(bool(gaps.max() < 0))
    attacks = the_record(folder).seeds[0].attacks
    assert attacks["apgd-t"].flags() == robust
    assert 10 < sum(robust) < 80
    # PGD climbs one loss over all classes, so it may miss; it never finds what is not there.
    assert all(f or not r for r, f in zip(robust, attacks["pgd100"].flags(), strict=True))


def test_what_is_finished_is_not_attacked_again_until_the_model_changes(evaluated) -> None:
    folder, first = evaluated
    assert "pgd100 0: 90/90 images" in first.stdout
    again = evaluate(folder)
    assert "pgd100 0:" not in again.stdout
    # A defence that answers every image of whole 255ths as before: only its text tells it apart.
    quantised = LINEAR.replace("torch.nn.Flatten(), layer", "Steps(), torch.nn.Flatten(), layer")
    (folder / "linear.py").write_text(
        quantised + "\nclass Steps(torch.nn.Module):\n"
        "    def forward(self, x): return x + ((16 * x).round() / 16 - x).detach()\n"
    )
    assert "pgd100 0: 90/90 images" in evaluate(folder).stdout
    (folder / "linear.py").write_text(LINEAR)
    assert "pgd100 0:" not in evaluate(folder).stdout


def test_another_students_images_are_taken_on_request(evaluated) -> None:
    """As an assessment of a row's second student needs them; the columns on all images are the same."""
    folder, _ = evaluated
    result = evaluate(folder, "--student", "1")
    assert result.returncode == 0, result.stderr
    record = load_any_record(folder / "guardbench-runs/classifiers/quick/lr-seed0-student1.json")
    (run,), (first,) = record.seeds, the_record(folder).seeds
    assert (run.attacks["square"].first, run.attacks["square"].total) == (30, 30)
    assert first.attacks["square"].first == 0
    assert run.attacks["pgd100"] == first.attacks["pgd100"]
    result = evaluate(folder, "--student", "3")
    assert result.returncode == 2
    assert "--student 3: protocol quick has 3, counted from 0." in result.stderr


def test_the_dev_tier_measures_a_share_of_each_class_and_says_so(evaluated) -> None:
    folder, _ = evaluated
    result = evaluate(folder, "--tier", "dev", "--images", "50")
    assert result.returncode == 0, result.stderr
    assert "dev, unofficial: 50 of 90 test images, an equal share a class" in result.stdout
    assert re.search(r"^tier +dev, unofficial", result.stdout, re.MULTILINE)
    assert re.search(r"^square +50 x 1", result.stdout, re.MULTILINE)
    # Nothing official is taken over, and a network of one layer has nothing to do in bf16.
    assert "pgd100 0: 50/50 images" in result.stdout
    path = folder / "guardbench-runs" / "classifiers" / "quick" / "lr-seed0-dev.json"
    record = load_any_record(path)
    assert (record.tier, record.test.total) == ("dev", 50)
    assert record.provenance.precision["search"] == "fp32"
    official = the_record(folder)
    assert official.tier == "official"
    assert "search" not in official.provenance.precision
    assert record.protocol_sha256 == official.protocol_sha256
    assert record.test.list_sha256 != official.test.list_sha256
    assert guardbench("compare", str(path), str(path), cwd=folder).returncode == 0
    # On the images of both tiers, a float32 search of a linear model finds the same.
    from guardbench.data.dataset import load_split
    from guardbench.evaluation import measured_indices
    from guardbench.progress import Progress
    from guardbench.protocol import load_protocol

    test = load_split(
        "digits", "val", resolution=8, data_dir=None, cache_dir=None, progress=Progress()
    )
    protocol = load_protocol(str(folder / "quick.toml"))
    order, part = (measured_indices(protocol, test, sample) for sample in (None, 50))
    assert test.labels[part].bincount().tolist() == [5] * 10
    places = [order.index(i) for i in part]
    assert places == sorted(places)
    for name in ("pgd100", "apgd-t", "fgsm"):
        whole = official.seeds[0].attacks[name].flags()
        assert record.seeds[0].attacks[name].flags() == [whole[place] for place in places], name


def test_a_wrong_order_of_classes_is_flagged(evaluated) -> None:
    folder, _ = evaluated
    (folder / "shifted.py").write_text(
        LINEAR.replace("torch.nn.Sequential(torch.nn.Flatten(), layer)",
        "torch.nn.Sequential(torch.nn.Flatten(), layer, Shift())")
        + "\nclass Shift(torch.nn.Module):\n    def forward(self, z): return z.roll(1, 1)\n"
    )  # fmt: skip
    words = "evaluate", "--protocol", "quick.toml", "--python", "shifted:network", "--name", "s"
    result = guardbench(*words, cwd=folder)
    assert result.returncode == 0, result.stderr
    assert "is near chance: the normalisation or the order of the" in result.stdout


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("--protocol", "digits"), "say which classifier"),
        (("--protocol", "digitz", "--python", "linear:network"), "Did you mean digits"),
        (("--protocol", "digits", "--weights", "w.pt"), "say its --arch"),
        (("--protocol", "digits", "--weights", "w.pt", "--arch", "resnet18"), "no such file"),
        (("--protocol", "digits", "--python", "linear:network", "--arch", "x"), "has its own"),
        (("--protocol", "digits", "--python", "linear:nothing"), "AttributeError"),
        (
            ("--protocol", "digits", "--python", "wide:network"),
            r"logits \[1, 10\] for 1 images of 10 classes, not \[1, 1, 8, 8\]",
        ),
        (("--protocol", "digits", "--python", "few:network"), r"of 10 classes, not \[1, 3\]"),
        (("--protocol", "digits", "--python", "moves:network"), "leaf Variable that requires grad"),
        (("--protocol", "digits", "--python", "big:network"), "cannot answer images"),
        (("--protocol", "digits", "--python", "nan:network"), "answers NaN"),
        (
            ("--protocol", "digits", "--python", "linear:network", "--images", "50"),
            "say --tier dev",
        ),
        (
            (
                "--protocol",
                "digits",
                "--python",
                "linear:network",
                "--tier",
                "dev",
                "--images",
                "7",
            ),
            "--images 7: must be a multiple of the 10 classes",
        ),
    ],
)
def test_bad_input_is_one_line_and_exit_2(evaluated, words, line) -> None:
    folder, _ = evaluated
    head = "import torch\nclass network(torch.nn.Module):\n    def forward(self, x): "
    (folder / "wide.py").write_text(head + "return x\n")
    (folder / "few.py").write_text(head + "return x.flatten(1)[:, :3]\n")
    (folder / "moves.py").write_text(head + "return x.sub_(0.5).flatten(1)[:, :10]\n")
    (folder / "nan.py").write_text(head + "return x.flatten(1)[:, :10] / 0 * 0\n")
    (folder / "big.py").write_text(
        "import torch\ndef network(): return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(9, 9))"
    )
    result = guardbench("evaluate", *words, cwd=folder)
    assert result.returncode == 2, result.stdout + result.stderr
    assert re.search(line, result.stderr)
    assert result.stderr.count("\n") == 1
    assert "Traceback" not in result.stdout + result.stderr


@pytest.fixture(scope="module")
def noisy(evaluated):
    """The same classifier with noise on its answers, evaluated beside it."""
    folder, _ = evaluated
    (folder / "noisy.py").write_text(
        LINEAR.replace("torch.nn.Flatten(), layer", "torch.nn.Flatten(), layer, Noise()")
        + "\nclass Noise(torch.nn.Module):\n    def forward(self, z): return z + torch.randn_like(z)\n"
    )
    words = "evaluate", "--protocol", "quick.toml", "--python", "noisy:network", "--name", "noisy"
    return guardbench(*words, cwd=folder)


def test_a_random_model_is_flagged_and_scored_all_the_same(evaluated, noisy) -> None:
    """An image then counts as broken when either of two scorings is wrong."""
    folder, _ = evaluated
    assert noisy.returncode == 0, noisy.stderr
    assert "flag: random-answers: two answers to the same images differ" in noisy.stdout
    record = load_any_record(next(folder.rglob("noisy-seed0.json")))
    assert record.seeds[0].checks["random-answers"].flagged
    assert any(flag.startswith("random-answers") for flag in record.flags)


@pytest.mark.usefixtures("noisy")
def test_two_classifiers_are_compared(evaluated) -> None:
    folder, _ = evaluated
    (ours,), (other,) = (list(folder.rglob(f"{name}-seed0.json")) for name in ("lr", "noisy"))
    result = guardbench("compare", str(ours), str(other), cwd=folder)
    assert result.returncode == 0, result.stderr
    assert re.search(r"lr \(lr\), linear:network, weights [0-9a-f]{12}", result.stdout)
    assert "noisy (noisy), noisy:network, weights" in result.stdout
    assert "A higher" in result.stdout


@pytest.mark.usefixtures("noisy")
def test_another_classifier_of_the_same_name_is_not_overwritten(evaluated) -> None:
    folder, _ = evaluated
    words = "evaluate", "--protocol", "quick.toml", "--name", "lr"
    result = guardbench(*words, "--python", "noisy:network", cwd=folder)
    assert result.returncode == 2
    assert "holds another classifier of that name (linear:network); say --name" in result.stderr


def test_a_protocol_that_changed_under_its_name_does_not_replace_a_record(evaluated) -> None:
    folder, _ = evaluated
    before = (folder / "quick.toml").read_text()
    changed = before.replace("count = 90", "count = 120")
    assert changed != before
    (folder / "changed").mkdir()
    (folder / "changed" / "quick.toml").write_text(changed)
    words = "evaluate", "--protocol", "changed/quick.toml", "--python", "linear:network"
    result = guardbench(*words, "--name", "lr", cwd=folder)
    assert result.returncode == 2
    assert "was measured under another protocol of the name quick; say --name" in result.stderr
    assert result.stderr.count("\n") == 1


def test_the_record_of_a_classifier_has_no_place_on_a_board(evaluated) -> None:
    folder, _ = evaluated
    with pytest.raises(GuardbenchError, match="record of a classifier"):
        load_record(next(folder.rglob("lr-seed0.json")))
