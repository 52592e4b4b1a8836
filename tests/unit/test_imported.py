"""Strangers' weights: read without running code, fitted to the architecture, or refused in one line."""

import pickle
import sys

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn

from guardbench.classifiers import Source, open_classifier
from guardbench.errors import GuardbenchError
from guardbench.imported import NORMALISATIONS, from_file, from_python
from guardbench.models import build_model, save_weights
from guardbench.protocol import load_protocol

SIZE = {"channels": 3, "classes": 10, "resolution": 8}


@pytest.fixture
def trained():
    """A network whose weights no other has, and a few images."""
    model = build_model("convnet-d3", channels=3, classes=10, resolution=8, seed=3).eval()
    return model, torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def load(path, **more):
    words = {"arch": "convnet-d3", "normalisation": "imagenet", "name": "x", **SIZE, **more}
    return from_file(path, words.pop("arch"), **words)


def test_a_students_file_brings_its_own_normalisation(trained, tmp_path):
    model, x = trained
    save_weights(model, tmp_path / "student.safetensors")
    found = load(tmp_path / "student.safetensors", normalisation=None)
    torch.testing.assert_close(found.model(x), model(x), rtol=0, atol=0)
    assert found.described.weights == "as they are"
    assert found.described.normalisation.startswith("in the file: 0.485,")
    assert not found.model.training
    assert not any(w.requires_grad for w in found.model.parameters())
    with pytest.raises(GuardbenchError, match="holds its own"):
        load(tmp_path / "student.safetensors", normalisation="imagenet")


@pytest.mark.parametrize("prefix", ["", "module.", "module.model.", "_orig_mod.module."])
@pytest.mark.parametrize("kind", ["safetensors", "pth", "state_dict", "model"])
def test_prefixes_and_wrappers_come_off_and_are_told(trained, tmp_path, prefix, kind):
    model, x = trained
    state = {prefix + key: value for key, value in model.backbone.state_dict().items()}
    path = tmp_path / f"weights.{kind if kind == 'safetensors' else 'pth'}"
    wrap = kind if kind in ("state_dict", "model") else None
    if kind == "safetensors":
        save_file({k: v.contiguous() for k, v in state.items()}, path)
    else:
        torch.save({wrap: state, "epoch": 3, "best": 0.5} if wrap else state, path)
    found = load(path)
    torch.testing.assert_close(found.model(x), model(x), rtol=0, atol=0)
    for part in filter(None, [wrap, *prefix.split(".")]):
        assert part in found.described.weights


@pytest.mark.parametrize("text", [*NORMALISATIONS, "0.1,0.2,0.3/0.4,0.5,0.6", "0.1/0.2"])
def test_pixels_are_normalised_as_said(trained, tmp_path, text):
    model, x = trained
    torch.save(model.backbone.state_dict(), tmp_path / "w.pt")
    found = load(tmp_path / "w.pt", normalisation=text)
    mean, std = NORMALISATIONS.get(text) or [
        [float(v) for v in part.split(",")] for part in text.split("/")
    ]
    spread = [torch.tensor(values).expand(3).view(-1, 1, 1) for values in (mean, std)]
    torch.testing.assert_close(found.model(x), model.backbone((x - spread[0]) / spread[1]))


def test_what_training_scripts_save_beside_the_weights_is_passed_over(trained, tmp_path):
    model, x = trained
    best = {"best_acc1": torch.tensor(71.2), "state_dict": model.backbone.state_dict(), "epoch": 9}
    torch.save(best, tmp_path / "w.pt")
    torch.testing.assert_close(load(tmp_path / "w.pt").model(x), model(x), rtol=0, atol=0)


def test_an_average_of_weights_is_read_without_its_counter(trained, tmp_path):
    model, x = trained
    averaged = torch.optim.swa_utils.AveragedModel(model.backbone)
    averaged.update_parameters(model.backbone)
    torch.save(averaged.state_dict(), tmp_path / "w.pt")
    found = load(tmp_path / "w.pt")
    torch.testing.assert_close(found.model(x), model(x), rtol=0, atol=0)
    assert found.described.weights == "without 'n_averaged', without 'module.'"


