"""Section 4: from a data set to the numbers that the paper prints, to files and to pictures.

    python eval.py --checkpoint runs/T3.5/last.pt --data data --tasks coco,vqa2
    python eval.py --checkpoint runs/T3.5/last.pt --image cat.jpg --question "what is on the mat?"

| task       | metric             | computed by                                            |
|------------|--------------------|--------------------------------------------------------|
| coco, vg   | AP, AP50           | `average_precision`, with pycocotools                  |
| vg         | attribute_accuracy | `attribute_hits`                                       |
| vqa2       | accuracy           | `vqa_accuracy`, the official scorer's rule             |
| all others | accuracy           | share of right labels; for qqp also F1 of "duplicate"  |

Results are in percent, as in the paper's tables. By default --micro_batch is the training's, as
padding several images to one size changes the features near the padding a little (as in DETR), and
AP with them. Under torchrun each process predicts its share, and rank 0 puts them together.
"""

import argparse
import contextlib
import functools
import gc
import itertools
import json
import os
import tempfile
import textwrap
import zipfile
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFont
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

import data
import unit  # before torchvision, which it may have to mend first
from unit import Batch, Config, Detections, InputError, Task, UniT

from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights
from torchvision.ops import box_convert, box_iou
from torchvision.transforms.functional import to_pil_image


# ---- Metrics -------------------------------------------------------------------------------------
def vqa_accuracy(answer: str, given: list[str]) -> float:
    """Agreement with the annotators' answers in 0..1: min(1, 3 k / n), where k of n agree.

    Of ten this is what the official evaluation (footnote 1) computes: the mean over all ways to
    leave one annotator out of min(1, agreeing / 3): 0, 0.3, 0.6, 0.9 or 1. Own data may have fewer
    answers. `Vqa2.scores` follows the same rule."""
    answer, *given = (x.replace("\n", " ").replace("\t", " ").strip() for x in [answer, *given])
    # A trap: where ten answers are one string, the official script compares them as they are.
    if len(given) != 10 or len(set(given)) > 1:
        answer, *given = (data.normalise_answer(x) for x in [answer, *given])
    return min(1.0, 3 * given.count(answer) / len(given))


def f1_score(predicted: np.ndarray, truth: np.ndarray) -> float:
    """F1 of class 1 in 0..1, GLUE's second number for QQP: 2 TP / (2 TP + FP + FN)."""
    hits = np.sum((predicted == 1) & (truth == 1))
    return 2 * hits / max(1, np.sum(predicted == 1) + np.sum(truth == 1))


def average_precision(truth: COCO, found: dict[int, np.ndarray], block: int = 200) -> dict:
    """AP (Section 4.1's mAP, mean over IoU 0.50..0.95) and AP50 in percent, over the images in
    `found`: {image id: its detections, as `to_rows` returns them}.

    pycocotools keeps a record for each class x area x image, which takes gigabytes with VG's 1,600
    classes and 2,000 images. Classes do not affect each other, so we score them block by block,
    and for one range of areas, all that AP needs: the same numbers in a third of the time. As in
    pycocotools, classes without a (non-crowd) box in these images do not count in the mean.
    Returns {} if there are no boxes at all."""
    images = list(found)
    boxes = truth.loadAnns(truth.getAnnIds(imgIds=images, iscrowd=False))
    classes = sorted({box["category_id"] for box in boxes})
    if not classes:
        return {}
    predicted, precision = COCO(), []
    gc.disable()  # it would visit millions of new dicts again and again: 6 times as slow
    try:
        with contextlib.redirect_stdout(None):  # pycocotools prints
            predicted.dataset = {"annotations": to_annotations(found)}
            predicted.createIndex()
            for start in range(0, len(classes), block):
                scorer = COCOeval(truth, predicted, "bbox")
                scorer.params.imgIds = images
                scorer.params.catIds = classes[start:start + block]
                scorer.params.maxDets = [100]
                scorer.params.areaRng, scorer.params.areaRngLbl = [[0, 1e10]], ["all"]
                scorer.evaluate()
                scorer.accumulate()
                precision.append(scorer.eval["precision"][..., 0, 0])  # (10 IoUs, recalls, classes)
    finally:
        gc.enable()
    precision = np.concatenate(precision, axis=2)
    return {"AP": 100 * precision.mean(), "AP50": 100 * precision[0].mean()}


def to_rows(found: Detections) -> np.ndarray:
    """One image's detections (q, 6): x, y, w, h in pixels, score, class."""
    boxes = box_convert(found.boxes.double(), "xyxy", "xywh")
    return torch.column_stack([boxes, found.scores, found.labels]).numpy()


def to_annotations(found: dict[int, np.ndarray]) -> list[dict]:
    """COCO.loadRes's records, numbered from 1, as 0 means "not matched". Image ids stay integers:
    some exceed 2**53, above which doubles have gaps."""
    records = []
    for image, rows in found.items():
        for x, y, w, h, score, label in rows.tolist():
            records.append({"id": len(records) + 1, "image_id": image, "category_id": int(label),
                            "bbox": [x, y, w, h], "score": score, "area": w * h})
    return records


