"""The harness trusts no attack, no image and no model."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from guardbench.attacks.base import frozen, plan_batches, run_batch, run_verified, score_clean
from guardbench.attacks.fgsm import FGSM
from guardbench.attacks.pgd import PGD
from guardbench.errors import GuardbenchError
from guardbench.threat import ThreatModel

LINF = ThreatModel("linf", Fraction(8, 255))


class Brightness(nn.Module):
    """Class 1 if the mean pixel is above one half; remembers the sizes of its batches."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(10.0))
        self.sizes: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.sizes.append(len(x))
        level = self.gain * (x.flatten(1).mean(1) - 0.5)
        return torch.stack([-level, level], 1)


@dataclass(frozen=True)
class Claims:
    """An attack that returns whatever its function makes of the clean images."""

    make: Any
    threat: ThreatModel | None = LINF

    def perturb(self, model: nn.Module, x: Tensor, y: Tensor, *, seed: int) -> Tensor:  # noqa: ARG002
        return self.make(x)


def case(count: int = 10) -> tuple[Brightness, Tensor, Tensor]:
    x = torch.linspace(0.3, 0.7, count)[:, None, None, None].expand(-1, 3, 4, 4).clone()
    return Brightness().eval(), x, (x[:, 0, 0, 0] > 0.5).long()


def spoil(value: float) -> Any:
    """Spoils one pixel of the third image that the attack is given."""

    def make(x: Tensor) -> Tensor:
        x[2, 1, 0, 0] = value
        return x

    return make


@pytest.mark.parametrize(
    ("attack", "message"),
    [
        (Claims(spoil(0.9)), r"image 5 is at linf distance 0\.377778, outside eps 8/255"),
        (Claims(spoil(0.9), ThreatModel("l2", Fraction(1, 10))), "image 5 is at l2 distance"),
        (Claims(spoil(0.9), ThreatModel("l1", Fraction(1, 10))), "image 5 is at l1 distance"),
        (Claims(lambda x: x + 8 / 255 + 1e-6), "image 3 is at linf distance 0.0313736"),
        (Claims(spoil(torch.nan)), "image 5 is not finite"),
        (Claims(spoil(torch.inf)), "image 5 is not finite"),
        (Claims(spoil(1.2)), r"image 5 leaves \[0, 1\] by 0.2"),
        (Claims(spoil(-0.1), None), r"image 5 leaves \[0, 1\] by 0.1"),
        (Claims(lambda x: x[:-1]), "returned"),
        (Claims(lambda x: x.double()), "returned torch.float64"),
        (Claims(lambda x: x.flatten(1)), "returned"),
        (Claims(lambda _: None), "returned"),
    ],
)
def test_a_cheating_attack_is_caught_and_named(attack, message):
    model, x, y = case()
    y[:3] = 1 - y[:3]  # these leave first, yet images keep their numbers
    with pytest.raises(GuardbenchError, match=message) as error:
        run_verified(attack, model, x, y, seed=0)
    assert "Claims" in str(error.value)


def test_the_harness_counts_and_not_the_attack():
    model, x, y = case()
    x[:, 0, 0, 0] += 1e-4 * torch.arange(10)
    kept = run_verified(Claims(lambda x: x), model, x, y, seed=0)
    assert kept.robust.all()
    assert (kept.distance == 0).all()
    inverted = run_verified(Claims(lambda x: 1 - x, None), model, x, y, seed=0)
    assert inverted.clean.all()
    assert not inverted.robust.any()
    expected = (1 - 2 * x).double().flatten(1).norm(dim=1)
    assert inverted.distance.dtype == torch.float64
    assert inverted.distance.allclose(expected, atol=1e-6)


def test_rounding_outside_the_range_is_clipped():
    model, x, y = case()
    x[0] = 0.0
    attack = Claims(lambda x: x - 1e-8)
    assert run_verified(attack, model, x, y, seed=0).distance[0] == 0


def test_wrong_images_leave_before_the_attack_and_stay_wrong():
    model, x, y = case(20)
    y[::2] = 1 - y[::2]
    seen: list[int] = []

    def improve(x: Tensor) -> Tensor:  # would make every image right again
        seen.append(len(x))
        return x

    counts: list[int] = []
    attack = Claims(improve)
    outcome = run_verified(attack, model, x, y, seed=0, batch_size=4, on_batch=counts.append)
    assert seen == [4, 4, 2]
    assert counts == [10, 4, 4, 2]
    assert torch.equal(outcome.clean, outcome.robust)
    assert not outcome.robust[::2].any()
    assert (outcome.distance[::2] == 0).all()


