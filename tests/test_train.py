"""train.py: schedule, optimiser, how a batch is cut, stopping and going on.

The runs are real ones, on small parts of the tiny data sets, in forked processes; signals come from
outside."""
import copy
import dataclasses
import json
import math
import os
import re
import resource
import shutil
import signal
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
from test_unit import SENTENCES, SHAPES, make_model, text_batch

SMALL = ("--encoder_width 16 --encoder_heads 2 --encoder_ff 16 --encoder_layers 1 --bert_width 16 "
         "--bert_heads 2 --bert_ff 16 --bert_layers 1 --decoder_width 16 --decoder_heads 2 "
         "--decoder_ff 16 --decoder_layers 2 --batch_size 8 --warmup 1 --lr 1e-3 "
         "--lr_backbone 1e-3 --num_workers 0 --eval_samples 4 --first_share 0").split()


def start(out, *more, data_dir, **kwargs):
    arguments = ["--tiny", "--data", data_dir, "--out", out, *SMALL, *more]
    return Forked(train.main, arguments, **kwargs)


def finish(out, *more, expect=0, timeout=120, **kwargs):
    return start(out, *more, **kwargs).wait(expect, timeout=timeout)


def weights(out, name="last.pt"):
    return torch.load(Path(out) / name, weights_only=True)["model"]


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def clones(model):
    return {name: x.clone() for name, x in model.state_dict().items()}


def log_of(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def wait_for_iteration(run, iteration):
    for line in run.stdout:
        if re.match(rf"\s*{iteration}/", line):
            return
    pytest.fail(f"the run ended before iteration {iteration}")


def killed_at(iteration, out, *more, **kwargs):
    run = start(out, *more, "--log_every", 1, **kwargs)
    wait_for_iteration(run, iteration)
    run.processes[0].kill()
    run.processes[0].join()


# A gradient that is mathematically zero is rounding noise, which AdamW blows up to full steps: key
# biases and what is added to all keys alike; the first decoder layer's self-attention, which sees
# no content; and where the memory is one [CLS], all queries are the same, so that self-attention's
# queries and keys and the query embeddings change nothing.
ZERO_GRADIENT = re.compile(r"k_proj\.bias|position_projection\.bias|self_attention\.[qk]_proj"
                           r"|layers\.0\.self_attention\.v_proj\.weight"
                           r"|queries\.(qnli|mnli|qqp|sst2)")


def farthest(a: dict, b: dict, skip: bool = True) -> tuple[float, str]:
    """The largest difference between two runs' weights, and where it is."""
    assert a.keys() == b.keys()
    return max(((a[k] - b[k]).abs().max().item(), k) for k in a
               if not (skip and ZERO_GRADIENT.search(k)))


# ---- The optimiser (its schedule: test_by_hand.py)

@pytest.fixture()
def model():
    torch.manual_seed(0)
    return make_model([dataclasses.replace(SENTENCES, name=name) for name in ("a", "b")])


def one_update(model, task, config, optimizer, scaler=None):
    scaler = scaler or torch.amp.GradScaler("cpu", enabled=False)
    config = dataclasses.replace(config, batch_size=4)
    return train.update(train.Step(model), optimizer, scaler, [text_batch(task, 4)], config, 0.0)


def test_unused_parameters_are_skipped_unless_asked(model):
    """Appendix A: after a step on task b, a's classifier still moves by momentum, or stands."""
    for update_unused in (False, True):
        config = train.TrainConfig(update_unused=update_unused, lr=1e-2)
        optimizer = train.make_optimizer(model, config)
        one_update(model, "a", config, optimizer)
        before = clones(model.heads["a"])
        one_update(model, "b", config, optimizer)
        assert equal(before, model.heads["a"].state_dict()) != update_unused


def test_the_gradient_is_clipped(model):
    """AdamW's first average is a tenth of the gradient that it gets."""
    config = train.TrainConfig(clip=0.01)
    optimizer = train.make_optimizer(model, config)
    _, norm, _ = one_update(model, "a", config, optimizer)
    averages = [state["exp_avg"].flatten() for state in optimizer.state.values()]
    assert norm > 0.02 and 10 * torch.cat(averages).norm() == pytest.approx(0.01, rel=1e-3)


def test_the_backbone_has_its_own_learning_rate():
    model = detector()
    groups = train.make_optimizer(model, train.TrainConfig()).param_groups
    assert [g["base_lr"] for g in groups] == [5e-5, 1e-5]
    backbone = [*model.image_encoder.backbone.parameters()]
    assert {*map(id, groups[1]["params"])} == {*map(id, backbone)}


# ---- The batch of 64 is 64 on any number of processes

def test_the_same_update_however_the_batch_is_cut(tmp_path, small_tiny_data):
    """20 iterations of all eight tasks, pictures without boxes and boxes without attributes among
    them, end with the same weights for any number of processes and micro-batch; in double
    precision, for which there is no flag."""
    found = []
    for processes, micro_batch in ((1, 8), (1, 4), (2, 4), (2, 2), (4, 2)):
        out = tmp_path / f"{processes}x{micro_batch}"
        finish(out, "--iterations", 20, "--micro_batch", micro_batch, "--save_every", 100,
               "--probabilities", ",".join("1" * 8), processes=processes, data_dir=small_tiny_data,
               first=lambda: torch.set_default_dtype(torch.float64))
        found.append(weights(out))
    assert {x.get("task") for x in log_of(tmp_path / "1x8")} >= set(train.EIGHT)
    for other in found[1:]:
        assert farthest(found[0], other, skip=False)[0] < 1e-9


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_trains(tmp_path, small_tiny_data, precision):
    finish(tmp_path, "--iterations", 8, "--precision", precision, data_dir=small_tiny_data)
    assert all(math.isfinite(x["loss"]) for x in log_of(tmp_path) if "loss" in x)
    assert weights(tmp_path)["heads.coco.class_head.weight"].dtype == torch.float32


# ---- A run can stop anywhere and go on

LONG = ("--iterations", 60, "--dropout", 0.1, "--save_every", 7)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, small_tiny_data):
    """The weights that the interrupted runs must end with, by the same dropout."""
    out = tmp_path_factory.mktemp("whole")
    finish(out, *LONG, data_dir=small_tiny_data)
    return weights(out)


