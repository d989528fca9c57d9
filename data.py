"""UniT (Hu & Singh, 2021), Section 4: eight data sets, from official files to a `unit.Batch`.

    files --Dataset--> flat arrays --sample(index, rng)--> Sample --collate--> Batch
    (seed, iteration) --Schedule--> task and indices --train_loader--> batches of an iteration

    task     reader        input               to predict                           evaluated on
    coco     Coco          picture             boxes of 80 kinds                    val2017
    vg       VisualGenome  picture             boxes of 1,600 kinds, attributes     val2017
    vqa2     Vqa2          picture, question   one of 3,129 answers                 val2017
    snli_ve  SnliVe        picture, statement  is it true? yes, no, or unknown      dev
    qnli     Qnli          question, sentence  does the sentence answer it?         dev
    mnli     Mnli          two sentences       does one follow from the other?      dev mismatched
    qqp      Qqp           two questions       do they mean the same?               dev
    sst2     Sst2          sentence            is it positive?                      dev

A ninth data set is one more reader class and one more `Task` in `TASKS`; no other line changes.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import importlib
import json
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
import unicodedata
import warnings
import zlib
from collections import Counter, defaultdict, deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from datetime import timedelta
from itertools import chain, compress, islice, product
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image
from torch import Tensor

# First, as it makes `import torchvision` safe.
from unit import PAPER_TASKS, Batch, InputError, Task, what_is_wrong

from torchvision.transforms.v2 import functional as F

# Data workers fork; a tokenizer that has started threads of its own would warn and could lock up.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


# ---- Samples and batches -------------------------------------------------------------------------
@dataclass
class Sample:
    """One example, before batching. Fields that a data set or a split lacks are None."""

    id: int                           # image id, question id or row number
    image: Tensor | None = None       # (3, H, W) float, normalised
    size: tuple | None = None         # height, width of the original picture
    tokens: list | None = None        # S token ids
    types: list | None = None         # S times 0 (first text) or 1 (second)
    boxes: Tensor | None = None       # (n, 4) cx, cy, w, h in [0, 1]
    labels: Tensor | None = None      # (n,) int64
    attributes: Tensor | None = None  # (n, 16) int64, -1 pads
    scores: Tensor | None = None      # (C,) float


def collate(task: Task, samples: list[Sample]) -> Batch:
    def every(field):
        values = [getattr(sample, field) for sample in samples]
        return None if values[0] is None else values

    batch = Batch(task.name, every("id"), boxes=every("boxes"), labels=every("labels"),
                  attributes=every("attributes"))
    if task.image:
        batch.images, batch.image_mask = pad(every("image"))
        batch.sizes = torch.tensor(every("size"))                       # (B, 2)
    if task.text:
        batch.tokens, batch.text_mask = pad([torch.tensor(x) for x in every("tokens")])  # (B, S)
        batch.token_types, _ = pad([torch.tensor(x) for x in every("types")])
    if scores := every("scores"):
        batch.scores = torch.stack(scores)                              # (B, C)
    return batch


def pad(tensors: list[Tensor]) -> tuple[Tensor, Tensor | None]:
    """B pictures (3, H_i, W_i) or texts (S_i,) -> (B, 3, H, W) or (B, S) with zeros at the ends
    (0 is BERT's [PAD]), and a mask (B, H, W) or (B, S), True = padding; None: nothing is padded.
    Padding changes the features near it (as in DETR), and in the small backbone, which normalises
    whole pictures, all of them: only one picture at a time is exact."""
    sizes = np.array([tensor.shape for tensor in tensors])
    if (sizes == sizes[0]).all():
        return torch.stack(tensors), None
    result = tensors[0].new_zeros(len(tensors), *sizes.max(0))
    mask = torch.ones(len(tensors), *sizes.max(0)[-2:], dtype=torch.bool)
    for row, hidden, tensor in zip(result, mask, tensors):
        place = tuple(map(slice, tensor.shape))
        row[place] = tensor
        hidden[place[-2:]] = False
    return result, mask


# ---- Pictures ------------------------------------------------------------------------------------
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, as the backbone expects
# Lengths in pixels at the paper's image size; at any other they keep their ratio to it (`scaled`).
SHORTEST, LONGEST = 800, 1333                # Section 3.5; the limit: released config
SCALES = tuple(range(480, 801, 32))          # Section 3.5, "between 480 and 800"; steps: DETR
CROP_SCALES = (400, 500, 600)                # DETR: the size before the crop
CROP_SIDES = (384, 600)                      # Section 3.5


class UnusablePicture(InputError):
    """A picture that no decoder opens, or whose shape is not the one that its boxes are for. In
    training another one takes its place."""


def read_image(path: Path | str, size=None) -> Tensor:
    """(3, H, W) uint8 RGB, laid out as (H, W, 3): the layout that torchvision resizes fastest.
    `size`: height and width in the annotations, if they state them; see `upright`. PIL's `draft`
    would decode faster, but to other pixels."""
    try:
        # No warnings about odd metadata or very large pictures: users can do nothing about them.
        with warnings.catch_warnings(action="ignore"), Image.open(path) as picture:
            picture = upright(picture, size)
            if picture.mode.startswith("I;16"):  # 16-bit grey, which PIL would cut off at 255
                picture = Image.fromarray((np.asarray(picture) // 257).astype(np.uint8))
            pixels = np.array(picture.convert("RGB"))
    except Exception as error:  # PIL raises many kinds
        raise UnusablePicture(f"{path}: cannot be read as a picture ({error})") from None
    return torch.from_numpy(pixels).permute(2, 0, 1)


TURNS = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
         4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
         6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
         8: Image.Transpose.ROTATE_90}  # by EXIF's orientation


def upright(picture: Image.Image, size) -> Image.Image:
    """The picture turned as its EXIF says, as viewers and most labelling tools do, or as it is
    stored if only that has the shape in the annotations (`size`: height, width). A scaled copy of
    that shape is as good, as boxes are relative; any other shape is an error."""
    picture.load()
    views = [picture]
    # ImageOps.exif_transpose writes EXIF anew, and fails where any other tag of it is damaged.
    with contextlib.suppress(Exception):  # no EXIF, none that can be read, or not turned
        views.insert(0, picture.transpose(TURNS[picture.getexif()[ExifTags.Base.Orientation]]))
    if size is None:
        return views[0]
    height, width = size

    def skew(view):
        return abs(view.height * width - view.width * height)
    best = min(views, key=skew)  # the first of equals
    # Rounding a scaled copy's sides to whole pixels skews it by less than this.
    if skew(best) > max(height + width, best.height + best.width):
        raise ValueError(f"its width and height are {picture.width} x {picture.height}, but "
                         f"{width} x {height} in the annotations")
    return best


def scaled(length: int, image_size: int) -> int:
    """A length of the table above at this --image_size."""
    return max(1, round(length * image_size / SHORTEST))


def fitted_size(height: int, width: int, shortest: int, longest: int, floor: bool):
    """The size whose shorter side is `shortest`, unless the longer one would exceed `longest`; at
    least 1. It is computed in whole numbers, so that 480 x (800 / 480) is 800. Detection rounds,
    vision and language takes the floor (released config)."""
    wanted, present = shortest, min(height, width)
    if max(height, width) * shortest > longest * present:
        wanted, present = longest, max(height, width)
    half = 0 if floor else present // 2  # added, it makes the floor division round
    return [max(1, (side * wanted + half) // present) for side in (height, width)]


def resize(image: Tensor, shortest: int, longest: int, floor: bool = False) -> Tensor:
    """(3, H, W) -> (3, H', W'), uint8, bilinear with antialiasing (within 1/255 of PIL's)."""
    return F.resize(image, fitted_size(*image.shape[1:], shortest, longest, floor))


def resize_for_evaluation(image: Tensor, image_size: int, floor: bool = False) -> Tensor:
    """(3, H, W) -> (3, H', W'), the shorter side `image_size` (Section 3.5)."""
    return resize(image, image_size, scaled(LONGEST, image_size), floor)


def normalise(image: Tensor) -> Tensor:
    """(3, H, W) uint8 -> float, contiguous. In place: fresh memory costs more than arithmetic."""
    result = torch.empty(image.shape)
    for channel, mean, std in zip(range(3), MEAN, STD):
        result[channel].copy_(image[channel]).sub_(255 * mean).mul_(1 / (255 * std))
    return result


def flip(image: Tensor, boxes: np.ndarray, rng: np.random.Generator):
    """Mirrors the picture and its boxes, half of the time."""
    if rng.random() < 0.5:
        image = image.flip(2)
        boxes = np.stack([1 - boxes[:, 2], boxes[:, 1], 1 - boxes[:, 0], boxes[:, 3]], 1)
    return image, boxes


def crop(image: Tensor, boxes: np.ndarray, rng: np.random.Generator, image_size: int):
    """A random part of the picture, first resized smaller than usual. Boxes are clipped to it."""
    # Far above COCO's sizes; without a limit a 10,000 x 10 picture would become 400,000 wide.
    image = resize(image, scaled(rng.choice(CROP_SCALES), image_size), longest=10_000)
    sides = np.array(image.shape[1:])
    low, high = (np.minimum(sides, scaled(side, image_size)) for side in CROP_SIDES)
    h, w = rng.integers(low, high, endpoint=True)
    y, x = rng.integers(0, sides - (h, w), endpoint=True)
    scale = np.tile(sides[::-1], 2)  # width, height, width, height
    boxes = ((boxes * scale - (x, y, x, y)) / (w, h, w, h)).clip(0, 1)
    return image[:, y:y + h, x:x + w], boxes


def augment(image: Tensor, boxes: np.ndarray, rng: np.random.Generator,
            image_size: int = SHORTEST):
    """image (3, H, W) uint8, boxes (n, 4) x0, y0, x1, y1 relative to the picture.

    The paper (Section 3.5), "following DETR", resizes to 480-800, then crops. DETR itself, and the
    released config, flip, crop half of the time, and resize to 480-800 last: so does this."""
    image, boxes = flip(image, boxes, rng)
    if rng.random() < 0.5:
        image, boxes = crop(image, boxes, rng, image_size)
    shortest = scaled(rng.choice(SCALES), image_size)
    return resize(image, shortest, scaled(LONGEST, image_size)), boxes


# ---- Texts ---------------------------------------------------------------------------------------
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]  # BERT's; [PAD] is number 0


def read_vocabulary(path: Path) -> list[str]:
    """BERT's vocabulary, a word piece per line."""
    words = read_lines(path) if path.exists() else []
    if lost := set(SPECIAL[:4]) - set(words):
        problem = "missing; texts need it"
        if path.exists():
            problem = what_is_wrong(path, f"no line {min(lost)}: not BERT's")
        raise bad(path, problem, "take vocab.txt (231,508 bytes) of google-bert/bert-base-uncased, "
                  "or let `python data.py --prepare vocab` make one from the training texts")
    return words


class Tokenizer:
    """BERT's WordPiece (Section 3.2): `[CLS] first [SEP]` or `[CLS] first [SEP] second [SEP]`."""

    def __init__(self, vocabulary: Path | list[str]):
        from tokenizers import BertWordPieceTokenizer
        words = vocabulary if isinstance(vocabulary, list) else read_vocabulary(vocabulary)
        self.wordpiece = BertWordPieceTokenizer({x: n for n, x in enumerate(words)}, lowercase=True)

    def encode(self, first: str, second: str | None = None, max_length: int = 128):
        """-> (ids, types), at most max_length long; of a pair the longer text is cut first."""
        self.wordpiece.enable_truncation(max_length, strategy="longest_first")
        encoding = self.wordpiece.encode(first, second)
        return encoding.ids, encoding.type_ids


# ---- Readers -------------------------------------------------------------------------------------
MAX_ATTRIBUTES = 16   # per object (released config)
MAX_CLASSES = 2 ** 15  # ids are int16
COCO_VAL = "coco/annotations/instances_val2017.json"


class Dataset:
    """The base of all readers. `split` is train, val or test; `data` the folder of all data sets.

    A reader adds `read(self)`, which sets `ids`, `num_images` (different pictures) and arrays of
    its own, perhaps `folder` and `names` of pictures in it; and `sample(self, index, rng=None) ->
    Sample`, augmented by draws from `rng` in training; `rng` is None in evaluation.

    Records with the faults of official files are left out and counted (`skipped`): absent pictures,
    repeated ids, empty boxes, objects outside a vocabulary, questions without answers, rows of too
    many columns, the label "-". Any other fault is an InputError that names file, record and fix.
    Pictures are opened one by one: `picture` raises UnusablePicture."""

    files: dict[str, list[str]] = {}  # split -> the files it is read from, relative to `data`
    class_names: list[str] = []       # index = class id, "" for ids that are not used
    attribute_names: list[str] = []
    sizes: np.ndarray | None = None   # (n, 2) height, width of the pictures as annotated

    def __init__(self, task: Task, data: Path, split: str, tokenizer: Tokenizer | None = None,
                 image_size: int = SHORTEST, augment: str = "full"):
        if split not in self.files:
            raise InputError(f"{task.name} has no split {split!r}, but {', '.join(self.files)}")
        paths = [data / file for file in self.needed(data, split)]
        if missing := [str(path) for path in paths if not path.exists()]:
            raise bad(", ".join(missing), f"missing for {task.name} {split}", LAYOUT)
        self.task, self.data, self.split, self.tokenizer = task, data, split, tokenizer
        self.image_size, self.augment = image_size, augment
        self.path = data / self.files[split][0]   # of the annotations
        self.skipped, self.notes = Counter(), []  # {reason: how many}; what else the summary says
        self.missing = 0  # how many of the split's samples lack their picture
        gc.disable()  # it would visit millions of objects just parsed, again and again
        try:
            self.read()
        finally:
            gc.enable()

    @classmethod
    def needed(cls, data: Path, split: str) -> list[str]:
        return cls.files[split]

    def __len__(self) -> int:
        return len(self.ids)

    def picture(self, index: int) -> Tensor:
        """(3, H, W) uint8. Raises UnusablePicture."""
        size = None if self.sizes is None else self.sizes[index].tolist()
        # Not a Path: it interns its parts, and each worker would end up with a copy of that table.
        return read_image(f"{self.folder}/{self.names[index]}", size)

    @property
    def summary(self) -> str:
        line = f"{self.task.name:<9} {self.split:6}{len(self):>9,} samples "
        line += f"{self.num_images:>9,} pictures" if self.task.image else " " * 18
        notes = [line.rstrip()]
        if not len(self):
            notes.append("no samples")
        if self.skipped.total():
            notes.append(f"skipped: {counted(self.skipped)}")
        return "; ".join(notes + self.notes)


def clipped(boxes: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """boxes (n, 4) x, y, w, h in pixels, sizes (n, 2) or (2,) height, width -> (n, 4) x0, y0, x1,
    y1 relative to the picture, clipped to it."""
    corners = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1)
    return (corners / sizes[..., [1, 0, 1, 0]]).clip(0, 1)


def not_empty(boxes: np.ndarray) -> np.ndarray:
    """(n, 4) corners -> (n,) bool. By rounding, a box cut to nothing may keep a side up to 1e-6."""
    return (boxes[:, 2:] - boxes[:, :2] > 1e-6).all(1)


class Coco(Dataset):
    """COCO 2017. Category ids are used as they are: 1..90 with ten gaps, hence 91 classes; any
    other file with ids from 0 on does as well."""

    files = {"train": ["coco/annotations/instances_train2017.json"], "val": [COCO_VAL],
             "test": ["coco/annotations/image_info_test-dev2017.json"]}  # no boxes; for the server
    folders = {"train": "coco/train2017", "val": "coco/val2017", "test": "coco/test2017"}

    def read(self, content: dict | None = None) -> None:
        """From `content` in place of the file's, if given."""
        content = content or read_json(self.path)
        self.folder = self.data / self.folders[self.split]
        self.class_names = self.names_by_id(content, "categories")
        if self.task.num_attributes:
            self.attribute_names = self.names_by_id(content, "attributes")
        self.task = replace(self.task, num_classes=len(self.class_names),
                            num_attributes=len(self.attribute_names))
        rows = read_records(content, "images", self.path, self.image_row)
        rows = np.array(rows, [("id", np.int64), ("name", object), ("size", np.int64, 2)])
        listed, first = np.unique(rows["id"], return_index=True)
        self.skipped["repeated image ids"] = len(rows) - len(listed)
        rows = rows[np.sort(first)]  # in the file's order
        names, present = find_pictures(self, rows["name"].tolist())
        self.ids, self.sizes = rows["id"][present], rows["size"][present]  # (n,), (n, 2) h, w
        self.names, self.num_images = strings(names), len(self.ids)
        self.read_boxes(content, listed)

    def image_row(self, row: dict) -> tuple:
        size = field(row, "height", int), field(row, "width", int)
        if min(size) < 1:
            raise ValueError("an image of no size")
        return field(row, "id", int), field(row, "file_name", str), size

    def names_by_id(self, content: dict, key: str) -> list[str]:
        """List `key` of ids and names -> names by id, up to the largest id; "" where there is none.
        The length is the number of classes: 91, 1601 and 401 on the official files."""
        names = {}

        def read(row):
            number = field(row, "id", int)
            if number in names or not 0 <= number < MAX_CLASSES:
                raise ValueError(f"an id of {key} that occurs twice, or is not in 0..32767")
            names[number] = field(row, "name", str)
        read_records(content, key, self.path, read)
        return [names.get(number, "") for number in range(max(names, default=0) + 1)]

    def read_box(self, row: dict) -> tuple:
        box, label = field(row, "bbox", list), field(row, "category_id", int)
        if len(box) != 4 or not all(isinstance(x, (int, float)) and abs(x) < 1e9 for x in box):
            raise ValueError("a bbox that is not 4 finite numbers")
        if not 0 <= label < len(self.class_names) or not self.class_names[label]:
            raise ValueError("a category_id that is not in its categories")
        area, crowd = field(row, "area", float, box[2] * box[3]), field(row, "iscrowd", int, 0)
        size = self.task.num_attributes
        attributes = field(row, "attribute_ids", list) if size else []
        if not all(type(n) is int and 0 <= n < size for n in attributes):
            raise ValueError(f"attribute_ids outside 0..{size - 1}")
        if size:
            attributes = (attributes + [-1] * MAX_ATTRIBUTES)[:MAX_ATTRIBUTES]
        return field(row, "image_id", int), label, box, area, crowd != 0, attributes

    def read_boxes(self, content: dict, listed: np.ndarray) -> None:
        """Annotations, grouped by image. `listed`: ids of all images, those without picture too."""
        rows = []
        if self.split != "test":
            rows = read_records(content, "annotations", self.path, self.read_box)
        width = MAX_ATTRIBUTES if self.task.num_attributes else 0
        rows = np.array(rows, [  # boxes: x, y, w, h in pixels
            ("image", np.int64), ("label", np.int16), ("box", np.float64, 4), ("area", np.float64),
            ("crowd", bool), ("attributes", np.int16, width)])
        self.skipped["boxes of images not listed"] = int((~np.isin(rows["image"], listed)).sum())
        rows = rows[np.isin(rows["image"], self.ids)]  # boxes that have a picture
        by_id = np.argsort(self.ids)
        places = by_id[np.searchsorted(self.ids, rows["image"], sorter=by_id)]
        order = np.argsort(places, kind="stable")  # in the file's order
        places, rows = places[order], rows[order]
        self.starts = np.searchsorted(places, np.arange(len(self) + 1))
        self.boxes, self.labels, self.areas = rows["box"], rows["label"], rows["area"]
        self.crowd, self.attributes = rows["crowd"], rows["attributes"]
        self.check_boxes(self.sizes[places])
        full = not_empty(clipped(self.boxes, self.sizes[places]))
        self.usable = full & ~self.crowd  # for training
        self.skipped["empty boxes"] = int((~full).sum())
        self.skipped["crowd boxes (no training; the metric keeps them)"] = int(self.crowd.sum())
        if self.split == "train" and not self.usable.any():
            raise bad(self.path, f"no box to learn from (left out: {counted(self.skipped)})")

    def check_boxes(self, sizes: np.ndarray) -> None:
        """Refuses a file whose boxes follow another convention than x, y, w, h in pixels, which
        shows in the file as a whole. sizes (n, 2): height, width of each box's picture."""
        number, boxes = len(self.boxes), self.boxes
        fix = "COCO's are x, y, width, height in pixels, not corners: convert them"
        if number and boxes.min() >= 0 and boxes.max() <= 1:
            raise bad(self.path, "all boxes lie in 0..1, relative to their pictures", fix)
        ends = boxes[:, :2] + boxes[:, 2:]
        beyond = int((ends > sizes[:, ::-1] + 1).any(1).sum())  # by more than 1 pixel: rounding
        if beyond > number / 2:  # three in four, if they are corners x0, y0, x1, y1
            raise bad(self.path, f"{beyond:,} of {number:,} boxes go beyond their pictures", fix)
        if beyond:
            self.notes.append(f"{beyond:,} boxes go beyond their pictures: clipped")

    def pictures_over(self, queries: int) -> int:
        """How many pictures have more boxes to learn from than there are queries."""
        before = np.concatenate([[0], np.cumsum(self.usable)])  # box by box
        return int((np.diff(before[self.starts]) > queries).sum())

    def sample(self, index: int, rng: np.random.Generator | None = None) -> Sample:
        image, size = self.picture(index), self.sizes[index]
        own = slice(self.starts[index], self.starts[index + 1])
        boxes = clipped(self.boxes[own], size)
        if rng is not None and self.augment == "full":
            image, boxes = augment(image, boxes, rng, self.image_size)
        else:
            if rng is not None and self.augment == "flip":
                image, boxes = flip(image, boxes, rng)
            image = resize_for_evaluation(image, self.image_size)
        # The size is the annotation file's, as its boxes are given in those pixels.
        sample = Sample(int(self.ids[index]), normalise(image), tuple(size.tolist()))
        if self.split != "test":
            keep = self.usable[own] & not_empty(boxes)  # a crop may have left nothing of a box
            low, high = boxes[keep, :2], boxes[keep, 2:]
            sample.boxes = torch.from_numpy(np.hstack([(low + high) / 2, high - low])).float()
            sample.labels = torch.from_numpy(self.labels[own][keep]).long()
            if self.task.num_attributes:
                sample.attributes = torch.from_numpy(self.attributes[own][keep]).long()
        return sample

    def ground_truth(self):
        """A pycocotools COCO of the file's boxes, unchanged, crowds too; without the polygons."""
        from pycocotools.coco import COCO
        columns = {
            "image_id": np.repeat(self.ids, np.diff(self.starts)), "category_id": self.labels,
            "bbox": self.boxes, "area": self.areas, "iscrowd": self.crowd.astype(int)}
        annotations, rows = [], zip(*(values.tolist() for values in columns.values()))
        # Numbered from 1: pycocotools takes a match with box 0 for none at all.
        for number, row in enumerate(rows, 1):
            annotations.append(dict(zip(columns, row), id=number))
        truth, names = COCO(), enumerate(self.class_names)
        truth.dataset = {"info": {}, "annotations": annotations}
        truth.dataset["images"] = [{"id": number} for number in self.ids.tolist()]
        truth.dataset["categories"] = [{"id": n, "name": name} for n, name in names if name]
        with contextlib.redirect_stdout(None):  # it prints
            truth.createIndex()
        return truth


class VisualGenome(Coco):
    """Visual Genome's objects with attributes, from COCO-style files that `prepare_vg` makes."""

    files = {"train": ["vg/instances_train.json"], "val": ["vg/instances_val.json"]}
    folders = {"train": "vg", "val": "vg"}  # file names are VG_100K/2.jpg, VG_100K_2/1.jpg
    raw = ["vg/image_data.json", "vg/attributes.json", "vg/objects_vocab.txt",
           "vg/attributes_vocab.txt", COCO_VAL]

    @classmethod
    def needed(cls, data: Path, split: str) -> list[str]:
        return cls.files[split] if (data / cls.files[split][0]).exists() else cls.raw

    def read(self) -> None:
        content = None
        if not self.path.exists():
            splits, dropped = prepare_vg(self.data)
            content = splits[self.split]
            self.notes += [f"{self.path.name} was made in memory: `python data.py --data "
                           f"{self.data} --prepare vg` makes it once",
                           f"dropped from train and val: {counted(dropped)}"]
        super().read(content)


class Classification(Dataset):
    """The base of the readers below: one or two texts, perhaps a picture, and a class."""

    words: list[str] = []  # the labels in the files, by class id

    def texts(self, index: int) -> list[str]:
        return [texts[index] for texts in self.columns]

    def class_id(self, label, line: int) -> int | None:
        """The label's place in `words`; None, counted, for "-" (SNLI-VE, MNLI: no agreement)."""
        if label == "-":
            self.skipped["with label '-'"] += 1
            return None
        if label not in self.words:
            raise bad(self.path, f"line {line}: unknown label {label!r}",
                      f"it is one of {', '.join(self.words)}")
        return self.words.index(label)

    def fill(self, rows: list[tuple]) -> list[tuple]:
        """Rows (id, class id, picture or "", up to two texts, ...) -> flat arrays; returns those in
        them. Class -1: not known; None: left out, as are the rows whose picture is absent."""
        rows = [row for row in rows if row[1] is not None]
        names = [row[2] for row in rows]
        if self.task.image:
            names, present = find_pictures(self, names)
            rows = list(compress(rows, present))
        ids, labels, _, texts, *_ = zip(*rows) if rows else [()] * 4
        self.ids, self.labels = np.array(ids, np.int64), np.array(labels, np.int64)
        self.names, self.num_images = strings(names), len({*names} - {""})
        self.columns = [strings(part) for part in zip(*texts)]  # all first texts, all second ones
        return rows

    def label(self, index: int) -> int:
        return int(self.labels[index])

    def scores(self, index: int) -> Tensor | None:
        """(C,) the target score of each class; None where there is no target."""
        one_hot = torch.arange(self.task.num_classes) == self.label(index)
        return one_hot.float() if one_hot.any() else None

    def sample(self, index: int, rng: np.random.Generator | None = None) -> Sample:
        """Never augmented: flips make "left" a lie, crops hide what is asked for (Section 3.5)."""
        sample = Sample(int(self.ids[index]), scores=self.scores(index))
        if self.task.image:
            image = self.picture(index)
            sample.size = tuple(image.shape[1:])
            sample.image = normalise(resize_for_evaluation(image, self.image_size, floor=True))
        if self.task.text:
            sample.tokens, sample.types = self.tokenizer.encode(*self.texts(index),
                                                                max_length=self.task.max_tokens)
        return sample


class Vqa2(Classification):
    """VQAv2 with soft scores; Visual Genome's questions are further training data (Section 4.1).

    The 2014 files are split anew by COCO 2017: val2014's questions on val2017's pictures are held
    out, all others train. Pictures are found by id: 2014's and 2017's are the same, renamed."""

    parts = {"train": ["train2014", "val2014"], "val": ["val2014"], "test": ["test2015"]}
    questions = "vqa2/v2_OpenEnded_mscoco_{}_questions.json"
    annotations = "vqa2/v2_mscoco_{}_annotations.json"
    files = {"train": [questions.format("train2014"), questions.format("val2014")],
             "val": [questions.format("val2014")], "test": [questions.format("test2015")]}
    # Where pictures are looked for, in this order.
    folders = {"train": ["coco/train2017", "coco/train2014", "coco/val2017", "coco/val2014"],
               "val": ["coco/val2017", "coco/val2014", "coco/train2017", "coco/train2014"],
               "test": ["coco/test2015", "coco/test2017"]}
    vocabulary = "vqa2/answers_vqa.txt"

    @classmethod
    def answered(cls, data: Path, split: str) -> list[str]:
        """The parts whose answers are read: both where the vocabulary has to be built from them."""
        if not (data / cls.vocabulary).exists():
            return cls.parts["train"]
        return [] if split == "test" else cls.parts[split]

    @classmethod
    def needed(cls, data: Path, split: str) -> list[str]:
        answers = [cls.annotations.format(part) for part in cls.answered(data, split)]
        return cls.files[split] + answers

    def read(self) -> None:
        self.folder, given, common, rows = self.data, defaultdict(dict), [], []
        shared = 0
        for part in self.answered(self.data, self.split):
            given[part], chosen = self.read_annotations(self.data / self.annotations.format(part))
            common += chosen
        self.class_names = self.read_answers(common)
        self.task = replace(self.task, num_classes=len(self.class_names))
        held_out = self.held_out() if self.split != "test" else set()
        pictures = pictures_by_id(self.data, *self.folders[self.split])
        for part in self.parts[self.split]:
            for number, image, text in self.read_questions(self.data / self.questions.format(part)):
                name, held = pictures.get(image) or f"coco/*/{image}.jpg", image in held_out
                if held and part == "train2014":  # own data: two pictures may share an id
                    held = not name.startswith("coco/train")
                    shared += 1
                if held == (self.split == "val"):
                    rows.append((number, -1, name, [text], given[part].get(number, [])))
        if shared:
            self.notes.append(f"{shared:,} training questions have image ids that are in val2017, "
                              "too: asked about train2017's pictures, or left out")
        if self.split == "train":
            rows += self.genome_questions(held_out)
        self.encode(rows)

    def read_questions(self, path: Path) -> list[tuple[int, int, str]]:
        """(question id, image id, question) of each."""
        return read_records(read_json(path), "questions", path, lambda row: (
            field(row, "question_id", int), field(row, "image_id", int),
            field(row, "question", str)))

    def read_annotations(self, path: Path) -> tuple[dict[int, list[str]], list[str]]:
        """{question id: answers}, the most common answer of each question."""
        answers, common = {}, []

        def shorten(row: dict):
            # Only the text of 6.6 million {"answer": text, ...} is kept, equal ones as one object.
            return sys.intern(str(row["answer"])) if "answer" in row else row

        def read(row):
            texts = field(row, "answers", list)
            if not all(isinstance(text, str) for text in texts):
                raise ValueError("a bad answer")
            answers[field(row, "question_id", int)] = texts
            chosen = field(row, "multiple_choice_answer", str, "")
            common.append(chosen or max(texts, key=texts.count, default=""))
        read_records(read_json(path, shorten), "annotations", path, read)
        return answers, common

    def held_out(self) -> set[int]:
        """val2017's images; without COCO's file those of val2014's questions."""
        if (self.data / COCO_VAL).exists():
            return coco_val_ids(self.data)
        self.notes.append(f"without {COCO_VAL} train2014 trains, val2014 evaluates")
        path = self.data / self.files["val"][0]
        return {image for _, image, _ in self.read_questions(path)}

    def read_answers(self, common: list[str]) -> list[str]:
        """The vocabulary: answers_vqa.txt, or else the normal forms of answers seen for at least
        nine questions: 3,129 in VQAv2. For "", one of them, <unk> comes, as in that file."""
        path = self.data / self.vocabulary
        if path.exists():
            words = read_lines(path)
            if words[:1] != ["<unk>"]:  # class 0 is never predicted
                raise bad(path, "its first line is not <unk>", "put it there or remove the file")
            return words
        normal = Counter(map(functools.cache(normalise_answer), common))
        return ["<unk>"] + sorted(word for word, count in normal.items() if count >= 9 and word)

    def genome_questions(self, held_out: set[int]) -> list[tuple]:
        """Rows for `encode` of VG's questions whose picture is not in val2017."""
        paths = [self.data / "vg/image_data.json", self.data / "vg/question_answers.json"]
        if missing := [str(path) for path in paths if not path.exists()]:
            self.notes.append(f"without Visual Genome's questions: {', '.join(missing)} missing")
            return []
        pictures = pictures_by_id(self.data, "vg/VG_100K", "vg/VG_100K_2")
        training, rows = {}, []  # {image id: is it outside val2017?}

        def add_image(row):
            training[row["image_id"]] = row["coco_id"] not in held_out

        def add_questions(row):
            for qa in row["qas"]:
                image = qa["image_id"]
                if image not in training:
                    self.skipped["VG questions on unknown images"] += 1
                elif training[image]:
                    name = pictures.get(image) or f"vg/*/{image}.jpg"
                    text, answer = field(qa, "question", str), field(qa, "answer", str)
                    rows.append((field(qa, "qa_id", int), -1, name, [text], [answer]))
        for path, read in zip(paths, (add_image, add_questions)):
            read_records(read_json(path), "records", path, read)
        return rows

    def encode(self, rows: list[tuple]) -> None:
        """Rows as for `fill`, with the list of answers as a fifth value -> flat arrays."""
        # {normal form: class}, as the scorer compares normal forms; without <unk>. If two classes
        # share a form ("none" and "0": 0), it maps to the class that is spelt like the form.
        forms = [(normalise_answer(name), n) for n, name in enumerate(self.class_names)][1:]
        written_so = {form: n for form, n in forms if form == self.class_names[n]}
        self.classes = dict(forms) | written_so
        known = functools.cache(lambda text: normalise_answer(text) in self.classes)
        kept = []
        for row in rows:
            if self.split != "test" and not row[4]:
                self.skipped["without answers"] += 1
            elif self.split == "train" and not any(map(known, row[4])):
                self.skipped["without an answer in the vocabulary"] += 1  # they have no loss
            else:
                kept.append(row)
        # One text a question; no answer has a NUL in it.
        self.given = strings("\0".join(row[4]) for row in self.fill(kept))

    def answers(self, index: int) -> list[str]:
        """As given, ten in the official files; none on a test split."""
        return [] if self.split == "test" else self.given[index].split("\0")

    def scores(self, index: int) -> Tensor | None:
        """(C,) 0, 0.3, 0.6, 0.9, 1 for 0, 1, 2, 3, 4+ of ten annotators: leave-one-out accuracy.
        Of n it is 3 n_agreeing / n, at most 1 (ours): one answer alone scores 1."""
        if self.split == "test":
            return None
        answers = self.answers(index)
        forms = map(normalise_answer, answers)
        known = torch.tensor([self.classes[form] for form in forms if form in self.classes]).long()
        return (3 * known.bincount(minlength=self.task.num_classes) / len(answers)).clamp(max=1)


class SnliVe(Classification):
    """SNLI-VE (footnote 5): does the picture, in place of SNLI's premise, entail the hypothesis?"""

    files = {"train": ["snli_ve/snli_ve_train.jsonl"], "val": ["snli_ve/snli_ve_dev.jsonl"],
             "test": ["snli_ve/snli_ve_test.jsonl"]}
    class_names = words = ["entailment", "neutral", "contradiction"]

    def read(self) -> None:
        self.folder, rows = self.data / "snli_ve/flickr30k_images", []
        for number, line in enumerate(read_lines(self.path)):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                # The first release spelt the key otherwise, and had ".jpg" in the value.
                name = row["Flickr30K_ID"] if "Flickr30K_ID" in row else row["Flikr30kID"]
                text, label = field(row, "sentence2", str), row["gold_label"]
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise bad(self.path, f"line {number + 1}: {error!r} in {line[:80]!r}") from None
            name = str(name).removesuffix(".jpg") + ".jpg"
            rows.append((number, self.class_id(label, number + 1), name, [text]))
        self.fill(rows)


class Glue(Classification):
    """A task of GLUE (footnote 4): lines of columns between tabs, under a header. Nothing is
    quoted: a quotation mark is text. `fields` names the columns of the texts and of the label."""

    def read(self) -> None:
        header, *lines = [line.split("\t") for line in read_lines(self.path) or [""]]
        test, rows = self.split == "test", []
        names = self.fields[:-1] if test else self.fields  # test files have no label
        if lost := [name for name in names if name not in header]:
            raise bad(self.path, f"line 1: no column {lost[0]!r}", "name the columns there, with "
                      "tabs between, as the official file or one's own train.tsv does")
        for number, cells in enumerate(lines):
            if len(cells) == len(header):
                row = dict(zip(header, cells))
                texts = [row[name].strip() for name in names]
                label = -1 if test else self.class_id(texts.pop(), number + 2)
                rows.append((number, label, "", texts))
            elif test:
                raise bad(self.path, f"line {number + 2}: {len(cells)} columns, not {len(header)}",
                          "the server wants every row: take the official file")
            else:  # QQP has questions broken over two lines
                self.skipped["rows of too few or too many columns"] += 1
        self.fill(rows)


def tsv(folder: str, ending: str = "") -> dict[str, list[str]]:
    names = {"train": "train", "val": f"dev{ending}", "test": f"test{ending}"}
    return {split: [f"glue/{folder}/{name}.tsv"] for split, name in names.items()}


class Qnli(Glue):
    files, fields = tsv("QNLI"), ("question", "sentence", "label")
    class_names = words = ["entailment", "not_entailment"]


class Mnli(Glue):
    """Trained on all of MNLI, evaluated on the genres that training lacks."""

    files, fields = tsv("MNLI", "_mismatched"), ("sentence1", "sentence2", "gold_label")
    class_names = words = ["entailment", "neutral", "contradiction"]


class Qqp(Glue):
    files, fields = tsv("QQP"), ("question1", "question2", "is_duplicate")
    words, class_names = ["0", "1"], ["not duplicate", "duplicate"]


class Sst2(Glue):
    files, fields = tsv("SST-2"), ("sentence", "label")
    words, class_names = ["0", "1"], ["negative", "positive"]


# ---- The eight data sets of Section 1 and Figure 1 -----------------------------------------------
READERS = [Coco, VisualGenome, Vqa2, SnliVe, Qnli, Mnli, Qqp, Sst2]
TASKS = [replace(task, dataset=reader) for task, reader in zip(PAPER_TASKS, READERS)]


def load(data: Path | str, names, split: str, image_size: int = SHORTEST, augment: str = "full",
         vocab: Path | list[str] | None = None):
    """-> the named tasks, with as many classes as the files have; {name: Dataset}. `vocab`: the
    word pieces, if not those in `data`: a model needs the ones it was trained with."""
    data, tasks = Path(data), tasks_named(names)
    require_folder(data)
    tokenizer = None
    if any(task.text for task in tasks):
        tokenizer = Tokenizer(vocab or data / "bert/vocab.txt")
    datasets = {task.name: task.dataset(task, data, split, tokenizer, image_size, augment)
                for task in tasks}
    return [dataset.task for dataset in datasets.values()], datasets


def tasks_named(names) -> list[Task]:
    by_name = {task.name: task for task in TASKS}
    if unknown := [name for name in names if name not in by_name]:
        raise InputError(f"unknown task {unknown[0]!r}; there are {', '.join(by_name)}; the file "
                         "of a task of yours goes to --tasks_from")
    return [by_name[name] for name in names]


# ---- The order of samples, and loaders -----------------------------------------------------------
class Schedule:
    """Which task and which samples an iteration takes: a pure function of (seed, iteration).

    So processes agree without communicating, and a run can resume anywhere. The task is drawn
    (Section 3.5) and takes the next samples of its data set, shuffled anew in each pass."""

    def __init__(self, sizes: dict[str, int], probabilities: dict[str, float], batch_size: int,
                 iterations: int, seed: int, first: dict[str, float] | None = None,
                 first_iterations: int = 0):
        self.names, self.sizes, self.batch_size = list(sizes), sizes, batch_size
        self.iterations, self.seed = iterations, seed
        if empty := [name for name in self.names if not sizes[name]]:
            raise InputError(f"{empty[0]} has no training samples; leave it out of --tasks")
        self.choices = self.draw(probabilities, iterations, 0)
        if first:  # the run begins with other probabilities (ours)
            self.choices[:first_iterations] = self.draw(first, first_iterations, 3)
        # (iterations, tasks): how often each was drawn so far, this iteration included.
        self.drawn = np.cumsum(self.choices[:, None] == np.arange(len(sizes)), 0, np.int32)

    def draw(self, probabilities: dict[str, float], iterations: int, stream: int) -> np.ndarray:
        """(iterations,) numbers of tasks, one draw each: a longer run begins as a shorter one."""
        weights = np.array([probabilities.get(name, 0.0) for name in self.names])
        rng = np.random.default_rng([self.seed, stream])
        return rng.choice(len(weights), iterations, p=weights / weights.sum())

    def task(self, iteration: int) -> str:
        return self.names[self.choices[iteration]]

    def samples(self, iteration: int) -> np.ndarray:
        """(batch_size,) int64 indices into the task's data set."""
        name, drawn = self.task(iteration), int(self.drawn[iteration, self.choices[iteration]])
        first, size = (drawn - 1) * self.batch_size, self.sizes[name]
        return np.array([self.shuffle(name, place // size)[place % size]
                         for place in range(first, first + self.batch_size)])

    @functools.lru_cache(16)  # two epochs of eight tasks, as a batch may reach into the next
    def shuffle(self, name: str, epoch: int) -> np.ndarray:
        """The order of one epoch; keyed by name, so that a run's other tasks don't matter."""
        rng = np.random.default_rng([self.seed, 1, zlib.crc32(name.encode()), epoch])
        return rng.permutation(self.sizes[name])


# A run ends when this many pictures were unusable, if that is more than 1 in 100 of those met. It
# is also how many replacements are tried for one of them.
FEWEST_UNUSABLE = 10


def too_many_unusable(task: str, reasons: list[str], met: int, data: Path | str) -> InputError:
    return InputError(f"{task}: {len(reasons)} pictures of {met} samples cannot be used: "
                      f"{'; '.join(reasons[:3])}; `python data.py --data {data} --check --tasks "
                      f"{task}` lists all")


def make_batch(dataset: Dataset, indices: list, seeds: list) -> tuple[Batch | None, dict[int, str]]:
    """The batch of these samples, and {index: why its picture cannot be used}. In training each has
    a seed; None: in evaluation, where such samples are left out (the batch is None if all are)."""
    samples, reasons = [], {}
    for index, seed in zip(indices, seeds):
        rng = None if seed is None else np.random.default_rng(seed)
        if sample := usable_sample(dataset, index, rng, reasons):
            samples.append(sample)
    return collate(dataset.task, samples) if samples else None, reasons


def usable_sample(dataset: Dataset, index: int, rng, reasons: dict[int, str]) -> Sample | None:
    """The sample, or in training (with `rng`) one drawn at random if its picture is unusable."""
    for _ in range(1 + FEWEST_UNUSABLE):
        try:
            return dataset.sample(index, rng)
        except UnusablePicture as error:
            reasons[index] = str(error)
        if rng is None:
            return None
        index = int(rng.integers(len(dataset)))
    found = [*reasons.values()]
    raise too_many_unusable(dataset.task.name, found, len(found), dataset.data)


# Signals that end a run after the iteration in hand: Ctrl-C, a cluster, a closed terminal, a
# cluster's warning. (Windows lacks two.)
STOPPING = [x for x in signal.Signals if x.name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")]


def start_worker(datasets: dict[str, Dataset]) -> None:
    """Signals may go to all processes, but the parent needs its workers for the iteration in hand.
    Workers without a parent end by themselves."""
    global worker_datasets
    worker_datasets = datasets
    torch.set_num_threads(1)
    for stop in STOPPING:
        signal.signal(stop, signal.SIG_IGN)
    # PyTorch would send each tensor through shared memory, which runs out, as do open files.
    ForkingPickler.register(Tensor, lambda tensor: (torch.from_numpy, (tensor.numpy(),)))

    def end_with_parent():
        multiprocessing.parent_process().join()
        os._exit(1)
    threading.Thread(target=end_with_parent, daemon=True).start()


def make_in_worker(name: str, indices: list, seeds: list):
    return make_batch(worker_datasets[name], indices, seeds)


def run_loader(datasets: dict[str, Dataset], requests, num_workers: int):
    """Yields the result of `make_batch` for each request (task, indices, seeds), in order;
    `num_workers` processes read ahead. It is an InputError if these fail."""
    if not num_workers:
        for name, indices, seeds in requests:
            yield make_batch(datasets[name], indices, seeds)
        return
    # Fork shares the annotations with the workers; elsewhere each gets a copy.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else None)
    pool = ProcessPoolExecutor(num_workers, context, start_worker, [datasets])
    submitted = (pool.submit(make_in_worker, *request) for request in requests)
    try:
        waiting = deque(islice(submitted, 4 * num_workers))
        while waiting:
            result = waiting.popleft().result()
            waiting.extend(islice(submitted, 1))
            yield result
    except (BrokenProcessPool, OSError) as error:
        for worker in list(pool._processes.values()):  # there is no public name
            worker.kill()  # they ignore the SIGTERM that the pool sends them
        raise InputError(f"the data workers failed ({error}); fewer --num_workers (0: none), more "
                         "memory or more open files (ulimit -n) help") from None
    finally:
        pool.shutdown(cancel_futures=True)


def train_loader(datasets: dict[str, Dataset], schedule: Schedule, start: int = 0, rank: int = 0,
                 world_size: int = 1, micro_batch: int = 0, num_workers: int = 0):
    """Yields for each iteration from `start` on this process's micro-batches, and the reasons why
    pictures were replaced. `micro_batch` 0: one picture, as in the paper, or all texts."""
    each = schedule.batch_size // world_size  # without a remainder: train.check

    def requests():
        for iteration in range(start, schedule.iterations):
            name, samples = schedule.task(iteration), schedule.samples(iteration).tolist()
            size = micro_batch or (1 if datasets[name].task.image else each)
            end = (rank + 1) * each
            for first in range(rank * each, end, size):
                # Seeds from places in the whole batch: the same for any worker and rank.
                places = range(first, min(first + size, end))
                seeds = [[schedule.seed, 2, iteration, place] for place in places]
                yield name, samples[places.start:places.stop], seeds
    batches, reasons = [], []
    for batch, why in run_loader(datasets, requests(), num_workers):
        batches.append(batch)
        reasons += why.values()
        if sum(map(len, batches)) == each:
            yield batches, reasons
            batches, reasons = [], []


def eval_loader(dataset: Dataset, indices, micro_batch: int = 0, num_workers: int = 0, report=True):
    """For every `micro_batch` of `indices` in order (0: one picture, or 32 texts) yields a Batch of
    those that can be used (None if none can) and {index: why its picture cannot be used}. `report`:
    prints every ten seconds how many are done and how long the rest will take."""
    name, size = dataset.task.name, micro_batch or (1 if dataset.task.image else 32)
    indices = [int(index) for index in indices]
    total, done = len(indices), 0
    parts = [indices[first:first + size] for first in range(0, total, size)]
    requests = ((name, part, [None] * len(part)) for part in parts)
    start = shown = time.time()
    for batch, reasons in run_loader({name: dataset}, requests, num_workers):
        yield batch, reasons
        done += len(batch or ()) + len(reasons)
        if report and time.time() - shown > 10:
            shown = time.time()
            left = timedelta(seconds=round((shown - start) * (total / done - 1)))
            print(f"  {name}: {done:,} of {total:,}, ETA {left}", flush=True)


# ---- What official files need --------------------------------------------------------------------
def coco_val_ids(data: Path) -> set[int]:
    """COCO val2017's images: in no training set, evaluated on by VG and VQAv2 (Section 4.1)."""
    path = data / COCO_VAL
    return set(read_records(read_json(path), "images", path, lambda row: field(row, "id", int)))


def read_classes(path: Path) -> tuple[list[dict], dict[str, int]]:
    """A class per line, ids from 1, commas between aliases -> rows for the JSON, {alias: id}."""
    rows, ids = [], {}
    for number, line in enumerate(read_lines(path), 1):
        aliases = [name.strip() for name in line.split(",")]
        rows.append({"id": number, "name": aliases[0]})
        ids.update({alias.lower(): number for alias in aliases})
    return rows, ids


def prepare_vg(data: Path) -> tuple[dict[str, dict], Counter]:
    """Raw Visual Genome -> {"train": content, "val": content} in COCO's style, what was dropped.

    Pictures in COCO val2017 (by `coco_id` in image_data.json; half are COCO's) go to val."""
    objects, object_ids = read_classes(data / "vg/objects_vocab.txt")
    attributes, attribute_ids = read_classes(data / "vg/attributes_vocab.txt")
    held_out, dropped, images = coco_val_ids(data), Counter(), {}
    splits = {split: {"categories": objects, "attributes": attributes, "images": [],
                      "annotations": []} for split in ("train", "val")}

    def add_image(row):
        split = splits["val" if row["coco_id"] in held_out else "train"]
        name = "/".join(row["url"].split("/")[-2:])  # the address has VG_100K or VG_100K_2
        split["images"].append({"id": row["image_id"], "file_name": name,
                                "width": row["width"], "height": row["height"]})
        images[row["image_id"]] = row["width"], row["height"], split["annotations"]

    def read_objects(row):
        if row["image_id"] not in images:
            dropped["rows of unknown images"] += 1
            return
        *size, annotations = images[row["image_id"]]
        for thing in row["attributes"]:
            if found := convert_object(thing, *size, object_ids, attribute_ids, dropped):
                annotations.append({"id": len(annotations) + 1, "image_id": row["image_id"],
                                    **found})

    for name, read in (("image_data.json", add_image), ("attributes.json", read_objects)):
        read_records(read_json(data / "vg" / name), "records", data / "vg" / name, read)
    if splits["train"]["images"] and not splits["train"]["annotations"]:
        raise bad(data / "vg/objects_vocab.txt", f"no box is left to train on ({counted(dropped)})",
                  "take the vocabulary that fits these objects")
    return splits, dropped


def convert_object(thing: dict, width: int, height: int, object_ids: dict, attribute_ids: dict,
                   dropped: Counter) -> dict | None:
    """One object of attributes.json as a COCO-style annotation; None (counted) if not usable."""
    names = [name.lower().strip() for name in thing["names"]]
    label = next((object_ids[name] for name in names if name in object_ids), None)
    x, y = max(thing["x"], 0), max(thing["y"], 0)  # 1 in 200 overshoots by a pixel or two
    w, h = min(thing["x"] + thing["w"], width) - x, min(thing["y"] + thing["h"], height) - y
    if label is None or w <= 0 or h <= 0:
        dropped["objects outside the vocabulary" if label is None else "empty boxes"] += 1
        return None
    words = [word.lower().strip() for word in thing.get("attributes", ())]
    known = list(dict.fromkeys(attribute_ids[word] for word in words if word in attribute_ids))
    dropped["attributes outside the vocabulary"] += sum(word not in attribute_ids for word in words)
    dropped["attributes beyond 16 an object"] += len(known[MAX_ATTRIBUTES:])
    return {"category_id": label, "bbox": [x, y, w, h], "area": w * h, "iscrowd": 0,
            "attribute_ids": known[:MAX_ATTRIBUTES]}


# The official VQA scorer's contractions: each of these words with any one apostrophe left out
# becomes the word. One entry of its table is odd, and kept: a score must be the official one.
CONTRACTIONS = {
    word[:i] + word[i + 1:]: word for word in """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
    haven't he'd he'd've he's how'd how'll how's I'd've I'm I've isn't it'd it'd've it'll ma'am
    mightn't mightn't've might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't
    she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd
    someone'd've someone'll someone's something'd something'd've something'll that's there'd
    there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've
    weren't we've what'll what're what's what've when's where'd where's where've who'd who'd've
    who'll who's who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll
    y'all'd've you'd you'd've you'll you're you've
    """.split() for i, letter in enumerate(word) if letter == "'"}
CONTRACTIONS |= {"somebody'd": "somebodyd"}
NUMBERS = {"none": "0"} | {word: str(number) for number, word in enumerate(
    "zero one two three four five six seven eight nine ten".split())}
PUNCTUATION = set(';/[]"{}()=+\\_-><@`,?!')  # twenty-one marks; no colon


def normalise_answer(text: str) -> str:
    """The official VQA scorer's processing of an answer, slips included. A mark is removed if it
    stands beside a space anywhere in the text, or if the text has a comma between digits
    ("1,000"); otherwise it becomes a space ("t-shirt" -> "t shirt")."""
    text = text.replace("\n", " ").replace("\t", " ").strip()
    result, thousands = text, re.search(r"[0-9],[0-9]", text)
    for mark in PUNCTUATION.intersection(text):
        removed = thousands or f"{mark} " in text or f" {mark}" in text
        result = result.replace(mark, "" if removed else " ")
    # Full stops except decimal points. 32: the scorer passes re.UNICODE where `count` belongs.
    result = re.sub(r"\.(?![0-9])", "", result, count=32)
    words = [NUMBERS.get(x, x) for x in result.lower().split() if x not in ("a", "an", "the")]
    return " ".join(CONTRACTIONS.get(word, word) for word in words)


# ---- Files, flat arrays, checks ------------------------------------------------------------------
# A forked worker shares memory with its parent until one of them writes to a page, and merely
# reading a Python object writes to one (its reference count). So only NumPy arrays remain.

def strings(texts) -> np.ndarray:
    """(n,) in NumPy's own string type: UTF-8 bytes in one buffer rather than an object for each."""
    texts = [str(x).encode("utf-8", "replace").decode() for x in texts]  # JSON's half characters: ?
    return np.array(texts, np.dtypes.StringDType())


LAYOUT = "the README says where each file belongs"


def bad(path, problem: str, fix: str = "mend or remove the record") -> InputError:
    return InputError(f"{path}: {problem}; {fix}")


def require_folder(data: Path) -> None:
    if not data.is_dir():
        raise bad(data, "no such folder", "name the data sets' folder with --data (layout: README)")


def parse_file(path: Path, parse, kind: str):
    """parse(the file's bytes); `kind` is what the error calls their format."""
    try:
        return parse(path.read_bytes())
    except OSError as error:
        raise bad(path, error.strerror, LAYOUT) from None
    except (ValueError, RecursionError) as error:
        problem = what_is_wrong(path, f"not valid {kind} ({error})")
        raise bad(path, problem, "cut short? unpack it again, or save it as UTF-8") from None


def read_json(path: Path, hook=None):
    """The file's content, each object in it replaced by hook(object) as soon as it is parsed."""
    # From bytes, not text: a byte order mark is understood.
    return parse_file(path, functools.partial(json.loads, object_hook=hook), "JSON")


def read_lines(path: Path) -> list[str]:
    """Lines without their ends (LF or CRLF), a byte order mark, or empty lines at the end."""
    text = parse_file(path, lambda raw: raw.decode("utf-8-sig"), "UTF-8").rstrip("\r\n")
    # str.splitlines would also split at U+2028 and others, which occur inside sentences.
    return [line.removesuffix("\r") for line in text.split("\n")] if text else []


def read_records(content, key: str, path: Path, read) -> list:
    """read(record) for each record of the list content[key], or of `content` if it is the list. If
    `read` cannot use a record (a KeyError, ValueError, ...), the error names file and record."""
    rows = content.get(key) if isinstance(content, dict) else content
    if not isinstance(rows, list):
        raise bad(path, f"no list {key!r} in it", "take the official file")
    results = []
    try:
        for row in rows:
            results.append(read(row))
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
        problem = f"lacks {error}" if isinstance(error, KeyError) else str(error)
        raise bad(path, f"record {len(results)}: {problem} ({row!r:.120})") from None
    return results


KINDS = {int: "one whole number of at most 64 bits", float: "one finite number", str: "a text",
         list: "a list"}


def field(row: dict, key: str, kind: type, default=None):
    """row[key] as one of KINDS. null counts as absent; then it is `default`, if there is one."""
    value = row.get(key)
    if value is None:
        value = default
    try:
        result = kind(value)
        if result == value and (kind in (str, list) or abs(result) < 2 ** 63):
            return result
    except (OverflowError, TypeError, ValueError):
        pass
    raise ValueError(f"{key!r} is not {KINDS[kind]}")


def counted(reasons: Counter) -> str:
    return ", ".join(f"{count:,} {reason}" for reason, count in reasons.items() if count)


@contextlib.contextmanager
def whole_file(path: Path, mode: str = "w"):
    """A file to write to that gets its name once it is complete: a crash leaves no half of one."""
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except (OSError, RuntimeError) as error:  # torch's zip writer turns a full disk into the latter
        with contextlib.suppress(OSError):
            part.unlink()
        raise InputError(f"{path} could not be written ({error}); is the disk full? What was there "
                         "is intact: make room, repeat (a training: with --resume)") from error


PICTURE = re.compile(r"(\d+)\.(?:jpe?g|png)$", re.IGNORECASE)  # a number, then the ending


def list_files(root: Path, folders) -> list[str]:
    """"folder/name" of all files in these folders of `root`, without the names that begin with a
    dot: `._1.jpg`, which a Mac's zip has beside 1.jpg, is no picture."""
    paths = []
    for folder in folders:
        # One listing, as a stat of each picture takes minutes.
        with contextlib.suppress(OSError, ValueError):  # not there, or no name of a folder
            names = sorted(os.listdir(root / folder))
            paths += [os.path.join(folder, name) for name in names if not name.startswith(".")]
    return paths


def pictures_by_id(root: Path, *folders: str) -> dict[int, str]:
    """{number at the end of the name: "folder/name"}; the first folder that has a number counts."""
    matches = [(path, PICTURE.search(path)) for path in reversed(list_files(root, folders))]
    return {int(match[1]): path for path, match in matches if match}


def find_pictures(dataset: Dataset, names: list[str]) -> tuple[list[str], np.ndarray]:
    """-> names of those in `dataset.folder`, as on the disk; (n,) bool: which. An error if none is.
    Without a file of its name a record gets one of its `spelling` that no other record names."""
    folder, wanted, folders = dataset.folder, {*names}, set()
    for name in wanted:
        *parents, _ = re.split(r"[/\\]", name)
        if os.path.isabs(name) or ".." in parents or re.match("[A-Za-z]:", name):
            raise bad(dataset.path, f"the picture name {name!r} leads out of {folder}")
        folders |= {"/".join(parents), unicodedata.normalize("NFD", "/".join(parents))}
    listed = dict.fromkeys(list_files(folder, sorted(folders)))
    similar = {spelling(name): name for name in reversed(listed) if name not in wanted}
    found = [name if name in listed else similar.get(spelling(name)) for name in names]
    odd = {name for name, there in zip(names, found)
           if there not in (name, None) or not name.endswith((".jpg", ".jpeg", ".png"))}
    if odd:
        dataset.notes.append(f"{len(odd):,} pictures have unusual names, or other accents, "
                             f"endings or \\ in the annotations (as {min(odd)!r})")
    present = np.array([name is not None for name in found], bool)
    dataset.missing = int((~present).sum())
    if dataset.missing:
        first = repr(names[np.argmin(present)])[1:-1]  # escaped for printing
        if dataset.missing == len(names):
            raise bad(dataset.path, f"none of its pictures is under {folder} (the first: {first})",
                      "unpack the pictures there")
        dataset.skipped[f"without picture (the first: {first})"] = dataset.missing
    return list(compress(found, present)), present


def spelling(name: str) -> str:
    """The same for two names of one picture: Windows has backslashes in paths, a Mac writes
    accents in two characters, and tools write JPG for jpg, or convert to png."""
    path = unicodedata.normalize("NFC", name.replace("\\", "/")).lower()
    return re.sub(r"\.(jpe?g|png)$", "", path)


# ---- Command line --------------------------------------------------------------------------------
def splits(data: Path, names: list[str]):
    """For each split of these tasks (no names: all that have files), prints its summary and yields
    the Dataset, or prints which files are missing."""
    for task in tasks_named(names) or TASKS:
        if not names and not (data / task.dataset.files["train"][0]).parent.exists():
            print(f"{task.name:<9} nothing is there")
            continue
        for split in task.dataset.files:
            try:  # small and without words: --check opens the pictures, no more
                dataset = task.dataset(task, data, split, Tokenizer(SPECIAL), image_size=32)
            except InputError as error:
                print(f"{task.name:<9} {split:6}        - {error}")
            else:
                print(dataset.summary, flush=True)
                yield dataset


def check_pictures(datasets) -> int:
    """--check: opens every picture once, on all cores -> how many cannot be used."""
    opened, problems = set(), []
    for dataset in datasets:
        if dataset.task.image:
            paths = enumerate(f"{dataset.folder}/{name}" for name in dataset.names)
            new = {path: index for index, path in paths if path not in opened}
            opened |= new.keys()
            for _, reasons in eval_loader(dataset, new.values(), 1, os.cpu_count()):
                problems += reasons.values()
    print(*problems, f"{len(opened):,} pictures opened, {len(problems):,} cannot be used", sep="\n")
    return len(problems)


def write_vg(data: Path) -> None:
    """--prepare vg: the files of `prepare_vg`, and what was dropped."""
    contents, dropped = prepare_vg(data)
    for split, content in contents.items():
        path = data / VisualGenome.files[split][0]
        with whole_file(path) as file:
            file.write(json.dumps(content))
        print(f"{path}: {len(content['images']):,} pictures, {len(content['annotations']):,} boxes")
    print(f"dropped: {counted(dropped)}")


def write_vocabulary(data: Path) -> None:
    """--prepare vocab: word pieces of the training texts that are there, as bert/vocab.txt."""
    from tokenizers import BertWordPieceTokenizer
    path, texts, names = data / "bert/vocab.txt", [], []
    if path.exists():
        raise bad(path, "is there already", "remove it if another should be made")
    for task in TASKS:
        if task.text and all((data / x).exists() for x in task.dataset.needed(data, "train")):
            names.append(task.name)
            texts += chain(*task.dataset(task, data, "train").columns)
    if not texts:
        raise bad(data, "no training texts are in it", f"{LAYOUT}; own tasks need --tasks_from")
    wordpiece, letters = BertWordPieceTokenizer(lowercase=True), Counter()
    for text in texts:
        letters.update(wordpiece.normalize(str(text)))
    # The library numbers inner letters at random, and numbers break ties: given first, they do not.
    inner = [f"##{letter}" for letter, _ in letters.most_common(1000) if not letter.isspace()]
    wordpiece.train_from_iterator(map(str, texts), vocab_size=8000, show_progress=False,
                                  special_tokens=SPECIAL + inner)  # 8,000 pieces: ours
    pieces = wordpiece.get_vocab()
    with whole_file(path) as file:
        file.writelines(f"{piece}\n" for piece in SPECIAL + sorted(pieces.keys() - SPECIAL))
    print(f"{path}: {len(pieces):,} word pieces from {len(texts):,} texts of {', '.join(names)}")


class Parser(argparse.ArgumentParser):
    """The command line of the three programs."""

    def __init__(self, **settings):
        super().__init__(allow_abbrev=False, **settings)
        self.add_argument("--tasks_from", type=Path, metavar="FILE", help=(
            "a Python file of yours that adds its tasks to data.TASKS; it is run"))

    def error(self, message):  # in one line, by `command_line`
        raise InputError(f"{message} (see --help)")


def import_tasks(path: Path) -> None:
    """Imports it as a module of its own name: data workers that do not fork find it again."""
    if not path.is_file():
        raise bad(path, "no such file", "check --tasks_from")
    sys.path.insert(0, str(path.resolve().parent))
    found = getattr(importlib.import_module(path.stem), "__file__", "Python itself")
    if found != str(path.resolve()):
        raise bad(path, f"a module of this name is in {found}", "rename the file")


def command_line(parser: Parser, run, argv: list[str] | None) -> None:
    """Runs a program (this one, eval.py, train.py): a user's mistake is one line, exit status 2."""
    try:
        for stream in (sys.stdout, sys.stderr):
            # Letters that the console lacks are printed as "?". (Tests replace the streams.)
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="replace")
        args = parser.parse_args(argv)
        if args.tasks_from:
            import_tasks(args.tasks_from)
        run(args)
        sys.stdout.flush()
    except InputError as error:
        parser.exit(2, f"error: {error}\n")
    except BrokenPipeError:  # nobody reads on, as after `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        parser.exit(1)
    if torch.distributed.is_initialized():  # not after an error: it waits for the other processes
        torch.distributed.destroy_process_group()


def run(args: argparse.Namespace) -> None:
    data, names = Path(args.data), args.tasks.split(",") if args.tasks else []
    require_folder(data)
    if args.prepare == "vg":
        write_vg(data)
    elif args.prepare == "vocab":
        write_vocabulary(data)
    elif args.check:
        sys.exit(1 if check_pictures(splits(data, names)) else 0)
    else:
        for _ in splits(data, names):  # prints them
            pass


def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=(
        "Lists the data sets in a folder (layout: README), and which files are missing."))
    parser.add_argument("--data", type=os.path.expanduser, default="data", metavar="DIR",
                        help="the folder of the data sets (default: data)")
    parser.add_argument("--tasks", metavar="A,B", help="these alone (default: all that are there)")
    parser.add_argument("--check", action="store_true", help=(
        "open every picture once; exit status 1 if one cannot be used, 0 if all can"))
    parser.add_argument("--prepare", choices=["vg", "vocab"], help=(
        "vg: raw Visual Genome to vg/instances_{train,val}.json, once; "
        "vocab: bert/vocab.txt from the training texts, where there is no BERT"))
    command_line(parser, run, argv)


# ---- The tiny data sets --------------------------------------------------------------------------
# The eight tasks in a size that a laptop learns in minutes (ours): pictures of 32 x 32 pixels with
# one to three coloured shapes, and sentences made of templates, in the official files' formats.
# * A label is a relation between two things (two sentences, a picture and a text, a word and its
#   scope), each about equally likely under every label: see tests/baselines.py.
# * Labels are balanced after duplicates are removed. Everything follows from the seed.
# * Held-out splits share no picture with training and, in the four text tasks, no sentence: each is
#   about a name of two words, and a hash keeps one such name in five out of training.

SIDE = 32                                            # pixels
SHAPES = ["circle", "square", "triangle"]
COLOURS = {"red": (225, 40, 40), "green": (40, 180, 60), "blue": (50, 80, 235),
           "white": (235, 235, 235)}  # yellow lies between red and green, and is harder
# COCO's categories name the colour too, or a model that begins with COCO learns to ignore it.
# The ids have gaps, as in the official file.
CATEGORIES = {thing: n + n // 4 for n, thing in enumerate(product(SHAPES, COLOURS), 1)}
# (training, held out): pictures of the first three; sentences or pairs of each of GLUE's four.
TINY_SIZES = {"coco": (2400, 240), "vg": (1600, 240), "snli_ve": (3600, 400), "glue": (4000, 400)}
TINY_TEST = 20                                       # rows of each test file; GLUE's have no labels


def pick(rng, choices):
    return choices[rng.integers(len(choices))]


def another(rng, choices, than):
    return pick(rng, [x for x in choices if x != than])


def outline(shape: str, size: int) -> np.ndarray:
    """(size, size) bool: the pixels of its box that a shape covers. It touches all four sides."""
    y, x = (np.mgrid[:size, :size] + 0.5) / size * 2 - 1  # centres of pixels, in -1..1
    return {"circle": x * x + y * y <= 1, "square": np.ones((size, size), bool),
            "triangle": np.abs(x) <= (y + 1) / 2 + 1 / size}[shape]


def tiny_picture(rng: np.random.Generator, most: int, sides=(10, 15)):
    """-> pixels (32, 32, 3) uint8 with 1 to `most` (1 or 3) shapes; of each (shape, colour,
    [x, y, w, h]). The boxes do not overlap. A shape's side is one of range(*sides)."""
    number = int(rng.choice(most, p=[0.4, 0.4, 0.2] if most == 3 else [1])) + 1
    shapes = rng.choice(SHAPES, number).tolist()
    names = zip(shapes, rng.choice(list(COLOURS), number).tolist())
    pixels = rng.normal(rng.uniform(60, 120), 5, (SIDE, SIDE, 3))
    taken, things = np.zeros((SIDE, SIDE), bool), []
    while len(things) < number:
        size = int(rng.integers(*sides))
        x, y = rng.integers(0, SIDE - size + 1, 2).tolist()
        box = slice(y, y + size), slice(x, x + size)
        if not taken[box].any():
            shape, colour = next(names)
            taken[box] = True
            pixels[box][outline(shape, size)] = np.array(COLOURS[colour]) + rng.integers(-12, 13, 3)
            things.append((shape, colour, [x, y, size, size]))
        elif rng.random() < 0.02:  # perhaps there is no room left
            return tiny_picture(rng, most, sides)
    return pixels.clip(0, 255).astype(np.uint8), things


def write(path: Path, content) -> None:
    """Text, JSON, or pixels as JPEG, nearly without loss: the usual settings spoil flat shapes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, np.ndarray):
        Image.fromarray(content).save(path, quality=95, subsampling=0)
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content))


def write_tiny(folder: Path | str, seed: int = 0) -> None:
    """Writes the eight data sets and bert/vocab.txt into `folder`, as the archives unpack."""
    folder, rng = Path(folder), np.random.default_rng(seed)
    coco = {split: tiny_coco(folder, split, number, rng)
            for split, number in zip(("train", "val"), TINY_SIZES["coco"])}
    texts = tiny_vg(folder, coco["val"], rng) + tiny_vqa(folder, coco, rng)
    for split, number in zip(SnliVe.files, (*TINY_SIZES["snli_ve"], TINY_TEST)):
        texts += tiny_snli_ve(folder, split, number, rng)
    for reader in TINY_GLUE:
        texts += tiny_glue(folder, reader, rng)
    words = set()
    for text in texts:
        words.update(re.findall(r"\w+|[^\w\s]", text.lower()))
    write(folder / "bert/vocab.txt", "\n".join(SPECIAL + sorted(words)) + "\n")


def tiny_coco(folder: Path, split: str, number: int, rng) -> dict[int, tuple]:
    """instances_{split}2017.json and its pictures -> {image id: (pixels, things)}."""
    images, annotations, made = [], [], {}
    first = 1 if split == "train" else 500_001  # the ids of COCO's splits are disjoint
    for image in range(first, first + number):
        made[image] = pixels, things = tiny_picture(rng, most=3)
        images.append({"id": image, "file_name": f"{image:012}.jpg", "height": SIDE, "width": SIDE})
        write(folder / f"coco/{split}2017/{image:012}.jpg", pixels)
        for shape, colour, (x, y, w, h) in things:
            annotations.append({
                "id": len(annotations) + 1, "image_id": image,
                "category_id": CATEGORIES[shape, colour], "bbox": [x, y, w, h], "area": w * h,
                "iscrowd": 0, "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]]})
    categories = [{"supercategory": shape, "id": n, "name": f"{colour} {shape}"}
                  for (shape, colour), n in CATEGORIES.items()]
    write(folder / Coco.files[split][0], {
        "info": {"description": "tiny"}, "licenses": [], "images": images,
        "annotations": annotations, "categories": categories})
    return made


def tiny_vg(folder: Path, coco_val: dict, rng) -> list[str]:
    """Visual Genome's raw files -> its questions. Held out: val2017's pictures (Section 4.1)."""
    pictures = [(None, tiny_picture(rng, most=3)) for _ in range(TINY_SIZES["vg"][0])]
    pictures += list(coco_val.items())[:TINY_SIZES["vg"][1]]
    images, attributes, questions = [], [], []
    for n, (coco_id, (pixels, things)) in enumerate(pictures, 1):
        write(folder / f"vg/VG_100K/{n}.jpg", pixels)
        images.append({"image_id": n, "coco_id": coco_id, "flickr_id": None, "width": SIDE,
                       "height": SIDE,
                       "url": f"https://cs.stanford.edu/people/rak248/VG_100K/{n}.jpg"})
        attributes.append({"image_id": n, "attributes": [
            {"object_id": 10 * n + k, "x": x, "y": y, "w": w, "h": h, "synsets": [],
             "names": ["disc" if shape == "circle" and n % 2 else shape],  # an alias
             "attributes": [colour.capitalize() + " " if n % 5 == 0 else colour]}
            for k, (shape, colour, (x, y, w, h)) in enumerate(things)]})
        if n % 10 == 0:  # in the real file half of the objects have no attributes
            for row in attributes[-1]["attributes"]:
                del row["attributes"]
        question, answer = tiny_question(things, rng)
        questions.append({"id": n, "qas": [{"qa_id": n, "image_id": n, "question": question,
                                            "answer": f"{answer.capitalize()}."}]})
    write(folder / "vg/image_data.json", images)
    write(folder / "vg/attributes.json", attributes)
    write(folder / "vg/question_answers.json", questions)
    write(folder / "vg/objects_vocab.txt", "triangle\ncircle,disc\nsquare\n")
    write(folder / "vg/attributes_vocab.txt", "\n".join(COLOURS) + "\n")
    return [row["qas"][0]["question"] for row in questions]


def tiny_question(things: list, rng) -> tuple[str, str]:
    """A question about the picture with these things, and its answer. Yes or no takes one
    comparison with the picture ("one": is there such a shape?) or two (has the shape that colour?).
    """
    kind = rng.choice(["colour", "shape", "one", "two", "count"], p=[0.3, 0.32, 0.22, 0.1, 0.06])
    if kind == "count":
        text = pick(rng, ["how many shapes are there?", "how many things do you see?"])
        return text, str(len(things))
    answer = pick(rng, ["yes", "no"])
    if kind == "one":
        place, names, text = pick(rng, [(0, SHAPES, "is there a {}?")] +
                                  [(1, list(COLOURS), "is anything {}?")] * 2)  # learned later
        seen = {thing[place] for thing in things}
        missing = [name for name in names if name not in seen]
        if not missing:  # all three shapes: "yes" would be the only answer
            return tiny_question(things, rng)
        return text.format(pick(rng, sorted(seen) if answer == "yes" else missing)), answer
    # What is asked about must be unique: the only circle, the only red thing.
    keys = [thing[1 if kind == "shape" else 0] for thing in things]
    single = [thing for thing, key in zip(things, keys) if keys.count(key) == 1]
    if not single:
        return tiny_question(things, rng)
    shape, colour, _ = pick(rng, single)
    if kind == "colour":
        return pick(rng, [f"what color is the {shape}?", f"which color has the {shape}?"]), colour
    if kind == "shape":
        return pick(rng, [f"what shape is {colour}?", f"which shape is the {colour} thing?"]), shape
    if answer == "no":
        colour = another(rng, COLOURS, colour)
    return f"is the {shape} {colour}?", answer


def tiny_vqa(folder: Path, coco: dict, rng) -> list[str]:
    """VQAv2's questions and annotations on COCO's pictures, by 2014's split -> the questions.
    val2014 has all of val2017 and some of train2017; the latter are for training (Section 4.1)."""
    train, texts = list(coco["train"].items()), []
    some = len(train) // 10
    for split, pictures in (("train2014", train[some:]),
                            ("val2014", [*train[:some], *coco["val"].items()])):
        questions, annotations = [], []
        for image, (_, things) in pictures:
            asked = dict(tiny_question(things, rng) for _ in range(4))  # a repeated one counts once
            for number, (question, answer) in enumerate(asked.items(), image * 1000):
                questions.append({"question_id": number, "image_id": image, "question": question})
                ten = [{"answer_id": i, "answer": a, "answer_confidence": "yes"}
                       for i, a in enumerate([answer] * 9 + ["don't know"], 1)]
                annotations.append({
                    "question_id": number, "image_id": image, "question_type": "none of the above",
                    "answer_type": "other", "multiple_choice_answer": answer, "answers": ten})
        head = {"info": {}, "license": {}, "data_type": "mscoco", "data_subtype": split}
        write(folder / f"vqa2/v2_OpenEnded_mscoco_{split}_questions.json",
              {**head, "task_type": "Open-Ended", "questions": questions})
        write(folder / f"vqa2/v2_mscoco_{split}_annotations.json",
              {**head, "annotations": annotations})
        texts += [row["question"] for row in questions]
    return texts


def tiny_snli_ve(folder: Path, split: str, number: int, rng) -> list[str]:
    """A split of SNLI-VE and its pictures -> the statements.

    "The circle is red" is entailed by a red circle, contradicted by a circle of another colour, and
    neutral where there is no circle. Shapes and colours are as likely under one label as under
    another. There is one shape in a picture: only VQA asks which of several is meant."""
    first, lines = {"train": 10, "val": 20, "test": 30}[split], []
    for n in range(number):
        name, label = f"{first}{n:06}", SnliVe.class_names[n % 3]
        pixels, [(seen, shade, _)] = tiny_picture(rng, most=1, sides=(13, 17))
        write(folder / f"snli_ve/flickr30k_images/{name}.jpg", pixels)
        shape = another(rng, SHAPES, seen) if label == "neutral" else seen
        colour = another(rng, COLOURS, shade) if label == "contradiction" else shade
        text = pick(rng, [f"The {shape} is {colour}.", f"The color of the {shape} is {colour}."])
        lines.append({"Flickr30K_ID": name, "captionID": f"{name}.jpg#0",
                      "pairID": f"{name}.jpg#0r1{label[0]}", "annotator_labels": [label],
                      "gold_label": label, "sentence2": text, "sentence1": f"A {shade} {seen}."})
    write(folder / SnliVe.files[split][0], "".join(json.dumps(x) + "\n" for x in lines))
    return [line["sentence2"] for line in lines]


# Texts: lists of alternatives; {n} is the two-word name that a sentence is about.
FIRST = "anna tom kate bob lucy max emma paul nina fred rosa jack".split()
LAST = "smith jones brown baker clark evans green hall king moore scott young".split()
TOPICS = [  # QNLI: questions, sentences that answer them, values {v} in those
    (["where does {n} live?", "in which city is {n}?"],
     ["{n} lives in {v}.", "the home of {n} is in {v}."],
     "paris rome london berlin madrid vienna".split()),
    (["what does {n} eat?", "which food does {n} like?"],
     ["{n} always eats {v}.", "the lunch of {n} is {v}."],
     "rice bread soup fish cake fruit".split()),
    (["what is the job of {n}?", "how does {n} earn money?"],
     ["{n} works as a {v}.", "the boss hired {n} as a {v}."],
     "doctor teacher pilot cook painter farmer".split()),
    (["which animal does {n} own?", "what pet does {n} have?"],
     ["{n} has a {v}.", "a {v} belongs to {n}."],
     "dog cat horse rabbit parrot goat".split()),
    (["when was {n} born?", "in which month is the birthday of {n}?"],
     ["{n} was born in {v}.", "{n} turns thirty in {v}."],
     "january march april june august october".split())]
FACTS = [  # MNLI: two kinds of facts, three of each kind: premises, hypotheses
    [(["{n} stands next to the oven.", "{n} washes the dishes."], "{n} is in the kitchen."),
     (["{n} sits under a tree.", "{n} waters the flowers."], "{n} is in the garden."),
     (["{n} lies on the bed.", "{n} takes a nap under the blanket."], "{n} is in the bedroom.")],
    [(["{n} works as a nurse.", "{n} cares for the sick."],
      "the job of {n} is at a hospital."),
     (["{n} works as a teacher.", "{n} gives lessons to children."],
      "the job of {n} is at a school."),
     (["{n} works as a farmer.", "{n} grows corn and milks cows."],
      "the job of {n} is on a farm.")]]
DISH = "fresh hot cold sweet spicy cheap creamy green".split(), \
       "rice bread soup fish cake tea pasta salad curry pie stew toast".split()
INTENTS = [  # QQP: questions of one row mean the same
    ["how do i cook {n}?", "what is the way to prepare {n}?", "can you teach me to make {n}?"],
    ["where can i buy {n}?", "which shop sells {n}?", "who has {n} for sale?"],
    ["is {n} healthy?", "does {n} do me good?", "are there vitamins in {n}?"],
    ["what is the price of {n}?", "how much money is {n}?", "is {n} expensive?"],
    ["how long does {n} keep?", "when does {n} spoil?", "after how many days is {n} stale?"]]
SCENE = "opening final first second main whole french new".split(), \
        "film plot scene script cast ending music dialogue act story role song".split()
GOOD = "charming funny brilliant moving clever fresh gripping lovely".split()
BAD = "dull boring clumsy stale tedious silly lifeless dreadful".split()
# SST-2: {x} is what is meant, {o} its opposite. Most have both, or {o} alone, negated.
REVIEWS = [
    ["the {n} is {x}.", "the {n} seems {x}."], ["the {n} is {x}.", "a {x} {n}."],
    ["the {n} is not {o}.", "the {n} is far from {o}."],
    ["the {n} is not {o} but {x}.", "the {n} is {x} and not {o}."],
    ["far from {o}, the {n} is {x}.", "the {n} is {x} and far from {o}."]]


def tiny_qnli(label: int, n: str, rng) -> tuple:
    """Does the sentence answer the question?"""
    topic = pick(rng, TOPICS)
    told = topic if label == 0 else another(rng, TOPICS, topic)
    return pick(rng, topic[0]).format(n=n), pick(rng, told[1]).format(n=n, v=pick(rng, told[2]))


def tiny_mnli(label: int, n: str, rng) -> tuple:
    """Entailed: the same fact; contradicted: another of its kind; neutral: of the other kind."""
    kind = int(rng.integers(2))
    fact = pick(rng, FACTS[kind])
    claim = [fact, pick(rng, FACTS[1 - kind]), another(rng, FACTS[kind], fact)][label]
    return pick(rng, fact[0]).format(n=n), claim[1].format(n=n)


def tiny_qqp(label: int, n: str, rng) -> tuple:
    """Two questions that mean the same (in other words) or not."""
    first = pick(rng, INTENTS)
    second = first if label == 1 else another(rng, INTENTS, first)
    one = pick(rng, first)
    return one.format(n=n), another(rng, second, one).format(n=n)


def tiny_sst2(label: int, n: str, rng) -> tuple:
    x, o = pick(rng, GOOD), pick(rng, BAD)
    x, o = (x, o) if label else (o, x)
    return (pick(rng, pick(rng, REVIEWS)).format(n=n, x=x, o=o),)


# Names of columns in the official files.
MNLI = ("index promptID pairID genre sentence1_binary_parse sentence2_binary_parse "
        "sentence1_parse sentence2_parse sentence1 sentence2")
QNLI, QQP = "index question sentence", "question1 question2"
TINY_GLUE = {  # maker of texts, the two lists that {n} is made of, headers of the three files
    Qnli: (tiny_qnli, (FIRST, LAST), (f"{QNLI} label", f"{QNLI} label", QNLI)),
    Mnli: (tiny_mnli, (FIRST, LAST), (
        f"{MNLI} label1 gold_label",
        f"{MNLI} label1 label2 label3 label4 label5 gold_label", MNLI)),
    Qqp: (tiny_qqp, DISH, (*[f"id qid1 qid2 {QQP} is_duplicate"] * 2, f"id {QQP}")),
    Sst2: (tiny_sst2, SCENE, ("sentence label", "sentence label", "index sentence"))}


def tiny_glue(folder: Path, reader: type[Glue], rng) -> list[str]:
    """A task's train, dev and test files -> all its sentences."""
    make, words, headers = TINY_GLUE[reader]
    names = [f"{a} {b}" for a, b in product(*words)]
    held_out = sorted(name for name in names if zlib.crc32(name.encode()) % 5 == 0)
    texts = []
    for split, number, header in zip(reader.files, (*TINY_SIZES["glue"], TINY_TEST), headers):
        about = [x for x in names if x not in held_out] if split == "train" else held_out
        rows = {}  # texts -> label; a dictionary drops duplicates
        while len(rows) < number:
            label = len(rows) % len(reader.words)
            rows.setdefault(make(label, pick(rng, about), rng), label)
        lines = ["\t".join(header.split())]
        for n, (sentences, label) in enumerate(rows.items()):
            label = reader.words[label]
            fields = {"genre": "tiny"} | {f"label{k}": label for k in range(1, 6)}
            fields |= dict(zip(reader.fields, (*sentences, label)))
            cells = [fields.get(name, str(n)) for name in header.split()]
            lines.append("\t".join(cells))
            texts += sentences
        write(folder / reader.files[split][0], "\n".join(lines) + "\n")
    return texts


if __name__ == "__main__":
    import data  # the module that a file given to --tasks_from imports as well
    data.main()
