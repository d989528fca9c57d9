"""The README: what it prints runs, what it names exists."""
import itertools
import json
import re
import shlex
import sys

import pytest
from PIL import Image, ImageDraw

import data
import eval as evaluation
import train
import unit
from conftest import ROOT, run_python

README = (ROOT / "README.md").read_text()
SHORT = ["--iterations", 2, "--warmup", 1, "--eval_samples", 4, "--num_workers", 0]


def section(title):
    return re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", README, re.M | re.S)[1]


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
    xml, pictures, questions, sentences = [
        folder / name for name in ("xml", "mine/questions/pictures", "mine/questions",
                                   "mine/sentences")]
    for path in (xml, pictures, sentences):
        path.mkdir(parents=True)
    rows = {"questions": ["picture\tquestion\tanswer"], "sentences": ["first\tsecond\tlabel"]}
    for n, colour in zip(range(10), itertools.cycle(["red", "blue"])):
        picture = Image.new("RGB", (80, 60))
        ImageDraw.Draw(picture).rectangle([10, 20, 40, 50], fill=colour)
        picture.save(pictures / f"{n}.png")
        (xml / f"{n}.xml").write_text(
            f"<annotation><filename>{n}.png</filename><size><width>80</width><height>60</height>"
            f"</size><object><name>{colour}</name><bndbox><xmin>10</xmin><ymin>20</ymin>"
            "<xmax>40</xmax><ymax>50</ymax></bndbox></object></annotation>")
        rows["questions"].append(f"{n}.png\tWhat colour is it?\t{colour}")
        rows["sentences"].append(f"the sky is {colour}\tit is so\t{colour} sky")
    for name, split in itertools.product(rows, ("train", "val")):
        (folder / f"mine/{name}/{split}.tsv").write_text("\n".join(rows[name]) + "\n")
    picture.save(folder / "new.jpg"), picture.save(folder / "new.png")
    voc, = re.findall(r"`python (tests/voc.py .*?)`", section("Your own data"))
    printed = run(voc.replace("XML_FOLDER", "xml")
                  .replace("PICTURE_FOLDER", "mine/questions/pictures").split())
    assert "2 pictures, 2 boxes, 2 classes" in printed and "8 pictures, 8 boxes" in printed
    found = json.loads((folder / "mine/coco/annotations/instances_val2017.json").read_text())
    assert [box["bbox"] for box in found["annotations"]] == [[10, 20, 30, 30]] * 2
    assert [found["categories"][box["category_id"]]["name"] for box in found["annotations"]] == [
        "red", "blue"]  # of pictures 0 and 5
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


# --------------------------------------------------------------------------------------------------
# Its commands, links, flags and rows
# --------------------------------------------------------------------------------------------------

PARSERS = {"train.py": train.make_parser, "eval.py": evaluation.parser}


def test_the_readme_s_commands_parse():
    commands = re.findall(r"(?:python|=\d+) ((?:train|eval)\.py[^\n`#&|]*)", README.replace("\\\n", ""))
    assert len(commands) > 10
    for command in commands:
        script, *words = shlex.split(command)
        PARSERS[script]().parse_args(words)  # exits on an unknown flag


def test_the_readme_s_links_and_flags_exist():
    anchors = {re.sub(r"[^\w -]", "", h).strip().lower().replace(" ", "-")
               for h in re.findall(r"^##+ (.+)$", README, re.M)}
    for anchor in re.findall(r"\]\(#([\w-]+)\)", README):
        assert anchor in anchors
    known = {o for p in PARSERS.values() for a in p()._actions for o in a.option_strings}
    known |= {"--prepare", "--check", "--data", "--nproc_per_node", "--nnodes", "--index-url",
              "--rdzv_backend", "--rdzv_id", "--rdzv_endpoint", "--nodes", "--ntasks-per-node",
              "--gpus-per-node", "--cpus-per-task", "--signal", "--shutdown-timeout", "--shm-size",
              "--quick", "--only", "--rounds"}
    for flag in re.findall(r"(?<![\w-])(--[a-z]\w[\w-]*)", README):
        assert flag in known, flag


