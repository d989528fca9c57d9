"""Nothing lost: bad data, bad files, bad luck. Each case that real data sets and clusters have shown.

The generated cases are seeded: a failure names its case, and the same case fails again.
"""
import contextlib
import copy
import json
import math
import shutil
import signal

import numpy as np
import pytest
import torch

import data
import eval as evaluation
import unit
from test_data import TASK, make_vqa, picture, read, vocabulary, write
from unit import InputError


@contextlib.contextmanager
def within(seconds):
    """A hang is a failure too."""
    def stop(*_):
        raise TimeoutError(f"took more than {seconds} seconds")
    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# --------------------------------------------------------------------------------------------------
# Generated annotations: whatever is in the files, samples that can be used, or one line that names
# the file
# --------------------------------------------------------------------------------------------------

NASTY = [None, True, False, 0, -1, 1, 2, 3, 1.5, -0.0, 1e-9, 1e308, -1e308, math.inf, -math.inf,
         math.nan, 10**30, 2**63, -2**63, 10**400, "", " ", "1", "NaN", "-", "x" * 300, "\u2028",
         "a\tb\nc\r", "\x00", "\ud800", "ä猫", '"', "../../etc/passwd", "/etc/passwd", "..", ".",
         "b" * 300 + "/x.jpg", "\x00/x.jpg", "\ud800/x.jpg", "no such", [], [[]], [1, 2, 3],
         [1, 2, 3, 4], ["x"], [None], [[1, 2], [3]], {}, {"id": 1}, {"answer": "red"}]

