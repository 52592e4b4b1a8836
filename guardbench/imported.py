"""A classifier of anybody's: weights out of a file, or a model out of a Python function."""

from __future__ import annotations

import hashlib
import importlib
import sys
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from guardbench import canonical
from guardbench.errors import GuardbenchError, brief
from guardbench.fields import printable
from guardbench.models import ARCHITECTURES, Classifier, build_model
from guardbench.normalisation import NORMALISATIONS, numbers_text, read_normalisation
from guardbench.protocol import unknown
from guardbench.records import Classifier as Described
from guardbench.tensor_files import load_safetensors, load_torch

WRAPPERS = ("state_dict", "model_state_dict", "net_state_dict", "model_state", "params", "model",
            "net", "ema_state_dict", "state_dict_ema", "ema")  # fmt: skip
PREFIXES = ("module.", "_orig_mod.", "model.", "net.", "network.", "backbone.", "1.")


@dataclass(frozen=True)
class Imported:
    """A model in eval mode, frozen and in float32, and its description for a record.

    Attributes:
        source: digest of the text of the module whose function made it, None for weights of a file.
    """

    model: nn.Module
    described: Described
    source: str | None = None


def from_file(
    weights: Path,
    arch: str,
    *,
    channels: int,
    classes: int,
    resolution: int,
    normalisation: str | None,
    name: str,
) -> Imported:
    """Builds an architecture and loads a stranger's weights into it.

    Args:
        weights: `.safetensors`, or what `torch.save` wrote of a state dict, read without running code.
        arch: a name of `ARCHITECTURES`, or `torchvision:NAME` for a stock network of torchvision.
        normalisation: a name of `NORMALISATIONS`, or numbers such as `0.5,0.5,0.5/0.2,0.2,0.2`. Not
            for a student of guardbench, whose file holds its own.

    Raises:
        GuardbenchError: unknown architecture or normalisation, none given where one is needed, or a
            file that is absent, too large, holds code, or does not fit the architecture.
    """
    state, steps = _read(weights)
    sha = canonical.file_digest(weights)
    own = {"mean", "std"} <= state.keys() and any(key.startswith("backbone.") for key in state)
    model = _architecture(arch, channels, classes, resolution)
    if own:
        if normalisation is not None:
            raise GuardbenchError(
                f"--normalisation {normalisation}: {weights} holds its own (mean and std); leave it out."
            )
        _fit(model, state, weights, arch)
        said = f"in the file: {numbers_text(model.mean)}/{numbers_text(model.std)}"
    else:
        state, inside = _normaliser(state, channels)
        if inside is not None and normalisation is not None:
            raise GuardbenchError(
                f"--normalisation {normalisation}: {weights} holds its own ({inside[0]}); leave it out."
            )
        if inside is None and normalisation is None:
            raise GuardbenchError(
                f"{weights}: holds no normalisation, and a wrong one gives wrong numbers in silence; "
                f"say --normalisation {' | '.join(NORMALISATIONS)} | MEAN,..../STD,...."
            )
        if inside is not None:
            source, model.mean, model.std = inside
        else:
            assert normalisation is not None
            source = normalisation
            model.mean, model.std = read_normalisation(normalisation, channels)
        if "n_averaged" in state:  # of torch.optim.swa_utils.AveragedModel, beside its `module.`
            state = {key: value for key, value in state.items() if key != "n_averaged"}
            steps.append("without 'n_averaged'")
        state, taken = _without_prefix(state, model.backbone)
        steps += taken
        _fit(model.backbone, state, weights, arch)
        said = f"{source}: {numbers_text(model.mean)}/{numbers_text(model.std)}"
    return describe(
        model, name=name, arch=arch, sha=sha, weights=", ".join(steps) or "as they are", said=said
    )


def from_python(spec: str, *, name: str) -> Imported:
    """Calls a function of the user's own, which gives the model.

    Args:
        spec: `package.module:function`, importable from the current folder. Called without arguments,
            it gives an `nn.Module` that maps float32 images [N, C, H, W] in [0, 1] to logits [N, K]
            and normalises inside.

    Raises:
        GuardbenchError: there is no such function, it fails, or it gives no module.
    """
    module_name, _, function = spec.partition(":")
    if not module_name or not function:
        raise GuardbenchError(f"--python {spec}: write it as package.module:function.")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        made = getattr(importlib.import_module(module_name), function)()
    # Broad on purpose: this is the user's code, and any error of it is theirs to hear of.
    except (Exception, SystemExit) as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        raise GuardbenchError(
            f"--python {spec}: {type(error).__name__}: {brief(error)} "
            f"({Path(place.filename).name}, line {place.lineno})."
        ) from error
    if not isinstance(made, nn.Module):
        raise GuardbenchError(
            f"--python {spec}: gave {type(made).__name__}, which is no torch.nn.Module; a plain function "
            "could hide a network that is in training mode."
        )
    found = describe(
        made,
        name=name,
        arch=spec,
        sha=state_digest(made),
        weights="made by the function; the digest is of its parameters and buffers",
        said="the model's own",
    )
    file = getattr(sys.modules[module_name], "__file__", None)
    return replace(found, source=canonical.file_digest(Path(file)) if file else None)


