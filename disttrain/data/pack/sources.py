"""Sources that can be packed: scikit-learn's bundled data sets, image folders, CSV and Parquet tables.

:func:`open_source` opens any of them by name. Opening only computes a fingerprint (from a version, a folder listing
or a file hash); the data is read when the source is loaded. Keys come from row numbers and file names, so a sample
can be traced back. Images are stored as they are, without re-encoding. Cost: a table is held in memory, an image
folder only as its listing.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from disttrain.data.pack.samples import IMAGES, Sample, Samples, Source
from disttrain.data.pack.tables import npy, open_table, row_key, tabular_samples
from disttrain.errors import ConfigError, DataError, nearest

SKLEARN: Final = {
    "digits": "classification",
    "iris": "classification",
    "wine": "classification",
    "breast_cancer": "classification",
    "diabetes": "regression",
}
_OWN_SPLITS: Final = ("train", "val", "test")


def open_source(spec: str, *, target: str = "", task: str = "", features: Sequence[str] = ()) -> Source:
    """Open a source by name.

    Args:
        spec: ``sklearn:digits`` or another bundled data set, a folder of images by class, or a ``.csv`` or ``.parquet``
            file.
        target: for a table: the column to predict.
        task: ``classification`` or ``regression``; required for a table with whole-number targets.
        features: for a table: the input columns; by default all other numeric columns.

    Raises:
        ConfigError: an option is missing or does not suit the source.
        DataError: the source does not exist, or a required library is missing.
    """
    if task not in ("", "classification", "regression"):
        raise ConfigError(f"task is {task!r}", hint="use classification or regression")
    path = Path(spec)
    if path.suffix.lower() in (".csv", ".parquet"):
        return open_table(path, target=target, task=task, features=features)
    if target or features:
        raise ConfigError(f"{spec} has no columns to choose", hint="--target and --features are for CSV and Parquet")
    if spec.startswith("sklearn:"):
        return _sklearn(spec.removeprefix("sklearn:"), task)
    if not path.is_dir():
        raise DataError(
            f"cannot pack {spec}: there is no such folder",
            hint=f"name a folder, a .csv or .parquet file, or sklearn: with one of {', '.join(SKLEARN)}",
        )
    if task == "regression":
        raise ConfigError(f"{spec}: an image folder is for classification", hint="omit --task")
    return _image_folder(path)


def _sklearn(name: str, task: str) -> Source:
    if name not in SKLEARN:
        raise DataError(f"sklearn:{name} is not known", hint=nearest(name, SKLEARN))
    if task not in ("", SKLEARN[name]):
        raise ConfigError(f"sklearn:{name} is for {SKLEARN[name]}, not {task}", hint="omit --task")
    try:
        version = importlib.metadata.version("scikit-learn")
    except importlib.metadata.PackageNotFoundError:
        raise DataError(
            f"sklearn:{name} needs scikit-learn, which is missing", hint="pip install 'disttrain[recipes]'"
        ) from None
    return Source(name=name, fingerprint=f"sklearn:{name}:{version}", load=lambda: _load_sklearn(name))


def _load_sklearn(name: str) -> Samples:
    datasets: Any = importlib.import_module("sklearn.datasets")
    if name == "diabetes":
        data = datasets.load_diabetes(scaled=False)
        return tabular_samples(name, data.data.astype(np.float32), data.target.astype(np.float64))
    data = getattr(datasets, f"load_{name}")()
    labels = data.target.astype(np.int64)
    classes = tuple(str(label) for label in data.target_names)
    if name != "digits":
        return tabular_samples(name, data.data.astype(np.float32), labels, classes=classes)
    images = data.images.astype(np.uint8)[:, None]  # ids: (sample, channel, row, column), values 0..16

    def read(number: int) -> Sample:
        fields = {"image.npy": npy(images[number]), "cls": str(labels[number]).encode()}
        return Sample(row_key(name, number, len(images)), fields)

    return Samples(len(images), read, labels=labels, classes=classes)


@dataclass(frozen=True, slots=True)
class _Image:
    """A file in an image folder."""

    split: str
    class_name: str
    path: Path
    size_bytes: int
    mtime_ns: int

    @property
    def extension(self) -> str:
        extension = self.path.suffix[1:].lower()
        return "jpg" if extension == "jpeg" else extension


def _image_folder(folder: Path) -> Source:
    roots = {path.name: path for path in _folders(folder)}
    has_splits = "train" in roots and bool(_folders(roots["train"]))
    unknown = sorted(set(roots) - set(_OWN_SPLITS))
    if has_splits and unknown:
        raise DataError(
            f"{folder} has class folders in train, but also a folder {unknown[0]!r}",
            hint="name the splits train, val and test, each with class folders, and keep nothing else beside them",
        )
    by_split = {split: roots[split] for split in _OWN_SPLITS if split in roots} if has_splits else {"": folder}
    images: list[_Image] = []
    others: list[Path] = []
    for split, root in by_split.items():
        for class_folder in _folders(root):
            found, left_out = _list_images(split, class_folder)
            if not found and split in ("", "train"):
                raise DataError(f"class folder {class_folder} holds no images", hint="add some, or remove the folder")
            images.extend(found)
            others.extend(left_out)
        if not any(image.split == split for image in images):
            raise DataError(
                f"folder {root} holds no images in class folders",
                hint=f"arrange them as {root}/<class>/<name>.jpg (or {', '.join(sorted(IMAGES - {'jpg'}))})",
            )
    listing = hashlib.sha256()
    for image in images:
        place = "\0".join((image.split, image.class_name, image.path.name))
        listing.update(os.fsencode(f"{place}\0{image.size_bytes}\0{image.mtime_ns}\n"))
    return Source(
        name=folder.resolve().name or "images",
        fingerprint=f"images:{listing.hexdigest()}",
        load=lambda: _load_images(images, others),
    )


def _folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _list_images(split: str, class_folder: Path) -> tuple[list[_Image], list[Path]]:
    images, others = [], []
    for path in sorted(class_folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.suffix[1:].lower() in IMAGES and path.is_file():
            status = path.stat()
            images.append(_Image(split, class_folder.name, path, status.st_size, status.st_mtime_ns))
        else:
            others.append(path)
    return images, others


def _load_images(images: list[_Image], others: list[Path]) -> Samples:
    classes = sorted({image.class_name for image in images if image.split in ("", "train")})
    numbers = {name: number for number, name in enumerate(classes)}
    for image in images:
        if image.class_name not in numbers:
            raise DataError(
                f"class {image.class_name!r} of {image.path.parent} is not in train",
                hint=f"every class must be in train; {nearest(image.class_name, classes)}",
            )
    keys = _keys(images)
    labels = np.array([numbers[image.class_name] for image in images], dtype=np.int64)
    in_split = {split: [i for i, image in enumerate(images) if image.split == split] for split in _OWN_SPLITS}
    notes = []
    if others:
        notes.append(
            f"skipped files that are not images: {others[0]}"
            + (f" and {len(others) - 1} more" if len(others) > 1 else "")
        )
    extensions = Counter(image.extension for image in images)
    if len(extensions) > 1:
        notes.append(f"images of several kinds: {', '.join(f'{n} {kind}' for kind, n in sorted(extensions.items()))}")

    def read(number: int) -> Sample:
        image = images[number]
        try:
            content = image.path.read_bytes()
        except OSError as error:
            raise DataError(f"cannot read image {image.path}: {error.strerror}", hint="restore it") from None
        return Sample(keys[number], {image.extension: content, "cls": str(labels[number]).encode()})

    return Samples(
        len(images),
        read,
        labels=labels,
        classes=tuple(classes),
        splits={split: np.array(ids, dtype=np.int64) for split, ids in in_split.items() if ids},
        notes=tuple(notes),
    )


def _keys(images: list[_Image]) -> list[str]:
    """Return ``class/stem`` without dots and white space for each image; repeated keys get ``-2`` and so on."""
    keys: list[str] = []
    used: set[tuple[str, str]] = set()
    for image in images:
        # WebDataset reserves names with a leading "__" for metadata.
        plain = re.sub(r"^__+", "_", f"{_plain(image.class_name)}/{_plain(image.path.stem)}")
        key, count = plain, 1
        while (image.split, key) in used:
            count += 1
            key = f"{plain}-{count}"
        used.add((image.split, key))
        keys.append(key)
    return keys


def _plain(name: str) -> str:
    return re.sub(r"[.\s]+", "_", name)
