"""Nothing lost: bad data, bad files, bad luck, as real data sets and clusters have them.

The generated cases are seeded: a failure names its case, and the same case fails again.
"""
import contextlib
import copy
import json
import math
import os
import re
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
import eval as evaluation
import train
from conftest import ROOT, Forked, run_python
from test_cli import MAIN
from test_data import make_vqa, picture, write
from test_train import SMALL, equal, log_of, weights
from unit import InputError


@contextlib.contextmanager
def within(seconds):
    """A hang is a failure too."""
    def stop(*_):
        raise TimeoutError(f"took more than {seconds} seconds")
    signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


# ---- Generated annotations: samples that can be used, or one line that names the file ------------

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
    content = data.read_json(root / data.COCO_VAL)
    del content["annotations"]
    write(root / "coco/annotations/image_info_test-dev2017.json", content)
    shutil.copytree(root / "coco/val2017", root / "coco/test2017")
    write(root / "vg/instances_val.json", data.prepare_vg(root)[0]["train"])
    statements = []
    for name, label in (("11", "neutral"), ("22", "contradiction"), ("11", "-")):
        picture(root / f"snli_ve/flickr30k_images/{name}.jpg", (30, 20))
        row = dict(Flickr30K_ID=name, sentence2="a red dog .", gold_label=label)
        statements.append(json.dumps(row) + "\n")
    write(root / "snli_ve/snli_ve_dev.jsonl", "".join(statements))
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
    for _ in range(rng.integers(1, 4)):
        found = list(places(content)) if isinstance(content, (dict, list)) else []
        nasty = copy.deepcopy(NASTY[rng.integers(len(NASTY))])
        if not found or rng.random() < 0.02:
            return nasty
        node, key = found[rng.integers(len(found))]
        what = rng.random()
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


def spoil_bytes(raw, rng):
    """Cut short, begun with a byte order mark, or a byte changed."""
    at, what = int(rng.integers(len(raw))), rng.integers(4)
    if what == 0:
        return raw[:at]
    if what == 1:
        return b"\xef\xbb\xbf" + raw
    letter = bytes([rng.integers(256)]) if what == 2 else b"\x00"
    return raw[:at] + letter + raw[at + 1:]


def cells(row):
    return "\t".join(map(str, row)) if isinstance(row, list) else str(row)


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
        rows = spoil_json([line.split("\t") for line in raw.decode().splitlines()], rng)
        text = "\n".join(map(cells, rows if isinstance(rows, list) else [rows]))
    return text.encode("utf-8", "surrogatepass")


def check_detection(dataset, batch, rng):
    """Boxes inside the picture, labels and attributes that the model has, and a score."""
    task = dataset.task
    for box, labels in zip(batch.boxes, batch.labels):
        low, high = box[:, :2] - box[:, 2:] / 2, box[:, :2] + box[:, 2:] / 2
        assert (box[:, 2:] > 0).all() and (low >= -1e-6).all() and (high <= 1 + 1e-6).all()
        assert ((labels > 0) & (labels < task.num_classes)).all() and len(labels) == len(box)
    for attributes in batch.attributes or []:
        assert ((attributes >= -1) & (attributes < task.num_attributes)).all()
    found = {i: np.array([[*rng.uniform(1, 30, 4), rng.random(), rng.integers(1, 4)]] * 2)
             for i in dataset.ids.tolist()}
    truth = dataset.ground_truth()
    assert sorted(truth.getImgIds()) == sorted(dataset.ids)
    metrics = evaluation.average_precision(truth, found)
    assert all(0 <= value <= 100 for value in metrics.values())


def check_classification(dataset, batch):
    if dataset.split == "test":
        assert batch.scores is None
        return
    assert batch.scores.shape == (len(dataset), dataset.task.num_classes)
    assert ((batch.scores >= 0) & (batch.scores <= 1)).all()
    assert dataset.split != "train" or (batch.scores.sum(1) > 0).all()
    for index in range(len(dataset)) if dataset.task.soft_scores else ():
        assert 0 <= evaluation.vqa_accuracy("red", dataset.answers(index)) <= 1


