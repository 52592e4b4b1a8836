"""Security curves: exact on a linear model, never rising, refused when they contradict themselves."""

from __future__ import annotations

import copy
import json
import os
import shutil
import signal
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from typer.testing import CliRunner

from guardbench.attacks import warm
from guardbench.cli import app, main
from guardbench.curve import (
    above_chance,
    draw_curves,
    points_of,
    require_alike,
    rising_radii,
    security_curve,
)
from guardbench.curve_files import Curve, Point, load_curve, save_curve
from guardbench.errors import GuardbenchError
from guardbench.threat import ThreatModel

GOLDEN = Path(__file__).parents[1] / "golden"

pytestmark = pytest.mark.usefixtures("one_thread")


def linear_case(norm: str) -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    """Two linear classes, some images wrong, and every right one's exact distance to the boundary."""
    torch.manual_seed(0)
    layer = nn.Linear(12, 2)
    layer.bias.data = -0.5 * layer.weight.data.sum(1)
    model = nn.Sequential(nn.Flatten(), layer).eval()
    x = 0.45 + 0.1 * torch.rand(80, 3, 2, 2)
    with torch.no_grad():
        logits = model(x)
    y = logits.argmax(1)
    normal = (layer.weight[0] - layer.weight[1]).detach()
    dual = normal.abs().sum() if norm == "linf" else normal.norm()
    distance = (logits[:, 0] - logits[:, 1]).abs() / dual
    y[::9] = 1 - y[::9]
    distance[::9] = 0
    return model, x, y, distance


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_of_a_linear_model_every_image_breaks_at_its_own_radius(norm):
    model, x, y, distance = linear_case(norm)
    largest = float(distance.max())
    radii = [Fraction(share * largest).limit_denominator(10**6) for share in (0.1, 0.3, 0.6, 1.2)]
    clear = torch.tensor([[abs(float(d) / float(r) - 1) > 0.01 for r in radii] for d in distance])
    expected = torch.tensor(
        [0 if d == 0 else 1 + sum(float(d) > float(r) for r in radii) for d in distance]
    )
    heard: list[int] = []
    found = security_curve(
        model, x, y, norm, radii, batch_size=30, told=heard.append, skipped=heard.append
    )
    assert torch.equal(found[clear.all(1)], expected[clear.all(1)])
    assert clear.all(1).sum() > 70
    assert heard == [9, 30, 30, 11]
    points = points_of(found, radii)
    assert points[0] == Point(eps="0", correct=71)
    assert points[-1].correct == 0, "beyond the farthest image nothing is left"


def test_survivors_go_on_from_where_they_stood(monkeypatch):
    model, x, y, distance = linear_case("linf")
    far = float(distance.max())
    radii = [Fraction(share * far).limit_denominator(10**6) for share in (0.4, 0.7, 1.1)]
    starts: list[Tensor] = []
    kept = warm.search

    def listen(model, x, y, update, *, start, **more):
        first = torch.zeros(len(x), dtype=torch.int64)
        starts.append(start(x, y, first)["point"].clone())
        found = kept(model, x, y, update, start=start, **more)
        starts.append(found.clone())
        return found

    monkeypatch.setattr(warm, "search", listen)
    found = security_curve(model, x, y, "linf", radii, steps=3)
    begun, ended = starts[::2], starts[1::2]
    assert len(begun) == 3
    assert torch.equal(begun[0], x[found > 0])
    assert torch.equal(begun[1], ended[0][found[found > 0] > 1])
    assert torch.equal(begun[2], ended[1][found[found > 1] > 2])
    assert 0 < len(begun[2]) < len(begun[1]) < len(begun[0])