@pytest.mark.parametrize("number, workers", [(signal.SIGTERM, 2), (signal.SIGINT, 0),
                                             (signal.SIGHUP, 1), (signal.SIGUSR1, 0)])
def test_resuming_is_exact(tmp_path, small_tiny_data, uninterrupted, number, workers):
    """A run that was told to stop and goes on ends with the same bits, whatever the number of data
    workers. (A run that was killed: with the unusable pictures below.)"""
    run = start(tmp_path, *LONG, "--log_every", 1, "--num_workers", workers,
                data_dir=small_tiny_data)
    wait_for_iteration(run, 31)
    os.kill(run.processes[0].pid, number)
    assert "go on with --resume" in run.wait(128 + number)
    output = finish(tmp_path, *LONG, "--resume", data_dir=small_tiny_data)
    assert re.search("going on after iteration [1-9]", output)
    assert equal(uninterrupted, weights(tmp_path))
    iterations = [x["iteration"] for x in log_of(tmp_path) if "loss" in x]
    assert iterations == list(range(1, 61))  # none twice, none lost


def test_processes_wait_for_the_first(tmp_path):
    """It writes the tiny data, and reads everything (and fetches files) before the others."""
    def few():
        data.TINY_SIZES.update(coco=(48, 12), vg=(40, 8), snli_ve=(36, 12), glue=(60, 24))
        build, ready = train.build, tmp_path / "ready"

        def logged(*arguments):
            assert evaluation.processes()[0] == 0 or ready.exists()
            time.sleep(0.2)
            built = build(*arguments)
            ready.touch()
            return built
        train.build = logged
    output = finish(tmp_path / "run", "--iterations", 2, data_dir=tmp_path / "data", processes=2,
                    first=few)
    assert "tiny data sets written" in output and (tmp_path / "run/results.json").exists()


def test_two_runs_write_the_tiny_data_at_once(tmp_path, monkeypatch):
    """The other is faster: this one uses what it wrote, and leaves nothing of its own."""
    folder = tmp_path / "data"
    folder.mkdir()

    def write(new):
        Path(new).mkdir()
        for name in (new, folder):
            (Path(name) / "whose").write_text(str(name))
    monkeypatch.setattr(data, "write_tiny", write)
    train.write_tiny_data(folder)
    assert (folder / "whose").read_text() == str(folder) and os.listdir(tmp_path) == ["data"]