def check_all(root, name, split, rng):
    """What was read goes through sampling, batching and metrics."""
    dataset = data.load(root, [name], split, 32, "flip")[1][name]
    dataset.summary.encode()  # can be printed
    if not len(dataset):
        return
    augmentation = np.random.default_rng(0) if split == "train" else None
    samples = [dataset.sample(n, augmentation) for n in range(len(dataset))]
    batch = data.collate(dataset.task, samples)
    if dataset.task.image:
        assert batch.images.isfinite().all() and (batch.sizes > 0).all()
    if dataset.task.kind == "classification":
        check_classification(dataset, batch)
    elif split == "test":
        assert batch.boxes is None and batch.labels is None
    else:
        check_detection(dataset, batch, rng)


CASES = 52  # of each of the 22 files: 1,144


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
            except data.UnusablePicture:  # of another shape than the changed record's
                outcome["refused"] += 1
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


# ---- Pictures: spoilt, or thin (tests/test_data.py has one of each mode) -------------------------

@pytest.mark.filterwarnings("error")  # of Pillow's a user can make nothing
@pytest.mark.parametrize("kind", ["jpeg", "png", "gif", "tiff", "webp", "bmp"])
def test_spoilt_pictures(tmp_path, kind):
    """80 of each: read, or one line that names the file."""
    path = picture(tmp_path / "x.jpg", format=kind)  # the content tells the format
    raw, refused = path.read_bytes(), 0
    for case in range(80):
        rng = np.random.default_rng(case)
        path.write_bytes(spoil_bytes(raw, rng))
        try:
            with within(20):
                image = data.read_image(path)
        except InputError as error:
            assert str(path) in str(error) and "\n" not in str(error), case
            refused += 1
        else:
            assert image.dtype == torch.uint8 and image.shape[0] == 3, case
    assert refused


@pytest.mark.parametrize("size", [(1, 10_000), (10_000, 1), (1, 1), (3, 4000)])
def test_thin_pictures(size):
    """Resized, cropped, drawn with boxes: never a side of 0, never a picture that fills the memory,
    and boxes stay inside."""
    for case in range(25):
        rng = np.random.default_rng(case)
        corners = np.sort(rng.random((4, 2, 2)), 1).reshape(4, 4)
        corners[0] = 0, 0, 1, 1
        image = torch.zeros(3, *size, dtype=torch.uint8)
        with within(20):
            done, boxes = data.augment(image, corners, rng)
        assert boxes.shape == (4, 4) and (boxes >= 0).all() and (boxes <= 1).all(), case
        for resized in (done, data.resize_for_evaluation(image, data.SHORTEST, floor=True)):
            assert 1 <= min(resized.shape[1:]) and max(resized.shape[1:]) <= data.LONGEST, case
    found = [{"label": "line", "score": 0.9, "box": [0.0, 0.0, float(size[0]), float(size[1])]}]
    for scale in (max(1, evaluation.WIDTH / size[0]), evaluation.WIDTH / size[0]):
        drawn = evaluation.draw_boxes(Image.new("RGB", size), found, scale)
        assert min(drawn.size) >= 1 and drawn.width * drawn.height < 10**7


# ---- The command line: one clear line, exit status 2, no traceback -------------------------------

@pytest.fixture(autouse=True, scope="module")
def as_before():
    """Runs in this process leave signal handlers and the number of threads changed."""
    handlers = {s: signal.getsignal(s) for s in data.STOPPING}
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    for number, handler in handlers.items():
        signal.signal(number, handler)