@pytest.mark.parametrize(
    ("place", "names"),
    [("normalize.", ("mean", "std")), ("0.", ("mean", "std")), ("", ("mu", "sigma"))],
)
def test_a_normalising_layer_in_the_file_is_used(trained, tmp_path, place, names):
    model, x = trained
    mean, std = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.4, 0.5, 0.6])
    inner = "1." if place == "0." else "model."
    state = {inner + key: value for key, value in model.backbone.state_dict().items()}
    state |= {place + names[0]: mean.view(1, 3, 1, 1), place + names[1]: std.view(1, 3, 1, 1)}
    torch.save(state, tmp_path / "w.pt")
    found = load(tmp_path / "w.pt", normalisation=None)
    wanted = model.backbone((x - mean.view(-1, 1, 1)) / std.view(-1, 1, 1))
    torch.testing.assert_close(found.model(x), wanted)
    assert "0.1,0.2,0.3/0.4,0.5,0.6" in found.described.normalisation
    with pytest.raises(GuardbenchError, match="holds its own"):
        load(tmp_path / "w.pt", normalisation="imagenet")


def test_a_stock_network_of_torchvision(tmp_path):
    stock = torchvision.models.squeezenet1_1(num_classes=10).eval()
    torch.save(stock.state_dict(), tmp_path / "w.pt")
    found = load(tmp_path / "w.pt", arch="torchvision:squeezenet1_1", normalisation="none")
    x = torch.rand(1, 3, 64, 64)
    torch.testing.assert_close(found.model(x), stock(x))


class Evil:
    def __reduce__(self):
        return (print, ("the code in the pickle ran",))


def bad_files(model, folder):
    state = model.backbone.state_dict()
    torch.save(state, folder / "good.pt")
    first, *_ = state
    torch.save({**state, first: torch.zeros(2, 2)}, folder / "shape.pt")
    torch.save({k: v for k, v in state.items() if k != first}, folder / "missing.pt")
    torch.save({**state, "intruder": torch.zeros(1)}, folder / "extra.pt")
    torch.save({**state, first: torch.full_like(state[first], float("nan"))}, folder / "nan.pt")
    torch.save({"epoch": 3}, folder / "empty.pt")
    torch.save([1, 2], folder / "list.pt")
    (folder / "code.pt").write_bytes(pickle.dumps(Evil()))
    (folder / "text.pth").write_text("hello")
    (folder / "text.safetensors").write_text("<html>not found</html>")
    (folder / "cut.pt").write_bytes((folder / "good.pt").read_bytes()[:500])


@pytest.mark.parametrize(
    ("file", "words", "line"),
    [
        ("absent.pt", {}, "no such file"),
        ("good.pt", {"normalisation": None}, "holds no normalisation"),
        ("good.pt", {"normalisation": "imagenette"}, "Did you mean imagenet"),
        ("good.pt", {"normalisation": "1,2/3,4"}, "2 numbers for images of 3 channels"),
        ("good.pt", {"normalisation": "0,0,0/1,0,1"}, "out of range"),
        ("good.pt", {"normalisation": "a/b"}, "write numbers as"),
        ("good.pt", {"arch": "convnet-d2"}, "Did you mean convnet-d3"),
        ("good.pt", {"arch": "torchvision:resnet19"}, "unknown torchvision network"),
        (
            "good.pt",
            {"arch": "resnet18"},
            r"do not fit --arch resnet18: \d+ missing \(conv1.weight",
        ),
        ("shape.pt", {}, r"1 of another shape \(features.0.weight is \[2, 2\]"),
        ("missing.pt", {}, r"1 missing \(features.0.weight\)"),
        ("extra.pt", {}, r"1 unknown \(intruder\)"),
        ("nan.pt", {}, "features.0.weight holds NaN"),
        ("empty.pt", {}, "no tensors by name"),
        ("list.pt", {}, "no tensors by name"),
        ("code.pt", {}, "code in it is never run"),
        ("text.pth", {}, "torch.save did not write it whole"),
        ("text.safetensors", {}, "cannot be read"),
        ("cut.pt", {}, "cannot be read"),
    ],
)
def test_a_bad_file_is_one_line(trained, tmp_path, capsys, file, words, line):
    bad_files(trained[0], tmp_path)
    with pytest.raises(GuardbenchError, match=line) as caught:
        load(tmp_path / file, **words)
    assert "\n" not in str(caught.value)
    assert "ran" not in capsys.readouterr().out


