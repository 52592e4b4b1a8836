"""Protocols: what counts as the same measurement, which images, and how a wrong file is told."""

import random
import re
from fractions import Fraction
from importlib import resources
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guardbench.errors import GuardbenchError
from guardbench.protocol import list_digest, load_protocol, parse_fraction, protocol_ids

# A published protocol never changes. A digest that moves means that old numbers no longer compare.
PUBLISHED = {
    "cifar10": "5c127919f3d58e75b8f15fa289c709ef900f70b3610c4dc5fc04b492e0552cdf",
    "cifar10-8": "1361dddd0c07dba582ff0df24096523c12c146ba311c551244da62f654f19960",
    "digits": "1af6d6d4ae03d036107e229b3a148e4642b261f1ef37f3ba4237b6e332977449",
    "imagenet": "11a29cc39f4ea155420cf7a7eb40487f1572af51971883ea1b1c0d0c87684391",
    "imagenette": "27814c43a27b35a45f2f2f7b8d5f74fbc12544842b5950475c2059dd4297a22d",
    "cifar10-convnet": "087df17148c3fa14285154484ecece861bcb7b06b9dab0e10aec59016654731c",
    "tiny-imagenet": "a2475275d6ecb4af6f06c552b3c3c2b398696139ca1aa2275218e99a0330e1b7",
    "imagenette-64": "07a4f788f89acee363c1cd6549a76599ad96f424684ee60fdcc296d4d502f36a",
}


@pytest.mark.parametrize("name", protocol_ids())
def test_a_published_protocol_has_its_digest(name: str) -> None:
    assert load_protocol(name).digest == PUBLISHED[name]


@pytest.mark.parametrize("name", protocol_ids())
def test_every_protocol_measures_what_the_paper_does(name: str) -> None:
    protocol = load_protocol(name)
    kinds = {attack.kind for attack in protocol.attacks}
    assert kinds == {"pgd", "fgsm", "mim", "cw", "square", "autoattack"}
    assert protocol.ipc == (1, 10, 50, 100)
    assert len(protocol.student.seeds) >= 3
    params = {attack.kind: attack.params for attack in protocol.attacks}
    eps = protocol.threat.model.eps
    assert params["pgd"]["steps"] == 100
    assert parse_fraction(str(params["pgd"]["step"])) == eps / 4
    assert params["mim"] == {"steps": 20, "step": protocol.threat.eps, "decay": 1.0}
    # The paper's c moves an 8 px digit by so little that the column would say nothing.
    c = 1.0 if name == "digits" else 1e-4
    assert params["cw"] == {"c": c, "steps": 50, "lr": 0.01, "kappa": 0}
    assert params["square"]["queries"] == 5000
    assert params["autoattack"] == {"version": "standard"}


def test_imagenette_64_is_imagenette_at_another_resolution_and_batch_size() -> None:
    small, large = load_protocol("imagenette-64"), load_protocol("imagenette")
    assert small.student == large.student.model_copy(update={"batch_size": 20})
    assert small.threat == large.threat
    assert [a.params for a in small.attacks] == [a.params for a in large.attacks]


@pytest.mark.parametrize(
    ("schedule", "shares"),
    [("half", [1, 1, 0.1, 0.1]), ("cosine", [1, 0.6913417, 0.5, 0.0380602])],
)
def test_the_learning_rate_falls_to_a_tenth_at_half_time_or_on_a_cosine(schedule, shares) -> None:
    update = {"schedule": schedule, "epochs": 8, "lr": 3.0}
    student = load_protocol("digits").student.model_copy(update=update)
    found = [student.lr_at(epoch) / 3 for epoch in (0, 3, 4, 7)]
    assert found == pytest.approx(shares, rel=1e-6)


def test_title_and_succession_are_not_part_of_what_is_measured() -> None:
    protocol = load_protocol("digits")
    renamed = protocol.model_copy(update={"title": "other", "superseded_by": "digits-2"})
    harder = protocol.model_copy(update={"rank_by": "pgd100"})
    renamed.__dict__.pop("digest", None)
    harder.__dict__.pop("digest", None)
    assert renamed.digest == protocol.digest
    assert harder.digest != protocol.digest


@given(st.randoms(use_true_random=False))
def test_the_test_list_does_not_depend_on_the_order_of_files(rng: random.Random) -> None:
    protocol = load_protocol("digits").model_copy(update={})
    update = {"test": protocol.test.model_copy(update={"sha256": None, "count": 50})}
    protocol = protocol.model_copy(update=update)
    ids = [f"{k % 10}/{k:05d}" for k in range(200)]
    shuffled = ids[:]
    rng.shuffle(shuffled)
    chosen = [ids[i] for i in protocol.test_indices(ids)]
    assert chosen == [shuffled[i] for i in protocol.test_indices(shuffled)]
    assert len(set(chosen)) == 50


