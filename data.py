"""UniT (Hu & Singh, 2021), Section 4: eight data sets, from their official files to a `unit.Batch`.

    files --Dataset--> flat arrays --sample(index, rng)--> Sample --collate--> Batch
    (seed, iteration) --Schedule--> task and indices --train_loader--> (iteration, Batch)

| section below                | what it holds                                                           |
|------------------------------|-------------------------------------------------------------------------|
| Files and flat arrays        | JSON, text and folders read with errors that name the fix; `Strings`    |
| Pictures                     | any picture to RGB; DETR's augmentation; the sizes of Section 3.5       |
| Texts                        | WordPiece; the normal form of answers, as VQA's official scorer has it  |
| Readers                      | one class a format; `TASKS`, the table of the eight; `PROBABILITIES`    |
| Batches and their order      | `collate`, `Schedule`, `train_loader`, `eval_loader`                    |
| Command line                 | `python data.py --data DIR` tells what is there and what is missing     |
| The tiny data sets           | the same official formats, small enough for a laptop                    |

A ninth data set is one more reader class and one more row of `TASKS`; no other line changes.

What happens to a record that cannot be used. It is skipped and counted (`Dataset.skipped`, printed in
the summary) where the real files have such records and the field skips them; else the run stops
with an `InputError` that names file, record and fix:

| skipped and counted                                     | stops the run                               |
|---------------------------------------------------------|---------------------------------------------|
| a picture that is not in its folder                     | none of a split's pictures is in its folder |
| an image id that occurs again (the first one counts)    | a file name that leaves the picture folder  |
| a box of no size once clipped; a box of an unknown image| a box that is not four finite numbers       |
| crowd boxes, in training (the metric ignores them)      | a category or attribute id out of range     |
| VG: objects without name or outside the vocabulary      | a row without one of the fields read here   |
| VQA: questions without (known) answers, in training     | JSON that is cut short; text not in UTF-8   |
| GLUE: rows with too few or too many columns; label "-"  | the same in a test split (the server wants  |
|                                                         | every row); a label that is not known       |
| SNLI-VE: label "-"                                      | a picture that cannot be decoded            |
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import io
import json
import os
import re
import signal
import sys
import threading
import warnings
import zlib
from collections import Counter
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from unit import Batch, InputError, Task  # first: it makes `import torchvision` safe

from torchvision.transforms.v2 import functional as F

# Data workers fork; a tokenizer that has started threads of its own would warn and could lock up.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


# ------------------------------------------------------------------------------------------------
# Files and flat arrays
#
# A forked worker shares memory with its parent until one of them writes to a page, and reading a
# Python object writes to it (its reference count). Millions of small objects are thus copied, worker by
# worker, page by page. Arrays are not: whatever stays after loading is NumPy.

class Strings:
    """Many strings as one buffer of UTF-8 bytes and the places where each begins."""

    def __init__(self, texts):
        pieces = [text.encode("utf-8", "replace") for text in texts]  # lone surrogates become "?"
        self.starts = np.zeros(len(pieces) + 1, np.int64)
        np.cumsum([len(piece) for piece in pieces], out=self.starts[1:])
        self.buffer = np.frombuffer(b"".join(pieces), np.uint8)

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, index: int) -> str:
        start, end = self.starts[index], self.starts[index + 1]
        return self.buffer[start:end].tobytes().decode()


def read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; `python data.py --data DIR` lists what is "
                         "missing, the README where each file belongs") from None


def read_json(path: Path):
    """The file's content. No garbage collection meanwhile: it would walk all objects again and again."""
    raw, collecting = read_bytes(path), gc.isenabled()
    gc.disable()
    try:
        return json.loads(raw)  # from bytes: a byte order mark is understood
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not valid JSON ({error}); probably cut short: download or unpack "
                         "it again") from None
    finally:
        if collecting:
            gc.enable()


def read_lines(path: Path) -> list[str]:
    """Lines without their ends (\\n or \\r\\n), without a byte order mark, without empty last lines."""
    try:
        text = read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: byte {error.start} is not UTF-8; download it again or convert "
                         "it to UTF-8") from None
    # str.splitlines would also split at U+2028 and others, which occur inside sentences.
    return [line.removesuffix("\r") for line in text.rstrip("\r\n").split("\n")] if text else []


def columns(content, key: str, names: tuple, path: Path) -> list[list]:
    """Each named field of all rows of content[key]: the first row that lacks one is an error."""
    try:
        return [[row[name] for row in content[key]] for name in names]
    except (KeyError, TypeError, IndexError):
        pass  # slowly, to find the place
    if not isinstance(content, dict) or not isinstance(content.get(key), list):
        raise InputError(f"{path}: no list {key!r} in it; is it the official file?")
    for number, row in enumerate(content[key]):
        for name in names:
            if not isinstance(row, dict) or name not in row:
                raise InputError(f"{path}: {key}[{number}] has no field {name!r}; add it or remove the "
                                 "record")
    raise AssertionError("unreachable")


def array(values: list, dtype, path: Path, what: str, width: int | None = None) -> np.ndarray:
    """`values` as an array (n,) or (n, width): the first that is no number (or not finite) is an error."""
    def convert(value, shape):
        result = np.array(value, dtype).reshape(shape)
        if not np.isfinite(result).all():
            raise ValueError
        return result
    one = (width,) if width else ()
    try:
        return convert(values, (len(values), *one))
    except (ValueError, TypeError, OverflowError):
        pass
    for number, value in enumerate(values):
        try:
            convert(value, one)
        except (ValueError, TypeError, OverflowError):
            need = f"{width} finite numbers" if width else "a finite number"
            raise InputError(f"{path}: {what} of record {number} is {str(value)[:80]}, not {need}; "
                             "mend or remove the record") from None
    raise AssertionError("unreachable")


class Pictures:
    """Which pictures a folder holds: one listing of each sub-folder, where a stat each takes minutes."""

    def __init__(self, root: Path):
        self.root, self.listings = root, {}

    def listing(self, folder: str) -> set[str]:
        if folder not in self.listings:
            try:
                self.listings[folder] = set(os.listdir(self.root / folder))
            except OSError:
                self.listings[folder] = set()
        return self.listings[folder]

    def has(self, name: str, path: Path) -> bool:
        """Is `name`, which the annotation file `path` gives, there? Names that lead outside are refused."""
        if not isinstance(name, str) or os.path.isabs(name) or ".." in re.split(r"[/\\]", name):
            raise InputError(f"{path}: the picture name {name!r} leads out of {self.root}; mend or remove "
                             "the record")
        folder, _, base = name.rpartition("/")
        return base in self.listing(folder)

    def by_id(self, *folders: str) -> dict[int, str]:
        """{number at the end of the name: name}. Where folders share a number the first has precedence."""
        found = {}
        for folder in folders:
            for name in self.listing(folder):
                if match := re.search(r"(\d+)\.jpg$", name):
                    found.setdefault(int(match[1]), f"{folder}/{name}")
        return found


# ------------------------------------------------------------------------------------------------
# Pictures

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, as the backbone was trained
SHORTEST, LONGEST = 800, 1333                             # Section 3.5; the limit: released config
SCALES = tuple(range(480, 801, 32))                       # Section 3.5 "between 480 and 800"; steps: DETR
CROP_SCALES, CROP_SIDES = (400, 500, 600), (384, 600)     # DETR; sides: Section 3.5


