"""The same attack at the same settings in other packages: `nox -s peers`, in an environment of their own.

torchattacks cannot live beside `datasets`, so it is never in the environment of the other tests. APGD
is compared with pyautoattack's, which robustbench runs, wherever that is installed.
"""

from __future__ import annotations

import importlib
import os
from fractions import Fraction
from types import ModuleType

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

from guardbench.attacks.apgd import APGD
from guardbench.attacks.base import run_verified
from guardbench.attacks.cw import CW
from guardbench.attacks.deepfool import DeepFool
from guardbench.attacks.fgsm import FGSM
from guardbench.attacks.jitter import Jitter
from guardbench.attacks.mim import MIM
from guardbench.attacks.pgd import PGD
from guardbench.attacks.spsa import SPSA
from guardbench.attacks.vmifgsm import VMIFGSM
from guardbench.threat import ThreatModel

COUNT = 500
EPS = Fraction(1, 12)
STEP = Fraction(1, 120)
LINF = ThreatModel("linf", EPS)
L2 = ThreatModel("l2", Fraction(3, 5))


def peer(name: str) -> ModuleType:
    """Another package; in the session that installs them all, one that is not there fails."""
    if os.environ.get("GUARDBENCH_PEERS"):
        return importlib.import_module(name)
    return pytest.importorskip(name)


