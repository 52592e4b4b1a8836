"""Anybody's arrays of images as float32 [N, C, H, W] in [0, 1]: axes, ranges, normalisations, ZCA."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from guardbench.errors import GuardbenchError
from guardbench.normalisation import NORMALISATIONS, numbers_text, read_normalisation
from guardbench.tensor_files import load_npz, load_safetensors

LAYOUTS = ("nchw", "nhwc")
TOLERANCE = 1 / 510
"""Half a step of an 8-bit pixel: what lies no further outside [0, 1] is taken for rounding."""
MOST_VALUES = 1 << 31
"""Pixels times channels, over all images."""
MOST_SIDE = 1024
MOST_WHITENED = 3 * 64 * 64
"""Values of an image that a ZCA matrix may have."""
NUMBERS = (
    torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64,
    torch.float16, torch.bfloat16, torch.float32, torch.float64,
)  # fmt: skip
_SINGLE = 1e-6  # what float32 itself is off by: no pixel is another for it, so nothing is said
_CHANNELS = (1, 3)
_AT_ONCE = 64  # images that are in float64 at a time


def check_tensor(values: Tensor, where: str) -> Tensor:
    """The same tensor without a gradient, once it is known to be plain numbers of bearable size.

    Raises:
        GuardbenchError: sparse, quantised, on no CPU, complex, or of more than `MOST_VALUES`.
    """
    plain = values.layout == torch.strided and values.device.type == "cpu"
    if not plain or values.is_quantized or values.dtype not in NUMBERS:
        raise GuardbenchError(
            f"{where}: is {values.dtype} ({values.layout}, {values.device.type}), not plain numbers; "
            "save a dense tensor of float32, uint8 or int64 on the CPU."
        )
    # A stride of 0 lets a file of a few bytes speak of a tensor of any size.
    if values.numel() > MOST_VALUES:
        raise GuardbenchError(
            f"{where}: {list(values.shape)} is more than {MOST_VALUES} values; send fewer images."
        )
    return values.detach()


def channels_first(
    images: Tensor, where: str, *, layout: str | None, channels: int | None
) -> tuple[Tensor, str]:
    """Images [N, C, H, W] of any numbers, and how their axes were read.

    The channels are the axis of 1 or 3 that leaves square images.

    Args:
        images: [N, C, H, W], [N, H, W, C], or grey [N, H, W].
        layout: `nchw` or `nhwc` decides; None leaves it to the shape.
        channels: of the dataset, None if not known.

    Raises:
        GuardbenchError: neither order or both give square images, or not the dataset's channels.
    """
    shape = list(images.shape)
    grey = images.ndim == 3
    images = images.unsqueeze(1) if grey else images
    if images.ndim != 4 or not images.numel():
        raise GuardbenchError(
            f"{where}: images: shape {shape}; an array [N, C, H, W] or [N, H, W, C] is expected."
        )
    orders = {"nchw": images, "nhwc": images.permute(0, 3, 1, 2)}
    fit = {
        name: one
        for name, one in orders.items()
        if ("nchw" if grey else layout) in (None, name)
        and one.shape[1] in ((channels,) if channels else _CHANNELS)
        and one.shape[2] == one.shape[3] <= MOST_SIDE
    }
    if not fit:
        raise GuardbenchError(
            f"{where}: images: shape {shape}{f', read as {layout},' if layout else ''} is not square "
            f"images of {channels or '1 or 3'} channels and at most {MOST_SIDE} pixels; save one array "
            "[N, C, H, W]" + (", or leave out --layout." if layout else ".")
        )
    if len(fit) > 1 and shape[1:] != [1, 1, 1]:
        raise GuardbenchError(
            f"{where}: images: shape {shape} can be read as {' and as '.join(fit)}; say which: --layout."
        )
    name, found = next(iter(fit.items()))
    how = "as --layout says" if layout else "by its axis of channels"
    axes = "[N, H, W]" if grey else f"{name.upper()} {how}"
    colour = "grey" if found.shape[1] == 1 else "colour"
    side = found.shape[2]
    return (
        found,
        f"images: {len(found)} of {side} x {side} in {colour}, shape {shape} read as {axes}",
    )


@dataclass(frozen=True)
class Ranged:
    """What is to be known about values to bring them into [0, 1].

    Attributes:
        normalisation: its name or numbers, or None where that is not known.
        source: who says so.
        candidates: names of those that may be guessed.
        why: what the candidates are, such as `known` or `that DC uses for cifar10`.
        clip: whether values further outside than `TOLERANCE` are cut off.
        advice: what to do where nothing may be guessed; where it is given, nothing is.
    """

    normalisation: str | None = None
    source: str = "as --normalisation says"
    candidates: tuple[str, ...] = tuple(NORMALISATIONS)
    why: str = "known"
    clip: bool = False
    advice: str = ""


def to_unit(images: Tensor, where: str, ranged: Ranged) -> tuple[Tensor, list[str]]:
    """Images as float32 in [0, 1], and what was found and done.

    Args:
        images: [N, C, H, W] of any numbers.
        where: names the file in an error.

    Raises:
        GuardbenchError: NaN or infinity; values outside [0, 1] of which nobody says what they are
            and that not exactly one known normalisation explains; or values outside it after that.
    """
    if images.is_floating_point() and not bool(torch.isfinite(images).all()):
        raise GuardbenchError(f"{where}: images: hold NaN or infinity; remove what caused them.")
    channels = images.shape[1]
    low = images.amin(dim=(0, 2, 3)).double()
    high = images.amax(dim=(0, 2, 3)).double()
    name, said = ranged.normalisation, f"range: {_ranges(low, high)}; "
    if name is not None:
        said += f"normalisation {name}, {ranged.source}"
    elif not images.is_floating_point():
        name = _of_integers(low, high, where)
        said += "whole numbers"
    elif bool((low >= -TOLERANCE).all()) and bool((high <= 1 + TOLERANCE).all()):
        name = "none"
        said += "taken as they are"
    else:
        name, reason = _guess(low, high, channels, where, ranged)
        said += f"assumed to be in normalisation {name}: {reason}"
    mean, std = (values.double() for values in read_normalisation(name, channels))
    if name == "none":
        images = images.to(torch.float32, copy=True)
    elif name == "bytes":
        images = images.to(torch.float32) / 255
        said += "; divided by 255"
    else:
        images = in_pieces(images, lambda piece: (piece * std).add_(mean))
        said += f"; undone with {numbers_text(mean)}/{numbers_text(std)}"
    return _within(images, where, said, name, ranged.clip)


def in_pieces(images: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """`change` of float64 [n, C, H, W], a few images at a time, as float32 [N, C, H, W]."""
    made = torch.empty(images.shape, dtype=torch.float32)
    for start in range(0, len(images), _AT_ONCE):
        piece = images[start : start + _AT_ONCE].to(torch.float64)
        made[start : start + _AT_ONCE] = change(piece)
    return made


def _of_integers(low: Tensor, high: Tensor, where: str) -> str:
    if low.min() < 0 or high.max() > 255:
        raise GuardbenchError(
            f"{where}: images: whole numbers with {_ranges(low, high)}; 0 to 255 is expected. "
            "Say what they are: --normalisation MEAN,.../STD,...."
        )
    if high.max() <= 1:
        raise GuardbenchError(
            f"{where}: images: whole numbers, none above 1; say --normalisation none if 1 is white, "
            "or --normalisation bytes if 255 is."
        )
    return "bytes"


def _guess(low: Tensor, high: Tensor, channels: int, where: str, ranged: Ranged) -> tuple[str, str]:
    """The one known normalisation that explains the values, and why it is the one."""
    observed = f"{where}: images: values lie outside [0, 1], with {_ranges(low, high)}; "
    if ranged.advice:
        raise GuardbenchError(observed + ranged.advice)
    fits, tight, off = [], [], {}
    for name in ranged.candidates:
        mean, std = NORMALISATIONS[name]
        if len(mean) != channels and name not in ("half", "bytes", "none"):
            continue
        shift, scale = (torch.tensor(values, dtype=torch.float64) for values in (mean, std))
        least, most = low * scale + shift, high * scale + shift
        off[name] = max(-least.min().item(), most.max().item() - 1)
        if off[name] <= TOLERANCE:
            fits.append(name)
            if least.abs().max() <= TOLERANCE and (most - 1).abs().max() <= TOLERANCE:
                tight.append(name)
    if len(fits) == 1:
        return fits[0], f"of those {ranged.why} it alone gives values in [0, 1]"
    if len(tight) == 1:
        return tight[0], (
            f"of those {ranged.why} it alone gives black and white as extremes of every channel"
        )
    if fits:
        raise GuardbenchError(
            f"{observed}{', '.join(fits)} would all explain them; say which: --normalisation NAME."
        )
    near = min(off, key=lambda name: off[name])
    raise GuardbenchError(
        f"{observed}none of {', '.join(off)} ({ranged.why}) explains them: {near} comes nearest and "
        f"leaves values up to {off[near]:.3g} outside. Say --normalisation NAME or MEAN,.../STD,..., with "
        "--clip if images were never held in [0, 1], or --zca FILE if they are whitened."
    )


def _within(
    images: Tensor, where: str, said: str, name: str, clip: bool
) -> tuple[Tensor, list[str]]:
    """Cuts off what lies outside [0, 1], which is said, and refused where it is more than rounding."""
    least, most = images.min().item(), images.max().item()
    by = max(-least, most - 1)
    if by <= _SINGLE:
        return images.clamp_(0, 1), [said]
    outside = int(((images < -_SINGLE) | (images > 1 + _SINGLE)).sum())
    share = f"{outside} of {images.numel()} values ({100 * outside / images.numel():.2g} %)"
    if by > TOLERANCE and not clip:
        raise GuardbenchError(
            f"{where}: images: {share} lie outside [0, 1] by up to {by:.4g}, undone with "
            f"{name}; --clip cuts them off, or say another --normalisation."
        )
    return images.clamp_(0, 1), [said, f"clipped: {share}, by {by:.2g} at most"]


def _ranges(low: Tensor, high: Tensor) -> str:
    pairs = [f"[{a:.4g}, {b:.4g}]" for a, b in zip(low.tolist(), high.tolist(), strict=True)]
    return f"{pairs[0]}" if len(pairs) == 1 else f"{', '.join(pairs)} by channel"


@dataclass(frozen=True)
class Whitening:
    """A ZCA whitening w = (x - mean) @ matrix of flattened images, D = C x H x W in that order.

    Attributes:
        mean: float64 [D].
        matrix, inverse: float64 [D, D]; at least one is there, and `inverse` is preferred.
    """

    mean: Tensor
    matrix: Tensor | None
    inverse: Tensor | None

    def undo(self, images: Tensor, where: str) -> Tensor:
        """Images float32 [N, C, H, W] from whitened ones of that shape.

        Raises:
            GuardbenchError: they have another number of values, or the matrix has no inverse.
        """
        if images[0].numel() != len(self.mean):
            raise GuardbenchError(
                f"{where}: images: {list(images.shape[1:])} is {images[0].numel()} values an image, "
                f"and --zca is for {len(self.mean)}; name the whitening that was used."
            )
        flat = images.reshape(len(images), -1).to(torch.float64)
        if self.inverse is not None:
            plain = flat @ self.inverse
        else:
            assert self.matrix is not None
            try:
                plain = torch.linalg.solve(self.matrix, flat, left=False)
            except RuntimeError as error:  # torch.linalg.LinAlgError is one
                raise GuardbenchError(
                    f"{where}: --zca: the matrix has no inverse; give `inverse` in its file."
                ) from error
            if not torch.allclose(plain @ self.matrix, flat, rtol=1e-4, atol=1e-4):
                raise GuardbenchError(
                    f"{where}: --zca: the matrix is too close to one without an inverse; give "
                    "`inverse` in its file."
                )
        return (plain + self.mean).reshape(images.shape).to(torch.float32)


_NAMES = {
    "mean": ("mean", "mean_vector"),
    "matrix": ("matrix", "transform_matrix"),
    "inverse": ("inverse", "transform_inv"),
}


def load_whitening(path: Path) -> Whitening:
    """The whitening in a .safetensors or .npz file.

    It holds `mean` [D] and `matrix` [D, D], `inverse` [D, D] or both; `mean_vector`,
    `transform_matrix` and `transform_inv`, as kornia's ZCAWhitening calls them, are read too.

    Raises:
        GuardbenchError: no such file, one of them missing, of another shape, not finite, or too large.
    """
    found = load_npz(path) if path.suffix == ".npz" else load_safetensors(path)
    picked: dict[str, Tensor] = {}
    for field, names in _NAMES.items():
        name = next((name for name in names if name in found), None)
        if name is not None:
            picked[field] = check_tensor(found[name], f"--zca {path}: {name}")
    if "mean" not in picked or len(picked) < 2:
        raise GuardbenchError(
            f"--zca {path}: needs `mean` [D] and `matrix` or `inverse` [D, D], D = C x H x W; save them "
            "as .npz or .safetensors."
        )
    size = picked["mean"].numel()
    if size > MOST_WHITENED:
        raise GuardbenchError(f"--zca {path}: mean: {size} values; the most is {MOST_WHITENED}.")
    for field, values in picked.items():
        if field != "mean" and values.shape != (size, size):
            raise GuardbenchError(
                f"--zca {path}: {field}: shape {list(values.shape)}, where `mean` has {size} values; "
                "save both of one whitening."
            )
        picked[field] = values.to(torch.float64)
        if not bool(torch.isfinite(picked[field]).all()):
            raise GuardbenchError(f"--zca {path}: {field}: holds NaN or infinity; save it anew.")
    return Whitening(picked["mean"].flatten(), picked.get("matrix"), picked.get("inverse"))
