"""RobustBench through its adapter: importable, exact on a linear model, hostile files refused."""

from __future__ import annotations

import importlib.util
import json
import sys
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyautoattack
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import guardbench
from guardbench.attacks.robustbench import benchmark, corruptions, robustbench, zoo_model
from guardbench.classifiers import Source, from_zoo, open_classifier
from guardbench.cli import app
from guardbench.data.dataset import RealDataset, load_split
from guardbench.errors import GuardbenchError
from guardbench.progress import Progress
from guardbench.protocol import load_protocol
from guardbench.record_files import save_record
from guardbench.records import (
    Classifier,
    ClassifierRecord,
    Outcome,
    Provenance,
    SeedRun,
    TestSet,
)
from guardbench.threat import ThreatModel

pytestmark = pytest.mark.usefixtures("one_thread")


def test_it_imports_without_leaving_its_stand_ins_behind():
    package = robustbench()
    assert callable(package.eval.benchmark)
    for name in ("autoattack", "pkg_resources"):
        assert name not in sys.modules or importlib.util.find_spec(name) is not None


def linear() -> nn.Module:
    layer = nn.Linear(12, 10)
    generator = torch.Generator().manual_seed(0)
    layer.weight.data = 20 * torch.randn(10, 12, generator=generator)
    layer.bias.data = -0.5 * layer.weight.data.sum(1)
    return nn.Sequential(nn.Flatten(), layer).eval()


def test_its_benchmark_gives_the_exact_robust_accuracy_of_a_linear_model():
    model = linear()
    x = 0.3 + 0.4 * torch.rand(40, 3, 2, 2, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        y = model(x).argmax(1)
        y[::8] = (y[::8] + 1) % 10
        logits = model(x)
    weight = model[1].weight.detach()
    gaps = logits.gather(1, y[:, None]) - logits
    reach = (weight[y][:, None] - weight[None]).abs().sum(2)
    distance = torch.where(reach > 0, gaps / reach, torch.inf).amin(1)
    eps = Fraction(float(distance[distance > 0].median()) * 1.001).limit_denominator(10**6)
    clean, robust = benchmark(model, x, y, ThreatModel("linf", eps), batch_size=16)
    assert clean == pytest.approx(35 / 40)
    assert robust == pytest.approx(float((distance > float(eps)).float().mean()))
    assert 0.3 < robust < 0.6
    original = robustbench().eval.load_clean_dataset
    assert original.__module__ == "robustbench.data", "its own loader is back"
    with pytest.raises(GuardbenchError, match="measures linf and l2, not l1"):
        benchmark(model, x, y, ThreatModel("l1", Fraction(1)))
    with torch.no_grad():
        model[1].weight.fill_(torch.nan)  # whose argmax is 0
    with pytest.raises(GuardbenchError, match="NaN"):
        benchmark(model, x, torch.zeros_like(y), ThreatModel("linf", eps))


def test_more_images_than_memory_holds_are_refused(monkeypatch):
    """robustbench takes them all at once; ImageNet's validation set is 30 GB."""
    free = SimpleNamespace(available=100_000)  # 256 B an image, three times
    monkeypatch.setattr("psutil.virtual_memory", lambda: free)
    words = ["robustbench", "benchmark", "--protocol", "digits", "--python", f"{__name__}:small"]
    result = CliRunner().invoke(app, words)
    assert isinstance(result.exception, GuardbenchError)
    assert "all 300 images at once" in str(result.exception)
    assert "--images 130" in str(result.exception)


def small() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).eval()


def digits() -> RealDataset:
    words = {"data_dir": None, "cache_dir": None, "progress": Progress()}
    return load_split("digits", "val", resolution=8, **words)


def nearest_mean() -> nn.Module:
    """Each digit's mean image as its weights: linear, mostly right, and robust on some images."""
    test = digits()
    x, y = test.batch(range(len(test))).flatten(1), test.labels
    means = torch.stack([x[y == digit].mean(0) for digit in range(10)])
    layer = nn.Linear(64, 10)
    layer.weight.data, layer.bias.data = means, -0.5 * means.square().sum(1)
    return nn.Sequential(nn.Flatten(), layer).eval()


