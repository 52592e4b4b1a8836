"""What people have, converted: every layout as its tool writes it, and files that mean harm."""

import io
import pickle
import shutil
import struct
import warnings
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from guardbench import tensor_files
from guardbench.cli import app
from guardbench.data.catalog import dataset_info
from guardbench.errors import GuardbenchError
from guardbench.normalisation import NORMALISATIONS
from guardbench.submissions import class_folders, pixels
from guardbench.submissions.convert import FILL_IN, convert, write_submission
from guardbench.submissions.form import load_form
from guardbench.tensor_files import load_npy, load_npz, load_torch

CIFAR = dataset_info("cifar10")
NETTE = dataset_info("imagenette")
IPC, K, SIDE = 2, 10, 6
ORDER = torch.arange(K).repeat_interleave(IPC)
# By hand, from the papers' code, so that a slip in the table of the package is seen.
DC_CIFAR = ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def bytes_images(channels=3, seed=0):
    """uint8 [20, C, 6, 6]; black and white are in every channel."""
    made = torch.randint(
        0, 256, (IPC * K, channels, SIDE, SIDE), generator=torch.Generator().manual_seed(seed)
    ).to(torch.uint8)
    made[0, :, 0, 0], made[-1, :, -1, -1] = 0, 255
    return made


@pytest.fixture
def images():
    """The pixels that everything here is made of, float32 in [0, 1]."""
    return bytes_images().float() / 255


def normalise(images, mean_std):
    mean, std = (torch.tensor(v, dtype=torch.float64).view(-1, 1, 1) for v in mean_std)
    return ((images.double() - mean) / std).float()


def same(found, wanted, labels=ORDER, within=2e-7):
    assert found.images.dtype == torch.float32
    assert found.labels.dtype == torch.int64
    torch.testing.assert_close(found.images, wanted, rtol=0, atol=within)
    assert found.images.min() >= 0
    assert found.images.max() <= 1
    torch.testing.assert_close(found.labels, labels)


def told(found, *parts):
    text = "\n".join(found.said)
    for part in parts:
        assert part in text, text
    assert all(line and "\n" not in line for line in found.said)


def refused(source, line, **words):
    with pytest.raises(GuardbenchError, match=line) as caught:
        convert(source, **words)
    text = str(caught.value)
    assert "\n" not in text
    assert text.isprintable()
    return text


# ---------------------------------------------------------------------------------------- folders


def sre2l(folder: Path, images, kind="jpg", name="new{:03d}"):
    """As SRe2L saves: class folders by number, a file an image, Pillow's own JPEG settings."""
    for place, image in enumerate(images):
        label, ipc_id = place // IPC, place % IPC
        target = folder / name.format(label)
        target.mkdir(parents=True, exist_ok=True)
        pixels = image.permute(1, 2, 0).numpy()
        picture = Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels)
        picture.save(target / f"class{label:03d}_id{ipc_id:03d}.{kind}")
    return folder


def test_sre2ls_jpegs_are_what_they_decode_to_and_told_to_be_lossy(tmp_path):
    raw = bytes_images()
    found = convert(sre2l(tmp_path / "syn", raw), info=CIFAR)
    decoded = [
        np.asarray(Image.open(tmp_path / f"syn/new{k:03d}/class{k:03d}_id{i:03d}.jpg"))
        for k in range(K)
        for i in range(IPC)
    ]
    wanted = torch.from_numpy(np.stack(decoded)).permute(0, 3, 1, 2).float() / 255
    same(found, wanted, within=0)
    assert (wanted - raw.float() / 255).abs().max() > 0.01  # JPEG did lose something
    told(found, "20 JPEG (lossy", "SRe2L's names", "IPC: 2 images of each of 10 classes", "6 x 6")
    assert found.soft is None


def test_pngs_come_through_without_loss(tmp_path, images):
    found = convert(sre2l(tmp_path, bytes_images(), "png"), info=CIFAR)
    same(found, images, within=0)
    told(found, "20 PNG", "divided by 255")
    assert "lossy" not in "".join(found.said)


def test_folders_of_numbers_are_not_sorted_as_text(tmp_path):
    raw = bytes_images()
    more = torch.cat([raw, raw[:2]])  # an eleventh class, whose folder 10 sorts before 2
    found = convert(sre2l(tmp_path, more, "png", "{}"))
    same(found, more.float() / 255, torch.arange(11).repeat_interleave(IPC), within=0)


@pytest.mark.parametrize("kind", ["wnids", "names"])
def test_folders_by_name_get_the_datasets_labels(tmp_path, images, kind):
    sre2l(tmp_path, bytes_images(), "png", "c{}")
    for k in range(K):
        name = NETTE.classes[k] if kind == "wnids" else NETTE.names[k].replace(" ", "_").upper()
        (tmp_path / f"c{k}").rename(tmp_path / name)
    found = convert(tmp_path, info=NETTE)
    same(found, images, within=0)
    told(found, "labels are imagenette's")


def test_folders_of_nearly_black_files_are_bytes_all_the_same(tmp_path):
    black = (bytes_images() > 127).to(torch.uint8)
    found = convert(sre2l(tmp_path, black, "png"))
    same(found, black.float() / 255, within=0)
    told(found, "as in image files of 8 bits; divided by 255")


def test_folders_of_an_unknown_dataset_are_sorted_and_told_so(tmp_path, images):
    same(found := convert(sre2l(tmp_path, bytes_images(), "png", "k{}")), images, within=0)
    told(found, "labels in their sorted order", "k0, k1, k2 and 7 more")


def test_grey_files_of_a_colour_dataset_are_repeated_and_told(tmp_path):
    grey = bytes_images(1)
    found = convert(sre2l(tmp_path, grey, "png"), info=CIFAR)
    same(found, grey.expand(-1, 3, -1, -1).float() / 255, within=0)
    told(found, "20 grey images, repeated")
    (tmp_path / "new000/notes.txt").write_text("no image")
    told(convert(tmp_path, info=CIFAR), "passed over: 1 entries")


def _png(width, height, pixels=b""):
    def chunk(kind, body):
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    )


