"""Loading: pixels and labels come out exactly as they were written, and what cannot be read says
why and what to do.
"""

import functools
import json
import pathlib
from typing import get_args, get_type_hints

import cv2
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from numpy.testing import assert_allclose, assert_array_equal
from PIL import Image

from sparsity_jax import data, prepared
from sparsity_jax.tables import ConfigError

SHARED = pathlib.Path(__file__).parents[2] / "shared" / "datasets"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason=f"needs the data sets in {SHARED}")
TFDS_SETS = ("cifar10", "cifar100", "mnist", "fashion_mnist", "svhn_cropped")


def write_tfds(
    data_dir, name, splits, *, encode=".png", features=None, file_format="array_record", shards=1
):
    """Prepare `splits` ({name: (uint8 [N, H, W, C] in RGB, labels)}) as TFDS would, without
    TensorFlow.
    """
    import tensorflow_datasets as tfds
    from array_record.python import array_record_module
    from tensorflow_datasets.proto import tf_example_generated_pb2

    info = tfds.builder(name, data_dir=data_dir).info
    directory = pathlib.Path(info.data_dir)
    directory.mkdir(parents=True)
    template = tfds.core.ShardedFileTemplate(
        data_dir=directory,
        dataset_name=name,
        filetype_suffix=file_format,
        template="{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
    )
    split_infos = []
    for split, (images, labels) in splits.items():
        parts = np.array_split(np.arange(len(labels)), shards)
        for shard, part in enumerate(parts):
            path = template.replace(split=split).sharded_filepath(
                shard_index=shard, num_shards=shards
            )
            writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
            for i in part:
                image = images[i]
                if isinstance(image, np.ndarray):
                    image = cv2.imencode(encode, image[..., ::-1])[1].tobytes()
                feature = tf_example_generated_pb2.Example()
                values = feature.features.feature
                values["image"].bytes_list.value.append(image)
                values["label"].int64_list.value.append(int(labels[i]))
                if "coarse_label" in info.features:
                    values["coarse_label"].int64_list.value.append(int(labels[i]) // 5)
                writer.write(feature.SerializeToString())
            writer.close()
        split_infos.append(
            tfds.core.SplitInfo(
                name=split,
                shard_lengths=[len(part) for part in parts],
                num_bytes=1000,
                filename_template=template.replace(split=split),
            )
        )
    info.set_file_format(file_format, override=True)
    info.set_splits(tfds.core.SplitDict(split_infos))
    info.write_to_directory(directory)
    if features is not None:
        (directory / "features.json").write_text(json.dumps(features.to_json()))
    return directory


def random_split(seed, count, shape=(32, 32, 3), classes=10):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (count, *shape), dtype=np.uint8), rng.integers(0, classes, count)


def write_folder(root, splits, suffix=".png"):
    """`splits`: {split: {class: [uint8 image in RGB or grey, ...]}}."""
    for split, classes in splits.items():
        for cls, images in classes.items():
            directory = root / split / cls
            directory.mkdir(parents=True)
            for i, image in enumerate(images):
                cv2.imwrite(
                    str(directory / f"{i}{suffix}"), image[..., ::-1] if image.ndim == 3 else image
                )
    return f"folder:{root}"


def images_of(seed, count, shape=(6, 6, 3)):
    return list(random_split(seed, count, shape)[0])


def folder_of_two(root, **changes):
    splits = {
        "train": {"cat": images_of(0, 3), "ant": images_of(1, 2)},
        "test": {"cat": images_of(2, 1), "ant": images_of(3, 1)},
    }
    return write_folder(root, splits | changes), splits | changes


# Digits