def test_the_verb_prints_the_exact_accuracies_of_a_linear_model(monkeypatch):
    run, count = pyautoattack.AutoAttack.run_standard_evaluation, 12

    def short(self, *arguments, **options):  # which is exact on a linear model
        self.square.n_queries = 20
        for part in (self.apgd, self.apgd_targeted, self.fab):
            part.n_iter = part.n_iter_orig = 20
        return run(self, *arguments, **options)

    monkeypatch.setattr(pyautoattack.AutoAttack, "run_standard_evaluation", short)
    protocol, test, model = load_protocol("digits"), digits(), nearest_mean()
    order, eps = protocol.test_indices(test.ids)[:count], float(protocol.threat.model.eps)
    x, y = test.batch(order).flatten(1), test.labels[order]
    with torch.no_grad():
        logits = model(x)
        gaps = logits.gather(1, y[:, None]) - logits
        apart = model[1].weight - model[1].weight[y][:, None]  # [N, K, 64]
        # Each pixel goes as far towards the other class as the ball and [0, 1] let it.
        up, down = (1 - x).clamp(max=eps)[:, None], x.clamp(max=eps)[:, None]
        left = gaps - torch.where(apart > 0, apart * up, -apart * down).sum(2)
    own = nn.functional.one_hot(y, 10).bool()
    assert left[~own].abs().min() > 1e-3, "no image is a matter of rounding"
    clean, robust = (int((values > 0).logical_or(own).all(1).sum()) for values in (gaps, left))
    assert 2 < robust < clean
    words = ["robustbench", "benchmark", "--protocol", "digits", "--images", str(count)]
    result = CliRunner().invoke(app, [*words, "--python", f"{__name__}:nearest_mean"])
    assert result.exit_code == 0, result.output
    shown = f"clean {100 * clean / count:.2f}%, AutoAttack {100 * robust / count:.2f}%"
    assert f"12 images, linf 16/255: {shown}" in " ".join(result.stdout.split())


def test_a_model_of_the_zoo_comes_with_the_weights_in_the_cache(tmp_path, capsys):
    package = robustbench()
    made = package.utils.all_models[package.model_zoo.enums.BenchmarkDataset("cifar10")][
        package.model_zoo.enums.ThreatModel("Linf")
    ]["Addepalli2022Efficient_RN18"]["model"]()
    path = tmp_path / "robustbench" / "cifar10" / "Linf" / "Addepalli2022Efficient_RN18.pt"
    path.parent.mkdir(parents=True)
    torch.save({"state_dict": {f"module.{k}": v for k, v in made.state_dict().items()}}, path)
    source = Source(
        weights=None, arch="robustbench:Addepalli2022Efficient_RN18", python=None,
        normalisation=None,
    )  # fmt: skip
    protocol = load_protocol("cifar10-8")
    found = open_classifier(source, protocol, torch.device("cpu"), tmp_path)
    x = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(found.model(x), made.eval()(x))
    assert found.described.name == "addepalli2022efficient_rn18"
    assert found.described.weights_sha256 is not None

    class Hostile:
        def __reduce__(self):
            return print, ("code ran",)

    torch.save({"state_dict": Hostile()}, path)
    with pytest.raises(GuardbenchError, match="its weights could not be had") as error:
        open_classifier(source, protocol, torch.device("cpu"), tmp_path)
    assert str(path) in str(error.value)
    assert "code ran" not in capsys.readouterr().out


def test_what_the_zoo_lacks_is_one_line(tmp_path):
    with pytest.raises(GuardbenchError, match="Did you mean Wong2020Fast"):
        zoo_model("Wong2020Fats", "cifar10", "linf", tmp_path)
    with pytest.raises(GuardbenchError, match="not for imagenette in linf"):
        zoo_model("Wong2020Fast", "imagenette", "linf", tmp_path)
    # Of these data sets it has models in l-inf alone.
    with pytest.raises(GuardbenchError, match="not for cifar100 in l2"):
        zoo_model("Rice2020Overfitting", "cifar100", "l2", tmp_path)


