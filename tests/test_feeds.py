"""Sets of one's own: the same images in every form give the same set."""

import contextlib
import dataclasses

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


def own_order(epoch: int):
    """Batches of 5, 5 and 2 images, each epoch in another order."""
    order = np.random.default_rng(epoch).permutation(12)
    for part in (order[:5], order[5:10], order[10:]):
        yield IMAGES[part], LABELS[part]


def in_order(monkeypatch, size=12, **options):
    part = sources.in_epochs(own_order, size)
    monkeypatch.setitem(sources.SETS, "mine", lambda *_: (part, part, 3))
    return data.load(name="mine", **options)


def test_epochs_in_an_order_of_their_own_are_streamed_from_any_step_on(monkeypatch):
    images = in_order(monkeypatch, stream=True, image_size=4).train.images
    images = data.look_at(images)

    def read(start):
        reader = stream.train_batches(
            images, [0], batch_size=4, epochs=2, start=start, put=lambda batch: batch
        )
        with contextlib.closing(reader) as batches:
            return [np.concatenate([batch.images.ravel(), batch.labels]) for batch in batches]

    whole = read(0)
    expected = [np.random.default_rng(epoch).permutation(12) for epoch in (0, 1)]
    pixels = [IMAGES[order[i : i + 4]].ravel() for order in expected for i in (0, 4, 8)]
    assert_array_equal(np.stack(whole)[:, :-4], np.stack(pixels))
    for start in (1, 3, 5):
        assert_array_equal(np.stack(read(start)), np.stack(whole[start:]))
    batches = [*stream.eval_batches(images, batch_size=5, put=lambda batch: batch)]
    assert_array_equal(np.concatenate([batch.labels for batch in batches])[12:], [-1] * 3)
    assert_array_equal(batches[1].images, IMAGES[expected[0][5:10]])
    some = stream.examples(images, [7, 2])
    assert_array_equal(some[0], IMAGES[expected[0][[7, 2]]])
    assert_array_equal(some[1], LABELS[expected[0][[7, 2]]])


def test_epochs_in_an_order_of_their_own_fit_in_memory_too(monkeypatch):
    dataset = in_order(monkeypatch)
    assert_array_equal(dataset.train.images, IMAGES[np.random.default_rng(0).permutation(12)])


def test_epochs_that_are_not_as_told_are_refused(monkeypatch):
    images = in_order(monkeypatch, size=16, stream=True, image_size=4).train.images
    with tiny.refused("config.data.name", 12, allowed="16"):
        list(stream.train_batches(images, [0], batch_size=4, epochs=1, put=lambda batch: batch))
    with tiny.refused("image_size", 5, allowed="4x4"):
        in_order(monkeypatch, stream=True, image_size=5)
    with tiny.refused("train_limit or test_limit", 4):
        in_order(monkeypatch, stream=True, image_size=4, train_limit=4)
    images = in_order(monkeypatch, stream=True, image_size=4).train.images
    short = images.source._replace(epochs=lambda epoch: [(IMAGES, LABELS[:5])])
    images = dataclasses.replace(images, source=short)
    with tiny.refused("config.data.name", "uint8 [12, 4, 4, 3]"):
        list(stream.eval_batches(images, batch_size=4, put=lambda batch: batch))
