"""What each dataset is: its classes in explicit order, its splits and its official source."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from guardbench.protocol import unknown

Split = Literal["train", "val"]
SPLITS: tuple[Split, ...] = ("train", "val")


@dataclass(frozen=True)
class Archive:
    """An official download: one archive, known by its MD5, that unpacks into `folder`."""

    url: str
    md5: str
    megabytes: int
    folder: str

    @property
    def filename(self) -> str:
        """Name of the archive file: the last part of the address."""
        return self.url.rsplit("/", 1)[-1]


@dataclass(frozen=True)
class CifarFiles:
    """The official CIFAR files: a record is `label_bytes` bytes and then 3 x 32 x 32 pixels.

    The last of the label bytes is the class (CIFAR-100 has the coarse class before it).
    """

    python_marker: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    label_bytes: int
    records_per_train_file: int
    records_per_test_file: int


@dataclass(frozen=True)
class DatasetInfo:
    """What is known of a dataset before any of its files is seen.

    `classes` are the class folders' names in label order; it is empty where they are WordNet IDs
    read from the data itself (their order is then the sorted one, their number `num_classes`).
    `names` are for people to read, in the same order, empty where there are none; `folders` are the
    names under which the dataset is looked for in a data folder, the first that is there being used.
    """

    name: str
    num_classes: int
    channels: int
    native_resolution: int
    train_count: int
    val_count: int
    classes: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    folders: tuple[str, ...] = ()
    val_folders: tuple[str, ...] = ("val", "test")
    archive: Archive | None = None
    cifar: CifarFiles | None = None
    homepage: str = ""

    @property
    def embedded(self) -> bool:
        """Whether the images come with an installed package, so that nothing is looked for."""
        return not self.folders

    def split_folders(self, split: Split) -> tuple[str, ...]:
        """Names that the folder of `split` may have, the usual one first."""
        return ("train",) if split == "train" else self.val_folders

    def count(self, split: Split) -> int:
        """Number of images in the official `split`."""
        return self.train_count if split == "train" else self.val_count

    def describe(self, class_key: str) -> str:
        """`n01440764 (tench)`, or the key alone where there is no other name for it."""
        named = dict(zip(self.classes, self.names, strict=False)).get(class_key, class_key)
        return class_key if named == class_key else f"{class_key} ({named})"


_DIGITS = tuple("0123456789")

_IMAGENETTE = {
    "n01440764": "tench",
    "n02102040": "English springer",
    "n02979186": "cassette player",
    "n03000684": "chain saw",
    "n03028079": "church",
    "n03394916": "French horn",
    "n03417042": "garbage truck",
    "n03425413": "gas pump",
    "n03445777": "golf ball",
    "n03888257": "parachute",
}

_CIFAR10 = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)

_CIFAR100_FINE = """
    apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus
    butterfly camel can castle caterpillar cattle chair chimpanzee clock cloud cockroach couch
    crab crocodile cup dinosaur dolphin elephant flatfish forest fox girl hamster house kangaroo
    keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree motorcycle mountain mouse
    mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate poppy
    porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper
    snail snake spider squirrel streetcar sunflower sweet_pepper table tank telephone television
    tiger tractor train trout tulip turtle wardrobe whale willow_tree wolf woman worm