def test_a_warm_up_beyond_the_end_is_reported(capsys):
    for iterations in (200, 199):
        assert not capsys.readouterr().out
        train.check(unit.Config(), train.TrainConfig(iterations=iterations, warmup=200), 1, True)
    assert "199 iterations ends within the warm-up of 200" in capsys.readouterr().out


def test_a_run_that_saved_nothing_starts_anew(small_tiny_data, tmp_path):
    """A job that always gives --resume must not fail for ever as it died before its first save."""
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "log.jsonl").write_text('{"iteration": 1, "task": "coco"}\n')
    flags = ("--iterations", 2, "--tasks", "sst2", "--resume")
    assert "starts anew" in finish(tmp_path, *flags, data_dir=small_tiny_data)
    assert [x["iteration"] for x in log_of(tmp_path)] == [1, 2, 2]  # the last is the evaluation's


def test_a_torn_checkpoint_is_reported_and_the_one_before_is_used(tmp_path, small_tiny_data):
    """On another number of processes, which keeps the schedule."""
    finish(tmp_path, "--iterations", 6, "--save_every", 3, data_dir=small_tiny_data)
    last, end, log = tmp_path / "last.pt", weights(tmp_path), log_of(tmp_path)
    last.write_bytes(last.read_bytes()[:last.stat().st_size // 2])
    (tmp_path / "last.pt.part").write_bytes(b"PK")  # and a save that was killed
    output = finish(tmp_path, "--resume", processes=2, data_dir=small_tiny_data)
    assert "last.pt" in output and "going on after iteration 3" in output
    assert [x.get("task") for x in log] == [x.get("task") for x in log_of(tmp_path)]
    assert farthest(end, weights(tmp_path))[0] < 1e-4


def test_saved_before_an_evaluation(tmp_path, small_tiny_data):
    def dies():
        evaluation.evaluate = lambda *_, **__: os._exit(9)
    finish(tmp_path, "--iterations", 4, "--eval_every", 2, "--save_every", 100,
           data_dir=small_tiny_data, first=dies, expect=9)
    assert torch.load(tmp_path / "last.pt", weights_only=True)["iteration"] == 2


def test_a_full_disk_is_reported_and_the_previous_checkpoint_stays(tmp_path, small_tiny_data):
    killed_at(5, tmp_path, "--iterations", 30, "--save_every", 3, data_dir=small_tiny_data)
    before = (tmp_path / "last.pt").read_bytes()

    def full():  # no file may grow beyond: as on a full disk, the write fails half way
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, len(before) // 2))
    output = finish(tmp_path, "--resume", data_dir=small_tiny_data, expect=2, first=full)
    assert "is the disk full?" in output and "Traceback" not in output
    assert (tmp_path / "last.pt").read_bytes() == before
    assert not (tmp_path / "last.pt.part").exists()


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR1])
def test_signals_to_torchrun(tmp_path, small_tiny_data, number):
    """It passes SIGHUP on; SIGUSR1 ends it, and its processes see that it is gone. They save."""
    run = run_python([sys.executable, "-m", "torch.distributed.run", "--standalone",
                      "--nproc_per_node=2", ROOT / "train.py", "--tiny", "--data", small_tiny_data,
                      "--out", tmp_path, *SMALL, "--tasks", "sst2", "--log_every", 1,
                      "--iterations", 100_000], wait=False)
    wait_for_iteration(run, 5)
    run.send_signal(number)
    output = run.communicate(timeout=60)[0]  # until the last process has closed it
    iteration = int(re.search(r"stopped after iteration (\d+)", output)[1])
    saved = torch.load(tmp_path / "last.pt", weights_only=True)
    assert saved["iteration"] == iteration >= 5


@pytest.mark.parametrize("number, stays", [(signal.SIGHUP, True), (signal.SIGUSR1, False)])
def test_a_signal_that_nohup_ignores_stays_ignored(number, stays):
    before = {x: signal.signal(x, signal.SIG_IGN) for x in data.STOPPING}
    try:
        noted = train.note_signals()
        os.kill(os.getpid(), number)
        assert noted == ([] if stays else [number])
    finally:
        for x, handler in before.items():
            signal.signal(x, handler)


