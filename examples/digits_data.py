"""Images of handwritten digits for train_digits.py: scikit-learn's own, or the user's CSV file.

Usage:
    digits = load_digits()  # 1797 images, 8x8, ten classes; no download
    digits = read_csv(Path("train.csv"))  # a header with a "label" column, then the pixels
"""

from __future__ import annotations

import contextlib
import csv
import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TextIO

import numpy as np
import sklearn.datasets
import torch
from torch import Tensor

SPLIT_SEED = 0  # the same images are held out in every run, whatever --seed says
TEST_SHARE = 0.2


class DataError(Exception):
    """The fault of a file, with its line and column if they are known."""

    def __init__(
        self, problem: str, path: Path, line: int | None = None, column: str | None = None
    ) -> None:
        place = str(path)
        if line is not None:
            place += f", line {line}"
        if column is not None:
            place += f", column {column!r}"
        super().__init__(f"{place}: {problem}")


@dataclass(frozen=True)
class Digits:
    """Images (n, 1, side, side) scaled to 0..1, and labels that count the classes from 0."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    classes: list[int]  # the label of each class in the file
    fingerprint: int  # identifies the data set when a run is resumed

    @property
    def side(self) -> int:
        return self.train_images.shape[-1]

    def to(self, device: torch.device) -> Digits:
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **{name: tensor.to(device) for name, tensor in tensors.items()})


def load_digits() -> Digits:
    """The 8x8 digits that ship inside scikit-learn."""
    pixels, labels = sklearn.datasets.load_digits(return_X_y=True)
    return prepare(np.asarray(pixels, np.float32), np.asarray(labels).tolist())


def read_csv(path: Path) -> Digits:
    """Read a CSV file, or raise a DataError that says where it is malformed."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            pixels, labels = read_table(file, path)
    except OSError as error:
        raise DataError(error.strerror or str(error), path) from error
    except UnicodeDecodeError as error:
        raise DataError("not a text file in UTF-8", path) from error
    return prepare(pixels, labels)


def prepare(pixels: np.ndarray, labels: list[int]) -> Digits:
    """Scale the pixels (in place), shape the images, and hold some out for testing."""
    fingerprint = zlib.crc32(repr(labels).encode(), zlib.crc32(pixels.data))
    classes = sorted(set(labels))
    number = {label: index for index, label in enumerate(classes)}
    targets = torch.tensor([number[label] for label in labels])

    scale(pixels)
    side = math.isqrt(pixels.shape[1])
    images = torch.from_numpy(pixels).view(-1, 1, side, side)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(SPLIT_SEED))
    held_out = max(1, round(len(images) * TEST_SHARE))
    test, train = order[:held_out], order[held_out:]
    return Digits(images[train], targets[train], images[test], targets[test], classes, fingerprint)


def scale(pixels: np.ndarray) -> None:
    """Map the range of all pixels to 0..1, in place."""
    low, high = float(pixels.min()), float(pixels.max())
    pixels /= 2  # halves, as the range of all float32 numbers overflows float32
    pixels -= low / 2
    pixels /= (high - low) / 2 or 1


def read_table(file: TextIO, path: Path) -> tuple[np.ndarray, list[int]]:
    """The pixels, a row for each image, and the labels."""
    rows = numbered_rows(file, path)
    line, header = next(rows, (1, []))
    if not header:
        raise DataError("the file is empty", path)
    header = [name.strip() for name in header]
    label_column = check_header(header, path, line)
    names = header[:label_column] + header[label_column + 1 :]

    images: list[np.ndarray] = []
    labels: list[int] = []
    for line, row in rows:
        if len(row) != len(header):
            problem = f"{len(row)} cells, but the header has {len(header)} columns"
            raise DataError(problem, path, line)
        labels.append(read_label(row.pop(label_column), path, line))
        images.append(read_pixels(row, names, path, line))
    if len(images) < 2:
        raise DataError(f"{len(images)} rows below the header; at least 2 are needed", path)
    if len(set(labels)) < 2:
        raise DataError(f"every label is {labels[0]}; at least 2 different ones are needed", path)
    return np.stack(images), labels


def numbered_rows(file: TextIO, path: Path) -> Iterator[tuple[int, list[str]]]:
    """Each row that is not blank, with the number of its first line."""
    reader = csv.reader(file)
    line = 1
    try:
        for row in reader:
            if len(row) > 1 or "".join(row).strip():
                yield line, row
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(str(error), path, line) from error


def check_header(header: list[str], path: Path, line: int) -> int:
    """The index of the label column. The other columns must make a square image."""
    if header.count("label") != 1:
        problem = f"the header has {header.count('label')} columns named 'label', not 1"
        raise DataError(problem, path, line)
    pixels = len(header) - 1
    if pixels == 0 or math.isqrt(pixels) ** 2 != pixels:
        raise DataError(f"{pixels} pixel columns do not make a square image", path, line)
    return header.index("label")


def read_label(text: str, path: Path, line: int) -> int:
    """An integer of any size. "3.0" counts as one."""
    with contextlib.suppress(ValueError):
        return int(text)
    with contextlib.suppress(ValueError):
        if float(text).is_integer():
            return int(float(text))
    raise DataError(f"{text[:40]!r} is not an integer", path, line, "label")


def read_pixels(cells: list[str], names: list[str], path: Path, line: int) -> np.ndarray:
    """Reads all cells at once. If that fails, it reads one by one to find the wrong cell."""
    with contextlib.suppress(ValueError):
        return to_float32(cells)
    for name, cell in zip(names, cells, strict=True):
        try:
            to_float32([cell])
        except ValueError:
            problem = f"{cell[:40]!r} is not a finite number"
            raise DataError(problem, path, line, name) from None
    raise AssertionError("a row fails whose cells do not")


def to_float32(cells: list[str]) -> np.ndarray:
    with np.errstate(over="ignore"):
        pixels = np.fromiter(map(float, cells), np.float64, len(cells)).astype(np.float32)
    if not np.isfinite(pixels).all():
        raise ValueError("not finite")
    return pixels