def mistake(capsys, script, *arguments):
    """The line that it prints. argparse's own has the usage before it."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        MAIN[script]([str(x) for x in arguments])
    lines = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and "error: " in lines[-1]
    assert len(lines) == 1 or lines[0].startswith("usage:"), lines
    return lines[-1]


@pytest.fixture(scope="module")
def run_folder(small_tiny_data, tmp_path_factory):
    """--out of a run of six iterations, a checkpoint every three."""
    out = tmp_path_factory.mktemp("run") / "out"
    train.main(["--tiny", "--data", str(small_tiny_data), "--out", str(out), *SMALL, "--tasks",
                "coco,sst2,vqa2", "--iterations", "6", "--save_every", "3"])
    return out


WRONG = """
--iterations 0 | --iterations -5 | --iterations 1.5 | --iterations many | --iterations
--batch_size 0 | --batch_size -8 | --micro_batch -1 | --log_every 0 | --save_every -1
--eval_every -1 | --eval_samples -1 | --num_workers -1 | --seed -1 | --seed 99999999999999999999
--lr -1 | --lr nan | --lr fast | --lr_backbone -1 | --warmup -1 | --weight_decay -1 | --clip 0
--clip -1 | --clip nan | --dropout -0.1 | --dropout 1.5 | --dropout nan | --first_share 2
--first_share nan | --first_share -1 | --tasks sst2 --first_tasks coco | --precision fp8
--encoder_width 0 | --encoder_width 18 | --encoder_width 20 --encoder_heads 3 | --encoder_heads 0
--encoder_layers -1 | --encoder_ff 0 | --bert_width 15 | --bert_heads -2 | --bert_layers -1
--decoder_width 33 | --decoder_heads 0 | --decoder_layers 0 | --decoder_ff -1 | --num_queries -1
--max_positions 0 | --max_positions 4 | --backbone vgg | --shared_decoder 1 | --tasks ,
--tasks coco,cocoa | --tasks coco,coco | --all_text_states x | --probabilities 1
--probabilities nan,1,1,1,1,1,1,1 | --probabilities inf,1,1,1,1,1,1,1
--probabilities 0,0,0,0,0,0,0,0 | --probabilities -1,1,1,1,1,1,1,1 | --probabilities a,b
--freeze legs | --freeze image_encoder,text_encoder,decoder,queries,heads | --init nowhere.pt
--init_parts legs | --experiment T9.9 | --tinny | --iter 5 | --data | surplus
"""


@pytest.mark.parametrize("flags", [x.strip() for x in WRONG.replace("\n", "|").split("|")
                                   if x.strip()])
def test_wrong_flags_of_train(flags, small_tiny_data, tmp_path, capsys):
    line = mistake(capsys, "train.py", "--tiny", "--data", small_tiny_data, "--out",
                   tmp_path / "out", *SMALL, "--iterations", 30, *flags.split())
    flag = flags.split()[-2] if "first" in flags else flags.split()[0]
    assert flag in line or "width" in flag and "width" in line  # split among too many heads
    assert not (tmp_path / "out/last.pt").exists()


@pytest.mark.parametrize("out", ["/proc/nowhere", "/dev/null", "/dev/null/out", "/sys/kernel"])
def test_unwritable_out(out, small_tiny_data, run_folder, capsys):
    """Said before the first iteration; also where the folder is there but takes no file."""
    assert out in mistake(capsys, "train.py", "--tiny", "--data", small_tiny_data, "--out", out)
    for more in ([], ["--text", "a film", "--tasks", "sst2"]):
        assert out in mistake(capsys, "eval.py", "--checkpoint", run_folder / "last.pt", "--out",
                              out, *more)
    assert out in mistake(capsys, "train.py", "--tiny", "--data", out, "--out", run_folder / "new")


def files_of(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_only_the_scratch_run_is_replaced(run_folder, small_tiny_data, tmp_path, monkeypatch,
                                          capsys):
    """Not other runs without --resume or --overwrite, nor data sets in the way of the tiny ones."""
    before, data_before = files_of(run_folder), files_of(small_tiny_data)
    monkeypatch.chdir(tmp_path)

    def refused(*more):
        return mistake(capsys, "train.py", "--tiny", "--data", small_tiny_data, *SMALL, *more)
    assert "--resume" in refused("--out", run_folder)
    assert "--overwrite" in refused("--out", run_folder, "--experiment", "T4.7")
    mistake(capsys, "train.py", "--tasks", "sst2", "--data", "nowhere", "--out", run_folder,
            "--overwrite")  # a slip in --data does not cost the weights
    for name in train.RESULT_FILES:  # any one of a run's files tells that there is a run
        write(tmp_path / name / name, "precious")
        assert name in refused("--out", name)
    real = write(tmp_path / "real/vqa2/answers_vqa.txt", "<unk>\n").parent.parent
    assert "vocab.txt: missing" in refused("--data", real, "--out", "new")
    assert len(files_of(real)) == 1  # a folder that holds something is taken as it is
    # runs/tiny is scratch only as the default; named, it is a run like any other.
    write(tmp_path / "runs/tiny/config.json", "{}")
    assert "--overwrite" in refused("--out", "runs/tiny")
    kept = write(tmp_path / "runs/tiny-T4.7/last.pt", "precious")
    assert "--overwrite" in refused("--experiment", "T4.7") and kept.read_text() == "precious"
    assert files_of(run_folder) == before and files_of(small_tiny_data) == data_before
    write(tmp_path / "runs/tiny/notes.txt", "precious")
    tiny = ["--tiny", "--data", str(small_tiny_data), *SMALL, "--tasks", "sst2", "--iterations"]
    train.main([*tiny, "1"])
    train.main([*tiny, "2"])
    assert logged(tmp_path / "runs/tiny", "iteration") == [1, 2]
    assert (tmp_path / "runs/tiny/notes.txt").read_text() == "precious"


@pytest.mark.parametrize("flags, says", [
    ("--tasks mnli", "this model's tasks are coco, sst2, vqa2"), ("--tasks ,", "--tasks"),
    ("--tasks coco --split test", "image_info_test-dev2017.json: missing"),
    ("--data nowhere", "nowhere: no such folder"), ("--data OUT", "missing"),
    ("--eval_samples -1", "at least 0"), ("--micro_batch x", "an integer"),
    ("--num_workers -1", "at least 0"), ("--precision fp8", "invalid choice"),
    ("--split dev", "invalid choice"), ("--text_pair x", "--text_pair"), ("--image=", "empty"),
    ("--text= --tasks sst2", "empty"), ("--text a --question b", "not allowed with"),
    ("--image nowhere.jpg", "nowhere.jpg: cannot be read as a picture"),
    ("--image OUT/last.pt --question what?", "last.pt: cannot be read as a picture"),
    ("--image OUT", "cannot be read as a picture"),
    ("--released x.pth", "not allowed with argument --checkpoint"),
    ("--check x", "unrecognized")])
def test_wrong_flags_of_eval(flags, says, run_folder, capsys):
    flags = flags.replace("OUT", str(run_folder))
    before = files_of(run_folder)
    assert says in mistake(capsys, "eval.py", "--checkpoint", run_folder / "last.pt",
                           *flags.split())
    assert files_of(run_folder) == before


@pytest.mark.parametrize("flags, says", [
    ("--data . --tasks coco,x", "unknown task 'x'; there are coco"),
    ("--data nowhere", "error: nowhere: no such folder; name the data sets' folder"),
    ("--data . --prepare vg", "error: vg/objects_vocab.txt: No such file"),
    ("--dat .", "unrecognized arguments: --dat ."), ("--prepare coco", "invalid choice")])
def test_wrong_flags_of_data(flags, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert says in mistake(capsys, "data.py", *flags.split())


def test_letters_that_are_no_text(run_folder, tmp_path, capsys):
    """NUL, half a character, thousands of words: answered, or a line."""
    ask = ["--checkpoint", str(run_folder / "last.pt"), "--out", str(tmp_path), "--tasks", "sst2"]
    for text in ("\udcff\x00 a film", "\u2028", " ", "猫" * 30, '"'):
        evaluation.main([*ask, "--text", text])
        assert "positive" in capsys.readouterr().out
    assert "--max_positions" in mistake(capsys, "eval.py", *ask, "--text", "film " * 500)


def spoilt_checkpoint(run_folder, out, changes):
    """last.pt in another folder, with other values; ... leaves one out."""
    state = torch.load(run_folder / "last.pt", weights_only=True)
    state |= {k: v(state[k]) if callable(v) else v for k, v in changes.items()}
    out.mkdir(exist_ok=True)
    torch.save({k: v for k, v in state.items() if v is not ...}, out / "last.pt")
    return out / "last.pt"


@pytest.mark.parametrize("changes", [
    dict(config=lambda c: c | {"decoder_width": 32}), dict(config=lambda c: c | {"bert_layers": 2}),
    dict(config=lambda c: c | {"shared_decoder": False}), dict(config=lambda c: c | {"new": 1}),
    dict(config=lambda c: c | {"decoder_heads": 3}), dict(config=...), dict(tasks=...),
    dict(tasks=lambda t: t[:1]), dict(tasks=[{}]), dict(model={}), dict(model=...),
    dict(labels=...), dict(model=lambda m: {k: v[..., :1] for k, v in m.items()})],
    ids=lambda c: [*c][0])
def test_checkpoint_of_another_configuration(changes, run_folder, tmp_path, capsys):
    path = spoilt_checkpoint(run_folder, tmp_path, changes)
    line = mistake(capsys, "eval.py", "--checkpoint", path)
    assert str(path) in line or "width" in line


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"hello", None], ids=repr)
def test_what_is_no_checkpoint(content, run_folder, small_tiny_data, tmp_path, capsys):
    path = tmp_path / "last.pt"
    whole = (run_folder / "last.pt").read_bytes()
    path.write_bytes(whole[:-100] if content is None else content)
    for flags in (["eval.py", "--checkpoint", path], ["eval.py", "--released", path],
                  ["train.py", "--tiny", "--data", small_tiny_data, "--init", path, "--out",
                   tmp_path / "new"]):
        assert "last.pt" in mistake(capsys, *flags)
    capsys.readouterr()
    with pytest.raises(SystemExit):  # here a warning comes first: why last.pt was passed over
        train.main(["--tiny", "--out", str(tmp_path), "--resume"])
    warning, error = capsys.readouterr().err.splitlines()
    assert "last.pt" in warning and "nothing to resume" in error


def test_resume_with_what_does_not_fit(run_folder, small_tiny_data, tmp_path, capsys):
    """Nothing there, other settings, other data, a file without the optimiser, an older version."""
    def resume(out, *more):
        return mistake(capsys, "train.py", "--tiny", "--data", small_tiny_data, "--out", out,
                       "--resume", *more)
    assert "nothing to resume" in resume(tmp_path / "none")
    assert not (tmp_path / "none").exists()
    for flags in ("--decoder_layers 3", "--lr 0.5", "--tasks coco", "--seed 1", "--iterations 7"):
        assert f"{flags}: the run in" in resume(run_folder, *flags.split())
    other = shutil.copytree(small_tiny_data, tmp_path / "data")
    for path in (other / "coco/annotations").glob("instances_*.json"):
        content = data.read_json(path)
        content["categories"].append({"id": 40, "name": "purple circle"})
        write(path, content)
    assert "give the --data of its training" in resume(run_folder, "--data", other)
    out = tmp_path / "out"
    spoilt_checkpoint(run_folder, out, dict(
        train=lambda t: {k: v for k, v in t.items() if k != "clip"}))
    assert "setting 'clip'" in resume(out)
    spoilt_checkpoint(run_folder, out, dict(config=lambda c: c | {"decoder_width": 32}))
    assert "does not fit" in resume(out)
    spoilt_checkpoint(run_folder, out, dict(optimizer=...))
    with pytest.raises(SystemExit):  # here a warning comes first
        train.main(["--tiny", "--out", str(out), "--resume"])
    assert "no run can go on from it: it has no optimizer" in capsys.readouterr().err


def logged(out, key):
    return [record[key] for record in log_of(out) if "loss" in record]


@pytest.mark.parametrize("log", ['{"iteration": 1, "loss": 3.5, "task": "coco"}\n', "", None])
@pytest.mark.parametrize("end", ["", '{"iteration": 4, "lo', "\0" * 50, "not json}\n", "{}\n",
                                 '{"iteration": 9}\n', "\udcff}\n"], ids=repr)
def test_a_log_of_any_ending_goes_on(log, end, run_folder, small_tiny_data, tmp_path):
    """What a kill, a crash of the machine or an editor left of log.jsonl: whole lines up to the
    checkpoint stay, all else goes, every iteration after it follows."""
    shutil.copy(run_folder / "previous.pt", tmp_path / "last.pt")
    if log is not None:
        (tmp_path / "log.jsonl").write_text(log + end, errors="surrogateescape")
    train.main(["--tiny", "--data", str(small_tiny_data), "--out", str(tmp_path), "--resume"])
    assert logged(tmp_path, "iteration") == [1] * bool(log) + [4, 5, 6]


def test_a_full_disk_at_the_log(run_folder, small_tiny_data, tmp_path, monkeypatch, capsys):
    """/dev/full takes nothing."""
    shutil.copy(run_folder / "previous.pt", tmp_path / "last.pt")
    opened = open
    monkeypatch.setattr("builtins.open", lambda path, *args, **kwargs: opened(
        "/dev/full" if str(path).endswith("log.jsonl") else path, *args, **kwargs))
    line = mistake(capsys, "train.py", "--tiny", "--data", small_tiny_data, "--out", tmp_path,
                   "--resume")
    assert "cannot be written (No space left on device); make room" in line


# ---- Killed at any time, and long runs -----------------------------------------------------------

def test_killed_at_any_time(small_tiny_data, tmp_path):
    """SIGKILL at eight random moments, from the first line of the program on: while it loads,
    trains, saves, evaluates, or reads what the last kill left. After each, every line of log.jsonl
    is JSON and the run goes on; at its end the weights are those of a run that nobody killed."""
    flags = ["--tiny", "--data", small_tiny_data, *SMALL, "--iterations", 150, "--log_every", 3,
             "--save_every", 4, "--eval_every", 19, "--dropout", 0.1]
    out, whole = tmp_path / "run", tmp_path / "whole"

    def start(workers):
        how = "--resume" if any(out.glob("*.pt")) else "--overwrite"
        return Forked(train.main, [*flags, "--out", out, how, "--num_workers", workers])

    rng, killed = np.random.default_rng(0), 0
    for moment in rng.uniform(0, 0.8, 8):
        process, = start(workers=rng.integers(2)).processes
        time.sleep(moment)
        process.kill()
        process.join()
        killed += process.exitcode == -signal.SIGKILL
        if (out / "log.jsonl").exists():
            text = (out / "log.jsonl").read_text()
            assert text.endswith("\n") or not text
            numbers = logged(out, "iteration")
            assert numbers == list(range(1, len(numbers) + 1))
    start(workers=0).wait()
    assert killed >= 4
    Forked(train.main, [*flags, "--out", whole]).wait()
    assert equal(weights(out), weights(whole))
    losses = logged(whole, "loss")
    assert logged(out, "loss") == losses and len(losses) == 150


def usage(pid):
    """Of a process: resident memory, the part that it alone has written to (MB), open files."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    memory = {k: int(v) / 1024 for k, v in re.findall(r"^(\w+): +(\d+) kB", text, re.M)}
    return memory["Rss"], memory["Private_Dirty"], len(os.listdir(f"/proc/{pid}/fd"))