@pytest.mark.parametrize("whom", ["data worker", "process"])
def test_a_death_ends_the_run(tmp_path, small_tiny_data, whom):
    """A data worker or one of two processes is killed: an error within a minute, not a hang."""
    worker = whom == "data worker"
    run = start(tmp_path, "--iterations", 100_000, "--log_every", 1, "--num_workers", int(worker),
                data_dir=small_tiny_data, processes=1 if worker else 2)
    wait_for_iteration(run, 5)
    victim = run.processes[-1].pid
    if worker:
        victim = Path(f"/proc/{victim}/task/{victim}/children").read_text().split()[-1]
    os.kill(int(victim), signal.SIGKILL)
    output = run.wait(*([2] if worker else [1, -signal.SIGKILL]), timeout=60)
    assert run.processes[0].exitcode > 0
    if worker:
        assert "Traceback" not in output and "terminated abruptly" in output
        assert torch.load(tmp_path / "last.pt", weights_only=True)["iteration"] >= 5


# ---- Pictures that cannot be used

def test_unusable_pictures_are_logged_once_and_do_not_disturb(tmp_path, small_tiny_data):
    """3 of 48, each met several times: the same weights with 0 or 2 workers, on 2 processes and
    after a kill; each stands once in the log, and once on the screen."""
    root = shutil.copytree(small_tiny_data, tmp_path / "data")
    broken = sorted((root / "coco/train2017").iterdir())[:3]
    for path in broken:
        path.write_text("<html>")
    flags = ("--iterations", 30, "--tasks", "coco")
    whole, both, killed = tmp_path / "whole", tmp_path / "both", tmp_path / "killed"
    for out, processes in ((whole, 1), (both, 2)):
        output = finish(out, *flags, "--save_every", 100, data_dir=root, processes=processes)
        assert [output.count(f"replaced: {path}: cannot be") for path in broken] == [1, 1, 1]
    killed_at(17, killed, *flags, "--num_workers", 2, "--save_every", 5, data_dir=root)
    output = finish(killed, "--resume", "--num_workers", 2, data_dir=root)
    assert "replaced: " not in output  # they were reported before
    assert equal(weights(whole), weights(killed))
    assert farthest(weights(whole), weights(both))[0] < 1e-4
    for out in (whole, both, killed):
        reasons = [reason for record in log_of(out) for reason in record.get("unusable", [])]
        assert sorted(x.partition(": ")[0] for x in reasons) == [str(path) for path in broken]


@pytest.mark.parametrize("number, met, ends", [(9, 100, False), (10, 999, True),
                                               (10, 1000, False), (11, 1000, True)])
def test_more_than_one_unusable_picture_in_100_ends_the_run(tmp_path, number, met, ends):
    log = train.Log(tmp_path, train.TrainConfig(batch_size=1), 0)
    for n in range(met):
        log.count("coco", [f"{n % number}.jpg: cannot be read"])
        log.count("vg", [])
    problem = log.too_many_unusable()
    assert bool(problem) == ends
    if ends:
        says = rf"coco: {number} pictures of {met} .*0.jpg.*1.jpg.*2.jpg.*--check"
        assert re.match(says, problem)


# ---- Numbers that are not finite

@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_step_with_a_gradient_that_is_not_finite_is_not_taken(model, precision, value):
    """Nothing moves, momentum neither; which parameters is known; the next step is as usual."""
    config = train.TrainConfig(precision=precision, lr=1e-2)
    optimizer = train.make_optimizer(model, config)
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0, enabled=precision == "fp16")
    one_update(model, "a", config, optimizer, scaler)
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()["state"]))
    names = ("decoders.shared.layers.0.linear1.weight", "heads.a.linear2.bias")
    hooks = [model.get_parameter(name).register_hook(lambda gradient: gradient + value)
             for name in names]
    _, norm, norms = one_update(model, "a", config, optimizer, scaler)
    after = (model.state_dict(), optimizer.state_dict()["state"])
    for x, y in zip(*(torch.utils._pytree.tree_leaves(part) for part in (before, after))):
        assert torch.equal(x, y)
    assert not norm.isfinite() and {x for x in norms if not norms[x].isfinite()} == set(names)
    assert scaler.get_scale() == (8 if precision == "fp16" else 1)
    for hook in hooks:
        hook.remove()
    assert one_update(model, "a", config, optimizer, scaler)[1].isfinite()
    assert not torch.equal(before[0][names[1]], model.state_dict()[names[1]])