def test_a_function_of_the_users_own(tmp_path, monkeypatch):
    (tmp_path / "mine_here.py").write_text(
        "import torch\n"
        "def network(): return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 10)).train()\n"
        "def plain(): return lambda images: images.flatten(1)[:, :10]\n"
        "def number(): return 3\n"
        "def leaves(): raise SystemExit(3)\n"
        "def broken():\n    raise KeyError('weights\\nlost')\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*sys.path])
    found = from_python("mine_here:network", name="mine")
    assert isinstance(found.model, nn.Module)
    assert not found.model.training
    assert found.described.parameters == 1930
    for spec, line in {
        "mine_here": "package.module:function",
        "mine_here:absent": "AttributeError",
        "no_such_module:f": "ModuleNotFoundError",
        "mine_here:number": "gave int, which is no torch.nn.Module",
        "mine_here:plain": "gave function, which is no torch.nn.Module",
        "mine_here:leaves": "SystemExit",
        "mine_here:broken": r"KeyError: .*\(mine_here.py, line 7\)",
    }.items():
        with pytest.raises(GuardbenchError, match=line) as caught:
            from_python(spec, name="x")
        assert "\n" not in str(caught.value)


def opened_here(module: str, folder, monkeypatch):
    """The classifier that `network` of a module in `folder` gives, opened for digits."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr("sys.path", [*sys.path])
    monkeypatch.delitem(sys.modules, module, raising=False)
    source = Source(weights=None, arch=None, python=f"{module}:network", normalisation=None)
    return open_classifier(source, load_protocol("digits"), torch.device("cpu"), folder)


@pytest.mark.parametrize(
    ("body", "line"),
    [
        ("return x.flatten(1)[:, :10].squeeze()", r"must answer logits \[1, 10\] for 1 images .* not \[10\]"),
        ("return x.flatten(1)[:, :10].squeeze(0)", r"must answer logits \[1, 10\]"),
        ("\n        if len(x) > 32: raise ValueError('at most 32')\n        return x.flatten(1)[:, :10]",
         r"cannot answer images \[64, 1, 8, 8\] .*: ValueError: at most 32"),
        ("\n        if len(x) == 1: raise IndexError('two at least')\n        return x.flatten(1)[:, :10]",
         r"cannot answer images \[1, 1, 8, 8\] .*: IndexError"),
        ("\n        with torch.no_grad(): x.mul_(9).round_().div_(9)\n        return x.flatten(1)[:, :10]",
         r"writes into the images that it is given; .*x = x.clone\(\)"),
        ("\n        if x.requires_grad: x.data.round_()\n        return x.flatten(1)[:, :10]",
         r"writes into the images"),
    ],
)  # fmt: skip
def test_a_function_that_cannot_take_any_number_of_images_is_told_first(
    tmp_path, monkeypatch, body: str, line: str
):
    (tmp_path / "picky_here.py").write_text(
        f"import torch\nclass network(torch.nn.Module):\n    def forward(self, x): {body}\n"
    )
    with pytest.raises(GuardbenchError, match=line) as caught:
        opened_here("picky_here", tmp_path, monkeypatch)
    assert "\n" not in str(caught.value)


def test_a_module_that_chooses_another_arithmetic_is_overruled(tmp_path, monkeypatch):
    (tmp_path / "fast_here.py").write_text(
        "import torch\ntorch.set_float32_matmul_precision('medium')\n"
        "torch.backends.cudnn.allow_tf32 = True\ntorch.backends.cudnn.benchmark = True\n"
        "def network(): return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10)).eval()\n"
    )
    opened_here("fast_here", tmp_path, monkeypatch)
    assert torch.get_float32_matmul_precision() == "highest"
    assert not torch.backends.cudnn.allow_tf32
    assert not torch.backends.cudnn.benchmark


def test_a_function_on_a_device_that_is_too_small_for_a_batch_is_taken(tmp_path, monkeypatch):
    (tmp_path / "small_here.py").write_text(
        "import torch\nclass network(torch.nn.Module):\n    def forward(self, x):\n"
        "        if len(x) > 9: raise torch.OutOfMemoryError('CUDA out of memory. Tried to')\n"
        "        return x.flatten(1)[:, :10]\n"
    )
    found = opened_here("small_here", tmp_path, monkeypatch)
    assert found.model(torch.zeros(9, 1, 8, 8)).shape == (9, 10)
