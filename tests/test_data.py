"""data.py: each reader on files written here in the official formats, and on real rows if any."""
import itertools
import json
import multiprocessing
import os
import re
import select
import shutil
import signal
import struct
import sys
import time
import zlib
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, Forked, run_python
from PIL import Image, ImageOps

import data
from unit import InputError

REAL = ROOT.parent / "shared" / "realdata"
CONTRACTIONS = ROOT.parent / "shared" / "vqa_contractions.json"
real = pytest.mark.skipif(not REAL.is_dir(), reason="no real rows beside the project")
TASK = {task.name: task for task in data.TASKS}


# ---- Helpers -------------------------------------------------------------------------------------
def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content), "utf-8")
    return path


def picture(path, size=(40, 30), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    Image.fromarray(pixels).save(path, **options)
    return path


def coco_file(boxes, images=None, categories=((1, "person"), (3, "car")), wider=0):
    """boxes: (image, category, [x, y, w, h], crowd); images: (id, file name), by default 1, 2, ...;
    of 40 x 30, or each one wider than the one before."""
    if not images:
        count = max([image for image, *_ in boxes], default=1)
        images = [(n, f"{n}.jpg") for n in range(1, count + 1)]
    pictures = [dict(id=n, file_name=name, width=40 + wider * place, height=30)
                for place, (n, name) in enumerate(images)]
    kinds = [dict(id=n, name=name) for n, name in categories]
    things = [dict(id=n, image_id=i, category_id=c, bbox=b, iscrowd=crowd, area=b[2] * b[3])
              for n, (i, c, b, crowd) in enumerate(boxes, 1)]
    return dict(images=pictures, categories=kinds, annotations=things)


def make_coco(root, boxes, split="val", **extra):
    content = coco_file(boxes, **extra)
    write(root / f"coco/annotations/instances_{split}2017.json", content)
    for row in content["images"]:
        picture(root / f"coco/{split}2017" / row["file_name"], (row["width"], row["height"]))
    return content


def read(name, root, split="val", **extra):
    return TASK[name].dataset(TASK[name], root, split, **extra)


def refused(says, name, root, split="val"):
    with pytest.raises(InputError, match=says):
        read(name, root, split)


def vocabulary(root, words="what colour is the cat dog a red , . ? ' s"):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *words.split()]
    return write(root / "bert/vocab.txt", "\n".join(words) + "\n")


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, (data.Batch, data.Sample)):
        return same([*vars(a).values()], [*vars(b).values()])
    return a == b


# ---- Tables --------------------------------------------------------------------------------------
def test_the_eight_tasks():
    """The released configuration's numbers."""
    assert [t.name for t in data.TASKS] == "coco vg vqa2 snli_ve qnli mnli qqp sst2".split()
    assert [t.num_classes for t in data.TASKS] == [91, 1601, 3129, 3, 2, 3, 2, 2]
    assert [t.num_attributes for t in data.TASKS] == [0, 401] + [0] * 6
    assert [t.max_tokens for t in data.TASKS[2:]] == [25, 25, 128, 128, 128, 128]
    assert [t.name for t in data.TASKS if t.soft_scores] == ["vqa2"]


# ---- Strings, files, answers ---------------------------------------------------------------------
def test_strings():
    texts = ["", "cat", "Ärger 猫 \U0001f600", "a\nb", "nul\0\0", "\ud800x"]
    strings = data.strings(texts)
    assert [*strings] == texts[:-1] + ["?x"]  # half a character, as JSON may have
    assert type(strings[1]) is str and len(data.strings([])) == 0


def test_lines_and_json(tmp_path):
    expected, path = ["ä b", "", "c\u2028d"], tmp_path / "x.json"
    for raw in ("ä b\n\nc\u2028d", "ä b\n\nc\u2028d\n\n", "\ufeffä b\r\n\r\nc\u2028d\r\n"):
        assert data.read_lines(write(path, raw.encode())) == expected
    assert data.read_lines(write(path, b"")) == []
    assert data.read_json(write(path, b"\xef\xbb\xbf{}")) == {}
    for read_file, content, message in [
            (data.read_lines, b"a\xff", "not valid UTF-8 .* in position 1"),
            (data.read_json, '{"images": [{"id": 1}', "not valid JSON .* unpack it again"),
            (data.read_json, None, "No such file")]:
        path.unlink()
        if content:
            write(path, content)
        with pytest.raises(InputError, match=rf"x\.json: {message}"):
            read_file(path)


@pytest.mark.skipif(not CONTRACTIONS.exists(), reason="no table beside the project")
def test_contractions_are_the_official_table():
    official = json.loads(CONTRACTIONS.read_text("utf-8"))
    changes = {word: other for word, other in official.items() if word != other}
    assert data.CONTRACTIONS == changes


@pytest.mark.parametrize("answer, expected", [
    ("Green.", "green"), ("Parked on the street.", "parked on street"), ("1/2", "1 2"),
    ("t-shirt", "t shirt"), ("1,000", "1000"), ("u.s.", "us"), ("$5.00", "$5.00"), ("none", "0"),
    ("one in back", "1 in back"), ("dont", "don't"), ("An  apple\tpie\n", "apple pie"),
    ("cat, dog", "cat dog"), ("", ""), ("???", ""), ("Im", "im"), ("she's", "she's"),
    ("somebody'd", "somebodyd"), ("shed", "shed"), ("a", ""),
    ("4:30", "4:30"), ("to: me", "to: me")])
def test_normal_form_of_answers(answer, expected):
    assert data.normalise_answer(answer) == expected


def test_tokenizer_pairs_and_truncation(tmp_path):
    tokenizer = data.Tokenizer(vocabulary(tmp_path))
    ids, types = tokenizer.encode("What colour?", "The RED dog.")
    words = data.read_vocabulary(tmp_path / "bert/vocab.txt")
    assert [words[n] for n in ids] == "[CLS] what colour ? [SEP] the red dog . [SEP]".split()
    assert types == [0] * 5 + [1] * 5
    # The longer text loses first, as in BERT: 3 + 3 of 8 + 3 tokens beside three special ones.
    ids, types = tokenizer.encode("cat " * 8, "dog " * 3, max_length=9)
    assert [words[n] for n in ids] == "[CLS] cat cat cat [SEP] dog dog dog [SEP]".split()
    assert len(tokenizer.encode("cat " * 50, max_length=25)[0]) == 25
    assert tokenizer.encode("", max_length=25)[0] == [2, 3]
    with pytest.raises(InputError, match=r"no line \[CLS\].*bert-base-uncased"):
        data.Tokenizer(write(tmp_path / "v.txt", "[PAD]\n[UNK]\n[SEP]\n"))


@real
def test_tokenizer_is_berts(tmp_path):
    """transformers' tokenizer is the yardstick, on real pairs of sentences."""
    transformers = pytest.importorskip("transformers")
    yardstick = transformers.BertTokenizer(str(REAL / "bert/vocab.txt"), do_lower_case=True)
    ours, pairs = data.Tokenizer(REAL / "bert/vocab.txt"), read("qnli", REAL)
    for index in range(0, len(pairs), 97):
        first, second = pairs.texts(index)
        theirs = yardstick(first, second, truncation="longest_first", max_length=40)
        assert ours.encode(first, second, 40) == (theirs["input_ids"], theirs["token_type_ids"])


# ---- Pictures ------------------------------------------------------------------------------------
@pytest.mark.filterwarnings("error")  # of Pillow's a user can make nothing
@pytest.mark.parametrize("mode, ending", [
    ("L", "jpg"), ("1", "png"), ("P", "png"), ("PA", "tiff"), ("LA", "png"), ("RGBA", "png"),
    ("RGBX", "tiff"), ("CMYK", "jpg"), ("YCbCr", "tiff"), ("RGB", "png"), ("I", "tiff"),
    ("I;16", "png"), ("F", "tiff")])
