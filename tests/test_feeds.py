"""Sets of one's own: the same images in every form give the same set."""

import grain
import numpy as np
import pytest
import tiny
from numpy.testing import assert_array_equal

from sparsity_jax import data, sources, stream

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (12, 4, 4, 3), np.uint8)
LABELS = np.arange(12) % 3
EXAMPLES = grain.MapDataset.range(12).map(lambda i: (IMAGES[i], LABELS[i]))
LOADER = grain.DataLoader(
    data_source=EXAMPLES,
    sampler=grain.samplers.SequentialSampler(12, grain.sharding.NoSharding()),
    operations=[grain.transforms.Batch(4)],
)
FORMS = {
    "arrays": lambda: (IMAGES, LABELS),
    "iterable": lambda: ((IMAGES[i : i + 5], LABELS[i : i + 5]) for i in (0, 5, 10)),
    "list": lambda: [dict(image=IMAGES[:12], label=LABELS[:12])],
    "examples": lambda: EXAMPLES,
    "map dataset": lambda: EXAMPLES.batch(5),
    "iter dataset": lambda: EXAMPLES.to_iter_dataset(),
    "loader": lambda: LOADER,
}


def load(monkeypatch, form, **options) -> data.Dataset:
    """The set `mine`, of what `form()` gives."""
    monkeypatch.setitem(sources.SETS, "mine", lambda *_: (form(), (IMAGES[:3], LABELS[:3]), 3))
    return data.load(name="mine", **options)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_set(form, monkeypatch):
    dataset = load(monkeypatch, FORMS[form])
    assert_array_equal(dataset.train.images, IMAGES)
    assert_array_equal(dataset.train.labels, LABELS)
    assert (dataset.num_classes, dataset.test.images.shape) == (3, (3, 4, 4, 3))
    few = load(monkeypatch, FORMS[form], train_limit=4)
    assert few.train.images.shape == (4, 4, 4, 3)


@pytest.mark.parametrize("form", FORMS)
def test_what_can_be_entered_anywhere_is_streamed_and_the_rest_is_refused(form, monkeypatch):
    options = dict(stream=True, image_size=4, crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0))
    if form not in ("arrays", "examples"):
        with tiny.refused("stream", True, allowed="a grain MapDataset of examples"):
            load(monkeypatch, FORMS[form], **options)
        return
    images = load(monkeypatch, FORMS[form], **options).train.images
    read = lambda start: [
        batch.images
        for batch in stream.train_batches(
            images, [0], batch_size=4, epochs=2, start=start, put=tuple
        )
    ]
    whole = read(0)
    assert len(whole) == 6
    assert_array_equal(np.stack(read(4)), np.stack(whole[4:]))
    seen = {image.tobytes() for image in np.concatenate(whole[:3])}
    assert seen == {image.tobytes() for image in IMAGES}


WRONG = {
    "nothing": (lambda: 3, "int"),
    "no batch": (list, "list"),
    "floats": (lambda: (IMAGES / 255, LABELS), "float64 [12, 4, 4, 3] and int64 [12]"),
    "float labels": (lambda: (IMAGES, LABELS / 1), "uint8 [12, 4, 4, 3] and float64 [12]"),
    "other lengths": (lambda: (IMAGES, LABELS[:5]), "uint8 [12, 4, 4, 3] and int64 [5]"),
    "no pairs": (lambda: [IMAGES, IMAGES], "ndarray"),
    "endless": (lambda: EXAMPLES.repeat(), "a grain MapDataset"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_no_set_is_refused_in_one_sentence(what, monkeypatch):
    form, value = WRONG[what]
    with tiny.refused("name", value):
        load(monkeypatch, form)


def test_a_function_that_gives_something_else_says_what_is_allowed(monkeypatch):
    monkeypatch.setitem(sources.SETS, "mine", lambda *_: (IMAGES, LABELS))
    with tiny.refused("name", "tuple", allowed="number of classes"):
        data.load(name="mine")