@pytest.mark.parametrize("precision, patience, where", [
    ("fp32", 0, r"term answer, samples \[3\]"), ("bf16", 0, "gradient of w"),
    ("fp16", 20, "gradient of w")])
def test_how_many_steps_may_be_skipped(tmp_path, precision, patience, where):
    """One ends the run, except in fp16: there it is 21 in a row, more than the scaler can mend."""
    log = train.Log(tmp_path, train.TrainConfig(precision=precision), 0)
    values = [1.0] + [math.inf] * patience + [1.0] + [math.inf] * (patience + 1)
    for number, value in enumerate(values, 1):
        norms = {"v": torch.tensor(1.0), "w": torch.tensor(value)}
        terms = {"answer": torch.tensor(value if "term" in where else 1.0)}
        log.pending.append(train.Record(number, "sst2", [3], [], 1.0, terms, norms["w"], norms))
    with pytest.raises(unit.InputError, match=f"iteration {len(values)}, task sst2, {where}.*; "
                       "this is not saved, what was before is intact; a lower --lr may help"):
        log.flush()
    assert "NaN" not in log.path.read_text() and "Infinity" not in log.path.read_text()


def test_no_checkpoint_holds_a_weight_that_is_not_finite(model):
    train.require_finite_weights(model, 3)
    name, value = [*model.named_parameters()][5]
    value.data.view(-1)[0] = math.inf
    with pytest.raises(unit.InputError, match=f"{re.escape(name)} is not finite after iteration 3"):
        train.require_finite_weights(model, 3)


def test_a_gradient_that_is_not_finite_stops_all_processes(tmp_path, small_tiny_data):
    """At the last iteration of the run, in the last process: what was saved before stays."""
    def spoil():
        made = unit.UniT.__init__

        def init(self, *arguments):
            made(self, *arguments)
            calls = []

            def hook(gradient):
                calls.append(1)
                spoilt = len(calls) == 6 and evaluation.processes()[0] == 1
                return gradient * (math.inf if spoilt else 1)
            self.heads["sst2"].linear2.weight.register_hook(hook)
        unit.UniT.__init__ = init
    output = finish(tmp_path, "--iterations", 6, "--tasks", "sst2", "--save_every", 4, expect=2,
                    data_dir=small_tiny_data, processes=2, first=spoil)
    message = ("error: the numbers are not finite: iteration 6, task sst2, gradient of heads.sst2."
               "linear2.weight; this is not saved, ")
    assert output.count(message) == 2, output
    saved = torch.load(tmp_path / "last.pt", weights_only=True)
    assert saved["iteration"] == 4 and all(x.isfinite().all() for x in saved["model"].values())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_resuming_is_exact_on_a_gpu_too(tmp_path, small_tiny_data, precision):
    """CUDA does not survive a fork: these are commands."""
    script = tmp_path / "train_exactly.py"
    script.write_text("import torch, train\n"
                      "torch.use_deterministic_algorithms(True, warn_only=True)\ntrain.main()\n")

    def command(out, *more, **kwargs):
        return run_python([sys.executable, script, "--tiny", "--data", small_tiny_data, "--out",
                           tmp_path / out, *SMALL, "--iterations", 40, "--precision", precision,
                           "--log_every", 1, "--save_every", 5, *more], gpu=True, **kwargs)
    command("whole")
    process = command("run", wait=False)
    wait_for_iteration(process, 12)
    process.kill()
    process.communicate()
    command("run", "--resume")
    assert equal(weights(tmp_path / "whole"), weights(tmp_path / "run"))


# ---- Initialising from another run, freezing

