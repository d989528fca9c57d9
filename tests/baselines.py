"""What part of the input gives away: the baselines that the tiny run must beat by 15 points.

    python tests/baselines.py                # writes the tiny data sets to a temporary folder
    python tests/baselines.py --data DIR     # yardsticks for what is in DIR: see the second half

For each classification task, held-out accuracy in percent of
* majority: the most frequent label of training;
* first, second: words (and pairs of neighbouring words) of one of the two sentences alone;
* text, picture: the same for the text without the picture; the pixels without a text;
* linear: a sum of a weight a word, for its count and its presence, of a pair by sentence, too;
* any: a network on the same counts, not in `best`: on a pair it knows which words occur together in
  the two sentences, which is the whole task except for word order. Scope decides SST-2: there it
  tells how much.
Each is trained at two strengths of weight decay, and the better on the held-out split is taken: too
good rather than not good enough.
"""

import argparse
import itertools
import math
import re
import sys
import tempfile
import time
from collections import Counter
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


def descend(optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


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
            descend(optimizer, F.cross_entropy(model(x[rows]), y[rows]))
        with torch.no_grad():
            best = max(best, (model(x_val).argmax(1) == y_val).double().mean().item())
    return 100 * best


def words(dataset, neighbours: bool = False) -> list[list[list[str]]]:
    """The words of each text of each sample: sample, text, word. `neighbours`: and each pair of
    neighbouring words, a little order."""
    samples = []
    for n in range(len(dataset)):
        texts = []
        for text in dataset.texts(n):
            found = re.sub("([?.,])", r" \1", str(text).lower()).split()
            pairs = [f"{a} {b}" for a, b in zip(found, found[1:])]
            texts.append(found + pairs if neighbours else found)
        samples.append(texts)
    return samples


def terms(samples) -> list[list[str]]:
    """Each sample's words; of a pair each once more with the place of its sentence."""
    bags = [sum(texts, []) for texts in samples]
    for bag, texts in zip(bags, samples):
        if len(texts) == 2:
            bag += [f"{word} {k}" for k, text in enumerate(texts) for word in text]
    return bags


def counts(train: list, val: list, least: int = 1) -> list[Tensor]:
    """Lists of terms -> sparse (n, f): how often each term occurs that `least` samples of training
    have."""
    seen = Counter(itertools.chain(*map(set, train)))
    known = sorted(term for term in seen if seen[term] >= least)
    column = dict(zip(known, itertools.count()))
    tables = []
    for samples in (train, val):
        places = [(row, column[term]) for row, sample in enumerate(samples) for term in sample
                  if term in column]
        index, ones = torch.tensor(places).T, torch.ones(len(places))
        table = torch.sparse_coo_tensor(index, ones, (len(samples), len(known)))
        tables.append(table.coalesce())
    return tables


def pixels(dataset, height: int, width: int, standard: bool = False) -> Tensor:
    """(n, 3, height, width), each picture stretched to it; `standard`: mean 0 and deviation 1."""
    pictures = []
    for n in range(len(dataset)):
        picture = data.normalise(dataset.picture(n))
        pictures.append(F.interpolate(picture[None], (height, width), mode="area"))
    images = torch.cat(pictures)
    return F.group_norm(images, 1) if standard else images


def labels(dataset) -> Tensor:
    """(n,) the class whose target score is highest."""
    return torch.tensor([int(dataset.scores(n).argmax()) for n in range(len(dataset))])


def measure(train, val) -> dict[str, float]:
    """{column: held-out accuracy} of one task."""
    y, y_val = labels(train), labels(val)
    result = {"majority": 100 * (y_val == y.bincount().argmax()).double().mean().item()}

    def accuracies(x, x_val):
        """Of a linear model and of a network."""
        return [fit((x, y), (x_val, y_val), train.task.num_classes, hidden) for hidden in (0, 64)]

    def of_words(train_terms, val_terms):
        """Of how often each term occurs, and whether it does."""
        tables = [table.to_dense() for table in counts(train_terms, val_terms)]
        return accuracies(*(torch.cat([table, table.clamp(max=1)], 1) for table in tables))

    texts = words(train, True), words(val, True)
    pair = len(texts[0][0]) == 2
    for k, column in enumerate(["first", "second"] if pair else ["text"]):
        if pair or train.task.image:
            result[column] = max(of_words(*([x[k] for x in samples] for samples in texts)))
    if train.task.image:
        pictures = (pixels(dataset, PICTURE, PICTURE).flatten(1) for dataset in (train, val))
        result["picture"] = max(accuracies(*pictures))
    else:
        bags = (terms(words(dataset)) for dataset in (train, val))
        result["linear"], result["any"] = of_words(*bags)
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


def centre_network(classes: int, width: int = 64) -> nn.Sequential:
    """(B, 3, 120, 160) -> (B, C + 4, 30, 40). Boxes as points: for each place of a map the classes'
    scores, the centre's offset in the place, and the logarithm of width and height in places."""
    layers, channels = [], 3
    for after, stride in ((width // 2, 2), (width, 2), (width, 1), (width, 1), (width, 1)):
        layers += [nn.Conv2d(channels, after, 3, stride, 1), nn.GroupNorm(8, after), nn.ReLU()]
        channels = after
    last = nn.Conv2d(width, classes + 4, 1)
    last.bias.data[:classes] = -4.0  # few places have a centre
    return nn.Sequential(*layers, last)


def centres_of(boxes: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """boxes (n, 4) cx, cy, w, h in [0, 1] -> the network's target: heat (C, 30, 40) and, for each
    box, row, column, two offsets and two logarithms (n, 6)."""
    rows, columns = HEIGHT // STRIDE, WIDTH // STRIDE
    x, y, w, h = (boxes * torch.tensor([columns, rows, columns, rows])).unbind(1)
    column, row = x.long().clamp(max=columns - 1), y.long().clamp(max=rows - 1)
    heat = torch.zeros(classes, rows, columns)
    for n, label in enumerate(labels):
        down = (torch.arange(rows) - row[n]) / h[n]
        across = (torch.arange(columns) - column[n]) / w[n]
        spot = torch.exp(-20 * (down[:, None] ** 2 + across ** 2))  # 1 at the centre, 0.3 at w / 4
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


def detection(train, val) -> None:
    """AP50 of centre points after 60 and 150 seconds; flips, batches of 8."""
    images, held_out = (pixels(dataset, HEIGHT, WIDTH, True) for dataset in (train, val))
    examples, classes = [], len(train.class_names)
    for n, image in enumerate(images):
        sample = train.sample(n)
        mirrored = sample.boxes * torch.tensor([-1, 1, 1, 1]) + torch.tensor([1, 0, 0, 0])
        examples.append((image, *centres_of(sample.boxes, sample.labels, classes)))
        examples.append((image.flip(2), *centres_of(mirrored, sample.labels, classes)))
    torch.manual_seed(0)
    model = centre_network(classes)
    optimizer, start = torch.optim.AdamW(model.parameters(), lr=2e-3), time.process_time()
    for seconds in (60, 150):
        while time.process_time() < start + seconds:
            chosen = torch.randint(len(examples), (8,)).tolist()
            x, heats, places = zip(*(examples[n] for n in chosen))
            out = model(torch.stack(x))
            descend(optimizer, centre_loss(out, torch.stack(heats), places))
        with torch.no_grad():
            outputs = [model(image[None])[0] for image in held_out]
        items = [(int(number), centre_boxes(out, size), (0, 0))
                 for number, out, size in zip(val.ids, outputs, val.sizes)]
        show(f"centre points, {seconds} s", val, items, "AP50")


def show(name: str, val, items, metric: str = "accuracy") -> None:
    """`items`: as of `eval.score`."""
    print(f"  {name:<28}{evaluation.score(val, range(len(val)), items)[metric]:6.1f}", flush=True)


def tf_idf(tables: list[Tensor]) -> list[Tensor]:
    """Sparse counts (n, f) of training and held-out samples -> each times log(n / samples of
    training with the term) + 1, and a sample's of norm 1."""
    weight = (len(tables[0]) / tables[0].indices()[1].bincount()).log() + 1
    weighted = []
    for table in tables:
        (row, term), values = table.indices(), table.values()
        values = values * weight[term]
        norm = torch.zeros(len(table)).index_add(0, row, values ** 2).sqrt()
        values = values / norm[row]
        weighted.append(torch.sparse_coo_tensor(table.indices(), values, table.shape))
    return weighted


def texts(train, val) -> None:
    """The most frequent label, and logistic regression on TF-IDF of words and pairs of words."""
    y = labels(train)
    show("most frequent label", val, enumerate([int(y.bincount().argmax())] * len(val)))
    bags = (terms(words(dataset, True)) for dataset in (train, val))
    x, x_val = (table.to_sparse_csr() for table in tf_idf(counts(*bags, least=2)))
    weights = torch.zeros(x.shape[1], len(train.class_names), requires_grad=True)
    optimizer = torch.optim.Adam([weights], lr=0.1)
    for _ in range(200):
        loss = F.cross_entropy(x @ weights, y) + 3e-6 * weights.square().sum()
        descend(optimizer, loss)
    show("text: TF-IDF, logistic", val, enumerate((x_val @ weights).argmax(1).tolist()))


def questions(train, val, seconds: int = 90) -> None:
    """A small network on the picture at 64 x 64, and the words of its text, counted."""
    x, x_val = (pixels(dataset, 64, 64, True) for dataset in (train, val))
    bags = (terms(words(dataset)) for dataset in (train, val))
    bag, bag_val = (table.to_dense() for table in counts(*bags))
    y, classes = labels(train), len(train.class_names)
    torch.manual_seed(0)
    picture = nn.Sequential(
        nn.Conv2d(3, 32, 3, 2, 1), nn.ReLU(), nn.Conv2d(32, 64, 3, 2, 1), nn.GroupNorm(8, 64),
        nn.ReLU(), nn.Conv2d(64, 64, 3, 2, 1), nn.GroupNorm(8, 64), nn.ReLU(),
        nn.AdaptiveMaxPool2d(2), nn.Flatten(), nn.Linear(256, 64))
    answer = nn.Sequential(nn.Linear(64 + bag.shape[1], 128), nn.ReLU(), nn.Linear(128, classes))
    optimizer = torch.optim.AdamW([*picture.parameters(), *answer.parameters()], lr=1e-3)

    def run(images, bags):
        return answer(torch.cat([picture(images), bags], 1))
    start = time.process_time()
    while time.process_time() < start + seconds:
        rows = torch.randint(len(y), (64,))
        descend(optimizer, F.cross_entropy(run(x[rows], bag[rows]), y[rows]))
    with torch.no_grad():
        found = run(x_val, bag_val).argmax(1).tolist()
    show(f"network, words counted, {seconds} s", val, enumerate(found))


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
    torch.sparse.check_sparse_tensor_invariants.enable()  # PyTorch warns where nobody says
    torch.set_num_threads(1)  # small matrices: more threads only wait for each other
    if args.data:
        return yardsticks(args.data)
    with tempfile.TemporaryDirectory() as folder:
        data.write_tiny(folder)
        table(Path(folder))


if __name__ == "__main__":
    main()
