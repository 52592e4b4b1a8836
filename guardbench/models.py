"""Teachers and students: torchvision's ResNets with a stem that fits the resolution, DC's ConvNet.

Every model maps float32 images in [0, 1] to logits and owns its normalisation, so an attack, a
distiller and a stranger's code all see plain images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torchvision  # type: ignore[import-untyped]
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from guardbench.errors import GuardbenchError, brief
from guardbench.protocol import unknown
from guardbench.store import write_bytes

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Classifier(nn.Module):
    """A backbone behind its normalisation: [N, C, H, W] in [0, 1] to logits [N, K].

    Attributes:
        backbone: what sees normalised images.
        mean, std: buffers [C, 1, 1]; they travel with the weights.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, backbone: nn.Module, channels: int) -> None:
        super().__init__()
        self.backbone = backbone
        mean, std = (IMAGENET_MEAN, IMAGENET_STD) if channels == 3 else ((0.5,), (0.5,))
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1))

    def normalise(self, images: Tensor) -> Tensor:
        """[0, 1] images to what the backbone sees, in its memory format."""
        return ((images - self.mean) / self.std).contiguous(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [N, K] of images [N, C, H, W] in [0, 1]."""
        logits: Tensor = self.backbone(self.normalise(images))
        return logits


class ConvNet(nn.Module):
    """The ConvNet of DC (Zhao et al., ICLR 2021, section 4): blocks of 3x3 convolution, norm, ReLU, pool.

    Args:
        depth: blocks; each halves the resolution by 2x2 average pooling.
        width: channels of every block.
        norm: `instance` as in DC, or `batch` where a method reads BN statistics.
    """

    def __init__(
        self, channels: int, classes: int, resolution: int, *, depth: int, width: int, norm: str
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for block in range(depth):
            layers.append(nn.Conv2d(width if block else channels, width, 3, padding=1))
            # DC's instance norm is a group norm with one group a channel, and has affine weights.
            layers.append(nn.BatchNorm2d(width) if norm == "batch" else nn.GroupNorm(width, width))
            layers += [nn.ReLU(), nn.AvgPool2d(2)]
        self.features = nn.Sequential(*layers)
        side = resolution // 2**depth
        if side < 1:
            raise GuardbenchError(
                f"a ConvNet of depth {depth} needs images of {2**depth} px or more, not {resolution}."
            )
        self.classifier = nn.Linear(width * side * side, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [N, K] of normalised images."""
        logits: Tensor = self.classifier(self.features(images).flatten(1))
        return logits


def fit_stem(net: torchvision.models.ResNet, channels: int, resolution: int) -> None:
    """Replaces the first layers of a ResNet, in place, by ones that fit the resolution.

    | resolution | stem | feature map before layer1 |
    |---|---|---|
    | up to 32 | 3x3, stride 1, no pooling (He et al., CIFAR) | as the image |
    | up to 64 | 3x3, stride 2, max-pooling | a quarter a side, as at 224 |
    | larger | stock: 7x7, stride 2, max-pooling | a quarter a side |
    """
    if resolution <= 32:
        net.conv1 = nn.Conv2d(channels, 64, 3, stride=1, padding=1, bias=False)
        net.maxpool = nn.Identity()
    elif resolution <= 64:
        net.conv1 = nn.Conv2d(channels, 64, 3, stride=2, padding=1, bias=False)
    elif channels != 3:
        net.conv1 = nn.Conv2d(channels, 64, 7, stride=2, padding=3, bias=False)


def _resnet(depth: str) -> Callable[[int, int, int], nn.Module]:
    def build(channels: int, classes: int, resolution: int) -> nn.Module:
        net: nn.Module = getattr(torchvision.models, f"resnet{depth}")(
            weights=None, num_classes=classes
        )
        fit_stem(net, channels, resolution)
        return net

    return build


def _convnet(width: int, norm: str) -> Callable[[int, int, int], nn.Module]:
    def build(channels: int, classes: int, resolution: int) -> nn.Module:
        return ConvNet(channels, classes, resolution, depth=3, width=width, norm=norm)

    return build


ARCHITECTURES: dict[str, Callable[[int, int, int], nn.Module]] = {
    "resnet18": _resnet("18"),
    "resnet50": _resnet("50"),
    "convnet-d3": _convnet(128, "instance"),
    "convnet-d3-bn": _convnet(128, "batch"),
    "convnet-d3-bn-small": _convnet(32, "batch"),
}


def build_model(
    arch: str, *, channels: int, classes: int, resolution: int, seed: int
) -> Classifier:
    """A freshly initialised classifier; equal seeds give equal weights, the global RNG is not moved.

    Raises:
        GuardbenchError: no such architecture, or it does not fit the resolution.
    """
    if arch not in ARCHITECTURES:
        raise unknown("architecture", arch, ARCHITECTURES)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        backbone = ARCHITECTURES[arch](channels, classes, resolution)
    model = Classifier(backbone, channels)
    return model.to(memory_format=torch.channels_last)


def batch_norms(model: nn.Module) -> list[nn.BatchNorm2d]:
    """The model's BatchNorm layers in the order of their definition."""
    return [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]


@contextmanager
def running_statistics_kept(model: nn.Module) -> Iterator[None]:
    """Inside, a training-mode forward uses batch statistics without moving the running ones."""
    layers = batch_norms(model)
    momenta = [layer.momentum for layer in layers]
    counts = [layer.num_batches_tracked for layer in layers]
    for layer in layers:
        layer.momentum = 0.0
        # The counter would otherwise move by one a forward.
        layer.num_batches_tracked = None
    try:
        yield
    finally:
        for layer, momentum, count in zip(layers, momenta, counts, strict=True):
            layer.momentum = momentum
            layer.num_batches_tracked = count


def save_weights(model: nn.Module, path: Path) -> None:
    """Writes a model's parameters and buffers as safetensors, whole or not at all."""
    state = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    write_bytes(path, save(state))


def load_weights(model: nn.Module, path: Path) -> None:
    """Loads what `save_weights` wrote; one clear line when the file is not of this architecture."""
    try:
        state: Mapping[str, Any] = load_file(path)
        model.load_state_dict(state, strict=True)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise GuardbenchError(
            f"{path}: not weights of this architecture: {brief(error)}"
        ) from error
