"""eval.py in worked examples: metrics computed by hand, and files as the test servers take them."""
import contextlib
import io
import json
import re
import shutil
import sys
import zipfile
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

import data
import eval as evaluation
import unit
from conftest import ROOT, Forked, run_python
from test_data import write
from test_unit import SMALL

SHARED = Path(__file__).resolve().parent.parent.parent / "shared"


# --- VQA accuracy: the official scorer's rule ----------------------------------------------------

@pytest.mark.parametrize("answer, ten, expected", [
    # All ten are one string: compared as they are, only trimmed. Else both sides are normalised.
    ("yes", ["A yes."] * 10, 0.0), ("A yes.", ["A yes."] * 10, 1.0),
    (" yes\n", ["yes", "yes "] + ["yes"] * 8, 1.0),
    ("yes", ["A yes."] * 9 + ["no"], 1.0), ("none", ["0"] * 3 + ["2"] * 7, 0.9),
    # Own data with fewer answers: 3 k / n, at most 1, always normalised.
    ("yes", ["A yes."], 1.0), ("dog", ["cat"], 0.0), ("cat", ["cat", "dog"], 1.0),
    ("cat", ["dog"] * 4 + ["cat"], 0.6), ("no", ["No."] * 9, 1.0)])
def test_vqa_accuracy(answer, ten, expected):
    assert evaluation.vqa_accuracy(answer, ten) == pytest.approx(expected, abs=1e-12)


def test_f1():
    predicted, truth = np.array([1, 1, 0, 0, 1]), np.array([1, 0, 1, 0, 1])
    assert evaluation.f1_score(predicted, truth) == pytest.approx(2 / 3)  # precision and recall 2/3
    assert evaluation.f1_score(np.zeros(3), np.zeros(3)) == 0


# --- average precision ---------------------------------------------------------------------------

def truth_of(rows) -> COCO:
    """rows of (image, class, [x, y, w, h], crowd)"""
    truth = COCO()
    truth.dataset = {
        "images": [{"id": i} for i in sorted({r[0] for r in rows})],
        "categories": [{"id": c} for c in sorted({r[1] for r in rows})],
        "annotations": [{"id": n, "image_id": i, "category_id": c, "bbox": list(box),
                         "area": box[2] * box[3], "iscrowd": crowd}
                        for n, (i, c, box, crowd) in enumerate(rows, 1)]}
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
    return truth


def test_average_precision_ignores_crowds_and_other_images():
    truth = truth_of([(1, 1, (0, 0, 10, 10), 0), (1, 1, (40, 40, 50, 50), 1),
                      (1, 2, (0, 0, 9, 9), 1), (2, 3, (0, 0, 10, 10), 0)])
    rows = np.array([[45, 45, 10, 10, 0.9, 1],  # inside the crowd: neither right nor wrong
                     [0, 0, 10, 10, 0.5, 1]])
    none = np.empty((0, 6))
    assert evaluation.average_precision(truth, {1: rows})["AP"] == pytest.approx(100)
    assert evaluation.average_precision(truth, {1: rows, 2: none})["AP"] == pytest.approx(50)
    assert evaluation.average_precision(truth, {1: none}) == {"AP": 0, "AP50": 0}
    assert evaluation.average_precision(truth_of([]), {1: rows}) == {}


def official_scores(truth: COCO, found) -> np.ndarray:
    """pycocotools' AP and AP50 in percent; `found` as `COCO.loadRes` takes it."""
    with contextlib.redirect_stdout(io.StringIO()):
        scorer = COCOeval(truth, truth.loadRes(found), "bbox")
        scorer.evaluate(), scorer.accumulate(), scorer.summarize()
    return 100 * scorer.stats[:2]


