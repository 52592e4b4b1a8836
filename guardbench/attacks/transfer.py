"""Transfer: images made on a surrogate, which the model under attack then meets."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn

from guardbench.attacks.base import frozen
from guardbench.attacks.vmifgsm import VMIFGSM
from guardbench.ball import require_norm
from guardbench.canonical import file_digest
from guardbench.errors import GuardbenchError
from guardbench.threat import ThreatModel


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """VMI-FGSM on another network, to the end; the model under attack gives no gradients.

    Papernot et al., "Transferability in machine learning" (arXiv:1605.07277); made by Wang & He's attack
    (arXiv:2103.15571, see `VMIFGSM`). Where it breaks images that white-box attacks do not, the model
    hides its gradients, and a check says so.

    Attributes:
        threat: the ball; l-inf or l2.
        weights: the surrogate's file, as of `guardbench evaluate --weights`; where it lies is no part of
            a protocol's digest.
        sha256: of that file, so that a protocol names one network and no other.
        arch: its architecture, as of `--arch`.
        normalisation: as of `--normalisation`; empty for a student of guardbench, which brings its own.
        steps: gradient steps.
    """

    threat: ThreatModel
    weights: str
    sha256: str
    arch: str
    normalisation: str = ""
    steps: int = 10

    def __post_init__(self) -> None:
        require_norm("Transfer", self.threat, ("linf", "l2"))
        if self.steps < 1:
            raise GuardbenchError(f"steps must be positive: {self}")
        if not Path(self.weights).is_file():
            raise GuardbenchError(f"attack transfer: weights {self.weights}: no such file")
        if (found := file_digest(Path(self.weights))) != self.sha256:
            raise GuardbenchError(
                f"attack transfer: weights {self.weights}: not the surrogate that the protocol names "
                f"(sha256 {found[:12]}, expected {self.sha256[:12]})"
            )

    def perturb(self, model: nn.Module, x: Tensor, y: Tensor, *, seed: int) -> Tensor:
        """Adversarial images [N, C, H, W] for images `x` in [0, 1] and labels `y` [N].

        Raises:
            GuardbenchError: the surrogate does not fit the architecture.
        """
        if not len(x):
            return x.clone()
        with torch.no_grad():
            classes = model(x[:1]).shape[1]
        surrogate = _surrogate(
            self.weights,
            self.sha256,
            self.arch,
            self.normalisation,
            x.shape[1],
            classes,
            x.shape[-1],
        ).to(x.device)
        attack = VMIFGSM(threat=self.threat, steps=self.steps, leave=False)
        with frozen(surrogate):
            return attack.perturb(surrogate, x, y, seed=seed)


@lru_cache(maxsize=2)
def _surrogate(
    weights: str,
    sha256: str,  # noqa: ARG001 - another file is another network
    arch: str,
    normalisation: str,
    channels: int,
    classes: int,
    resolution: int,
) -> nn.Module:
    from guardbench.imported import from_file

    found = from_file(
        Path(weights), arch, channels=channels, classes=classes, resolution=resolution,
        normalisation=normalisation or None, name="surrogate",
    )  # fmt: skip
    return found.model