def _saved(mode, size=(SIDE, SIDE), kind="PNG"):
    buffer = io.BytesIO()
    Image.new(mode, size).save(buffer, kind)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (_png(50_000, 50_000), "far too many pixels"),
        (_png(12_000, 12_000), "says that it is 12000 x 12000"),
        (_png(SIDE, SIDE, zlib.compress(bytes(7))), "cannot be decoded"),
        (_saved("RGB", (64, 64), "JPEG")[:400], "cannot be decoded"),
        (b"<script>alert(1)</script>", "is no JPEG and no PNG"),
        (b"", "is no JPEG and no PNG"),
        (_saved("RGB", kind="GIF"), "is no JPEG and no PNG"),
        (_saved("RGB", kind="WEBP"), "is no JPEG and no PNG"),
        (_saved("RGBA"), "its pixels are RGBA"),
        (_saved("I;16"), "its pixels are I;16"),
        (_saved("RGB", (SIDE, 5)), "all must be squares of one size"),
    ],
)
def test_files_that_are_no_images_are_named(tmp_path, content, line):
    sre2l(tmp_path / "syn", bytes_images(), "png")
    (tmp_path / "syn/new004/class004_id001.png").write_bytes(content)
    text = refused(tmp_path / "syn", line, info=CIFAR)
    assert text.startswith("syn/new004/class004_id001.png: ")


def test_folders_that_cannot_be_meant(tmp_path):
    made = sre2l(tmp_path / "syn", bytes_images(), "png")
    tiny = dataset_info("tiny-imagenet")
    refused(made, "class 10 has 0 images where another has 2 .190 such", info=tiny)
    named = sre2l(tmp_path / "named", bytes_images(), "png", "n0144{:04d}")
    refused(named, "10 class folders with images, tiny-imagenet has 200 classes", info=tiny)
    own = tmp_path / "own"
    for label in range(200):
        (own / f"class_{label}").mkdir(parents=True)
        shutil.copy(made / "new000/class000_id000.png", own / f"class_{label}" / "a.png")
    refused(
        own, "classes of tiny-imagenet are WordNet IDs in sorted order, and some folders", info=tiny
    )
    (made / "new000/class000_id000.png").rename(made / "new000/class003_id009.png")
    refused(made, "its name says class 3, its folder class 0", info=CIFAR)
    (made / "new000/class003_id009.png").unlink()
    refused(made, "class 0 has 1 images where another has 2", info=CIFAR)
    (made / "new000/class000_id001.png").unlink()
    refused(made, "class 0 has 0 images", info=CIFAR)
    (made / "new009").rename(made / "new217")
    refused(made, "its name says class 9, its folder class 217", info=CIFAR)
    for place, path in enumerate(sorted((made / "new217").iterdir())):
        path.rename(made / f"new217/{place}.png")
    refused(made, "up to 217, where there are 10 classes", info=CIFAR)
    for k in range(K):
        path = made / ("new217" if k == 9 else f"new{k:03d}")
        path.rename(made / NETTE.classes[k])
    (made / NETTE.classes[3]).rename(made / "n03000685")
    refused(made, "n03000685 is no class of imagenette .did you mean n03000684", info=NETTE)
    refused(tmp_path, "no images .* in folders, one a class")
    refused(made, "leave out --normalisation", normalisation="imagenet")


@pytest.mark.parametrize("link", ["class", "image", "labels"])
def test_links_are_never_followed(tmp_path, link):
    secret = tmp_path / "secret"
    sre2l(secret, bytes_images(), "png")
    made = sre2l(tmp_path / "syn", bytes_images(), "png")
    if link == "class":
        (made / "new010").symlink_to(secret / "new000")
    elif link == "image":
        (made / "new003/class003_id000.png").unlink()
        (made / "new003/class003_id000.png").symlink_to(secret / "new003/class003_id000.png")
    else:
        torch.save(bytes_images(), made / "images_best.pt")
        torch.save(ORDER, secret / "labels.pt")
        (made / "labels_best.pt").symlink_to(secret / "labels.pt")
    refused(made, "is a link", info=CIFAR)


def test_names_that_would_move_a_terminal_are_shown_as_escapes(tmp_path):
    made = sre2l(tmp_path / "syn", bytes_images(), "png")
    (made / "\x1b[2J\nevil").mkdir()
    (made / "\x1b[2J\nevil/a.png").write_bytes(_saved("RGB"))
    assert "\\x1b[2J\\nevil" in refused(made, "is no class of cifar10", info=CIFAR)


# ------------------------------------------------------------------------------------ DC, DSA, DM


def dc_file(path: Path, *experiments, **how):
    """As DC saves: every experiment's pair, and accuracies, which NumPy's mean made."""
    accuracies = {"ConvNet": [np.float64(0.28), np.mean([0.1, 0.3])]}
    data = [[one, ORDER.clone()] for one in experiments]
    torch.save({"data": data, "accs_all_exps": accuracies}, path, **how)
    return path


@pytest.mark.parametrize("old", [False, True], ids=["archive", "before-1.6"])
def test_dcs_file_is_un_normalised_and_the_last_experiment_taken(tmp_path, images, old):
    other = bytes_images(seed=1).float() / 255
    path = dc_file(
        tmp_path / "res_DC_CIFAR10_ConvNet_2ipc.pt",
        normalise(other, DC_CIFAR),
        normalise(images, DC_CIFAR),
        _use_new_zipfile_serialization=not old,
    )
    found = convert(path, info=CIFAR)
    same(found, images)
    told(found, "experiment 1 of 0 to 1 (the last", "cifar10-dc", "that DC uses for cifar10")
    same(convert(tmp_path, info=CIFAR, experiment=0), other)
    same(convert(path, normalisation="0.4914,0.4822,0.4465/0.2023,0.1994,0.2010"), images)
    refused(path, "holds 2; choose 0 to 1", experiment=2)


