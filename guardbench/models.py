"""Teachers and students: torchvision's ResNets with a stem that fits the resolution, DC's ConvNet.

Every model maps float32 images in [0, 1] to logits and owns its normalisation, so an attack, a
distiller and a stranger's code all see plain images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.grad import conv2d_input
from torch.nn.utils.fusion import fuse_conv_bn_eval

from guardbench.errors import GuardbenchError, brief, not_now
from guardbench.protocol import unknown
from guardbench.runtime import Run
from guardbench.store import write_bytes

if TYPE_CHECKING:
    from torchvision.models import ResNet  # type: ignore[import-untyped]

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


SMALL_MAP = 4
"""Output side up to which a CPU takes a convolution's weight gradient faster as one product."""


class SmallMapConv2d(nn.Conv2d):
    """A convolution whose weight gradient on small maps is one matrix product over unfolded inputs.

    On two CPU cores PyTorch's own kernel computes the weight gradient of ResNet-18's last layers at
    64 px at a sixth of the speed of its forward pass; unfolded, a whole training step is 1.2 to 1.4
    times as fast (`benchmarks/training.py`). Forward and input gradient are PyTorch's; results differ by
    rounding.
    """

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        side = input.shape[-1] // self.stride[0]
        plain = bias is not None or self.groups > 1 or self.dilation != (1, 1)
        if input.device.type != "cpu" or plain or side > SMALL_MAP:
            answer: Tensor = super()._conv_forward(input, weight, bias)
            return answer
        # Autocast knows PyTorch's own convolutions alone; float64 it leaves as it is.
        if torch.is_autocast_enabled("cpu") and input.dtype != torch.float64:
            dtype = torch.get_autocast_dtype("cpu")
            input, weight = input.to(dtype), weight.to(dtype)
        # Apart, so that an attack, which asks for the images' gradient alone, does not pay for the weights'.
        answer = cast("Tensor", _InputGradient.apply(input, (weight, self.stride, self.padding)))
        if weight.requires_grad and torch.is_grad_enabled():
            answer = answer + _WeightGradient.apply(
                weight, (input, self.stride, self.padding, answer)
            )
        return answer


class _InputGradient(torch.autograd.Function):
    """The convolution, and its gradient in the images; see `SmallMapConv2d`.

    What an autograd function gets in a tuple is held and not differentiated in; both backwards are made of
    what can be differentiated again, as the double-backward curvature needs.
    """

    @staticmethod
    def forward(ctx: Any, images: Tensor, held: tuple[Any, ...]) -> Tensor:
        ctx.held, ctx.shape = held, images.shape
        weight, stride, padding = held
        return F.conv2d(images, weight, None, stride, padding)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        weight, stride, padding = ctx.held
        (gradient,) = gradients
        found: Tensor = conv2d_input(ctx.shape, weight, gradient, stride, padding)  # type: ignore[no-untyped-call]
        return found, None