def test_blocks_of_classes_give_the_numbers_of_pycocotools_in_one_go():
    rng, truth, rows = np.random.default_rng(0), [], []
    for image in 9 * [*range(1, 13)]:
        box, label = rng.uniform(1, 60, 4).round(1), int(rng.integers(1, 24))
        truth.append((image, label, box.tolist(), int(rng.random() < 0.1)))
        rows.append([image, *(box + rng.normal(0, 3, 4)).clip(1), rng.random(), label])
        rows.append([image, *rng.uniform(1, 60, 4), rng.random(), rng.integers(1, 24)])
    truth, rows = truth_of(truth), np.array(rows)
    ap, ap50 = official_scores(truth, rows)
    assert 5 < ap < ap50 < 95
    found = {image: rows[rows[:, 0] == image, 1:] for image in range(1, 13)}
    for block in (1, 4, 200):
        result = evaluation.average_precision(truth, found, block)
        assert result == pytest.approx({"AP": ap, "AP50": ap50}, abs=1e-10)


def detections(boxes, labels, attributes=None, scores=None):
    n = len(labels)
    return unit.Detections(torch.tensor(scores or [0.5] * n), torch.tensor(labels),
                           torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
                           None if attributes is None else torch.tensor(attributes))


@pytest.mark.parametrize("image", [401244, 20240115093000001, 2**63 - 1])
def test_records_are_those_of_pycocotools(image, tmp_path):
    """Image ids are exact, in the metric and in the server's file. 2**53 is where doubles end."""
    rows = evaluation.to_rows(detections([[10, 20, 40, 60]], [5], scores=[0.25]))
    assert rows.tolist() == [[10, 20, 30, 40, 0.25, 5]]
    assert evaluation.to_annotations({image: rows}) == [
        {"id": 1, "image_id": image, "category_id": 5, "bbox": [10, 20, 30, 40], "score": 0.25,
         "area": 1200}]
    near = {image - 1: rows[:0], image: rows}  # perfect for one of two
    truth = truth_of([(i, 5, (10, 20, 30, 40), 0) for i in near])
    assert evaluation.average_precision(truth, near)["AP"] == pytest.approx(100 * 51 / 101)
    evaluation.write_detections(tmp_path / "found.json", ["x"] * 6, [(image, rows, (0, 0))])
    found = json.loads((tmp_path / "found.json").read_text())
    assert found == [{"image_id": image, "category_id": 5, "bbox": [10, 20, 30, 40],
                      "score": 0.25}]


def test_attribute_hits():
    boxes = torch.tensor([[0, 0, 10, 10], [20, 20, 30, 30], [50, 50, 60, 60], [70, 70, 80, 80.]])
    labels = torch.tensor([1, 2, 3, 4])
    attributes = torch.full((4, 16), -1)
    attributes[0, :2] = torch.tensor([5, 6])
    attributes[1, 0], attributes[3, 0] = 7, 8   # the third box has none: not counted
    found = detections([[0, 0, 10, 9], [0, 0, 10, 6],     # the better of two has attribute 6: right
                        [20, 20, 30, 30],                 # attribute 5 instead of 7: counted, wrong
                        [50, 50, 60, 60],
                        [70, 70, 80, 74], [70, 70, 80, 80]],  # IoU 0.4, another class: not counted
                       [1, 1, 2, 3, 4, 1], [6, 9, 5, 5, 8, 8])
    assert evaluation.attribute_hits(found, boxes, labels, attributes) == (1, 2)
    assert evaluation.attribute_hits(found, boxes[:0], labels[:0], attributes[:0]) == (0, 0)


# --- whole data sets: a folder in the official formats, with val and test ------------------------

WORDS = "[PAD] [UNK] [CLS] [SEP] what is it ? a red cat dog no yes the".split()
GLUE = {  # folder: columns, texts, labels in turn
    "QNLI": ("index question sentence label", "what is it ?\ta cat", "entailment not_entailment"),
    "MNLI": ("index sentence1 sentence2 gold_label", "a cat\ta dog", "neutral contradiction"),
    "QQP": ("id question1 question2 is_duplicate", "what ?\tis it ?", "0 1"),
    "SST-2": ("index sentence label", "a red cat", "0 1")}
LABELS = ["entailment", "neutral", "contradiction", "neutral", "entailment"]
IDS = [3, 5, 9, 12, 13]