def attribute_hits(found: Detections, boxes, labels, attributes) -> tuple[int, int]:
    """(right, counted) in one image of VG. The truth is boxes (n, 4) x0, y0, x1, y1 in pixels,
    labels (n,), attributes (n, 16) padded with -1.

    A true box with attributes counts if a prediction of its class overlaps it by an IoU of at least
    0.5. It is right if the top attribute of the one that overlaps it most is among its own."""
    iou = box_iou(boxes.double(), found.boxes.double())               # (n, q)
    best = iou.masked_fill(labels[:, None] != found.labels, 0).max(1)
    counted = (best.values >= 0.5) & (attributes >= 0).any(1)
    right = (attributes == found.attributes[best.indices][:, None]).any(1)
    return int((right & counted).sum()), int(counted.sum())


# ---- Evaluation ----------------------------------------------------------------------------------
PART = {"samples", "of"}  # in a task's results beside its metrics, if not all samples were scored
print_once = functools.cache(print)  # each evaluation of a training meets the same pictures again


def evaluate(model: UniT, datasets: dict, device, micro_batch: int = 0, num_workers: int = 0,
             limit: int = 0, precision: str = "fp32", out=None, allow_partial=False) -> dict:
    """{task: {metric: percent}}; with `out`, the predictions go to OUT/predictions.

    A score over a part of its split has the two numbers beside it, "samples" and "of". A test
    split's file that would lack samples is an InputError, unless `allow_partial`.
    micro_batch: samples at a time; 0: one image, or 32 texts. limit: at most this many of a task,
    always the same ones; 0: all.
    Under torch.distributed all processes call this; rank 0 gets the results, the others {}."""
    was_training, results = model.training, {}
    model.eval()
    for name, dataset in datasets.items():
        indices, total = drawn_indices(len(dataset), limit), len(dataset) + dataset.missing
        require_whole(dataset, total - len(indices), allow_partial)  # before the work
        items, unusable = predict_split(model, dataset, indices, device, micro_batch, num_workers,
                                        precision)
        if processes()[0] > 0:
            continue
        for reason in unusable.values():
            print_once(f"warning: {reason}")
        if dataset.missing or unusable:
            print(f"warning: {name}: evaluated on {len(items)} of {total} samples (pictures "
                  f"missing: {dataset.missing}, unusable: {len(unusable)})", flush=True)
        require_whole(dataset, total - len(items), allow_partial)
        if not items:
            print(f"{name}: no samples")
            continue
        if out is not None:
            write_predictions(out / "predictions", dataset, items)
        indices = [index for index in indices.tolist() if index not in unusable]
        if metrics := score(dataset, indices, items):
            results[name] = {metric: round(float(x), 6) for metric, x in metrics.items()}
            if len(items) < total:
                results[name] |= {"samples": len(items), "of": total}
    model.train(was_training)
    return results


def drawn_indices(total: int, limit: int) -> np.ndarray:
    """`limit` of `total` indices (0: all), in order; random, as labels may be periodic."""
    return np.sort(np.random.default_rng(0).permutation(total)[:limit or total])


def require_whole(dataset, lacking: int, allow_partial: bool) -> None:
    """A test server refuses a file that lacks samples, or counts them as wrong."""
    if dataset.split == "test" and lacking and not allow_partial:
        raise InputError(f"{dataset.path}: {lacking} of its samples are missing ({dataset.missing} "
                         "without picture): no file for the test server, unless --allow_partial")


def predict_split(model: UniT, dataset, indices, device, micro_batch: int, num_workers: int,
                  precision: str) -> tuple[list, dict]:
    """An item of `predictions` for each sample that can be used, and {index: reason} of the others.
    Each process predicts its share of the indices and gets what all of them found."""
    rank, world = processes()
    indices = np.array_split(indices, world)[rank]
    batches = data.eval_loader(dataset, indices, micro_batch, num_workers, report=rank == 0)
    items, unusable = [], {}
    for batch, faults in batches:
        unusable |= faults
        if batch is not None:
            items += predictions(model, batch, device, precision)
    for part in gathered(unusable):
        unusable |= part
    return sum(gathered(items), []), unusable


def predictions(model: UniT, batch: Batch, device, precision: str = "fp32") -> list[tuple]:
    """One item a sample: (id, class), or (image id, rows, (right, counted) attributes)."""
    answers = run_model(model, batch, device, precision)
    if isinstance(answers, torch.Tensor):
        return list(zip(batch.ids, answers.argmax(-1).tolist()))
    items = []
    for i, found in enumerate(answers):
        hits = (0, 0)
        if batch.attributes is not None:
            corners = in_pixels(batch.boxes[i], batch.sizes[i])
            hits = attribute_hits(found, corners, batch.labels[i], batch.attributes[i])
        items.append((batch.ids[i], to_rows(found), hits))
    return items


def in_pixels(boxes: torch.Tensor, size: torch.Tensor) -> torch.Tensor:
    """Boxes (n, 4) cx, cy, w, h in [0, 1] of a picture of height, width `size` -> corners."""
    return box_convert(boxes, "cxcywh", "xyxy") * size.flip(0).repeat(2)


