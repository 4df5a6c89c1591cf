"""Pictures as a network takes them, against torch's own resizing."""

import dataclasses
import json

import numpy as np
import pytest

from shoal.runtime.errors import BundleError, UsageError
from shoal.runtime.vision.preprocess import Preprocess, normalised, resize


@pytest.fixture
def picture():
    return np.random.default_rng(0).integers(0, 256, (2, 37, 61, 3), np.uint8)


@pytest.mark.parametrize("size", [(20, 30), (64, 80), (37, 13), (7, 61), (1, 1), (74, 122)])
def test_resizing_is_bilinear_with_antialias(picture, size):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    tensor = torch.from_numpy(picture).permute(0, 3, 1, 2).float()
    expected = torch.nn.functional.interpolate(tensor, size, mode="bilinear", antialias=True).permute(0, 2, 3, 1)
    made = np.stack([resize(image, *size) for image in picture])
    np.testing.assert_allclose(made, expected.numpy(), atol=1e-3)  # of 255


def test_numbers_are_normalised_and_laid_out(picture):
    made = Preprocess(37, 61, (127,), (128,))(picture)
    np.testing.assert_array_equal(made, ((picture.astype(np.float32) - 127) / 128).transpose(0, 3, 1, 2))
    said = normalised((0.5, 0.25, 0.0), (0.5, 1.0, 2.0))
    made = Preprocess(37, 61, **said, channels="bgr", layout="nhwc")(picture)
    expected = (picture / 255 - (0.5, 0.25, 0.0)) / (0.5, 1.0, 2.0)
    np.testing.assert_allclose(made, expected[..., ::-1], rtol=1e-5, atol=1e-6)


def test_crop_takes_the_middle_and_letterbox_fills(picture):
    cropped = Preprocess(20, 20, (0,), (1,), fit="crop", layout="nhwc")(picture)
    whole = resize(picture[0], 20, 33)
    np.testing.assert_array_equal(cropped[0], whole[:, 6:26])
    boxed = Preprocess(40, 40, (0,), (1,), fit="letterbox", fill=7, layout="nhwc")(picture)
    np.testing.assert_array_equal(boxed[0, :24], resize(picture[0], 24, 40))
    assert (boxed[:, 24:] == 7).all()
    shared = Preprocess(20, 20, (0,), (1,), fit="crop", share=0.8, layout="nhwc")(picture)
    np.testing.assert_array_equal(shared[0], resize(picture[0], 25, 41)[2:22, 10:30])


@pytest.mark.parametrize("fit", ["stretch", "crop", "letterbox"])
def test_boxes_go_back_to_where_they_are_in_the_picture(fit):
    """A bright square, found in what the network sees, is where it was."""
    picture = np.zeros((1, 120, 200, 3), np.uint8)
    picture[0, 40:80, 90:130] = 255
    preprocess = Preprocess(96, 96, (0,), (255,), fit=fit, fill=0, layout="nhwc")
    rows, columns = np.nonzero(preprocess(picture)[0, ..., 0] > 0.5)
    seen = np.array([[columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]])
    np.testing.assert_allclose(preprocess.back(seen, 120, 200), [[90, 40, 130, 80]], atol=1.5)


def test_it_goes_into_json_and_back():
    said = Preprocess(224, 224, (127,), (128,), fit="crop", share=0.875)
    assert Preprocess.of(json.loads(json.dumps(dataclasses.asdict(said)))) == said


@pytest.mark.parametrize("said", [
    {}, {"height": 0, "width": 8}, {"height": 1 << 40, "width": 8}, {"height": 8, "width": 8, "std": [0]},
    {"height": 8, "width": 8, "mean": "abc"}, {"height": 8, "width": 8, "fit": "other"}, {"height": 8.5, "width": 8},
    {"height": 8, "width": 8, "share": float("nan")}, {"height": 8, "width": 8, "mean": None}, [],
])  # fmt: skip
def test_what_a_bundle_says_is_checked(said):
    with pytest.raises(BundleError):
        Preprocess.of(said)


@pytest.mark.parametrize(("shape", "kind"), [((2, 8, 8, 3), float), ((8, 8, 3), np.uint8), ((1, 8, 8, 4), np.uint8)])
def test_other_arrays_are_refused(shape, kind):
    with pytest.raises(UsageError, match="uint8 RGB"):
        Preprocess(8, 8)(np.zeros(shape, kind))