def test_any_mode_comes_out_as_rgb(tmp_path, mode, ending):
    path = tmp_path / f"x.{ending}"
    grey = np.add.outer(np.arange(30), np.arange(40)).astype(np.uint8) * 3
    image = Image.fromarray(grey.astype(np.uint16) * 257 if mode == "I;16" else grey)
    image.convert(mode).save(path)
    image = data.read_image(path)
    assert image.shape == (3, 30, 40) and image.dtype == torch.uint8
    if mode != "1":  # black and white: dithered
        assert np.abs(image.numpy().astype(int) - grey).max() <= (12 if ending == "jpg" else 6)
    if mode == "P":
        Image.open(path).save(path, transparency=bytes([0] * 256))
        assert torch.equal(data.read_image(path), image)


def test_what_is_no_picture(tmp_path):
    """Among them a small file that says it is 100,000 pixels wide and high. (tests/test_robust.py
    has a missing file and a folder.)"""
    path = picture(tmp_path / "x.jpg")
    torn = path.read_bytes()[:400]
    Image.new("1", (20, 20)).save(path, "png")
    bomb = bytearray(path.read_bytes())
    bomb[16:24] = (100_000).to_bytes(4, "big") * 2
    bomb[29:33] = zlib.crc32(bomb[12:29]).to_bytes(4, "big")
    for content in (b"", b"<html>not found</html>", torn, bomb):
        path.write_bytes(content)
        with pytest.raises(data.UnusablePicture, match=r"x\.jpg: cannot be read .* \(.+\)"):
            data.read_image(path)


def turned(orientation):
    """EXIF with that orientation."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


@pytest.mark.parametrize("orientation, size",
                         [*itertools.product(range(1, 9), ((40, 30), (25, 25)))])
def test_exif_orientation(tmp_path, orientation, size):
    """Turned where nothing contradicts (the sizes of a square cannot tell); not turned where the
    annotations state the stored size."""
    path = picture(tmp_path / "x.png", size, exif=turned(orientation))
    with Image.open(path) as image:
        stored, upright = (np.asarray(x).transpose(2, 0, 1)
                           for x in (image, ImageOps.exif_transpose(image)))
    for annotated in (None, upright.shape[1:]):
        assert np.array_equal(data.read_image(path, annotated), upright)
    if stored.shape != upright.shape:
        assert np.array_equal(data.read_image(path, (30, 40)), stored)


def test_damaged_exif(tmp_path):
    """It turns nothing; another damaged tag, at which ImageOps.exif_transpose gives up, does not
    hide the orientation."""
    path = picture(tmp_path / "x.jpg")
    expected, raw = data.read_image(path), path.read_bytes()
    junk = b"\xff\xe1\x00\x10Exif\0\0MM\0\x2a\xff\xff\xff\xff"
    path.write_bytes(raw[:2] + junk + raw[2:])
    assert torch.equal(data.read_image(path, (30, 40)), expected)
    exif = turned(6)
    exif[0x0132] = "2020:01:01 00:00:00"
    picture(path, exif=exif)
    entry = bytes([1, 0x32, 0, 2])  # 0x0132, of type text; 0x0100 is the width, a number
    path.write_bytes(path.read_bytes().replace(entry, bytes([1, 0x00, 0, 2])))
    with Image.open(path) as image, pytest.raises(struct.error):
        ImageOps.exif_transpose(image)
    assert data.read_image(path, (40, 30)).shape == (3, 40, 30)


@pytest.mark.parametrize("size, good", [
    ((427, 640), True), ((214, 320), True), ((213, 320), True), ((854, 1280), True),
    ((107, 160), True), ((640, 427), False), ((480, 640), False), ((427, 600), False),
    ((400, 640), False)])
def test_scaled_copies_are_as_good(tmp_path, size, good):
    """The annotations state 640 x 427; `size` is height, width of the picture."""
    path = picture(tmp_path / "x.png", size[::-1])
    if good:
        assert data.read_image(path, (427, 640)).shape[1:] == size
    else:
        with pytest.raises(data.UnusablePicture, match="640 x 427 in the annotations"):
            data.read_image(path, (427, 640))


@pytest.mark.parametrize("size, expected, floored", [
    ((480, 640), (800, 1067), (800, 1066)), ((640, 480), (1067, 800), (1066, 800)),
    ((200, 640), (417, 1333), (416, 1333)), ((800, 800), (800, 800), (800, 800)),
    ((1, 10_000), (1, 1333), (1, 1333)), ((1, 1), (800, 800), (800, 800))])
def test_sizes(size, expected, floored):
    """Shortest side 800, longest at most 1333; detection rounds, vision and language floors."""
    assert tuple(data.fitted_size(*size, 800, 1333, False)) == expected
    assert tuple(data.fitted_size(*size, 800, 1333, True)) == floored
    for side in range(1, 1200):
        assert min(data.fitted_size(side, side + 3, 800, 10**9, True)) == 800


def test_normalise():
    image = torch.randint(0, 256, (6, 5, 3), dtype=torch.uint8).permute(2, 0, 1)
    mean, std = (torch.tensor(x).double()[:, None, None] for x in (data.MEAN, data.STD))
    torch.testing.assert_close(data.normalise(image), ((image / 255 - mean) / std).float())


class Fixed:
    """A generator whose draws are given, to lead `augment` down one branch."""

    def __init__(self, randoms, choices, integers):
        self.random = iter(randoms).__next__
        self.choices, self.given = iter(choices), iter(integers)

    def choice(self, options):
        value = next(self.choices)
        assert value in options
        return value

    def integers(self, low, high, endpoint):
        value = np.array(next(self.given))
        assert endpoint and (value >= low).all() and (value <= high).all()
        return value


@pytest.mark.parametrize("flip, x", [(0.9, 20), (0.9, 100), (0.1, 20), (0.1, 100)])
def test_augmentation_against_pixels(flip, x):
    """A bright rectangle stays where its box says, through flip, crop (which cuts a part of it off,
    unless flipped, at x 100) and resizes, in DETR's order."""
    image = torch.zeros(3, 300, 400, dtype=torch.uint8)
    image[:, 90:210, 50:200] = 255
    boxes = np.array([[50 / 400, 90 / 300, 200 / 400, 210 / 300]])
    # Resized to 533 x 400; crop of 400 x 390 at x, 5; then shortest side 480.
    out, found = data.augment(image, boxes, Fixed([flip, 0.1], [400, 480], [(390, 400), (5, x)]))
    assert out.shape == (3, 480, 492)
    rows, columns = torch.where(out[0] > 127)
    edges = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
    assert np.abs(edges - found[0] * (492, 480, 492, 480)).max() < 3
    assert (columns.min() == 0) == (flip > 0.5 and x == 100)


@pytest.mark.parametrize("image_size, scales, crops, sides, longest", [
    (800, list(range(480, 801, 32)), [400, 500, 600], (384, 600), 1333),
    (160, [96, 102, 109, 115, 122, 128, 134, 141, 147, 154, 160], [80, 100, 120], (77, 120), 267),
    (32, [19, 20, 22, 23, 24, 26, 27, 28, 29, 31, 32], [16, 20, 24], (15, 24), 53)])