def test_digits_are_whole_scaled_and_split_by_class():
    from sklearn.datasets import load_digits

    digits, source = data.load(), load_digits()
    assert digits.name == "digits"
    assert digits.num_classes == 10
    assert digits.train.images.shape == (1437, 8, 8, 1)
    assert digits.test.images.shape == (360, 8, 8, 1)
    assert digits.train.images.dtype == np.uint8
    assert digits.train.labels.dtype == np.int32
    together = np.concatenate([digits.train.images, digits.test.images])
    assert sorted(map(bytes, together)) == sorted(
        map(bytes, np.rint(source.images * 255 / 16).astype(np.uint8))
    )
    shares = np.bincount(digits.test.labels) / np.bincount(source.target)
    assert np.abs(shares - 0.2).max() < 0.006  # within one image of a fifth of each class
    first = np.rint(source.images[0] * 255 / 16).astype(np.uint8)[..., None]
    assert (
        (digits.test.images == first).all((1, 2, 3)).any()
    )  # of every five images in order of classes the first
    again = data.load(name="digits")
    assert_array_equal(again.test.labels, digits.test.labels)
    x = digits.train.images / 255
    assert_allclose(digits.mean, [x.mean()], rtol=1e-12)
    assert_allclose(digits.std, [x.std()], rtol=1e-12)


def test_digits_labels_belong_to_their_images():
    from sklearn.datasets import load_digits

    source = load_digits()
    label_of = {
        bytes(np.rint(x * 255 / 16).astype(np.uint8)): y
        for x, y in zip(source.images, source.target)
    }
    digits = data.load(train_limit=100)
    assert [label_of[bytes(image)] for image in digits.train.images] == digits.train.labels.tolist()


def test_limits_are_balanced_nested_and_repeatable():
    small, large = (
        data.load(train_limit=100, test_limit=50),
        data.load(train_limit=200, test_limit=10_000),
    )
    assert len(small.train.images) == len(small.train.labels) == 100
    assert len(small.test.labels) == 50
    assert len(large.test.labels) == 360
    assert set(map(bytes, small.train.images)) <= set(map(bytes, large.train.images))


@hypothesis.given(st.integers(1, 3000), st.integers(0, 400), st.integers(0, 400))
@hypothesis.settings(deadline=None)
def test_spread_is_nested_even_and_of_the_asked_size(size, a, b):
    low, high = sorted((a or size, b or size))
    fewer, more = data.spread(size, low).tolist(), data.spread(size, high).tolist()
    assert len(fewer) == min(low, size)
    assert fewer == sorted(set(fewer))
    assert set(fewer) <= set(more) <= set(range(size))
    # A set stored class by class: any quarter of the order holds a quarter of the picks, to within
    # a few.
    quarter = sum(i < size / 4 for i in fewer)
    assert abs(quarter - len(fewer) / 4) <= 4