def test_on_imagenet_a_model_of_the_zoo_says_that_the_table_has_other_images(tmp_path, monkeypatch):
    """RobustBench resizes to 256 before its crop, or takes 288 px: its numbers come from other pixels."""
    made = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 1000))
    monkeypatch.setattr("guardbench.classifiers.zoo_model", lambda *_: (made, tmp_path / "none"))
    words = {"dataset": "imagenet", "norm": "linf", "folder": tmp_path, "name": "mine"}
    said = {
        name: from_zoo(name, **words).described.normalisation
        for name in ("Wong2020Fast", "Salman2020Do_R18", "Debenedetti2022Light_XCiT-S12")
    }
    assert [text.rsplit(" has ")[1] for text in said.values()] == [
        "Crop288", "Res256Crop224", "timm's preprocessing",
    ]  # fmt: skip
    on_cifar = from_zoo("Wong2020Fast", **{**words, "dataset": "cifar10"})
    assert on_cifar.described.normalisation == "the model's own"
    asked = ["robustbench", "benchmark", "--protocol", "imagenet", "--data-dir", str(tmp_path)]
    result = CliRunner().invoke(app, [*asked, "--arch", "robustbench:Salman2020Do_R18"])
    assert isinstance(result.exception, GuardbenchError), "there are no images"
    assert "where RobustBench's table has Res256Crop224" in " ".join(result.output.split())


@pytest.fixture
def corrupted(tmp_path):
    """CIFAR-10-C in small: 4 images of 2 x 2 a severity, darker with each."""
    names = robustbench().data.CORRUPTIONS
    labels = np.tile(np.array([1, 1, 0, 1]), 5)
    for place, name in enumerate(names):
        level = np.repeat([250, 200, 150, 100, 50 + 10 * place], 4).astype(np.uint8)
        images = np.broadcast_to(level[:, None, None, None], (20, 2, 2, 3))
        np.save(tmp_path / f"{name}.npy", images)
    np.save(tmp_path / "labels.npy", labels)
    return tmp_path, names


class Bright(nn.Module):
    """Class 1 if the mean pixel is above one half."""

    def forward(self, x):
        level = x.flatten(1).mean(1) - 0.5
        return torch.stack([-level, level], 1)


def test_corruptions_are_told_by_file_and_severity(corrupted):
    folder, names = corrupted
    heard: list[str] = []
    found = corruptions(Bright().eval(), folder, resolution=2, classes=2, told=heard.append)
    assert heard == list(names) == list(found)
    for place, name in enumerate(names):
        last = 0.75 if 50 + 10 * place > 127.5 else 0.25
        assert found[name] == (0.75, 0.75, 0.75, 0.25, last)
    first = corruptions(Bright().eval(), folder, resolution=2, classes=2, count=2)
    assert first[names[0]] == (1, 1, 1, 0, 0)


def bright() -> nn.Module:
    """Class 1 of ten if the mean pixel is above one half, else class 0."""
    layer = nn.Linear(1, 10)
    layer.weight.data, layer.bias.data = torch.zeros(10, 1), torch.full((10,), -9.0)
    layer.weight.data[1], layer.bias.data[:2] = 1.0, torch.tensor([0.5, 0.0])
    return nn.Sequential(nn.Flatten(), nn.AdaptiveAvgPool1d(1), layer).eval()


def test_the_verb_prints_every_corruption_and_the_mean(tmp_path):
    labels = np.tile(np.array([1, 1, 0, 9]), 5)
    np.save(tmp_path / "labels.npy", labels)
    for name in robustbench().data.CORRUPTIONS:
        dark = 100 if name == "fog" else 200
        level = np.repeat([200, 200, 200, 200, dark], 4).astype(np.uint8)
        images = np.broadcast_to(level[:, None, None, None], (20, 32, 32, 3))
        np.save(tmp_path / f"{name}.npy", images)
    words = ["robustbench", "corruptions", "--protocol", "cifar10-8", "--folder", str(tmp_path)]
    result = CliRunner().invoke(app, [*words, "--python", f"{__name__}:bright"])
    assert result.exit_code == 0, result.output
    # Half of the images are of class 1; in the fog's worst severity a quarter is right, of class 0.
    assert f"mean {100 * (74 * 0.5 + 0.25) / 75:.2f}%" in result.stdout
    (row,) = (line for line in result.stdout.splitlines() if "fog" in line)
    assert [word for word in row.replace("│", " ").split() if word[0].isdigit()] == [
        "50.0", "50.0", "50.0", "50.0", "25.0", "45.0",
    ]  # fmt: skip
    few = CliRunner().invoke(app, [*words, "--python", f"{__name__}:bright", "--images", "2"])
    assert f"mean {100 * 74 / 75:.2f}%" in few.stdout
    other = [*words[:3], "digits", *words[4:], "--python", f"{__name__}:bright"]
    assert "the corruption files are of CIFAR" in str(CliRunner().invoke(app, other).exception)