def test_sizes_keep_their_ratio_to_image_size(image_size, scales, crops, sides, longest):
    """The lengths that each --image_size resizes and crops to, written out."""
    assert [data.scaled(x, image_size) for x in data.SCALES] == scales
    assert [data.scaled(x, image_size) for x in data.CROP_SCALES] == crops
    assert tuple(data.scaled(x, image_size) for x in data.CROP_SIDES) == sides
    wide, found = torch.zeros(3, 10, 900, dtype=torch.uint8), set()
    assert data.resize_for_evaluation(wide, image_size).shape[2] == longest
    for seed in range(30):
        rng, boxes = np.random.default_rng(seed), np.zeros((0, 4))
        assert data.augment(wide, boxes, rng, image_size)[0].shape[2] <= longest
        image = torch.zeros(3, image_size, image_size, dtype=torch.uint8)
        found.add(min(data.augment(image, boxes, rng, image_size)[0].shape[1:]))
    assert found <= set(scales) and len(found) > 6


# ---- COCO ----------------------------------------------------------------------------------------
def test_coco_boxes(tmp_path):
    """Clipped and relative in training, unchanged in the ground truth; drops are counted."""
    make_coco(tmp_path, [
        (2, 3, [30, 20, 20, 20], 0),      # leaves the picture: 30..40, 20..30 of 40 x 30 stays
        (1, 1, [4, 3, 8, 6], 0), (2, 1, [0, 0, 0, 5], 0), (2, 1, [50, 3, 5, 5], 0),
        (1, 3, [0, 0, 40, 30], 1), (2, 1, [5, 5, -2, 3], 0),
        (1, 3, [0, 0, 40.4, 30], 0)])     # by rounding: not beyond it
    dataset = read("coco", tmp_path)
    assert len(dataset) == 2 and dataset.class_names == ["", "person", "", "car"]
    first, second = dataset.sample(0), dataset.sample(1)
    np.testing.assert_allclose(first.boxes, [[.2, .2, .2, .2], [.5, .5, 1, 1]], atol=1e-6)
    assert first.labels.tolist() == [1, 3] and first.size == (30, 40) and first.id == 1
    np.testing.assert_allclose(second.boxes, [[35 / 40, 25 / 30, .25, 1 / 3]], atol=1e-6)
    assert first.image.shape == (3, 800, 1067)
    assert "3 empty boxes, 1 crowd boxes" in dataset.summary
    assert "2 boxes go beyond their pictures: clipped" in dataset.summary
    truth = dataset.ground_truth()
    assert sorted(a["iscrowd"] for a in truth.anns.values()) == [0] * 6 + [1]
    assert [30, 20, 20, 20] in [a["bbox"] for a in truth.anns.values()]
    assert min(truth.anns) == 1 and truth.getCatIds() == [1, 3] and truth.getImgIds() == [1, 2]


def test_coco_oddities(tmp_path):
    """Ids that doubles cannot hold, repeated ids, boxes of unknown images, absent pictures,
    pictures without boxes."""
    large = 2**63 - 1
    images = [(7, "0.jpg"), (large, "1.jpg"), (7, "2.jpg"), (8, "3.jpg"), (large - 1, "4.jpg")]
    make_coco(tmp_path, [(n, 1, [1, 2, 3, 4], 0) for n in (large, 5, 8)], images=images)
    (tmp_path / "coco/val2017/3.jpg").unlink()
    dataset = read("coco", tmp_path)
    assert dataset.ids.tolist() == [7, large, large - 1] and dataset.names[1] == "1.jpg"
    assert [dataset.sample(n).boxes.shape for n in range(3)] == [(0, 4), (1, 4), (0, 4)]
    assert dataset.sample(1).id == large
    truth = dataset.ground_truth()
    assert sorted(truth.getImgIds()) == [7, large - 1, large]
    assert [(a["image_id"], a["category_id"]) for a in truth.anns.values()] == [(large, 1)]
    for text in ("1 without picture (the first: 3.jpg)", "1 repeated image ids",
                 "1 boxes of images not listed"):
        assert text in dataset.summary
    shutil.rmtree(tmp_path / "coco/val2017")
    refused("none of its pictures is under .*val2017", "coco", tmp_path)


@pytest.mark.parametrize("key, change, message", [
    ("images", dict(width=None), "'width' is not one whole"),
    ("images", dict(width=0), "an image of no size"),
    ("images", dict(id=2**63), "'id' is not one whole number of at"),
    *[("images", dict(file_name=name), "leads out of") for name in (
        "../../etc/passwd", "/etc/passwd", "a/../../b.jpg", "a\\..\\b.jpg", "C:\\x\\1.jpg")],
    ("annotations", dict(bbox=None), "'bbox' is not a list"),
    ("annotations", dict(bbox=[1, 2, 3]), "a bbox that is not 4 finite numbers"),
    ("annotations", dict(bbox=[1, 2, 3, None]), "a bbox that is not 4 finite numbers"),
    ("annotations", dict(bbox=[1, 2, 3, 1e999]), "a bbox that is not 4 finite numbers"),
    ("annotations", dict(area="large"), "'area'"), ("annotations", dict(iscrowd="no"), "'iscrowd'"),
    ("annotations", dict(image_id="1"), "'image_id'"),
    ("annotations", dict(category_id=91), "a category_id that is not in its categories"),
    ("annotations", dict(category_id=2), "a category_id that is not in its categories"),
    ("categories", dict(id=1), "an id of categories that occurs twice"),
    ("categories", dict(id=2**15), "an id of .* not in 0..32767")])
def test_coco_bad_records(tmp_path, key, change, message):
    """The record's number is the file's, whose boxes are not in the order of its images here."""
    content = make_coco(tmp_path, [(2, 1, [4, 3, 8, 6], 0), (1, 3, [4, 3, 8, 6], 0)])
    content[key][1].update(change)
    path = write(tmp_path / "coco/annotations/instances_val2017.json", content)
    number = "" if "file_name" in change else "record 1: "  # names are checked all at once
    refused(f"{path.name}: {number}.*{message}.*; .", "coco", tmp_path)
    content[key] = [None]
    write(path, content)
    refused(f"{path.name}: record 0: .*NoneType.*; .", "coco", tmp_path)
    del content[key]
    write(path, content)
    refused(f"{path.name}: no list '{key}' in it; .", "coco", tmp_path)


def test_own_exports(tmp_path):
    """Other tools write numbers otherwise, or leave something out: the same boxes."""
    content = make_coco(tmp_path, [(1, 3, [4, 3, 8, 6], 0), (2, 3, [20, 10, 20, 20], 0),
                                   (2, 3, [0, 5, 7, 9], 0)])
    first, *others = content["annotations"]
    first |= dict(iscrowd=None, area=None, image_id=1.0, category_id=3.0)
    for row in others:
        del row["iscrowd"], row["area"]
    write(tmp_path / "coco/annotations/instances_val2017.json", content)
    dataset = read("coco", tmp_path)
    assert dataset.boxes.tolist() == [[4, 3, 8, 6], [20, 10, 20, 20], [0, 5, 7, 9]]
    assert dataset.areas.tolist() == [48, 400, 63] and not dataset.crowd.any()
    assert dataset.labels.tolist() == [3, 3, 3]
    assert [dataset.pictures_over(n) for n in (0, 1, 2)] == [2, 1, 0]


@pytest.mark.parametrize("ids", [[0], range(1, 201), [5, 1000, 32_767]])
def test_any_category_ids(tmp_path, ids):
    boxes = [(1, n, [4, 3, 8, 6], 0) for n in ids]
    make_coco(tmp_path, boxes, categories=[(n, f"kind {n}") for n in ids])
    dataset = read("coco", tmp_path)
    assert dataset.labels.tolist() == list(ids) and dataset.task.num_classes == max(ids) + 1
    assert [dataset.class_names[n] for n in ids] == [f"kind {n}" for n in ids]