@hypothesis.given(st.integers(2, 12), st.integers(5, 60), st.integers(0, 99), st.integers(1, 400))
def test_a_fixed_sample_holds_every_class_evenly(classes, each, seed, num):
    """Of a set stored class by class, as folders are; every part of it too, since it is read in
    batches.
    """
    labels = np.repeat(np.arange(classes), each)
    sample = data.FixedSample(seed=seed).indices(len(labels), num)
    assert len(set(sample.tolist())) == min(num, len(labels))
    parts = (sample, sample[: num // 3]) if num < len(labels) else (sample,)
    for part in parts:
        counts = np.bincount(labels[part], minlength=classes)
        assert np.abs(counts - len(part) / classes).max() <= 4
    assert_array_equal(sample, data.FixedSample(seed=seed).indices(len(labels), num))


def test_other_seeds_take_other_samples():
    samples = {
        tuple(sorted(data.FixedSample(seed=seed).indices(1000, 50).tolist())) for seed in range(20)
    }
    assert len(samples) == 20
    assert set(data.FixedSample(seed=1).indices(1000, 50)) < set(
        data.FixedSample(seed=1).indices(1000, 300)
    )


# TFDS


@pytest.mark.parametrize("name", TFDS_SETS)
def test_tfds_set_loads_exactly_by_name(name, tmp_path):
    shape = (28, 28, 1) if "mnist" in name else (32, 32, 3)
    classes = 100 if name == "cifar100" else 10
    splits = {
        "train": random_split(0, 23, shape, classes),
        "test": random_split(1, 7, shape, classes),
    }
    write_tfds(tmp_path, name, splits, shards=2)
    data.check(name=name, data_dir=str(tmp_path))
    loaded = data.load(name=name, data_dir=str(tmp_path))
    assert loaded.name == name
    assert loaded.num_classes == classes
    for split, (images, labels) in splits.items():
        got = getattr(loaded, split)
        assert_array_equal(got.images, images)  # PNG: lossless, so also RGB is not BGR
        assert_array_equal(got.labels, labels)
        assert got.images.dtype == np.uint8
        assert got.labels.dtype == np.int32
    assert (loaded.mean, loaded.std) == data.NORMALIZATIONS[name]


@pytest.fixture(scope="module")
def tiny_cifar(tmp_path_factory):
    """A directory with a CIFAR-10 of 40 and 10 images, and the splits in it."""
    root = tmp_path_factory.mktemp("tfds")
    splits = {"train": random_split(2, 40), "test": random_split(3, 10)}
    write_tfds(root, "cifar10", splits)
    return str(root), splits


def test_tfds_default_directory_and_versions(tiny_cifar, monkeypatch, tmp_path):
    root, _ = tiny_cifar
    monkeypatch.setenv("TFDS_DATA_DIR", root)
    assert len(data.load(name="cifar10").train.labels) == 40
    assert len(data.load(name="cifar10:3.0.2").train.labels) == 40
    monkeypatch.delenv("TFDS_DATA_DIR")
    monkeypatch.setenv("HOME", str(tmp_path))
    with tiny.complains(r"tensorflow_datasets \(there: nothing\)"):
        data.check(name="cifar10")


def test_newest_version_and_single_config_are_found(tmp_path):
    for path in (
        "a/9.0.0",
        "a/10.0.0",
        "a/11.0.0.incompleteX",
        "b/only/1.0.0",
        "c/x/1.0.0",
        "c/y/1.0.0",
    ):
        (tmp_path / path).mkdir(parents=True)
        (tmp_path / path / "dataset_info.json").write_text("{}")
    assert prepared.find_prepared("a", str(tmp_path)) == tmp_path / "a" / "10.0.0"
    assert prepared.find_prepared("a:9.0.0", str(tmp_path)) == tmp_path / "a" / "9.0.0"
    assert prepared.find_prepared("b", str(tmp_path)) == tmp_path / "b" / "only" / "1.0.0"
    assert prepared.find_prepared("c/y", str(tmp_path)) == tmp_path / "c" / "y" / "1.0.0"
    assert prepared.find_prepared("d", str(tmp_path)) is None
    with tiny.complains("several configs are prepared: 'c/x', 'c/y'"):
        prepared.find_prepared("c", str(tmp_path))


def test_slices_cut_splits(tiny_cifar):
    root, splits = tiny_cifar
    cut = data.load(
        name="cifar10", data_dir=root, train_split="train[:75%]", test_split="train[75%:]"
    )
    assert_array_equal(cut.train.images, splits["train"][0][:30])
    assert_array_equal(cut.test.images, splits["train"][0][30:])


def test_overlapping_splits_are_refused(tiny_cifar):
    with tiny.complains("share images"):
        data.check(name="cifar10", data_dir=tiny_cifar[0], test_split="train[:10%]")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"test_split": "tset"}, "test_split is 'tset'; 'cifar10' has the splits 'train', 'test'"),
        ({"train_split": "train[:x]"}, "train_split is 'train\\[:x\\]'"),
        ({"test_split": "test[5:5]"}, "test_split is 'test.5:5.', which is empty"),
        ({"normalization": "cifar10", "channels": 1}, "for 3 channels, the images have 1"),
        ({"normalization": "cifar"}, "allowed: .*Did you mean 'cifar10'"),
        ({"channels": 2}, "channels is 2; allowed: 0 | 1 | 3"),
        ({"image_size": -1}, "image_size is -1"),
        ({"image_sise": 3}, "no field 'image_sise'.*Did you mean 'image_size'"),
    ],
)
def test_wrong_options_are_found_before_decoding(tiny_cifar, options, message, monkeypatch):
    monkeypatch.setattr(data.loading, "decoded", None)
    with tiny.complains(message):
        data.check(name="cifar10", data_dir=tiny_cifar[0], **options)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("cifar10", "python -m sparsity_jax.prepare cifar10 --data_dir {root}"),
        ("cifar10", 'pip install "sparsity_jax[prepare]"'),
        ("cifer100", "Did you mean 'cifar100'?"),
        ("MNIST", "Did you mean 'mnist'?"),
        ("svhn", "Did you mean 'svhn_cropped'?"),
        ("digit", "Did you mean 'digits'?"),
        ("../secret", "allowed: 'digits', 'folder:PATH'"),
        ("", "allowed: 'digits', 'folder:PATH'"),
    ],
)
def test_set_that_is_not_there(name, hint, tmp_path):
    for function in (data.check, data.load):
        with pytest.raises(ConfigError) as error:
            function(name=name, data_dir=str(tmp_path))
        assert hint.format(root=tmp_path) in str(error.value)


