"""The README's recipes, typed: a ninth task, and own data, from the user's files to an answer."""
import itertools
import json
import re
import shlex
import sys

import pytest
from conftest import ROOT, run_python
from PIL import Image
from test_readme import README, section

SHORT = ["--iterations", 2, "--warmup", 1, "--eval_samples", 4, "--num_workers", 0]


def commands(title):
    """Those of a section's blocks, without comments, as lists of words."""
    lines = section(title).replace("\\\n", "").splitlines()
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("python ")]


@pytest.fixture(scope="module")
def typed(tmp_path_factory):
    """A function that runs a command of the README in a folder, and that folder."""
    folder = tmp_path_factory.mktemp("typed")
    (folder / "tests").symlink_to(ROOT / "tests")

    def run(words, **kwargs):
        return run_python([sys.executable, ROOT / words[0], *words[1:]], cwd=folder, **kwargs)
    return run, folder


def test_the_ninth_task_as_printed(typed):
    run, folder = typed
    training, evaluating = commands("A ninth task")
    run(training)
    results, pictures = folder / "runs/count/results.json", folder / "runs/count/predictions.png"
    trained = json.loads(results.read_text())
    assert trained["count"]["accuracy"] >= 95
    results.unlink(), pictures.unlink()
    run(evaluating)
    assert json.loads(results.read_text()) == trained and pictures.exists()
    # Never code that a checkpoint names: without the flag there is no such task.
    assert evaluating[1:3] == ["--tasks_from", "tests/own.py"]
    assert "--tasks_from" in run(evaluating[:1] + evaluating[3:], expect=2)
    listed = run(["data.py", "--tasks_from", "tests/own.py", "--data", "runs/tiny-data"])
    assert re.search(r"^count +train ", listed, re.M)


def test_own_data_as_printed(typed):
    """The recipes from the user's files to an answer, with few iterations."""
    run, folder = typed
    pictures, tables = folder / "mine/questions/pictures", {}
    for path in (pictures, folder / "mine/sentences", folder / "xml"):
        path.mkdir(parents=True)
    tables["questions"] = ["picture\tquestion\tanswer"]
    tables["sentences"] = ["first\tsecond\tlabel"]
    for n in range(10):
        colour = ["red", "blue"][n % 2]
        picture = Image.new("RGB", (80, 60), colour)
        picture.save(pictures / f"{n}.png")
        (folder / f"xml/{n}.xml").write_text(
            f"<annotation><filename>{n}.png</filename><size><width>80</width><height>60</height>"
            f"</size><object><name>{colour}</name><bndbox><xmin>10</xmin><ymin>20</ymin>"
            "<xmax>40</xmax><ymax>50</ymax></bndbox></object></annotation>")
        tables["questions"].append(f"{n}.png\tWhat colour is it?\t{colour}")
        tables["sentences"].append(f"the sky is {colour}\tit is so\t{colour} sky")
    for name, split in itertools.product(tables, ("train", "val")):
        (folder / f"mine/{name}/{split}.tsv").write_text("\n".join(tables[name]))
    picture.save(folder / "new.jpg"), picture.save(folder / "new.png")
    voc, = re.findall(r"`python (tests/voc.py .*?)`", README)
    run(voc.replace("XML_FOLDER", "xml").replace("PICTURE_FOLDER", str(pictures)).split())
    found = json.loads((folder / "mine/coco/annotations/instances_val2017.json").read_text())
    boxes = [(box["category_id"], box["bbox"]) for box in found["annotations"]]
    assert boxes == [(0, [10, 20, 30, 30]), (1, [10, 20, 30, 30])]  # of pictures 0 and 5
    assert [x["name"] for x in found["categories"]] == ["red", "blue"]
    printed = []
    for words in commands("Your own data"):
        if "vocab" in words:
            (folder / "mine/bert/vocab.txt").unlink(missing_ok=True)
        printed.append(run(words + (SHORT if words[0] == "train.py" else [])))
    assert "boxes of at least 50%, drawn into runs/mine/" in printed[2]
    assert set(re.findall(r"% +(.+)", printed[5])) == {"red", "blue"}
    assert set(re.findall(r"% +(.+)", printed[8])) == {"red sky", "blue sky"}
    for name in ("mine", "questions", "sentences"):
        assert (folder / f"runs/{name}/predictions.png").exists()
    # The questions' model keeps its word pieces, whatever the folder has now.
    results = folder / "runs/questions/results.json"
    trained = results.read_text()
    results.unlink()
    run(["eval.py", "--tasks_from", "tests/own.py", "--checkpoint", "runs/questions/last.pt",
         "--eval_samples", 4])
    assert json.loads(results.read_text()) == json.loads(trained)


def test_mistakes_in_own_data(typed):
    """After the recipes: classes that differ between the files, and a table without tabs."""
    run, folder = typed
    boxes, _, sentences = [x for x in commands("Your own data") if "--data" in x and "--out" in x]
    val = folder / "mine/coco/annotations/instances_val2017.json"
    val.write_text(val.read_text().replace('"red"', '"pink"'))
    said = run([*boxes, *SHORT, "--overwrite"], expect=2)
    assert "instances_val2017.json: coco has other classes than the model was trained" in said
    (folder / "mine/sentences/train.tsv").write_text("sentence,label\nfine,good")
    said = run([*sentences, *SHORT, "--overwrite"], expect=2)
    assert "mine/sentences/train.tsv: line 1: 1 columns, not 2 to 3" in said
    (folder / "xml/0.xml").write_text("<annotation>")
    assert "xml/0.xml: no VOC annotation" in run(["tests/voc.py", "xml", "xml", "v"], expect=1)
