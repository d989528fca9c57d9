"""What part of the input gives away: the baselines that the tiny run must beat by 15 points.

    python tests/baselines.py                # writes the tiny data sets to a temporary folder
    python tests/baselines.py --data DIR     # yardsticks for what is in DIR: see the second half

For each classification task, held-out accuracy in percent of
* majority: the most frequent label of training;
* first, second: words (and pairs of neighbouring words) of one of the two sentences alone;
* text, picture: the same for the text without the picture; the pixels without a text;
* bag of words: `linear` adds up a weight a word, for its count and for its presence, of a pair for
  each sentence too.
`any` is a network on the same counts. It is shown beside the baselines and is not in `best`: on a
pair it knows which words occur together in the two sentences, which is the whole task but for word
order, and these templates need little of that. On SST-2, where scope decides, it tells how much.
Each is trained at several strengths of weight decay, and the best on the held-out split is
taken: too good rather than not good enough.
"""

import argparse
import itertools
import math
import re
import sys
import tempfile
import time
from collections import Counter
from operator import add
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data  # noqa: E402
import eval as evaluation  # noqa: E402

TASKS = [task.name for task in data.TASKS if task.kind == "classification"]
COLUMNS = ["majority", "first", "second", "text", "picture", "linear", "any"]
PICTURE = 16  # pictures are shrunk to so many pixels a side


