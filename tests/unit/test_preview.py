"""The picture of a distilled set."""

import numpy as np
import pytest
import torch
from PIL import Image

from guardbench.distilled import save_preview


@pytest.mark.parametrize("classes", [10, 25])
def test_the_picture_has_a_row_a_class_and_its_images_in_order(tmp_path, classes: int) -> None:
    """Red tells an image's class and blue its place in the class; the images come shuffled."""
    hard = torch.arange(classes).repeat(3)[
        torch.randperm(3 * classes, generator=torch.Generator().manual_seed(0))
    ]
    images, seen = torch.zeros(len(hard), 3, 16, 16), [0] * classes
    for index, label in enumerate(hard.tolist()):
        images[index, 0], images[index, 2] = label / classes, seen[label] / 2
        seen[label] += 1
    save_preview(tmp_path / "p.png", images, hard, tuple(f"class {k}" for k in range(classes)))
    with Image.open(tmp_path / "p.png") as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    rows = min(classes, 20)  # as documented
    # A note below says that there are more; a row is an inch, of at least 64 dots.
    side = 64
    below = pixels[rows * side :]
    assert (below.size > 0) == (classes > rows)
    assert (below.min(initial=255) < 128) == (classes > rows)
    for row in range(rows):
        for column in range(3):
            x = pixels.shape[1] - (3 - column - 0.5) * side  # the names are on the left
            red, green, blue = pixels[int((row + 0.5) * side), int(x)]
            assert abs(red - 255 * row / classes) < 2
            assert green == 0
            assert abs(blue - 255 * column / 2) < 2
