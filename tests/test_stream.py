"""Streams: the same images, crops and order whatever reads them and wherever a run stops; damage is
named.
"""

import dataclasses
import functools
import itertools
import math
import multiprocessing
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import cv2
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from numpy.random import default_rng
from numpy.testing import assert_allclose, assert_array_equal
from test_data import SHARED, needs_shared, random_split, write_tfds

from sparsity_jax import (
    compaction,
    data,
    decoding,
    evaluate,
    folders,
    geometry,
    interface,
    losses,
    models,
    pipeline,
    pixels,
    progress,
    sources,
    stages,
    stopping,
    stream,
    streaming,
    train,
)

SIZE = 8


def here(arrays):
    return arrays


def smooth(rng, height, width, channels=3):
    """An image without fine detail, so that ways of resizing agree."""
    coarse = rng.integers(0, 256, (4, 5, channels), np.uint8)
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of 3 classes with 24 train and 11 test images of many sizes, half of them JPEGs."""
    root, rng = tmp_path_factory.mktemp("images"), default_rng(0)
    for split, count in (("train", 24), ("test", 11)):
        for i in range(count):
            file = root / split / "abc"[i % 3] / f"{i:02}{'.png' if i % 2 else '.jpg'}"
            file.parent.mkdir(parents=True, exist_ok=True)
            height, width = rng.integers(20, 90, 2)
            cv2.imwrite(str(file), smooth(rng, int(height), int(width)))
    return root


def load(root, **options):
    return data.load(**dict(name=f"folder:{root}", stream=True, image_size=SIZE) | options)


def numbered(size=20, **options):
    """A stream of grey images whose pixels and label are their number, and the list of numbers read
    so far.
    """
    read = []

    def fetch(indices):
        read.extend(indices)
        return [(np.full((12, 9), i % 256, np.uint8), i) for i in indices]

    known = data.Options(**dict(image_size=SIZE, stream=True) | options)
    source = sources.Source(size, fetch, lambda i: f"image {i}")
    return data.Stream(source, np.arange(size), (size, SIZE, SIZE, 1), size, known), read


def labels_of(images, epochs=1, batch_size=5, seed=(1, 2), start=0):
    batches = stream.train_batches(
        images, seed, batch_size=batch_size, epochs=epochs, start=start, put=here
    )
    return [batch.labels.tolist() for batch in batches]


# One image ----------------------------------------------------------------------------------------


@hypothesis.given(st.integers(1, 50), st.integers(1, 50), st.integers(0, 9), st.integers(0, 9))
def test_a_part_is_its_crop_resized(height, width, top, left):
    image = default_rng(0).integers(0, 256, (60, 60, 3), np.uint8)
    resized = stream.part(
        cv2.imencode(".png", image)[1].tobytes(), SIZE, lambda h, w: (top, left, height, width)
    )
    crop = image[top : top + height, left : left + width]
    assert_array_equal(resized, pixels.resize(crop, SIZE, SIZE))


@pytest.mark.parametrize(
    ("side", "reduced"), [(40, 0), (SIZE * 2, 16), (SIZE * 5, 32), (SIZE * 9, 64)]
)
def test_a_jpeg_is_decoded_no_larger_than_needed(side, reduced, monkeypatch):
    side, flags, decode = SIZE + 3 if not reduced else side, [], decoding.decode
    encoded = cv2.imencode(".jpg", smooth(default_rng(1), 90, 120), [cv2.IMWRITE_JPEG_QUALITY, 98])[
        1
    ]
    monkeypatch.setattr(
        decoding,
        "decode",
        lambda found, *, reduced=0, upright=False: (
            flags.append(reduced) or decode(found, reduced=reduced)
        ),
    )
    box = (8, 24, side, side)
    found = stream.part(
        encoded.tobytes(), SIZE, lambda height, width: box if (height, width) == (90, 120) else None
    )
    assert flags == [reduced]
    whole = decode(encoded.tobytes())[8 : 8 + side, 24 : 24 + side]
    exact = pixels.resize(whole, SIZE, SIZE).astype(int)
    assert np.abs(found - exact).mean() < 4  # of 255; at 1/8 colours are of 16 x 16 pixels
    other = pixels.resize(decode(encoded.tobytes()), SIZE, SIZE).astype(int)
    assert np.abs(other - exact).mean() > 10  # another part would be seen


@pytest.mark.parametrize("share", [1, 7 / 8])
def test_evaluation_is_resize_and_central_crop(share):
    rng = default_rng(2)
    options = data.Options(image_size=56, resize_size=0 if share < 1 else 56)
    for height, width in ((80, 120), (131, 90), (64, 64), (40, 50)):
        image = smooth(rng, height, width)
        draw = functools.partial(stream.central_box, options=options)
        found = stream.part(cv2.imencode(".png", image)[1].tobytes(), 56, draw)
        scale = (
            56 / share / min(height, width)
        )  # torchvision's order: resize the whole image, then crop
        whole = cv2.resize(
            image, (round(width * scale), round(height * scale)), interpolation=cv2.INTER_LINEAR
        )
        top, left = (whole.shape[0] - 56) // 2, (whole.shape[1] - 56) // 2
        plain = whole[top : top + 56, left : left + 56].astype(int)
        assert np.abs(found - plain).mean() < 7, (
            height,
            width,
        )  # the smallest is enlarged: half a pixel shows
        assert np.abs(found[::-1] - plain).mean() > 50


def test_the_size_of_a_jpeg_is_read_from_its_header():
    rng = default_rng(3)
    ways = [], [cv2.IMWRITE_JPEG_PROGRESSIVE, 1], [cv2.IMWRITE_JPEG_RST_INTERVAL, 1]
    for shape, flags in itertools.product([(30, 51, 3), (9, 7, 1), (300, 2, 3)], ways):
        encoded = cv2.imencode(".jpg", rng.integers(0, 256, shape, np.uint8), flags)[1].tobytes()
        assert decoding.jpeg_shape(encoded) == shape[:2]
        comment = b"\xff\xfe" + (2000).to_bytes(2, "big") + bytes(1998)
        assert decoding.jpeg_shape(encoded[:2] + comment + encoded[2:]) == shape[:2]
    for suffix in (".png", ".bmp", ".webp"):
        assert (
            decoding.jpeg_shape(cv2.imencode(suffix, np.zeros((3, 4), np.uint8))[1].tobytes())
            is None
        )


@hypothesis.given(st.binary(max_size=60))
def test_no_bytes_break_the_header_reader(tail):
    for encoded in (tail, b"\xff\xd8" + tail, b"\xff\xd8\xff\xc0" + tail):
        shape = decoding.jpeg_shape(encoded)
        assert shape is None or (len(shape) == 2 and min(shape) > 0)


@hypothesis.given(st.integers(1, 400), st.integers(1, 400), st.integers(0, 2**31), st.booleans())
def test_random_boxes_are_inside_and_of_the_asked_area_and_ratio(height, width, seed, whole):
    scale, ratio = ((1.0, 1.0), (1.0, 1.0)) if whole else ((0.08, 1.0), (3 / 4, 4 / 3))
    options = data.Options(crop_scale=scale, crop_ratio=ratio)
    top, left, h, w = stream.random_box(default_rng(seed), height, width, options)
    assert 0 <= top <= top + h <= height
    assert 0 <= left <= left + w <= width
    assert min(h, w) >= 1
    if whole:
        assert h == w == min(height, width)
    elif min(height, width) > 50:
        assert 0.7 < w / h < 1.4
        assert h * w > 0.07 * min(height, width) ** 2


def test_the_ratio_of_a_random_box_is_that_of_width_to_height():
    options = data.Options(crop_scale=(0.1, 0.2), crop_ratio=(2.0, 3.0))
    _, _, h, w = stream.random_box(default_rng(0), 200, 200, options)
    assert 1.9 < w / h < 3.1


def test_random_boxes_have_the_spread_of_those_on_the_device():
    options = data.Options(crop_scale=(0.08, 1.0), crop_ratio=(3 / 4, 4 / 3))
    own = np.array([stream.random_box(default_rng(i), 90, 120, options) for i in range(3000)])
    keys = jax.random.split(jax.random.key(0), 3000)
    other = np.asarray(jax.jit(jax.vmap(lambda key: data.random_box(key, 90, 120)))(keys))
    for i in range(4):
        assert_allclose(own[:, i].mean(), other[:, i].mean(), atol=2.5)
        assert_allclose(own[:, i].std(), other[:, i].std(), atol=2.5)


# Order, position, back-pressure -------------------------------------------------------------------


def test_every_epoch_visits_every_image_once_in_a_new_order():
    images, _ = numbered(20)
    found = labels_of(images, epochs=3)
    epochs = np.reshape(found, (3, 20)).tolist()
    assert [sorted(epoch) for epoch in epochs] == [list(range(20))] * 3
    assert len(set(map(tuple, epochs))) == 3
    assert found == labels_of(images, epochs=3)
    assert found != labels_of(images, epochs=3, seed=(1, 3))
    assert len(labels_of(images, batch_size=7)) == 2  # the rest does not fill a batch


def test_small_sets_are_shuffled_uniformly():
    """Of 400 images in 300 epochs few stay in their place or behind their neighbour: 1 of each on
    average.
    """
    numbers = np.random.SeedSequence([3]).generate_state(300).tolist()
    visit = lambda i: stream.image_at(i, total=400, size=400, seeds=numbers)
    found = np.array([visit(i) for i in range(300 * 400)]).reshape(300, 400)
    assert (np.sort(found) == np.arange(400)).all()
    stay = (found == np.arange(400)).sum(1)
    follow = (np.diff(found) == 1).sum(1)
    assert max(stay.max(), follow.max()) < 10
    assert 0.8 < stay.mean() < 1.2
    assert 0.8 < follow.mean() < 1.2


def test_lost_images_are_replaced_evenly_and_count_once():
    images, _ = numbered(50, unreadable="skip", unreadable_share=0.5)
    read = lambda indices: [
        (b"", i) if 10 <= i < 20 else pair for i, pair in zip(indices, images.source.read(indices))
    ]
    lossy = data.Stream(
        images.source._replace(read=read), images.indices, images.shape, 50, images.options
    )
    batches = list(stream.train_batches(lossy, [4], batch_size=10, epochs=40, put=here))
    per_epoch = np.array([len(batch.unreadable) for batch in batches]).reshape(40, 5).sum(1)
    assert per_epoch.tolist() == [10] * 40
    seen = np.bincount(np.concatenate([batch.labels for batch in batches]), minlength=50)
    kept = np.delete(seen, range(10, 20))
    assert seen.sum() == kept.sum() == 40 * 50
    assert kept.min() >= 40  # each in its own place
    assert kept.max() < 40 + 30  # 400 places are shared by 40 images: 10 each on average
    late = list(stream.train_batches(lossy, [4], batch_size=10, epochs=40, start=190, put=here))
    tiny.same(late, batches[190:])


def test_too_many_losses_end_a_training_also_when_it_goes_on():
    images, _ = numbered(50, unreadable="skip", unreadable_share=0.1)
    read = lambda indices: [
        (b"", i) if i < 6 else pair for i, pair in zip(indices, images.source.read(indices))
    ]
    lossy = data.Stream(
        images.source._replace(read=read), images.indices, images.shape, 50, images.options
    )
    with tiny.complains("6 of 50 images cannot be read"):
        list(stream.train_batches(lossy, [4], batch_size=10, epochs=1, put=here))
    before = [f"image {i}" for i in range(6)]
    with tiny.complains("6 of 50 images cannot be read"):
        next(
            stream.train_batches(
                lossy, [4], batch_size=10, epochs=2, start=5, put=here, lost=before
            )
        )


@pytest.fixture(scope="module")
def whole_training(folder):
    images = load(folder).train.images
    return images, list(stream.train_batches(images, [5], batch_size=4, epochs=2, put=here))


@pytest.mark.parametrize("start", [1, 5, 6, 11, 12])
def test_a_training_goes_on_anywhere_with_the_same_pixels(whole_training, start):
    images, batches = whole_training
    assert len(batches) == 12
    again = list(stream.train_batches(images, [5], batch_size=4, epochs=2, start=start, put=here))
    assert len(again) == 12 - start
    tiny.same([batch[:2] for batch in again], [batch[:2] for batch in batches[start:]])
    views = [batch.images[batch.labels == 0][0] for batch in batches if (batch.labels == 0).any()]
    assert any((a != views[0]).any() for a in views[1:])


def test_what_comes_before_the_start_is_not_read():
    images, read = numbered(20)
    late = labels_of(images, epochs=2, start=7)
    assert sorted(read) == sorted(late[0])


def settled(read):
    """Waits until nothing was read for a while."""
    count = -1
    while len(read) != count:
        count = len(read)
        time.sleep(0.3)
    return count


def test_reading_waits_for_the_one_who_uses_it_and_ends_when_closed():
    images, read = numbered(200, prefetch=3)
    before = threading.active_count()
    batches = stream.train_batches(images, [0], batch_size=5, epochs=1, put=here)
    for used in (1, 2, 3):
        next(batches)
        assert settled(read) <= 5 * (used + 3 + 2 + stream.ON_DEVICE)
    assert len(read) >= 5 * (3 + 3)  # it does read ahead
    batches.close()
    count = settled(read)
    assert count < 100
    deadline = time.monotonic() + 10
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert threading.active_count() <= before


def test_a_stop_ends_the_wait_for_a_batch_that_does_not_come():
    comes = threading.Event()

    def batches():
        yield 1
        comes.wait(60)

    reader = stream.ahead(batches(), 2)
    assert next(reader) == 1
    threading.Timer(0.1, stopping.request).start()
    try:
        with pytest.raises(KeyboardInterrupt):
            next(reader)
    finally:
        stopping.clear()
        comes.set()


def test_what_goes_wrong_while_reading_ahead_is_raised_in_its_place():
    def batches():
        yield 1
        raise OSError("lost")

    reader = stream.ahead(batches(), 2)
    assert next(reader) == 1
    with pytest.raises(OSError, match="lost"):
        next(reader)


# Evaluation ---------------------------------------------------------------------------------------


def test_evaluation_visits_all_images_in_order_and_fills_the_last_batch():
    images, _ = numbered(11)
    batches = list(stream.eval_batches(images, batch_size=4, put=here))
    assert [batch.labels.tolist() for batch in batches] == [
        [0, 1, 2, 3],
        [4, 5, 6, 7],
        [8, 9, 10, -1],
    ]
    assert all(batch.images.shape == (4, SIZE, SIZE, 1) for batch in batches)
    assert all(
        (batch.images[..., 0].max((1, 2)) == np.maximum(batch.labels, 0)).all() for batch in batches
    )
    pixels, labels = stream.examples(images, [9, 3, 4], batch_size=2)
    assert labels.tolist() == pixels[:, 0, 0, 0].tolist() == [9, 3, 4]


@pytest.fixture(scope="module")
def pair(folder):
    """The same problem streamed and in memory, and a trained state."""
    options = dict(channels=3, image_size=SIZE, normalization="none")
    jpegs_as_they_are = dict(resize_size=SIZE, crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0))
    sets = [
        data.load(name=f"folder:{folder}", **options),
        load(folder, **options, **jpegs_as_they_are),
    ]
    # reduced decoding differs by some grey levels, so the array is made of what the stream sees
    splits = [
        stream.examples(split.images, range(split.images.shape[0]))
        for split in (sets[1].train, sets[1].test)
    ]
    for own, (shown, labels) in zip((sets[0].train, sets[0].test), splits):
        assert_array_equal(own.labels, labels)
        assert np.abs(own.images.astype(int) - shown).mean() < 6
    memory = sets[0]._replace(train=data.Split(*splits[0]), test=data.Split(*splits[1]))
    model = models.build(name="mlp", num_classes=3, widths=(6,))
    made = [train.build_problem(own, model, eval_batch_size=4) for own in (sets[1], memory)]
    return *made, train.initial_state(made[0], train.key_of(0))


def test_stages_measure_the_same_streamed_and_in_memory(pair):
    streamed, memory, state = pair
    assert streamed.streamed
    assert not memory.streamed
    for split in ("test", "train"):
        found, known = (
            train.evaluate(p, state.params, state.batch_stats, split) for p in (streamed, memory)
        )
        assert_allclose(found, known, rtol=1e-5)
        assert streamed.size(split) == memory.size(split)
    limit = geometry.Limit(split="train", scan=(0.5,), resolution=0.4)
    here = interface.Place("limit", 0, {"limit": [limit]})
    found, known = (
        [row for update in limit.run(p, state, here) for row in update.rows[0]]
        for p in (streamed, memory)
    )
    for one, other in zip(found[:-1], known[:-1], strict=True):
        numbers = [[row[name] for name in ("ratio", "loss", "accuracy")] for row in (one, other)]
        assert_allclose(*numbers, rtol=1e-5)
    assert found[-1] == known[-1]
    chosen = stages.Curve(ratios=(0.0, 0.3, 0.9), splits=("test", "train"))
    place = interface.Place("curve", 0, {"curve": [chosen]})
    tables_of = [
        [update.rows[0] for update in chosen.run(p, state, place)] for p in (streamed, memory)
    ]
    for a, b in zip(*map(list, map(itertools.chain.from_iterable, tables_of)), strict=True):
        assert (a["ratio"], a["split"], a["num_kept"]) == (b["ratio"], b["split"], b["num_kept"])
        assert_allclose([a["loss"], a["accuracy"]], [b["loss"], b["accuracy"]], rtol=1e-5)
    variables = dict(params=state.params, batch_stats=state.batch_stats)
    stock = compaction.Stock(variables, streamed.model.apply, {}, None)
    assert compaction.accuracy(streamed, stock) == compaction.accuracy(memory, stock)


@pytest.mark.parametrize("rule", ["spread", "first"])
def test_a_fixed_sample_is_the_same_streamed_and_in_memory(pair, rule):
    sample = data.FixedSample(rule, seed=3)
    streamed, memory = (problem._replace(sample=sample, compiled={}) for problem in pair[:2])
    images, labels = geometry.Path(num_examples=7).examples(streamed)
    tiny.same((images, labels), memory.examples("train", 7))
    index = sample.indices(24, 7)
    tiny.same(
        (images, labels),
        (memory.train_images[jnp.array(index)], memory.train_labels[jnp.array(index)]),
    )
    assert index.tolist() == list(range(7)) or rule == "spread"
    assert streamed.examples("train", 7)[0] is images  # kept
    assert len(streamed.examples("test", 50)[1]) == 11


def test_a_step_is_that_of_data_in_memory(pair):
    streamed, memory, state = pair
    fit = tiny.fit(epochs=1, batch_size=12, augment="flip")
    numbers = train.numbers_of(streamed, state, [fit])
    state = train.begin_members(streamed, state, [fit], numbers)
    (first,) = itertools.islice(
        stream.train_batches(streamed.dataset.train.images, [0], batch_size=12, epochs=1, put=here),
        1,
    )
    by_image = {bytes(image): i for i, image in enumerate(np.asarray(memory.train_images))}
    order = jnp.array([by_image[bytes(image)] for image in np.asarray(first.images)])
    found = jax.jit(functools.partial(train.step_on_batch, streamed, fit))(
        state, numbers, 0, first.images, first.labels
    )
    arrays = train.arrays(memory, "train")
    known = jax.jit(functools.partial(train.steps_in_memory, memory, fit, 1))(
        state, numbers, jnp.tile(order, 2), 0, *arrays
    )
    jax.tree.map(lambda a, b: assert_allclose(a, b, rtol=1e-6, atol=1e-7), found, known)


def test_a_mesh_shares_streamed_batches(folder):
    dataset, model = load(folder), models.build(name="mlp", num_classes=3, widths=(6,))
    fit = tiny.fit(epochs=1, batch_size=8)
    one, eight = (
        train.build_problem(dataset, model, mesh=mesh, eval_batch_size=8) for mesh in (1, 0)
    )
    with_close = streaming.batches(eight, "test")
    assert {shard.data.shape for shard in next(with_close).images.addressable_shards} == {
        (1, SIZE, SIZE, 3)
    }
    with_close.close()
    (state, rows), (other, other_rows) = (tiny.trained(problem, fit) for problem in (one, eight))
    jax.tree.map(
        lambda a, b: assert_allclose(a, b, rtol=1e-3, atol=1e-4),
        state.params,
        other.params,
    )
    assert_allclose(rows[0]["test_loss"], other_rows[0]["test_loss"], rtol=1e-3)


# Damage -------------------------------------------------------------------------------------------


@pytest.fixture
def damaged(folder, tmp_path):
    """A copy of the folder whose images 04 and 06 (train, neighbours in class b and a) and 03
    (test) are cut off.
    """
    for file in folder.rglob("*.*"):
        copy = tmp_path / file.relative_to(folder)
        copy.parent.mkdir(parents=True, exist_ok=True)
        whole = file.read_bytes()
        cut = copy.parts[-3:] in (
            ("train", "b", "04.jpg"),
            ("train", "a", "06.jpg"),
            ("test", "a", "03.png"),
        )
        copy.write_bytes(whole[: len(whole) // 2] if cut else whole)
    return tmp_path


def test_an_unreadable_image_stops_a_training_and_is_named(damaged):
    with tiny.complains(r"(a/06|b/04)\.jpg is not an image that can be decoded.*='skip' goes"):
        list(
            stream.train_batches(load(damaged).train.images, [0], batch_size=4, epochs=1, put=here)
        )
    with tiny.complains(r"a/03\.png is not an image"):
        list(stream.eval_batches(load(damaged).test.images, batch_size=4, put=here))


def test_skipped_images_are_replaced_at_random_and_left_out_of_evaluation(damaged):
    splits = load(damaged, unreadable="skip", crop_scale=(1.0, 1.0))
    images = splits.train.images
    batches = list(stream.train_batches(images, [0], batch_size=4, epochs=2, put=here))
    assert (
        sorted(name[-8:] for batch in batches for name in batch.unreadable)
        == ["a/06.jpg"] * 2 + ["b/04.jpg"] * 2
    )
    tests = list(stream.eval_batches(splits.test.images, batch_size=4, put=here))
    assert np.concatenate([batch.labels for batch in tests]).tolist() == [
        0,
        -1,
        0,
        0,
        1,
        1,
        1,
        1,
        2,
        2,
        2,
        -1,
    ]
    problem = train.build_problem(
        splits, models.build(name="mlp", num_classes=3, widths=(6,)), eval_batch_size=4
    )
    state = train.initial_state(problem, train.key_of(0))
    measured = train.measure(problem, state.params, state.batch_stats, "test")
    pixels, labels = problem.examples("test", 11)
    assert len(labels) == 10
    logits = problem.model.apply(dict(params=state.params, batch_stats={}), problem.images(pixels))
    assert_allclose(measured.loss, losses.cross_entropy(logits, labels).mean(), rtol=1e-5)
    assert_allclose(measured.accuracy, losses.correct(logits, labels).mean(), rtol=1e-6)


def test_batches_that_cannot_be_are_explained(folder):
    images = load(folder).train.images
    with tiny.refused("batch_size", 500):
        stream.train_batches(images, 0, batch_size=500, epochs=1)
    none, labels = stream.examples(images, [])
    assert (none.shape, labels.shape) == ((0, *images.shape[1:]), (0,))


def test_a_file_that_disappears_is_named_too(folder, tmp_path):
    images = load(folder).train.images
    gone = images.source._replace(
        read=lambda indices: [(folders.read_file(str(tmp_path / "gone.jpg")), 0)]
    )
    lost = data.Stream(gone, images.indices, images.shape, 3, images.options)
    with tiny.complains(r"gone\.jpg cannot be read: No such file"):
        stream.example(lost, 0, lambda height, width: (0, 0, height, width))
    skipping = dataclasses.replace(images.options, unreadable="skip", unreadable_share=1.0)
    lost = data.Stream(gone, images.indices, images.shape, 3, skipping)
    with tiny.complains("100 other images of its split"):
        next(stream.train_batches(lost, [0], batch_size=4, epochs=1, put=here))
    skipping = dataclasses.replace(images.options, unreadable="skip")
    lost = data.Stream(gone, images.indices, images.shape, 3, skipping)
    with tiny.complains(r"of 24 images cannot be read.*unreadable_share"):
        list(stream.eval_batches(lost, batch_size=4, put=here))


def test_labels_and_colours_that_do_not_fit_always_stop():
    images, _ = numbered(3, unreadable="skip")
    wrong = data.Stream(images.source, images.indices, images.shape, 2, images.options)
    with tiny.complains(r"image 2 has the label 2 where 0\.\.1 are classes"):
        list(stream.eval_batches(wrong, batch_size=3, put=here))
    colour = images.source._replace(read=lambda indices: [(np.zeros((9, 9, 3), np.uint8), 0)])
    with tiny.complains(r"image 0 is in colour, the set is grey"):
        stream.example(
            data.Stream(colour, images.indices, images.shape, 3, images.options),
            0,
            lambda *_: (0, 0, 9, 9),
        )


# Processes ----------------------------------------------------------------------------------------


def test_processes_give_the_batches_of_threads(tmp_path):
    """On a TFDS set, whose reader travels to them."""
    write_tfds(tmp_path, "cifar10", {"train": random_split(0, 14), "test": random_split(1, 5)})
    options = dict(name="cifar10", data_dir=str(tmp_path), stream=True, image_size=SIZE)
    alone, several = (data.load(**options, workers=workers) for workers in (0, 2))
    assert alone.mean == data.NORMALIZATIONS["cifar10"].mean
    runs = [
        list(stream.train_batches(own.train.images, [3], batch_size=3, epochs=2, start=1, put=here))
        for own in (alone, several)
    ]
    assert len(runs[0]) == 7
    tiny.same([batch[:2] for batch in runs[0]], [batch[:2] for batch in runs[1]])
    assert not multiprocessing.active_children()


def test_a_worker_that_dies_ends_the_run_instead_of_hanging_it():
    images, _ = numbered(4000, workers=1)
    batches = stream.train_batches(images, [0], batch_size=5, epochs=1, put=here)
    next(batches)
    (worker,) = multiprocessing.active_children()
    os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(RuntimeError, match="terminated unexpectedly with exit code -9"):
        list(batches)
    batches.close()
    assert not multiprocessing.active_children()


OPENED = """
import multiprocessing, time
import numpy as np
from sparsity_jax import data, sources, stream
if __name__ == "__main__":
    source = sources.Source(4000, lambda indices: [(np.zeros((12, 9), np.uint8), 0)], str)
    options = data.Options(image_size=8, stream=True, workers=2)
    images = data.Stream(source, np.arange(4000), (4000, 8, 8, 1), 1, options)
    batches = stream.train_batches(images, [0], batch_size=5, epochs=1, put=lambda arrays: arrays)
    next(batches), next(batches)