# What is read, and the files of it to spoil.
READ = {
    ("coco", "val"): ["coco/annotations/instances_val2017.json"],
    ("coco", "test"): ["coco/annotations/image_info_test-dev2017.json"],
    ("vg", "train"): ["vg/image_data.json", "vg/attributes.json", "vg/objects_vocab.txt",
                      "vg/attributes_vocab.txt", "coco/annotations/instances_val2017.json"],
    ("vg", "val"): ["vg/instances_val.json"],
    ("vqa2", "train"): ["vqa2/v2_OpenEnded_mscoco_train2014_questions.json",
                        "vqa2/v2_mscoco_val2014_annotations.json", "vg/question_answers.json",
                        "vg/image_data.json", "coco/annotations/instances_val2017.json"],
    ("vqa2", "val"): ["vqa2/v2_OpenEnded_mscoco_val2014_questions.json",
                      "vqa2/v2_mscoco_val2014_annotations.json", "vqa2/answers_vqa.txt"],
    ("snli_ve", "val"): ["snli_ve/snli_ve_dev.jsonl"],
    ("qnli", "val"): ["glue/QNLI/dev.tsv", "bert/vocab.txt"],
    ("mnli", "val"): ["glue/MNLI/dev_mismatched.tsv"], ("qqp", "val"): ["glue/QQP/dev.tsv"],
    ("sst2", "test"): ["glue/SST-2/test.tsv"]}


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A folder in the official formats, a few records of everything."""
    root = tmp_path_factory.mktemp("good")
    make_vqa(root, ["<unk>", "0", "blue", "red"])
    path = root / "coco/annotations/instances_val2017.json"
    content = json.loads(path.read_text())
    content["annotations"] += [
        dict(id=n, image_id=500, category_id=3, bbox=[n, 2, 9.5, 8], iscrowd=n % 2, area=76)
        for n in (2, 3)]
    write(path, content)
    write(root / "coco/annotations/image_info_test-dev2017.json",
          {k: v for k, v in content.items() if k != "annotations"})
    shutil.copytree(root / "coco/val2017", root / "coco/test2017")
    prepared = data.prepare_vg(root)[0]["train"]
    write(root / "vg/instances_val.json", prepared)
    for name in ("11", "22"):
        picture(root / f"snli_ve/flickr30k_images/{name}.jpg", (30, 20))
    write(root / "snli_ve/snli_ve_dev.jsonl", "".join(json.dumps(dict(
        Flickr30K_ID=name, sentence2="a red dog .", gold_label=label, pairID=name + ".jpg#0r1n"))
        + "\n" for name, label in zip(("11", "22", "11"), ("neutral", "contradiction", "-"))))
    tables = {
        "QNLI/dev": ("index question sentence label", [("0", "what ?", '"a cat', "entailment")]),
        "MNLI/dev_mismatched": ("index sentence1 sentence2 label1 gold_label",
                                [("0", "a cat", "a dog", "-", "neutral"),
                                 ("1", "a cat", "a dog", "-", "-")]),
        "QQP/dev": ("id qid1 qid2 question1 question2 is_duplicate",
                    [("1", "1", "2", "what ?", "is it ?", "0")]),
        "SST-2/test": ("index sentence", [("0", "a red cat ")])}
    for name, (header, rows) in tables.items():
        lines = ["\t".join(row) for row in [header.split(), *rows * 3]]
        write(root / f"glue/{name}.tsv", "\n".join(lines) + "\n")
    return root


def places(node):
    """All (container, key) of a parsed JSON file."""
    items = node.items() if isinstance(node, dict) else enumerate(node)
    for key, value in items:
        yield node, key
        if isinstance(value, (dict, list)):
            yield from places(value)


def spoil_json(content, rng):
    """One to three changes anywhere in it."""
    content = copy.deepcopy(content)
    for _ in range(rng.integers(1, 4)):
        found = list(places(content)) if isinstance(content, (dict, list)) else []
        if not found or rng.random() < 0.02:
            return NASTY[rng.integers(len(NASTY))]
        node, key = found[rng.integers(len(found))]
        nasty, what = copy.deepcopy(NASTY[rng.integers(len(NASTY))]), rng.random()
        if what < 0.15:
            del node[key]
        elif what < 0.25 and isinstance(node, list):
            node.append(copy.deepcopy(node[key]))  # twice the same record
        elif what < 0.35:
            node[key] = [node[key]]
        elif what < 0.45 and isinstance(node[key], (int, float)):
            node[key] = str(node[key]) if rng.random() < 0.5 else -node[key] * rng.normal()
        else:
            node[key] = nasty
    return content


def spoil_text(text, rng):
    """One to three changes to lines, cells or letters."""
    for _ in range(rng.integers(1, 4)):
        lines = text.split("\n")
        at, what = rng.integers(len(lines)), rng.integers(7)
        nasty = NASTY[rng.integers(len(NASTY))]
        if what == 0:
            del lines[at]
        elif what == 1:
            lines.insert(at, lines[rng.integers(len(lines))])
        elif what == 2:
            lines[at] += "\t" + str(nasty)
        elif what == 3:
            cells = lines[at].split("\t")
            cells[rng.integers(len(cells))] = str(nasty)
            lines[at] = "\t".join(cells)
        elif what == 4:
            lines[at] = lines[at].replace("\t", " ", 1)
        elif what == 5:
            lines[at] = '"' + lines[at] + "\r"
        else:
            lines[at] = lines[at][:rng.integers(len(lines[at]) + 1)]
        text = "\n".join(lines)
    return text


def spoil_bytes(raw, rng):
    """Cut short, begun with a byte order mark, or a byte changed."""
    at, what = int(rng.integers(len(raw))), rng.integers(4)
    if what == 0:
        return raw[:at]
    if what == 1:
        return b"\xef\xbb\xbf" + raw
    letter = bytes([rng.integers(256)]) if what == 2 else b"\x00"
    return raw[:at] + letter + raw[at + 1:]


def spoil(raw, name, rng):
    """A file's bytes -> what some script, editor, disk or download made of them."""
    if rng.random() < 0.15:
        return spoil_bytes(raw, rng)
    if name.endswith(".json"):
        text = json.dumps(spoil_json(json.loads(raw), rng))
    elif name.endswith(".jsonl") and rng.random() < 0.8:
        rows = spoil_json([json.loads(line) for line in raw.splitlines()], rng)
        text = "\n".join(map(json.dumps, rows if isinstance(rows, list) else [rows]))
    else:
        text = spoil_text(raw.decode(), rng)
    return text.encode("utf-8", "surrogatepass")