@pytest.mark.parametrize(
    ("spoil", "line"),
    [
        (lambda f: (f / "snow.npy").unlink(), "snow.npy: cannot be read"),
        (lambda f: np.save(f / "snow.npy", np.zeros((20, 2, 2), np.uint8)), "with 4 axes"),
        (
            lambda f: np.save(f / "fog.npy", np.zeros((15, 2, 2, 3), np.uint8)),
            r"expected \[20, 2, 2, 3\]",
        ),
        (lambda f: np.save(f / "fog.npy", np.zeros((20, 4, 4, 3), np.uint8)), r"expected \[20, 2"),
        (lambda f: (f / "snow.npy").write_bytes(b""), "snow.npy: cannot be read"),
        (lambda f: (f / "snow.npy").write_bytes(b"PK\x03\x04"), "snow.npy: cannot be read"),
        (lambda f: [np.save(p, np.load(p)[:0]) for p in f.glob("*.npy")], "expected"),
        (lambda f: np.save(f / "labels.npy", np.array([print] * 20)), "cannot be read"),
        (lambda f: np.save(f / "labels.npy", np.full(20, 9)), "labels to 9; .* has 2 classes"),
    ],
)
def test_a_folder_that_is_no_cifar10c_is_one_line(corrupted, spoil, line):
    spoil(corrupted[0])
    with pytest.raises(GuardbenchError, match=line):
        corruptions(Bright().eval(), corrupted[0], resolution=2, classes=2)


def record(**more) -> ClassifierRecord:
    protocol = load_protocol("digits")
    robust = Outcome.from_flags([True] * 30 + [False] * 70, first=0)
    clean = Outcome.from_flags([True] * 80 + [False] * 20 + [True] * 200)
    words = {
        "protocol": "digits", "protocol_sha256": protocol.digest, "dataset": "digits",
        "resolution": 8, "cost": (), "seeds": (
            SeedRun(seed=0, clean=clean, attacks={"autoattack": robust}),
        ),
        "test": TestSet(data_sha256="0" * 64, list_sha256="0" * 64, total=300),
        "tier": "official",
        "provenance": Provenance(
            guardbench="0", commit=None, versions={}, python="3", platform="x", device="cpu",
            precision={}, threads=1, engines={},
        ),
        "classifier": Classifier(
            name="mine", arch="resnet18", weights_sha256=None, weights="x", normalisation="x",
            parameters=1,
        ),
    }  # fmt: skip
    return ClassifierRecord(**{**words, **more})


def test_a_dev_record_does_not_become_model_info(tmp_path):
    save_record(tmp_path / "mine.json", record(tier="dev"))
    result = CliRunner().invoke(app, ["robustbench", "export", str(tmp_path / "mine.json")])
    assert "of the dev tier; evaluate it without --tier" in str(result.exception)


