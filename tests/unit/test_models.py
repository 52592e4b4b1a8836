import pytest
import torch
from torch import nn

from guardbench import models
from guardbench.errors import GuardbenchError
from guardbench.models import (
    ARCHITECTURES,
    IMAGENET_MEAN,
    IMAGENET_STD,
    SmallMapConv2d,
    batch_norms,
    build_model,
    folded,
    load_weights,
    running_statistics_kept,
    save_weights,
)


@pytest.mark.parametrize("arch", sorted(ARCHITECTURES))
@pytest.mark.parametrize("channels", [1, 3])
def test_every_architecture_answers_logits_at_every_stem(arch: str, channels: int) -> None:
    for resolution in (32, 64, 96):
        model = build_model(arch, channels=channels, classes=7, resolution=resolution, seed=0)
        model.eval()
        with torch.no_grad():
            assert model(torch.rand(2, channels, resolution, resolution)).shape == (2, 7)


@pytest.mark.parametrize(("resolution", "side"), [(32, 32), (64, 16), (224, 56)])
def test_the_stem_fits_the_resolution(resolution: int, side: int) -> None:
    model = build_model("resnet18", channels=3, classes=10, resolution=resolution, seed=0).eval()
    seen: list[torch.Size] = []
    model.backbone.layer1.register_forward_pre_hook(lambda _m, args: seen.append(args[0].shape))
    with torch.no_grad():
        model(torch.rand(1, 3, resolution, resolution))
    assert seen == [(1, 64, side, side)]


def test_at_224_it_is_torchvisions_network() -> None:
    import torchvision

    stock = torchvision.models.resnet18(num_classes=10)
    ours = build_model("resnet18", channels=3, classes=10, resolution=224, seed=0).backbone
    ours.load_state_dict(stock.state_dict())
    x = torch.rand(1, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(x), stock.eval()(x))


def test_the_model_owns_its_normalisation() -> None:
    model = build_model("convnet-d3", channels=3, classes=5, resolution=8, seed=0).eval()
    x = torch.rand(4, 3, 8, 8)
    mean = torch.tensor(IMAGENET_MEAN).view(-1, 1, 1)
    std = torch.tensor(IMAGENET_STD).view(-1, 1, 1)
    with torch.no_grad():
        torch.testing.assert_close(model(x), model.backbone((x - mean) / std))


def test_dcs_norm_is_an_affine_instance_norm() -> None:
    model = build_model("convnet-d3", channels=3, classes=5, resolution=8, seed=0)
    norm = next(m for m in model.modules() if isinstance(m, nn.GroupNorm))
    x = torch.randn(2, 128, 8, 8)
    torch.testing.assert_close(norm(x), nn.functional.instance_norm(x), rtol=1e-4, atol=1e-4)
    assert norm.affine
    assert not batch_norms(model)


def test_equal_seeds_give_equal_weights_and_leave_the_global_generator_alone() -> None:
    before = torch.random.get_rng_state()
    one, two, other = (
        build_model("convnet-d3-bn-small", channels=1, classes=3, resolution=8, seed=s)
        for s in (5, 5, 6)
    )
    assert torch.equal(before, torch.random.get_rng_state())
    pairs = list(zip(one.parameters(), two.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in pairs)
    assert any(
        not torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True)
    )


def test_running_statistics_are_kept_inside_and_move_outside() -> None:
    model = build_model("convnet-d3-bn-small", channels=1, classes=3, resolution=8, seed=0).train()
    norm = batch_norms(model)[0]
    start = norm.running_mean.clone()
    with running_statistics_kept(model):
        model(torch.rand(4, 1, 8, 8))
        model(torch.full((4, 1, 8, 8), torch.nan))
    assert torch.equal(norm.running_mean, start)
    assert int(norm.num_batches_tracked) == 0
    model(torch.rand(4, 1, 8, 8))
    assert not torch.equal(norm.running_mean, start)
    assert int(norm.num_batches_tracked) == 1


def test_weights_come_back_as_they_went(tmp_path) -> None:
    one = build_model("resnet18", channels=3, classes=4, resolution=32, seed=1)
    two = build_model("resnet18", channels=3, classes=4, resolution=32, seed=2)
    save_weights(one, tmp_path / "w.safetensors")
    load_weights(two, tmp_path / "w.safetensors")
    for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("damage", ["truncated", "other", "missing"])
def test_weights_that_do_not_fit_are_one_line(tmp_path, damage: str) -> None:
    path = tmp_path / "w.safetensors"
    arch = "convnet-d3" if damage == "other" else "convnet-d3-bn"
    save_weights(build_model(arch, channels=1, classes=4, resolution=8, seed=1), path)
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    if damage == "missing":
        path.unlink()
    model = build_model("convnet-d3-bn", channels=1, classes=4, resolution=8, seed=1)
    with pytest.raises(GuardbenchError, match=r"w\.safetensors") as caught:
        load_weights(model, path)
    assert "\n" not in str(caught.value)


def test_an_unknown_architecture_names_the_nearest() -> None:
    with pytest.raises(GuardbenchError, match="Did you mean resnet18"):
        build_model("resnet81", channels=3, classes=4, resolution=32, seed=1)


