"""Where images come from: each counted once, every mistake told with its place, and nothing in a
set is executed.
"""

import json
import os
import sys

import cv2
import numpy as np
import pytest
from test_data import folder_of_two, images_of, random_split, write_folder, write_tfds
from tiny import complains

from sparsity_jax import data, sources, train
from sparsity_jax.prepared import Keys, Records
from sparsity_jax.tables import ConfigError


def copy_of(path, place):
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_bytes(path.read_bytes())


def link(place, target):
    place.parent.mkdir(parents=True, exist_ok=True)
    place.symlink_to(target)


def counts(root):
    loaded = data.load(name=f"folder:{root}")
    return len(loaded.train.labels), len(loaded.test.labels)


# Folders: what does not count ---------------------------------------------------------------------

SAME = {  # what changes nothing: 5 train and 2 test images
    "hidden folder in a class": lambda r: copy_of(
        r / "train/cat/0.png", r / "train/cat/.ipynb_checkpoints/0.png"
    ),
    "hidden folder deeper": lambda r: copy_of(
        r / "train/cat/0.png", r / "train/cat/sub/.thumbs/0.png"
    ),
    "hidden class": lambda r: copy_of(r / "train/cat/0.png", r / "test/.cache/0.png"),
    "hidden file": lambda r: copy_of(r / "train/cat/0.png", r / "train/cat/._0.png"),
    "file manager": lambda r: copy_of(
        r / "train/cat/0.png", r / "train/cat/@eaDir/0.png/SMALL.jpg"
    ),
    "archive": lambda r: copy_of(r / "train/cat/0.png", r / "train/__MACOSX/0.png"),
    "link to its class": lambda r: link(r / "train/cat/again", r / "train/cat"),
    "link to the split": lambda r: link(r / "train/cat/up", r / "train"),
    "link to the root": lambda r: link(r / "train/cat/sub/up", r),
    "relative link": lambda r: link(r / "train/cat/up", ".."),
    "link to itself": lambda r: link(r / "train/cat/self", r / "train/cat/self"),
    "link to a file of the class": lambda r: link(r / "train/cat/copy.png", r / "train/cat/0.png"),
    "loops": lambda r: (
        link(r / "train/cat/a/x", r / "train/cat/b"),
        link(r / "train/cat/b/x", r / "train/cat/a"),
    ),
    "text": lambda r: (r / "train/cat/notes.txt").write_text("P5 and GIF are words here"),
    "empty file": lambda r: (r / "train/cat/empty").write_bytes(b""),
    "class through a link": lambda r: (
        (r / "train/cat").rename(r / "cats"),
        link(r / "train/cat", r / "cats"),
    ),
}


@pytest.mark.parametrize("case", SAME)
def test_what_tools_and_links_leave_does_not_count(case, tmp_path):
    folder_of_two(tmp_path)
    SAME[case](tmp_path)
    assert counts(tmp_path) == (5, 2)


MORE = {
    "folder in a class": lambda r: copy_of(r / "train/cat/0.png", r / "train/cat/more/0.png"),
    "linked folder": lambda r: (
        copy_of(r / "train/cat/0.png", r / "elsewhere/0.png"),
        link(r / "train/cat/more", r / "elsewhere"),
        link(r / "train/cat/same", r / "elsewhere"),
    ),
    "linked file": lambda r: (
        copy_of(r / "train/cat/0.png", r / "elsewhere/0.png"),
        link(r / "train/cat/9.png", r / "elsewhere/0.png"),
    ),
    "capitals": lambda r: copy_of(r / "train/cat/0.png", r / "train/cat/9.PNG"),
}


@pytest.mark.parametrize("case", MORE)
def test_what_counts_once(case, tmp_path):
    folder_of_two(tmp_path)
    MORE[case](tmp_path)
    assert counts(tmp_path) == (6, 2)


def gif_in(root):
    (root / "train/cat/9.gif").write_bytes(b"GIF89a" + bytes(20))