def test_tfrecord_set_says_how_to_prepare_it_again(tmp_path):
    write_tfds(
        tmp_path, "mnist", {"train": random_split(0, 2, (28, 28, 1))}, file_format="tfrecord"
    )
    with tiny.complains(r"prepared as tfrecord.*sparsity_jax.prepare mnist .*--overwrite"):
        data.check(name="mnist", data_dir=str(tmp_path))


def test_set_without_test_split_asks_for_one(tmp_path):
    write_tfds(tmp_path, "cifar10", {"train": random_split(0, 10)})
    with tiny.complains(r"none for testing.*test_split='train\[90%:\]'"):
        data.check(name="cifar10", data_dir=str(tmp_path))


def test_unlabelled_split_is_refused(tmp_path):
    images, labels = random_split(0, 10)
    write_tfds(tmp_path, "cifar10", {"train": (images, labels), "test": (images, np.full(10, -1))})
    with tiny.complains(r"the label -1 where 0..9.*test_split"):
        data.load(name="cifar10", data_dir=str(tmp_path))


def test_damaged_image_names_its_record(tmp_path):
    images, labels = random_split(0, 700)
    images = list(images)
    images[612] = cv2.imencode(".png", images[612])[1].tobytes()[:900]
    write_tfds(tmp_path, "cifar10", {"train": (images, labels), "test": random_split(1, 2)})
    with tiny.complains(r"cifar10.*split 'train', record 612 .*damaged"):
        data.load(name="cifar10", data_dir=str(tmp_path))


def test_empty_image_names_its_record(tmp_path):
    images, labels = random_split(0, 3)
    write_tfds(
        tmp_path, "cifar10", {"train": ([b"", *images[1:]], labels), "test": random_split(1, 2)}
    )
    with tiny.complains("split 'train', record 0 is not an image"):
        data.load(name="cifar10", data_dir=str(tmp_path))


@pytest.mark.parametrize(
    "damage", ["missing", "truncated", "short", "metadata", "features", "not_metadata"]
)
def test_damaged_directory_is_named(damage, tmp_path):
    directory = write_tfds(
        tmp_path, "cifar10", {"train": random_split(0, 5), "test": random_split(1, 5)}
    )
    records = next(directory.glob("*test.array_record*"))
    if damage == "missing":
        records.unlink()
    elif damage == "truncated":
        records.write_bytes(records.read_bytes()[:1000])
    elif damage == "short":
        info = json.loads((directory / "dataset_info.json").read_text())
        info["splits"][1]["shardLengths"] = ["9"]
        (directory / "dataset_info.json").write_text(json.dumps(info))
    elif damage == "metadata":
        (directory / "dataset_info.json").write_text('{"name": ')
    elif damage == "not_metadata":
        (directory / "dataset_info.json").write_text("[]")
    else:
        (directory / "features.json").unlink()
    function = data.load if damage in ("truncated", "short") else data.check
    with tiny.complains(str(directory)):
        function(name="cifar10", data_dir=str(tmp_path))


def test_sets_that_are_not_image_classification_are_refused(tmp_path):
    import tensorflow_datasets as tfds

    splits = {"train": random_split(0, 2), "test": random_split(1, 2)}
    features = tfds.features.FeaturesDict(
        {"image": tfds.features.Image(shape=(32, 32, 3)), "label": np.int64}
    )
    write_tfds(tmp_path, "cifar10", splits, features=features)
    with tiny.complains("needs one ClassLabel feature and has none"):
        data.check(name="cifar10", data_dir=str(tmp_path))