def test_dcs_images_that_left_the_range_are_clipped_only_on_demand(tmp_path, images):
    wild = images.clone()
    wild[3, 1, 2, 2], wild[4, 0, 0, 0], wild[5, 2, 1, 1] = 1.25, -0.5, 1.001
    path = dc_file(tmp_path / "res_x.pt", normalise(wild, DC_CIFAR))
    refused(path, r"none of cifar10-dc .*up to 0.5 outside.*--clip", info=CIFAR)
    text = refused(path, "--clip cuts them off", info=CIFAR, normalisation="cifar10-dc")
    assert "3 of 2160 values (0.14 %)" in text
    assert "up to 0.5" in text
    found = convert(path, info=CIFAR, normalisation="cifar10-dc", clip=True)
    same(found, wild.clamp(0, 1))
    told(found, "clipped: 3 of 2160 values (0.14 %), by 0.5 at most")


def test_rounding_is_clipped_and_told(tmp_path, images):
    near = images.clone()
    near[0, 0, 0, 0], near[1, 0, 0, 0] = -1 / 600, 1 + 1 / 700
    torch.save({"images": near, "labels": ORDER}, tmp_path / "a.pt")
    found = convert(tmp_path / "a.pt")
    same(found, near.clamp(0, 1))
    told(found, "clipped: 2 of 2160 values", "by 0.0017 at most")
    near[0, 0, 0, 0] = -1 / 400
    torch.save({"images": near, "labels": ORDER}, tmp_path / "a.pt")
    refused(tmp_path / "a.pt", "lie outside", normalisation="none")


# ------------------------------------------------------------------------------------- MTT, TESLA


def mtt_folder(folder: Path, images, labels=ORDER, name="best", prefix=""):
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(images.clone(), folder / f"images_{prefix}{name}.pt")
    torch.save(labels.clone(), folder / f"labels_{name}.pt")
    return folder


def whitening(dimensions, symmetric, seed=0):
    """A whitening by eigenvalues, in NumPy: mean, matrix, inverse.

    ZCA's matrix is symmetric; without its last turn (PCA) it is not, so that rows and columns differ.
    """
    made = np.random.default_rng(seed)
    data = made.random((500, dimensions)) @ made.random((dimensions, dimensions)) / dimensions
    values, vectors = np.linalg.eigh(np.cov(data.T))
    root = np.sqrt(values + 0.1)
    turn = vectors.T if symmetric else np.eye(dimensions)
    return data.mean(0), vectors / root @ turn, turn.T @ (vectors * root).T


def test_mtt_on_imagenet_is_un_normalised(tmp_path, images):
    folder = mtt_folder(tmp_path / "run", normalise(images, IMAGENET))
    mtt_folder(folder, normalise(images, IMAGENET) * 0.1, name="5000")
    found = convert(folder, info=NETTE)
    same(found, images)
    told(found, "images_best.pt and labels_best.pt", "that MTT uses for imagenette")
    (folder / "images_best.pt").unlink()
    mtt_folder(folder, normalise(images, IMAGENET), name="6000")
    refused(folder, r"images_5000.pt, images_6000.pt: which of them\? Name the file", info=NETTE)
    same(convert(folder / "images_6000.pt", info=NETTE), images)


@pytest.mark.parametrize("kind", ["matrix.npz", "inverse.safetensors", "kornia.npz"])
def test_whitened_images_need_their_whitening(tmp_path, images, kind):
    mean, matrix, inverse = whitening(3 * SIDE * SIDE, symmetric=kind == "kornia.npz")
    white = (images.flatten(1).double().numpy() - mean) @ matrix
    folder = mtt_folder(tmp_path / "run", torch.from_numpy(white).float().view_as(images))
    for info in (CIFAR, None):
        text = refused(folder, "values lie outside", info=info)
        assert "--zca FILE (mean, and matrix or inverse)" in text
        assert "images_zca_" in text
    path = tmp_path / kind
    if kind == "matrix.npz":
        np.savez(path, mean=mean, matrix=matrix)
    elif kind == "kornia.npz":
        words = {"mean_vector": mean[None], "transform_matrix": matrix, "transform_inv": inverse}
        np.savez_compressed(path, **{key: one.astype(np.float32) for key, one in words.items()})
    else:
        both = {"mean": mean, "inverse": inverse}
        save_file({key: torch.from_numpy(one).contiguous() for key, one in both.items()}, path)
    found = convert(folder, zca=path, info=CIFAR, clip=True)
    same(found, images, within=1e-5)
    told(found, f"whitening: undone with {kind}", "none, as MTT whitens plain pixels")


def test_a_whitening_that_does_not_fit_is_refused(tmp_path, images):
    folder = mtt_folder(tmp_path / "run", images * 3 - 1)
    d = 3 * SIDE * SIDE
    bad = {
        "only": ({"mean": np.zeros(d)}, "needs `mean`"),
        "small": (
            {"mean": np.zeros(5), "matrix": np.eye(5)},
            "108 values an image, and --zca is for 5",
        ),
        "shape": (
            {"mean": np.zeros(d), "inverse": np.eye(5)},
            "shape .5, 5., where `mean` has 108",
        ),
        "flat": (
            {"mean": np.zeros(d), "matrix": np.zeros((d, d))},
            "has no inverse|without an inverse",
        ),
        "nan": ({"mean": np.zeros(d), "inverse": np.full((d, d), np.nan)}, "NaN"),
        "object": ({"mean": np.array([{}]), "inverse": np.eye(d)}, "never unpickled"),
    }
    for name, (arrays, line) in bad.items():
        np.savez(tmp_path / f"{name}.npz", **arrays)
        refused(folder, line, zca=tmp_path / f"{name}.npz", info=CIFAR)
    refused(folder, "no such file", zca=tmp_path / "absent.npz", info=CIFAR)


def test_mtts_own_unwhitened_images_are_pixels(tmp_path, images):
    wild = images.clone()
    wild[0, 0, 0, 0] = -0.25
    mtt_folder(tmp_path, wild, name="5000", prefix="zca_")
    refused(tmp_path / "images_zca_5000.pt", "by up to 0.25", info=CIFAR)
    found = convert(tmp_path / "images_zca_5000.pt", info=CIFAR, clip=True)
    same(found, wild.clamp(0, 1))
    told(
        found,
        "images_zca_5000.pt and labels_5000.pt",
        "un-whitens to plain pixels",
        "clipped: 1 of",
    )


