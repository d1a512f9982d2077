"""Images as data: patches, the split, the errors."""

import sys

import numpy as np
import pytest

from moeport.config.data import DataConfig, DigitsSource
from moeport.data import prepare_data, read_images
from moeport.data.images import patches
from moeport.errors import DataError
from tests.optional import installed

pytestmark = pytest.mark.skipif(not installed("sklearn"), reason="scikit-learn, which has the digits, is not installed")


def digits(fraction=0.2, patch_size=2):
    return read_images(DataConfig(source=DigitsSource(patch_size=patch_size), validation_fraction=fraction))


def test_patches_go_row_by_row():
    pixels = np.arange(2 * 4 * 4).reshape(2, 4, 4)
    first, second = patches(pixels, 2)
    assert first.tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
    assert second.tolist() == (first + 16).tolist()


@pytest.mark.parametrize("patch_size", [1, 2, 4, 8])
def test_every_image_is_on_one_side_with_its_class(patch_size):
    from sklearn.datasets import load_digits

    split, source = digits(patch_size=patch_size), load_digits()
    want = patches((source.images / 16).astype(np.float32), patch_size)
    images = [patch_SP.tobytes() for side in split for patch_SP in side.patch_NSP]
    classes = [int(c) for side in split for c in side.class_N]
    assert len(images) == 1797
    assert sorted(zip(images, classes, strict=True)) == sorted(
        (patch_SP.tobytes(), int(c)) for patch_SP, c in zip(want, source.target, strict=True)
    )
    assert (split.train.patch_NSP.min(), split.train.patch_NSP.max()) == (0, 1)


def test_the_split_is_the_same_each_time_and_its_share_about_the_fraction():
    first, second, fewer = digits(), digits(), digits(fraction=0.05)
    assert first.train.fingerprint == second.train.fingerprint != first.validation.fingerprint
    assert first.validation.num_sequences == pytest.approx(0.2 * 1797, rel=0.15)
    held = {image.tobytes() for image in first.validation.patch_NSP}
    assert {image.tobytes() for image in fewer.validation.patch_NSP} <= held


def test_batches_and_windows():
    train, validation = digits(patch_size=4)
    patch_BSP, class_B1 = train.batch(np.array([5, 2, 5]))
    assert (patch_BSP.shape, class_B1.shape) == ((3, 4, 16), (3, 1))
    assert (patch_BSP.dtype, class_B1.dtype) == (np.float32, np.int64)
    assert patch_BSP[0].tolist() == patch_BSP[2].tolist() == train.patch_NSP[5].tolist()
    assert class_B1[:, 0].tolist() == train.class_N[[5, 2, 5]].tolist()
    windows = list(validation.windows(100))
    assert np.concatenate([x for x, _ in windows]).tobytes() == validation.patch_NSP.tobytes()
    assert np.concatenate([c for _, c in windows])[:, 0].tolist() == validation.class_N.tolist()


def test_without_scikit_learn_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.delitem(sys.modules, "sklearn.datasets", raising=False)
    with pytest.raises(DataError, match=r"digits needs the package `scikit-learn`: pip install 'moeport\[vision\]'"):
        digits()


def test_a_side_without_images_is_refused():
    with pytest.raises(DataError, match=r"data\.validation_fraction: 1e-09 leaves no image for validation"):
        digits(fraction=1e-9)


def test_text_is_wanted_where_text_is_needed():
    with pytest.raises(DataError, match=r"data\.source\.name: digits has images; expected text"):
        prepare_data(DataConfig(source=DigitsSource()), report=print)