@needs_shared
def test_real_cifar10_equals_what_tfds_decodes():
    import tensorflow_datasets as tfds

    cifar = data.load(name="cifar10", data_dir=str(SHARED), train_limit=1000)
    assert cifar.train.images.shape == (1000, 32, 32, 3)
    assert np.bincount(cifar.test.labels).tolist() == [1000] * 10
    reference = tfds.data_source("cifar10", data_dir=SHARED, split="test")
    for i in (0, 1, 4999, 9999):
        assert_array_equal(cifar.test.images[i], reference[i]["image"])
        assert cifar.test.labels[i] == reference[i]["label"]


# Folders


def test_folder_loads_exactly_in_class_order(tmp_path):
    name, splits = folder_of_two(tmp_path)
    (tmp_path / "train" / "cat" / "notes.txt").write_text("not an image")
    (tmp_path / "train" / "cat" / "._0.png").write_text("left by a file manager")
    (tmp_path / "train" / ".cache").mkdir()
    loaded = data.load(name=name)
    assert loaded.num_classes == 2
    assert loaded.train.labels.tolist() == [0, 0, 1, 1, 1]  # ant, cat
    assert_array_equal(loaded.train.images, splits["train"]["ant"] + splits["train"]["cat"])
    assert_array_equal(loaded.test.images, splits["test"]["ant"] + splits["test"]["cat"])
    x = loaded.train.images / 255
    assert_allclose(loaded.mean, x.mean((0, 1, 2)), rtol=1e-12)
    assert_allclose(loaded.std, x.std((0, 1, 2)), rtol=1e-12)


def test_folder_val_serves_as_test(tmp_path):
    name, _ = folder_of_two(tmp_path)
    (tmp_path / "test").rename(tmp_path / "val")
    assert len(data.load(name=name).test.labels) == 2
    assert len(data.load(name=name, test_split="val").test.labels) == 2


def test_official_tiny_imagenet_layout(tmp_path):
    for cls, count in (("n01", 3), ("n02", 2)):
        (tmp_path / "train" / cls / "images").mkdir(parents=True)
        for i, image in enumerate(images_of(count, count)):
            cv2.imwrite(str(tmp_path / "train" / cls / "images" / f"{cls}_{i}.JPEG"), image)
    for split in ("val", "test"):
        (tmp_path / split / "images").mkdir(parents=True)
    val = images_of(9, 3)
    lines = []
    for i, cls in enumerate(("n02", "n01", "n02")):
        cv2.imwrite(str(tmp_path / "val" / "images" / f"val_{i}.png"), val[i][..., ::-1])
        lines.append(f"val_{i}.png\t{cls}\t0\t0\t1\t1")
    annotations = tmp_path / "val" / "val_annotations.txt"
    annotations.write_text("val_0.png n02\n")
    with tiny.complains(r"val_annotations.txt: the line 'val_0.png n02' is no file and class"):
        data.load(name=f"folder:{tmp_path}")
    annotations.write_text("\n".join(lines) + "\n\n")
    loaded = data.load(name=f"folder:{tmp_path}")
    assert loaded.train.labels.tolist() == [0, 0, 0, 1, 1]
    assert loaded.test.labels.tolist() == [0, 1, 1]
    assert_array_equal(loaded.test.images, [val[1], val[0], val[2]])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"test": {"cat": images_of(0, 1)}}, "same class directories; in one only: 'train/ant'"),
        (
            {"test": {"ant": images_of(0, 1), "cat": images_of(0, 1), "dog": images_of(0, 1)}},
            "in one only: 'test/dog'",
        ),
        ({"test": {"ant": [], "cat": images_of(0, 1)}}, "ant has no images"),
        ({"test": {}}, "test is missing"),
    ],
)
def test_folder_structure_errors(change, message, tmp_path):
    name, _ = folder_of_two(tmp_path, **change)
    with tiny.complains(message):
        data.check(name=name)


def test_folder_without_classes_or_at_all(tmp_path):
    with tiny.complains("there is no directory"):
        data.check(name=f"folder:{tmp_path / 'nowhere'}")
    with tiny.complains("there is no directory"):
        data.check(name="folder:")
    (tmp_path / "train").mkdir()
    with tiny.complains("no class directories"):
        data.check(name=f"folder:{tmp_path}")
    with tiny.complains("both 'train'"):
        data.check(name=f"folder:{tmp_path}", test_split="train")


