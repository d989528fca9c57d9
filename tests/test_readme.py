"""The README: what it names exists. (tests/test_recipes.py types its commands.)"""
import itertools
import re
import shlex
from fnmatch import fnmatch

import pytest

import data
import eval as evaluation
import train
import unit
from conftest import ROOT

README = (ROOT / "README.md").read_text()


def section(title):
    return re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", README, re.M | re.S)[1]


# ---- What it names exists ------------------------------------------------------------------------
def test_every_line_has_room_on_a_screen():
    lines = README.splitlines()
    assert len(lines) <= 300 and max(map(len, lines)) <= 120


def test_commands_flags_links_and_experiments():
    parsers = {"train.py": train.make_parser(), "eval.py": evaluation.parser()}
    text = README.replace("\\\n", "")
    found = re.findall(r"(?:python|=\d+) ((?:train|eval)\.py[^\n`#&|]*)", text)
    assert len(found) > 20
    for script, *words in map(shlex.split, found):
        parsers[script].parse_args(words)  # exits on an unknown flag
    known = set("--prepare --check --data --nproc_per_node --nnodes --index-url --rdzv_backend "
                "--rdzv_id --rdzv_endpoint --nodes --ntasks-per-node --gpus-per-node --signal "
                "--cpus-per-task --shutdown-timeout --shm-size --only".split())
    known |= {o for p in parsers.values() for a in p._actions for o in a.option_strings}
    assert set(re.findall(r"(?<![\w-])(--[a-z]\w[\w-]*)", README)) <= known
    headings = re.findall(r"^##+ (.+)$", README, re.M)
    anchors = {re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings}
    for link in re.findall(r"\]\((?!https:)(.+?)\)", README):
        assert link[1:] in anchors if link[0] == "#" else (ROOT / link).exists(), link
    assert set(re.findall(r"\b(T[C\d]\.[\w.-]*\w)\b", README)) - {"T3.6"} <= set(train.EXPERIMENTS)


def test_the_layout_has_every_official_file():
    """The first column of the table, with its {a,b} written out."""
    words = re.findall(r"`(\w+/[^`]*)`", section("Official data"))
    while braces := [word for word in words if "{" in word]:
        head, choices, tail = re.fullmatch(r"(.*?){(.*?)}(.*)", braces[0]).groups()
        words.remove(braces[0])
        words += [head + choice + tail for choice in choices.split(",")]
    for task in data.TASKS:
        for path in itertools.chain(*task.dataset.files.values()):
            made = path.startswith("vg/instances_")  # by --prepare vg
            assert made or any(fnmatch(path, word) for word in words), path


def test_the_code_that_it_names_exists():
    rooms = {"unit": unit, "data": data, "eval": evaluation, "train": train}
    names = re.findall(r"`(unit|data|eval|train)\.(?!py|tsv)([A-Za-z_]\w*)((?:\.\w+)*)`", README)
    assert len(names) > 25
    for room, name, rest in names:
        found = getattr(rooms[room], name)
        for part in rest.split(".")[1:]:
            found = getattr(found, part)


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


# ---- The paper, findable in the code and in the README's map -------------------------------------
PAPER = {"Eq": "1 2 3 4 5 6 7 8 9", "Section": "1 3 3.1 3.2 3.3 3.4 3.5 4.1 4.2",
         "Appendix": "A B C D E", "Table": "1 2 3 4 A.1 A.2 C.1", "Figure": "1 2 3 D.1 E.1",
         "footnote": "1 2 3 4 5 6 7 8"}


@pytest.mark.parametrize("where", ["code", "map"])
def test_every_part_of_the_paper_is_cited(where):
    """Alone, "Section 3.1", or in a list, "Tables 1, 2 and C.1"."""
    text = section("From the paper to the code") if where == "map" else "\n".join(
        (ROOT / name).read_text() for name in ("unit.py", "data.py", "eval.py", "train.py"))
    text = text.replace("Appendices", "Appendix").replace("1-9", "1, 2, 3, 4, 5, 6, 7, 8, 9")
    for kind, numbers in PAPER.items():
        for number in map(re.escape, numbers.split()):
            cited = rf"(?i:{kind})(s|\.)? ([\dA-E.,]|and| )*(?<![\w.]){number}\b(?!\.\d)"
            assert re.search(cited, text), f"{kind} {number}"


def test_every_equation_stands_at_a_line_that_computes_it():
    code = (ROOT / "unit.py").read_text()
    for number in range(1, 10):
        assert re.search(rf"^ +\S.*\S +# (?:.*\W)?Eq\. {number}\b", code, re.M), f"Eq. {number}"