def test_the_list_has_every_experiment(capsys):
    """Each row: name, data sets, iterations, flags, and the numbers that the paper has for it."""
    train.list_experiments()
    lines = capsys.readouterr().out.splitlines()[1:]
    assert [line.split()[0] for line in lines] == list(train.EXPERIMENTS)
    for line, (name, changes) in zip(lines, train.EXPERIMENTS.items()):
        tasks = changes["tasks"]
        wanted = ["all eight" if tasks == train.EIGHT else ",".join(tasks),
                  f"{changes.get('iterations', 500_000):,}"]
        wanted += [f"--{key} {train.written(value)}" for key, value in changes.items()
                   if key not in ("tasks", "iterations")]
        wanted += [f"{task} {x}" for task, x in evaluation.PAPER.get(name, {}).items()]
        assert all(words in line for words in wanted), (line, wanted)


# --------------------------------------------------------------------------------------------------
# The paper, findable in the code and in the README's map
# --------------------------------------------------------------------------------------------------

PAPER = {"Eq": [str(n) for n in range(1, 10)],
         "Section": ["1", "3", "3.1", "3.2", "3.3", "3.4", "3.5", "4.1", "4.2"],
         "Appendix": list("ABCDE"),
         "Table": ["1", "2", "3", "4", "A.1", "A.2", "C.1"],
         "Figure": ["1", "2", "3", "D.1", "E.1"],
         "footnote": [str(n) for n in range(1, 9)]}
NUMBER = r"(?:[A-E]\.)?\d+(?:\.\d+)*|[A-E]"
CITATION = re.compile(r"\b(Eq|Section|Appendix|Table|Figure|footnote)(?:s|\.)? "
                      rf"((?:(?:{NUMBER})(?:, (?:and )?| and |-)?)+)\b", re.I)


def citations(text):
    """{kind: numbers}: "Tables 1-4 and C.1" cites 1, 2, 3, 4 and C.1."""
    text, found = text.replace("Appendices", "Appendix"), {kind: set() for kind in PAPER}
    kinds = {kind.lower(): kind for kind in PAPER}
    for kind, numbers in CITATION.findall(text):
        for first, last in re.findall(rf"({NUMBER})(?:-(\d+))?", numbers):
            found[kinds[kind.lower()]] |= (
                {str(n) for n in range(int(first), int(last) + 1)} if last else {first})
    return found


def test_citations_are_read_as_people_write_them():
    found = citations("Tables 1-4 and C.1; Section 3.5, Eq. 7; Figures 3, E.1 and D.1. Footnote 2")
    assert found["Table"] == {"1", "2", "3", "4", "C.1"} and found["Section"] == {"3.5"}
    assert found["Figure"] == {"3", "E.1", "D.1"} and found["Eq"] == {"7"}
    assert found["footnote"] == {"2"} and not found["Appendix"]


@pytest.mark.parametrize("where", ["code", "map"])
def test_every_part_of_the_paper_is_cited(where):
    text = section("From the paper to the code") if where == "map" else "\n".join(
        (ROOT / name).read_text() for name in ("unit.py", "data.py", "eval.py", "train.py"))
    found = citations(text)
    missing = {kind: sorted(set(numbers) - found[kind]) for kind, numbers in PAPER.items()}
    assert not any(missing.values()), missing


def test_every_equation_stands_at_a_line_that_computes_it():
    code = (ROOT / "unit.py").read_text()
    for number in range(1, 10):
        assert re.search(rf"^ +\S.*\S +# (?:.*\W)?Eq\. {number}\b", code, re.M), f"Eq. {number}"


def test_the_map_names_what_exists():
    rooms = {"unit": unit, "data": data, "eval": evaluation, "train": train}
    names = re.findall(r"`(unit|data|eval|train)\.(?!py)([A-Za-z_]\w*)((?:\.\w+)*)`",
                       section("From the paper to the code"))
    assert len(names) > 30
    for room, name, rest in names:
        found = getattr(rooms[room], name)
        for part in rest.split(".")[1:]:
            found = getattr(found, part)
