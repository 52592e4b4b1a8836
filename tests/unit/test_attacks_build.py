"""Every attack of the table, by name; and what a wrong name or parameter is told."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from fractions import Fraction

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from guardbench.attacks.base import run_verified
from guardbench.attacks.build import ATTACKS, build_attack, class_of
from guardbench.canonical import file_digest
from guardbench.cli import app
from guardbench.errors import GuardbenchError
from guardbench.models import build_model, save_weights
from guardbench.threat import ThreatModel

LINF = ThreatModel("linf", Fraction(1, 5))
QUICK: dict[str, dict[str, object]] = {
    "apgd": {"steps": 3},
    "fab": {"steps": 3},
    "pgd": {"steps": 3, "step": "17/255"},
    "mim": {"steps": 3, "step": "17/255"},
    "square": {"queries": 20},
    "autoattack": {"version": "rand"},
    "deepfool": {"steps": 3},
    "jitter": {"steps": 3},
    "spsa": {"steps": 3, "samples": 8},
    "vmifgsm": {"steps": 3},
    "cw": {"steps": 3},
}


@pytest.fixture(scope="module")
def surrogate(tmp_path_factory):
    """The weights of a small network as a protocol names them."""
    path = tmp_path_factory.mktemp("surrogate") / "net.safetensors"
    save_weights(build_model("convnet-d3", channels=1, classes=5, resolution=8, seed=0), path)
    return {"weights": str(path), "sha256": file_digest(path), "arch": "convnet-d3"}


def test_a_surrogate_is_one_file_and_no_other(surrogate):
    with pytest.raises(GuardbenchError, match="not the surrogate that the protocol names"):
        build_attack("transfer", LINF, {**surrogate, "sha256": "0" * 64})
    with pytest.raises(GuardbenchError, match="no such file"):
        build_attack("transfer", LINF, {**surrogate, "weights": "elsewhere.safetensors"})
    with pytest.raises(GuardbenchError, match="attack transfer needs weights, sha256, arch"):
        build_attack("transfer", LINF, {"steps": 3})
    with pytest.raises(GuardbenchError, match="weights must be text in quotes"):
        build_attack("transfer", LINF, {**surrogate, "weights": 3})


@pytest.mark.parametrize("kind", sorted(ATTACKS))
def test_every_attack_keeps_the_contract(kind, surrogate):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 5)).eval()
    x = torch.rand(6, 1, 8, 8)
    y = model(x).argmax(1)
    y[0] = (y[0] + 1) % 5
    params = surrogate if kind == "transfer" else QUICK.get(kind, {})
    attack = build_attack(kind, LINF, params)
    assert type(attack).__name__.lower() == kind
    assert dataclasses.fields(attack)[0].name == "threat"
    assert attack.threat == (None if kind == "cw" else LINF)
    assert hash(attack) == hash(build_attack(kind, LINF, params))
    with pytest.raises(dataclasses.FrozenInstanceError):
        attack.threat = None
    with pytest.raises(TypeError):
        type(attack)(LINF)  # keywords only
    first, second = (run_verified(attack, model, x, y, seed=4) for _ in range(2))
    assert torch.equal(first.robust, second.robust)
    assert torch.equal(first.distance, second.distance)
    assert not first.robust[0]
    assert first.distance[0] == 0
    assert (first.distance[1:] > 0).any()


@pytest.mark.parametrize("kind", sorted(ATTACKS))
def test_every_attack_names_its_source(kind):
    paper = ATTACKS[kind].source.rpartition(", ")[2]
    assert paper.startswith("arXiv:")
    assert paper in (class_of(kind).__doc__ or "")


def test_the_attacks_are_listed_with_parameters_and_source(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    result = CliRunner().invoke(app, ["attacks"])
    assert result.exit_code == 0, result.output
    for kind, (_, source, norms) in ATTACKS.items():
        assert kind in result.output
        assert source in result.output
        assert (", ".join(norms) or "none: unbounded") in result.output
    assert "steps = 100, step = 1/1020, random_start = True, restarts = 1" in result.output


def test_defaults_are_those_of_the_guard_tables():
    threat = ThreatModel("linf", Fraction(1, 255))
    assert repr(build_attack("pgd", threat, {})) == (
        "PGD(threat=ThreatModel(norm='linf', eps=Fraction(1, 255)), steps=100,"
        " step=Fraction(1, 1020), random_start=True, restarts=1)"
    )
    assert repr(build_attack("mim", threat, {})).endswith(
        "steps=20, step=Fraction(1, 255), decay=1.0)"
    )
    assert repr(build_attack("cw", threat, {})) == (
        "CW(threat=None, c=0.0001, steps=50, lr=0.01, kappa=0.0)"
    )
    assert repr(build_attack("square", threat, {})).endswith("queries=5000, engine='guardbench')")
    assert repr(build_attack("autoattack", threat, {})).endswith(
        "version='standard', square=True, engine='guardbench', without=())"
    )
    assert repr(build_attack("apgd", threat, {})).endswith("loss='ce', steps=100, targets=9)")
    assert repr(build_attack("fab", threat, {})).endswith("steps=100, targets=9)")


def test_parameters_are_read_by_the_type_of_their_field():
    pgd = build_attack("pgd", LINF, {"step": "0.25/255", "steps": 204, "random_start": False})
    assert repr(pgd).endswith("steps=204, step=Fraction(1, 1020), random_start=False, restarts=1)")
    assert repr(build_attack("mim", LINF, {"decay": 1, "step": "3/255"})).endswith("decay=1.0)")


@pytest.mark.parametrize(
    ("kind", "params", "message"),
    [
        ("pdg", {}, "unknown attack 'pdg'; did you mean 'pgd'. it must be one of apgd, autoattack"),
        ("zzz", {}, "unknown attack 'zzz'; it must be one of apgd, autoattack, cw, deepfool, fab"),
        ("pgd", {"stpes": 3}, "pgd has no parameter 'stpes'; did you mean 'steps'"),
        ("pgd", {"threat": LINF}, "pgd has no parameter 'threat'"),
        ("fgsm", {"steps": 3}, "fgsm has no parameter 'steps'; there are none"),
        ("pgd", {"steps": "3"}, "steps must be a whole number, not '3'"),
        ("pgd", {"steps": True}, "steps must be a whole number, not True"),
        ("pgd", {"steps": 2.0}, "steps must be a whole number, not 2.0"),
        ("pgd", {"step": 0.001}, "step must be an exact fraction in quotes"),
        ("pgd", {"step": "a/255"}, "attack pgd: step: 'a/255' is not a fraction such as"),
        ("pgd", {"random_start": 1}, "random_start must be true or false, not 1"),
        ("mim", {"decay": "1"}, "decay must be a number, not '1'"),
        ("autoattack", {"without": []}, "autoattack has no parameter 'without'"),
        ("vmifgsm", {"leave": False}, "vmifgsm has no parameter 'leave'"),
        ("autoattack", {"version": "fast"}, "version must be one of 'standard', 'plus', 'rand'"),
        ("square", {"engine": "fast"}, "engine must be one of 'guardbench', 'reference'"),
        ("apgd", {"loss": "cw"}, "loss must be one of 'ce', 'dlr', 'dlr-targeted'"),
        ("autoattack", {"version": ["standard"]}, "version must be one of 'standard'"),
        ("pgd", {"steps": 0}, "must be positive"),
    ],
)
def test_a_wrong_name_or_value_is_one_clear_line(kind, params, message):
    with pytest.raises(GuardbenchError, match=message) as error:
        build_attack(kind, LINF, params)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("kind", sorted(ATTACKS))
def test_the_table_names_the_norms_that_an_attack_takes(kind, norm, surrogate):
    threat = ThreatModel(norm, Fraction(1, 2))
    params = surrogate if kind == "transfer" else QUICK.get(kind, {})
    held = ATTACKS[kind].norms
    if norm in held or not held:
        assert getattr(build_attack(kind, threat, params), "threat", None) == (
            threat if held else None
        )
    else:
        with pytest.raises(GuardbenchError, match=f"not in {norm}"):
            build_attack(kind, threat, params)


def test_the_table_needs_no_torch():
    code = "import sys, guardbench.attacks.build; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