def test_folder_names_unreadable_files(tmp_path):
    name, _ = folder_of_two(tmp_path)
    victim = tmp_path / "train" / "cat" / "2.png"
    victim.write_bytes(victim.read_bytes()[:60])
    with tiny.complains(f"{victim} is not an image"):
        data.load(name=name)
    victim.unlink()
    victim.symlink_to(tmp_path / "gone.png")
    with tiny.complains(f"{victim} cannot be read: No such file"):
        data.load(name=name)


def test_folder_of_differing_sizes_asks_for_image_size(tmp_path):
    wide = images_of(5, 1, (6, 10, 3))
    name, _ = folder_of_two(tmp_path, train={"ant": images_of(0, 2), "cat": wide})
    with tiny.complains(r"0.png is 6x10, .*0.png is 6x6; set image_size"):
        data.load(name=name)
    loaded = data.load(name=name, image_size=6)
    assert_array_equal(loaded.train.images[2], wide[0][:, 2:8])  # central square, nothing to resize


def test_train_and_test_of_differing_sizes_ask_for_image_size(tmp_path):
    name, _ = folder_of_two(
        tmp_path, test={"ant": images_of(0, 1, (8, 8, 3)), "cat": images_of(1, 1, (8, 8, 3))}
    )
    with tiny.complains("train images of 6x6, test images of 8x8; set image_size"):
        data.load(name=name)


def test_grey_and_colour_mix(tmp_path):
    colour, grey = images_of(0, 1), images_of(1, 1, (6, 6))
    name = write_folder(
        tmp_path / "a", {"train": {"a": colour, "b": grey}, "test": {"a": grey, "b": colour}}
    )  # first in colour: grey is replicated
    loaded = data.load(name=name)
    assert_array_equal(loaded.train.images[1], np.repeat(grey[0][..., None], 3, axis=2))
    name = write_folder(
        tmp_path / "b", {"train": {"a": grey, "b": colour}, "test": {"a": grey, "b": grey}}
    )
    with tiny.complains(r"0.png is in colour, the set is grey"):
        data.load(name=name)
    assert data.load(name=name, channels=3).train.images.shape == (2, 6, 6, 3)
    luminance = data.load(name=name, channels=1).train.images[1, ..., 0]
    assert_allclose(luminance, colour[0] @ [0.299, 0.587, 0.114], atol=1)


@needs_shared
def test_sample_folder():
    sample = data.load(name=f"folder:{SHARED / 'image_folder_sample'}")
    assert sample.train.images.shape == (400, 32, 32, 3)
    assert sample.test.images.shape == (100, 32, 32, 3)
    assert np.bincount(sample.train.labels).tolist() == [40] * 10


# Size, channels, normalisation


def test_resizing(tiny_cifar):
    root, splits = tiny_cifar
    images = splits["test"][0]
    half = data.load(name="cifar10", data_dir=root, image_size=16).test.images
    halved = [
        Image.fromarray(image).resize((16, 16), Image.Resampling.BILINEAR) for image in images
    ]
    assert_allclose(np.int32(half), np.int32([np.asarray(image) for image in halved]), atol=1)
    assert data.load(name="cifar10", data_dir=root, image_size=40).test.images.shape == (
        10,
        40,
        40,
        3,
    )
    apart = data.load(name="cifar10", data_dir=root, image_size=16, train_image_size=24)
    assert apart.train.images.shape[1:] == (24, 24, 3)
    assert_array_equal(apart.test.images, half)


def test_resizing_and_channels_of_digits():
    digits = data.load(image_size=4, channels=3)
    assert digits.train.images.shape == (1437, 4, 4, 3)
    assert_array_equal(digits.train.images[..., 0], digits.train.images[..., 2])


def test_normalization_rows_are_the_schema_and_fit_channels(tiny_cifar):
    choices = get_args(get_type_hints(data.Options)["normalization"])
    assert set(choices) == {"auto", "computed", *data.NORMALIZATIONS}
    assert data.load(normalization="none")[-2:] == ((0.0,), (1.0,))
    assert data.load(normalization="mnist", channels=3)[-2:] == ((0.1307,) * 3, (0.3081,) * 3)
    root, splits = tiny_cifar
    x = splits["train"][0] / 255
    computed = data.load(name="cifar10", data_dir=root, normalization="computed")
    assert_allclose(computed.mean, x.mean((0, 1, 2)), rtol=1e-12)
    assert_allclose(computed.std, x.std((0, 1, 2)), rtol=1e-12)
    grey = data.load(
        name="cifar10", data_dir=root, channels=1
    )  # no published constants for grey CIFAR
    assert_allclose(grey.mean, [(grey.train.images / 255).mean()], rtol=1e-12)