def make_data(folder: Path) -> Path:
    rng = np.random.default_rng(0)
    for number in IDS:
        for place in ("coco/val2017/", "coco/test2017/", "vg/", "coco/test2015/COCO_test2015_",
                      "snli_ve/flickr30k_images/"):
            name = f"{number}.jpg" if "snli" in place else f"{number:012}.jpg"
            path = folder / f"{place}{name}"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 255, (32, 32, 3), np.uint8)).save(path)
    write(folder / "bert/vocab.txt", "\n".join(WORDS) + "\n")
    head = {"images": [{"id": i, "file_name": f"{i:012}.jpg", "height": 32, "width": 32}
                       for i in IDS],
            "categories": [{"id": 1, "name": "square"}, {"id": 2, "name": "disc"}]}
    boxes = [{"id": n, "image_id": i, "category_id": 1 + n % 2, "bbox": [4, 5, 12, 10], "area": 120,
              "iscrowd": 0, "attribute_ids": [1 + n % 3]} for n, i in enumerate(IDS[:4], 1)]
    colours = [{"id": n, "name": name} for n, name in enumerate(["red", "blue", "green"], 1)]
    write(folder / "coco/annotations/instances_val2017.json", head | {"annotations": boxes})
    write(folder / "coco/annotations/image_info_test-dev2017.json", head)
    write(folder / "vg/instances_val.json", head | {"annotations": boxes, "attributes": colours})
    questions = [{"question_id": 1000 * i, "image_id": i, "question": "what is it?",
                  "multiple_choice_answer": "cat",
                  "answers": [{"answer": "cat"}] * 3 + [{"answer": "dog"}] * 7} for i in IDS]
    for split in ("val2014", "test2015"):
        write(folder / f"vqa2/v2_OpenEnded_mscoco_{split}_questions.json", {"questions": questions})
    write(folder / "vqa2/v2_mscoco_val2014_annotations.json", {"annotations": questions})
    write(folder / "vqa2/answers_vqa.txt", "<unk>\ncat\ndog")
    rows = [json.dumps({"Flickr30K_ID": str(i), "sentence1": "it", "sentence2": "a red cat",
                        "gold_label": label, "pairID": f"{i}.jpg#0r1n"}) + "\n"
            for i, label in zip(IDS, LABELS)]
    for split in ("dev", "test"):
        write(folder / f"snli_ve/snli_ve_{split}.jsonl", "".join(rows))
        for name, (columns, texts, labels) in GLUE.items():
            lines = [columns.replace(" ", "\t")]
            lines += [f"{k}\t{texts}\t{labels.split()[k % 2]}" for k in range(5)]
            file = f"{split}_mismatched.tsv" if name == "MNLI" else f"{split}.tsv"
            write(folder / "glue" / name / file, "\n".join(lines) + "\n")
    return folder


SMALL = unit.Config(
    detection_queries=8, num_queries=4, image_size=32,
    encoder_width=16, encoder_heads=2, encoder_ff=16, encoder_layers=1, bert_width=16, bert_heads=2,
    bert_ff=16, bert_layers=1, vocab_size=len(WORDS), max_positions=64, decoder_width=16,
    decoder_heads=2, decoder_ff=16, decoder_layers=1, dropout=0.0, backbone="small")