def test_slices_of_seeds_are_disjoint_and_inside_the_list() -> None:
    protocol = load_protocol("imagenette-64")
    attack = next(a for a in protocol.attacks if a.name == "autoattack")
    seen: set[int] = set()
    for position in range(len(protocol.student.seeds)):
        first, count = protocol.slice_of(attack, position)
        images = set(range(first, first + count))
        assert count == 100
        assert not seen & images
        seen |= images
    assert max(seen) < protocol.test.count


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ("ipc = [1, 10, 50, 100]", "ipc = [-3]", "ipc.0"),
        ("ipc = [1, 10, 50, 100]", "ipc = [1, 1]", "ipc: a number stands twice"),
        ("seeds = [0, 1, 2]", "seeds = [-1]", "student.seeds.0"),
        ("seeds = [0, 1, 2]", f"seeds = [{1 << 63}]", "student.seeds.0"),
        ("seeds = [0, 1, 2]", f"seeds = {[*range(1025)]}", "student.seeds"),
    ],
)
def test_what_no_record_could_hold_is_refused(
    tmp_path: Path, before: str, after: str, said: str
) -> None:
    text = resources.files("guardbench").joinpath("protocols/digits.toml").read_text()
    assert before in text
    (tmp_path / "mine.toml").write_text(
        text.replace(before, after).replace('"digits"', '"mine"', 1)
    )
    with pytest.raises(GuardbenchError) as caught:
        load_protocol(str(tmp_path / "mine.toml"))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_other_images_than_the_protocols_are_refused() -> None:
    protocol = load_protocol("digits")
    with pytest.raises(GuardbenchError, match="validation images"):
        protocol.test_indices([f"{k % 10}/x{k}" for k in range(445)])
    with pytest.raises(GuardbenchError, match="complete validation set"):
        protocol.test_indices(["0/1"])


def test_a_copy_of_a_protocol_under_another_id_works_as_the_readme_says(tmp_path) -> None:
    """`id` seeds the order, so the copy's list is another: without its digest, or with the right one."""
    ids = [f"{k % 10}/{k}" for k in range(450)]
    text = resources.files("guardbench").joinpath("protocols/digits.toml").read_text()
    path = tmp_path / "mine.toml"
    copy = text.replace('id = "digits"', 'id = "mine"')
    pinned = next(line for line in copy.splitlines() if line.startswith("sha256 = "))
    path.write_text(copy)
    with pytest.raises(GuardbenchError, match="of your own") as error:
        load_protocol(str(path)).test_indices(ids)
    right = re.search(r'sha256 = "[0-9a-f]{64}"', str(error.value))
    assert right
    orders = []
    for line in ("", right[0]):
        path.write_text(copy.replace(pinned, line))
        orders.append(load_protocol(str(path)).test_indices(ids))
    assert orders[0] == orders[1]
    assert len(set(orders[0])) == 300


def test_a_list_digest_tells_order_and_boundaries_apart() -> None:
    assert list_digest(["ab", "c"]) != list_digest(["a", "bc"])
    assert list_digest(["a", "b"]) != list_digest(["b", "a"])


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('norm = "linf"', 'norm = "linfty"', "threat.norm"),
        (
            'eps = "16/255"',
            "eps = 0.06",
            'threat.eps: write it as a fraction in quotes, such as "8/255"',
        ),
        (
            'eps = "16/255"',
            'eps = "300/255"',
            "300.255 is more than the whole range of a pixel, .0, 1..$",
        ),
        ('eps = "16/255"', 'eps = "1/0"', "threat.eps"),
        ('eps = "16/255"', 'eps = "0/255"', "threat.eps"),
        ('eps = "16/255"', 'eps = "16"', "did you mean 16/255"),
        ("crop_scale = [0.5, 1.0]", "crop_scale = [0.0, 2.0]", "student.crop_scale"),
        ("lr = 0.001", "lr = inf", "student.lr"),
        ("lr = 0.001", "lr = 1e300", "student.lr"),
        ("weight_decay = ", "weight_decay = 1e300 # ", "student.weight_decay"),
        ("epochs = 300", "epochs = 0", "student.epochs"),
        ("epochs = 300", "epochs = 300\nepoch = 3", "student.epoch"),
        ('rank_by = "autoattack"', 'rank_by = "aa"', "rank_by"),
        ("seeds = [0, 1, 2]", "seeds = [0, 1, 1]", "seed stands twice"),
        ("images_per_seed = 100", "images_per_seed = 101", "disjoint slices"),
        ('name = "mim"', 'name = "cw"', "same name"),
        ('name = "mim"', 'name = "clean"', "'clean' is a column of its own"),
        ('name = "mim"', 'name = "worst_case"', "'worst_case' is a column of its own"),
        ('id = "digits"', 'id = "digit"', "not the file's name: write id = 'digits', or rename"),
        ('id = "digits"', "id = ", "not valid TOML"),
    ],
)
def test_a_wrong_file_is_told_with_its_field(tmp_path, old: str, new: str, said: str) -> None:
    from guardbench.protocol import _folder

    text = (_folder() / "digits.toml").read_text()
    assert old in text
    path = tmp_path / "digits.toml"
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(GuardbenchError, match=said) as caught:
        load_protocol(str(path))
    assert "digits.toml" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unknown_protocol_names_the_nearest() -> None:
    with pytest.raises(GuardbenchError, match="Did you mean imagenette-64"):
        load_protocol("imagenette64")
    with pytest.raises(GuardbenchError, match="cannot read protocol"):
        load_protocol("nowhere/mine.toml")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1/255", Fraction(1, 255)),
        ("0.25/255", Fraction(1, 1020)),
        (" 8 / 255 ", Fraction(8, 255)),
        ("0.5", Fraction(1, 2)),
        ("3", Fraction(3)),
        ("0.5/0.25", Fraction(2)),
    ],
)
def test_fractions(text: str, value: Fraction) -> None:
    assert parse_fraction(text) == value


@pytest.mark.parametrize(
    "text",
    [
        "",
        "/",
        "1/0",
        "1/2/3",
        "eps",
        "1/",
        "nan",
        "1e400",
        "1e-999999999",
        "1" * 41,
        "-1/255",
        "٣/255",
    ],
)
def test_what_is_no_fraction(text: str) -> None:
    with pytest.raises(ValueError, match="is not a fraction such as"):
        parse_fraction(text)


def test_a_wrong_ipc_lists_the_standard_ones() -> None:
    with pytest.raises(GuardbenchError, match="1, 10, 50, 100"):
        load_protocol("digits").check_ipc(7)