def test_teslas_labels_are_logits(tmp_path, images):
    logits = torch.randn(IPC * K, K, generator=torch.Generator().manual_seed(0))
    logits[range(IPC * K), ORDER] += 9
    folder = mtt_folder(tmp_path / "run", images, logits)
    found = convert(folder, info=CIFAR)
    same(found, images)
    each = logits.double().exp()
    torch.testing.assert_close(found.soft, (each / each.sum(1, keepdim=True)).float())
    told(found, "taken for logits", "softmax at temperature 1", "its largest soft label")
    # The largest of row 0 is moved to another class: the argmax no longer gives two of each.
    logits[0] = logits[-1]
    torch.save(logits, folder / "labels_best.pt")
    refused(
        folder, "the largest soft labels favour some classes; add them, or say --ipc", info=CIFAR
    )
    found = convert(folder, info=CIFAR, ipc=2)
    same(found, images)
    told(found, "assumed that images lie class by class", "is of another class for 1 of 20")


# ----------------------------------------------------------------------------------- plain arrays


def store(path: Path, arrays):
    """The arrays in a file of the kind that its name says."""
    tensors = {key: torch.as_tensor(one) for key, one in arrays.items()}
    if path.suffix == ".npz":
        np.savez(path, **{key: one.numpy() for key, one in tensors.items()})
    elif path.suffix == ".safetensors":
        save_file({key: one.contiguous() for key, one in tensors.items()}, path)
    elif path.suffix == ".npy":
        np.save(path, tensors["images"].numpy())
        np.save(path.with_name(path.name.replace("images", "labels")), tensors["labels"].numpy())
    else:
        torch.save(tensors, path)
    return path


@pytest.mark.parametrize("kind", ["images.npz", "images.safetensors", "images.npy", "a.pt"])
@pytest.mark.parametrize("nhwc", [False, True])
@pytest.mark.parametrize("floats", [False, True])
def test_arrays_of_either_order_and_type(tmp_path, images, kind, nhwc, floats):
    given = images if floats else bytes_images()
    given = given.permute(0, 2, 3, 1) if nhwc else given
    path = store(tmp_path / kind, {"images": given, "labels": ORDER.int()})
    found = convert(path, info=CIFAR)
    same(found, images, within=0)
    told(found, "read as NHWC" if nhwc else "read as NCHW", "by its axis of channels")
    told(found, "taken as they are" if floats else "whole numbers; divided by 255")
    told(convert(path, layout="nhwc" if nhwc else "nchw"), "as --layout says")
    refused(path, "is not square images", layout="nchw" if nhwc else "nhwc")


@pytest.mark.parametrize(
    ("names", "passed"),
    [
        (("x_train", "y_train"), False),
        (("Data", "Targets"), False),
        (("arr_0", "arr_1"), False),
        (("image_syn", "label_syn"), True),
        (("pictures", "classes"), True),
    ],
)
def test_arrays_by_other_names(tmp_path, images, names, passed):
    arrays = {names[0]: images, names[1]: ORDER}
    if passed:
        arrays["syn_lr"] = torch.tensor(0.02)
    found = convert(store(tmp_path / "set.npz", arrays))
    same(found, images, within=0)
    told(found, f"layout: {names[0]}, {names[1]} of set.npz")
    assert ("passed over: syn_lr" in found.said) == passed


def test_grey_arrays_without_an_axis_of_channels(tmp_path):
    grey = bytes_images(1)
    path = store(tmp_path / "digits.npz", {"x": grey[:, 0], "y": ORDER})
    found = convert(path, info=dataset_info("digits"))
    same(found, grey.float() / 255, within=0)
    told(found, "in grey", "read as [N, H, W]")