def test_init_and_freeze(tmp_path, small_tiny_data):
    """COCO init. (Section 4.1) with a frozen encoder (Table C.1 line 12)."""
    first, then = tmp_path / "coco", tmp_path / "joint"
    finish(first, "--iterations", 3, "--tasks", "coco", data_dir=small_tiny_data)
    output = finish(then, "--iterations", 6, "--tasks", "coco,snli_ve,mnli", "--init",
                    first / "last.pt", "--init_parts", "image_encoder,heads", "--freeze",
                    "image_encoder", "--probabilities", "1,1,1", data_dir=small_tiny_data)
    assert "tensors taken: " in output and "dropped: " in output
    a, b = weights(first), weights(then)
    for name in a:
        if name.startswith("image_encoder."):
            assert torch.equal(a[name], b[name])  # taken, and frozen
    assert not torch.equal(a["heads.coco.class_head.weight"], b["heads.coco.class_head.weight"])


def checkpoint_of(model, path, names=()):
    torch.save({"model": model.state_dict(), "config": {}, "tasks": [], "iteration": 7,
                "labels": {"coco": {"classes": [*names], "attributes": []}}}, path)
    return str(path)


def detector(width=8, image_layers=1, shared=True, **task):
    torch.manual_seed(len(task))
    task = dataclasses.replace(SHAPES, **(dict(name="coco", num_attributes=0) | task))
    return make_model([task], encoder_layers=image_layers, decoder_layers=1, decoder_width=width,
                      shared_decoder=shared)


def test_init_takes_what_fits_and_reports_the_rest(tmp_path):
    """Other classes, queries and depths: only what fits by name and shape is taken. A separate
    decoder starts from the shared one (Section 4.2, line 4)."""
    theirs = detector()
    ours = detector(num_queries=9, num_classes=7, image_layers=2, shared=False)
    path, before = checkpoint_of(theirs, tmp_path / "x.pt"), clones(ours)
    report = train.initialise_from(ours, path, (), False)
    taken = theirs.state_dict()
    for name, x in ours.state_dict().items():
        new = name.startswith("queries.") or "class_head" in name or ".layers.1." in name
        source = name.replace("decoders.coco", "decoders.shared")
        assert torch.equal(x, before[name] if new else taken[source]), name
    assert f"init {path}, iteration 7 of None: tensors taken: image_encoder.backbone" in report
    for words in ("queries.coco (5, 8) for (9, 8)", "coco.class_head.weight (5, 8) for (8, 8)",
                  "left as they were: image_encoder.layers 16, queries.coco 1, heads.coco 2",
                  "dropped: queries.coco 1, heads.coco 2"):
        assert words in report
    assert "taken" in train.initialise_from(ours, path, ("image_encoder", "decoder"), False)


@pytest.mark.parametrize("part, changes, says", [
    ("heads", dict(num_classes=2), r"heads.coco.class_head.weight \(5, 8\) for \(3, 8\): classes "
     "cat, dog, but here egg, ham; leave heads out of --init_parts"),
    ("queries", dict(num_queries=9), r"queries.coco \(5, 8\) for \(9, 8\); leave queries out"),
    ("decoder", dict(width=16), r"decoders.shared.layers.0.self_attention.q_proj.weight \(8, 8\)"),
    ("text_encoder", {}, "none of its weights fit text_encoder")])
def test_init_parts_that_do_not_fit_are_errors(tmp_path, part, changes, says):
    """Asked for by name; the model is left as it was."""
    path = checkpoint_of(detector(), tmp_path / "x.pt", ["", "cat", "dog"])
    ours = detector(**changes)
    before = clones(ours)
    with pytest.raises(unit.InputError, match=says):
        train.initialise_from(ours, path, ("image_encoder", part), False,
                              {"coco": ["", "egg", "ham"]})
    assert equal(before, ours.state_dict())


@pytest.mark.parametrize("init, says", [
    ("runs/T1.1-coco/last.pt", "T1.1-coco --out runs/T1.1-coco` makes it.* --init "
     "DATA/unit.coco.single_task.tar.gz fetches"),
    ("runs/T3.5/last.pt", "--init DATA/unit.all_8_datasets.shared_dec_with_coco_init.tar.gz"),
    ("mine.pt", "check --init"), ("elsewhere/unit.coco.single_task.tar.gz", None)])
def test_what_makes_a_missing_start(init, says):
    settings = train.TrainConfig(data="DATA", init=init)
    if says is None:  # `build` fetches it
        return train.check(unit.Config(), settings, 1, starting=True)
    with pytest.raises(unit.InputError, match=says):
        train.check(unit.Config(), settings, 1, starting=True)