def test_a_record_becomes_model_info(tmp_path):
    save_record(tmp_path / "mine.json", record())
    words = ["robustbench", "export", str(tmp_path / "mine.json"), "--paper", "Ours"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    # Clean accuracy on the hundred images that AutoAttack saw, 80 of them right.
    # What is not known stays as an empty field, which RobustBench's readers ask for.
    assert found == {
        "name": "Ours", "dataset": "digits", "architecture": "resnet18", "eps": "16/255",
        "clean_acc": "80.00", "autoattack_acc": "30.00", "number_forward_passes": 1,
        "footnote": "On 100 of 445 test images.", "authors": "", "link": "", "venue": "",
        "reported": "", "additional_data": None,
    }  # fmt: skip
    made = record().provenance.model_copy(update={"engines": {"autoattack": "guardbench"}})
    doubted = record(provenance=made, flags=("zero-gradients: no gradient (90% of 64 images)",))
    save_record(tmp_path / "doubted.json", doubted)
    result = CliRunner().invoke(app, ["robustbench", "export", str(tmp_path / "doubted.json")])
    assert json.loads(result.stdout)["footnote"] == (
        "On 100 of 445 test images. AutoAttack by guardbench's loops. "
        "Flagged: zero-gradients: no gradient (90% of 64 images)."
    )
    column = {"other": Outcome.from_flags([True] * 30 + [False] * 70)}
    clean = Outcome.from_flags([True] * 300)
    bare = SeedRun(seed=0, clean=clean, attacks=column)
    save_record(tmp_path / "bare.json", record(seeds=(bare,)))
    result = CliRunner().invoke(app, ["robustbench", "export", str(tmp_path / "bare.json")])
    assert isinstance(result.exception, GuardbenchError)
    save_record(tmp_path / "old.json", record(protocol_sha256="1" * 64))
    result = CliRunner().invoke(app, ["robustbench", "export", str(tmp_path / "old.json")])
    assert isinstance(result.exception, GuardbenchError)


@pytest.mark.parametrize(("norm", "eps"), [("linf", "3/255"), ("l2", "0.5")])
def test_robustbench_reads_what_is_exported(tmp_path, monkeypatch, capsys, norm, eps):
    """Its own list, bibliography and LaTeX table of `model_info/`, with and without what authors know."""
    text = (Path(guardbench.__file__).parent / "protocols" / "cifar10-8.toml").read_text()
    text = text.replace('norm = "linf"', f'norm = "{norm}"').replace(
        'eps = "8/255"', f'eps = "{eps}"'
    )
    (tmp_path / "mine.toml").write_text(text.replace('id = "cifar10-8"', 'id = "mine"'))
    made = load_protocol(str(tmp_path / "mine.toml"))
    column = next(spec.name for spec in made.attacks if spec.is_standard)
    robust = {column: Outcome.from_flags([True] * 30 + [False] * 70)}
    seed = SeedRun(seed=0, clean=Outcome.from_flags([True] * 80 + [False] * 20), attacks=robust)
    mine = record(
        protocol="mine",
        protocol_sha256=made.digest,
        dataset="cifar10",
        resolution=32,
        seeds=(seed,),
    )
    save_record(tmp_path / "mine.json", mine)
    norms = {"linf": "Linf", "l2": "L2"}
    folder = tmp_path / "model_info" / "cifar10" / norms[norm]
    folder.mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    words = ["robustbench", "export", "mine.json", "--protocol", "mine.toml"]
    more = ["--paper", "Ours", "--authors", "A, B", "--link", "https://x", "--venue", "ICML 2026"]
    utils = robustbench().utils
    for known, told in ((more, "*[Ours](https://x)*"), ([], "*[]()*")):
        result = CliRunner().invoke(app, [*words, *known, "--reported", "31.5"])
        assert result.exit_code == 0, result.output
        found = json.loads(result.stdout)
        assert (found["eps"], found["reported"]) == (eps, "31.50")
        # A name that the zoo has in either norm.
        (folder / "Rice2020Overfitting.json").write_text(result.stdout)
        capsys.readouterr()
        utils.list_available_models("cifar10", norms[norm])
        (row,) = (line for line in capsys.readouterr().out.splitlines() if "Rice2020" in line)
        for word in (told, "80.00%", "30.00%", "resnet18", "ICML 2026" if known else "Unpublished"):
            assert word in row
        entries, _ = utils.get_leaderboard_bibtex("cifar10", norms[norm])
        assert len(entries) == 1
        table = utils.get_leaderboard_latex("cifar10", norms[norm], sort_by="autoattack_acc")
        assert "& 80.00 & 30.00 & N & resnet18 &" in table