@torch.no_grad()
def run_model(model: UniT, batch: Batch, device, precision: str = "fp32"):
    """A batch's logits (B, C) in float32, or for detection a list of B Detections."""
    batch = batch.to(device)
    with autocast(device, precision):
        outputs = model(batch)
        if outputs.boxes is not None:
            return unit.postprocess(model, outputs, batch)
    logits = outputs.logits[-1].float()
    if model.tasks[batch.task].soft_scores:
        logits[:, 0] = -torch.inf  # class 0 is <unk>, which is never an answer (released system)
    return logits


def score(dataset, indices, items: list) -> dict:
    """The metrics of predictions, in percent; {} where the truth is not known (test splits)."""
    task, names = dataset.task, dataset.class_names
    if task.kind == "detection":
        found = {image: rows for image, rows, _ in items}
        metrics = average_precision(dataset.ground_truth(), found)
        right, counted = np.sum([hits for _, _, hits in items], axis=0)
        if counted:
            metrics["attribute_accuracy"] = 100 * right / counted
        return metrics
    answers = np.array([answer for _, answer in items])
    if task.soft_scores:
        given = [dataset.answers(index) for index in indices]
        agree = [vqa_accuracy(names[answer], ten) for answer, ten in zip(answers, given) if ten]
        return {"accuracy": 100 * np.mean(agree)} if agree else {}
    truth = np.array([dataset.label(index) for index in indices])
    if (truth < 0).any():
        return {}
    metrics = {"accuracy": 100 * np.mean(answers == truth)}
    if task.name == "qqp":
        metrics["F1"] = 100 * f1_score(answers, truth)
    return metrics


# ---- One input -----------------------------------------------------------------------------------
def predict(model: UniT, checkpoint: dict, image=None, text: str | None = None,
            text_pair: str | None = None, task: str | None = None) -> list[dict]:
    """The model's answers about a picture (its path), a text, or both, the likeliest first.

    Each is {"label", "score"}; in detection also "box", [x0, y0, x1, y1] in pixels of the upright
    picture, and "attribute" where the task has attributes."""
    task = choose_task(model, image is not None, text is not None, task)
    sample = data.Sample(id=0)
    if image is not None:
        pixels = data.read_image(image)  # upright, as no annotations disagree with its EXIF
        sample.size = tuple(pixels.shape[1:])
        floor = task.kind == "classification"  # as in the data sets
        pixels = data.resize_for_evaluation(pixels, model.config.image_size, floor)
        sample.image = data.normalise(pixels)
    if text is not None:  # a terminal may send bytes that are not UTF-8; they become "?"
        text, text_pair = (t and t.encode("utf-8", "replace").decode() for t in (text, text_pair))
        tokenizer = data.Tokenizer(checkpoint["vocab"])
        sample.tokens, sample.types = tokenizer.encode(text, text_pair, task.max_tokens)
    return answers_to(model, task, sample, checkpoint["labels"][task.name])


def answers_to(model: UniT, task: Task, sample, labels: dict) -> list[dict]:
    """The answers of `predict` to a data.Sample; `labels` are the checkpoint's, of this task."""
    device = next(model.parameters()).device
    answer, = run_model(model, data.collate(task, [sample]), device)
    if task.kind == "classification":
        # Trained with binary cross entropy, each answer is a yes-no question of its own.
        binary = task.soft_scores and model.config.binary_vqa_loss
        scores = answer.sigmoid() if binary else answer.softmax(-1)
        return [{"label": labels["classes"][i], "score": float(scores[i])}
                for i in scores.argsort(descending=True).tolist()]
    found = []
    for i in answer.scores.argsort(descending=True).tolist():
        found.append({"label": labels["classes"][answer.labels[i]],
                      "score": float(answer.scores[i]),
                      "box": [round(x, 1) for x in answer.boxes[i].tolist()]})
        if answer.attributes is not None:
            found[-1]["attribute"] = labels["attributes"][answer.attributes[i]]
    return found


def choose_task(model: UniT, image: bool, text: bool, name: str | None, question=True) -> Task:
    """The task of that name, or the model's first one with these inputs: for a picture and a text
    VQA (soft scores) if the text is a `question`, else SNLI-VE. For a text alone: its only task."""
    fit = [t for t in model.tasks.values() if (t.image, t.text) == (image, text)]
    if name is not None:
        chosen = [t for t in fit if t.name == name]
    elif image:
        chosen = [t for t in fit if t.soft_scores == (text and question)] or fit
    else:
        chosen = fit if len(fit) == 1 else []
    if not chosen:
        given = "an image and a text" if image and text else "an image" if image else "a text"
        if not fit:
            raise InputError(f"none of this model's tasks ({', '.join(model.tasks)}) takes {given} "
                             "alone; give --image, --question or --text as they need")
        raise InputError(f"--tasks {name or 'is needed'}: of this model's tasks, those that take "
                         f"{given} are: {', '.join(t.name for t in fit)}")
    return chosen[0]


# ---- Files: results, and predictions for the test servers ----------------------------------------
# File names that GLUE's server expects. Its zip has eleven files, of which four are ours (we do not
# know whether it accepts fewer). VQA's server wants all of test2015 even to score test-dev.
GLUE_FILES = {"qnli": "QNLI", "mnli": "MNLI-mm", "qqp": "QQP", "sst2": "SST-2"}