def test_foreign_byte_orders_and_fortrans_order(tmp_path, images):
    array = np.asfortranarray(images.numpy().astype(">f8"))
    np.savez_compressed(tmp_path / "a.npz", images=array, labels=ORDER.numpy().astype(">i2"))
    same(convert(tmp_path / "a.npz"), images, within=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions(tmp_path, images, dtype):
    path = store(tmp_path / "a.safetensors", {"images": images.to(dtype), "labels": ORDER})
    same(convert(path), images.to(dtype).float(), within=0)


def test_a_pair_and_a_lone_tensor(tmp_path, images):
    torch.save([images, ORDER], tmp_path / "pair.pt")
    same(convert(tmp_path / "pair.pt"), images, within=0)
    torch.save(torch.nn.Parameter(images), tmp_path / "lone.pt")
    found = convert(tmp_path / "lone.pt", ipc=2, info=CIFAR)
    same(found, images, within=0)
    told(found, "assumed that images lie class by class, 2 of each of 10")
    assert not found.images.requires_grad
    refused(tmp_path / "lone.pt", "there are none; add them, or say --ipc")
    refused(tmp_path / "lone.pt", "20 images are not --ipc 3 of each of 10", ipc=3, info=CIFAR)


# ----------------------------------------------------------------------------------------- ranges


@pytest.mark.parametrize(
    "name", [n for n, (m, _) in NORMALISATIONS.items() if len(m) == 3 or n == "half"]
)
def test_a_normalisation_is_recognised_by_black_and_white_or_named(tmp_path, images, name):
    path = store(tmp_path / "a.npz", {"x": normalise(images, NORMALISATIONS[name]), "y": ORDER})
    found = convert(path)
    same(found, images)
    told(found, f"assumed to be in normalisation {name}: of those known")
    found = convert(path, normalisation=name)
    same(found, images)
    told(found, f"normalisation {name}, as --normalisation says")


def test_floats_of_0_to_255_are_divided(tmp_path, images):
    path = store(tmp_path / "a.npz", {"x": bytes_images().float(), "y": ORDER})
    found = convert(path)
    same(found, images, within=0)
    told(found, "bytes: of those known it alone gives values in [0, 1]", "divided by 255")
    for dtype in (torch.int64, torch.int16):
        same(convert(store(path, {"x": bytes_images().to(dtype), "y": ORDER})), images, within=0)


def test_what_several_or_none_explain_is_refused_with_the_observed_range(tmp_path, images):
    path = tmp_path / "a.npz"
    store(path, {"x": normalise(images * 0.6 + 0.2, IMAGENET), "y": ORDER})
    text = refused(path, "would all explain them; say which: --normalisation NAME")
    low, high = ((v - 0.485) / 0.229 for v in (0.2, 0.8))
    assert f"[{low:.4g}, {high:.4g}], " in text
    assert "by channel" in text
    assert "imagenet" in text.partition("would")[0]
    store(path, {"x": images * 900 - 300, "y": ORDER})
    assert "MEAN,.../STD" in refused(path, "none of .* explains them")
    store(path, {"x": bytes_images().to(torch.int16) - 1, "y": ORDER})
    refused(path, "whole numbers with .*0 to 255 is expected")
    store(path, {"x": (bytes_images() > 127).to(torch.uint8), "y": ORDER})
    refused(path, "none above 1; say --normalisation none")
    same(convert(path, normalisation="none"), (bytes_images() > 127).float(), within=0)
    store(path, {"x": torch.full_like(images, torch.nan), "y": ORDER})
    refused(path, "NaN")


@given(
    side=st.integers(1, 9),
    channels=st.sampled_from([1, 3]),
    count=st.integers(1, 4),
    nhwc=st.booleans(),
)
def test_axes_are_read_rightly_or_not_at_all(side, channels, count, nhwc):
    plain = torch.arange(count * channels * side * side).view(count, channels, side, side)
    given = plain.permute(0, 2, 3, 1) if nhwc else plain
    for known in (None, channels):
        order = None
        if (side, channels) == (3, 3):  # the only shape that can be read both ways
            with pytest.raises(GuardbenchError, match="nchw and as nhwc"):
                pixels.channels_first(given, "x", layout=None, channels=known)
            order = "nhwc" if nhwc else "nchw"
        found, said = pixels.channels_first(given, "x", layout=order, channels=known)
        torch.testing.assert_close(found, plain)
        assert f"of {side} x {side}" in said


@given(
    name=st.sampled_from(sorted(NORMALISATIONS)),
    low=st.floats(0, 0.9),
    width=st.floats(0.05, 1),
    seed=st.integers(0, 99),
)
def test_a_guess_is_the_only_one_that_fits_and_a_name_gives_the_pixels(name, low, width, seed):
    mean_std = NORMALISATIONS[name]
    channels = len(mean_std[0]) if name not in ("half", "bytes", "none") else 3
    noise = torch.rand(3, channels, 4, 4, generator=torch.Generator().manual_seed(seed))
    plain = (low + noise * min(width, 1 - low)).clamp(0, 1)
    given = normalise(plain, mean_std)
    found, _ = pixels.to_unit(given, "x", pixels.Ranged(name))
    torch.testing.assert_close(found, plain, rtol=0, atol=1e-5)
    assert found.min() >= 0
    assert found.max() <= 1
    inside = given.min() >= -pixels.TOLERANCE and given.max() <= 1 + pixels.TOLERANCE
    refusal = ""
    try:
        guessed, lines = pixels.to_unit(given, "x", pixels.Ranged())
    except GuardbenchError as error:
        refusal = str(error)
    if refusal:
        assert name in refusal
        assert not inside
        return
    if inside:
        torch.testing.assert_close(guessed, given.clamp(0, 1))
        return
    assert f"assumed to be in normalisation {name}:" in lines[0]
    torch.testing.assert_close(guessed, plain, rtol=0, atol=1e-5)


# ----------------------------------------------------------------------------------------- labels


def test_labels_however_they_are_stored(tmp_path, images):
    path = tmp_path / "a.npz"
    one_hot = torch.eye(K)[ORDER]
    for stored, said in {
        "floats that are whole numbers, 0 to 9": ORDER.float(),
        "labels: whole numbers, 0 to 9": ORDER[:, None].to(torch.uint8),
        "one-hot rows": one_hot,
        "one-hot": one_hot.to(torch.int32),
    }.items():
        found = convert(store(path, {"images": images, "labels": said}))
        same(found, images)
        assert found.soft is None
        told(found, stored)
    soft = (one_hot * 0.9 + 0.01).half()
    for arrays in ({"labels": soft}, {"labels": ORDER, "soft": soft}, {"logits": soft}):
        found = convert(store(path, {"images": images, **arrays}), info=CIFAR)
        same(found, images)
        torch.testing.assert_close(found.soft.double().sum(1), torch.ones(20).double())
        torch.testing.assert_close(found.soft, one_hot * 0.9 + 0.01, rtol=1e-3, atol=1e-3)
        told(found, "probabilities (rows sum to 1 within")


@pytest.mark.parametrize(
    ("labels", "line"),
    [
        (ORDER[:-1], "shape .19. for 20 images"),
        (ORDER - 1, "from -1 to 8"),
        (ORDER + 1, "up to 10, where there are 10 classes"),
        (ORDER + 0.5, "not whole numbers"),
        (ORDER.clamp(max=8), "class 8 has 4 images|class 0 has 2 images"),
        (ORDER.double() * torch.nan, "NaN"),
        (ORDER * 10**12, "they are numbers of classes"),
        (torch.eye(K)[ORDER] * 0.5, "neither probabilities nor logits"),
        (torch.eye(K)[ORDER].long() * 2, "not one-hot"),
        (torch.randn(20, 7), "a row of 10 an image"),
        (torch.zeros(20, 2, 2), "shape .20, 2, 2."),
    ],
)
def test_labels_that_cannot_be_meant(tmp_path, images, labels, line):
    torch.save([images, labels], tmp_path / "a.pt")
    text = refused(tmp_path / "a.pt", line, info=CIFAR)
    assert text.startswith(f"{tmp_path / 'a.pt'}: ")


def test_an_ipc_that_is_said_is_checked(tmp_path, images):
    torch.save([images, ORDER], tmp_path / "a.pt")
    assert convert(tmp_path / "a.pt", ipc=2).ipc == 2
    refused(tmp_path / "a.pt", "class 0 has 2 images where --ipc is 3", ipc=3)


# ---------------------------------------------------------------------------------- hostile files


class Evil:
    def __reduce__(self):
        return (print, ("the code in the pickle ran",))


def test_code_in_a_pickle_is_never_run(tmp_path, images, capsys):
    torch.save({"images": images, "labels": Evil()}, tmp_path / "new.pt")
    torch.save([images, Evil()], tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "bare.pt").write_bytes(pickle.dumps(Evil()))
    for name in ("new", "old", "bare"):
        text = refused(tmp_path / f"{name}.pt", "code in it is never run")
        assert str(tmp_path / f"{name}.pt") in text
    for suffix in (".npy", ".npz"):
        np.savez(tmp_path / "o.npz", images=np.array([Evil()]), labels=ORDER)
        np.save(tmp_path / "o.npy", np.array([Evil()], dtype=object))
        refused(tmp_path / f"o{suffix}", "objects are never unpickled")
    assert "ran" not in capsys.readouterr().out


def test_numpy_scalars_beside_tensors_become_nothing(tmp_path):
    torch.save({"best": np.float32(0.5), "x": torch.ones(2)}, tmp_path / "a.pt")
    found = load_torch(tmp_path / "a.pt")
    assert found["best"] is None
    torch.save(np.ones(3), tmp_path / "a.pt")
    with pytest.raises(GuardbenchError, match=r"names numpy\S*_reconstruct"):
        load_torch(tmp_path / "a.pt")
    with pytest.raises(pickle.UnpicklingError):  # what was let through is shut again
        torch.load(dc_file(tmp_path / "b.pt", torch.ones(2)), weights_only=True)


def archive(path: Path, entries, method=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", method) as made:
        for name, content in entries.items():
            if isinstance(name, str):
                name = zipfile.ZipInfo(name)
                name.compress_type = method
            made.writestr(name, content)
    return path


def npy(array=None, *, shape=None, descr="<f4"):
    """The bytes of a .npy, whose header may claim another shape than there are numbers."""
    buffer = io.BytesIO()
    array = np.zeros(4, np.float32) if array is None else array
    head = {
        "descr": descr,
        "fortran_order": False,
        "shape": array.shape if shape is None else shape,
    }
    np.lib.format.write_array_header_1_0(buffer, head)
    return buffer.getvalue() + array.tobytes()


@pytest.mark.parametrize("name", ["../x.npy", "/etc/x.npy", "a/../../x.npy", "..\\x.npy"])
@pytest.mark.parametrize("suffix", [".npz", ".pt"])
def test_archives_with_names_that_lead_elsewhere(tmp_path, name, suffix):
    path = archive(tmp_path / f"a{suffix}", {name: npy()}, zipfile.ZIP_STORED)
    refused(path, "a name that leads out of it")
    assert sorted(tmp_path.iterdir()) == [path]


def test_archives_that_are_no_plain_ones(tmp_path, images, monkeypatch):
    link = zipfile.ZipInfo("images.npy")
    link.external_attr = 0o120777 << 16
    refused(archive(tmp_path / "a.npz", {link: "/etc/passwd"}), "is a link")
    with warnings.catch_warnings(), zipfile.ZipFile(tmp_path / "b.npz", "w") as made:
        warnings.simplefilter("ignore")  # of zipfile, on what this is about
        made.writestr("x.npy", npy())
        made.writestr("x.npy", npy())
    refused(tmp_path / "b.npz", "there twice")
    refused(archive(tmp_path / "c.npz", {"x.npy": npy(), "run.sh": "rm"}), "run.sh: is no array")
    good = store(tmp_path / "d.npz", {"images": images, "labels": ORDER})
    good.write_bytes(b"#!/bin/sh\n" + good.read_bytes())
    refused(good, "it begins as no archive does")
    torch.save([images, ORDER], tmp_path / "e.pt")
    with zipfile.ZipFile(tmp_path / "e.pt") as made:
        entries = {name: made.read(name) for name in made.namelist()}
    refused(archive(tmp_path / "e.pt", entries), "compressed, which torch.save never does")
    monkeypatch.setattr(tensor_files, "PICKLE_BYTES", 10)
    refused(archive(tmp_path / "e.pt", entries, zipfile.ZIP_STORED), r"its pickle has \d+ bytes")
    whole = store(tmp_path / "f.npz", {"images": images, "labels": ORDER}).read_bytes()
    for cut in (10, 1000, len(whole) - 30):
        (tmp_path / "f.npz").write_bytes(whole[:cut])
        refused(tmp_path / "f.npz", "cannot be read")


def test_decompression_bombs_are_refused_before_they_are_unpacked(tmp_path, monkeypatch):
    """20 MiB of zeros in 20 KiB; and one whose directory lies about how much that gives."""
    zeros = npy(np.zeros(5 << 20, np.float32))
    path = archive(tmp_path / "bomb.npz", {"images.npy": zeros})
    assert path.stat().st_size < 30_000

    def never(*_: object) -> None:
        raise AssertionError("it was unpacked")

    with monkeypatch.context() as patched:
        patched.setattr(zipfile.ZipFile, "open", never)
        refused(path, r"\d+ bytes that unpack to 20971648")
        patched.setattr(tensor_files, "MOST_RATIO", 10**9)
        patched.setattr(tensor_files, "MOST_BYTES", 1 << 20)
        refused(path, "unpacks to 20971648 bytes, the most is")
    data = bytearray(path.read_bytes())
    at = data.rindex(b"PK\x01\x02")
    data[at + 24 : at + 28] = struct.pack("<I", 1 << 20)  # the directory's size, unpacked
    path.write_bytes(data)
    refused(path, "do not fit its header")


def test_directories_and_entries_have_limits(tmp_path, monkeypatch):
    path = archive(tmp_path / "many.npz", {f"{k}.npy": npy() for k in range(50)})
    monkeypatch.setattr(tensor_files, "MOST_ENTRIES", 49)
    refused(path, "more than 49 entries")
    monkeypatch.setattr(tensor_files, "DIRECTORY_BYTES", 2000)
    monkeypatch.setattr(zipfile, "ZipFile", None)  # and its directory is not even read
    refused(path, "more than 49 entries")
    sre2l(tmp_path / "syn", bytes_images(), "png")
    monkeypatch.setattr(class_folders, "MOST_ENTRIES", 9)
    refused(tmp_path / "syn", "more than 9 entries", info=CIFAR)


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (npy(shape=(10**15, 3, 32, 32)), "do not fit its header"),
        (npy(shape=(-4,)), "do not fit its header"),
        (npy(shape=(2,)), "do not fit its header"),
        (npy(descr="|O"), "never unpickled"),
        (npy(descr="<c8"), "not numbers"),
        (npy(descr=[("a", "<f4")]), "not numbers"),
        (npy(descr="<M8[ns]"), "not numbers"),
        (b"\x93NUMPY\x02\x00" + struct.pack("<I", 1 << 31) + b"{", "a header of 2147483648 bytes"),
        (b"\x93NUMPY\x01\x00" + struct.pack("<H", 8000) + b"(" * 8000, "cannot be read"),
        (b"\x93NUMPY\x01\x00" + struct.pack("<H", 20) + b"__import__('os')    ", "cannot be read"),
        (b"\x93NUMPY\x03\x00" + bytes(100), "it begins as no array"),
        (b"PK\x03\x04", "it begins as no array"),
        (b"", "it begins as no array"),
    ],
)
def test_headers_of_arrays_that_lie(tmp_path, content, line):
    (tmp_path / "a.npy").write_bytes(content)
    with pytest.raises(GuardbenchError, match=line) as caught:
        load_npy(tmp_path / "a.npy")
    assert "\n" not in str(caught.value)
    with pytest.raises(GuardbenchError, match=line):
        load_npz(archive(tmp_path / "a.npz", {"x.npy": content}))