def check_detection(dataset, batch, rng):
    """Boxes inside the picture, labels the model has, finite losses and gradients, and a score."""
    torch.manual_seed(int(rng.integers(2**31)))
    task, boxes = dataset.task, [*map(len, batch.boxes)]
    for (box, labels) in zip(batch.boxes, batch.labels):
        low, high = box[:, :2] - box[:, 2:] / 2, box[:, :2] + box[:, 2:] / 2
        assert (box[:, 2:] > 0).all() and (low >= -1e-6).all() and (high <= 1 + 1e-6).all()
        assert ((labels > 0) & (labels < task.num_classes)).all() and len(labels) == len(box)
    head = unit.DetectionHead(4, task)
    hidden = torch.randn(2, len(boxes), 3, 4, requires_grad=True)
    terms = unit.detection_losses(unit.Outputs(hidden, *head(hidden)), batch, head)
    sum(term.sum() for term in terms.values()).backward()
    assert hidden.grad.isfinite().all() and all(t.isfinite().all() for t in terms.values())
    rows = np.array([[i, *rng.uniform(1, 30, 4), rng.random(), rng.integers(1, 4)]
                     for i in dataset.ids for _ in range(2)])
    truth = dataset.ground_truth()
    assert sorted(truth.getImgIds()) == sorted(dataset.ids)
    metrics = evaluation.average_precision(truth, rows, dataset.ids.tolist())
    assert all(0 <= value <= 100 for value in metrics.values())


def check_classification(dataset, batch):
    scores = batch.scores
    if dataset.split == "test":
        assert scores is None
        return
    assert scores.shape == (len(dataset), dataset.task.num_classes)
    assert ((scores >= 0) & (scores <= 1)).all()
    assert dataset.split != "train" or (scores.sum(1) > 0).all()
    logits = (10 * torch.randn(1, *scores.shape)).requires_grad_()
    loss = unit.classification_loss(logits, scores, dataset.task.soft_scores)
    loss.backward()
    assert loss.isfinite() and logits.grad.isfinite().all()
    if dataset.task.soft_scores:
        for index in range(len(dataset)):
            assert 0 <= evaluation.vqa_accuracy("red", dataset.answers(index)) <= 1


def check_usable(dataset, rng):
    """What was read goes through sampling, batching, losses and metrics."""
    dataset.summary.encode()  # can be printed
    if not len(dataset):
        return
    augmentation = np.random.default_rng(0) if dataset.split == "train" else None
    samples = [dataset.sample(n, augmentation) for n in range(len(dataset))]
    batch = data.collate(dataset.task, samples)
    if dataset.task.image:
        assert batch.images.isfinite().all() and (batch.sizes > 0).all()
    if dataset.task.text:
        assert batch.tokens.shape[1] <= dataset.task.max_tokens
        assert int(batch.tokens.max()) < len(data.read_lines(dataset.data / "bert/vocab.txt"))
    if dataset.task.kind == "classification":
        check_classification(dataset, batch)
    elif batch.boxes is not None:
        check_detection(dataset, batch, rng)


CASES = 52  # of each of the 21 files: 1,092


@pytest.mark.parametrize("name, split, file", [(*key, file) for key, files in READ.items()
                                               for file in files])
def test_generated_annotations(good, name, split, file):
    path, outcome, faults = good / file, {"usable": 0, "refused": 0}, []
    raw = path.read_bytes()
    check_all(good, name, split, np.random.default_rng(0))
    try:
        for case in range(CASES):
            rng = np.random.default_rng([case, *map(ord, name + split + file)])
            path.write_bytes(spoil(raw, file, rng))
            try:
                with within(20):
                    check_all(good, name, split, rng)
                outcome["usable"] += 1
            except InputError as error:
                outcome["refused"] += 1
                if str(good) not in str(error) or "\n" in str(error) or ";" not in str(error):
                    faults.append(f"case {case}: file, problem; fix in one line? {error}")
            except Exception as error:
                faults.append(f"case {case}: {error!r}")
    finally:
        path.write_bytes(raw)
    assert not faults, "\n".join(faults)
    assert min(outcome.values()) > 0, outcome  # else one of the two was never tried


def check_all(root, name, split, rng):
    dataset = read(name, root, split, tiny=True)
    if dataset.task.text:
        dataset.tokenizer = data.Tokenizer(root / "bert/vocab.txt")
    check_usable(dataset, rng)