def require_writable(out: Path) -> None:
    """Creates the folder --out, and raises InputError before the work if it cannot be written."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
    except OSError as error:
        raise InputError(f"{out}: cannot write there ({error.strerror}); choose another --out")


def write_json(path: Path, value) -> None:
    with data.whole_file(path) as file:
        file.write(json.dumps(value, indent=1) + "\n")


def read_log(path: Path) -> list[dict]:
    """The records of a log.jsonl, if there is one, without any that a crash left half written."""
    records = []
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    for line in text.splitlines():
        with contextlib.suppress(ValueError):
            record = json.loads(line)
            if "iteration" in record:
                records.append(record)
    return records


def write_predictions(folder: Path, dataset, items: list) -> None:
    """One data set's file for its test server; other splits and tasks in the same format."""
    task, split, stem = dataset.task, dataset.split, dataset.path.stem
    if task.kind == "detection":
        # Of instances_val2017 or image_info_test-dev2017 the server wants the last part.
        part = stem.rpartition("_")[2] if task.name == "coco" else f"{task.name}_{split}"
        path = folder / f"detections_{part}_UniT_results.json"
        write_detections(path, dataset.class_names, items)
    elif task.soft_scores:  # v2_OpenEnded_mscoco_test2015_questions -> vqa_..._UniT_results
        stem = stem.replace("v2_", "vqa_").replace("questions", "UniT_results")
        answers = [{"question_id": i, "answer": dataset.class_names[a]} for i, a in items]
        write_json(folder / f"{stem}.json", answers)
    else:
        name, labels = GLUE_FILES.get(task.name, task.name), dataset.words or dataset.class_names
        if split != "test":
            name += f"_{split}"
        with data.whole_file(folder / f"{name}.tsv") as file:
            file.write("index\tprediction\n")
            file.writelines(f"{i}\t{labels[a]}\n" for i, a in items)


def write_detections(path: Path, names: list[str], items: list) -> None:
    """COCO's result JSON, boxes to 0.1 pixel, and a zip of it, without classes that do not exist
    (COCO's ten gaps). Texts, as test-dev has two million records, too many for dicts."""
    record = '{"image_id":%d,"category_id":%d,"bbox":[%.1f,%.1f,%.1f,%.1f],"score":%.5f}'
    records = []
    for image, rows, _ in items:
        for *box, score, label in rows.tolist():
            if names[int(label)]:
                records.append(record % (image, label, *box, score))
    with data.whole_file(path) as file:
        file.write("[" + ",\n".join(records) + "]")
    with data.whole_file(path.with_suffix(".zip"), "wb") as file:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.write(path, path.name)


# ---- Pictures (Figures 3, E.1 and D.1; Appendices D and E) ---------------------------------------
WIDTH, PAD, SIZE = 320, 10, 14  # of a tile, around it, of its letters; in pixels
FONT = ImageFont.load_default(SIZE)
COLOURS = ["#d62728", "#1f77b4", "#2ca02c", "#9467bd", "#d95f02", "#17808f", "#c2185b", "#6d4c41"]


def title(found: dict) -> str:
    return f"{found.get('attribute', '')} {found['label']}".strip()


def save_picture(picture: Image.Image, path) -> None:
    with data.whole_file(path, "wb") as file:
        picture.save(file, "PNG")


def draw_boxes(picture: Image.Image, found: list[dict], scale: float) -> Image.Image:
    """A copy of the picture, `scale` times as large (small ones have no room for letters), with the
    boxes that `predict` found (or the truth's); the first of `found` is drawn on top."""
    # A picture may be one pixel wide, or high: keep sides above 0 and small enough for memory.
    scale = min(scale, 10 * WIDTH / picture.height)
    width, height = (max(1, round(side * scale)) for side in picture.size)
    picture = picture.convert("RGB").resize((width, height), Image.Resampling.BOX)  # stays sharp
    draw, corner = ImageDraw.Draw(picture), [width - 1, height - 1] * 2
    boxes = [(np.array(thing["box"]) * scale).clip(0, corner).tolist() for thing in found]
    drawn = list(zip(found, boxes, itertools.cycle(COLOURS)))[::-1]
    for _, box, colour in drawn:
        draw.rectangle(box, outline=colour, width=3)
    for thing, (x, y, _, _), colour in drawn:  # names last: no line crosses them
        name = title(thing)
        if "score" in thing:
            name += f" {thing['score']:.2f}"
        x = max(0, min(x, width - draw.textlength(name, FONT) - 8))
        draw.text((x + 5, y + 3), name, "white", FONT, stroke_width=3, stroke_fill=colour)
    return picture