@pytest.mark.parametrize("boxes, message", [
    ([[4, 3, 12, 9], [20, 10, 38, 30], [30, 5, 37, 14]], "2 of 3 boxes go beyond .* not corners"),
    ([[.1, .2, .3, .4], [0, 0, 1, 1]], "all boxes lie in 0..1, relative .*convert them"),
    ([[4, 3, 0, 6]], "no box to learn from .left out: 1 empty boxes")])
def test_boxes_of_no_use_are_refused(tmp_path, boxes, message):
    make_coco(tmp_path, [(1, 1, box, 0) for box in boxes], "train")
    refused(f"train2017.json: {message}", "coco", tmp_path, "train")


NFC, NFD = "Gr\u00fc\u00dfe", "Gru\u0308\u00dfe"


@pytest.mark.parametrize("listed, stored", [
    (f"{NFC}/{NFC}.jpg", f"{NFD}/{NFD}.jpg"), (f"{NFD}.jpg", f"{NFC}.jpg"),
    ("batch1\\1.jpg", "batch1/1.jpg"), ("1.jpg", "1.JPG"), ("1.png", "1.jpg"), ("a", "a.jpeg")])
def test_names_in_another_spelling(tmp_path, listed, stored):
    """A Mac's accents, Windows' backslashes, endings. A file that is listed itself is no other."""
    path = tmp_path / "coco/annotations/instances_val2017.json"
    write(path, coco_file([], [(1, listed)]))
    expected = data.read_image(picture(tmp_path / "coco/val2017" / stored))
    picture(tmp_path / "coco/val2017/._1.jpg")
    dataset = read("coco", tmp_path)
    assert "1 pictures have unusual names" in dataset.summary
    assert torch.equal(dataset.picture(0), expected) and dataset.names.tolist() == [stored]
    write(path, coco_file([], [(1, listed), (2, stored)]))
    dataset = read("coco", tmp_path)
    assert dataset.ids.tolist() == [2] and dataset.missing == 1


def test_a_split_may_be_empty(tmp_path):
    content = coco_file([]) | {"images": []}
    write(tmp_path / "coco/annotations/image_info_test-dev2017.json", content)
    dataset = read("coco", tmp_path, "test")
    assert len(dataset) == 0 and "no samples" in dataset.summary


@real
def test_real_coco():
    dataset = read("coco", REAL)
    assert len(dataset) == 50 and "11 crowd boxes" in dataset.summary
    truth = dataset.ground_truth().anns.values()
    official = json.loads((REAL / "coco/annotations/instances_val2017.json").read_text())
    for key in ("bbox", "area"):
        assert sorted(a[key] for a in truth) == sorted(a[key] for a in official["annotations"])
    index = dataset.ids.tolist().index(58636)  # has no annotation
    assert dataset.sample(index).boxes.shape == (0, 4)


# ---- VG ------------------------------------------------------------------------------------------
def make_vg(root):
    write(root / "coco/annotations/instances_val2017.json", coco_file([], [(500, "500.jpg")]))
    write(root / "vg/objects_vocab.txt", "man\nstop sign,stopsign\ndog\n")
    attributes = ["red", "gray,grey"] + [f"a{n}" for n in range(20)]
    write(root / "vg/attributes_vocab.txt", "\n".join(attributes))
    url = "https://cs.stanford.edu/people/rak248/{}/{}.jpg"
    images = [(1, "VG_100K_2", None), (2, "VG_100K", 500), (3, "VG_100K", 501),
              (1, "VG_100K", None)]
    write(root / "vg/image_data.json", [
        dict(image_id=n, url=url.format(folder, n), width=40, height=30, coco_id=coco)
        for n, folder, coco in images])
    thing = dict(x=1, y=2, w=10, h=5, object_id=1, synsets=[])
    write(root / "vg/attributes.json", [
        dict(image_id=1, attributes=[
            thing | dict(names=[" Man "], attributes=["GREY ", "gray", "unheard of", "red"]),
            thing | dict(names=["thing", "stopsign"], x=-3, w=50),
            thing | dict(names=["dog"], w=0), thing | dict(names=[]), thing | dict(names=["ufo"])]),
        dict(image_id=2, attributes=[thing | dict(names=["dog"],
                                                  attributes=[f"a{n}" for n in range(18)])]),
        dict(image_id=9, attributes=[]), dict(image_id=1, attributes=[])])
    for n, folder, _ in images[:3]:
        picture(root / f"vg/{folder}/{n}.jpg")


@pytest.mark.parametrize("name, problem", [
    ("time.py", "a module of this name is in Python itself"), ("unit.py", "a module of this name"),
    ("none.py", "no such file")])
def test_files_of_own_tasks_that_cannot_be_meant(tmp_path, monkeypatch, name, problem):
    monkeypatch.setattr(sys, "path", list(sys.path))
    if name != "none.py":
        (tmp_path / name).touch()
    with pytest.raises(InputError, match=problem):
        data.import_tasks(tmp_path / name)


def test_a_vocabulary_of_the_training_texts(tmp_path, capsys):
    """Made without BERT, in its format; held-out texts have no part in it."""
    with pytest.raises(InputError, match="no training texts"):
        data.write_vocabulary(tmp_path)
    assert not (tmp_path / "bert").exists()
    header = "sentence\tlabel\n"
    write(tmp_path / "glue/SST-2/train.tsv",
          header + "A Charming film\t1\nthe film is dull .\t0\n" * 9)
    write(tmp_path / "glue/SST-2/dev.tsv", header + "zebra zebra zebra\t1\n" * 9)
    data.main(["--data", str(tmp_path), "--prepare", "vocab"])
    path, out = tmp_path / "bert/vocab.txt", capsys.readouterr().out
    words = data.read_vocabulary(path)
    assert words[:5] == data.SPECIAL and len(set(words)) == len(words)
    assert out == f"{path}: {len(words)} word pieces from 18 texts of sst2\n"
    assert {"charming", "film", "dull", "."} <= set(words) and "zebra" not in words
    tokens, _ = data.Tokenizer(path).encode("a CHARMING zebra")
    assert [words[n] for n in tokens][1:3] == ["a", "charming"]
    with pytest.raises(InputError, match="is there already"):
        data.write_vocabulary(tmp_path)


def test_a_vocabulary_is_the_same_each_time(tmp_path):
    """More words than the 8,000 pieces, each once: equals compete for the last places."""
    rng, found = np.random.default_rng(0), set()
    words = rng.integers(97, 123, (20_000, 5), np.uint8).view("S5").ravel().astype(str)
    for folder in ("first", "second", "third"):
        write(tmp_path / folder / "glue/SST-2/train.tsv",
              "sentence\tlabel\n" + " ".join(words) + "\t1\n")
        data.write_vocabulary(tmp_path / folder)
        found.add((tmp_path / folder / "bert/vocab.txt").read_text())
    assert len(found) == 1