def test_a_verb_that_a_signal_stops_goes_on_from_there(tmp_path, monkeypatch, capsys):
    from guardbench import curve as module

    (tmp_path / "flat.py").write_text(
        "import torch\n"
        "def network():\n"
        "    torch.manual_seed(0)\n"
        "    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))\n"
    )
    monkeypatch.chdir(tmp_path)
    words = ["curve", "--protocol", "digits", "--python", "flat:network", "--images", "60"]
    words += ["--radii", "1/255,4/255,8/255"]
    real, radii = module.run_batch, []

    def struck(attack, *rest, **more):
        radii.append(attack.threat.eps)
        if len(radii) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(attack, *rest, **more)

    monkeypatch.setattr(module, "run_batch", struck)
    monkeypatch.setattr("sys.argv", ["guardbench", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 143
    said = "interrupted; curve is saved: run the same command again to go on from there\n"
    assert capsys.readouterr().err == said
    assert len(radii) == 2, "the radius at which it came is finished, and no other is begun"
    monkeypatch.setattr(
        module, "run_batch", lambda a, *r, **m: (radii.append(a.threat.eps), real(a, *r, **m))[1]
    )
    assert CliRunner().invoke(app, words).exit_code == 0
    assert radii == [Fraction(k, 255) for k in (1, 4, 8)]
    resumed = load_curve(tmp_path / "curve.json")
    shutil.rmtree(tmp_path / "guardbench-runs")
    assert CliRunner().invoke(app, words).exit_code == 0
    assert load_curve(tmp_path / "curve.json") == resumed


def test_a_curve_killed_after_any_step_goes_on_there_and_ends_the_same(monkeypatch):
    model, x, y, distance = linear_case("linf")
    far = float(distance.max())
    radii = [Fraction(share * far).limit_denominator(10**6) for share in (0.3, 0.6, 1.1)]
    searches: list[int] = []
    kept_search = warm.search

    def counted(net, images, *rest, **more):
        searches.append(len(images))
        return kept_search(net, images, *rest, **more)

    monkeypatch.setattr(warm, "search", counted)

    def go(state=None, keep=lambda _: None):
        heard: list[int] = []
        found = security_curve(
            model, x, y, "linf", radii, steps=3, batch_size=30, told=heard.append,
            skipped=heard.append, state=state, keep=keep,
        )  # fmt: skip
        assert sum(heard) == len(x)
        return found

    states: list[dict] = []
    # A checkpoint is written at once; what comes later must not reach into it.
    whole = go(keep=lambda state: states.append(copy.deepcopy(state)))
    unbroken = [*searches]
    assert len(states) == len(unbroken) > 6
    for steps, state in enumerate(states, start=1):
        searches.clear()
        assert torch.equal(go(state), whole), steps
        assert searches == unbroken[steps:], "nothing finished is searched again"


class Noisy(nn.Module):
    """A linear model whose logits move by more than their margin."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x) + 0.1 * torch.randn(len(x), 2)


def test_a_model_that_answers_at_random_has_a_curve_too():
    model, x, y, _ = linear_case("linf")
    torch.manual_seed(0)
    found = security_curve(Noisy(model).eval(), x, y, "linf", [Fraction(1, 100)], steps=2)
    assert (found < 2).sum() > 20


def curve(**more) -> Curve:
    words = {
        "classifier": "a", "weights_sha256": None, "protocol": "p", "protocol_sha256": "0" * 64,
        "norm": "linf", "steps": 40, "total": 10, "guardbench": "0", "device": "cpu",
        "points": (Point(eps="0", correct=9), Point(eps="1/255", correct=4)),
    }  # fmt: skip
    return Curve(**{**words, **more})


def test_a_curve_comes_back_from_its_file_and_is_drawn_beside_others(tmp_path):
    first = curve()
    other = curve(classifier="b", points=(Point(eps="0", correct=8), Point(eps="2/255", correct=0)))
    save_curve(tmp_path / "a.json", first)
    assert load_curve(tmp_path / "a.json") == first
    draw_curves(tmp_path / "a.png", [first, other])
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.size[0] > 900
    alike = {"norm": "linf", "total": 10, "steps": 40, "protocol_sha256": "0" * 64}
    require_alike([(tmp_path / "a.json", first)], alike)
    for field, value in {"norm": "l2", "total": 9, "steps": 3, "protocol_sha256": "1" * 64}.items():
        with pytest.raises(GuardbenchError, match=f"its {field} is .*; draw them apart"):
            require_alike([(tmp_path / "a.json", first)], {**alike, field: value})


def test_a_curve_of_version_1_loads_for_ever(tmp_path):
    found = load_curve(GOLDEN / "curve-v1.json")
    assert (found.classifier, found.total, found.flags) == ("student-0", 300, ())
    assert [point.correct for point in found.points] == [250, 214, 44, 0]
    words = json.loads((GOLDEN / "curve-v1.json").read_text())
    (tmp_path / "new.json").write_text(json.dumps({**words, "schema_version": 3}))
    with pytest.raises(GuardbenchError, match="made by a newer guardbench"):
        load_curve(tmp_path / "new.json")


def test_a_curve_is_flagged_where_it_ends_clearly_above_chance():
    def flags(correct, eps, norm="linf", classes=10):
        points = (Point(eps="0", correct=90), Point(eps=eps, correct=correct))
        return above_chance(points, 100, classes, norm)

    assert flags(0, "1") == flags(10, "1") == flags(15, "1") == ()  # 15 of 100 may be chance
    (line,) = flags(30, "1")
    assert line == (
        "above-chance: 30.0% right at the largest radius, 255/255 (chance 10.0%): the gradients mislead PGD"
    )
    assert flags(30, "1", classes=3) == ()
    # No image need fall there, so an honest classifier may stand.
    assert flags(90, "8/255") == flags(90, "16", "l2") == ()


LINEAR = """
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

class Steps(torch.nn.Module):
    def forward(self, x): return (4 * x).round() / 4

def network():
    digits = load_digits()
    pixels = digits.images[:900].reshape(900, -1) / 16
    fitted = LogisticRegression(C=0.05, max_iter=300).fit(pixels, digits.target[:900])
    layer = torch.nn.Linear(64, 10)
    layer.weight.data = torch.tensor(fitted.coef_, dtype=torch.float32)
    layer.bias.data = torch.tensor(fitted.intercept_, dtype=torch.float32)
    return torch.nn.Sequential(torch.nn.Flatten(), layer)

def quantised():
    return torch.nn.Sequential(Steps(), network())
"""


def test_a_quantised_model_is_flagged_and_the_same_without_its_steps_is_not(tmp_path, monkeypatch):
    """Rounding has no slope, so PGD never moves, and the counts alone would make a flat, flawless line."""
    (tmp_path / "steps.py").write_text(LINEAR)
    monkeypatch.chdir(tmp_path)
    drawn = []
    monkeypatch.setattr("guardbench.curve.save_png", lambda _, figure: drawn.append(figure))
    for name in ("network", "quantised"):
        words = ["curve", "--protocol", "digits", "--python", f"steps:{name}", "--images", "30"]
        result = CliRunner().invoke(app, [*words, "--name", name, "--output", f"{name}.json"])
        assert result.exit_code == 0, result.output
        made, figure = load_curve(tmp_path / f"{name}.json"), drawn.pop()
        _, (label,) = figure.axes[0].get_legend_handles_labels()
        assert made.points[-1].eps == "1"
        if name == "network":
            assert made.points[-1].correct == 0
            assert made.flags == ()
            assert label == "network"
            assert "flag" not in result.output
        else:
            assert made.points[-1].correct == made.points[0].correct > 20
            (flag,) = made.flags
            assert flag.endswith("the gradients mislead PGD")
            assert label == "quantised (flagged: ends above chance)"
            assert f"flag: {flag}" in " ".join(result.output.split())


@pytest.mark.parametrize(
    ("points", "line"),
    [
        ([("0", 4), ("1/255", 5)], "broken at every larger one"),
        ([("0", 11), ("1/255", 5)], "broken at every larger one"),
        ([("0", 4), ("1/0", 3)], "eps"),
        ([("0", 4), ("9" * 400, 3)], "eps"),
        ([("1/255", 4), ("2/255", 3)], "must begin at 0 and rise"),
        ([("0", 4), ("2/255", 3), ("1/255", 2)], "must begin at 0 and rise"),
    ],
)
def test_a_curve_that_contradicts_itself_is_refused(tmp_path, points, line):
    text = curve().model_dump(mode="json")
    text["points"] = [{"eps": eps, "correct": correct} for eps, correct in points]
    (tmp_path / "c.json").write_text(json.dumps(text))
    with pytest.raises(GuardbenchError, match=line):
        load_curve(tmp_path / "c.json")


def test_radii():
    threat = ThreatModel("linf", Fraction(8, 255))
    assert rising_radii("0.5/255,1/255", threat) == (Fraction(1, 510), Fraction(1, 255))
    default = rising_radii(None, threat)
    assert threat.eps in default
    assert default[-2:] == (Fraction(16 * 8, 255), 1), (
        "in l-inf it ends where every image is any other"
    )
    assert rising_radii(None, ThreatModel("linf", Fraction(1, 255)))[-2:] == (Fraction(32, 255), 1)
    assert rising_radii(None, ThreatModel("linf", Fraction(1)))[-2:] == (Fraction(3, 4), 1)
    wide = rising_radii(None, ThreatModel("l2", Fraction(1, 2)))
    assert max(wide) == 16, "in l2 a radius of 1 is no limit"
    with pytest.raises(GuardbenchError, match=r"in l-inf none is over 1.* did you mean 8/255"):
        rising_radii("1,2,4,8", threat)
    assert rising_radii("1,2", ThreatModel("l2", Fraction(1, 2))) == (1, 2)
    with pytest.raises(GuardbenchError, match="--radii: '1e400' is not a fraction"):
        rising_radii("1e400", ThreatModel("l2", Fraction(1, 2)))
    with pytest.raises(GuardbenchError, match="at most 200, none over 1000"):
        rising_radii("9" * 30, ThreatModel("l2", Fraction(1, 2)))
    for wrong in (",".join(f"{k}/99999" for k in range(1, 300)), f"1/{'9' * 30}"):
        with pytest.raises(GuardbenchError, match="at most 200, none over 1000"):
            rising_radii(wrong, threat)
    for wrong in ("2/255,1/255", "0,1/255", "1/255,1/255"):
        with pytest.raises(GuardbenchError, match="must be positive and rise"):
            rising_radii(wrong, threat)


def test_the_verb_prints_a_table_and_writes_both_files(tmp_path, monkeypatch):
    (tmp_path / "flat.py").write_text(
        "import torch\n"
        "def network():\n"
        "    torch.manual_seed(0)\n"
        "    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))\n"
    )
    monkeypatch.chdir(tmp_path)
    words = ["curve", "--protocol", "digits", "--python", "flat:network", "--images", "40"]
    result = CliRunner().invoke(app, [*words, "--radii", "1/255,8/255,64/255"])
    assert result.exit_code == 0, result.output
    made = load_curve(tmp_path / "curve.json")
    assert [point.eps for point in made.points] == ["0", "1/255", "8/255", "64/255"]
    assert made.total == 40
    assert (tmp_path / "curve.png").is_file()
    # The same again is read, another curve is made.
    stages = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("stage.json")}
    (tmp_path / "curve.json").unlink()
    again = CliRunner().invoke(app, [*words, "--radii", "1/255,8/255,64/255"])
    assert again.exit_code == 0, again.output
    assert load_curve(tmp_path / "curve.json") == made
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("stage.json")} == stages
    assert len(stages) == 1
    assert CliRunner().invoke(app, [*words, "--radii", "1/255,9/255"]).exit_code == 0
    assert len([*tmp_path.rglob("stage.json")]) == 2
    again = CliRunner().invoke(app, [*words, "--radii", "1/255", "--beside", "no.json"])
    assert isinstance(again.exception, GuardbenchError)
