"""What part of the input gives away: the baselines that the tiny run must beat by 15 points.

    python tests/baselines.py        # writes the tiny data sets to a temporary folder

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

import itertools
import re
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data  # noqa: E402

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


def bags(samples) -> list[list[str]]:
    """All words of each sample; of a pair each once more, together with the place of its text."""
    found = []
    for texts in samples:
        bag = sum(texts, [])
        for place, text in enumerate(texts if len(texts) > 1 else []):
            bag += [f"{word} {place}" for word in text]
        found.append(bag)
    return found


def counts(train: list, val: list) -> tuple[Tensor, Tensor]:
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
        tables.append(torch.cat([table, table.clamp(max=1)], 1))
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
    else:
        bag = counts(bags(texts[0]), bags(texts[1]))
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


def main() -> None:
    torch.set_num_threads(1)  # small matrices: more threads only wait for each other
    with tempfile.TemporaryDirectory() as folder:
        data.write_tiny(folder)
        table(Path(folder))


if __name__ == "__main__":
    main()