@pytest.mark.slow
def test_a_long_run_keeps_its_size(small_tiny_data, tmp_path):
    """2,000 iterations of the real command with two data workers, checkpoints and evaluations:
    memory and open files of every process are flat after the first 200. (With all of the tiny
    data a worker grows by 60 MB until it has seen every picture once: it keeps them decoded.)"""
    process = run_python(
        [sys.executable, ROOT / "train.py", "--tiny", "--data", small_tiny_data, "--out",
         tmp_path / "run", *SMALL, "--iterations", 2000, "--log_every", 20, "--save_every", 100,
         "--eval_every", 100, "--num_workers", 2],
        wait=False)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    seen = {}  # {iteration: usage of the run and its two workers}
    for line in process.stdout:
        if found := re.match(r" *(\d+)/2000 ", line):
            with contextlib.suppress(OSError):  # the last ones may have ended
                pids = [process.pid, *children.read_text().split()]
                seen[int(found[1])] = [usage(pid) for pid in pids]
    assert process.wait() == 0 and len(seen) > 80

    def part(first, last):  # (iteration, process, measure)
        return np.array([x for i, x in seen.items() if first <= i <= last and len(x) == 3])
    early, late = part(200, 400), part(1700, 1980)
    growth = np.median(late, 0) - np.median(early, 0)  # (process, measure)
    assert len(early) > 5 and len(late) > 5 and growth[:, :2].max() < 8, growth
    # What waits between processes has open files, too: up to four batches a worker.
    assert (late.max(0) < early.max(0) + 10)[:, 2].all()
    assert log_of(tmp_path / "run")[-1]["iteration"] == 2000


# ---- What people hit: small folders and commands beside the project ------------------------------

CHECK = ROOT.parent / "shared" / "cases" / "check.py"
FILES = "^(?!signal|nohup|worker|ulimit|shm|two-|warmup|grad|weights)"
QUICK = "vg|glue-(bom|gzip)|snli-b|exif|size|windows|mac|picture-(zero-bytes$|html)|vqa-(im|qu|one)"


@pytest.mark.skipif(not CHECK.exists(), reason="no cases beside the project")
@pytest.mark.parametrize("more", [
    ["--only", f"{FILES}({QUICK})"],
    pytest.param(["--only", FILES, "--skip", QUICK], marks=pytest.mark.slow),
    pytest.param(["--skip", FILES], marks=pytest.mark.slow)], ids=["some", "files", "processes"])
def test_what_people_hit(more):
    output = run_python([sys.executable, CHECK, *more], cwd=ROOT, timeout=900)
    assert len(re.findall("^ok ", output, re.MULTILINE)) > 10