def test_vg(tmp_path, capsys):
    """From the raw files in memory, or from what --prepare vg has written: the same samples."""
    make_vg(tmp_path)
    raw = read("vg", tmp_path, "train", image_size=32, augment="flip")
    assert "1 repeated image ids; instances_train.json was made in memory" in raw.summary
    data.write_vg(tmp_path)
    printed = capsys.readouterr().out
    assert "3 pictures, 2 boxes" in printed and printed.endswith(
        "dropped: 1 attributes outside the vocabulary, 2 attributes beyond 16 an object, "
        "1 empty boxes, 2 objects outside the vocabulary, 1 rows of unknown images\n")
    train, val = (read("vg", tmp_path, split, image_size=32, augment="flip")
                  for split in ("train", "val"))
    assert "memory" not in train.summary
    assert same(raw.sample(0), train.sample(0))
    assert raw.sample(0).attributes.tolist() == [[2, 1] + [-1] * 14, [-1] * 16]
    assert train.boxes.tolist() == [[1, 2, 10, 5], [0, 2, 40, 5]] and train.areas[1] == 200
    assert train.names.tolist() == ["VG_100K_2/1.jpg", "VG_100K/3.jpg"]
    assert val.ids.tolist() == [2]  # COCO 500 is in val2017
    assert val.attributes.tolist() == [list(range(3, 19))]
    assert train.attribute_names[:3] == ["", "red", "gray"]
    assert train.class_names == ["", "man", "stop sign", "dog"]
    assert (train.task.num_classes, train.task.num_attributes) == (4, 23)
    path = tmp_path / "vg/instances_train.json"
    content = json.loads(path.read_text())
    for wrong in (23, -1, 1.0):
        content["annotations"][0]["attribute_ids"] = [22, wrong]
        write(path, json.dumps(content))
        refused("attribute_ids outside 0..22", "vg", tmp_path, "train")


def test_vg_vocabularies(tmp_path):
    """One in another case fits; one of other things, and none of COCO's val2017, are refused."""
    make_vg(tmp_path)
    path = write(tmp_path / "vg/objects_vocab.txt", "Man\nSTOP SIGN,StopSign\ndog\n")
    dataset = read("vg", tmp_path, "train")
    assert dataset.labels.tolist() == [1, 2] and dataset.class_names[2] == "STOP SIGN"
    assert "dropped from train and val: 1 attributes" in dataset.summary
    write(path, "zebra\n")
    refused("objects_vocab.txt: no box is left to train on .*6 objects outside the vocabulary",
            "vg", tmp_path, "train")
    thing = dict(names=["man"], y=1)
    write(tmp_path / "vg/attributes.json", [dict(image_id=1, attributes=[thing])])
    refused("attributes.json: record 0: lacks 'x'", "vg", tmp_path, "train")
    (tmp_path / "coco/annotations/instances_val2017.json").unlink()
    refused("instances_val2017.json: missing", "vg", tmp_path, "train")
    refused("vg has no split 'test', but train, val", "vg", tmp_path, "test")


@real
def test_real_vg(tmp_path):
    splits, dropped = data.prepare_vg(REAL)
    assert len(splits["train"]["images"]) == 100 and not splits["val"]["images"]
    kept = len(splits["train"]["annotations"])
    assert 3671 == kept + sum(n for why, n in dropped.items()
                              if why.startswith(("object", "empty")))
    assert kept > 0.8 * 3671
    dataset = read("vg", REAL, "train")
    assert dataset.num_images == 4 and "96 without picture" in dataset.summary
    assert (dataset.sample(0).attributes >= 1).any()


# ---- VQA -----------------------------------------------------------------------------------------
def write_vqa(root, rows):
    """rows: {part: [(question id, image id, question, answers), ...]}"""
    for part, questions in rows.items():
        write(root / f"vqa2/v2_OpenEnded_mscoco_{part}_questions.json", dict(questions=[
            dict(question_id=n, image_id=image, question=text) for n, image, text, _ in questions]))
        write(root / f"vqa2/v2_mscoco_{part}_annotations.json", dict(annotations=[
            dict(question_id=n, image_id=image, multiple_choice_answer=answers[0],
                 answers=[dict(answer=x) for x in answers]) for n, image, _, answers in questions]))


def make_vqa(root, words=None):
    """Pictures 1, 2 (train2014), 3 (val2014, in val2017) and 4 (val2014 only); VG's as above."""
    make_vg(root)
    vocabulary(root)
    boxes = [(3, 1, [1, 1, 5, 5], 0), (500, 3, [2, 2, 9.5, 8], 0), (500, 3, [3, 2, 9.5, 8], 1)]
    make_coco(root, boxes, images=[(n, f"{n:012}.jpg") for n in (3, 500)])
    for name in ("train2017/000000000001.jpg", "train2014/COCO_train2014_000000000002.jpg",
                 "train2017/000000000004.jpg", "train2014/COCO_train2014_000000000001.jpg"):
        picture(root / "coco" / name)
    mixed = ["red"] * 4 + ["blue"] * 2 + ["none"] * 3 + ["x"]
    rows = {"train2014": [(10, 1, "what colour is the cat?", mixed),
                          (11, 1, "odd?", ["never"] * 10), (20, 2, "what?", ["red"] * 10),
                          (99, 77, "no picture?", ["red"] * 10)],
            "val2014": [(30, 3, "held out?", ["red"] * 10), (40, 4, "not held out?", ["Blue"] * 10),
                        (31, 3, "odd?", ["never"] * 10)]}
    write_vqa(root, rows)
    write(root / "vg/question_answers.json", [
        dict(id=n, qas=[dict(image_id=n, qa_id=1000 + n, question="Where?", answer="Red."),
                        dict(image_id=n, qa_id=2000 + n, question="Why?", answer="Nobody knows.")])
        for n in (1, 2, 3, 50)])
    if words:
        write(root / "vqa2/answers_vqa.txt", "\r\n".join(words))


def test_vqa_splits_and_scores(tmp_path):
    make_vqa(tmp_path, ["<unk>", "0", "blue", "none", "red"])
    train, val = read("vqa2", tmp_path, "train"), read("vqa2", tmp_path)
    # 11 and "Why?" have no known answer, 99 no picture; VG's 2 is COCO's 500, in val2017.
    assert train.ids.tolist() == [10, 20, 40, 1001, 1003]
    assert val.ids.tolist() == [30, 31]
    assert "1 without picture (the first: coco/*/77.jpg)" in train.summary
    assert "3 without an answer in the vocabulary" in train.summary
    assert "2 VG questions on unknown images" in train.summary
    # 2017 names come first, then 2014.
    assert [train.names[n] for n in range(5)] == [
        "coco/train2017/000000000001.jpg", "coco/train2014/COCO_train2014_000000000002.jpg",
        "coco/train2017/000000000004.jpg", "vg/VG_100K_2/1.jpg", "vg/VG_100K/3.jpg"]
    # none is normalised to 0, as the scorer does: class "0", not class "none".
    torch.testing.assert_close(train.scores(0), torch.tensor([0, 0.9, 0.6, 0, 1]))
    assert train.scores(2).tolist() == [0, 0, 1, 0, 0]
    assert train.scores(3).tolist() == [0, 0, 0, 0, 1]
    assert val.scores(1).sum() == 0 and val.answers(1) == ["never"] * 10
    assert train.task.num_classes == 5 and train.class_names[0] == "<unk>"
    (tmp_path / "vg/question_answers.json").unlink()
    train = read("vqa2", tmp_path, "train")
    assert train.ids.tolist() == [10, 20, 40]
    assert "without Visual Genome's questions" in train.summary


def test_vqa_vocabulary_is_built(tmp_path):
    """Of both parts, normal forms of the most common answer seen for nine questions at least; it is
    counted where the file does not state it."""
    make_vqa(tmp_path)
    path = tmp_path / "vqa2/v2_mscoco_val2014_annotations.json"
    rows = json.loads(path.read_text())["annotations"]
    for count, answer in [(8, "zebra"), (5, "The Cat"), (4, "cat."), (9, "two"), (20, "an"),
                          (9, "b")]:
        rows += [dict(question_id=10**6, multiple_choice_answer=answer, answers=[])] * count
    ten = [dict(answer=answer) for answer in ("dog", "house", "house")]
    rows += [dict(question_id=10**6, answers=ten)] * 9
    write(path, dict(annotations=rows))
    assert read("vqa2", tmp_path).class_names == ["<unk>", "2", "b", "cat", "house"]


