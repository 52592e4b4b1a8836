"""What the signs of misleading robustness look for, in words; `guardbench.checks` measures them."""

from __future__ import annotations

MEANING: dict[str, str] = {
    "random-answers": 'two answers to the same images differ; run AutoAttack with version = "rand" instead',
    "batch-dependence": "answers depend on the images beside them",
    "probabilities": "the logits are probabilities, whose gradients vanish when they saturate",
    "zero-gradients": "no gradient of the loss reaches the image",
    "saturated": "the label's probability rounds to 1, so that cross-entropy does not lower its logit",
    "unbounded": "images survive an attack without a bound (eps 1)",
    "restarts": "nine more random starts of PGD break images that one does not",
    "black-box": "attacks that see none of its gradients (Square, SPSA, transfer) beat white-box ones",
    "single-step": "FGSM beats attacks of many steps",
    "unsteady": "under attack an image got two answers, at random or by those beside it; the checks saw none",
}
"""What each check looks for; a flag says so."""