MISTAKES = {
    "test links to train": (
        lambda r: ((r / "test").rename(r / "old"), link(r / "test", r / "train")),
        "share images",
    ),
    "a test class links to train": (
        lambda r: ((r / "test/cat").rename(r / "old"), link(r / "test/cat", r / "train/cat")),
        "share images",
    ),
    "a test image links to train": (
        lambda r: link(r / "test/cat/9.png", r / "train/ant/0.png"),
        "share images",
    ),
    "two classes link": (lambda r: link(r / "train/cat/ants", r / "train/ant"), "one class"),
    "a class that holds all": (
        lambda r: [link(r / s / "all", r / s) for s in ("train", "test")],
        "all has no images",
    ),
    "GIF": (gif_in, r"9\.gif.*GIF"),
    "JPEG without a suffix": (
        lambda r: (r / "train/cat/9").write_bytes(
            cv2.imencode(".jpg", np.zeros((4, 4)))[1].tobytes()
        ),
        "cat/9 is an image .JPEG.",
    ),
    "image beside the classes": (
        lambda r: copy_of(r / "train/cat/0.png", r / "train/9.png"),
        "no class directory",
    ),
    "pipe": (lambda r: os.mkfifo(r / "train/cat/9.png"), r"9\.png is no file"),
    "only hidden images": (
        lambda r: (r / "test/cat/0.png").rename(r / "test/cat/.0.png"),
        "cat has no images",
    ),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_what_would_be_lost_or_counted_twice_is_refused(case, tmp_path):
    folder_of_two(tmp_path)
    change, message = MISTAKES[case]
    change(tmp_path)
    with complains(message):
        data.check(name=f"folder:{tmp_path}")


def test_one_class_is_none(tmp_path):
    name = write_folder(tmp_path, {split: {"cat": images_of(0, 2)} for split in ("train", "test")})
    with complains("has one class"):
        data.check(name=name)


def test_a_directory_that_cannot_be_listed_is_named(tmp_path, monkeypatch):
    folder_of_two(tmp_path)
    locked = tmp_path / "train" / "cat" / "locked"
    locked.mkdir()
    scandir = os.scandir

    def guarded(path):
        if str(path) == str(locked):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", guarded)
    with complains("locked cannot be listed: Permission denied"):
        data.check(name=f"folder:{tmp_path}")


def test_turned_images_are_told_and_turned_on_demand(tmp_path):
    name, _ = folder_of_two(tmp_path)
    image = np.zeros((6, 6, 3), np.uint8)
    image[0] = 255
    # orientation 3: upside down
    exif = b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x03\0\0\0\0\0\0\0"
    encoded = cv2.imencode(".jpg", image)[1].tobytes()
    segment = b"\xff\xe1" + (len(exif) + 2).to_bytes(2, "big") + exif
    (tmp_path / "train" / "ant" / "9.jpg").write_bytes(encoded[:2] + segment + encoded[2:])
    with pytest.warns(UserWarning, match=r"1 of 6 images are to be turned.*9\.jpg"):
        stored = data.load(name=name).train.images[2]
    turned = data.load(name=name, orientation="exif").train.images[2]
    np.testing.assert_array_equal(turned, stored[::-1, ::-1])
    assert stored[0].mean() > 200 > 50 > turned[0].mean()
    options = dict(name=name, stream=True, image_size=6)
    with pytest.warns(UserWarning, match="1 of 6 images are to be turned"):
        data.look_at(data.load(**options).train.images)
    data.look_at(data.load(**options, orientation="exif").train.images)


BAD_OPTIONS = {
    "zero byte": dict(name="folder:\0"),
    "zero byte in data_dir": dict(name="cifar10", data_dir="a\0b"),
    "long name": dict(name="folder:" + "x" * 5000),
    "unknown user": dict(name="folder:~nobody_of_this_name/x"),
    "file as data_dir": dict(name="cifar10", data_dir=__file__),
    "long data_dir": dict(name="cifar10", data_dir="x" * 5000),
    "huge images": dict(image_size=10**9),
    "huge train images": dict(image_size=8, train_image_size=10**9),
    "huge crops": dict(stream=True, image_size=10**9),
    "too many processes": dict(stream=True, image_size=8, workers=10**6),
    "too many batches": dict(stream=True, image_size=8, prefetch=10**9),
    "ratio that overflows": dict(stream=True, image_size=8, crop_ratio=(1e-300, 1.0)),
    "share above 1": dict(stream=True, image_size=8, unreadable_share=1.5),
    "negative limit": dict(train_limit=-1),
    "number as name": dict(name=3),
}


@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_options_that_cannot_work_are_one_sentence_before_anything_is_read(case, monkeypatch):
    monkeypatch.setattr(sources, "read_digits", lambda: pytest.fail("digits were read"))
    with pytest.raises(ConfigError) as raised:
        data.check(**BAD_OPTIONS[case])
    field = raised.value.where.partition("[")[0]
    assert field in BAD_OPTIONS[case] or raised.value.is_sentence()


# TFDS ---------------------------------------------------------------------------------------------


@pytest.fixture
def prepared(tmp_path):
    """(data_dir, directory) of a CIFAR-10 of 12 and 4 images."""
    directory = write_tfds(
        tmp_path, "cifar10", {"train": random_split(0, 12), "test": random_split(1, 4)}
    )
    return tmp_path, directory


def edit(file, change):
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def set_class(name, *path):
    def change(content):
        for key in path:
            content = content[key]
        content["pythonClassName"] = name

    return change


@pytest.mark.parametrize("path", [(), ("image",), ("label",), ("id",)])
def test_class_names_in_a_set_are_not_imported(path, prepared, monkeypatch):
    root, directory = prepared
    (root / "hostile_module.py").write_text(
        "import pathlib; pathlib.Path(__file__).with_name('ran').write_text('')"
    )
    monkeypatch.syspath_prepend(str(root))
    inside = ("featuresDict", "features", *path) if path else ()
    edit(directory / "features.json", set_class("hostile_module.Feature", *inside))
    edit(directory / "dataset_info.json", lambda info: info.update(moduleName="hostile_module"))
    if path in ((), ("id",)):  # neither is needed
        assert len(data.load(name="cifar10", data_dir=str(root)).train.labels) == 12
    else:
        with complains(r"needs one (Image|ClassLabel) feature"):
            data.load(name="cifar10", data_dir=str(root))
    assert not (root / "ran").exists()
    assert "hostile_module" not in sys.modules


METADATA = {
    "fewer records": (
        "dataset_info.json",
        lambda c: c["splits"][0].update(shardLengths=["9"]),
        "holds 12 records",
    ),
    "more records": (
        "dataset_info.json",
        lambda c: c["splits"][1].update(shardLengths=["9"]),
        "holds 4 records",
    ),
    "no splits": ("dataset_info.json", lambda c: c.pop("splits"), "splits"),
    "no name": ("dataset_info.json", lambda c: c.pop("name"), "name"),
    "lengths of text": (
        "dataset_info.json",
        lambda c: c["splits"][0].update(shardLengths=["x"]),
        "is not the metadata",
    ),
    "splits of text": (
        "dataset_info.json",
        lambda c: c.update(splits=["x"]),
        "is not the metadata",
    ),
    "one class": (
        "features.json",
        lambda c: c["featuresDict"]["features"]["label"]["classLabel"].update(numClasses="1"),
        "one class",
    ),
    "features of text": (
        "features.json",
        lambda c: c.update(featuresDict="x"),
        "is not the metadata",
    ),
    "no features": ("features.json", lambda c: c.clear(), "is not the metadata"),
    "shape of text": (
        "features.json",
        lambda c: c["featuresDict"]["features"]["image"]["image"].update(shape="x"),
        "is not the metadata",
    ),
}


@pytest.mark.parametrize("case", METADATA)
def test_metadata_that_does_not_fit_is_named_before_anything_is_read(case, prepared):
    root, directory = prepared
    file, change, message = METADATA[case]
    edit(directory / file, change)
    with complains(message):
        data.check(name="cifar10", data_dir=str(root))


@pytest.mark.parametrize(
    "split", ["train[", "train[:-99]", "train[::2]", "train[5%:5]", "+", "train[:1e9%]", " ", "\n"]
)
def test_slices_that_cannot_be_are_one_sentence(split, prepared):
    with complains("train_split"):
        data.check(name="cifar10", data_dir=str(prepared[0]), train_split=split)


def test_a_split_that_names_images_twice_is_refused(prepared):
    with complains("names some images twice"):
        data.check(name="cifar10", data_dir=str(prepared[0]), train_split="train+train[:3]")


def record(image=b"", label=(0,), kind="int64_list"):
    """A serialised example; label: its values under `kind`."""
    from tensorflow_datasets.proto import tf_example_generated_pb2

    example = tf_example_generated_pb2.Example()
    if image:
        example.features.feature["image"].bytes_list.value.append(image)
    getattr(example.features.feature["label"], kind).value.extend(label)
    return example.SerializeToString()


GOOD = cv2.imencode(".png", np.zeros((4, 4, 3), np.uint8))[1].tobytes()
LOST = {  # damaged records: they stop a set in memory, and can be skipped in a stream
    "no protobuf": b"\xff\xff no message",
    "empty": b"",
    "no image": record(),
    "no label": record(GOOD, ()),
    "a label of text": record(GOOD, (b"cat",), "bytes_list"),
    "a label that is no whole number": record(GOOD, (1.0,), "float_list"),
    "two labels": record(GOOD, (1, 2)),
    "an image that is none": record(b"not an image"),
}
WRONG = {  # labels that always stop
    "no class": record(GOOD, (10,)),
    "unlabelled": record(GOOD, (-1,)),
    "beyond 32 bits": record(GOOD, (2**32 + 3,)),
    "least number": record(GOOD, (-(2**63),)),
}


def opened_with(monkeypatch, records, **options):
    """The data set of 20 good records, of which number 7 is replaced; read as if from array_record
    files.
    """
    listed = [record(GOOD, (i % 10,)) for i in range(20)]
    listed[7] = records

    class Stored:
        def __getitems__(self, indices):
            return [listed[i] for i in indices]

    reader = Records(Stored(), "here", Keys("image", "label"))
    source = sources.Source(20, reader.read, reader.describe)
    opened = sources.Opened(source, source, 10, 3)
    monkeypatch.setitem(sources.SETS, "set", lambda *_: opened)
    return data.load(name="set", **options)


@pytest.mark.parametrize("case", LOST | WRONG)
def test_a_bad_record_is_told_with_its_number_before_training(case, monkeypatch):
    bad = (LOST | WRONG)[case]
    with complains("here, record 7"):
        opened_with(monkeypatch, bad)
    streamed = opened_with(monkeypatch, bad, stream=True, image_size=4)
    with complains("here, record 7"):
        train.build_problem(streamed, None)


@pytest.mark.parametrize("case", LOST | WRONG)
def test_damaged_records_can_be_skipped_and_wrong_labels_cannot(case, monkeypatch):
    streamed = opened_with(
        monkeypatch, (LOST | WRONG)[case], stream=True, image_size=4, unreadable="skip"
    )
    if case in LOST:
        assert train.build_problem(streamed, None).streamed
    else:
        with complains("here, record 7 has the label"):
            train.build_problem(streamed, None)


def test_too_many_losses_end_a_stream_before_it_starts(monkeypatch):
    streamed = opened_with(
        monkeypatch, b"", stream=True, image_size=4, unreadable="skip", unreadable_share=0.04
    )
    with complains("1 of 20 images cannot be read"):
        train.build_problem(streamed, None)