def test_batches_can_be_run_one_by_one_and_share_the_clean_pass():
    model, x, y = case(20)
    attack = PGD(threat=LINF, steps=4, step=Fraction(4, 255))
    whole = run_verified(attack, model, x, y, seed=5, batch_size=6)
    clean = score_clean(model, x, y)
    robust = clean.clone()
    for index in reversed(plan_batches(clean, 6)):
        outcome = run_batch(attack, model, x, y, index, seed=5)
        assert torch.equal(outcome.index, index)
        assert outcome.distance.allclose(whole.distance[index])
        robust[index] = ~outcome.broken
    assert torch.equal(robust, whole.robust)
    assert 0 < robust.sum() < 20
    again = run_verified(attack, model, x, y, seed=5, clean=clean)
    assert torch.equal(again.robust, whole.robust)


@pytest.mark.parametrize(
    ("count", "size", "expected"),
    [(6, None, [6, 3, 3]), (7, None, [7, 4, 3]), (1, None, [1, 2]), (6, 2, [6, 2, 2, 2]),
     (6, 6, [6, 7]), (6, 64, [6, 7])],
)  # fmt: skip
def test_rescored_at_another_batch_size(count, size, expected):
    model, x, y = case(count)
    clean = torch.ones(count, dtype=torch.bool)
    attack = Claims(lambda x: x)
    run_verified(attack, model, x, y, seed=0, rescore_batch_size=size, clean=clean)
    assert model.sizes == expected


@pytest.mark.parametrize(
    ("size", "expected"),
    [(None, [4, 4, 2, 3, 3, 3, 1]), (3, [4, 4, 2, 3, 3, 3, 1]), (64, [4, 4, 2, 5, 5, 1])],
)
def test_more_images_than_fit_at_once_are_scored_in_two_sizes_too(size, expected, monkeypatch):
    monkeypatch.setattr("guardbench.attacks.base.rows_at_once", lambda _: 4)
    model, x, y = case(10)
    model.sizes.clear()
    run_batch(Claims(lambda x: x), model, x, y, torch.arange(10), seed=0, rescore_batch_size=size)
    assert model.sizes == expected