class _WeightGradient(torch.autograd.Function):
    """Zeros, and the convolution's gradient in the weights; see `SmallMapConv2d`."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, held: tuple[Any, ...]) -> Tensor:
        ctx.held, ctx.kernel = held[:3], weight.shape
        answer: Tensor = held[3]
        return answer.new_zeros(()).expand_as(answer)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        images, stride, (down, right) = ctx.held
        count, _, high, wide = ctx.kernel
        (gradient,) = gradients
        padded = F.pad(images, (right, right, down, down)).permute(0, 2, 3, 1)
        patches = padded.unfold(1, high, stride[0]).unfold(2, wide, stride[1])
        rows = patches.permute(0, 1, 2, 4, 5, 3).flatten(3).flatten(0, 2)
        product = gradient.permute(0, 2, 3, 1).flatten(0, 2).t() @ rows
        return product.view(count, high, wide, -1).permute(0, 3, 1, 2), None


def _with_small_map_convolutions(net: nn.Module) -> nn.Module:
    """The same network, its convolutions replaced in place by `SmallMapConv2d` with their weights."""
    for module in list(net.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Conv2d and child.bias is None:
                kernel, stride, padding = (
                    cast("tuple[int, int]", size)
                    for size in (child.kernel_size, child.stride, child.padding)
                )
                channels = child.in_channels, child.out_channels
                fast = SmallMapConv2d(*channels, kernel, stride, padding, bias=False, device="meta")
                fast.weight = child.weight
                setattr(module, name, fast)
    return net


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


def fit_stem(net: ResNet, channels: int, resolution: int) -> None:
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
        import torchvision  # type: ignore[import-untyped]  # 5 s that a ConvNet need not wait for

        net = getattr(torchvision.models, f"resnet{depth}")(weights=None, num_classes=classes)
        fit_stem(net, channels, resolution)
        return _with_small_map_convolutions(net)

    return build


def _convnet(width: int, norm: str, depth: int = 3) -> Callable[[int, int, int], nn.Module]:
    def build(channels: int, classes: int, resolution: int) -> nn.Module:
        return ConvNet(channels, classes, resolution, depth=depth, width=width, norm=norm)

    return build


ARCHITECTURES: dict[str, Callable[[int, int, int], nn.Module]] = {
    "resnet18": _resnet("18"),
    "resnet50": _resnet("50"),
    "convnet-d3": _convnet(128, "instance"),
    # Two blocks: at 8 px the third would normalise maps of 2x2, through which hardly an image is seen.
    "convnet-d2-small": _convnet(32, "instance", depth=2),
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


class DenseConv2d(nn.Module):
    """A convolution on a map smaller than its kernel, as one matrix: no product with padding is left.

    A 3x3 kernel on a 2x2 map meets padding in five of nine taps; ResNet-18 at 64 px spends a fifth
    of its forward pass there.
    """

    matrix: Tensor
    bias: Tensor

    def __init__(self, conv: nn.Conv2d, side: int) -> None:
        super().__init__()
        channels = conv.in_channels
        basis = torch.eye(
            side * side * channels, dtype=conv.weight.dtype, device=conv.weight.device
        )
        basis = basis.view(-1, side, side, channels).permute(0, 3, 1, 2)
        with torch.no_grad():
            answer = F.conv2d(basis, conv.weight, None, conv.stride, conv.padding)
            bias = torch.zeros(len(conv.weight)) if conv.bias is None else conv.bias
            self.side = answer.shape[-1]
            self.register_buffer("matrix", answer.permute(0, 2, 3, 1).flatten(1).contiguous())
            self.register_buffer("bias", bias.detach().to(answer).repeat(self.side * self.side))

    def forward(self, images: Tensor) -> Tensor:
        """The map [n, C', S', S'] of `images` [n, C, S, S]."""
        rows = images.permute(0, 2, 3, 1).flatten(1)
        answer = torch.addmm(self.bias, rows, self.matrix)
        return answer.view(len(images), self.side, self.side, -1).permute(0, 3, 1, 2)


def folded(model: nn.Module, images: Tensor) -> nn.Module:
    """A frozen copy that gives the same logits sooner, for attacks on images of one size.

    Every BN becomes part of the convolution before it, and a convolution on a map smaller than its
    kernel becomes one matrix.

    Args:
        model: where a BN follows the convolution that is defined just before it, as in every model of
            `ARCHITECTURES`; elsewhere the copy answers something else, so compare. In eval mode, since
            only then BN is a fixed affine map.
        images: one or more, [N, C, H, W], of the size to come.
    """
    copy = deepcopy(model)
    for parent in list(copy.modules()):
        for (name, conv), (after, norm) in pairwise(list(parent.named_children())):
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                setattr(parent, name, fuse_conv_bn_eval(conv, norm))
                setattr(parent, after, nn.Identity())
    for name, side in _input_sides(copy, images[:1]).items():
        conv = copy.get_submodule(name)
        assert isinstance(conv, nn.Conv2d)
        if side < conv.kernel_size[0] and conv.groups == 1:
            copy.set_submodule(name, DenseConv2d(conv, side))
    return copy.to(memory_format=torch.channels_last).eval().requires_grad_(False)


def _input_sides(model: nn.Module, image: Tensor) -> dict[str, int]:
    """Side of the map that each convolution sees, by the convolution's name."""
    sides: dict[str, int] = {}

    def note(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _, inputs: sides.update({name: inputs[0].shape[-1]})

    hooks = [
        module.register_forward_pre_hook(note(name))
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d)
    ]
    with torch.no_grad():
        model(image)
    for hook in hooks:
        hook.remove()
    return sides


def features(model: nn.Module, images: Tensor) -> Tensor:
    """What the last linear layer takes, float32 [N, F] without gradient, for images [N, C, H, W] in [0, 1].

    Raises:
        GuardbenchError: the network does not end in an `nn.Linear` that gives the logits.
    """
    seen: list[tuple[Tensor, Tensor]] = []

    def note(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        seen[:] = [(inputs[0], output)]

    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    hooks = [layer.register_forward_hook(note) for layer in layers]
    try:
        with torch.no_grad():
            logits = model(images)
    finally:
        for hook in hooks:
            hook.remove()
    # The one that ran last must give the logits themselves: else its input is no last feature.
    if not seen or seen[0][0].ndim != 2 or not torch.equal(seen[0][1], logits):
        raise GuardbenchError(
            "the network does not end in a linear layer (torch.nn.Linear), whose input would be its "
            "features: choose one that does, or leave out --distilled."
        )
    return seen[0][0].float()


@contextmanager
def running_statistics_kept(model: nn.Module) -> Iterator[None]:
    """Inside, a training-mode forward uses batch statistics without moving the running ones."""
    # Not by a momentum of 0, by which a NaN would still move them.
    layers = [layer for layer in batch_norms(model) if layer.training and layer.track_running_stats]
    for layer in layers:
        layer.track_running_stats = False
    try:
        yield
    finally:
        for layer in layers:
            layer.track_running_stats = True


def save_weights(model: nn.Module, path: Path) -> None:
    """Writes a model's parameters and buffers as safetensors, whole or not at all."""
    state = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    write_bytes(path, save(state))


def load_weights(model: nn.Module, path: Path) -> None:
    """Loads what `save_weights` wrote; one clear line when the file is not of this architecture.

    Or when it cannot be read now.
    """
    try:
        state: Mapping[str, Any] = load_file(path)
        model.load_state_dict(state, strict=True)
    except (FileNotFoundError, SafetensorError, RuntimeError) as error:
        raise GuardbenchError(
            f"{path}: not weights of this architecture: {brief(error)}"
        ) from error
    except OSError as error:
        raise not_now(path, error) from error


def load_trained(run: Run, model: Classifier, path: Path) -> Classifier:
    """A model that a stage has trained, on the run's device, in eval mode, without gradients.

    Args:
        model: of the architecture of `path`, which the run's first process reads for all.
    """
    run.processes.from_main(lambda: load_weights(model, path))
    model.to(run.device).eval().requires_grad_(False)
    run.processes.take_over(model)
    return model