def test_constant_images_have_a_finite_normalization():
    mean, std = data.statistics(data.Options(name="x"), np.full((3, 2, 2, 1), 51, np.uint8))
    assert_allclose(mean, [0.2])
    assert std[0] > 0


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_preprocess(dtype):
    images = random_split(0, 4)[0]
    mean, std = data.NORMALIZATIONS["cifar10"]
    out = jax.jit(functools.partial(data.preprocess, dtype=dtype))(images, mean, std)
    assert out.dtype == dtype
    expected = (images / 255 - np.array(mean)) / np.array(std)
    assert_allclose(
        np.asarray(out, np.float64),
        expected,
        atol=1e-5 if dtype == jnp.float32 else 2e-2,
        rtol=1e-6,
    )


# Augmentation

SETTINGS = hypothesis.settings(deadline=None, max_examples=25)
SHAPES = st.sampled_from([(1, 8, 8, 1), (5, 6, 9, 3)])
SEEDS = st.integers(0, 2**32 - 1)


def is_crop(image, output, padding, mirrored):
    padded = np.pad(image, ((padding, padding), (padding, padding), (0, 0)))
    output = output[:, ::-1] if mirrored else output
    windows = np.lib.stride_tricks.sliding_window_view(padded, image.shape).reshape(
        -1, *image.shape
    )
    return bool((windows == output).all((1, 2, 3)).any())


@pytest.mark.parametrize("name", sorted(data.AUGMENTATIONS))
def test_augmentation_keeps_shape_and_agrees_under_jit(name):
    images, jitted = random_split(0, 5, (6, 9, 3))[0], jax.jit(data.AUGMENTATIONS[name])
    for seed in (0, 1):
        key = jax.random.key(seed)
        eager, out = data.AUGMENTATIONS[name](key, images), jitted(key, images)
        assert out.shape == images.shape
        assert out.dtype == jnp.uint8
        # Fused multiply-adds may turn the rounding of a resized pixel, nothing else.
        difference = np.abs(np.asarray(eager, int) - np.asarray(out, int)).max()
        assert difference <= (1 if name == "resized_crop_flip" else 0)
        assert_array_equal(jitted(key, images), out)


@SETTINGS
@hypothesis.given(SHAPES, SEEDS, st.sampled_from([0, 1, 5]))
def test_each_output_is_a_crop_of_its_own_padded_image(shape, seed, padding):
    images, key = random_split(seed, shape[0], shape[1:])[0], jax.random.key(seed)
    for image, output in zip(images, np.asarray(data.pad_crop(key, images, padding=padding))):
        assert is_crop(image, output, padding, mirrored=False)
    for image, output in zip(images, np.asarray(data.pad_crop_flip(key, images, padding=padding))):
        assert is_crop(image, output, padding, False) or is_crop(image, output, padding, True)
    for image, output in zip(images, np.asarray(data.flip(key, images))):
        assert is_crop(image, output, 0, False) or is_crop(image, output, 0, True)


def test_shift_flip_by_hand():
    image = jnp.array([[1, 2], [3, 4]], jnp.uint8)[None, :, :, None]
    offsets, flips = (
        jnp.array([[0, 1], [2, 1], [1, 2], [1, 1]]),
        jnp.array([False, False, True, True]),
    )
    out = data.shift_flip(jnp.repeat(image, 4, 0), offsets, flips, 1)[..., 0]
    assert out.tolist() == [[[0, 0], [1, 2]], [[3, 4], [0, 0]], [[0, 2], [0, 4]], [[2, 1], [4, 3]]]


