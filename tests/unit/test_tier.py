"""The dev tier: which images, which precision, and that nothing of it passes for official."""

from fractions import Fraction

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from guardbench import scoring_plan
from guardbench.attacks.base import run_batch
from guardbench.attacks.pgd import PGD
from guardbench.attacks.searched import in_bf16, search_model
from guardbench.cli import app
from guardbench.devices import _gains
from guardbench.errors import GuardbenchError
from guardbench.models import build_model
from guardbench.protocol import load_protocol, protocol_ids
from guardbench.threat import ThreatModel
from guardbench.tier import measured, sample_size, smoke, stratified

pytestmark = pytest.mark.usefixtures("one_thread")

FAR = ThreatModel("linf", Fraction(2, 5))


# Which images.


def test_the_subset_is_the_first_images_of_each_class_in_order():
    labels = [2, 0, 0, 1, 0, 2, 1, 1, 2]
    assert stratified(labels, 3, 3) == [0, 1, 3]
    assert stratified(labels, 6, 3) == [0, 1, 2, 3, 5, 6]
    assert stratified(labels, 9, 3) == list(range(9))
    with pytest.raises(
        GuardbenchError,
        match="a class has only 1 of the protocol's test images; say at most --images 3",
    ):
        stratified([0, 0, 1, 2, 2], 6, 3)
    with pytest.raises(GuardbenchError, match="only 0"):
        stratified([0, 0, 1], 3, 3)


@pytest.mark.parametrize(
    ("protocol", "classes", "expected"),
    [("digits", 10, 100), ("imagenette-64", 10, 100), ("cifar10", 10, 200), ("cifar10", 150, 150)],
)
def test_by_default_no_attack_meets_more_images_than_officially(protocol, classes, expected):
    assert sample_size(load_protocol(protocol), classes, "dev", None) == expected


def test_a_smoke_test_is_short_and_has_an_id_of_its_own():
    for name in protocol_ids():
        whole = load_protocol(name)
        short = smoke(whole)
        assert short.id == f"{name}-smoke"
        assert short.digest != whole.digest
        assert len(short.student.seeds) == 1
        assert short.student.epochs * 10 <= whole.student.epochs
        assert [spec.kind for spec in short.attacks] == ["pgd", "square"]
        assert short.attacks[1].params["queries"] == 500
        assert type(short).model_validate(short.model_dump()) == short


def test_another_number_must_share_equally_and_belongs_to_the_dev_tier():
    protocol = load_protocol("digits")
    assert sample_size(protocol, 10, "official", None) is None
    assert sample_size(protocol, 10, "dev", 300) == 300
    for images in (5, 95, 310):
        with pytest.raises(
            GuardbenchError, match=f"--images {images}: must be a multiple of the 10"
        ):
            sample_size(protocol, 10, "dev", images)
    with pytest.raises(GuardbenchError, match="--images 100: the official tier measures all"):
        sample_size(protocol, 10, "official", 100)


def test_every_attack_meets_all_of_the_subset():
    protocol = load_protocol("digits")
    assert measured(protocol, None) is protocol
    small = measured(protocol, 50)
    assert {small.slice_of(spec, 2) for spec in small.attacks} == {(0, 50)}
    assert small.test.count == 50


# Which precision.


@pytest.mark.parametrize(
    ("kind", "resolution", "native", "flags", "gains"),
    [
        ("cuda", 8, True, "", True),
        ("cuda", 224, False, "", False),  # emulated: there, and slower
        ("cpu", 64, False, "fma avx2", False),
        ("cpu", 64, False, "avx512f avx512_vnni", False),
        ("cpu", 64, False, "avx512f avx512_bf16", True),
        ("cpu", 64, False, "avx2 amx_bf16 amx_tile", True),
        ("cpu", 8, False, "avx512_bf16", False),
        ("mps", 224, False, "", False),
    ],
)
def test_bf16_is_for_devices_that_have_its_instructions(kind, resolution, native, flags, gains):
    assert _gains(kind, resolution, native=native, flags=flags) is gains


def small_net() -> nn.Module:
    return build_model("convnet-d3-bn-small", channels=1, classes=10, resolution=8, seed=0).eval()


def test_the_inner_layers_alone_are_bf16():
    x = torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    plain = small_net()
    half, precision = search_model(plain, x, "bf16")
    assert precision == "bf16"
    kinds = [
        w.dtype
        for m in half.modules()
        if isinstance(m, nn.Conv2d | nn.Linear)
        for w in m.parameters()
    ]
    assert kinds[0] == kinds[-1] == torch.float32
    assert kinds.count(torch.bfloat16) == len(kinds) - 4
    with torch.no_grad():
        answer, wanted = half(x), plain(x)
    assert answer.dtype == torch.float32
    assert 0 < (answer - wanted).abs().max() < 0.05 * wanted.abs().max()
    assert all(weight.dtype == torch.float32 for weight in plain.parameters())
    assert search_model(plain, x, "fp32")[1] == "fp32"