"""
PARENT = f"""{OPENED}
    print(*(child.pid for child in multiprocessing.active_children()), flush=True)
    time.sleep(600)
"""


def test_readers_left_open_end_without_a_message(tmp_path):
    (tmp_path / "left_open.py").write_text(OPENED.replace("workers=2", "workers=0"))
    paths = dict(PYTHONPATH=str(pathlib.Path(__file__).parents[1]))
    done = tiny.python("left_open.py", cwd=tmp_path, env=os.environ | paths)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_script_without_a_main_guard_is_told(monkeypatch):
    images, _ = numbered(20, workers=2)
    monkeypatch.setattr(multiprocessing.current_process(), "_inheriting", True, raising=False)
    with tiny.complains("__main__"):
        labels_of(images)


def test_processes_are_chosen_only_where_threads_leave_cores_idle():
    many = 1_000_000
    assert data.streams.choose_workers(many, 16, alone=100.0, together=400.0)[0] == 16
    assert (
        data.streams.choose_workers(many, 16, alone=100.0, together=1200.0)[0] == 0
    )  # threads keep them busy
    assert data.streams.choose_workers(many, 2, alone=100.0, together=60.0)[0] == 0  # too few cores
    assert (
        data.streams.choose_workers(20_000, 16, alone=100.0, together=400.0)[0] == 0
    )  # over before they have started
    assert (
        "400 images/s in 16 threads"
        in data.streams.choose_workers(many, 16, alone=100.0, together=400.0)[1]
    )


def test_the_choice_is_made_and_told_before_training():
    images, _ = numbered(300)
    assert images.options.workers == -1
    looked = data.look_at(images)
    assert looked.options.workers == 0
    assert "threads" in looked.reading
    fixed, _ = numbered(300, workers=3)
    assert data.look_at(fixed) is fixed
    dataset = data.load(name="digits", stream=True, image_size=8, normalization="none")
    problem = train.build_problem(dataset, models.build(name="mlp", num_classes=10, widths=(4,)))
    assert progress.describe_environment(problem)["reading"] == "threads"


def test_workers_do_not_outlive_a_killed_run(tmp_path):
    (tmp_path / "parent.py").write_text(PARENT)
    paths = dict(PYTHONPATH=str(pathlib.Path(__file__).parents[1]))
    parent = subprocess.Popen(
        [sys.executable, "parent.py"], cwd=tmp_path, env=os.environ | paths, stdout=subprocess.PIPE
    )
    workers = [int(pid) for pid in parent.stdout.readline().split()]
    parent.kill()
    parent.wait(60)
    parent.stdout.close()
    deadline = time.monotonic() + 20
    alive = lambda pid: pathlib.Path(f"/proc/{pid}/stat").exists() and "Z" not in state_of(pid)
    while any(map(alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert len(workers) == 2
    assert not any(map(alive, workers))


def state_of(pid):
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"


# Runs ---------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Nobody catches it, so nothing is saved on the way out."""


