"""Tasks of one's own, to run as they are or to copy and change: `--tasks_from tests/own.py`.

| task        | its files, under --data                                                            |
|-------------|------------------------------------------------------------------------------------|
| `count`     | COCO's; the answer is the number of boxes in a picture                             |
| `questions` | `questions/{train,val}.tsv`, picture, question, answer; `questions/pictures`       |
| `sentences` | `sentences/{train,val}.tsv`, one or two columns of text, then the label            |

The tables begin with a line that names the columns; tabs separate them. The classes are those of
the training table.
"""

from dataclasses import replace

import numpy as np

import data
from unit import Task


class Count(data.Classification):
    """How many objects are in the picture? It has no texts, hence the empty lists."""

    files = {split: data.Coco.files[split] for split in ("train", "val")}
    class_names = [str(number) for number in range(10)] + ["10 or more"]

    def read(self):
        coco = data.Coco(data.TASKS[0], self.data, self.split)
        self.folder, counts = coco.folder, np.diff(coco.starts).clip(max=10)
        rows = zip(coco.ids, counts, coco.names)
        self.fill([(number, count, picture, []) for number, count, picture in rows])


class Sentences(data.Glue):
    files = {"train": ["sentences/train.tsv"], "val": ["sentences/val.tsv"]}
    fewest = 2  # columns

    def read(self):
        path = self.data / self.files["train"][0]
        header, *rows = [line.split("\t") for line in data.read_lines(path) or [""]]
        if not self.fewest <= len(header) <= 3:
            raise data.bad(path, f"line 1: {len(header)} columns, not {self.fewest} to 3",
                           "name them there as the README does, with tabs between")
        self.fields = [name.strip() for name in header]
        labels = {row[-1].strip() for row in rows if len(row) == len(header)}
        self.class_names = self.words = sorted(labels)
        self.task = replace(self.task, num_classes=len(labels))
        super().read()


class Questions(Sentences):
    files = {"train": ["questions/train.tsv"], "val": ["questions/val.tsv"]}
    fewest = 3

    def fill(self, rows):
        """The first of the two texts is the picture's name."""
        self.folder = self.data / "questions/pictures"
        super().fill([(n, answer, texts[0], texts[1:]) for n, answer, _, texts in rows])


data.TASKS += [
    Task("count", kind="classification", image=True, text=False, num_classes=11, dataset=Count),
    Task("questions", kind="classification", image=True, text=True, num_classes=0, max_tokens=25,
         dataset=Questions),
    Task("sentences", kind="classification", image=False, text=True, num_classes=0,
         dataset=Sentences)]