def test_vqa_test_split(tmp_path):
    make_vqa(tmp_path, ["<unk>", "red"])
    questions = dict(questions=[dict(question_id=70, image_id=7, question="what?")])
    path = write(tmp_path / "vqa2/v2_OpenEnded_mscoco_test2015_questions.json", questions)
    picture(tmp_path / "coco/test2015/COCO_test2015_000000000007.jpg")
    dataset = read("vqa2", tmp_path, "test")
    assert dataset.ids.tolist() == [70] and dataset.answers(0) == [] and dataset.scores(0) is None
    write(path, dict(questions=[]))
    assert len(read("vqa2", tmp_path, "test")) == 0


def test_vqa_errors(tmp_path):
    make_vqa(tmp_path, ["yes", "no"])
    refused("answers_vqa.txt: its first line is not <unk>", "vqa2", tmp_path)
    path = tmp_path / "vqa2/v2_mscoco_val2014_annotations.json"
    rows = json.loads(path.read_text())
    for answers, message in ([{}], "a bad answer .*30"), (None, "'answers' is not a list"):
        rows["annotations"][0]["answers"] = answers
        write(path, rows)
        refused(f"annotations.json: record 0: {message}", "vqa2", tmp_path)


def own_vqa(root, train, val, pictures, coco=True):
    """train, val: (question id, image id, answers) of the two files; pictures: as in coco/.
    val2017's images are those in its folder."""
    write_vqa(root, {part: [(n, image, f"{part} {n}?", answers) for n, image, answers in rows]
                     for part, rows in (("train2014", train), ("val2014", val))})
    for name in pictures:
        picture(root / "coco" / name)
    images = [(int(name[-5]), name[8:]) for name in pictures if name.startswith("val2017")]
    if coco:
        write(root / "coco/annotations/instances_val2017.json", coco_file([], images))
    write(root / "vqa2/answers_vqa.txt", "<unk>\nred\nblue")


def asked(dataset):
    """{(question, picture): the answers}"""
    return {(dataset.texts(n)[0], dataset.names[n]): dataset.answers(n)
            for n in range(len(dataset))}


def test_vqa_of_own_numbers(tmp_path):
    """Questions and images numbered from 1 in both files: each has its own answers and pictures;
    image 3 has none in train2017, and so is val2017's."""
    own_vqa(tmp_path, [(1, 1, ["red"]), (2, 2, ["red"]), (3, 3, ["red"])], [(1, 1, ["blue"])],
            ["train2017/1.jpg", "train2017/2.png", "val2017/1.jpg", "val2017/3.jpg"])
    write(tmp_path / "coco/train2017/._1.jpg", b"a Mac's, beside each file of a zip")
    train, val = read("vqa2", tmp_path, "train"), read("vqa2", tmp_path)
    assert asked(train) == {("train2014 1?", "coco/train2017/1.jpg"): ["red"],
                            ("train2014 2?", "coco/train2017/2.png"): ["red"]}
    assert asked(val) == {("val2014 1?", "coco/val2017/1.jpg"): ["blue"]}
    assert "2 training questions have image ids that are in val2017, too" in train.summary


def test_vqa_without_cocos_file(tmp_path):
    """Then the split is that of the two files."""
    own_vqa(tmp_path, [(1, 1, ["red"]), (2, 2, ["red"])], [(3, 3, ["blue"]), (4, 4, ["blue"])],
            [f"train2017/{n}.JPG" for n in (1, 2, 3, 4)], coco=False)
    train, val = read("vqa2", tmp_path, "train"), read("vqa2", tmp_path)
    assert train.ids.tolist() == [1, 2] and val.ids.tolist() == [3, 4]
    assert "instances_val2017.json train2014 trains, val2014 evaluates" in train.summary


@pytest.mark.parametrize("answers, scores", [
    (["red"], [1, 0]), (["red", "blue"], [1, 1]), (["red"] + ["x"] * 3, [.75, 0]),
    (["red"] * 3 + ["blue"] + ["x"] * 6, [.9, .3]), (["red"] * 7 + ["blue"] * 13, [1, 1])])
def test_vqa_scores_of_any_number_of_answers(tmp_path, answers, scores):
    """The official rule at ten; a right answer can score 1 with any number, in any order."""
    own_vqa(tmp_path, [(1, 1, answers), (2, 1, answers[::-1])], [], ["train2017/1.jpg"])
    dataset = read("vqa2", tmp_path, "train")
    for index in (0, 1):
        torch.testing.assert_close(dataset.scores(index), torch.tensor([0, *scores]).float())
    assert dataset.answers(0) == answers


@real
def test_real_vqa():
    dataset = data.load(REAL, ["vqa2"], "train")[1]["vqa2"]
    assert len(dataset.class_names) == 3129 and len(dataset) > 70
    assert {name.split("/")[0] for name in dataset.names.tolist()} == {"coco", "vg"}
    sample = dataset.sample(0)
    assert sample.scores.shape == (3129,) and 0 < sample.scores.max() <= 1


# ---- SNLI-VE, GLUE -------------------------------------------------------------------------------
def test_snli_ve(tmp_path):
    for name in ("11", "22"):
        picture(tmp_path / f"snli_ve/flickr30k_images/{name}.jpg")
    rows = [dict(Flickr30K_ID="11", sentence2="A dog.", gold_label="neutral"),
            dict(Flikr30kID="22.jpg", sentence2="A cat.", gold_label="contradiction"),
            dict(Flickr30K_ID="33", sentence2="No picture.", gold_label="entailment"),
            dict(Flickr30K_ID="11", sentence2="?", gold_label="-"),
            dict(Flickr30K_ID=11, sentence2="A red dog. " * 9, gold_label="entailment")]
    path = tmp_path / "snli_ve/snli_ve_dev.jsonl"
    write(path, "\ufeff" + "\r\n".join(map(json.dumps, rows)) + "\r\n\r\n")
    vocabulary(tmp_path)
    dataset = data.load(tmp_path, ["snli_ve"], "val")[1]["snli_ve"]
    assert [dataset.label(n) for n in range(3)] == [1, 2, 0] and len(dataset) == 3
    assert dataset.names[1] == "22.jpg" and dataset.texts(1) == ["A cat."]
    assert "1 with label '-'" in dataset.summary and "1 without picture" in dataset.summary
    sample = dataset.sample(0)
    assert sample.scores.tolist() == [0, 1, 0] and sample.image.shape == (3, 800, 1066)  # floored
    assert len(dataset.sample(2).tokens) == 25  # of 38
    for broken, message in [
            ('{"Flickr30K_ID": "11"', "line 1: JSONDecodeError"),
            (json.dumps(rows[0] | dict(sentence2=None)), "line 1: ValueError.*'sentence2' is not"),
            (json.dumps(rows[0] | dict(gold_label="maybe")), "unknown label 'maybe'; it is one of"),
            (json.dumps(rows[0] | dict(Flickr30K_ID="../../x")), "leads out of"),
            (json.dumps(rows[2]), "none of its pictures")]:
        write(path, broken + "\n")
        refused(message, "snli_ve", tmp_path)