@pytest.mark.parametrize("rows", [8, 10, 32])
def test_no_image_meets_the_same_batch_size_twice(rows: int, monkeypatch) -> None:
    monkeypatch.setattr("guardbench.attacks.base.rows_at_once", lambda _: rows)

    class Met(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            for image in x[:, 0, 0, 0].tolist():
                met.setdefault(round(image * 1000), []).append(len(x))
            return torch.stack([torch.ones(len(x)), torch.zeros(len(x))], 1)

    for count in range(1, 80):
        met: dict[int, list[int]] = {}
        x = (torch.arange(count) / 1000).view(-1, 1, 1, 1).expand(-1, 1, 2, 2)
        y = torch.zeros(count, dtype=torch.int64)
        run_batch(Claims(lambda x: x), Met().eval(), x, y, torch.arange(count), seed=0)
        assert len(met) == count
        assert all(len(set(sizes)) >= 2 for sizes in met.values()), count


class Batchwise(Brightness):
    """Its margin moves by `shift` when the batch holds fewer than 8 images."""

    def __init__(self, shift: float) -> None:
        super().__init__()
        self.shift = shift

    def forward(self, x: Tensor) -> Tensor:
        logits = super().forward(x)
        return logits - self.shift * logits.sign() if len(x) < 8 else logits


def test_scorings_that_differ_are_broken_within_noise_and_an_error_beyond():
    x = torch.full((8, 1, 2, 2), 0.7)
    x[3] = 0.51
    y = torch.ones(8, dtype=torch.int64)
    attack = Claims(lambda x: x)
    with pytest.raises(GuardbenchError, match=r"image 3: the model's margin is \+0\.2 and -0\.1"):
        run_verified(attack, Batchwise(0.15).eval(), x, y, seed=0)

    class Offset(nn.Module):  # large logits, a margin of 1e-5 of them
        def __init__(self, whole: int) -> None:
            super().__init__()
            self.whole = whole

        def forward(self, x: Tensor) -> Tensor:
            first = torch.full((len(x),), 100.0)
            sign = self.whole if len(x) == 8 else -self.whole
            margin = torch.where(x[:, 0, 0, 0] < 0.6, 1e-3 * sign, 5.0)
            return torch.stack([first, first + margin], 1)

    clean = torch.ones(8, dtype=torch.bool)
    for whole in (1, -1):  # whichever of the two scorings it is that breaks the image
        outcome = run_verified(attack, Offset(whole).eval(), x, y, seed=0, clean=clean)
        assert outcome.robust.tolist() == [True, True, True, False, True, True, True, True]


def test_models_in_train_mode_are_refused_and_named():
    model, x, y = case()
    with pytest.raises(GuardbenchError, match="Brightness is in train mode"):
        run_verified(FGSM(threat=LINF), Brightness(), x, y, seed=0)
    whole = nn.Sequential(model, nn.Sequential(nn.Dropout())).eval()
    whole[1][0].train()
    with pytest.raises(GuardbenchError, match=r"1\.0 \(Dropout\) is in train mode"):
        run_verified(FGSM(threat=LINF), whole, x, y, seed=0)

    def meddle(x: Tensor) -> Tensor:
        model.train()
        return x

    with pytest.raises(GuardbenchError, match="train mode"):
        run_verified(Claims(meddle), model, x, y, seed=0)


def test_frozen_restores_what_it_held_even_after_an_error():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)).eval()
    model[0].weight.requires_grad_(False)
    wanted = [weight.requires_grad for weight in model.parameters()]

    def use() -> None:
        with frozen(model):
            assert not any(weight.requires_grad for weight in model.parameters())
            raise KeyError

    with pytest.raises(KeyError):
        use()
    assert [weight.requires_grad for weight in model.parameters()] == wanted == [False] + [True] * 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, y: (x * 2 - 1, y), r"must be in \[0, 1\], found -0\.4 to 0\.4"),
        (lambda x, y: (x * 255, y), r"must be in \[0, 1\], found 76\.5 to 178\.5"),
        (lambda x, y: (x * torch.nan, y), r"must be in \[0, 1\], found nan to nan"),
        (lambda x, y: (x.double(), y), "must be float32"),
        (lambda x, y: (x[0], y), r"must be float32 \[N, C, H, W\]"),
        (lambda x, y: (x, y[1:]), r"labels must be int64 \[10\]"),
        (lambda x, y: (x, y.int()), "labels must be int64"),
        (lambda x, y: (x, y + 1), "labels must be 0 to 1, found 1 to 2"),
    ],
)
def test_bad_images_and_labels_are_one_clear_line(change, message):
    model, x, y = case()
    with pytest.raises(GuardbenchError, match=message):
        run_verified(FGSM(threat=LINF), model, *change(x, y), seed=0)
    if message.startswith("must be in"):  # known clean verdicts do not skip the check
        known = torch.ones(10, dtype=torch.bool)
        with pytest.raises(GuardbenchError, match=message):
            run_verified(FGSM(threat=LINF), model, *change(x, y), seed=0, clean=known)


def test_models_whose_answers_mean_nothing_are_refused():
    model, x, y = case()
    with torch.no_grad():
        model.gain.fill_(torch.nan)
    with pytest.raises(GuardbenchError, match="answers NaN"):
        run_verified(FGSM(threat=LINF), model, x, y, seed=0)
    with pytest.raises(GuardbenchError, match=r"must answer logits \[10, K\]"):
        run_verified(FGSM(threat=LINF), nn.Identity().eval(), x, y, seed=0)


def test_nothing_to_attack():
    model, x, y = case()
    none = run_verified(FGSM(threat=LINF), model, x, 1 - y, seed=0)
    assert not none.clean.any()
    empty = run_verified(FGSM(threat=LINF), model, x[:0], y[:0], seed=0)
    assert empty.robust.shape == empty.clean.shape == empty.distance.shape == (0,)


def test_where_the_faster_form_alone_is_fooled_the_model_itself_is_searched():
    model, x, y = case(20)
    attack = PGD(threat=LINF, steps=4, step=Fraction(2, 255))
    index = torch.arange(20)

    class Nearly(nn.Module):
        """Its boundary is off, so that its searches end too early on one side."""

        def forward(self, x: Tensor) -> Tensor:
            return model(x) + torch.tensor([0.15, 0.0])

    plain = run_batch(attack, model, x, y, index, seed=0)
    fast = run_batch(attack, model, x, y, index, seed=0, searched=Nearly().eval())
    assert 0 < plain.broken.sum() < 20
    assert torch.equal(fast.broken, plain.broken)
    fooled = run_verified(attack, Nearly().eval(), x, y, seed=0)
    assert (fooled.robust < ~plain.broken).any()