@pytest.fixture(scope="module")
def case():
    """A small network on real digits, and 500 that it was not trained on."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    data = load_digits()
    x = torch.tensor(data.images / 16, dtype=torch.float32)[:, None]
    y = torch.tensor(data.target)
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2), nn.ReLU(),
        nn.Flatten(), nn.Linear(288, 10),
    )  # fmt: skip
    for step in range(400):
        rows = torch.randint(1200, (64,))
        gradients = torch.autograd.grad(
            F.cross_entropy(model(x[rows]), y[rows]), [*model.parameters()]
        )
        with torch.no_grad():
            for weight, gradient in zip(model.parameters(), gradients, strict=True):
                weight -= 0.2 * (1 - step / 400) * gradient
    yield model.eval().requires_grad_(False), x[-COUNT:], y[-COUNT:]
    torch.set_num_threads(threads)


def ours(attack, case) -> float:
    model, x, y = case
    return 100 * float(run_verified(attack, model, x, y, seed=0).robust.float().mean())


def scored(adv: torch.Tensor, case) -> float:
    model, x, y = case
    right = (model(x).argmax(1) == y) & (model(adv).argmax(1) == y)
    return 100 * float(right.float().mean())


def agree(mine: float, theirs: float, at_most: float = 0.5) -> None:
    print(f"ours {mine:.1f}%, theirs {theirs:.1f}%")
    assert 5 < theirs < 90, "this radius would show nothing"
    assert abs(mine - theirs) <= at_most


@pytest.mark.parametrize("threat", [LINF, L2], ids=str)
@pytest.mark.parametrize("loss", ["ce", "dlr"])
def test_apgd_agrees_with_robustbenchs(case, threat, loss):
    pyautoattack = peer("pyautoattack")
    model, x, y = case
    theirs = pyautoattack.AutoAttack(
        model, norm={"linf": "Linf", "l2": "L2"}[threat.norm], eps=float(threat.eps), seed=0,
        version="custom", attacks=[f"apgd-{loss}"],
    )  # fmt: skip
    theirs.apgd.n_restarts, theirs.verbose = 1, False
    adv, _ = theirs.run_standard_evaluation(x, y, batch_size=COUNT)
    agree(ours(APGD(threat=threat, loss=loss), case), scored(adv, case))


@pytest.mark.parametrize("name", ["FGSM", "PGD", "MIFGSM", "VMIFGSM", "Jitter"])
def test_agrees_with_torchattacks(case, name):
    peers = peer("torchattacks")
    model, x, y = case
    torch.manual_seed(0)
    eps, alpha = float(EPS), float(STEP)
    pair = {
        "FGSM": lambda: (FGSM(threat=LINF), peers.FGSM(model, eps=eps)),
        "PGD": lambda: (
            PGD(threat=LINF, steps=100, step=STEP),
            peers.PGD(model, eps=eps, alpha=alpha, steps=100),
        ),
        "MIFGSM": lambda: (
            MIM(threat=LINF, steps=20, step=STEP),
            peers.MIFGSM(model, eps=eps, alpha=alpha, steps=20),
        ),
        "VMIFGSM": lambda: (
            VMIFGSM(threat=LINF, steps=10),
            peers.VMIFGSM(model, eps=eps, alpha=eps / 10, steps=10, N=20),
        ),
        # Without the noise, which alone moves either by a point from seed to seed.
        "Jitter": lambda: (
            Jitter(threat=LINF, steps=40, step=0.1, noise=0.0),
            peers.Jitter(model, eps=eps, alpha=alpha, steps=40, std=0),
        ),
    }[name]
    mine, theirs = pair()
    agree(ours(mine, case), scored(theirs(x, y), case))


@pytest.mark.parametrize("threat", [LINF, L2], ids=str)
def test_deepfool_agrees_with_foolbox(case, threat):
    foolbox = peer("foolbox")
    model, x, y = case
    kinds = foolbox.attacks
    kind = kinds.LinfDeepFoolAttack if threat.norm == "linf" else kinds.L2DeepFoolAttack
    wrapped = foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu")
    # torchattacks' lacks the authors' constant (`FURTHER`) and leaves two images of five unbroken.
    _, adv, _ = kind(steps=50, candidates=10, overshoot=0.02, loss="logits")(
        wrapped, x, y, epsilons=float(threat.eps)
    )
    agree(ours(DeepFool(threat=threat), case), scored(adv, case))


def test_cw_agrees_with_foolbox(case):
    foolbox = peer("foolbox")
    model, x, y = case
    attack = foolbox.attacks.L2CarliniWagnerAttack(
        binary_search_steps=1, steps=50, stepsize=0.01, initial_const=1.0, abort_early=False
    )
    _, adv, _ = attack(
        foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu"), x, y, epsilons=None
    )
    # Here the iterate after the last step is judged too, so one step less sees the same iterates.
    failed = (adv == 0).flatten(1).all(1)  # foolbox gives black images where it found nothing
    adv = torch.where(failed[:, None, None, None], x, adv)
    agree(ours(CW(c=1.0, steps=49), case), scored(adv, case))


@pytest.mark.parametrize("threat", [LINF, L2], ids=str)
def test_pgd_agrees_with_foolbox(case, threat):
    foolbox = peer("foolbox")
    model, x, y = case
    torch.manual_seed(0)
    attacks = foolbox.attacks
    kind = attacks.LinfPGD if threat.norm == "linf" else attacks.L2PGD
    attack = kind(abs_stepsize=float(threat.eps) / 10, steps=100)
    wrapped = foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu")
    _, adv, _ = attack(wrapped, x, y, epsilons=float(threat.eps))
    agree(ours(PGD(threat=threat, steps=100, step=threat.eps / 10), case), scored(adv, case))


def test_spsa_is_about_as_strong_as_torchattacks_at_equal_answers(case):
    """Both estimate at random; theirs takes one batch's loss for all images."""
    peers = peer("torchattacks")
    model, x, y = case[0], case[1][:100], case[2][:100]
    torch.manual_seed(0)
    theirs = peers.SPSA(model, eps=float(EPS), delta=0.01, lr=0.01, nb_iter=20, nb_sample=64)
    small, share = (model, x, y), 0.01 / float(EPS)
    mine = ours(SPSA(threat=LINF, steps=20, samples=64, lr=share, delta=share), small)
    agree(mine, scored(theirs(x, y), small), at_most=4)