def test_glue_oddities(tmp_path):
    """Quotes are text; short and long rows are counted; CRLF, byte order mark, outer spaces."""
    header = "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate"
    rows = ['1\t1\t2\t"Why? \t What "is" it?\t0', '"\tWas it real?\t0', "2\t3\t4\tä b\tc\t1", "",
            "3\t3\t4\tx\ty\t1\textra", "4\t5\t6\t\tempty first\t1"]
    path = write(tmp_path / "glue/QQP/dev.tsv", "\ufeff" + "\r\n".join([header, *rows]) + "\r\n")
    dataset = read("qqp", tmp_path)
    assert [dataset.texts(n) for n in range(3)] == [
        ['"Why?', 'What "is" it?'], ["ä b", "c"], ["", "empty first"]]
    assert [dataset.label(n) for n in range(3)] == [0, 1, 1]
    assert "3 rows of too few or too many columns" in dataset.summary
    for content, message in [
            (header + "\n1\t1\t2\ta\tb\tyes\n", "line 2: unknown label 'yes'; it is one of 0, 1"),
            ("a\tb\n", "line 1: no column 'question1'"), ("", "line 1: no column")]:
        write(path, content)
        refused(f"dev.tsv: {message}", "qqp", tmp_path)


def test_mnli_columns(tmp_path):
    """gold_label is the last of 16 columns in dev; sentences are 8 and 9."""
    labels = [*(f"label{n}" for n in range(1, 6)), "gold_label"]
    rows = [[f"c{n}" for n in range(8)] + ["sentence1", "sentence2", *labels]]
    for gold in ("contradiction", "-", "entailment"):
        rows.append(["x"] * 8 + ["premise", "hypothesis "] + ["neutral"] * 5 + [gold])
    lines = ["\t".join(row) for row in rows]
    write(tmp_path / "glue/MNLI/dev_mismatched.tsv", "\n".join(lines))
    dataset = read("mnli", tmp_path)
    assert [dataset.label(n) for n in range(len(dataset))] == [2, 0]
    assert dataset.texts(0) == ["premise", "hypothesis"]
    assert "1 with label '-'" in dataset.summary


def test_glue_test_split_keeps_every_row(tmp_path):
    write(tmp_path / "glue/SST-2/test.tsv", "index\tsentence\n0\ta film .\n1\tanother\n")
    assert read("sst2", tmp_path, "test").labels.tolist() == [-1, -1]
    write(tmp_path / "glue/SST-2/test.tsv", "index\tsentence\n0 no tab\n")
    refused("line 2: 1 columns, not 2; the server wants every row", "sst2", tmp_path, "test")


@real
def test_real_texts():
    sizes = {"qnli": 5463, "sst2": 872, "qqp": 160, "mnli": 2, "snli_ve": 16}
    for name, size in sizes.items():
        assert len(read(name, REAL)) == size
    assert len(read("snli_ve", REAL, "train")) == 5  # the first release's key
    for name in ("qnli", "mnli", "qqp", "sst2"):
        assert len(read(name, REAL, "test")) >= 1
    sst = read("sst2", REAL)
    assert sst.texts(0) == ["it 's a charming and often affecting journey ."] and sst.label(0) == 1


# ---- Batches -------------------------------------------------------------------------------------
def test_collate_pads_to_the_largest():
    samples = []
    for n, (h, w, tokens) in enumerate([(4, 6, [2, 5, 3]), (5, 3, [2, 3])]):
        samples.append(data.Sample(n, torch.ones(3, h, w), (h, w), tokens, [0] * len(tokens),
                                   scores=torch.ones(3)))
    batch, alone = (data.collate(TASK["vqa2"], part) for part in (samples, samples[:1]))
    assert batch.images.shape == (2, 3, 5, 6) and len(batch) == 2 and batch.task == "vqa2"
    assert torch.equal(batch.images[:, 0], (~batch.image_mask).float())
    assert batch.image_mask.sum((1, 2)).tolist() == [30 - 24, 30 - 15]
    assert batch.image_mask[0, 4].all() and batch.image_mask[1, :, 3:].all()
    assert batch.tokens.tolist() == [[2, 5, 3], [2, 3, 0]]
    assert batch.text_mask.tolist() == [[False] * 3, [False, False, True]]
    assert batch.scores.shape == (2, 3) and batch.sizes.tolist() == [[4, 6], [5, 3]]
    assert batch.boxes is alone.image_mask is alone.text_mask is None


# ---- Schedule ------------------------------------------------------------------------------------
SIZES = {"coco": 37, "vg": 11, "sst2": 5}
CHANCES = {"coco": 0.2, "vg": 0.07, "sst2": 0.05}


def test_schedule_is_a_pure_function():
    a, b = (data.Schedule(SIZES, CHANCES, 8, n, seed=3) for n in (300, 200))
    order = np.random.default_rng(0).permutation(200)
    forward = [(a.task(i), a.samples(i).tolist()) for i in range(200)]
    assert {int(i): (b.task(i), b.samples(i).tolist()) for i in order} == dict(enumerate(forward))
    other = data.Schedule(SIZES, CHANCES, 8, 200, seed=4)
    assert [other.task(i) for i in range(200)] != [x[0] for x in forward]


