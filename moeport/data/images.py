"""Labelled images, cut into patches."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from moeport.config.data import DataConfig, DigitsSource
from moeport.data.documents import is_validation
from moeport.errors import DataError
from moeport.optional import load


class ImageSet:
    """N images, each a sequence of S patches of P pixel values from 0 to 1, with their classes.

    Args:
        patch_NSP: the patches of each image in row-major order, float32.
        class_N: the class of each image, int64.
    """

    def __init__(self, patch_NSP: np.ndarray, class_N: np.ndarray):
        self.patch_NSP, self.class_N = patch_NSP, class_N
        self.sequence_length = patch_NSP.shape[1]

    @property
    def num_sequences(self) -> int:
        """Number of images."""
        return len(self.class_N)

    @property
    def fingerprint(self) -> str:
        """Hexadecimal SHA-256 of pixels and classes."""
        return hashlib.sha256(self.patch_NSP.tobytes() + self.class_N.tobytes()).hexdigest()

    def batch(self, indices_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Patches (B, S, P) and classes (B, 1)."""
        return self.patch_NSP[indices_B], self.class_N[indices_B, None]

    def windows(self, batch_size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Batches that contain every image exactly once, in order; the last may be smaller."""
        for first in range(0, self.num_sequences, batch_size):
            yield self.batch(np.arange(first, min(first + batch_size, self.num_sequences)))


class ImageSplit(NamedTuple):
    """Training images and validation images."""

    train: ImageSet
    validation: ImageSet


def read_images(config: DataConfig) -> ImageSplit:
    """The images of the source, split by a hash of their index.

    Raises:
        DataError: scikit-learn cannot be imported, or one side has no images.
    """
    source = config.source
    assert isinstance(source, DigitsSource)
    digits = load(
        "sklearn.datasets", "data.source.name: digits", "vision", DataError, package="scikit-learn"
    ).load_digits()
    patch_NSP = patches((digits.images / 16).astype(np.float32), source.patch_size)
    class_N = digits.target.astype(np.int64)
    held_N = np.array([is_validation(f"digits:{i}", config.validation_fraction) for i in range(len(class_N))])
    if held_N.all() or not held_N.any():
        raise DataError(
            f"data.validation_fraction: {config.validation_fraction} leaves no image for "
            f"{'training' if held_N.all() else 'validation'}; expected a share such as 0.2"
        )
    return ImageSplit(*(ImageSet(patch_NSP[side_N], class_N[side_N]) for side_N in (~held_N, held_N)))


def patches(pixel_NHW: np.ndarray, size: int) -> np.ndarray:
    """Square patches of `size` x `size` pixels, (N, S, P); patches and their pixels are in row-major order."""
    count, height, width = pixel_NHW.shape
    grid = pixel_NHW.reshape(count, height // size, size, width // size, size)
    return np.ascontiguousarray(grid.transpose(0, 1, 3, 2, 4).reshape(count, -1, size * size))