def read_image(path: Path) -> Tensor:
    """(3, H, W) uint8 RGB, laid out as (H, W, 3): the layout on which torchvision resizes fastest.

    No `draft` (decoding at a reduced size): its pixels differ visibly from a full decode.
    """
    try:
        with warnings.catch_warnings(), Image.open(path) as picture:
            warnings.simplefilter("ignore")        # odd metadata, very large pictures: not our concern
            if picture.mode.startswith(("I", "F")):  # 16-bit grey: PIL would cut it off at 255
                grey = np.asarray(picture, np.float64) / (257 if picture.mode[0] == "I" else 1)
                picture = Image.fromarray(grey.clip(0, 255).round().astype(np.uint8))
            elif "transparency" in picture.info:   # of a palette entry: becomes alpha, which is dropped
                picture = picture.convert("RGBA")
            pixels = np.array(picture.convert("RGB"))
    except MemoryError:
        raise
    except Exception as error:                     # PIL raises many kinds for the many ways of being broken
        raise InputError(f"{path}: cannot be read as a picture ({error}); download it again or delete it "
                         "(pictures that are not there are skipped)") from None
    return torch.from_numpy(pixels).permute(2, 0, 1)


def fitted_size(height: int, width: int, shortest: int, longest: int, floor: bool) -> tuple[int, int]:
    """The size whose shorter side is `shortest`, unless the longer one would exceed `longest`.

    Whole-number arithmetic, so that 480 x (800 / 480) is 800. Detection rounds, vision-and-language takes
    the floor (released config). At least 1: a picture may be 10,000 wide and 1 high.
    """
    short, long = sorted((height, width))
    top, bottom = (shortest, short) if long * shortest <= longest * short else (longest, long)
    half = 0 if floor else bottom // 2
    return max(1, (height * top + half) // bottom), max(1, (width * top + half) // bottom)


def resize(image: Tensor, shortest: int, longest: int, floor: bool = False) -> Tensor:
    """(3, H, W) -> (3, H', W'), uint8, bilinear with antialiasing (within 1/255 of PIL's)."""
    size = fitted_size(*image.shape[1:], int(shortest), longest, floor)
    return image if size == tuple(image.shape[1:]) else F.resize(image, list(size), antialias=True)


def normalise(image: Tensor) -> Tensor:
    """(3, H, W) uint8 -> contiguous float with ImageNet's mean and deviation. In place after one
    allocation: fresh memory costs more here than the arithmetic."""
    result = torch.empty(image.shape)
    for channel, mean, std in zip(range(3), MEAN, STD):
        result[channel].copy_(image[channel]).sub_(255 * mean).mul_(1 / (255 * std))
    return result


def flip(image: Tensor, boxes: np.ndarray, rng: np.random.Generator) -> tuple[Tensor, np.ndarray]:
    """Left and right exchanged, half of the time."""
    if rng.random() < 0.5:
        image = image.flip(2)
        boxes = np.stack([1 - boxes[:, 2], boxes[:, 1], 1 - boxes[:, 0], boxes[:, 3]], 1)
    return image, boxes


def augment(image: Tensor, boxes: np.ndarray, rng: np.random.Generator) -> tuple[Tensor, np.ndarray]:
    """DETR's augmentation. image (3, H, W) uint8, boxes (n, 4) x0, y0, x1, y1 relative to the picture.

    Relative boxes don't notice a resize. The paper (Section 3.5) describes only the branch with the
    crop, "following DETR"; DETR, followed here, takes it half of the time (released config).
    """
    image, boxes = flip(image, boxes, rng)
    if rng.random() < 0.5:
        # 10,000 is far from any COCO picture; it keeps a 10,000 x 10 one from being made 400,000 wide.
        image = resize(image, rng.choice(CROP_SCALES), longest=10_000)
        sides = np.array(image.shape[1:])
        low, high = np.minimum(sides, CROP_SIDES[0]), np.minimum(sides, CROP_SIDES[1])
        h, w = rng.integers(low, high, endpoint=True)
        y, x = rng.integers(0, sides - (h, w), endpoint=True)
        scale = np.array([*sides[::-1], *sides[::-1]])
        boxes = ((boxes * scale - (x, y, x, y)) / (w, h, w, h)).clip(0, 1)
        image = image[:, y:y + h, x:x + w]
    return resize(image, rng.choice(SCALES), LONGEST), boxes


# ------------------------------------------------------------------------------------------------
# Texts

class Tokenizer:
    """BERT's WordPiece, lower case, without accents. `[CLS] first [SEP]` or `[CLS] first [SEP] second [SEP]`."""

    def __init__(self, vocab_file: Path):
        from tokenizers import BertWordPieceTokenizer
        words = {word: number for number, word in enumerate(read_vocabulary(vocab_file))}
        self.size = len(words)
        self.wordpiece = BertWordPieceTokenizer(words, lowercase=True)

    def encode(self, first: str, second: str | None = None, max_length: int = 128):
        """-> (ids, types), at most max_length each; a pair loses tokens of its longer text first, as in BERT."""
        self.wordpiece.enable_truncation(max_length, strategy="longest_first")
        encoding = self.wordpiece.encode(first, second)
        return encoding.ids, encoding.type_ids


def read_vocabulary(path: Path) -> list[str]:
    if not path.exists():
        raise InputError(f"{path}: missing; every task with text needs it: it is vocab.txt (231,508 bytes) of "
                         "google-bert/bert-base-uncased; put it there as bert/vocab.txt")
    words = read_lines(path)
    if lost := {"[PAD]", "[UNK]", "[CLS]", "[SEP]"} - set(words):
        raise InputError(f"{path}: no line {sorted(lost)[0]}; it is not BERT's vocabulary: take vocab.txt of "
                         "google-bert/bert-base-uncased")
    return words


# The official VQA scorer's contractions: each of these words, with any one apostrophe left out, becomes
# the word. Three entries of its table are odd, and kept: scores must be the official ones. (Entries
# with a capital never match, as the text is in lower case by then.)
CONTRACTIONS = {
    word[:i] + word[i + 1:]: word for word in """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't
    he'd he'd've he's how'd how'll how's I'd've I'm I've isn't it'd it'd've it'll ma'am mightn't mightn't've
    might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't
    shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll someone's something'd
    something'd've something'll that's there'd there'd've there're there's they'd they'd've they'll they're
    they've 'twas wasn't we'd've weren't we've what'll what're what's what've when's where'd where's where've
    who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll
    y'all'd've you'd you'd've you'll you're you've""".split() for i, c in enumerate(word) if c == "'"}
CONTRACTIONS |= {"let's": "let's", "she's": "she's", "somebody'd": "somebodyd"}
NUMBERS = {word: str(n) for n, word in
           enumerate("zero one two three four five six seven eight nine ten".split())} | {"none": "0"}
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!:'


def normalise_answer(text: str) -> str:
    """The official VQA scorer's processing of an answer, its slips included (scores are comparable only so).

    A mark is removed if it stands next to a space anywhere in the text, or if the text has a comma
    between digits ("1,000"); otherwise it becomes a space ("t-shirt" -> "t shirt").
    """
    text = text.replace("\n", " ").replace("\t", " ").strip()
    result, thousands = text, re.search(r"\d,\d", text)
    for mark in PUNCTUATION:
        glued = thousands or f"{mark} " in text or f" {mark}" in text
        result = result.replace(mark, "" if glued else " ")
    # Full stops, but for decimal points. 32: the scorer passes re.UNICODE where `count` belongs.
    result = re.sub(r"\.(?!\d)", "", result, count=32)
    words = [NUMBERS.get(word, word) for word in result.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ("a", "an", "the"))


# ------------------------------------------------------------------------------------------------
# Readers

@dataclass
class Sample:
    """One example, before batching. What a data set or split does not have is None."""

    id: int                           # image id, question id or row number
    image: Tensor | None = None       # (3, H, W) float, normalised
    size: tuple | None = None         # height, width of the original picture
    tokens: list | None = None        # S token ids
    types: list | None = None         # S times 0 (first text) or 1 (second)
    boxes: Tensor | None = None       # (n, 4) cx, cy, w, h in [0, 1]
    labels: Tensor | None = None      # (n,) int64
    attributes: Tensor | None = None  # (n, 16) int64, -1 pads
    scores: Tensor | None = None      # (C,) float


class Dataset:
    """What all readers have. `split` is "train", "val" or "test"; `data` the folder of all data sets."""

    files: dict[str, list[str]] = {}  # split -> the files it is read from, relative to `data`
    class_names: list[str] = []       # index = class id; "" for ids that are not used
    attribute_names: list[str] = []
    tokenizer: Tokenizer | None = None  # given by `load`

    def __init__(self, task: Task, data: Path, split: str, tiny: bool = False):
        if split not in self.files:
            raise InputError(f"{task.name} has no split {split!r}; it has {', '.join(self.files)}")
        self.data, self.split, self.tiny = Path(data), split, tiny
        # Tiny pictures hold at most a few shapes, and fewer queries learn faster (ours: tiny mode).
        queries = (8 if task.kind == "detection" else 4) if tiny else task.num_queries
        self.task = replace(task, num_queries=queries)
        self.skipped = Counter()      # reason -> how many
        self.notes = []               # what else the summary tells
        self.num_images = 0           # different pictures
        self.ids = np.zeros(0, np.int64)
        for file in self.needed(self.data, split):
            if not (self.data / file).exists():
                raise InputError(f"{self.data / file}: missing; {task.name} {split} is read from it (the README "
                                 "says where it belongs)")
        self.read()

    @classmethod
    def needed(cls, data: Path, split: str) -> list[str]:
        return cls.files[split]

    def read(self) -> None:
        """Fills the arrays."""
        raise NotImplementedError

    def sample(self, index: int, rng: np.random.Generator | None = None) -> Sample:
        """Sample `index`, augmented with draws from `rng`; None: as for evaluation."""
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def summary(self) -> str:
        counts = f"{self.task.name:8}{self.split:6}{len(self):>9,} samples"
        counts += f"{self.num_images:>9,} pictures" if self.task.image else " " * 18
        skipped = [f"{count:,} {reason}" for reason, count in self.skipped.items() if count]
        notes = (["skipped: " + ", ".join(skipped)] if skipped else []) + self.notes
        return "; ".join([counts, *notes] if len(self) else [counts, "no samples", *notes])

    def keep_present(self, pictures: Pictures, names: list[str], path: Path) -> list[bool]:
        """For each picture name, whether it is there. None at all is an error, some missing are counted."""
        present = [pictures.has(name, path) for name in names]
        self.check_present(present, names, pictures.root, path)
        return present

    def check_present(self, present: list[bool], names: list, root: Path, path: Path) -> None:
        if present and not any(present):
            raise InputError(f"{path}: none of its {len(names):,} pictures is under {root} (the first: {names[0]}); "
                             "unpack the pictures there")
        if absent := len(present) - sum(present):
            self.skipped[f"without picture (the first: {names[present.index(False)]})"] += absent


def clipped(boxes: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """boxes (n, 4) x, y, w, h in pixels, sizes (n, 2) or (2,) height, width -> x0, y0, x1, y1 relative to
    the picture, clipped to it."""
    scale = np.asarray(sizes)[..., [1, 0, 1, 0]]
    corners = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1)
    return (corners / scale).clip(0, 1)


def not_empty(boxes: np.ndarray) -> np.ndarray:
    """(n, 4) relative corners -> (n,) bool. A millionth of a side is the rounding of a box cut to nothing."""
    return ((boxes[:, 2:] - boxes[:, :2]) > 1e-6).all(1)


class Coco(Dataset):
    """COCO 2017 detection. Category ids are used as they are: 1..90 with ten gaps, hence 91 classes."""

    files = {"train": ["coco/annotations/instances_train2017.json"],
             "val": ["coco/annotations/instances_val2017.json"],
             "test": ["coco/annotations/image_info_test-dev2017.json"]}  # no boxes: for the test server
    folders = {"train": "coco/train2017", "val": "coco/val2017", "test": "coco/test2017"}

    def read(self) -> None:
        path = self.data / self.files[self.split][0]
        self.read_content(read_json(path), path)

    def read_content(self, content: dict, path: Path) -> None:
        """From the parsed JSON to arrays of images and of boxes, the boxes grouped by image."""
        self.read_categories(content, path)
        known_images = self.read_images(content, path)
        if self.split == "test":
            self.offsets = None
            return
        owners, labels, boxes = columns(content, "annotations", ("image_id", "category_id", "bbox"), path)
        labels = array(labels, np.int64, path, "category_id")
        boxes = array(boxes, np.float64, path, "bbox", 4)
        known = np.array([bool(0 < n < len(self.class_names) and self.class_names[n]) for n in labels], bool)
        if not known.all():
            number = int(np.argmin(known))
            raise InputError(f"{path}: annotations[{number}] has category_id {labels[number]}, which is not among "
                             f"its categories 1..{self.task.num_classes - 1}; mend or remove it")
        row_of = {image: row for row, image in enumerate(self.ids.tolist())}
        rows = np.array([row_of.get(owner, -1) for owner in owners], np.int64)
        self.skipped["boxes of an unknown image"] += len(owners) - sum(map(known_images.__contains__, owners))
        # A stable sort keeps the file's order within an image; those of absent images (-1) come first.
        order = np.argsort(rows, kind="stable")[np.count_nonzero(rows < 0):]
        self.offsets = np.searchsorted(rows[order], np.arange(len(self.ids) + 1))
        self.labels, self.boxes = labels[order].astype(np.int16), boxes[order]  # x, y, w, h as in the file
        annotations = content["annotations"]
        self.crowd = np.array([annotations[n].get("iscrowd", 0) for n in order], bool)
        self.areas = np.array([annotations[n].get("area", boxes[n, 2] * boxes[n, 3]) for n in order], float)
        self.attributes = self.read_attributes(annotations, order, path)
        full = not_empty(clipped(self.boxes, self.sizes[rows[order]]))
        self.usable = full & ~self.crowd                        # what is trained on
        self.skipped["empty boxes"] += int((~full).sum())
        self.skipped["crowd boxes"] += int((self.crowd & full).sum())

    def read_categories(self, content: dict, path: Path) -> None:
        ids, names = columns(content, "categories", ("id", "name"), path)
        ids = array(ids, np.int64, path, "category id").tolist()
        size = max(ids, default=0) + 1 if self.tiny else self.task.num_classes
        if ids and not 1 <= min(ids) <= max(ids) < size:
            raise InputError(f"{path}: category ids {min(ids)}..{max(ids)}, but {self.task.name} has 1..{size - 1}; "
                             "renumber them, or set num_classes in data.TASKS to the largest + 1")
        by_id = dict(zip(ids, names))
        self.class_names = [by_id.get(n, "") for n in range(size)]
        self.task = replace(self.task, num_classes=size)

    def read_images(self, content: dict, path: Path) -> set[int]:
        """-> all ids in the file, those whose picture is absent too."""
        ids, names, heights, widths = columns(content, "images", ("id", "file_name", "height", "width"), path)
        ids = array(ids, np.int64, path, "image id")
        sizes = array(list(zip(heights, widths)), np.int64, path, "height and width", 2)
        if (sizes < 1).any():
            number = int(np.argmin(sizes.min(1)))
            raise InputError(f"{path}: images[{number}] has height, width {sizes[number].tolist()}; mend or remove it")
        first = np.zeros(len(ids), bool)
        first[np.unique(ids, return_index=True)[1]] = True
        self.skipped["repeated image ids"] += int((~first).sum())
        self.folder = self.data / self.folders[self.split]
        present = self.keep_present(Pictures(self.folder), names, path)
        keep = first & np.array(present, bool)
        self.ids, self.sizes = ids[keep], sizes[keep]
        self.names = Strings([name for name, k in zip(names, keep) if k])
        self.num_images = len(self.ids)
        return set(ids.tolist())

    def read_attributes(self, annotations: list, order: np.ndarray, path: Path):
        return None

    def boxes_of(self, index: int):
        """What is trained on: relative corners (n, 4) float64, labels (n,), attributes (n, 16) or None."""
        rows = np.arange(self.offsets[index], self.offsets[index + 1])
        rows = rows[self.usable[rows]]
        attributes = None if self.attributes is None else self.attributes[rows]
        return clipped(self.boxes[rows], self.sizes[index]), self.labels[rows], attributes

    def sample(self, index: int, rng: np.random.Generator | None = None) -> Sample:
        image = read_image(self.folder / self.names[index])
        labelled = self.offsets is not None
        boxes, labels, attributes = self.boxes_of(index) if labelled else (np.zeros((0, 4)), None, None)
        if self.tiny:  # native size: nothing to gain from scaling 32 x 32 pictures (ours: tiny mode)
            image, boxes = (image, boxes) if rng is None else flip(image, boxes, rng)
        elif rng is not None:
            image, boxes = augment(image, boxes, rng)
        else:
            image = resize(image, SHORTEST, LONGEST)
        # The size is the annotation file's, in whose pixels the boxes are given.
        sample = Sample(int(self.ids[index]), normalise(image), tuple(self.sizes[index].tolist()))
        if labelled:
            keep = not_empty(boxes)  # a crop may have left nothing of a box
            low, high = boxes[keep, :2], boxes[keep, 2:]
            sample.boxes = torch.from_numpy(np.concatenate([(low + high) / 2, high - low], 1)).float()
            sample.labels = torch.from_numpy(labels[keep].astype(np.int64))
            if attributes is not None:
                sample.attributes = torch.from_numpy(attributes[keep].astype(np.int64))
        return sample

    def ground_truth(self):
        """A pycocotools COCO object of the official boxes, crowds and all, unchanged, but for polygons."""
        from pycocotools.coco import COCO
        owner = np.repeat(self.ids, np.diff(self.offsets)).tolist()
        rows = zip(owner, self.labels.tolist(), self.boxes.tolist(), self.areas.tolist(), self.crowd.tolist())
        truth = COCO()
        truth.dataset = {
            "info": {}, "images": [{"id": i} for i in self.ids.tolist()],
            "categories": [{"id": n, "name": name} for n, name in enumerate(self.class_names) if name],
            # Numbered from 1: pycocotools takes a match with id 0 for none at all.
            "annotations": [
                {"id": n, "image_id": image, "category_id": label, "bbox": box, "area": area, "iscrowd": int(crowd)}
                for n, (image, label, box, area, crowd) in enumerate(rows, 1)]}
        with contextlib.redirect_stdout(io.StringIO()):
            truth.createIndex()
        return truth


class VisualGenome(Coco):
    """Visual Genome's objects with attributes, from the COCO-style files that `prepare_vg` makes."""

    files = {"train": ["vg/instances_train.json"], "val": ["vg/instances_val.json"]}
    folders = {"train": "vg", "val": "vg"}  # a file_name is VG_100K/2.jpg or VG_100K_2/1.jpg
    raw = ["vg/image_data.json", "vg/attributes.json", "vg/objects_vocab.txt", "vg/attributes_vocab.txt",
           "coco/annotations/instances_val2017.json"]

    @classmethod
    def needed(cls, data: Path, split: str) -> list[str]:
        return cls.files[split] if (data / cls.files[split][0]).exists() else cls.raw

    def read(self) -> None:
        path = self.data / self.files[self.split][0]
        if path.exists():
            content = read_json(path)
        else:
            content = prepare_vg(self.data)[0][self.split]
            self.notes.append(f"{path.name} made in memory: `python data.py --data {self.data} --prepare vg` "
                              "makes it once for all")
        self.read_content(content, path)

    def read_categories(self, content: dict, path: Path) -> None:
        super().read_categories(content, path)
        ids, names = columns(content, "attributes", ("id", "name"), path)
        ids = array(ids, np.int64, path, "attribute id").tolist()
        size = max(ids, default=0) + 1 if self.tiny else self.task.num_attributes
        by_id = dict(zip(ids, names))
        self.attribute_names = [by_id.get(n, "") for n in range(size)]
        self.task = replace(self.task, num_attributes=size)

    def read_attributes(self, annotations: list, order: np.ndarray, path: Path) -> np.ndarray:
        """(n, 16) int16, -1 pads."""
        lists = [annotations[n].get("attribute_ids", [])[:MAX_ATTRIBUTES] for n in order]
        flat = array(list(chain.from_iterable(lists)), np.int64, path, "attribute_ids")
        if len(flat) and not 1 <= flat.min() <= flat.max() < self.task.num_attributes:
            raise InputError(f"{path}: attribute ids {flat.min()}..{flat.max()}, but {self.task.name} has "
                             f"1..{self.task.num_attributes - 1}; prepare the file again")
        result = np.full((len(lists), MAX_ATTRIBUTES), -1, np.int16)
        result[np.arange(MAX_ATTRIBUTES) < np.array([len(x) for x in lists]).reshape(-1, 1)] = flat
        return result


MAX_ATTRIBUTES = 16  # an object (released config)


def coco_val_ids(data: Path) -> set[int]:
    """The images of COCO val2017: no training set may hold them; VG and VQAv2 are evaluated on them (4.1)."""
    path = data / "coco/annotations/instances_val2017.json"
    return set(columns(read_json(path), "images", ("id",), path)[0])


def read_names(path: Path) -> tuple[list[str], dict[str, int]]:
    """A vocabulary of VG, a line a class with aliases between commas -> (first names, {alias: id from 1})."""
    lines = [[name.strip() for name in line.split(",")] for line in read_lines(path)]
    return [names[0] for names in lines], {name: n for n, names in enumerate(lines, 1) for name in names}


def prepare_vg(data: Path) -> tuple[dict[str, dict], Counter]:
    """Raw Visual Genome -> {"train": .., "val": ..} in COCO's style, and what was dropped.

    Split by membership of the picture in COCO val2017 (Section 4.1), which image_data.json's coco_id tells;
    about half of the pictures are COCO's. Names are looked up in lower case without outer spaces.
    """
    def pick(row, *keys):  # files of version 1.0 have "id" for "image_id", "object_names" for "names"
        return next((row[key] for key in keys if key in row), None)

    objects, object_ids = read_names(data / "vg/objects_vocab.txt")
    attributes, attribute_ids = read_names(data / "vg/attributes_vocab.txt")
    held_out, dropped = coco_val_ids(data), Counter()
    head = {"categories": [{"id": n, "name": name} for n, name in enumerate(objects, 1)],
            "attributes": [{"id": n, "name": name} for n, name in enumerate(attributes, 1)]}
    splits = {split: {**head, "images": [], "annotations": []} for split in ("train", "val")}
    images = {}  # image id -> (its row, its split)
    path = data / "vg/image_data.json"
    for n, row in enumerate(read_json(path)):
        number, url = pick(row, "image_id", "id"), row.get("url", "")
        if number is None or not {"width", "height"} <= set(row):
            raise InputError(f"{path}: row {n} lacks image_id, width or height; add it or remove the row")
        if number in images:
            dropped["repeated image ids"] += 1
            continue
        name = "/".join(url.split("/")[-2:]) if url.count("/") > 1 else f"VG_100K/{number}.jpg"
        split = "val" if row.get("coco_id") in held_out else "train"
        images[number] = {"id": number, "file_name": name, "width": row["width"], "height": row["height"]}, split
        splits[split]["images"].append(images[number][0])
    path = data / "vg/attributes.json"
    for n, row in enumerate(read_json(path)):
        number = pick(row, "image_id", "id")
        if number not in images or not isinstance(row.get("attributes"), list):
            dropped["rows of an unknown image"] += 1
            continue
        image, split = images.pop(number)  # so that a repeated row counts as unknown
        for thing in row["attributes"]:
            found = convert_object(thing, image, object_ids, attribute_ids, dropped)
            if found:
                found["id"] = len(splits[split]["annotations"]) + 1
                splits[split]["annotations"].append(found)
    return splits, dropped


def convert_object(thing: dict, image: dict, object_ids: dict, attribute_ids: dict, dropped: Counter):
    """One object of attributes.json as a COCO-style annotation; None (and counted) if it is of no use."""
    names = [str(name).lower().strip() for name in thing.get("names") or thing.get("object_names") or []]
    label = next((object_ids[name] for name in names if name in object_ids), None)
    if label is None:
        dropped["objects outside the vocabulary" if any(names) else "objects without a name"] += 1
        return None
    try:
        x, y, w, h = (float(thing[key]) for key in "xywh")
    except (KeyError, TypeError, ValueError):
        dropped["objects without a box"] += 1
        return None
    # Boxes overshoot their picture by a pixel or two (1 in 200); the metric wants what can be seen.
    x0, y0, x1, y1 = max(x, 0), max(y, 0), min(x + w, image["width"]), min(y + h, image["height"])
    if not (x1 > x0 and y1 > y0):
        dropped["empty boxes"] += 1
        return None
    words = [str(word).lower().strip() for word in thing.get("attributes") or []]
    known = list(dict.fromkeys(attribute_ids[word] for word in words if word in attribute_ids))
    dropped["attributes outside the vocabulary"] += sum(word not in attribute_ids for word in words)
    dropped[f"attributes beyond {MAX_ATTRIBUTES} an object"] += max(0, len(known) - MAX_ATTRIBUTES)
    return {"image_id": image["id"], "category_id": label, "bbox": [x0, y0, x1 - x0, y1 - y0], "iscrowd": 0,
            "area": (x1 - x0) * (y1 - y0), "attribute_ids": known[:MAX_ATTRIBUTES]}


class Classification(Dataset):
    """What the readers below share: one or two texts, perhaps a picture, one label (VQAv2: scores)."""

    first: Strings                # the text; of a pair the first
    second: Strings | None = None
    names: Strings | None = None  # pictures, relative to `folder`
    folder: Path
    labels: np.ndarray            # class id, -1: not known

    def texts(self, index: int) -> list[str]:
        return [self.first[index]] + ([] if self.second is None else [self.second[index]])

    def label(self, index: int) -> int:
        return int(self.labels[index])

    def scores(self, index: int) -> Tensor | None:
        """(C,) target score of each class; None where there is no target."""
        if self.label(index) < 0:
            return None
        return torch.zeros(self.task.num_classes).index_fill_(0, torch.tensor(self.label(index)), 1.0)

    def sample(self, index: int, rng: np.random.Generator | None = None) -> Sample:
        """No augmentation: a flip would turn "left" into a lie, a crop hide what is asked for (Section 3.5)."""
        sample = Sample(int(self.ids[index]), scores=self.scores(index))
        if self.names is not None:
            image = read_image(self.folder / self.names[index])
            sample.size = tuple(image.shape[1:])
            sample.image = normalise(image if self.tiny else resize(image, SHORTEST, LONGEST, floor=True))
        sample.tokens, sample.types = self.tokenizer.encode(*self.texts(index), max_length=self.task.max_tokens)
        return sample


class Vqa2(Classification):
    """VQAv2 with soft scores, and Visual Genome's questions as further training data (Section 4.1).

    The 2014 files, split anew by COCO 2017: validation is val2014's questions on val2017's pictures, training
    all others. The pictures are found by id, as 2014's and 2017's are the same under other names.
    """

    folders = {"train": ["coco/train2017", "coco/val2017", "coco/train2014", "coco/val2014"],
               "test": ["coco/test2015", "coco/test2017"]}
    folders["val"] = folders["train"]
    files = {"train": ["vqa2/v2_OpenEnded_mscoco_train2014_questions.json",
                       "vqa2/v2_OpenEnded_mscoco_val2014_questions.json"],
             "val": ["vqa2/v2_OpenEnded_mscoco_val2014_questions.json"],
             "test": ["vqa2/v2_OpenEnded_mscoco_test2015_questions.json"]}
    annotations = {file: re.sub("OpenEnded_(.*)questions", r"\1annotations", file) for file in files["train"]}
    vocabulary = "vqa2/answers_vqa.txt"

    @classmethod
    def needed(cls, data: Path, split: str) -> list[str]:
        files, answered = list(cls.files[split]), [] if split == "test" else list(cls.files[split])
        dev = files[0].replace("test2015", "test-dev2015")
        if split == "test" and (data / dev).exists() and not (data / files[0]).exists():
            files = [dev]
        if not (data / cls.vocabulary).exists():
            answered = cls.annotations  # the vocabulary is made of the answers of both
        return files + [cls.annotations[file] for file in answered] + (
            ["coco/annotations/instances_val2017.json"] if split != "test" else [])

    def read(self) -> None:
        files = self.needed(self.data, self.split)
        answers, counts = {}, Counter()  # {question id: ten answers}, {most common answer: questions}
        for file in files:
            if file in self.annotations.values():
                self.read_answers(self.data / file, answers, counts)
        self.class_names = self.read_vocabulary(counts)
        self.task = replace(self.task, num_classes=len(self.class_names))
        pictures = Pictures(self.data).by_id(*self.folders[self.split])
        held_out = coco_val_ids(self.data) if self.split != "test" else set()
        rows = []  # question id, picture or None, question, its answers or None
        for file in files:
            if "_questions" in file:
                fields = columns(read_json(self.data / file), "questions", ("question_id", "image_id", "question"),
                                 self.data / file)
                rows += [(number, pictures.get(image), question, answers.get(number))
                         for number, image, question in zip(*fields)
                         if self.split == "test" or (image in held_out) == (self.split == "val")]
        if self.split == "train":
            rows += self.genome_questions(held_out)
        self.fill(rows, self.data / files[0])

    def read_answers(self, path: Path, answers: dict, counts: Counter) -> None:
        numbers, lists, common = columns(read_json(path), "annotations",
                                         ("question_id", "answers", "multiple_choice_answer"), path)
        try:
            answers.update((number, [row["answer"] for row in ten]) for number, ten in zip(numbers, lists))
        except (KeyError, TypeError):
            raise InputError(f"{path}: after question_id {next(reversed(answers), 'none')}: `answers` is not a "
                             "list of {\"answer\": text}; mend or remove the record") from None
        counts.update(common)

    def read_vocabulary(self, counts: Counter) -> list[str]:
        """answers_vqa.txt; or, from all of VQAv2: the normal forms of answers seen for nine questions or more."""
        path = self.data / self.vocabulary
        if path.exists():
            words = read_lines(path)
            if words[:1] != ["<unk>"] or len(words) < 2:
                raise InputError(f"{path}: the first line is not <unk>; put it there (class 0 is never predicted), "
                                 "or remove the file: the vocabulary is then made from the annotations")
            return words
        normal = Counter()
        for answer, count in counts.items():
            normal[normalise_answer(answer)] += count
        # Of the 3,129 one is the empty answer, which gives its place to <unk> as in the released file.
        return ["<unk>"] + sorted(answer for answer, count in normal.items() if count >= 9 and answer)

    def genome_questions(self, held_out: set[int]) -> list[tuple]:
        """Rows of VG's questions whose picture is not in val2017. One answer each: it counts as ten (ours)."""
        path, images_path = self.data / "vg/question_answers.json", self.data / "vg/image_data.json"
        if missing := [str(p) for p in (path, images_path) if not p.exists()]:
            self.notes.append(f"without Visual Genome's questions: {' and '.join(missing)} missing")
            return []
        coco_ids = {row.get("image_id", row.get("id")): row.get("coco_id") for row in read_json(images_path)}
        pictures, rows = Pictures(self.data).by_id("vg/VG_100K", "vg/VG_100K_2"), []
        for entry in read_json(path):
            image = entry.get("id", entry.get("image_id"))
            if image not in coco_ids:  # then nothing tells whether the picture is in val2017
                self.skipped["VG questions on an unknown image"] += len(entry.get("qas", ()))
                continue
            if coco_ids[image] not in held_out:
                numbers, questions, texts = columns(entry, "qas", ("qa_id", "question", "answer"), path)
                rows += [(number, pictures.get(image), question, [text] * 10)
                         for number, question, text in zip(numbers, questions, texts)]
        return rows

    def fill(self, rows: list[tuple], path: Path) -> None:
        """From rows to flat arrays. The ten answers are indices into the distinct ones (-1: none)."""
        self.check_present([row[1] is not None for row in rows], [f"of question {row[0]}" for row in rows],
                           self.data, path)
        rows = [row for row in rows if row[1] is not None]
        if self.split != "test":
            self.skipped["questions without answers"] += sum(not row[3] for row in rows)
            rows = [row for row in rows if row[3]]
        distinct = {}
        answers = np.full((len(rows), 10), -1, np.int32)
        for line, row in zip(answers, rows):
            given = [distinct.setdefault(str(text), len(distinct)) for text in (row[3] or ())[:10]]
            line[:len(given)] = given
        # The class of each distinct answer, by the normal form that the scorer compares; -1 is outside.
        # Where two classes have one normal form ("none" and "0"), the one that is in that form counts.
        classes = {normalise_answer(name): n for n, name in enumerate(self.class_names) if n}
        classes |= {name: n for n, name in enumerate(self.class_names) if n and name == normalise_answer(name)}
        self.answer_class = np.array([classes.get(normalise_answer(text), -1) for text in distinct] + [-1], np.int32)
        if self.split == "train":  # without a target there is no loss (RELEASED: left out of training)
            keep = (self.answer_class[answers] >= 0).any(1)
            self.skipped["questions without an answer in the vocabulary"] += int((~keep).sum())
            rows, answers = [row for row, k in zip(rows, keep) if k], answers[keep]
        self.answer_ids, self.answer_texts = answers, Strings(distinct)
        self.ids = array([row[0] for row in rows], np.int64, path, "question_id")
        self.folder, self.names = self.data, Strings([row[1] for row in rows])
        self.first = Strings([str(row[2]) for row in rows])
        self.num_images = len({row[1] for row in rows})

    def answers(self, index: int) -> list[str]:
        """The ten answers as the annotators gave them; none on a test split."""
        return [self.answer_texts[n] for n in self.answer_ids[index] if n >= 0]

    def label(self, index: int) -> int:
        """The class with the highest score, -1 if none has one."""
        scores = self.scores(index)
        return -1 if scores is None or not scores.any() else int(scores.argmax())

    def scores(self, index: int) -> Tensor | None:
        """(C,) for 0, 1, 2, 3, 4+ of the ten annotators 0, 0.3, 0.6, 0.9, 1: the leave-one-out accuracy."""
        if self.split == "test":
            return None
        classes = self.answer_class[self.answer_ids[index]]
        counts = np.bincount(classes[classes >= 0], minlength=self.task.num_classes)
        return torch.from_numpy(np.minimum(1, 0.3 * counts).astype(np.float32))


class SnliVe(Classification):
    """SNLI-VE: does the picture entail the hypothesis? One text, as the picture stands for the premise."""

    files = {"train": ["snli_ve/snli_ve_train.jsonl"], "val": ["snli_ve/snli_ve_dev.jsonl"],
             "test": ["snli_ve/snli_ve_test.jsonl"]}
    class_names = ["entailment", "neutral", "contradiction"]

    def read(self) -> None:
        path = self.data / self.files[self.split][0]
        self.folder = self.data / "snli_ve/flickr30k_images"
        rows = []  # row number, picture, hypothesis, label
        with open(path, "rb") as file:  # line by line: most of each line is parse trees
            for number, line in enumerate(file):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                    # The first release spelt the key otherwise, and gave the name with its ending.
                    name = row["Flickr30K_ID"] if "Flickr30K_ID" in row else row["Flikr30kID"]
                    text, label = str(row["sentence2"]), row["gold_label"]
                except (ValueError, KeyError, TypeError) as error:
                    raise InputError(f"{path}, line {number + 1}: not a JSON object with Flickr30K_ID, sentence2 and "
                                     f"gold_label ({error!r}); mend or remove the line") from None
                if label == "-":  # annotators who disagree: SNLI has such rows, SNLI-VE should not
                    self.skipped["rows with label '-'"] += 1
                elif label not in self.class_names:
                    raise InputError(f"{path}, line {number + 1}: unknown gold_label {label!r}; it must be one of "
                                     f"{', '.join(self.class_names)}")
                else:
                    name = str(name).removesuffix(".jpg") + ".jpg"
                    rows.append((number, name, text, self.class_names.index(label)))
        present = self.keep_present(Pictures(self.folder), [row[1] for row in rows], path)
        rows = [row for row, here in zip(rows, present) if here]
        self.ids, self.labels = (np.array([row[k] for row in rows], np.int64) for k in (0, 3))
        self.names, self.first = (Strings([row[k] for row in rows]) for k in (1, 2))
        self.num_images = len({row[1] for row in rows})


class Glue(Classification):
    """A task of GLUE: tab-separated lines under a header, without any quoting (quotes are text)."""

    text_columns: tuple[str, ...]
    label_column = "label"
    words: list[str] = []  # the labels as the files write them, index = class id

    def read(self) -> None:
        path = self.data / self.files[self.split][0]
        header, *lines = read_lines(path) or [""]
        header, labelled = header.split("\t"), self.split != "test"
        wanted = [*self.text_columns] + [self.label_column] * labelled
        if absent := [name for name in wanted if name not in header]:
            raise InputError(f"{path}, line 1: no column {absent[0]!r} in the header; is it the official file?")
        places = [header.index(name) for name in wanted]
        rows = []  # row number, texts, label
        for number, line in enumerate(lines):
            fields = line.split("\t")
            if len(fields) != len(header):  # QQP has questions that are broken over two lines
                if not labelled:
                    raise InputError(f"{path}, line {number + 2}: {len(fields)} columns instead of {len(header)}; the "
                                     "server wants every row: take the official file")
                self.skipped["rows with a wrong number of columns"] += 1
                continue
            *texts, label = [fields[k] for k in places] + [""] * (not labelled)
            if label == "-":  # annotators who disagree, in MultiNLI
                self.skipped["rows with label '-'"] += 1
            elif labelled and label not in self.words:
                raise InputError(f"{path}, line {number + 2}: unknown label {label!r}; it must be one of "
                                 f"{', '.join(self.words)}")
            else:
                rows.append((number, texts, self.words.index(label) if labelled else -1))
        self.ids, self.labels = (np.array([row[k] for row in rows], np.int64) for k in (0, 2))
        self.first = Strings([row[1][0].strip() for row in rows])
        if len(self.text_columns) == 2:
            self.second = Strings([row[1][1].strip() for row in rows])


class Qnli(Glue):
    files = {"train": ["glue/QNLI/train.tsv"], "val": ["glue/QNLI/dev.tsv"], "test": ["glue/QNLI/test.tsv"]}
    text_columns = ("question", "sentence")
    class_names = words = ["entailment", "not_entailment"]


class Mnli(Glue):
    """Trained on all of MNLI, evaluated on genres that training lacks ("mismatched")."""

    files = {"train": ["glue/MNLI/train.tsv"], "val": ["glue/MNLI/dev_mismatched.tsv"],
             "test": ["glue/MNLI/test_mismatched.tsv"]}
    text_columns = ("sentence1", "sentence2")  # premise, hypothesis
    label_column = "gold_label"                # the last of 12 columns in train, of 16 in dev
    class_names = words = ["entailment", "neutral", "contradiction"]


class Qqp(Glue):
    files = {"train": ["glue/QQP/train.tsv"], "val": ["glue/QQP/dev.tsv"], "test": ["glue/QQP/test.tsv"]}
    text_columns = ("question1", "question2")
    label_column = "is_duplicate"
    words, class_names = ["0", "1"], ["not duplicate", "duplicate"]


class Sst2(Glue):
    files = {"train": ["glue/SST-2/train.tsv"], "val": ["glue/SST-2/dev.tsv"], "test": ["glue/SST-2/test.tsv"]}
    text_columns = ("sentence",)
    words, class_names = ["0", "1"], ["negative", "positive"]


# The eight tasks: queries, classes, attributes and tokens as in the released configuration. Detection:
# the largest category id + 1 (no-object comes on top). The texts' states: "cls", as the paper keeps [CLS].
TASKS = [
    Task("coco", "detection", image=True, text=False, num_queries=100, num_classes=91, dataset=Coco),
    Task("vg", "detection", image=True, text=False, num_queries=100, num_classes=1601, num_attributes=401,
         dataset=VisualGenome),
    Task("vqa2", "classification", image=True, text=True, num_queries=25, num_classes=3129, max_tokens=25,
         soft_scores=True, dataset=Vqa2),
    Task("snli_ve", "classification", image=True, text=True, num_queries=25, num_classes=3, max_tokens=25,
         dataset=SnliVe),
    Task("qnli", "classification", image=False, text=True, num_queries=25, num_classes=2, dataset=Qnli),
    Task("mnli", "classification", image=False, text=True, num_queries=25, num_classes=3, dataset=Mnli),
    Task("qqp", "classification", image=False, text=True, num_queries=25, num_classes=2, dataset=Qqp),
    Task("sst2", "classification", image=False, text=True, num_queries=25, num_classes=2, dataset=Sst2),
]

# Table A.2, the sampling probabilities: {its line: {task: probability}}.
PROBABILITIES = {
    1: {"coco": 1 / 3, "vg": 1 / 3, "vqa2": 1 / 3},
    2: {"coco": 0.20, "vg": 0.07, "vqa2": 0.26, "snli_ve": 0.12, "qnli": 0.10, "mnli": 0.10, "qqp": 0.10, "sst2": 0.05},
    3: {"coco": 0.30, "snli_ve": 0.50, "mnli": 0.20},
}


def load(data: Path | str, names, split: str, tiny: bool = False) -> tuple[list[Task], dict[str, Dataset]]:
    """The named data sets, and their tasks with the sizes that the files have (VQAv2: the vocabulary's)."""
    data, by_name = Path(data), {task.name: task for task in TASKS}
    if unknown := [name for name in names if name not in by_name]:
        raise InputError(f"unknown task {unknown[0]!r}; there are {', '.join(by_name)}")
    if not data.is_dir():
        raise InputError(f"{data}: no such folder; give the data sets' folder by --data (the README has its layout)")
    tokenizer = Tokenizer(data / "bert/vocab.txt") if any(by_name[name].text for name in names) else None
    datasets = {}
    for name in names:
        datasets[name] = by_name[name].dataset(by_name[name], data, split, tiny)
        datasets[name].tokenizer = tokenizer
    return [dataset.task for dataset in datasets.values()], datasets


# ------------------------------------------------------------------------------------------------
# Batches and their order

def collate(task: Task, samples: list[Sample]) -> Batch:
    """One task's samples as a `Batch`: pictures padded to the largest (right and below), texts to the longest."""
    def every(field):  # a list of all samples' values, None if one has none
        values = [getattr(sample, field) for sample in samples]
        return None if any(value is None for value in values) else values

    batch = Batch(task.name, [sample.id for sample in samples])
    if images := every("image"):
        batch.images, batch.image_mask = pad_images(images)
        batch.sizes = torch.tensor([sample.size for sample in samples])
    if tokens := every("tokens"):
        length = max(map(len, tokens))
        batch.tokens, batch.token_types = (  # (B, S); id 0 is [PAD], though the mask hides whatever is there
            torch.tensor([row + [0] * (length - len(row)) for row in rows]) for rows in (tokens, every("types")))
        lengths = torch.tensor([len(row) for row in tokens])
        if lengths.min() < length:
            batch.text_mask = torch.arange(length) >= lengths[:, None]  # (B, S) True = padding
    batch.boxes, batch.labels, batch.attributes = (every(field) for field in ("boxes", "labels", "attributes"))
    if scores := every("scores"):
        batch.scores = torch.stack(scores)  # (B, C)
    return batch


def pad_images(images: list[Tensor]) -> tuple[Tensor, Tensor | None]:
    """B pictures (3, H_i, W_i) -> (B, 3, H, W), and a mask (B, H, W), True = padding, unless all are of one size."""
    if len({image.shape for image in images}) == 1:
        return torch.stack(images) if len(images) > 1 else images[0][None], None
    height, width = (max(image.shape[k] for image in images) for k in (1, 2))
    result = torch.zeros(len(images), 3, height, width)
    mask = torch.ones(len(images), height, width, dtype=torch.bool)
    for row, hidden, image in zip(result, mask, images):
        row[:, :image.shape[1], :image.shape[2]] = image
        hidden[:image.shape[1], :image.shape[2]] = False
    return result, mask


class Schedule:
    """Which task and which samples an iteration takes: a pure function of (seed, iteration).

    So all processes agree without a word, and a run resumed at i is the run that never stopped. The task is
    drawn (Section 3.5); how often it was drawn before tells how far its data set has been read; each pass
    through a data set is a shuffle of its own.
    """

    def __init__(self, sizes: dict[str, int], probabilities: dict[str, float], batch_size: int, iterations: int,
                 seed: int, coco_first: int = 0):
        self.names, self.sizes = list(sizes), sizes
        self.batch_size, self.iterations, self.seed = batch_size, iterations, seed
        if empty := [name for name in self.names if not sizes[name]]:
            raise InputError(f"{empty[0]} has no training samples; leave it out of --tasks")
        weights = np.array([probabilities[name] for name in self.names], np.float64)
        if not (weights.sum() > 0 and (weights >= 0).all()):
            raise InputError(f"sampling probabilities {weights.tolist()}: they must be 0 or more, and not all 0")
        edges = np.cumsum(weights / weights.sum())[:-1]
        # One draw an iteration: a longer run begins like a shorter one.
        draws = np.random.default_rng([seed, 0]).random(iterations)
        self.choices = np.searchsorted(edges, draws, side="right").astype(np.uint8)
        if coco_first:  # COCO initialisation within one run (ours: tiny mode)
            self.choices[:coco_first] = self.names.index("coco")
        self.before = np.zeros(iterations, np.int32)  # how many earlier iterations took the same task
        for number in range(len(self.names)):
            chosen = np.flatnonzero(self.choices == number)
            self.before[chosen] = np.arange(len(chosen))
        # Two epochs a task (a batch may lie across their border) are kept, not made anew each time.
        self.shuffle = functools.lru_cache(maxsize=2 * len(self.names))(self.shuffled)

    def task(self, iteration: int) -> str:
        return self.names[self.choices[iteration]]

    def samples(self, iteration: int) -> np.ndarray:
        """(batch_size,) int64 indices into the task's data set."""
        name = self.task(iteration)
        places = int(self.before[iteration]) * self.batch_size + np.arange(self.batch_size)
        epochs, places = np.divmod(places, self.sizes[name])
        return np.array([self.shuffle(name, e)[p] for e, p in zip(epochs.tolist(), places.tolist())])

    def shuffled(self, name: str, epoch: int) -> np.ndarray:
        """The order of one epoch. Keyed by name, so that it doesn't depend on the other tasks of a run."""
        rng = np.random.default_rng([self.seed, 1, zlib.crc32(name.encode()), epoch])
        return rng.permutation(self.sizes[name])


class Reader(torch.utils.data.Dataset):
    """What a data worker runs: a request (iteration, task, [(position, index), ...]) -> (iteration, Batch)."""

    def __init__(self, datasets: dict[str, Dataset], seed: int | None):
        self.datasets, self.seed = datasets, seed

    def __getitem__(self, request):
        iteration, name, places = request
        dataset = self.datasets[name]
        try:  # augmentation is keyed by the position in the global batch: no worker, no rank shows in it
            samples = [dataset.sample(index, None if self.seed is None else
                                      np.random.default_rng([self.seed, 2, iteration, position]))
                       for position, index in places]
        except InputError as error:
            return iteration, error  # raised in a worker it would arrive wrapped in a traceback
        # Arrays travel inside the message; each tensor would cost a file descriptor, 3 a sample.
        return iteration, convert_lists(collate(dataset.task, samples), Tensor.numpy)


def convert_lists(batch: Batch, convert) -> Batch:
    lists = {name: getattr(batch, name) for name in ("boxes", "labels", "attributes")}
    return replace(batch, **{name: [convert(x) for x in xs] for name, xs in lists.items() if xs is not None})


def start_worker(number: int) -> None:
    """One thread a worker. Ctrl-C is the parent's business, who saves. So is SIGTERM, which clusters send
    to all processes: the workers serve on while the parent saves, but no longer than half a minute."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: threading.Timer(30, os._exit, (1,)).start())


def run_loader(reader: Reader, requests, num_workers: int):
    """Yields (iteration, Batch) for each request, in order, read ahead by `num_workers` processes."""
    extra = {}
    if num_workers:  # fork shares the annotations; elsewhere than on Linux they are copied
        extra = dict(prefetch_factor=4, worker_init_fn=start_worker,
                     multiprocessing_context="fork" if sys.platform == "linux" else None)
    # A generator of its own: the loader draws a seed at its start, and must not disturb dropout's draws.
    loader = torch.utils.data.DataLoader(reader, batch_size=None, sampler=requests, num_workers=num_workers,
                                         collate_fn=as_it_is, generator=torch.Generator(), **extra)
    for iteration, batch in loader:
        if isinstance(batch, InputError):
            raise batch
        yield iteration, convert_lists(batch, torch.from_numpy)


def as_it_is(item):
    return item


class TrainRequests:
    """The requests of one process: its share of each global batch, micro-batch by micro-batch."""

    def __init__(self, datasets, schedule: Schedule, start: int, rank: int, world_size: int, micro_batch: int):
        self.datasets, self.schedule, self.start, self.micro_batch = datasets, schedule, start, micro_batch
        self.share = schedule.batch_size // world_size
        self.first = rank * self.share

    def __iter__(self):
        for iteration in range(self.start, self.schedule.iterations):
            name = self.schedule.task(iteration)
            dataset = self.datasets[name]
            # One picture at a time is the paper's way, and exact: padding changes features near it.
            size = self.micro_batch or (1 if dataset.task.image and not dataset.tiny else self.share)
            places = list(enumerate(self.schedule.samples(iteration).tolist()))[self.first:self.first + self.share]
            for k in range(0, self.share, size):
                yield iteration, name, places[k:k + size]


def train_loader(datasets: dict[str, Dataset], schedule: Schedule, start: int = 0, rank: int = 0, world_size: int = 1,
                 micro_batch: int = 0, num_workers: int = 0, seed: int = 0):
    """Yields (iteration, Batch): all micro-batches of this process from iteration `start` on.

    micro_batch 0: one picture at a time, all texts at once, in tiny mode all of everything.
    """
    if schedule.batch_size % world_size:
        raise InputError(f"--batch_size {schedule.batch_size} cannot be shared equally among {world_size} processes; "
                         "choose a multiple")
    requests = TrainRequests(datasets, schedule, start, rank, world_size, micro_batch)
    return run_loader(Reader(datasets, seed), requests, num_workers)


def eval_loader(dataset: Dataset, indices, batch_size: int = 0, num_workers: int = 0):
    """Yields a Batch for each `batch_size` of the `indices`, in order. 0: one picture, or 32 texts (tiny: 32)."""
    size = batch_size or (1 if dataset.task.image and not dataset.tiny else 32)
    places = [(n, int(index)) for n, index in enumerate(indices)]
    requests = [(0, dataset.task.name, places[k:k + size]) for k in range(0, len(places), size)]
    for _, batch in run_loader(Reader({dataset.task.name: dataset}, None), requests, num_workers):
        yield batch


# ------------------------------------------------------------------------------------------------
# Command line

PRETRAINED = {"bert/vocab.txt": "all tasks with text", "bert/pytorch_model.bin or bert/model.safetensors": "the text encoder's weights",
              "detr/detr-r50-dc5-f0fb7ef5.pth": "the backbone's weights"}


def report(data: Path) -> None:
    """One line a split: what is there, how much of it, what was skipped, which file is missing."""
    print(f"{data}: data sets, their splits, and what is missing\n")
    for task in TASKS:
        for split in task.dataset.files:
            missing = [file for file in task.dataset.needed(data, split) if not (data / file).exists()]
            try:
                if missing:
                    print(f"{task.name:8}{split:6}        - missing: {', '.join(missing)}")
                else:
                    print(task.dataset(task, data, split).summary)
            except InputError as error:
                print(f"{task.name:8}{split:6}        - {error}")
    print("\npretrained files")
    for names, use in PRETRAINED.items():
        found = any((data / name).exists() for name in names.split(" or "))
        print(f"{'found' if found else 'missing':8}{names} ({use})")


def write_prepared_vg(data: Path) -> None:
    splits, dropped = prepare_vg(data)
    for split, content in splits.items():
        path = data / f"vg/instances_{split}.json"
        try:
            path.with_suffix(".part").write_text(json.dumps(content), encoding="utf-8")
            os.replace(path.with_suffix(".part"), path)  # never half a file under the right name
        except OSError as error:
            raise InputError(f"{path}: {error.strerror}; make room, or make the folder writable") from None
        print(f"{path}: {len(content['images']):,} pictures, {len(content['annotations']):,} boxes")
    for reason, count in dropped.items():
        print(f"dropped: {count:,} {reason}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Tells what is in the folder of the data sets, split by split, and what is missing.",
        epilog="The layout of the folder is in the README.", allow_abbrev=False)
    parser.add_argument("--data", type=Path, default=Path("data"), metavar="DIR",
                        help="folder of the data sets (default: data)")
    parser.add_argument("--prepare", choices=["vg"],
                        help="make vg/instances_{train,val}.json of the raw Visual Genome files, once")
    parser.add_argument("--write_tiny", type=Path, metavar="DIR", help="write the eight tiny data sets there")
    args = parser.parse_args()
    try:
        if args.write_tiny:
            write_tiny(args.write_tiny)
        elif not args.data.is_dir():
            raise InputError(f"{args.data}: no such folder; give the data sets' folder by --data (the README has its "
                             "layout)")
        elif args.prepare:
            missing = [file for file in VisualGenome.raw if not (args.data / file).exists()]
            if missing:
                raise InputError(f"{args.data / missing[0]}: missing; --prepare vg reads {', '.join(VisualGenome.raw)}")
            write_prepared_vg(args.data)
        else:
            report(args.data)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


# ------------------------------------------------------------------------------------------------
# The tiny data sets


if __name__ == "__main__":
    main()