class Difference(nn.Module):
    """Answers in proportion to how far the first pixel is above 250/255."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Conv2d(1, 1, 1), nn.Conv2d(1, 1, 1), nn.Linear(1, 2)
        for layer in (self.first, self.middle, self.last):
            nn.init.ones_(layer.weight)
            nn.init.zeros_(layer.bias)
        self.first.bias.data.fill_(-250 / 255)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.middle(self.first(x)).flatten(1))


def test_steps_of_a_255th_and_less_reach_the_search():
    """In plain autocast they do not: bf16 has steps of 1/256 just under 1."""
    model = Difference().eval()
    steps = torch.tensor([0.25, 0.5, 1.0, 2.0])[:, None, None, None] / 255
    x = 250 / 255 + steps
    half = in_bf16(model, x)
    assert half is not None
    with torch.no_grad():
        torch.testing.assert_close(half(x)[:, 0], steps.flatten(), rtol=0.01, atol=1e-6)
        with torch.autocast("cpu", torch.bfloat16):
            naive = model(x)[:, 0].float()
    assert ((naive - steps.flatten()).abs() > 0.3 * steps.flatten()).any()


class Odd(nn.Module):
    """A network that answers something else, or not at all, once a layer is in bf16."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.net, self.kind = small_net(), kind

    def forward(self, x: Tensor) -> Tensor:
        half = any(weight.dtype == torch.bfloat16 for weight in self.net.parameters())
        if half and self.kind == "raises":
            raise RuntimeError("not implemented for BFloat16")
        return self.net(x) * (torch.nan if half and self.kind == "nan" else 2 if half else 1)


def test_what_has_nothing_to_gain_or_answers_otherwise_stays_float32():
    x = torch.rand(4, 1, 8, 8)
    two = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 10)).eval()
    for model in (
        two,
        nn.Linear(8, 10),
        *(Odd(kind).eval() for kind in ("raises", "nan", "twice")),
    ):
        images = x if not isinstance(model, nn.Linear) else x.flatten(1)[:, :8]
        assert in_bf16(model, images) is None
        assert search_model(model, images, "bf16")[1] == "fp32"


# That a break counts only where the float32 model is broken.


class Eager(nn.Module):
    """A copy that takes everything for broken, with margin `margin`."""

    def __init__(self, model: nn.Module, y: Tensor, margin: float) -> None:
        super().__init__()
        self.model, self.margin, self.label = model, margin, int(y[0])

    def forward(self, x: Tensor) -> Tensor:
        answer = 0 * self.model(x)
        answer[:, self.label] = answer[:, self.label] + 1 + self.margin
        answer[:, (self.label + 1) % 10] = 1 + answer[:, (self.label + 1) % 10]
        return answer


@pytest.mark.parametrize(("margin", "searched_again"), [(-0.5, True), (0.005, True), (0.5, False)])
def test_where_the_copy_is_broken_or_nearly_so_the_network_itself_is_searched(
    margin, searched_again
):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).eval(), torch.rand(30, 1, 8, 8)
    with torch.no_grad():
        y = model(x).argmax(1)
    index = (y == y[0]).nonzero().squeeze(1)
    attack = PGD(threat=FAR, steps=10, step=Fraction(1, 10), random_start=False)
    wanted = run_batch(attack, model, x, y, index, seed=0).broken
    assert wanted.all()
    eager = Eager(model, y, margin).eval()
    found = run_batch(attack, model, x, y, index, seed=0, searched=eager, slack=0.01).broken
    assert torch.equal(found, wanted) is searched_again
    never = PGD(threat=ThreatModel("linf", Fraction(1, 10**6)), steps=1)
    assert not run_batch(never, model, x, y, index, seed=0, searched=eager, slack=0.01).broken.any()


# That nothing passes for official.


def test_no_finished_stage_is_shared_between_the_tiers(tmp_path):
    from accelerate import Accelerator

    from guardbench.progress import Progress
    from guardbench.runtime import Run

    run = Run(accelerator=Accelerator(cpu=True), workspace=tmp_path, seed=0, progress=Progress())
    protocol = load_protocol("digits")
    own = protocol.model_copy(
        update={
            "test": protocol.test.model_copy(update={"sha256": None}),
            "attacks": tuple(
                a.model_copy(update={"images_per_seed": None}) for a in protocol.attacks
            ),
        }
    )

    def keys(sample):
        plan = scoring_plan.plan_scoring(
            run, own, seed=0, position=0, subject="s", test_digest="d", engine="guardbench",
            sample=sample,
        )  # fmt: skip
        return [stage.folder.key for stage in plan.stages]

    every = [key for sample in (None, 300, 100) for key in keys(sample)]
    assert len(set(every)) == len(every), "even where the dev tier measures all images"


def test_a_dev_record_is_not_published(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["run", "--method", "guard", "--dataset", "digits", "--tier", "dev", "--publish"]
    result = CliRunner().invoke(app, words)
    assert isinstance(result.exception, GuardbenchError)
    assert str(result.exception) == (
        "--publish: a dev record is unofficial; publish without --tier dev."
    )