def test_every_epoch_is_another_permutation():
    schedule = data.Schedule(SIZES, CHANCES, 4, 2000, seed=0)
    for name, size in SIZES.items():
        seen = [schedule.samples(i) for i in range(2000) if schedule.task(i) == name]
        epochs = np.ravel(seen)[:4 * len(seen) // size * size].reshape(-1, size)
        assert (np.sort(epochs, 1) == np.arange(size)).all() and (epochs[0] != epochs[1]).any()


def test_schedule_order_does_not_depend_on_the_other_tasks():
    both = data.Schedule(SIZES, CHANCES, 5, 100, seed=0)
    alone = data.Schedule({"vg": 11}, {"vg": 1}, 5, 100, seed=0)
    mine = [i for i in range(100) if both.task(i) == "vg"]
    for k, i in enumerate(mine):
        assert both.samples(i).tolist() == alone.samples(k).tolist()


def test_schedule_edges():
    first = data.Schedule(SIZES, CHANCES, 4, 50, 0, first={"coco": 1}, first_iterations=20)
    assert {first.task(i) for i in range(20)} == {"coco"} < {first.task(i) for i in range(50)}
    with pytest.raises(InputError, match="vg has no training samples"):
        data.Schedule(SIZES | {"vg": 0}, CHANCES, 4, 10, seed=0)


# ---- Loaders -------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """COCO with pictures of several sizes, and SST-2."""
    root = tmp_path_factory.mktemp("small")
    make_coco(root, [(n, 1, [1, 2, 20, 20], 0) for n in (1, 2, 4, 5)], "train", wider=3,
              images=[(n, f"{n}.jpg") for n in range(1, 7)])
    vocabulary(root)
    write(root / "glue/SST-2/train.tsv", "sentence\tlabel\n" + "".join(
        f"{'cat ' * n}\t{n % 2}\n" for n in range(1, 9)))
    return data.load(root, ["coco", "sst2"], "train", 32, "flip")[1]


def load_all(datasets, num_workers=0):
    """The batches of eight iterations; tests/test_train.py shows that training is the same on any
    number of workers, processes and micro-batches."""
    sizes = {name: len(dataset) for name, dataset in datasets.items()}
    schedule = data.Schedule(sizes, {"coco": 0.5, "sst2": 0.5}, 4, 8, seed=1)
    loader = data.train_loader(datasets, schedule, num_workers=num_workers)
    return [batch for batches, _ in loader for batch in batches]


def test_eval_loader_in_order(small):
    """By default pictures come one by one."""
    for workers in (0, 2):
        batches = [batch for batch, _ in data.eval_loader(small["coco"], [5, 0, 3], 2, workers)]
        assert [b.ids for b in batches] == [[6, 1], [4]]
        assert batches[0].image_mask is not None and batches[0].boxes[0].shape == (0, 4)
    assert [len(b) for b, _ in data.eval_loader(small["coco"], range(3))] == [1, 1, 1]
    assert {(b.task, len(b)) for b in load_all(small)} == {("coco", 1), ("sst2", 4)}


def workers_of(folder):
    """A loader of two workers over tiny sentences, begun, and the workers' process ids."""
    _, sets = data.load(folder, ["sst2"], "train", 32, "flip")
    schedule = data.Schedule({"sst2": len(sets["sst2"])}, {"sst2": 1.0}, 4, 1000, seed=0)
    loader = data.train_loader(sets, schedule, num_workers=2)
    next(loader)
    return loader, [p.pid for p in multiprocessing.active_children()]


def test_workers_serve_on_after_sigterm(small_tiny_data):
    """A cluster sends it to all processes; the parent needs its workers to finish what is in hand,
    however long that takes."""
    loader, pids = workers_of(small_tiny_data)
    for pid, number in itertools.product(pids, data.STOPPING):
        os.kill(pid, number)
    assert len(pids) == 2 and len(list(itertools.islice(loader, 50))) == 50
    loader.close()


PROGRAM = """
import resource, sys
import data
from test_data import workers_of
if sys.argv[2] == "few files":
    resource.setrlimit(resource.RLIMIT_NOFILE, (14, 4096))
try:
    loader, pids = workers_of(sys.argv[1])
except data.InputError as error:
    sys.exit(str(error))
raise RuntimeError("a fault of the program")
"""


@pytest.mark.parametrize("how, says", [
    ("fault", "a fault of the program"),            # which does not wait for its workers
    ("few files", "Too many open files.*ulimit -n")])  # while they start
def test_programs_with_workers_that_end_early(small_tiny_data, how, says):
    output = run_python([sys.executable, "-c", PROGRAM, small_tiny_data, how], expect=1,
                        cwd=Path(__file__).parent, timeout=100)
    assert re.search(says, output.splitlines()[-1])


def test_workers_do_not_outlive_their_parent(small_tiny_data):
    def serve(arguments):
        loader, pids = workers_of(*arguments)
        print(*pids)
        time.sleep(60)
    run = Forked(serve, [small_tiny_data])
    pids = run.stdout.readline().split()
    run.processes[0].kill()
    ended, _, _ = select.select([run.stdout], [], [], 30)  # once the workers have closed it, too
    for pid in [] if ended else pids:
        os.kill(int(pid), signal.SIGKILL)
    assert ended and len(pids) == 2


# ---- Unusable pictures ---------------------------------------------------------------------------
def spoilt(small, tmp_path, names):
    """`small` with these COCO pictures broken."""
    root = shutil.copytree(small["coco"].data, tmp_path / "data")
    for name in names:
        write(root / f"coco/train2017/{name}.jpg", b"<html>")
    return data.load(root, ["coco", "sst2"], "train", 32, "flip")[1]


def test_an_unusable_picture_is_replaced(small, tmp_path):
    """By another, and all others stay where they were. (tests/test_train.py: the same training on
    any number of workers and processes, from any iteration on.)"""
    datasets = spoilt(small, tmp_path, [2, 5])
    schedule = data.Schedule({"coco": 6}, {"coco": 1.0}, 4, 9, seed=1)
    loader = data.train_loader(datasets, schedule, micro_batch=4)
    taken = [number for (batch,), _ in loader for number in batch.ids]
    for n, index in zip(taken, itertools.chain(*map(schedule.samples, range(9)))):
        assert n == index + 1 or index + 1 in (2, 5) and n in (1, 3, 4, 6)
    assert len(taken) == 36 and len(set(taken)) == 4


def test_no_usable_picture_is_an_error_at_once(small, tmp_path):
    datasets = spoilt(small, tmp_path, [1, 2, 3, 4, 5, 6])
    for workers in (0, 1):
        with pytest.raises(InputError, match=r"\Acoco: .*(\d.jpg: .*){3}--check --tasks coco`.*\Z"):
            load_all(datasets, workers)


# ---- Command line --------------------------------------------------------------------------------
def test_report_names_what_is_missing(tmp_path, monkeypatch, capsys):
    """~ is home, also where no shell has seen to it."""
    monkeypatch.setenv("HOME", str(tmp_path))
    make_vqa(tmp_path / "data", ["<unk>", "red"])
    (tmp_path / "data/glue/MNLI").mkdir(parents=True)
    data.main(["--data=~/data"])
    lines = {tuple(x.split()[:2]): x for x in capsys.readouterr().out.splitlines()}
    assert "coco/annotations/instances_train2017.json: missing" in lines["coco", "train"]
    assert re.search(r" 2 samples +2 pictures", lines["coco", "val"])
    assert "glue/MNLI/dev_mismatched.tsv: missing" in lines["mnli", "val"]
    assert lines["sst2", "nothing"] and ("sst2", "val") not in lines
    data.main(["--data=~/data", "--tasks", "coco,sst2"])
    lines = [line.split()[:2] for line in capsys.readouterr().out.splitlines()]
    splits = ("train", "val", "test")
    assert lines == [[task, split] for task in ("coco", "sst2") for split in splits]


def test_check_opens_every_picture_once(tmp_path, capfd):
    """COCO's val2017 is VQA's, too: 12 of its 14 pictures are broken, and said once."""
    own_vqa(tmp_path, [], [(n, n, ["red"]) for n in range(1, 15)], [])
    make_coco(tmp_path, [(14, 1, [4, 3, 8, 6], 0)])
    for n in range(1, 12):
        write(tmp_path / f"coco/val2017/{n}.jpg", b"<html>")
    picture(tmp_path / "coco/val2017/12.jpg", (30, 40))

    def check(*more):
        with pytest.raises(SystemExit) as end:
            data.main(["--data", str(tmp_path), "--check", *more])
        return end.value.code, capfd.readouterr().out
    code, printed = check()
    assert code == 1 and printed.count("cannot be read") == 12
    assert printed.count("30 x 40, but 40 x 30 in the annotations") == 1
    assert printed.endswith("14 pictures opened, 12 cannot be used\n")
    printed = check("--tasks", "vg,vqa2")[1]  # these need no size
    assert "14 pictures opened, 11 cannot be used" in printed
    for n in range(1, 13):
        picture(tmp_path / f"coco/val2017/{n}.jpg")
    assert check()[0] == 0


def test_tiny_questions_need_the_picture():
    """Every answer holds in its picture, and a question's text alone does not tell yes from no."""
    rng, said = np.random.default_rng(0), defaultdict(list)
    for _ in range(1500):
        things = data.tiny_picture(rng, most=3)[1]
        text, answer = data.tiny_question(things, rng)
        pairs = [(shape, colour) for shape, colour, _ in things]
        asked = [word for word in re.findall("[a-z]+", text)
                 if word in data.SHAPES or word in data.COLOURS]
        fitting = [pair for pair in pairs if set(asked) <= set(pair)]
        if answer in ("yes", "no"):
            assert (answer == "yes") == bool(fitting), (text, answer, pairs)
            said[text].append(answer == "yes")
        elif asked:  # the colour of the only circle, the shape of the only red thing
            assert len(fitting) == 1 and answer in fitting[0] and answer not in asked
        else:
            assert answer == str(len(things))
    assert len(said) == 12 + 3 + 4  # of two comparisons; of a shape; of a colour
    assert 0.4 < np.mean([answer for answers in said.values() for answer in answers]) < 0.6