NAMES = [task.name for task in data.TASKS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def checkpoint(folder, tmp_path_factory):
    """A file as train.py saves it, of a small model with random weights."""
    tasks, datasets = data.load(folder, NAMES, "val", 32)
    torch.manual_seed(0)
    model = unit.UniT(SMALL, tasks)
    path = tmp_path_factory.mktemp("run") / "last.pt"
    torch.save({
        "model": model.state_dict(), "iteration": 1, "config": asdict(model.config),
        "train": {"data": str(folder)}, "vocab": WORDS,
        "tasks": [asdict(replace(task, dataset=None)) for task in tasks],
        "labels": {n: {"classes": d.class_names, "attributes": d.attribute_names}
                   for n, d in datasets.items()}}, path)
    return path


def evaluate(checkpoint, out, *more):
    evaluation.main([str(x) for x in ("--checkpoint", checkpoint, "--out", out, "--num_workers", 0,
                                      *more)])


@pytest.fixture(scope="module")
def val_run(checkpoint, tmp_path_factory):
    """--out of the command on the validation split, with figures."""
    out = tmp_path_factory.mktemp("out")
    log = [{"iteration": i, "results": {
        "coco": {"AP": i / 50, "AP50": i / 40, "samples": 4, "of": 90},
        "sst2": {"accuracy": i / 30}}} for i in (300, 600, 900)]
    write(checkpoint.parent / "log.jsonl",
          "".join(json.dumps(x) + "\n" for x in log) + '{"iteration": 950, "resu')
    evaluate(checkpoint, out, "--figures")
    return out


def test_results_have_the_documented_form_and_agree_with_the_detections(val_run, folder):
    results = json.loads((val_run / "results.json").read_text())
    assert {task: set(metrics) for task, metrics in results.items()} == {
        "coco": {"AP", "AP50"}, "vg": set(results["vg"]) | {"AP", "AP50"},
        "qqp": {"accuracy", "F1"}, **{t: {"accuracy"} for t in NAMES[2:] if t != "qqp"}}
    assert all(0 <= v <= 100 for metrics in results.values() for v in metrics.values())
    # 3 of 10 say cat, 7 dog; <unk> is never predicted, so each question scores 0.9 or 1
    assert 90 <= results["vqa2"]["accuracy"] <= 100
    _, datasets = data.load(folder, ["coco"], "val", 32)
    file = val_run / "predictions/detections_val2017_UniT_results.json"
    ap, _ = official_scores(datasets["coco"].ground_truth(), str(file))
    assert results["coco"]["AP"] == pytest.approx(ap, abs=0.5)  # the file's boxes are rounded


def test_pictures_and_curves_of_metrics_alone(val_run, checkpoint, tmp_path, monkeypatch):
    size, drawn = Image.open(val_run / "predictions.png").size, {}
    assert size[0] > 4 * 300 and size[1] > 8 * 60
    picture = Image.open(val_run / "curves.png").convert("RGB")
    assert picture.width > 2 * 300 and picture.height > 200
    assert len(picture.getcolors(10**6)) > 10

    def panel(task, metrics):
        drawn[task] = set(metrics)
        return picture
    monkeypatch.setattr(evaluation, "panel", panel)
    evaluation.curves_picture(checkpoint.parent / "log.jsonl", tmp_path / "curves.png")
    assert drawn == {"coco": {"AP", "AP50"}, "sst2": {"accuracy"}}


def test_an_answer_is_green_if_right_and_red_if_not(checkpoint, folder, monkeypatch):
    model, _ = evaluation.load_checkpoint(checkpoint)
    _, datasets = data.load(folder, ["vqa2"], "val", 32)
    monkeypatch.setattr(evaluation, "tile", lambda picture, lines: lines[-1])
    for answer, line in (("cat", ("prediction: cat", "#1b7f3b")),
                         ("<unk>", ("prediction: <unk>  (truth: dog)", "#c62828"))):
        monkeypatch.setattr(evaluation, "answers_to", lambda *_: [{"label": answer}])
        assert evaluation.show_sample(model, datasets["vqa2"], 0) == [line]


def test_truth_is_drawn_beside_the_prediction(checkpoint, folder):
    """Where the true boxes are, in the pixels of the picture; VG's with their attribute."""
    model, _ = evaluation.load_checkpoint(checkpoint)
    _, datasets = data.load(folder, ["coco", "vg"], "val", 32)
    for name, dataset in datasets.items():
        labels = {"classes": dataset.class_names, "attributes": dataset.attribute_names}
        found, = evaluation.true_boxes(dataset.sample(0), labels)
        assert found.pop("box") == pytest.approx([4, 5, 16, 15], abs=1e-3)
        wanted = {"label": "disc"}
        assert found == (wanted if name == "coco" else wanted | {"attribute": "blue"})
        prediction, truth = evaluation.show_sample(model, dataset, 0)
        line = tuple(bytes.fromhex(evaluation.COLOURS[0][1:]))
        assert prediction.size == truth.size and truth.getpixel((41, 100)) == line


def test_tiny_pictures_are_enlarged_before_drawing():
    found = [{"label": "square", "score": 0.9, "box": [4, 4, 40, 20]}]  # overshoots: kept inside
    picture = evaluation.draw_boxes(Image.new("RGB", (32, 32), "white"), found, 10)
    assert picture.size == (320, 320)
    colour = tuple(bytes.fromhex(evaluation.COLOURS[0][1:]))
    assert picture.getpixel((40, 100)) == picture.getpixel((318, 100)) == colour
    assert picture.getpixel((200, 100)) == (255, 255, 255)


def test_server_files(checkpoint, folder, tmp_path):
    """Read back by the servers' rules."""
    evaluate(checkpoint, tmp_path, "--split", "test", "--data", folder)
    files = tmp_path / "predictions"
    words = {"QNLI": {"entailment", "not_entailment"}, "QQP": {"0", "1"}, "SST-2": {"0", "1"},
             "MNLI-mm": {"entailment", "neutral", "contradiction"}}
    for name, allowed in words.items():
        lines = (files / f"{name}.tsv").read_text().split("\n")
        assert lines[0] == "index\tprediction" and lines[-1] == "" and len(lines) == 7
        rows = [line.split("\t") for line in lines[1:-1]]
        assert [int(index) for index, _ in rows] == list(range(5))
        assert {label for _, label in rows} <= allowed
    answers = json.loads((files / "vqa_OpenEnded_mscoco_test2015_UniT_results.json").read_text())
    assert [set(a) for a in answers] == [{"question_id", "answer"}] * 5
    assert {a["question_id"] for a in answers} == {3000, 5000, 9000, 12000, 13000}
    assert {a["answer"] for a in answers} <= {"cat", "dog"}
    stem = "detections_test-dev2017_UniT_results"
    found = json.loads((files / f"{stem}.json").read_text())
    assert {f["image_id"] for f in found} <= {3, 5, 9, 12, 13}
    assert {f["category_id"] for f in found} <= {1, 2}  # id 0 is not a class
    assert all(round(x, 1) == x for f in found for x in f["bbox"])
    assert found and all(0 < f["score"] < 1 for f in found)
    with zipfile.ZipFile(files / f"{stem}.zip") as archive:
        assert archive.namelist() == [f"{stem}.json"]
        assert json.loads(archive.read(f"{stem}.json")) == found
    results = json.loads((tmp_path / "results_test.json").read_text())
    assert set(results) == {"snli_ve"}  # the only test labels that are public
    assert not (tmp_path / "results.json").exists()


def test_limit_and_the_mode_comes_back(checkpoint, folder, capsys):
    model, _ = evaluation.load_checkpoint(checkpoint)
    _, datasets = data.load(folder, ["sst2", "coco"], "val", 32)
    seen = []
    datasets["sst2"].label = lambda index: seen.append(int(index)) or 0
    model.train()
    evaluation.evaluate(model, datasets, "cpu", limit=2)
    assert model.training and len(set(seen)) == 2
    three = evaluation.drawn_indices(100, 3).tolist()
    assert three == sorted(set(three)) and len(three) == 3
    assert evaluation.drawn_indices(5, 9).tolist() == evaluation.drawn_indices(5, 0).tolist()
    datasets["coco"].ids = datasets["coco"].ids[:0]
    assert evaluation.evaluate(model, {"coco": datasets["coco"]}, "cpu") == {}
    assert "coco: no samples" in capsys.readouterr().out


def test_two_processes_count_every_sample_once(checkpoint, folder, tmp_path):
    """With a picture missing, and one in the second process's share that cannot be used."""
    copy = spoil(folder, tmp_path / "data", [3], [13])
    outs = tmp_path / "one", tmp_path / "two"
    for processes, out in enumerate(outs, 1):
        Forked(evaluation.main, ["--checkpoint", checkpoint, "--data", copy, "--out", out,
                                 "--micro_batch", 1], processes=processes).wait()
    one, two = (json.loads((out / "results.json").read_text()) for out in outs)
    assert two == {t: pytest.approx(metrics, abs=1e-3) for t, metrics in one.items()}
    assert set(two) == set(NAMES) and (two["coco"]["samples"], two["coco"]["of"]) == (3, 5)
    for file in (outs[0] / "predictions").glob("*.tsv"):
        assert (outs[1] / "predictions" / file.name).read_text() == file.read_text()


# --- parts of a split ---------------------------------------------------------------------------

def spoil(folder: Path, copy: Path, missing: list, broken: list) -> Path:
    """A copy of the data where these pictures, by number, are missing or hold no picture."""
    shutil.copytree(folder, copy)
    for path in copy.rglob("*.jpg"):
        number = int(re.search(r"(\d+)\.jpg", path.name)[1])
        if number in missing:
            path.unlink()
        elif number in broken:
            path.write_bytes(b"<html>")
    return copy


@pytest.mark.parametrize("missing, broken, limit, count", [
    ([3], [], 0, 4), ([], [9], 0, 4), ([3, 5], [9], 0, 2), ([], [], 4, 4), ([], [], 5, 5),
    ([], [3, 5, 9, 12, 13], 0, 0)])
def test_a_score_over_a_part_says_so(missing, broken, limit, count, checkpoint, folder, tmp_path,
                                     capsys):
    copy, out = spoil(folder, tmp_path / "data", missing, broken), tmp_path / "out"
    tasks = NAMES[:4]
    evaluate(checkpoint, out, "--data", copy, "--tasks", ",".join([*tasks, "qnli"]),
             "--eval_samples", limit, "--num_workers", len(missing))  # with workers, and without
    printed, results = capsys.readouterr().out, json.loads((out / "results.json").read_text())
    assert ("of" in results["qnli"]) == (limit == 4)  # it has no pictures
    for task in tasks:
        warning = (f"warning: {task}: evaluated on {count} of 5 samples "
                   f"(pictures missing: {len(missing)}, unusable: {len(broken)})")
        assert (warning in printed) == bool(missing or broken)
        if not count:
            assert f"{task}: no samples" in printed and task not in results
            continue
        part = {"samples": count, "of": 5} if count < 5 else {}
        assert {key: results[task].get(key) for key in part} == part
        line = re.search(rf"^{task} .*", printed, re.M)[0]
        assert line.endswith(f"  {count} of 5 samples") == (count < 5)
    if broken:  # the reason once, though COCO and VQAv2 meet the same picture
        assert printed.count(f"val2017/{broken[0]:012}.jpg: ") == 1
    if count:  # labels are those of the samples that are left
        lines = (out / "predictions/snli_ve_val.tsv").read_text().splitlines()[1:]
        pairs = [line.split("\t") for line in lines]
        right = [label == LABELS[int(number)] for number, label in pairs]
        assert len(right) == count
        assert results["snli_ve"]["accuracy"] == pytest.approx(100 * np.mean(right), abs=1e-4)


@pytest.mark.parametrize("task, file", [
    ("coco", "detections_test-dev2017_UniT_results.json"),
    ("vqa2", "vqa_OpenEnded_mscoco_test2015_UniT_results.json")])
@pytest.mark.parametrize("missing, broken, limit", [([3, 5], [], 0), ([], [9, 12], 0), ([], [], 3)])
def test_a_server_s_file_is_complete_or_not_written(task, file, missing, broken, limit, checkpoint,
                                                    folder, tmp_path, capsys, monkeypatch):
    copy, path = spoil(folder, tmp_path / "data", missing, broken), tmp_path / "predictions" / file
    command = [checkpoint, tmp_path, "--data", copy, "--tasks", task, "--split", "test",
               "--eval_samples", limit]
    with pytest.raises(SystemExit) as stop, monkeypatch.context() as patch:
        if not broken:  # known before the work
            patch.delattr(evaluation, "predict_split")
        evaluate(*command)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and " 2 of its samples are missing" in error
    assert "--allow_partial" in error and not path.exists()
    evaluate(*command, "--allow_partial")
    warned = "evaluated on 3 of 5 samples" in capsys.readouterr().out
    assert path.exists() and warned == (not limit)


# --- one input -----------------------------------------------------------------------------------

@pytest.mark.parametrize("kind, width", [("classification", 25), ("detection", 26)])
def test_one_picture_has_the_size_that_its_data_set_gives_it(kind, width, tmp_path):
    """50 x 16 / 31 = 25.8, rounded down in classification, with or without a text."""
    Image.new("RGB", (50, 31)).save(tmp_path / "picture.png")
    task = unit.Task("things", kind, image=True, text=False, num_classes=2)
    model, shapes = unit.UniT(replace(SMALL, backbone="small", image_size=16), [task]), []
    model.image_encoder.backbone.register_forward_hook(lambda _, x, y: shapes.append(x[0].shape))
    labels = {"things": {"classes": ["", "thing"], "attributes": []}}
    evaluation.predict(model, {"labels": labels}, tmp_path / "picture.png")
    assert shapes == [(1, 3, 16, width)]


def test_one_input_in_three_lines(checkpoint, folder, val_run):
    model, loaded = evaluation.load_checkpoint(checkpoint)
    image = folder / "coco/val2017/000000000003.jpg"
    answers = evaluation.predict(model, loaded, image, "what is it?")
    assert {a["label"] for a in answers} == {"<unk>", "cat", "dog"}
    assert answers[-1] == {"label": "<unk>", "score": 0}  # never an answer
    assert sum(a["score"] for a in answers) == pytest.approx(1)
    found = evaluation.predict(model, loaded, image, task="vg")
    assert len(found) == 8 and {f["attribute"] for f in found} <= {"", "red", "blue", "green"}
    assert found == sorted(found, key=lambda f: -f["score"])
    verdicts = evaluation.predict(model, loaded, text="a cat", text_pair="no cat", task="mnli")
    assert {v["label"] for v in verdicts} == {"entailment", "neutral", "contradiction"}
    answer = evaluation.predict(model, loaded, text="a red cat", task="sst2")[0]["label"]
    line = (val_run / "predictions/SST-2_val.tsv").read_text().splitlines()[1]
    assert line == f"0\t{['negative', 'positive'].index(answer)}"  # as evaluation sees it


def test_one_input_on_the_command_line(checkpoint, folder, tmp_path, capsys):
    image = folder / "coco/val2017/000000000003.jpg"
    for flags, says in (
            (["--image", image, "--question", "what is it?"], r"vqa2:\n +\d+\.\d%  (cat|dog)\n"),
            # no question: SNLI-VE's
            (["--image", image, "--text", "a cat sits"], r"snli_ve:\n +\d+\.\d%  (ent|neu|con)"),
            (["--text", "a cat", "--text_pair", "a dog", "--tasks", "mnli,qqp"],
             r"(?s)mnli:\n.*entailment.*qqp:\n.*duplicate")):
        evaluate(checkpoint, tmp_path, *flags)
        assert re.search(says, capsys.readouterr().out)


def test_one_picture_is_turned_upright(checkpoint, tmp_path, capsys):
    """As its EXIF says, for the model and in what is drawn. A PNG: nothing is lost."""
    pixels = np.random.default_rng(0).integers(0, 255, (24, 40, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    Image.fromarray(np.rot90(pixels, -1).copy()).save(tmp_path / "upright.png")
    seen = []
    for name in ("turned", "upright"):
        evaluate(checkpoint, tmp_path, "--image", tmp_path / f"{name}.png")
        with Image.open(tmp_path / "prediction_coco.png") as picture:
            seen.append((capsys.readouterr().out, picture.size, picture.tobytes()))
    assert seen[0] == seen[1] and seen[0][1] == (320, 533)


def test_a_checkpoint_with_classes_of_its_own(checkpoint, tmp_path, monkeypatch):
    """For a letter that the console lacks it prints "?"; data with other classes are refused."""
    loaded = torch.load(checkpoint, weights_only=True)
    loaded["labels"]["sst2"]["classes"] = ["schön", "größer"]
    torch.save(loaded, tmp_path / "last.pt")
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    command = [sys.executable, ROOT / "eval.py", "--checkpoint", tmp_path / "last.pt",
               "--tasks", "sst2"]
    printed = run_python([*command, "--text", "a cat"])
    assert "sch?n" in printed and "gr??er" in printed
    assert "sst2 has other classes than the model was trained" in run_python(command, expect=2)


def test_released_model_has_names_from_the_data_folder(checkpoint, folder, tmp_path, monkeypatch,
                                                       capsys):
    model, _ = evaluation.load_checkpoint(checkpoint)
    monkeypatch.setattr(unit, "load_released", lambda path: model, raising=False)
    command = ["--released", "unit.pth", "--data", str(folder), "--out", str(tmp_path)]
    image = str(folder / "coco/val2017/000000000003.jpg")
    evaluation.main([*command, "--image", image, "--question", "what is it?"])
    assert re.search(r"%  (cat|dog)\n", capsys.readouterr().out)  # of answers_vqa.txt
    evaluation.main([*command, "--tasks", "vqa2,sst2", "--num_workers", "0"])
    printed = capsys.readouterr().out
    assert re.search(r"authors released-all\nvqa2 +accuracy +\d+\.\d\d +66.96\n", printed)


def test_results_of_other_tasks_stay(checkpoint, tmp_path):
    """Evaluating a task again leaves what a training found on the others; a file that is no
    dictionary gives way."""
    path, vqa2 = tmp_path / "results.json", {"vqa2": {"accuracy": 5}}
    for before, others in ((json.dumps(vqa2 | {"sst2": {"accuracy": -1.0}}), vqa2),
                           ('{"sst2": ', {}), ("[1]", {})):
        path.write_text(before)
        evaluate(checkpoint, tmp_path, "--eval_samples", 2, "--tasks", "sst2")
        results = json.loads(path.read_text())
        assert results.pop("sst2")["accuracy"] >= 0 and results == others


def test_mistakes_are_reported_and_nothing_is_written(checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(data, "TASKS", [t for t in data.TASKS if t.name != "sst2"])  # a ninth's lot
    for flags, says in ((["--tasks", "vg", "--split", "test"], "vg has no split 'test'"),
                        (["--tasks", "sst2"], "unknown task 'sst2'; there are coco, vg"),
                        (["--text", "a cat"], "take a text are: qnli, mnli, qqp, sst2")):
        with pytest.raises(SystemExit) as stop:
            evaluate(checkpoint, tmp_path, *flags)
        assert stop.value.code == 2 and says in capsys.readouterr().err
    assert not [*tmp_path.iterdir()]


# --- the paper's numbers -------------------------------------------------------------------------

def test_results_table():
    results = {"coco": {"AP": 38.94, "AP50": 58.1}, "qqp": {"accuracy": 90.0, "F1": 88.0}}
    lines = evaluation.results_table(results, "T3.5").splitlines()
    assert [line.split() for line in lines[1:]] == [
        ["coco", "AP", "38.94", "39.0"], ["AP50", "58.10"], ["qqp", "accuracy", "90.00", "90.64"],
        ["F1", "88.00"]]
    assert "paper T3.5" in lines[0] and "paper" not in evaluation.results_table(results)
    part = evaluation.results_table({"coco": {"AP": 1.0, "samples": 5, "of": 60}}, "T3.5")
    assert [" ".join(x.split()) for x in part.splitlines()[1:]] == [
        "coco AP 1.00 39.0 5 of 60 samples"]
    assert "73.16" in evaluation.results_table({"snli_ve": {"accuracy": 70.0}}, "T3.5", "test")


def test_every_line_of_the_papers_tables_is_there():
    lines = {re.sub(r"-\w+$", "", name) for name in evaluation.PAPER}
    lengths = {"1": 4, "2": 4, "3": 6, "4": 8, "C.1": 12}
    assert lines == {f"T{t}.{n + 1}" for t, length in lengths.items() for n in range(length)}
    assert evaluation.PAPER["T3.6-qnli"] == {"qnli": 86.92} and evaluation.PAPER["TC.1.6"] == {}
    assert [n for n in evaluation.PAPER if n.startswith("T3.1-")] == [f"T3.1-{t}" for t in NAMES]


@pytest.mark.skipif(not (SHARED / "paper/unit-paper.md").exists(), reason="the paper is not here")
def test_the_papers_numbers_are_in_its_text():
    text = (SHARED / "paper/unit-paper.md").read_text()
    numbers = [v for row in [*evaluation.PAPER.values(), *evaluation.PAPER_TEST.values()]
               for v in row.values()]
    assert len(numbers) > 120
    for v in numbers:
        found = re.search(rf"(?<!\d){re.escape(f'{v:g}')}0?(?!\d)", text)
        assert found or v == 86.92, v  # which the text's conversion made "86.927 -"
