"""Attacks by name: the table of kinds and the reading of their parameters; no torch."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Mapping
from dataclasses import MISSING, fields
from fractions import Fraction
from typing import (
    TYPE_CHECKING,
    Any,
    Literal,
    NamedTuple,
    cast,
    get_args,
    get_origin,
    get_type_hints,
)

from guardbench.errors import GuardbenchError
from guardbench.protocol import parse_fraction
from guardbench.threat import Norm, ThreatModel

if TYPE_CHECKING:
    from guardbench.attacks.base import Attack


class Kind(NamedTuple):
    """Where an attack's class is, the paper that it comes from, and the norms of the balls that it knows.

    An attack without norms is not held to a ball.
    """

    target: str
    source: str
    norms: tuple[Norm, ...]


def _kind(module: str, name: str, source: str, *more: Norm, ball: bool = True) -> Kind:
    norms: tuple[Norm, ...] = ("linf", "l2", *more) if ball else ()
    return Kind(f"guardbench.attacks.{module}:{name}", source, norms)


ATTACKS: dict[str, Kind] = {
    "apgd": _kind("apgd", "APGD", "Croce & Hein, ICML 2020, arXiv:2003.01690", "l1"),
    "autoattack": _kind(
        "autoattack", "AutoAttack", "Croce & Hein, ICML 2020, arXiv:2003.01690", "l1"
    ),
    "cw": _kind("cw", "CW", "Carlini & Wagner, S&P 2017, arXiv:1608.04644", ball=False),
    "deepfool": _kind(
        "deepfool", "DeepFool", "Moosavi-Dezfooli et al., CVPR 2016, arXiv:1511.04599"
    ),
    "fab": _kind("fab", "FAB", "Croce & Hein, ICML 2020, arXiv:1907.02044", "l1"),
    "fgsm": _kind("fgsm", "FGSM", "Goodfellow et al., ICLR 2015, arXiv:1412.6572"),
    "jitter": _kind(
        "jitter", "Jitter", "Schwinn et al., Applied Intelligence 2023, arXiv:2105.10304"
    ),
    "mim": _kind("mim", "MIM", "Dong et al., CVPR 2018, arXiv:1710.06081"),
    "pgd": _kind("pgd", "PGD", "Madry et al., ICLR 2018, arXiv:1706.06083"),
    "spsa": _kind("spsa", "SPSA", "Uesato et al., ICML 2018, arXiv:1802.05666"),
    "square": _kind("square", "Square", "Andriushchenko et al., ECCV 2020, arXiv:1912.00049", "l1"),
    "transfer": _kind("transfer", "Transfer", "Papernot et al., 2016, arXiv:1605.07277"),
    "vmifgsm": _kind("vmifgsm", "VMIFGSM", "Wang & He, CVPR 2021, arXiv:2103.15571"),
}


def build_attack(kind: str, threat: ThreatModel, params: Mapping[str, object]) -> Attack:
    """The attack called `kind` within `threat`, with its own parameters replaced by `params`.

    Args:
        kind: a key of `ATTACKS`.
        threat: the ball; an unbounded attack (`cw`) does not use it and keeps `threat` None.
        params: keyword parameters of the attack's class. A length in pixels is an exact
            fraction: a `Fraction`, an int, or text such as `"0.25/255"`.

    Raises:
        GuardbenchError: an unknown kind or parameter, a value of the wrong type or out of
            range, or a norm that the attack lacks.
    """
    if kind not in ATTACKS:
        raise GuardbenchError(f"unknown attack {kind!r}; {_suggest(kind, sorted(ATTACKS))}")
    attack_class = class_of(kind)
    hints = get_type_hints(attack_class)
    allowed = parameters(attack_class)
    arguments: dict[str, object] = {}
    for key, value in params.items():
        if key not in allowed:
            hint = _suggest(key, allowed)
            raise GuardbenchError(f"attack {kind} has no parameter {key!r}; {hint}")
        arguments[key] = _typed(kind, key, value, hints[key])
    needed = [
        field.name
        for field in fields(attack_class)
        if field.default is MISSING and field.name in allowed and field.name not in arguments
    ]
    if needed:
        raise GuardbenchError(f"attack {kind} needs {', '.join(needed)}")
    if hints["threat"] is not type(None):
        arguments["threat"] = threat
    return cast("Attack", attack_class(**arguments))


_INTERNAL = ("threat", "without", "leave")
"""Fields that other code of the package sets: the ball, AutoAttack's parts that another column ran, and
whether images for another model go on."""


def parameters(attack_class: Any) -> list[str]:
    """What a protocol can set of an attack."""
    return [field.name for field in fields(attack_class) if field.name not in _INTERNAL]


def class_of(kind: str) -> Any:
    """The class of a kind; its fields are what a protocol can set."""
    module, _, name = ATTACKS[kind].target.partition(":")
    return getattr(importlib.import_module(module), name)


def _suggest(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    listed = f"it must be one of {', '.join(known)}" if known else "there are none"
    return f"did you mean {close[0]!r}? {listed}" if close else listed


def _typed(kind: str, key: str, value: object, wanted: Any) -> object:
    """`value` as the type that the attack's field declares; a bool is never taken for a number."""
    number = isinstance(value, int) and not isinstance(value, bool)
    if wanted is Fraction and (number or isinstance(value, Fraction)):
        return Fraction(cast("int | Fraction", value))
    if wanted is Fraction and isinstance(value, str):
        try:
            return parse_fraction(value)
        except ValueError as error:
            raise GuardbenchError(f"attack {kind}: {key}: {error}") from error
    if wanted is float and (number or isinstance(value, float)):
        return float(cast("int | float", value))
    if wanted is int and number:
        return value
    if wanted is bool and isinstance(value, bool):
        return value
    if wanted is str and isinstance(value, str):
        return value
    if get_origin(wanted) is Literal and value in get_args(wanted):
        return value
    expected = {
        Fraction: 'an exact fraction in quotes, such as "0.25/255"',
        float: "a number",
        int: "a whole number",
        bool: "true or false",
        str: "text in quotes",
    }.get(wanted) or f"one of {', '.join(map(repr, get_args(wanted)))}"
    raise GuardbenchError(f"attack {kind}: {key} must be {expected}, not {value!r}")
