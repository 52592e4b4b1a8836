"""Training in float16: losses are scaled, and what comes out is what would have come out without."""

import math
from fractions import Fraction

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from guardbench.devices import make_accelerator
from guardbench.distillers.sre2l import SRe2L
from guardbench.errors import GuardbenchError
from guardbench.models import build_model
from guardbench.progress import Progress
from guardbench.regularisers.base import Batch, build_regulariser
from guardbench.runtime import Run, take_step
from guardbench.threat import ThreatModel
from tests.unit.test_sre2l import load_digits, make_task

SHORT = {"epochs": 1}
THREAT = ThreatModel("linf", Fraction(8, 255))
REGULARISERS = (
    {"kind": "none"},
    {"kind": "curvature", "weight": 0.7, "h": "4/255"},
    {"kind": "curvature-double", "weight": 0.7, "h": "4/255"},
    {"kind": "gradient-norm", "weight": 0.1},
    {"kind": "pgd", "steps": 2},
    {"kind": "trades", "steps": 2},
    {"kind": "fbf"},
    {"kind": "pgd-released", "steps": 2},
)


def step(words: dict[str, object], scale: float) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Loss with penalty and gradients of a batch, in float64, with losses scaled so."""
    generator = torch.Generator().manual_seed(3)
    model: nn.Module = build_model(
        "convnet-d3-bn-small", channels=3, classes=10, resolution=8, seed=1
    )
    model = model.double().train()
    batch = Batch(
        model=model,
        images=torch.rand(8, 3, 8, 8, generator=generator, dtype=torch.float64),
        labels=torch.randint(10, (8,), generator=generator),
        generator=torch.Generator().manual_seed(4),
        scale=scale,
    )
    value = torch.stack(build_regulariser(words, THREAT).backward(batch)).sum()
    return value, [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("words", REGULARISERS, ids=lambda words: str(words["kind"]))
def test_a_scaled_loss_has_scaled_gradients_and_nothing_else(words) -> None:
    value, grads = step(words, 1.0)
    scaled, scaled_grads = step(words, 4096.0)
    assert scaled / 4096 == pytest.approx(value.item(), rel=1e-6)
    for one, other in zip(grads, scaled_grads, strict=True):
        torch.testing.assert_close(other / 4096, one, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("kind", ["curvature", "curvature-double", "gradient-norm"])
def test_a_step_that_overflows_is_left_out_and_its_scale_halved(kind) -> None:
    """As it is by design, every 2,000 steps; only where no scale helps is the loss to blame."""
    words = next(words for words in REGULARISERS if words["kind"] == kind)
    model: nn.Module = build_model(
        "convnet-d3-bn-small", channels=3, classes=10, resolution=16, seed=1
    )
    model.train()
    generator = torch.Generator().manual_seed(3)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24)
    images, labels = torch.rand(8, 3, 16, 16, generator=generator), torch.arange(8)
    overflowed, seen = 0, []
    for _ in range(30):
        before = [p.detach().clone() for p in model.parameters()]
        scale = float(scaler.scale(torch.ones(())))
        batch = Batch(
            model=model, images=images, labels=labels, generator=generator, scale=scale,
            autocast=lambda: torch.autocast("cpu", torch.float16),
        )  # fmt: skip
        optimizer.zero_grad(set_to_none=True)
        loss, penalty = build_regulariser(words, THREAT).backward(batch)
        value = take_step(scaler, optimizer, (loss + penalty) / scale, "here", "lower it")
        moved = any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
        assert moved == (scaler.get_scale() >= scale)
        overflowed += not moved
        seen.append(value)
    assert 0 < overflowed < 25
    assert all(map(math.isfinite, seen[-3:]))
    assert all(b.isfinite().all() for b in model.state_dict().values()), "BN statistics too"

    def without_end() -> None:
        for _ in range(40):
            optimizer.zero_grad(set_to_none=True)
            broken = scaler.scale(next(model.parameters()).sum() * torch.nan)
            broken.backward()
            take_step(scaler, optimizer, broken.detach(), "here", "lower it")

    with pytest.raises(GuardbenchError, match=r"here: the loss is nan; lower it"):
        without_end()


@pytest.fixture
def half(monkeypatch):
    """A run in float16 on the CPU, which Accelerate refuses since it gains nothing there."""
    monkeypatch.setattr(Run, "precision", "fp16")
    monkeypatch.setattr(Run, "autocast", lambda _: torch.autocast("cpu", torch.float16))


def right(teacher: nn.Module) -> float:
    digits = load_digits()
    with torch.no_grad():
        return float(
            (teacher(digits.batch(range(500))).argmax(1) == digits.labels[:500]).double().mean()
        )


@pytest.mark.usefixtures("half")
def test_a_teacher_squeezed_in_float16_is_as_good(tmp_path, monkeypatch) -> None:
    seen = []
    real = torch.amp.GradScaler.step
    monkeypatch.setattr(
        torch.amp.GradScaler,
        "step",
        lambda self, *a: (seen.append(self.get_scale()), real(self, *a))[1],
    )
    task = make_task(tmp_path / "half", ipc=1, squeeze=SHORT)
    found = SRe2L().distill(task, load_digits())
    assert seen
    assert (
        min(seen) > 1
    )  # gradients were scaled, if not at first then once a scale was found that fits
    assert found.images.dtype == torch.float32
    monkeypatch.undo()
    whole = SRe2L().distill(make_task(tmp_path / "whole", ipc=1, squeeze=SHORT), load_digits())
    assert right(whole.teacher) > 0.5
    assert right(found.teacher) == pytest.approx(right(whole.teacher), abs=0.05)


@pytest.mark.usefixtures("half")
def test_a_gradient_out_of_range_leaves_a_step_out() -> None:
    run = Run(accelerator=Accelerator(cpu=True), workspace=None, seed=0, progress=Progress())
    scaler = run.scaler()
    weight = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], 1.0)
    weight.grad = torch.tensor([float("inf")])
    before = scaler.get_scale()
    scaler.step(optimizer)
    scaler.update()
    assert weight.item() == 1
    assert scaler.get_scale() == before / 2


def test_float16_is_for_gpus() -> None:
    with pytest.raises(GuardbenchError, match="--precision fp16: for GPUs without bf16"):
        make_accelerator("cpu", "fp16", 64)