def fit(train: tuple, val: tuple, classes: int, hidden: int = 0, steps: int = 150) -> float:
    """Held-out accuracy of a linear model (or one hidden layer) on features (n, f), labels (n,)."""
    (x, y), (x_val, y_val) = train, val
    mean, scale = x.mean(0), x.std(0) + 0.1  # 0.1: a rare word stays small
    x, x_val, best = (x - mean) / scale, (x_val - mean) / scale, 0.0
    for decay in (0.3, 0.01):
        torch.manual_seed(0)
        model = nn.Linear(x.shape[1], classes) if not hidden else nn.Sequential(
            nn.Linear(x.shape[1], hidden), nn.ReLU(), nn.Linear(hidden, classes))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=decay)
        for _ in range(steps):
            rows = torch.randint(len(y), (512,))
            loss = F.cross_entropy(model(x[rows]), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            best = max(best, (model(x_val).argmax(1) == y_val).double().mean().item())
    return 100 * best


def words(dataset) -> list[list[list[str]]]:
    """The words of each text of each sample: sample, text, word."""
    samples = []
    for n in range(len(dataset)):
        texts = [re.sub("([?.,])", r" \1", str(text).lower()) for text in dataset.texts(n)]
        samples.append([text.split() for text in texts])
    return samples


def joined(samples) -> list[list[str]]:
    """All words of each sample, whatever their text."""
    return [sum(texts, []) for texts in samples]


def marked(samples, of_a_text=lambda text: text) -> list[list[str]]:
    """All words of each sample together with the place of their text."""
    found = []
    for texts in samples:
        places = enumerate(texts)
        found.append([f"{word} {k}" for k, text in places for word in of_a_text(text)])
    return found


def counts(train: list, val: list, presence: bool = True) -> tuple[Tensor, Tensor]:
    """Lists of terms -> (n, f) how often each known term occurs, and whether it does."""
    known = sorted(set(itertools.chain(*train)))
    terms = dict(zip(known, itertools.count()))
    tables = []
    for samples in (train, val):
        table = torch.zeros(len(samples), len(terms))
        for row, sample in zip(table, samples):
            for term in sample:
                if term in terms:
                    row[terms[term]] += 1
        tables.append(torch.cat([table, table.clamp(max=1)], 1) if presence else table)
    return tables[0], tables[1]


def with_pairs(text: list[str]) -> list[str]:
    """One text's words and its pairs of neighbours: a little order, where one text is all."""
    return text + [f"{a} {b}" for a, b in zip(text, text[1:])]


def pixels(dataset) -> Tensor:
    """(n, 3 * 16 * 16), shrunk."""
    images = torch.stack([F.interpolate(dataset.sample(n).image[None], (PICTURE, PICTURE),
                                        mode="area")[0] for n in range(len(dataset))])
    return images.flatten(1)


def labels(dataset) -> Tensor:
    """(n,) the class whose target score is highest."""
    return torch.tensor([int(dataset.scores(n).argmax()) for n in range(len(dataset))])


def measure(train, val) -> dict[str, float]:
    """{column: held-out accuracy} of one task."""
    classes = train.task.num_classes
    y, y_val = labels(train), labels(val)
    result = {"majority": 100 * (y_val == y.bincount().argmax()).double().mean().item()}

    def run(features, hidden=0):
        return fit((features[0], y), (features[1], y_val), classes, hidden)

    texts = words(train), words(val)
    pair = len(texts[0][0]) == 2
    for k, column in enumerate(["first", "second"] if pair else ["text"]):
        if pair or train.task.image:
            train_texts, val_texts = ([with_pairs(x[k]) for x in samples] for samples in texts)
            one = counts(train_texts, val_texts)
            result[column] = max(run(one), run(one, hidden=64))
    if train.task.image:
        pictures = pixels(train), pixels(val)
        result["picture"] = max(run(pictures), run(pictures, hidden=64))
    if not train.task.image:
        bags = [joined(samples) for samples in texts]
        if pair:  # a word counts by itself, and once more together with the place of its text
            bags = [list(map(add, bag, marked(samples))) for bag, samples in zip(bags, texts)]
        bag = counts(*bags)
        result["linear"], result["any"] = run(bag), run(bag, hidden=64)
    return result


def table(folder: Path) -> None:
    print(f"{'':10}" + "".join(f"{column:>10}" for column in [*COLUMNS, "best"]))
    for name in TASKS:
        splits = [data.load(folder, [name], split, 32)[1][name] for split in ("train", "val")]
        found = measure(*splits)
        found["best"] = max(value for column, value in found.items() if column != "any")
        print(f"{name:10}" + "".join(f"{found[c]:10.1f}" if c in found else f"{'-':>10}"
                                     for c in [*COLUMNS, "best"]), flush=True)


# ---- Yardsticks for data of one's own ------------------------------------------------------------
# What a plain system makes of it in a minute or two on one core.
HEIGHT, WIDTH, STRIDE = 120, 160, 4  # of pictures, and of the map of centres


class Centres(nn.Module):
    """Boxes as points: for each place of a map the classes' scores, the centre's offset in the
    place, and the logarithm of width and height in places."""

    def __init__(self, classes: int, width: int = 64):
        super().__init__()
        layers, channels = [], 3
        for after, stride in ((width // 2, 2), (width, 2), (width, 1), (width, 1), (width, 1)):
            layers += [nn.Conv2d(channels, after, 3, stride, 1), nn.GroupNorm(8, after), nn.ReLU()]
            channels = after
        self.body = nn.Sequential(*layers, nn.Conv2d(width, classes + 4, 1))
        self.body[-1].bias.data[:classes] = -4.0  # few places have a centre

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, 120, 160) -> (B, C + 4, 30, 40)"""
        return self.body(F.group_norm(images, 1))


def centres_of(boxes: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """boxes (n, 4) cx, cy, w, h in [0, 1] -> what `Centres` should say: heat (C, 30, 40) and, for
    each box, row, column, two offsets and two logarithms (n, 6)."""
    rows, columns = HEIGHT // STRIDE, WIDTH // STRIDE
    scale = torch.tensor([columns, rows, columns, rows])
    x, y, w, h = (boxes * scale).unbind(1)
    column, row = x.long().clamp(max=columns - 1), y.long().clamp(max=rows - 1)
    away = (((torch.arange(rows)[None, :, None] - row[:, None, None]) / h[:, None, None]) ** 2
            + ((torch.arange(columns)[None, None] - column[:, None, None]) / w[:, None, None]) ** 2)
    heat = torch.zeros(classes, rows, columns)
    for label, spot in zip(labels, torch.exp(-20 * away)):  # 1 at the centre, 0.3 at w / 4
        heat[label] = torch.maximum(heat[label], spot)
    return heat, torch.stack([row, column, x - column, y - row, w.log(), h.log()], 1)


def centre_loss(out: Tensor, heat: Tensor, places: list[Tensor]) -> Tensor:
    """CenterNet's: focal loss of the heat, L1 of the box at each centre."""
    logits = out[:, :-4]
    p = logits.sigmoid()
    on = -(heat == 1).float() * (1 - p) ** 2 * F.logsigmoid(logits)
    off = -(heat < 1).float() * (1 - heat) ** 4 * p ** 2 * F.logsigmoid(-logits)
    loss = on.sum() + off.sum()
    for picture, place in zip(out, places):
        row, column = place[:, :2].long().unbind(1)
        loss = loss + (picture[-4:, row, column].T - place[:, 2:]).abs().sum()
    return loss / max(1, sum(map(len, places)))


@torch.no_grad()
def centre_boxes(out: Tensor, size) -> np.ndarray:
    """(C + 4, 30, 40) of a picture of height, width `size` -> (100, 6) x, y, w, h, score, class."""
    heat = out[:-4].sigmoid()
    heat = heat * (heat == F.max_pool2d(heat[None], 3, 1, 1)[0])
    scores, index = heat.flatten().topk(100)
    rows, columns = heat.shape[1:]
    label, place = index // (rows * columns), index % (rows * columns)
    dx, dy, w, h = out[-4:].flatten(1)[:, place]
    x, y, w, h = place % columns + dx, place // columns + dy, w.exp(), h.exp()
    pixels = torch.tensor([size[1] / columns, size[0] / rows] * 2)
    boxes = torch.stack([x - w / 2, y - h / 2, w, h], 1) * pixels
    return torch.column_stack([boxes, scores, label]).double().numpy()


def pixels_of(dataset, height: int, width: int) -> Tensor:
    """(n, 3, height, width), each picture stretched to it."""
    return torch.stack([F.interpolate(dataset.picture(n)[None].float(), (height, width),
                                      mode="area")[0] for n in range(len(dataset))])


def detection(train, val) -> None:
    """AP50 of `Centres` after 60 and 150 seconds; flips, batches of 8."""
    images, held_out = (pixels_of(dataset, HEIGHT, WIDTH) for dataset in (train, val))
    samples, classes = [train.sample(n) for n in range(len(train))], len(train.class_names)
    torch.manual_seed(0)
    model = Centres(classes)
    optimizer, start = torch.optim.AdamW(model.parameters(), lr=2e-3), time.process_time()
    for seconds in (60, 150):
        while time.process_time() < start + seconds:
            x, heats, places = [], [], []
            for n in torch.randint(len(images), (8,)).tolist():
                mirrored, boxes = torch.rand(()) < 0.5, samples[n].boxes.clone()
                if mirrored:
                    boxes[:, 0] = 1 - boxes[:, 0]
                heat, place = centres_of(boxes, samples[n].labels, classes)
                x.append(images[n].flip(2) if mirrored else images[n])
                heats.append(heat)
                places.append(place)
            optimizer.zero_grad()
            centre_loss(model(torch.stack(x)), torch.stack(heats), places).backward()
            optimizer.step()
        with torch.no_grad():
            outputs = [model(image[None])[0] for image in held_out]
        items = [(int(number), centre_boxes(out, size), (0, 0))
                 for number, out, size in zip(val.ids, outputs, val.sizes)]
        show(f"centre points, {seconds} s", val, items, "AP50")


def show(name: str, val, answers: list, metric: str = "accuracy") -> None:
    """`answers`: items of `eval.score`, or of a classification task a class for each sample."""
    items = answers if metric == "AP50" else list(enumerate(answers))
    print(f"  {name:<28}{evaluation.score(val, range(len(val)), items)[metric]:6.1f}", flush=True)


def tf_idf(train: list, val: list) -> tuple[Tensor, Tensor]:
    """Lists of terms -> sparse (n, f): how often a term occurs, times log(n / samples with it)."""
    seen = Counter(itertools.chain(*map(set, train)))
    terms = dict(zip([term for term, count in seen.items() if count > 1], itertools.count()))
    weight = [math.log(len(train) / seen[term]) + 1 for term in terms]
    tables = []
    for samples in (train, val):
        rows, columns, values = [], [], []
        for row, sample in enumerate(samples):
            found = Counter(terms[term] for term in sample if term in terms)
            norm = math.sqrt(sum((count * weight[n]) ** 2 for n, count in found.items()))
            rows += [row] * len(found)
            columns += found
            values += [count * weight[n] / norm for n, count in found.items()]
        tables.append(torch.sparse_coo_tensor(torch.tensor([rows, columns]), torch.tensor(values),
                                              (len(samples), len(terms))).to_sparse_csr())
    return tables[0], tables[1]


def texts(train, val) -> None:
    """The most frequent label, and logistic regression on TF-IDF of words and pairs of words."""
    y = labels(train)
    show("most frequent label", val, [int(y.bincount().argmax())] * len(val))
    x, x_val = tf_idf(marked(words(train), with_pairs), marked(words(val), with_pairs))
    weights = torch.zeros(x.shape[1], len(train.class_names), requires_grad=True)
    optimizer = torch.optim.Adam([weights], lr=0.1)
    for _ in range(200):
        optimizer.zero_grad()
        loss = F.cross_entropy(x @ weights, y) + 3e-6 * weights.square().sum()
        loss.backward()
        optimizer.step()
    show("text: TF-IDF, logistic", val, (x_val @ weights).argmax(1).tolist())


def questions(train, val, seconds: int = 90) -> None:
    """A small network on the picture at 64 x 64, and the words of its text, counted."""
    x, x_val = (pixels_of(dataset, 64, 64) for dataset in (train, val))
    bag, bag_val = counts(joined(words(train)), joined(words(val)), presence=False)
    y, classes = labels(train), len(train.class_names)
    torch.manual_seed(0)
    picture = nn.Sequential(
        nn.Conv2d(3, 32, 3, 2, 1), nn.ReLU(), nn.Conv2d(32, 64, 3, 2, 1), nn.GroupNorm(8, 64),
        nn.ReLU(), nn.Conv2d(64, 64, 3, 2, 1), nn.GroupNorm(8, 64), nn.ReLU(),
        nn.AdaptiveMaxPool2d(2), nn.Flatten(), nn.Linear(256, 64))
    answer = nn.Sequential(nn.Linear(64 + bag.shape[1], 128), nn.ReLU(), nn.Linear(128, classes))
    optimizer = torch.optim.AdamW([*picture.parameters(), *answer.parameters()], lr=1e-3)

    def run(images, bags):
        return answer(torch.cat([picture(F.group_norm(images, 1)), bags], 1))
    start = time.process_time()
    while time.process_time() < start + seconds:
        rows = torch.randint(len(y), (64,))
        optimizer.zero_grad()
        F.cross_entropy(run(x[rows], bag[rows]), y[rows]).backward()
        optimizer.step()
    with torch.no_grad():
        found = run(x_val, bag_val).argmax(1).tolist()
    show(f"network, words counted, {seconds} s", val, found)


def yardsticks(folder: Path) -> None:
    for task in data.TASKS:
        files = [file for split in ("train", "val") for file in task.dataset.needed(folder, split)]
        if not all((folder / file).exists() for file in files):
            continue
        train, val = (task.dataset(task, folder, split, image_size=WIDTH, augment="none")
                      for split in ("train", "val"))
        print(f"{task.name}, held out ({len(val):,} samples):")
        if task.kind == "detection":
            detection(train, val)
        if task.text:
            texts(train, val)
        if task.text and task.image:
            questions(train, val)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, metavar="DIR", help="folder of the data sets")
    args = parser.parse_args()
    torch.set_num_threads(1)  # small matrices: more threads only wait for each other
    if args.data:
        return yardsticks(args.data)
    with tempfile.TemporaryDirectory() as folder:
        data.write_tiny(folder)
        table(Path(folder))


if __name__ == "__main__":
    main()