def config_of(root, *names, **fields):
    made = tiny.config(*names, **fields)
    own = dict(name=f"folder:{root}", stream=True, image_size=SIZE, unreadable="skip")
    fit = pipeline.stage("train", epochs=2, batch_size=8, optimizer=tiny.SGD, augment="flip")
    return made | dict(
        data=own | fields.get("data", {}), fit=fit, checkpoint_seconds=0.0, eval_batch_size=8
    )


def test_a_killed_run_ends_with_the_same_bits(damaged, tmp_path, monkeypatch):
    config = config_of(damaged, "fit", "curve")
    problem = pipeline.build(pipeline.check(config))
    monkeypatch.setattr(pipeline, "build", lambda _: problem)
    whole = pipeline.run(config, tmp_path / "whole")
    epochs = [row for row in whole.rows if "epoch" in row]
    assert [row["unreadable"] for row in epochs] == [2, 2]
    assert [row["test_unreadable"] for row in epochs] == [1, 1]
    assert {pathlib.Path(name).name for name in epochs[0]["unreadable_images"]} == {
        "04.jpg",
        "06.jpg",
    }
    saved = evaluate.open_run(tmp_path / "whole")
    again = evaluate.measure(saved.problem, saved.networks[0].state)
    assert (again["test_examples"], again["test_unreadable"]) == (saved.problem.size("test") - 1, 1)
    assert again["test_accuracy"] == pytest.approx(epochs[-1]["test_accuracy"], rel=1e-6)
    steps = [row for row in whole.rows if row["kind"] == "train" and "epoch" not in row]
    assert sum(row["unreadable"] for row in steps) == 4
    show = progress.Display.show
    for number, error in ((1, Killed), (2, KeyboardInterrupt), (2, Killed)):
        calls = []

        def interrupted(self, done, rows, calls=calls, number=number, error=error):
            calls.append(done)
            if len(calls) == number:
                raise error
            return show(self, done, rows)

        with monkeypatch.context() as patch:
            patch.setattr(progress.Display, "show", interrupted)
            with pytest.raises(error):
                pipeline.run(config, tmp_path / "broken")
    resumed = pipeline.run(config, tmp_path / "broken")
    tiny.same(resumed.state, whole.state)
    assert tiny.timeless(resumed.rows) == tiny.timeless(whole.rows)
    assert not [thread for thread in threading.enumerate() if "grain-thread" in thread.name]