def test_draws_are_uniform_and_independent_between_images():
    image = jnp.arange(1, 65, dtype=jnp.uint8).reshape(1, 8, 8, 1)
    images = jnp.repeat(image, 4000, axis=0)
    corner = np.asarray(
        data.pad_crop(jax.random.key(0), images)[:, 4, 4, 0]
    )  # the pixel at the drawn offset
    counts = np.unique(corner, return_counts=True)[1]
    assert (
        len(np.unique(corner)) == 65
    )  # offsets 0..8 along both axes: 64 pixels, and the padding for 17 of 81
    assert_allclose(counts / 4000, [17 / 81] + [1 / 81] * 64, atol=0.03)
    mirrored = np.asarray(data.flip(jax.random.key(1), images)[:, 0, 0, 0] == 8)
    assert 0.45 < mirrored.mean() < 0.55


resize_box = jax.jit(data.resize_box, static_argnums=(2, 3))


def test_whole_box_resizes_to_the_image_itself():
    image = jnp.asarray(random_split(0, 1, (9, 9, 3))[0][0])
    assert_array_equal(resize_box(image, jnp.array([0.0, 0.0, 9.0, 9.0]), 9, 9), image)
    assert_array_equal(resize_box(image, jnp.array([2.0, 3.0, 4.0, 5.0]), 4, 5), image[2:6, 3:8])


@pytest.mark.parametrize("box", [(0, 0, 16, 16), (3, 5, 24, 20), (8, 2, 9, 12)])
def test_resized_box_agrees_with_opencv_away_from_the_edge(box):
    top, left, height, width = box
    grid = np.mgrid[:32, :32].sum(0) * 4
    image = np.stack([grid, grid[::-1], grid[:, ::-1]], axis=2).astype(np.uint8)
    ours = np.asarray(resize_box(jnp.asarray(image), jnp.array(box, jnp.float32), 16, 16), int)
    theirs = cv2.resize(
        image[top : top + height, left : left + width], (16, 16), interpolation=cv2.INTER_LINEAR
    )
    assert np.abs(ours - theirs)[2:-2, 2:-2].max() <= 2


@functools.partial(jax.jit, static_argnums=(1, 2))
def random_boxes(keys, height, width):
    return jax.vmap(lambda key: data.random_box(key, height, width))(keys)


@SETTINGS
@hypothesis.given(SEEDS, st.sampled_from([(8, 8), (64, 64), (20, 60), (60, 20)]))
def test_random_boxes_lie_inside_and_have_the_stated_area_and_ratio(seed, shape):
    boxes = np.asarray(random_boxes(jax.random.split(jax.random.key(seed), 64), *shape))
    top, left, height, width = boxes.T
    assert (boxes == np.round(boxes)).all()
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, 2:] >= 1).all()
    assert (top + height <= shape[0]).all()
    assert (left + width <= shape[1]).all()
    # Sides are rounded to whole pixels: compare with half a pixel of room.
    assert ((width + 0.5) / (height - 0.5) >= 3 / 4).all()
    assert ((width - 0.5) / (height + 0.5) <= 4 / 3).all()
    assert ((height + 0.5) * (width + 0.5) >= 0.08 * shape[0] * shape[1]).all()


def test_box_without_a_fitting_draw_is_the_central_one():
    box = random_boxes(jax.random.split(jax.random.key(0), 1), 2, 100)[0]
    assert_array_equal(box[2:], [2, 3])
    assert_array_equal(box[:2], [0, 48])


def test_resized_crop_of_a_constant_image_is_constant():
    images = jnp.full((8, 12, 12, 3), 77, jnp.uint8)
    out = jax.jit(data.resized_crop_flip, static_argnames="size")(jax.random.key(3), images, size=5)
    assert out.shape == (8, 5, 5, 3)
    assert (out == 77).all()


def test_make_augmentation_ends_at_the_network_size(tiny_cifar):
    root, _ = tiny_cifar
    same = data.load(name="cifar10", data_dir=root)
    assert data.make_augmentation("flip", same) is data.flip
    larger = data.load(name="cifar10", data_dir=root, image_size=16, train_image_size=32)
    augment = jax.jit(data.make_augmentation("resized_crop_flip", larger))
    out = augment(jax.random.key(0), larger.train.images)
    assert out.shape == (40, 16, 16, 3)
    with tiny.refused("augment", "flip"):
        data.make_augmentation("flip", larger)
    with tiny.refused("augment", "pad_crops", "pad_crop"):
        data.make_augmentation("pad_crops", same)