def test_a_convnet_that_pools_everything_away_is_refused() -> None:
    with pytest.raises(GuardbenchError, match="8 px or more"):
        build_model("convnet-d3", channels=1, classes=4, resolution=4, seed=1)


@pytest.mark.parametrize("resolution", [16, 64])
@pytest.mark.parametrize("arch", sorted(ARCHITECTURES))
def test_a_folded_model_has_no_bn_and_the_same_logits_and_input_gradients(
    arch: str, resolution: int
) -> None:
    model = build_model(arch, channels=3, classes=7, resolution=resolution, seed=0).eval()
    model = (
        model.double()
    )  # in float32 a pre-activation beside 0 may fall on either side of the ReLU
    generator = torch.Generator().manual_seed(0)
    for norm in batch_norms(model):
        for value in (norm.running_mean, norm.running_var, norm.weight, norm.bias):
            assert value is not None
            value.data.uniform_(0.5, 1.5, generator=generator)
    fast = folded(model, torch.zeros(1, 3, resolution, resolution, dtype=torch.float64))
    assert not batch_norms(fast)
    assert not any(weight.requires_grad for weight in fast.parameters())
    x = torch.rand(
        4, 3, resolution, resolution, generator=generator, dtype=torch.float64
    ).requires_grad_()
    want, got = model(x), fast(x)
    torch.testing.assert_close(got, want)
    gradients = [torch.autograd.grad(logits[:, 0].sum(), x)[0] for logits in (want, got)]
    torch.testing.assert_close(gradients[1], gradients[0])
    instance = arch in ("convnet-d3", "convnet-d2-small")
    assert batch_norms(model) or instance, "the model itself keeps its BN"


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("side", [1, 2, 4, 5])
def test_small_map_convolution_has_pytorchs_gradients(kernel: int, stride: int, side: int) -> None:
    make = {"kernel_size": kernel, "stride": stride, "padding": kernel // 2, "bias": False}
    fast = SmallMapConv2d(3, 5, **make, dtype=torch.float64)
    plain = nn.Conv2d(3, 5, **make, dtype=torch.float64)
    plain.load_state_dict(fast.state_dict())
    x = torch.randn(4, 3, side, side, dtype=torch.float64, requires_grad=True)
    found = []
    for layer in (fast, plain):
        out = layer(x)
        found.append((out, *torch.autograd.grad(out.square().sum(), (x, layer.weight))))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("side", [2, 4, 5])
def test_small_map_convolution_under_autocast_has_pytorchs_dtypes_and_gradients(side: int) -> None:
    generator = torch.Generator().manual_seed(side)
    fast = SmallMapConv2d(8, 16, 3, padding=1, bias=False)
    plain = nn.Conv2d(8, 16, 3, padding=1, bias=False)
    plain.load_state_dict(fast.state_dict())
    x = torch.randn(6, 8, side, side, generator=generator, requires_grad=True)
    found = []
    for layer in (fast, plain):
        with torch.autocast("cpu", torch.bfloat16):
            out = layer(x)
        assert out.dtype == torch.bfloat16
        loss = out.float().square().sum()
        found.append((out, *torch.autograd.grad(loss, (x, layer.weight))))
    for got, want in zip(*found, strict=True):
        assert got.dtype == want.dtype
        # Both sum in float32 and round once to bfloat16's 8 bits.
        torch.testing.assert_close(
            got, want, rtol=2e-2, atol=2e-2 * float(want.detach().abs().max())
        )
        cosine = nn.functional.cosine_similarity(got.float().flatten(), want.float().flatten(), 0)
        assert cosine > 0.9999


def test_a_gradient_in_the_images_alone_takes_none_of_the_weights(monkeypatch) -> None:
    asked: list[int] = []
    original = models._WeightGradient.backward
    monkeypatch.setattr(
        models._WeightGradient,
        "backward",
        staticmethod(lambda ctx, *gradients: asked.append(1) or original(ctx, *gradients)),
    )
    net = build_model("resnet18", channels=3, classes=2, resolution=64, seed=0)
    x = torch.rand(2, 3, 64, 64, requires_grad=True)
    torch.autograd.grad(net(x).sum(), x)
    assert not asked
    net(x).sum().backward()
    assert len(asked) == 10


def test_small_map_convolution_can_be_differentiated_twice() -> None:
    layer = SmallMapConv2d(2, 3, 3, padding=1, bias=False, dtype=torch.float64)
    x = torch.randn(2, 2, 3, 3, dtype=torch.float64, requires_grad=True)

    def output(images: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(layer, {"weight": weight}, images)

    assert torch.autograd.gradgradcheck(output, (x, layer.weight.detach().requires_grad_()))


def test_resnets_train_through_the_small_map_convolution() -> None:
    net = build_model("resnet18", channels=3, classes=2, resolution=64, seed=0)
    convolutions = [m for m in net.modules() if isinstance(m, nn.Conv2d)]
    assert len(convolutions) == 20
    assert all(isinstance(m, SmallMapConv2d) for m in convolutions)