"""
_CIFAR100 = tuple(_CIFAR100_FINE.split())

# The sorted WordNet IDs, one a line: labels 0 to 999 wherever ImageNet-1K has labels.
_IMAGENET = tuple(
    (Path(__file__).with_name("imagenet-classes.txt")).read_text(encoding="ascii").split()
)

_ENTRIES = (
    DatasetInfo(
        name="digits",
        num_classes=10,
        channels=1,
        native_resolution=8,
        train_count=1352,
        val_count=445,
        classes=_DIGITS,
        names=_DIGITS,
        homepage="https://archive.ics.uci.edu/dataset/80",
    ),
    DatasetInfo(
        name="imagenette",
        num_classes=10,
        channels=3,
        native_resolution=224,
        train_count=9469,
        val_count=3925,
        classes=tuple(_IMAGENETTE),
        names=tuple(_IMAGENETTE.values()),
        folders=("imagenette", "imagenette2", "imagenette2-320", "imagenette2-160"),
        archive=Archive(
            # The full-size archive at every resolution: the smaller ones hold other pixels.
            url="https://s3.amazonaws.com/fast-ai-imageclas/imagenette2.tgz",
            md5="fe2fc210e6bb7c5664d602c3cd71e612",
            megabytes=1557,
            folder="imagenette2",
        ),
        homepage="https://github.com/fastai/imagenette",
    ),
    DatasetInfo(
        name="cifar10",
        num_classes=10,
        channels=3,
        native_resolution=32,
        train_count=50_000,
        val_count=10_000,
        classes=_CIFAR10,
        names=_CIFAR10,
        folders=("cifar10", "cifar-10-batches-bin", "cifar-10-batches-py"),
        val_folders=("test", "val"),
        archive=Archive(
            # The binary archive, because reading it takes no pickle.
            url="https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
            md5="c32a1d4ab5d03f1284b67883e8d87530",
            megabytes=170,
            folder="cifar-10-batches-bin",
        ),
        cifar=CifarFiles(
            python_marker="data_batch_1",
            train=tuple(f"data_batch_{index}.bin" for index in range(1, 6)),
            test=("test_batch.bin",),
            label_bytes=1,
            records_per_train_file=10_000,
            records_per_test_file=10_000,
        ),
        homepage="https://www.cs.toronto.edu/~kriz/cifar.html",
    ),
    DatasetInfo(
        name="cifar100",
        num_classes=100,
        channels=3,
        native_resolution=32,
        train_count=50_000,
        val_count=10_000,
        classes=_CIFAR100,
        names=tuple(name.replace("_", " ") for name in _CIFAR100),
        folders=("cifar100", "cifar-100-binary", "cifar-100-python"),
        val_folders=("test", "val"),
        archive=Archive(
            url="https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",
            md5="03b5dce01913d631647c71ecec9e9cb8",
            megabytes=169,
            folder="cifar-100-binary",
        ),
        cifar=CifarFiles(
            python_marker="meta",
            train=("train.bin",),
            test=("test.bin",),
            label_bytes=2,
            records_per_train_file=50_000,
            records_per_test_file=10_000,
        ),
        homepage="https://www.cs.toronto.edu/~kriz/cifar.html",
    ),
    DatasetInfo(
        name="tiny-imagenet",
        num_classes=200,
        channels=3,
        native_resolution=64,
        train_count=100_000,
        val_count=10_000,
        folders=("tiny-imagenet", "tiny-imagenet-200"),
        # The official test folder has no labels, so it never stands in for val.
        val_folders=("val",),
        archive=Archive(
            url="http://cs231n.stanford.edu/tiny-imagenet-200.zip",
            md5="90528d7ca1a48142e341f4ef8d21d0de",
            megabytes=248,
            folder="tiny-imagenet-200",
        ),
        homepage="http://cs231n.stanford.edu/tiny-imagenet-200.zip",
    ),
    DatasetInfo(
        name="imagenet",
        num_classes=1000,
        channels=3,
        native_resolution=224,
        train_count=1_281_167,
        val_count=50_000,
        classes=_IMAGENET,
        folders=("imagenet", "imagenet-1k", "ILSVRC2012"),
        val_folders=("val",),
        homepage="https://image-net.org",
    ),
)

CATALOG: dict[str, DatasetInfo] = {entry.name: entry for entry in _ENTRIES}


def dataset_info(name: str) -> DatasetInfo:
    """The catalogue's entry for `name`.

    Raises:
        GuardbenchError: there is no such dataset; the line names the nearest one.
    """
    if name not in CATALOG:
        raise unknown("dataset", name, CATALOG)
    return CATALOG[name]


def class_names(name: str) -> tuple[str, ...]:
    """Names for people, in label order; empty where only the data itself lists the classes.

    Raises:
        GuardbenchError: there is no such dataset.
    """
    return dataset_info(name).names