def state_digest(model: nn.Module) -> str:
    """SHA-256 of a model's parameters and buffers, names and values."""
    sha = hashlib.sha256()
    for name, value in model.state_dict().items():
        sha.update(name.encode() + value.detach().cpu().contiguous().numpy().tobytes())
    return sha.hexdigest()


def describe(
    model: nn.Module, *, name: str, arch: str, sha: str | None, weights: str, said: str
) -> Imported:
    """A model made ready to be attacked, with its description."""
    model = model.float().eval().requires_grad_(False)
    described = Described(
        name=name,
        arch=printable(arch, 190)[:200],
        weights_sha256=sha,
        weights=printable(weights, 190)[:200],
        normalisation=printable(said, 190)[:200],
        parameters=sum(weight.numel() for weight in model.parameters()),
    )
    return Imported(model, described)


def _architecture(arch: str, channels: int, classes: int, resolution: int) -> Classifier:
    kind, _, stock = arch.partition(":")
    if kind == "torchvision" and stock:
        import torchvision  # type: ignore[import-untyped]

        known = torchvision.models.list_models(module=torchvision.models)
        if stock not in known:
            raise unknown("torchvision network", stock, known)
        with torch.random.fork_rng(devices=[]):
            network = torchvision.models.get_model(stock, weights=None, num_classes=classes)
        return Classifier(network, channels)
    if arch not in ARCHITECTURES:
        raise unknown("architecture", arch, [*ARCHITECTURES, "torchvision:NAME"])
    return build_model(arch, channels=channels, classes=classes, resolution=resolution, seed=0)


def _read(path: Path) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors of a weights file by key, and what was taken off around them."""
    where = f"--weights {path}"
    if path.suffix == ".safetensors":
        return load_safetensors(path, where=where), []
    found = load_torch(path, where=where)
    steps = []
    while isinstance(found, Mapping):
        inner = next((key for key in WRAPPERS if isinstance(found.get(key), Mapping)), None)
        if inner is None:
            break
        found = found[inner]
        steps.append(f"under {inner!r}")
    tensors = {}
    if isinstance(found, Mapping):
        tensors = {str(k): v for k, v in found.items() if isinstance(v, Tensor)}
    if not tensors:
        raise GuardbenchError(
            f"--weights {path}: no tensors by name in it; save model.state_dict()."
        )
    return tensors, steps


def _normaliser(
    state: dict[str, Tensor], channels: int
) -> tuple[dict[str, Tensor], tuple[str, Tensor, Tensor] | None]:
    """Takes out the numbers of a normalising layer before the network, as robust models often have.

    Returns:
        The other tensors, and the layer's place with mean and standard deviation [C, 1, 1].
    """
    for mean, std in (("mean", "std"), ("mu", "sigma")):
        for key in state:
            place, dot, last = key.rpartition(".")
            other = f"{place}{dot}{std}"
            if last != mean or other not in state:
                continue
            pair = state[key], state[other]
            if any(values.numel() != channels for values in pair):
                continue
            rest = {k: v for k, v in state.items() if k not in (key, other)}
            first, second = (values.float().reshape(-1, 1, 1) for values in pair)
            return rest, (f"in the file, {place or 'at its top'}", first, second)
    return state, None


def _without_prefix(
    state: dict[str, Tensor], model: nn.Module
) -> tuple[dict[str, Tensor], list[str]]:
    """Takes off prefixes that all keys share, unless the model's own keys begin so."""
    wanted, taken = model.state_dict().keys(), []
    while not state.keys() & wanted:
        prefix = next((p for p in PREFIXES if all(key.startswith(p) for key in state)), None)
        if prefix is None:
            break
        state = {key.removeprefix(prefix): value for key, value in state.items()}
        taken.append(f"without {prefix!r}")
    return state, taken


def _fit(model: nn.Module, state: dict[str, Tensor], path: Path, arch: str) -> None:
    """Loads tensors into a model, or says which do not fit it."""
    wanted = model.state_dict()
    # Files older than PyTorch 0.4.1 lack BN's counters, which change no answer.
    missing = [k for k in wanted if k not in state and not k.endswith("num_batches_tracked")]
    extra = [k for k in state if k not in wanted]
    shapes = [
        f"{k} is {list(state[k].shape)}, not {list(wanted[k].shape)}"
        for k in wanted
        if k in state and state[k].shape != wanted[k].shape
    ]
    problems = [
        f"{len(names)} {what} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for what, names in (("missing", missing), ("unknown", extra), ("of another shape", shapes))
        if names
    ]
    if problems:
        raise GuardbenchError(
            f"--weights {path}: do not fit --arch {arch}: {printable('; '.join(problems))}."
        )
    for key, value in state.items():
        if value.layout != torch.strided or value.is_quantized:
            raise GuardbenchError(f"--weights {path}: {printable(key, 80)} is sparse or quantised.")
        if not value.float().isfinite().all():
            raise GuardbenchError(f"--weights {path}: {printable(key, 80)} holds NaN or infinity.")
    model.load_state_dict(state, strict=False)
