"""Augmentations: the numbers and distribution of torchvision, gradients, and repeatable draws."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from guardbench.data import augment

torch.set_num_threads(1)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pictures(n: int = 6, size: tuple[int, int] = (20, 20), seed: int = 0) -> Tensor:
    return torch.rand((n, 3, *size), generator=seeded(seed))


@settings(max_examples=30, deadline=None)
@given(data=st.data(), height=st.integers(2, 40), width=st.integers(2, 40), size=st.integers(1, 50))
def test_crops_equal_torchvisions(data: st.DataObject, height: int, width: int, size: int) -> None:
    functional = pytest.importorskip("torchvision.transforms.v2.functional")
    images = pictures(3, (height, width))
    boxes, flips = [], []
    for _ in range(3):
        h, w = data.draw(st.integers(1, height)), data.draw(st.integers(1, width))
        top, left = data.draw(st.integers(0, height - h)), data.draw(st.integers(0, width - w))
        boxes.append((top, left, h, w))
        flips.append(data.draw(st.booleans()))
    ours = augment.apply_crops(images, torch.tensor(boxes), torch.tensor(flips), size)
    for image, box, flip, mine in zip(images, boxes, flips, ours, strict=True):
        theirs = functional.resized_crop(image, *box, size=[size, size], antialias=False)
        theirs = functional.horizontal_flip(theirs) if flip else theirs
        torch.testing.assert_close(mine, theirs, atol=2e-5, rtol=0)


def test_both_ways_of_sampling_agree_with_their_gradients() -> None:
    images = pictures(5, (24, 17)).requires_grad_()
    boxes = augment.draw_crops(5, (24, 17), (0.08, 1), seeded())
    rows = augment._centres(boxes[:, 0].float(), boxes[:, 2].float(), 16)
    columns = augment._centres(boxes[:, 1].float(), boxes[:, 3].float(), 16)
    one = augment.apply_crops(images, boxes, None, 16)
    two = augment.sample_axes(images, rows, columns)
    torch.testing.assert_close(one, two, atol=2e-5, rtol=0)
    weight = pictures(5, (16, 16), seed=3)
    (first,) = torch.autograd.grad((one * weight).sum(), images)
    (second,) = torch.autograd.grad((two * weight).sum(), images)
    torch.testing.assert_close(first, second, atol=1e-4, rtol=0)


def test_whole_image_is_the_image() -> None:
    images = pictures()
    boxes = torch.tensor([[0, 0, 20, 20]] * 6)
    torch.testing.assert_close(
        augment.apply_crops(images, boxes, None, 20), images, atol=1e-5, rtol=0
    )
    mirrored = augment.apply_crops(images, boxes, torch.ones(6, dtype=torch.bool), 20)
    torch.testing.assert_close(mirrored, images.flip(-1), atol=1e-5, rtol=0)


def test_crop_sees_nothing_beside_its_box() -> None:
    images = torch.ones(1, 1, 16, 16)
    images[:, :, 4:8, 4:8] = 0
    assert augment.apply_crops(images, torch.tensor([[4, 4, 4, 4]]), None, 16).max() == 0


def test_gradients_flow_to_the_pixels_inside_only() -> None:
    images = pictures(2, (16, 16)).requires_grad_()
    boxes = torch.tensor([[2, 3, 8, 6], [0, 0, 16, 16]])
    augment.apply_crops(images, boxes, torch.tensor([True, False]), 16).sum().backward()
    assert images.grad is not None
    inside = torch.zeros(16, 16, dtype=torch.bool)
    inside[2:10, 3:9] = True
    assert (images.grad[0][:, inside] > 0).all()
    assert (images.grad[0][:, ~inside] == 0).all()
    assert (images.grad[1] > 0).all()


def test_gradients_are_right_by_finite_differences() -> None:
    boxes = torch.tensor([[1, 0, 3, 4]])
    images = torch.rand(1, 1, 5, 5, dtype=torch.float64, generator=seeded(), requires_grad=True)
    rows = augment._centres(boxes[:, 0].double(), boxes[:, 2].double(), 4)
    sampled = augment.apply_crops(images, boxes, None, 4)
    assert sampled.dtype == torch.float64
    (grad,) = torch.autograd.grad(sampled[0, 0, 2, 1], images)
    assert rows.shape == (1, 4)
    # A bilinear sample is linear in the image: the gradient is the weights, and they sum to one.
    assert grad.sum().item() == pytest.approx(1, abs=1e-5)
    assert (grad * images).sum().item() == pytest.approx(sampled[0, 0, 2, 1].item(), abs=1e-6)


def test_half_precision_keeps_its_type() -> None:
    images = pictures().to(torch.bfloat16)
    boxes = augment.draw_crops(len(images), 20, (0.3, 1), seeded())
    assert augment.apply_crops(images, boxes, None, 12).dtype == torch.bfloat16


@pytest.mark.parametrize("size", [64, (48, 80), (10, 100)])
@pytest.mark.parametrize("scale", [(0.08, 1.0), (0.5, 0.5), (1.0, 1.0)])
def test_boxes_lie_inside_with_the_area_asked_for(
    size: int | tuple[int, int], scale: tuple[float, float]
) -> None:
    height, width = (size, size) if isinstance(size, int) else size
    boxes = augment.draw_crops(2000, size, scale, seeded())
    assert boxes.dtype == torch.int64
    top, left, h, w = boxes.unbind(1)
    assert (boxes >= 0).all()
    assert (h >= 1).all()
    assert (w >= 1).all()
    assert (top + h <= height).all()
    assert (left + w <= width).all()


def test_boxes_are_distributed_as_torchvisions() -> None:
    transforms = pytest.importorskip("torchvision.transforms")
    torch.manual_seed(0)
    image, n = torch.zeros(3, 64, 48), 4000
    ratio = list(augment.RATIO)
    theirs = torch.tensor(
        [transforms.RandomResizedCrop.get_params(image, [0.08, 1.0], ratio) for _ in range(n)],
        dtype=torch.float64,
    )
    ours = augment.draw_crops(n, (64, 48), (0.08, 1.0), seeded()).double()
    for sample in (
        lambda b: b[:, 0],
        lambda b: b[:, 1],
        lambda b: b[:, 2],
        lambda b: b[:, 3],
        lambda b: b[:, 2] * b[:, 3],
        lambda b: b[:, 3] / b[:, 2],
        lambda b: b[:, 0] / (65 - b[:, 2]),
    ):
        one, two = sample(ours).sort().values, sample(theirs).sort().values
        points = torch.cat((one, two))
        gap = torch.searchsorted(one, points, right=True) - torch.searchsorted(
            two, points, right=True
        )
        # Kolmogorov and Smirnov: 1.95 is the bound at 0.001 for two samples.
        assert gap.abs().max().item() / n < 1.95 * (2 / n) ** 0.5


@pytest.mark.parametrize("scale", [(0.0, 1.0), (0.9, 0.1), (0.5, 1.5)])
def test_scale_out_of_bounds(scale: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="scale"):
        augment.draw_crops(1, 8, scale, seeded())


def test_draws_depend_on_the_generator_alone() -> None:
    for view in (
        lambda g: augment.draw_crops(6, 20, (0.08, 1.0), g),
        lambda g: augment.draw_flips(6, g),
        lambda g: augment.draw_cutmix(6, 20, 1.0, g)[0],
    ):
        first = view(seeded(7))
        torch.manual_seed(1)
        assert torch.equal(first, view(seeded(7)))
        generator = seeded(7)
        assert not all(torch.equal(first, view(generator)) for _ in range(8))


def test_flips_are_half_and_each_is_whole() -> None:
    images = pictures(200, (4, 4))
    flips = augment.draw_flips(200, seeded())
    assert 60 < int(flips.sum()) < 140
    whole = torch.tensor([[0, 0, 4, 4]]).expand(200, -1)
    seen = augment.apply_crops(images, whole, flips, 4)
    for image, view, flip in zip(images, seen, flips, strict=True):
        torch.testing.assert_close(view, image.flip(-1) if flip else image, atol=1e-6, rtol=0)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 1 << 30), st.floats(0.1, 4), st.integers(1, 5), st.integers(1, 30))
def test_cutmix_takes_one_rectangle_from_the_partner(
    seed: int, alpha: float, n: int, side: int
) -> None:
    images = torch.arange(n, dtype=torch.float32)[:, None, None, None].expand(n, 2, side, side + 3)
    permutation, box = augment.draw_cutmix(n, (side, side + 3), alpha, seeded(seed))
    mixed = augment.apply_cutmix(images, permutation, box)
    assert sorted(permutation.tolist()) == list(range(n))
    inside = torch.zeros(side, side + 3, dtype=torch.bool)
    inside[box.top : box.top + box.height, box.left : box.left + box.width] = True
    assert int(inside.sum()) == box.height * box.width
    assert box.lam == pytest.approx(1 - inside.float().mean().item(), abs=1e-6)
    for index in range(n):
        assert (mixed[index][:, inside] == permutation[index]).all()
        assert (mixed[index][:, ~inside] == index).all()
    assert all((image == index).all() for index, image in enumerate(images)), "the images stay"


def test_cutmix_share_and_refusal() -> None:
    generator = seeded()
    kept = [augment.draw_cutmix(4, 64, 1.0, generator)[1].lam for _ in range(3000)]
    # Uniform cut area, less what falls over the border: the mean is between 1/2 and 3/4.
    assert 0.55 < sum(kept) / len(kept) < 0.75
    assert min(kept) < 0.1
    assert max(kept) > 0.98
    with pytest.raises(ValueError, match="alpha"):
        augment.draw_cutmix(4, 64, 0.0, generator)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_sees_the_same_views_and_repeats_its_gradients() -> None:
    images = pictures(16, (32, 32))
    boxes = augment.draw_crops(16, 32, (0.08, 1.0), seeded())
    flip = augment.draw_flips(16, seeded())
    here = augment.apply_crops(images, boxes, flip, 32)
    there = images.cuda()
    torch.testing.assert_close(
        augment.apply_crops(there, boxes, flip, 32).cpu(), here, atol=2e-5, rtol=0
    )
    there.requires_grad_()
    gradients = [
        torch.autograd.grad(augment.apply_crops(there, boxes, flip, 32).square().sum(), there)[0]
        for _ in range(5)
    ]
    assert all(torch.equal(gradients[0], gradient) for gradient in gradients[1:])
