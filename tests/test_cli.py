"""The command line as a user types it."""
import dataclasses
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import data
import eval as evaluation
import train
import unit
from conftest import ROOT, Forked, run_python
from test_data import REAL, real
from test_train import SMALL, log_of

MAIN = {"train.py": train.main, "eval.py": evaluation.main, "data.py": data.main}


def run(script, *arguments, timeout=300):
    return Forked(MAIN[script], arguments).wait(timeout=timeout)


def results_of(out):
    return json.loads((out / "results.json").read_text())


def settings(line):
    """Config, TrainConfig and --out of a command."""
    values, out = train.chosen_settings(train.make_parser().parse_args(line.split()))
    return *train.configs(values), out


# ---- Experiments: every line of the paper's tables

def test_every_line_of_the_paper_is_an_experiment():
    """`eval.PAPER` has them all (tests/test_eval.py). Without a number: Section 4.2, Appendix A."""
    assert {*train.EXPERIMENTS} - {*evaluation.PAPER} == {"S4.2-1536", "A-skip", "A-update"}
    assert {*evaluation.PAPER} <= {*train.EXPERIMENTS}


@pytest.mark.parametrize("name", train.EXPERIMENTS)
def test_every_experiment_builds_and_takes_a_step(name, small_tiny_data):
    """At tiny's sizes, its checkpoint to start from replaced by nothing."""
    config, run_config, _ = settings(f"--tiny --experiment {name} --data {small_tiny_data} "
                                     "--batch_size 2")
    run_config = dataclasses.replace(run_config, init="", init_parts=())
    train.check(config, run_config, 1, starting=True)
    model, datasets, _, _ = train.build(config, run_config, False, None)
    optimizer = train.make_optimizer(model, run_config)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    for task in run_config.tasks:
        batch = data.collate(datasets[task].task, [datasets[task].sample(i) for i in range(2)])
        terms, norm, _ = train.update(train.Step(model), optimizer, scaler, [batch], run_config, 3)
        assert all(v.isfinite() for v in terms.values()) and norm > 0
    changed = train.EXPERIMENTS[name]
    if "decoder_width" in changed:  # 256 of 768 is a third of tiny's width too
        tiny = train.TINY["decoder_width"] / 768
        assert config.decoder_width == pytest.approx(tiny * changed["decoder_width"], rel=0.13)


# ---- Runs

def test_the_smoke_run(tmp_path):
    """Data, 20 iterations, evaluation of all eight, the table, both pictures: within 45 seconds."""
    began, out = time.time(), tmp_path / "run"
    output = run_python([sys.executable, ROOT / "train.py", "--tiny", "--iterations", 20, "--data",
                         tmp_path / "data", "--out", out])
    assert time.time() - began < 45
    results = results_of(out)
    assert set(results) == {t.name for t in data.TASKS}
    assert all(re.search(f"^{task} ", output, re.M) for task in results)
    for name in ("config.json", "log.jsonl", "last.pt", "predictions.png", "curves.png"):
        assert (out / name).stat().st_size > 0
    keys = set().union(*log_of(out))
    assert all(f"`{key}`" in train.Log.__doc__ for key in keys)
    run("eval.py", "--checkpoint", out / "last.pt", "--tasks", "sst2,coco", "--out", tmp_path / "x")
    assert results_of(tmp_path / "x") == {k: results[k] for k in ("sst2", "coco")}


SIZES = [(32, "small", ()), (96, "resnet50", ()),
         *((size, backbone, pytest.mark.slow) for size in (96, 160, 320, 800)
           for backbone in ("small", "resnet50") if (size, backbone) != (96, "resnet50"))]


@real
@pytest.mark.parametrize("size, backbone", [pytest.param(*x, marks=m) for *x, m in SIZES])
def test_every_image_size_is_one_path(size, backbone, tmp_path):
    """A run, a longer one resumed from it and an evaluation on real photographs, two of unequal
    sizes in a micro-batch; eval.py takes size and micro-batch from the checkpoint."""
    out = tmp_path / "run"
    command = ["train.py", *SMALL, "--data", REAL, "--tasks", "coco", "--image_size", size, "--out",
               out, "--backbone", backbone, "--pretrained", "false", "--detection_queries", 40,
               "--batch_size", 2, "--micro_batch", 2, "--iterations", 2, "--save_every", 1,
               "--dropout", 0]  # or a CPU makes the whole L x L matrix: 24 GB at 800 pixels
    run(*command, timeout=1200)
    results = results_of(out)
    (out / "last.pt").unlink()  # previous.pt is of iteration 1
    assert "going on after iteration 1 of 2" in run(*command, "--resume", timeout=1200)
    assert results_of(out) == results
    checkpoint = torch.load(out / "last.pt", weights_only=True)
    assert checkpoint["config"]["image_size"] == size
    output = run("eval.py", "--checkpoint", out / "last.pt", "--eval_samples", 4, "--out",
                 tmp_path / "eval", timeout=1200)
    assert "images: 2 at a time" in output and results_of(tmp_path / "eval") == results