@needs_shared
def test_a_network_learns_from_a_streamed_folder(tmp_path):
    """Real images: ten classes of CIFAR-10, with more than chance on what it was trained on."""
    sample = SHARED / "image_folder_sample"
    config = config_of(sample, "fit", data=dict(image_size=16, crop_scale=(0.6, 1.0)))
    config["fit"] |= dict(epochs=8, batch_size=50, optimizer=dict(tiny.SGD, learning_rate=0.02))
    rows = pipeline.run(config | dict(checkpoint_seconds=60.0), tmp_path).rows
    assert [row["step"] for row in rows] == [8 * i for i in range(1, 9)]
    assert rows[-1]["train_loss"] < rows[0]["train_loss"]
    assert rows[-1]["train_accuracy"] > 0.2
    assert "unreadable" not in rows[0]


def test_members_of_a_sweep_read_one_after_the_other(folder, tmp_path):
    config = config_of(folder, "fit", sweep=dict(seed=(0, 1)))
    config["fit"] |= dict(epochs=1)
    assert [plan.numbers for plan in pipeline.check(config)] == [[0], [1]]
    with tiny.refused("config.sweep.mode", "vmap"):
        pipeline.check(config | dict(sweep=dict(seed=(0, 1), mode="vmap")))


MISTAKES = {  # options of the data, other fields, and what is refused
    "no size": (dict(image_size=0), {}, ("config.data.image_size", 0)),
    "stored size": (dict(train_image_size=9), {}, ("config.data.train_image_size", 9)),
    "statistics": (dict(normalization="computed"), {}, ("config.data.normalization", "computed")),
    "grey": (dict(channels=1), {}, ("config.data.normalization 'imagenet' is for 3",)),
    "small resize": (dict(resize_size=7), {}, ("config.data.resize_size", 7)),
    "order of scales": (dict(crop_scale=(0.5, 0.1)), {}, ("config.data.crop_scale", (0.5, 0.1))),
    "no area": (dict(crop_scale=(0.0, 1.0)), {}, ("config.data.crop_scale", (0.0, 1.0))),
    "area above 1": (dict(crop_scale=(0.5, 1.5)), {}, ("config.data.crop_scale[1]", 1.5)),
    "ratios": (dict(crop_ratio=(2.0, 1.0)), {}, ("config.data.crop_ratio", (2.0, 1.0))),
    "one ratio": (dict(crop_ratio=(1.0,)), {}, ("config.data.crop_ratio", [1.0])),
    "policy": (dict(unreadable="skipp"), {}, ("config.data.unreadable", "skipp", "skip")),
    "no prefetch": (dict(prefetch=0), {}, ("config.data.prefetch", 0)),
    "no stream": (dict(stream=False), {}, ("config.data.unreadable", "skip")),
    "two crops": (
        {},
        dict(fit=dict(augment="resized_crop_flip")),
        ("config.fit.augment", "resized_crop_flip"),
    ),
    "learned scales": (
        {},
        dict(pipeline=("learn", "fit")),
        ("config.learn.kind", "sfw_init"),
    ),
    "all examples of the path": (
        {},
        dict(pipeline=("fit", "path")),
        ("config.path.num_examples", 0),
    ),
    "all examples": ({}, dict(pipeline=("fit", "hessian")), ("config.hessian.num_examples", 0)),
    "tolerance": (
        {},
        dict(pipeline=("fit", "hessian", "width"), hessian=dict(num_examples=8)),
        ("config.width.epsilon", 0),
    ),
    "classes": ({}, dict(pipeline=("fit", "remove")), ("config.remove.measure", "grasp")),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_stop_before_an_image_is_read(folder, mistake, monkeypatch):
    options, changes, refusal = MISTAKES[mistake]
    config = config_of(folder, "fit", data=options)
    config |= dict(
        hessian=pipeline.stage("spectrum"),
        width=pipeline.stage("width"),
        path=pipeline.stage("path"),
        remove=pipeline.stage("cut", measure="grasp", ratio=0.5),
    )
    for name, fields in changes.items():
        config[name] = config[name] | fields if isinstance(fields, dict) else fields
    monkeypatch.setattr(decoding, "decode", lambda *_: pytest.fail("an image was decoded"))
    with tiny.refused(*refusal):
        pipeline.run(config, "nowhere")


def test_a_stream_says_what_an_array_would(folder):
    splits = load(folder, test_limit=5, image_size=224)
    assert splits.train.images.shape == (24, 224, 224, 3)
    assert splits.test.images.shape == (5, 224, 224, 3)
    assert splits.train.labels is None
    assert (splits.num_classes, splits.mean) == (3, data.NORMALIZATIONS["imagenet"].mean)
    assert stream.central_box(375, 500, splits.train.images.options) == (23, 86, 328, 328)
    assert math.isclose(328 / 375, 224 / 256, abs_tol=0.002)
    source = sources.Source(1, lambda _: [(b"no image", 0)], lambda i: f"image {i}")
    with tiny.complains("and all other images cannot be decoded"):
        data.streams.leave(source, np.arange(1), splits.train.images.options, 2, 0)