def test_safetensors_with_a_header_that_lies(tmp_path, monkeypatch):
    for content in (
        struct.pack("<Q", 1 << 60) + b"{}",
        b"",
        b"\0" * 7,
        struct.pack("<Q", 2) + b"[]",
    ):
        (tmp_path / "a.safetensors").write_bytes(content)
        refused(tmp_path / "a.safetensors", "cannot be read")
    store(tmp_path / "a.safetensors", {"images": bytes_images(), "labels": ORDER})
    monkeypatch.setattr(tensor_files, "DIRECTORY_BYTES", 100)
    refused(tmp_path / "a.safetensors", r"a header of \d+ bytes")


@pytest.mark.parametrize(
    "evil",
    [
        torch.zeros(1).expand(10**6, 3, 1000, 1000),
        torch.zeros(20, 3, 6, 6, device="meta"),
        torch.zeros(20, 3, 6, 6).to_sparse(),
        torch.zeros(20, 3, 6, 6, dtype=torch.complex64),
    ],
    ids=["larger-than-its-file", "meta", "sparse", "complex"],
)
def test_tensors_that_are_no_plain_numbers(tmp_path, evil):
    torch.save({"images": evil, "labels": ORDER}, tmp_path / "a.pt")
    assert (tmp_path / "a.pt").stat().st_size < 100_000
    refused(tmp_path / "a.pt", "images: .*(not plain numbers|more than 2147483648 values)")


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_damaged_files_end_in_one_line(tmp_path_factory, data):
    """Bytes of good files changed, cut and moved: our own error, or a set that is in order."""
    suffix = data.draw(st.sampled_from([".pt", ".npz", ".npy", ".safetensors", ".png", ".jpg"]))
    content = bytearray(_good(suffix))
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(content) - 1))
        content[place : place + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    content = content[: data.draw(st.sampled_from([len(content), len(content) // 2, 40]))]
    folder = tmp_path_factory.mktemp("fuzz")
    path = folder / f"images{suffix}"
    if suffix in (".png", ".jpg"):
        path = folder / "new000" / f"class000_id000{suffix}"
        path.parent.mkdir()
    path.write_bytes(content)
    source = folder if suffix in (".png", ".jpg") else path
    refusal, found = "", None
    try:
        found = convert(source, ipc=1, classes=1 if source is folder else 4, clip=True)
    except GuardbenchError as error:
        refusal = str(error)
    assert "\n" not in refusal
    if found is not None:
        assert found.images.min() >= 0
        assert found.images.max() <= 1


_GOOD: dict[str, bytes] = {}


def _good(suffix):
    if suffix not in _GOOD:
        buffer, array = io.BytesIO(), np.linspace(0, 1, 192, dtype=np.float32).reshape(4, 3, 4, 4)
        if suffix == ".npz":
            np.savez_compressed(buffer, images=array, labels=np.arange(4))
        elif suffix == ".npy":
            np.save(buffer, array)
        elif suffix == ".pt":
            torch.save({"images": torch.from_numpy(array), "labels": torch.arange(4)}, buffer)
        elif suffix == ".safetensors":
            from safetensors.torch import save

            buffer.write(save({"images": torch.from_numpy(array), "labels": torch.arange(4)}))
        else:
            picture = Image.fromarray((array[0].transpose(1, 2, 0) * 255).astype(np.uint8))
            picture.save(buffer, "PNG" if suffix == ".png" else "JPEG")
        _GOOD[suffix] = buffer.getvalue()
    return _GOOD[suffix]


def test_sources_that_are_none(tmp_path, images):
    refused(tmp_path / "absent.pt", "no such file or folder")
    refused(tmp_path, "no images .* name the folder or the file that holds them")
    (tmp_path / "notes.txt").write_text("x")
    refused(tmp_path / "notes.txt", "no file of a kind that is read")
    torch.save(3, tmp_path / "a.pt")
    refused(tmp_path / "a.pt", "holds neither a tensor")
    torch.save({"data": []}, tmp_path / "a.pt")
    refused(tmp_path / "a.pt", "data: is empty")
    torch.save({"data": [3]}, tmp_path / "a.pt")
    refused(tmp_path / "a.pt", r"data\[0\]: is not \[images, labels\]")
    torch.save({"data": [[images, "labels"]]}, tmp_path / "a.pt")
    refused(tmp_path / "a.pt", r"data\[0\]\[1\]: is str, not a tensor")
    torch.save({"a": images, "b": images}, tmp_path / "a.pt")
    refused(tmp_path / "a.pt", r"is not clear \(a \[20, 3, 6, 6\], b \[20, 3, 6, 6\]\)")
    torch.save([images, ORDER], tmp_path / "a.pt")
    refused(tmp_path / "a.pt", "only res_", experiment=1)
    refused(tmp_path / "a.pt", "choose nchw or nhwc", layout="chw")
    torch.save([images[:, :, :5], ORDER], tmp_path / "a.pt")
    refused(tmp_path / "a.pt", "is not square images")


# ------------------------------------------------------------------------------- the command line


def run(*words):
    return CliRunner().invoke(app, ["convert", *map(str, words)])


def test_the_command_writes_a_submission_and_says_what_it_assumed(tmp_path, images):
    path = dc_file(tmp_path / "res_DC.pt", normalise(images, DC_CIFAR))
    folder = tmp_path / "submissions/mine"
    done = run(path, "--output", folder, "--dataset", "cifar10")
    assert done.exit_code == 0, done.output
    for line in (
        "that DC uses for cifar10",
        "IPC            2 images of each of 10",
        "submission.toml",
    ):
        assert line in done.output
    assert sorted(one.name for one in folder.iterdir()) == [
        "images.safetensors",
        "preview.png",
        "submission.toml",
    ]
    assert [one.name for one in folder.parent.iterdir()] == ["mine"]
    tensors = load_file(folder / "images.safetensors")
    assert tensors.keys() == {"images", "labels"}
    torch.testing.assert_close(tensors["images"], images, rtol=0, atol=2e-7)
    torch.testing.assert_close(tensors["labels"], ORDER)
    with Image.open(folder / "preview.png") as preview:
        assert min(preview.size) > 50
    form = load_form(folder)
    assert (form.name, form.dataset, form.ipc, form.resolution) == ("mine", "cifar10", IPC, SIDE)
    assert (form.labels, form.data.kind, form.data.path) == (
        "hard",
        "safetensors",
        "images.safetensors",
    )
    assert form.extra_data
    assert form.made.startswith(FILL_IN)
    assert "that DC uses for cifar10" in form.made
    assert form.licence.startswith(FILL_IN)


def test_soft_labels_are_written_beside_the_hard_ones(tmp_path, images):
    soft = torch.eye(K)[ORDER] * 0.9 + 0.01
    path = store(tmp_path / "a.npz", {"images": images, "labels": soft})
    done = run(path, "--output", tmp_path / "out", "--dataset", "cifar10", "--name", "soft-ones")
    assert done.exit_code == 0, done.output
    tensors = load_file(tmp_path / "out/images.safetensors")
    torch.testing.assert_close(tensors["soft"], soft)
    torch.testing.assert_close(tensors["labels"], ORDER)
    form = load_form(tmp_path / "out")
    assert (form.name, form.labels) == ("soft-ones", "soft")


@pytest.mark.parametrize("labels", ["hard", "soft"])
def test_what_is_written_passes_the_check(tmp_path, labels):
    grey = torch.rand(K, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    rows = torch.randn(K, K, generator=torch.Generator().manual_seed(1)) + 9 * torch.eye(K)
    given = torch.arange(K) if labels == "hard" else rows.softmax(1).half()
    path = store(
        tmp_path / "a.safetensors", {"x": normalise(grey, ((0.1307,), (0.3081,))), "y": given}
    )
    out = tmp_path / "mine"
    done = run(path, "--output", out, "--dataset", "digits", "--normalisation", "mnist")
    assert done.exit_code == 0, done.output
    torch.testing.assert_close(load_file(out / "images.safetensors")["images"], grey)
    words = ["submission", "check", str(out), "--no-copies"]
    unsaid = CliRunner().invoke(app, words)
    assert unsaid.exit_code == 1
    assert "licence: still says FILL IN; say it." in unsaid.output
    form = out / "submission.toml"
    form.write_text(form.read_text().replace("FILL IN", "Said:"))
    checked = CliRunner().invoke(app, words)
    assert checked.exit_code == 0, checked.output
    assert "ok, but copies were not looked for" in checked.output
    assert f"IPC 1, {labels} labels" in checked.output


def test_nothing_is_overwritten_and_nothing_half_written(tmp_path, images, monkeypatch):
    path = store(tmp_path / "a.npz", {"images": images, "labels": ORDER})
    out = tmp_path / "out"
    out.mkdir()
    converted = convert(path, info=CIFAR)
    words = {"name": "mine", "info": CIFAR, "source": path}
    with monkeypatch.context() as patched:
        patched.setattr("guardbench.submissions.convert.write_text", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            write_submission(converted, out, **words)
    assert sorted(one.name for one in tmp_path.iterdir()) == ["a.npz", "out"]
    assert not [*out.iterdir()]
    with pytest.raises(GuardbenchError, match="choose such a name"):
        write_submission(converted, out, **{**words, "name": "My Set"})
    write_submission(converted, out, **words)  # an empty folder is no obstacle
    before = {one: one.read_bytes() for one in out.iterdir()}
    assert before
    for taken in (out, path):
        with pytest.raises(GuardbenchError, match=r"is not empty|is no folder"):
            write_submission(converted, taken, **words)
    assert {one: one.read_bytes() for one in out.iterdir()} == before
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(GuardbenchError, match="is no folder"):
        write_submission(converted, tmp_path / "link", **words)


def test_the_command_refuses_in_one_line_and_leaves_nothing(tmp_path, images):
    path = store(tmp_path / "a.npz", {"images": images * 900 - 300, "labels": ORDER})
    done = run(path, "--output", tmp_path / "out", "--dataset", "cifar10")
    assert isinstance(done.exception, GuardbenchError)
    assert "none of" in str(done.exception)
    assert not (tmp_path / "out").exists()
    done = run(path, "--output", tmp_path / "out", "--dataset", "cifar11")
    assert "Did you mean cifar10?" in str(done.exception)