@pytest.mark.slow
@real
def test_full_size_on_real_rows(tmp_path):
    """Official files, full size, random weights: no code path belongs to the tiny data alone. With
    this seed, 12 iterations draw all eight."""
    output = run("train.py", "--data", REAL, "--batch_size", 1, "--eval_samples", 1,
                 "--seed", 5, "--iterations", 12, "--probabilities", ",".join("1" * 8),
                 "--log_every", 1, "--num_workers", 1, "--out", tmp_path / "run", timeout=1800)
    assert "RANDOM" in output
    lines = log_of(tmp_path / "run")
    assert {x["task"] for x in lines if "loss" in x} == set(train.EIGHT)
    # Those rows hold no held-out picture of VG and VQAv2.
    assert set(lines[-1]["results"]) == set(train.EIGHT) - {"vg", "vqa2"}


# ---- Mistakes: one line that names the fix, exit status 2 (more in test_robust.py)

def test_what_is_missing_comes_with_the_command_that_makes_it(tmp_path, capsys, monkeypatch):
    """Word by word: what it makes is what was looked for."""
    monkeypatch.chdir(tmp_path)
    for out in ([], ["--out", "runs/7/tiny-TC.1.9"]):
        with pytest.raises(SystemExit):
            train.main(["--tiny", "--experiment", "TC.1.9", *out])
        wanted, command = re.search(r"error: (\S+): .*`python train.py (.*)`",
                                    capsys.readouterr().err).groups()
        assert settings(command)[2] / "last.pt" == Path(wanted)


def test_the_reader_of_the_output_may_leave():
    """`python train.py --list | head` ends without a traceback."""
    listing = subprocess.Popen([sys.executable, ROOT / "train.py", "--list"], text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    listing.stdout.close()
    assert listing.stderr.read() == "" and listing.wait() == 1


# ---- Flags

def test_help_names_every_flag_with_its_default_and_tinys(capsys):
    with pytest.raises(SystemExit):
        train.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for config in (train.TrainConfig, unit.Config):
        assert all(f"--{field.name} " in text for field in dataclasses.fields(config))
    assert text.index("what to run:") < text.index("--tasks A,B") < text.index("the model (")
    tiny = train.TINY
    assert f"(Section 4.2) [500000; tiny: {tiny['iterations']}]" in text
    assert f"d_t^d (Table A.1; 256 in Table 4 line 4) [768; tiny: {tiny['decoder_width']}]" in text
    assert text.count("; tiny: ") == len(train.TINY)


def test_flags_mean_what_they_say_and_have_the_last_word():
    """They win over --experiment and --tiny; tiny's own settings lose what they suppose."""
    assert settings("--precision FP16")[1].precision == "fp16"
    for line in ("--init T1.1-coco --out runs/mine", "--experiment T1.4 --out runs/mine"):
        assert settings(line)[1].init == "runs/T1.1-coco/last.pt"
    for line, tasks in (("", ["vqa2"]), ("--experiment T4.5", ["vqa2", "snli_ve", "mnli"]),
                        ("--all_text_states mnli", ["mnli"])):
        assert set(settings(f"--as_released {line}")[0].all_text_states) == {*tasks}
    config, run_config, out = settings("--tiny --experiment T4.2 --decoder_layers 3")
    assert config.decoder_layers == 3 and out.name == "tiny-T4.2" and not run_config.probabilities
    assert settings("--tiny")[1].first_tasks == train.TINY["first_tasks"]
    assert settings("--tiny --tasks mnli,vg")[1].first_tasks == ("mnli",)
    assert settings("--tiny --init some/last.pt")[1].first_tasks == ()
    assert settings("--tiny --init some/last.pt --first_tasks vg")[1].first_tasks == ("vg",)
    assert settings("--tiny --experiment T1.4 --out a/b")[1].init == "a/tiny-T1.1-coco/last.pt"