def tile(picture: Image.Image, lines: list[tuple[str, str]]) -> Image.Image:
    """A picture, and below it lines (text, colour), wrapped to a tile's width."""
    wrapped = []
    for text, colour in lines:
        for part in textwrap.wrap(text, 2 * WIDTH // SIZE, max_lines=9):
            wrapped.append((part, colour))
    step = SIZE + 5
    result = Image.new("RGB", (WIDTH, picture.height + 8 + step * len(wrapped)), "white")
    result.paste(picture)
    for i, (part, colour) in enumerate(wrapped):
        place = 0, picture.height + 4 + step * i
        ImageDraw.Draw(result).text(place, part, colour, FONT)
    return result


def save_grid(tiles: list[Image.Image], path) -> None:
    """Four tiles a row, as a PNG; no file without tiles."""
    if not tiles:
        return
    rows = [tiles[i:i + 4] for i in range(0, len(tiles), 4)]
    heights = [max(t.height for t in row) + PAD for row in rows]
    size = len(rows[0]) * (WIDTH + PAD) + PAD, sum(heights) + PAD
    sheet = Image.new("RGB", size, "white")
    for i, t in enumerate(tiles):
        sheet.paste(t, (PAD + i % 4 * (WIDTH + PAD), PAD + sum(heights[:i // 4])))
    save_picture(sheet, path)


def likely(found: list[dict]) -> list[dict]:
    return [thing for thing in found if thing["score"] >= 0.5]


def true_boxes(sample: data.Sample, labels: dict) -> list[dict]:
    """The boxes of a sample as `predict` returns its own, without scores."""
    boxes = in_pixels(sample.boxes, torch.tensor(sample.size))
    found = [{"label": labels["classes"][label], "box": box}
             for label, box in zip(sample.labels.tolist(), boxes.tolist())]
    if sample.attributes is not None:
        for thing, first in zip(found, sample.attributes[:, 0].tolist()):
            thing["attribute"] = labels["attributes"][first] if first >= 0 else ""
    return found


def show_sample(model: UniT, dataset, index: int) -> list[Image.Image]:
    """One held-out input with the model's answer: green if right, red with the truth if wrong. For
    detection two tiles, the prediction's boxes and the truth's."""
    task, sample, names = dataset.task, dataset.sample(index), dataset.class_names
    labels = {"classes": names, "attributes": dataset.attribute_names}
    answers = answers_to(model, task, sample, labels)
    picture, scale = Image.new("RGB", (WIDTH, 1), "white"), 1
    if task.image:  # boxes are in the pixels of this size
        picture = to_pil_image(dataset.picture(index)).resize(sample.size[::-1])
        scale = WIDTH / picture.width
    if task.kind == "detection":
        shown = {"prediction": likely(answers)}
        if sample.boxes is not None:
            shown["truth"] = true_boxes(sample, labels)
        return [tile(draw_boxes(picture, things, scale), [(f"{task.name}, {whose}", "#808080")])
                for whose, things in shown.items()]
    lines = [(task.name, "#808080")]
    lines += [(f'"{text}"', "black") for text in dataset.texts(index)]
    answer, colour, scores = answers[0]["label"], "#1b7f3b", sample.scores
    line = f"prediction: {answer}"
    if scores is not None and scores[names.index(answer)] < 0.5:
        line, colour = f"{line}  (truth: {names[scores.argmax()]})", "#c62828"
    return [tile(draw_boxes(picture, [], scale), [*lines, (line, colour)])]


def predictions_picture(model: UniT, datasets: dict, path) -> None:
    """Figures 3 and E.1: four inputs of each data set, and the answers of a model in eval mode."""
    tiles = []
    for dataset in datasets.values():
        for index in drawn_indices(len(dataset), 4):
            with contextlib.suppress(data.UnusablePicture):  # `evaluate` has printed which
                tiles += show_sample(model, dataset, index)
    save_grid(tiles, path)


def curves_picture(log, path) -> None:
    """Figure D.1: each metric against iterations, a panel per task, from a run's log.jsonl."""
    series = defaultdict(lambda: defaultdict(list))  # {task: {metric: [(iteration, value)]}}
    for entry in read_log(log):
        for task, metrics in entry.get("results", {}).items():
            for metric, value in metrics.items():
                if metric not in PART:
                    series[task][metric].append((entry["iteration"], value))
    save_grid([panel(task, metrics) for task, metrics in series.items()], path)


def panel(name: str, metrics: dict[str, list[tuple]]) -> Image.Image:
    """One plot of {metric: [(iteration, percent)]}, a line per metric."""
    plot = Image.new("RGB", (WIDTH, 190), "white")
    draw, (left, top, right, bottom) = ImageDraw.Draw(plot), (34, 10, WIDTH - 12, 165)
    iterations, values = np.concatenate(list(metrics.values())).T
    low, high = min(90, values.min() // 10 * 10), min(100, values.max() // 10 * 10 + 10)
    last = int(iterations.max())
    for value, y in ((low, bottom), (high, top)):
        draw.line((left, y, right, y), "#cccccc")
        draw.text((left - 5, y), f"{value:g}", "black", FONT, "rm")
    draw.text((right, bottom + 5), f"{last:,} iterations", "black", FONT, "ra")
    for points, colour in zip(metrics.values(), COLOURS):
        x, y = np.array(points).T
        x = np.interp(x, (0, last), (left, right))
        y = np.interp(y, (low, high), (bottom, top))
        draw.line([*zip(x, y)], colour, 2, joint="curve")
        for point in zip(x, y):
            draw.circle(point, 2, colour)
    return tile(plot, [(f"{name}, validation, percent", "black"), *zip(metrics, COLOURS)])


# ---- Processes and precision ---------------------------------------------------------------------
def start_processes() -> torch.device:
    """This process's device; joins torchrun's group if there is one (train.py's too).

    CPU tensors travel by gloo even where gradients go by NCCL, so the numbers that processes
    exchange between iterations (boxes counted, signals received) never synchronise the GPU."""
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        # cuDNN's attention has had NaN gradients under a mask (torch 2.13 on Hopper).
        torch.backends.cuda.enable_cudnn_sdp(False)
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    return device


def processes() -> tuple[int, int]:
    """This process's rank, and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def gathered(value) -> list:
    """`value` of each process, in the order of their ranks; waits for all of them."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def autocast(device, precision: str):
    kind = torch.device(device).type
    if (kind, precision) == ("cuda", "bf16") and not torch.cuda.is_bf16_supported(False):
        raise InputError("--precision bf16: this GPU does not support it; use fp16")
    return torch.autocast(kind, PRECISIONS[precision], enabled=precision != "fp32")


# ---- A trained model from its file ---------------------------------------------------------------
CHECKPOINT = {"model", "config", "tasks", "labels"}  # what train.py always saves
TORN = "previous.pt beside it may be whole; or get it again"


def read_checkpoint(path) -> dict:
    """The dict that train.py saved. A file that needs more than tensors and plain values is refused
    before any of its code runs."""
    fix = f"it is torn, or no checkpoint of train.py (the authors' files: --released); {TORN}"
    checkpoint = unit.read_file(path, fix)
    if not isinstance(checkpoint, dict) or not CHECKPOINT <= set(checkpoint):
        raise InputError(f"{path}: lacks model, config, tasks or labels; {fix}")
    return checkpoint


def load_checkpoint(path) -> tuple[UniT, dict]:
    """(model in eval mode, the file's dict): the file carries all settings that the model needs."""
    checkpoint = read_checkpoint(path)
    checkpoint.pop("optimizer", None)  # twice the model's memory
    try:
        model = UniT(Config(**checkpoint["config"]), [Task(**t) for t in checkpoint["tasks"]])
        model.load_state_dict(checkpoint["model"])
    except (TypeError, KeyError, RuntimeError) as e:  # TypeError: settings unknown to this version
        raise InputError(f"{path}: weights or settings do not fit this version; use the code of "
                         f"its training ({textwrap.shorten(str(e), 200)})") from None
    return model.eval(), checkpoint


def starting_weights(path) -> tuple[dict[str, torch.Tensor], dict[str, list[str]], str]:
    """Of a checkpoint of train.py, or a file of the authors': the tensors under our names, the
    names of each task's classes (where it has them), and its origin in words."""
    content = unit.read_file(path, TORN)
    if isinstance(content, dict) and CHECKPOINT <= set(content):
        classes = {task: names["classes"] for task, names in content["labels"].items()}
        length = content.get("train", {}).get("iterations")
        return content["model"], classes, f"iteration {content.get('iteration')} of {length}"
    return unit.load_released(path).state_dict(), {}, "the authors' weights"


def released_checkpoint(path, folder: Path) -> tuple[UniT, dict, str]:
    """The authors' model, a dict of what `predict` needs beside it, and its row of RELEASED. Their
    files hold no names: these come from `folder`; numbers replace those that are not there."""
    def lines(name):
        file = folder / name
        return data.read_lines(file) if file.exists() else [str(n) for n in range(1, 3130)]

    model = unit.load_released(path)
    labels = {t.name: {"classes": t.dataset.class_names} for t in data.TASKS}
    # torchvision knows COCO's names by category id.
    labels["coco"] = {"classes": FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]}
    labels["vqa2"] = {"classes": lines("vqa2/answers_vqa.txt")}
    # VG's ids start at 1; lines are names with aliases behind commas.
    classes = [line.split(",")[0] for line in lines("vg/objects_vocab.txt")]
    attributes = [line.split(",")[0] for line in lines("vg/attributes_vocab.txt")]
    labels["vg"] = {"classes": ["", *classes], "attributes": ["", *attributes]}
    name = "released-all" if len(model.tasks) > 1 else "released-coco"
    if not model.config.task_embedding:
        name += "-no-task"
    return model, {"labels": labels, "vocab": folder / "bert" / "vocab.txt"}, name


# ---- The paper's numbers -------------------------------------------------------------------------
def eight(*numbers: float) -> dict[str, float]:
    return dict(zip(("coco", "vg", "vqa2", "snli_ve", "qnli", "mnli", "qqp", "sst2"), numbers))


# Table 3: models of one task each (line 1), and those fine-tuned from line 5 (line 6).
SINGLE = eight(40.6, 3.87, 66.38, 70.52, 91.62, 84.23, 91.18, 91.63)
FINE_TUNED = eight(42.3, 4.68, 67.60, 72.56, 86.92, 81.53, 90.57, 88.06)
ABLATIONS = {  # COCO, SNLI-VE, MNLI; TC.1.6 diverged
    "T4.1": (38.79, 69.27, 81.41), "T4.2": (40.13, 68.17, 80.58), "T4.3": (39.02, 68.82, 81.15),
    "T4.4": (36.32, 69.68, 81.09), "T4.5": (38.24, 69.76, 81.31), "T4.6": (39.46, 69.06, 81.67),
    "T4.7": (38.61, 70.22, 81.45), "T4.8": (35.03, 68.57, 79.62),
    "TC.1.1": (38.79, 69.27, 81.41), "TC.1.2": (33.39, 68.53, 81.01),
    "TC.1.3": (36.65, 69.07, 80.64), "TC.1.4": (38.75, 68.66, 81.66),
    "TC.1.5": (38.63, 69.14, 81.09), "TC.1.6": (), "TC.1.7": (29.88, 70.39, 83.74),
    "TC.1.8": (39.96, 69.31, 79.88), "TC.1.9": (40.98, 68.72, 81.08),
    "TC.1.10": (38.88, 65.77, 61.47), "TC.1.11": (37.18, 65.01, 59.87),
    "TC.1.12": (37.87, 68.70, 81.11)}
# T<table>.<line> on validation: mAP of COCO and VG, else accuracy. Other systems are left out:
# DETR, VisualBERT and BERT in Table 3, and the comparisons of footnotes 6, 7 and 8.
PAPER = {
    **{f"T1.1-{t}": {t: SINGLE[t]} for t in ("coco", "vg", "vqa2")},
    "T1.2": dict(coco=40.8, vg=3.91, vqa2=68.84),
    "T1.3": dict(coco=37.2, vg=4.05, vqa2=68.79),
    "T1.4": dict(coco=40.8, vg=4.53, vqa2=67.30),
    **{f"T2.1-{t}": {t: SINGLE[t]} for t in ("coco", "vg", "vqa2")},
    "T2.2": dict(coco=40.2, vqa2=66.88),
    "T2.3": dict(vg=3.83, vqa2=68.49),
    "T2.4": dict(coco=40.8, vg=4.53, vqa2=67.30),
    **{f"T3.1-{t}": {t: x} for t, x in SINGLE.items()},
    "T3.2": eight(32.2, 2.54, 67.38, 74.31, 87.68, 81.76, 90.44, 89.40),
    "T3.3": eight(33.8, 2.69, 67.36, 74.14, 87.99, 81.40, 90.62, 89.40),
    "T3.4": eight(38.9, 3.22, 67.58, 74.20, 87.99, 81.33, 90.61, 89.17),
    "T3.5": eight(39.0, 3.29, 66.97, 73.16, 87.95, 80.91, 90.64, 89.29),
    **{f"T3.6-{t}": {t: x} for t, x in FINE_TUNED.items()},
    **{line: dict(zip(("coco", "snli_ve", "mnli"), row)) for line, row in ABLATIONS.items()}}
PAPER_TEST = {  # COCO and VQAv2 test-dev, SNLI-VE test, GLUE's server
    "T1.4": dict(coco=41.1, vqa2=67.47),
    "T2.4": dict(coco=41.1, vqa2=67.47),  # the same run as T1.4
    "T3.5": dict(vqa2=67.03, snli_ve=73.16, qnli=88.0, mnli=79.8, qqp=88.4, sst2=91.5)}
# What the authors report of their checkpoints, on validation. All tasks: mmf.sh/docs/projects/unit.
RELEASED = {
    "released-coco": dict(coco=40.54),
    "released-coco-no-task": dict(coco=40.15),
    "released-all": eight(38.99, 3.29, 66.96, 73.16, 87.90, 80.90, 90.65, 89.22),
    "released-all-no-task": eight(38.47, 3.31, 68.25, 74.07, 88.15, 80.61, 90.61, 88.50)}


def results_table(results: dict, experiment: str | None = None, split: str = "val") -> str:
    """Task, metric, this run's number, the paper's for `experiment` and, if the score is over part
    of the split, of how many samples."""
    theirs = (PAPER_TEST if split == "test" else PAPER | RELEASED).get(experiment)
    who = "authors" if experiment in RELEASED else "paper"
    rows = [("task", "metric", "this run", f"{who} {experiment}" if theirs else "", "")]
    for task, metrics in results.items():
        number = theirs.get(task, "-") if theirs else ""
        part = f"{metrics['samples']} of {metrics['of']} samples" if "of" in metrics else ""
        for metric, value in metrics.items():
            if metric not in PART:
                rows.append((task, metric, f"{value:.2f}", number, part))
            task = number = ""  # the paper's number is the first metric
    return "\n".join("{:<9} {:<18} {:>8} {:>14}  {}".format(*row).rstrip() for row in rows)


# ---- The command line ----------------------------------------------------------------------------
def parser() -> argparse.ArgumentParser:
    result = data.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    path, number = os.path.expanduser, functools.partial(unit.parse, kind=int)
    group = result.add_argument_group("the model (one of the two)")
    model = group.add_mutually_exclusive_group(required=True).add_argument
    model("--checkpoint", type=path, metavar="FILE", help="a file of train.py: runs/T3.3/last.pt")
    model("--released", type=path, metavar="FILE", help="the authors' .tar.gz, or the .pth in it")
    whole = result.add_argument_group("whole data sets").add_argument
    whole("--data", type=path, metavar="DIR", help="folder of the data sets [the training's, or "
                                                   "data]")
    whole("--tasks", type=lambda x: x.split(","), metavar="A,B", help="of the model's tasks [all]")
    whole("--split", choices=["val", "test"], default="val",
          help="test: writes the files for the test servers into OUT/predictions [val]")
    whole("--allow_partial", action="store_true", help="write them even if samples are missing")
    whole("--out", type=path, metavar="DIR",
          help="folder of all results [that of the model's file]")
    whole("--eval_samples", type=number, default=0, metavar="INT",
          help="of each task at most [0: all]")
    whole("--figures", action="store_true",
          help="draw predictions.png and (of a log.jsonl) curves.png")
    whole("--micro_batch", type=number, metavar="INT",
          help="samples at a time; 0: one image, or 32 texts [the training's, or 0]")
    whole("--num_workers", type=number, default=2, metavar="INT", help="data workers [2]")
    whole("--precision", choices=PRECISIONS, default="fp32", help="[fp32]")
    group = result.add_argument_group("one input (no data set needed)")
    group.add_argument("--image", type=path, metavar="FILE",
                       help="a picture; alone: prints and draws its boxes")
    text = group.add_mutually_exclusive_group().add_argument
    text("--question", metavar="TEXT", help="a question about --image")
    text("--text", metavar="TEXT", help="the sentence of a task, or a statement about --image")
    group.add_argument("--text_pair", metavar="TEXT", help="the second sentence of qnli, mnli, qqp")
    return result


def load_datasets(model: UniT, labels: dict, vocab, tasks, split: str, folder: Path) -> dict:
    """The split's data sets, in the word pieces that the model learned, and checked to have its
    classes (`labels`; {}: not known)."""
    if lost := [t for t in tasks if t not in model.tasks]:
        raise InputError(f"--tasks {lost[0]}: this model's tasks are {', '.join(model.tasks)}")
    _, datasets = data.load(folder, tasks, split, model.config.image_size, vocab=vocab)
    for name, dataset in datasets.items():
        names, size = list(dataset.class_names), model.tasks[name].num_classes
        if len(names) != size or (labels and names != labels[name]["classes"]):
            raise InputError(f"{dataset.path}: {name} has other classes than the model was trained "
                             f"for ({len(names)} against {size}); give the --data of its training, "
                             "or the same classes by id and name")
    return datasets


def answer_one(args, model: UniT, checkpoint: dict, out: Path) -> None:
    """Prints the model's answers about one input; detections are drawn too."""
    text = args.question or args.text
    for name in args.tasks or [None]:
        task = choose_task(model, bool(args.image), bool(text), name, bool(args.question))
        answers = predict(model, checkpoint, args.image, text, args.text_pair, task.name)
        detection = task.kind == "detection"
        shown = likely(answers) if detection else answers[:5]
        print(f"{task.name}:")
        for a in shown:
            print(f"{a['score']:8.1%}  {title(a):<24} {a.get('box', '')}".rstrip())
        if detection:
            picture = to_pil_image(data.read_image(args.image))
            path = out / f"prediction_{task.name}.png"
            save_picture(draw_boxes(picture, shown, max(1, WIDTH / picture.width)), path)
            print(f"{len(shown)} boxes of at least 50%, drawn into {path}")


def run(args: argparse.Namespace) -> None:
    device = start_processes()
    rank, _ = processes()
    one_input = args.image, args.question, args.text, args.text_pair
    if args.question and not args.image:
        raise InputError("--question is about a picture: give --image, too")
    if "" in one_input or (args.text_pair and not args.text):
        # An empty one would silently evaluate whole data sets.
        raise InputError("--image, --question, --text or --text_pair is empty, or --text_pair "
                         "comes without --text")
    file = Path(args.checkpoint or args.released)
    if args.released:
        model, checkpoint, name = released_checkpoint(file, Path(args.data or "data"))
    else:
        model, checkpoint = load_checkpoint(file)
        name = file.resolve().parent.name  # runs/T3.5/last.pt
    trained = checkpoint.get("train", {})
    model.to(device)
    out = Path(args.out or file.parent)
    if rank == 0:
        require_writable(out)
    if any(one_input):
        return answer_one(args, model, checkpoint, out)
    # VG has no test split: skip it silently, unless it is the only task.
    lacking = [t.name for t in data.TASKS if args.split not in t.dataset.files]
    tasks = args.tasks or [t for t in model.tasks if t not in lacking] or list(model.tasks)
    folder = Path(args.data or trained.get("data", "data"))
    labels = {} if args.released else checkpoint["labels"]
    datasets = load_datasets(model, labels, checkpoint["vocab"], tasks, args.split, folder)
    micro_batch = trained.get("micro_batch", 0) if args.micro_batch is None else args.micro_batch
    results = evaluate(model, datasets, device, micro_batch, args.num_workers, args.eval_samples,
                       args.precision, out, args.allow_partial)
    if rank > 0:
        return
    print(results_table(results, name, args.split))
    print(f"images: {micro_batch or 1} at a time; predictions: {out / 'predictions'}")
    path = out / ("results.json" if args.split == "val" else "results_test.json")
    with contextlib.suppress(OSError, ValueError, TypeError):  # earlier results of other tasks
        results = json.loads(path.read_text()) | results
    write_json(path, results)
    if args.figures:
        predictions_picture(model, datasets, out / "predictions.png")
        curves_picture(file.parent / "log.jsonl", out / "curves.png")


def main(argv: list[str] | None = None) -> None:
    data.command_line(parser(), run, argv)


if __name__ == "__main__":
    main()
