"""Training UniT (Section 3.5, Appendix A): experiments, optimiser, schedule, loop, checkpoints.

    python train.py --tiny                                   # all eight tasks on a laptop, minutes
    torchrun --nproc_per_node=8 train.py                     # Table 3 line 3, data in data/
    torchrun --nproc_per_node=8 train.py --experiment T3.5   # any other line of the paper's tables
    python train.py --list                                   # all of them
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import math
import os
import shutil
import signal
import sys
import textwrap
import time
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

import data
import eval as evaluation
import unit
from eval import gathered, processes
from unit import Batch, Config, InputError, UniT, option, written


PARTS = ("image_encoder", "text_encoder", "decoder", "queries", "heads")  # parameter names begin so
EIGHT = ("coco", "vg", "vqa2", "snli_ve", "qnli", "mnli", "qqp", "sst2")  # Section 4.2
DETECTION_VQA = ("coco", "vg", "vqa2")                                    # Section 4.1
ABLATION = ("coco", "snli_ve", "mnli")                                    # Tables 4 and C.1


@dataclass(frozen=True)
class TrainConfig:
    """Every setting of a run, in --help's order. Defaults: the paper's for Table 3 line 3."""

    data: str = option("data", "folder of the data sets, as README lays it out")
    tasks: tuple[str, ...] = option(EIGHT, "data sets (Section 4.2)")
    iterations: int = option(500_000, "iterations (Section 4.2)")
    batch_size: int = option(64, "samples per iteration, over all processes (Table A.1)")
    micro_batch: int = option(0, "samples a process holds at a time; 0: one image, or all texts")
    seed: int = option(0, "seed of weights, sampling, augmentation and dropout", most=2**63 - 1)
    precision: str = option("fp32", "fp32 (the paper's), fp16 (with loss scaling) or bf16",
                            choices=tuple(evaluation.PRECISIONS))
    augment: str = option("full", "of detection's training pictures: full (flips, scales, crops; "
                                  "Section 3.5), flip or none", choices=("full", "flip", "none"))
    num_workers: int = option(4, "data workers per process", least=0)
    threads: int = option(0, "threads of a process on the CPU; 0: as PyTorch chooses")
    log_every: int = option(50, "iterations per line on the screen")
    save_every: int = option(10_000, "iterations between checkpoints (released config)")
    eval_every: int = option(10_000, "iterations between evaluations; 0: only at the end", least=0)
    eval_samples: int = option(0, "evaluate on at most this many samples of a task; 0: all")
    pretrained: bool = option(True, "start from published BERT and backbone (Sections 3.1, 3.2)")
    imagenet_backbone: bool = option(False, "ImageNet's backbone, not DETR's (Table C.1 line 3)")
    init: str = option("", "checkpoint, or file of the authors', to start from (Section 4.1)")
    init_parts: tuple[str, ...] = option((), f"its parts to copy: {', '.join(PARTS)}; none: all",
                                         choices=PARTS)
    freeze: tuple[str, ...] = option((), "parts that are not trained (Table C.1 lines 10-12)",
                                     choices=PARTS)
    probabilities: tuple[float, ...] = option((), "chance of each of --tasks; none: Table A.2's")
    first_tasks: tuple[str, ...] = option((), "tasks that the run begins with (ours)")
    first_probabilities: tuple[float, ...] = option((), "chance of each of them; none: as later")
    first_share: float = option(0.0, "share of the run on --first_tasks alone (ours)", most=1)
    lr: float = option(5e-5, "learning rate (Table A.1)")
    lr_backbone: float = option(1e-5, "learning rate of the backbone (DETR; released config)")
    warmup: int = option(2000, "warm-up iterations (Table A.1)", least=0)
    weight_decay: float = option(1e-4, "AdamW's weight decay (released config)")
    clip: float = option(0.1, "largest norm of the gradient (released config)", least=1e-6)
    update_unused: bool = option(False, "update what the task did not reach, too (footnote 2)")


DEFAULTS = asdict(Config()) | asdict(TrainConfig())
# These may differ when a run is resumed. Only micro_batch changes the weights: by padding, and by
# the order in which dropout draws.
FREE_ON_RESUME = {"data", "num_workers", "threads", "log_every", "save_every", "eval_every",
                  "eval_samples", "micro_batch"}


# ---- The loop (Section 3.5) ----------------------------------------------------------------------
class Step(nn.Module):
    """Forward and loss in one module: DistributedDataParallel must see everything that is used."""

    def __init__(self, model: UniT):
        super().__init__()
        self.model = model

    def forward(self, batch: Batch, batch_size: int, num_boxes: float) -> dict[str, Tensor]:
        return self.model.losses(self.model(batch), batch, batch_size, num_boxes)


def training_loop(model, datasets, held_out, extras, train: TrainConfig, out, state) -> dict:
    """Trains from `state` (a checkpoint, or None) to the end -> the last results. Each checkpoint
    holds `extras` (see `build`)."""
    start = state["iteration"] if state else 0
    rank, world_size = processes()
    step, optimizer, scaler = set_up(model, train, state)
    stream = data.train_loader(datasets, make_schedule(datasets, train), start, rank, world_size,
                               train.micro_batch, train.num_workers)
    log, signals, torchrun = Log(out, train, start), note_signals(), os.getppid()
    gc.freeze()  # or the first full collection copies 75 MB that the data workers share
    model.train()
    with contextlib.closing(stream):  # ends its workers
        for iteration in range(start, train.iterations):
            batches, replaced, problem = next_batches(stream)
            problem = problem or log.too_many_unusable()
            orphan = world_size > 1 and os.getppid() != torchrun  # a signal has ended it
            shares = gathered((count_boxes(batches), bool(signals or problem or orphan)))
            counts, stopping = zip(*shares)
            if any(stopping):  # all processes, before the same iteration
                save(log, model, optimizer, scaler, extras)
                leave(log, signals, problem)
            # Dropout depends on this alone, so checkpoints need not store generator states.
            torch.manual_seed(((train.seed * 1_000_003 + iteration) * 4099 + rank) % 2**63)
            lr = set_learning_rate(optimizer, iteration, train)
            terms, norm, norms = update(step, optimizer, scaler, batches, train, sum(counts))
            done = iteration + 1
            ids = sum((batch.ids for batch in batches), [])
            log.add(Record(done, batches[0].task, ids, replaced, lr, terms, norm, norms))
            scoring = train.eval_every and done % train.eval_every == 0
            if scoring or done % train.save_every == 0 or done == train.iterations:
                save(log, model, optimizer, scaler, extras)  # a job's time may run out below
            if scoring and done < train.iterations:
                validate(model, held_out, train, log)
    return validate(model, held_out, train, log)


def set_up(model: UniT, train: TrainConfig, state: dict | None):
    """The step, for all processes, and optimiser and loss scaler as `state` left them."""
    device = next(model.parameters()).device
    optimizer = make_optimizer(model, train)
    scaler = torch.amp.GradScaler(device.type, enabled=train.precision == "fp16")
    if state:
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
        state.clear()  # model and optimiser have copies: this frees 2.4 GB in each process
    step = Step(model)
    if dist.is_initialized():
        step = nn.parallel.DistributedDataParallel(
            step, find_unused_parameters=True, forward_sync_buffers=False,
            gradient_as_bucket_view=True,  # no second copy of the gradients
            device_ids=[device] if device.type == "cuda" else None)
    return step, optimizer, scaler


def next_batches(stream) -> tuple[list[Batch], list[str], str]:
    """The next iteration's micro-batches, and why pictures were replaced by others; or the problem,
    as text: the exception itself would keep the data workers alive."""
    try:
        return *next(stream), ""
    except InputError as error:
        return [], [], str(error)


def count_boxes(batches: list[Batch]) -> int:
    return sum(len(boxes) for batch in batches for boxes in batch.boxes or [])


def update(step, optimizer, scaler, batches, train, num_boxes):
    """One update from this process's micro-batches -> its shares of the loss terms, {name: value};
    the gradient's norm before clipping; that of each parameter, by name."""
    terms = backward(step, scaler, batches, train, num_boxes)
    scaler.unscale_(optimizer)
    if train.update_unused:
        for p in step.parameters():  # Appendix A's first strategy: zeros for unused parameters
            if p.requires_grad and p.grad is None:
                p.grad = torch.zeros_like(p)
    reached = {}
    for group in optimizer.param_groups:
        for name, p in zip(group["param_names"], group["params"]):
            if p.grad is not None:
                reached[name] = p
    # As clip_grad_norm_ does it, which does not return the norm of each.
    norms = torch._foreach_norm([p.grad for p in reached.values()])
    norm = torch.linalg.vector_norm(torch.stack(norms))
    nn.utils.clip_grads_with_norm_(reached.values(), train.clip, norm)
    # A step that is not finite is not taken: the fused AdamW skips it on the device, so nobody
    # waits for the norm. `Log.flush` ends the run. (In fp16 the scaler sets its own found_inf.)
    optimizer.found_inf = (~norm.isfinite()).float()
    # Footnote 2, Appendix A: parameters that the task did not reach have grad None, and AdamW
    # leaves them and their momentum alone.
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return terms, norm, dict(zip(reached, norms))


def backward(step, scaler, batches, train, num_boxes) -> dict[str, Tensor]:
    """The gradient of this process's micro-batches -> its shares of the loss terms."""
    _, world_size = processes()
    device, dtype = next((p.device, p.dtype) for p in step.parameters())
    totals: dict[str, Tensor] = {}
    for k, batch in enumerate(batches):
        wait = k < len(batches) - 1 and world_size > 1
        with step.no_sync() if wait else contextlib.nullcontext():  # synchronise once per iteration
            with evaluation.autocast(device, train.precision):
                terms = step(batch.to(device, dtype), train.batch_size, num_boxes)
            # DistributedDataParallel averages gradients; the batch's loss is the sum of the shares.
            scaler.scale(sum(terms.values()) * world_size).backward()
        for name, value in terms.items():
            totals[name] = totals.get(name, 0) + value.detach()
    return totals


def validate(model: UniT, held_out: dict, train: TrainConfig, log: Log) -> dict:
    """The results of an evaluation, which go to the log; to the screen each task's first metric."""
    device = next(model.parameters()).device
    results = evaluation.evaluate(model, held_out, device, train.micro_batch, train.num_workers,
                                  train.eval_samples, train.precision, log.out)
    first = "  ".join(f"{task} {[*x.values()][0]:.1f}" for task, x in results.items())
    log.write([{"iteration": log.done, "results": results}], f"held out:  {first}")
    return results


def note_signals() -> list[int]:
    """Returns a list to which signals that end a run are appended: the iteration is finished first.
    SIGHUP stays ignored if nohup ignores it."""
    noted = []

    def note(number, frame):
        noted.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # the next Ctrl-C: at once
    for number in data.STOPPING:
        # A script's `&` makes SIGINT ignored, but one that is sent on purpose should stop the run.
        if number.name != "SIGHUP" or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, note)
    return noted


def leave(log: Log, signals: list[int], problem: str) -> None:
    gathered(None)  # waits until it is saved: torchrun kills all once one has left
    print(f"stopped after iteration {log.done}; saved in {log.out}: go on with --resume")
    if problem:
        raise InputError(problem)
    sys.exit(128 + signals[0] if signals else 1)


# ---- Optimiser and schedule (Section 3.5) --------------------------------------------------------
def make_optimizer(model: UniT, train: TrainConfig) -> torch.optim.AdamW:
    """AdamW (Section 3.5) with Adam's betas of Table A.1; weight decay on everything, as released.
    (PyTorch's AdamW adds eps after the bias correction, the released code's before: with gradients
    clipped to 0.1 the first updates differ by about a tenth.)"""
    backbone, others = [], []
    for name, p in model.named_parameters():
        if p.requires_grad:
            (backbone if "backbone" in name else others).append((name, p))
    groups = [{"params": others, "base_lr": train.lr},
              {"params": backbone, "base_lr": train.lr_backbone}]
    groups = [group for group in groups if group["params"]]
    if not groups:
        raise InputError("--freeze leaves no parameter to train; freeze fewer parts")
    return torch.optim.AdamW(groups, lr=train.lr, betas=(0.9, 0.999), eps=1e-8,
                             weight_decay=train.weight_decay, fused=True)


def lr_factor(iteration: int, train: TrainConfig) -> float:
    """Warm-up cosine (Section 3.5): up in `warmup` iterations, then down towards zero."""
    if iteration < train.warmup:
        return (iteration + 1) / train.warmup
    done = (iteration - train.warmup) / (train.iterations - train.warmup)
    return 0.5 * (1 + math.cos(math.pi * done))


def set_learning_rate(optimizer, iteration: int, train: TrainConfig) -> float:
    factor = lr_factor(iteration, train)
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor
    return train.lr * factor


def make_schedule(datasets: dict, train: TrainConfig) -> data.Schedule:
    chances = dict(zip(train.tasks, train.probabilities or table_a2(train.tasks)))
    first = train.first_probabilities or [chances[task] for task in train.first_tasks]
    sizes = {task: len(datasets[task]) for task in train.tasks}
    return data.Schedule(sizes, chances, train.batch_size, train.iterations, train.seed,
                         dict(zip(train.first_tasks, first)),
                         round(train.first_share * train.iterations))


# ---- Experiments: every line of Tables 1-4 and C.1 (data, not code) ------------------------------
TABLE_A2 = {  # sampling probabilities: all eight data sets (line 2), the ablations' three (line 3)
    EIGHT: dict(coco=.20, vg=.07, vqa2=.26, snli_ve=.12, qnli=.10, mnli=.10, qqp=.10, sst2=.05),
    ABLATION: dict(coco=.30, snli_ve=.50, mnli=.20)}
# "COCO init." copies other parts in Section 4.1 (and C.1 line 9) than in 4.2. The released system
# copies all that fits (--as_released), which makes line 11 of Table C.1 the same as line 10.
COCO_INIT = dict(init="T1.1-coco", init_parts=("image_encoder", "heads"))
COCO_INIT_4_2 = dict(init="T1.1-coco", init_parts=("image_encoder", "decoder"))
# The authors' own models of these runs, for --init in place of ours.
AUTHORS_RUNS = {"T1.1-coco": "unit.coco.single_task.tar.gz",
                "T3.5": "unit.all_8_datasets.shared_dec_with_coco_init.tar.gz"}

EXPERIMENTS = {  # where no iterations are given: 500k
    # Table 1: 150k, 300k, 450k iterations for one, two, three data sets (Section 4.1)
    **{f"T1.1-{t}": dict(tasks=(t,), iterations=150_000) for t in DETECTION_VQA},
    "T1.2": dict(tasks=DETECTION_VQA, iterations=450_000, shared_decoder=False),
    "T1.3": dict(tasks=DETECTION_VQA, iterations=450_000),
    "T1.4": dict(tasks=DETECTION_VQA, iterations=450_000, **COCO_INIT),
    # Table 2: shared decoders, COCO init.
    **{f"T2.1-{t}": dict(tasks=(t,), iterations=150_000) for t in DETECTION_VQA},
    "T2.2": dict(tasks=("coco", "vqa2"), iterations=300_000, **COCO_INIT),
    "T2.3": dict(tasks=("vg", "vqa2"), iterations=300_000, **COCO_INIT),
    "T2.4": dict(tasks=DETECTION_VQA, iterations=450_000, **COCO_INIT),
    # Table 3: 500k (its line 1 repeats Table 1's runs for COCO, VG and VQAv2)
    **{f"T3.1-{t}": dict(tasks=(t,), iterations=150_000) for t in DETECTION_VQA},
    **{f"T3.1-{t}": dict(tasks=(t,)) for t in EIGHT[3:]},
    "T3.2": dict(tasks=EIGHT, shared_decoder=False),
    "T3.3": dict(tasks=EIGHT),
    "T3.4": dict(tasks=EIGHT, shared_decoder=False, **COCO_INIT_4_2),
    "T3.5": dict(tasks=EIGHT, **COCO_INIT_4_2),
    # Line 6 (Section 4.2, Appendix B): fine-tuned on each task. The number of iterations is ours.
    **{f"T3.6-{t}": dict(tasks=(t,), iterations=150_000, init="T3.5") for t in EIGHT},
    # Table 4: ablations
    "T4.1": dict(tasks=ABLATION),
    "T4.2": dict(tasks=ABLATION, decoder_layers=8),
    "T4.3": dict(tasks=ABLATION, decoder_layers=12),
    "T4.4": dict(tasks=ABLATION, decoder_width=256),
    "T4.5": dict(tasks=ABLATION, all_text_states=("snli_ve", "mnli")),
    "T4.6": dict(tasks=ABLATION, loss_on_all_layers=True),
    "T4.7": dict(tasks=ABLATION, task_embedding=False),
    "T4.8": dict(tasks=ABLATION, batch_size=32),
    # Table C.1 (Appendix C): more ablations. Line 8: twice the iterations (see footnote 3).
    "TC.1.1": dict(tasks=ABLATION),
    "TC.1.2": dict(tasks=ABLATION, encoder_width=768),
    "TC.1.3": dict(tasks=ABLATION, imagenet_backbone=True),
    "TC.1.4": dict(tasks=ABLATION, num_queries=1),
    "TC.1.5": dict(tasks=ABLATION, num_queries=100),
    "TC.1.6": dict(tasks=ABLATION, lr=1e-4),
    "TC.1.7": dict(tasks=ABLATION, lr=1e-5),
    "TC.1.8": dict(tasks=ABLATION, iterations=1_000_000),
    "TC.1.9": dict(tasks=ABLATION, **COCO_INIT),
    # Appendix C's text freezes "both decoders" here; its heading and the table say encoders.
    "TC.1.10": dict(tasks=ABLATION, **COCO_INIT, freeze=("image_encoder", "text_encoder")),
    "TC.1.11": dict(tasks=ABLATION, init="T1.1-coco", init_parts=("image_encoder",),
                          freeze=("image_encoder", "text_encoder")),
    "TC.1.12": dict(tasks=ABLATION, **COCO_INIT, freeze=("image_encoder",)),
    # Section 4.2, "could lead to divergence in detection training", and Appendix A's two strategies
    "S4.2-1536": dict(tasks=ABLATION, decoder_width=1536),
    "A-skip": dict(tasks=DETECTION_VQA, iterations=450_000),  # the same run as T1.3
    "A-update": dict(tasks=DETECTION_VQA, iterations=450_000, update_unused=True)}

TINY = dict(  # --tiny: small sizes, and what pictures of 32 pixels need to be learned (README)
    data="runs/tiny-data", image_size=32, augment="flip", backbone="small", pretrained=False,
    # No layers in E_v: features stay in their place, so the decoder learns to look for things, and
    # then for those that a question names. With two layers it does not on some seeds (README).
    encoder_width=64, encoder_heads=4, encoder_ff=128, encoder_layers=0,
    bert_width=64, bert_heads=4, bert_ff=128, bert_layers=2, max_positions=64,
    decoder_width=64, decoder_heads=4, decoder_ff=512, decoder_layers=3, dropout=0.0,
    detection_queries=8, num_queries=4,  # pictures of a few shapes; fewer queries learn faster
    # One [CLS] among 16 picture positions is noticed late, the words at once (as Table 4 line 5).
    all_text_states=("vqa2", "snli_ve"),
    # An answer on every layer, as boxes have it anyway (Table 4 line 6): comparisons come sooner.
    loss_on_all_layers=True,
    # Without these two there is one layout of boxes for all pictures, for a long time.
    queries_as_input=True, positions_in_map=True,
    # A fresh model should look everywhere: begun with 2 in place of 0.5, no comparison is learned.
    attention_gain=0.5,
    # The paper starts from a pretrained BERT and COCO init.; here pictures and texts are learned
    # apart first, and then compared. (Two detection sets from scratch would starve each other.)
    first_tasks=("coco", "qnli", "mnli", "qqp", "sst2"), first_share=0.28,
    first_probabilities=(.48, .12, .17, .13, .10),
    probabilities=(.24, .16, .31, .19, .02, .04, .02, .02),
    iterations=8600, batch_size=24, lr=1e-3, lr_backbone=7e-4, warmup=250,
    micro_batch=24,  # the pictures are all of one size: nothing is padded
    threads=1,       # a second one costs such small matrices more than it brings
    num_workers=1, log_every=250, save_every=1000, eval_every=2150)
# Under --tiny these settings of an experiment keep their ratio to the paper's default.
SCALED = {"encoder_width", "decoder_width", "decoder_layers", "num_queries", "lr", "batch_size"}


def table_a2(tasks: tuple[str, ...]) -> tuple[float, ...]:
    """Table A.2: the sampling probabilities of these tasks, from the line that they belong to."""
    if set(tasks) <= set(DETECTION_VQA):
        return (1.0,) * len(tasks)                 # line 1: equal chances (Section 4.1)
    line = TABLE_A2[ABLATION if set(tasks) == set(ABLATION) else EIGHT]
    return tuple(line.get(t, 0.1) for t in tasks)  # 0.1: a ninth task


# ---- Checkpoints ---------------------------------------------------------------------------------
def save(log: Log, model, optimizer, scaler, extras) -> None:
    """Plain values and tensors only, so that it opens with `torch.load(weights_only=True)`.
    Atomic: at any moment `last.pt` or `previous.pt` is whole."""
    log.flush()  # first: what is not finite must not reach a checkpoint
    require_finite_weights(model, log.done)
    if processes()[0] > 0:
        return
    tasks = [asdict(replace(task, dataset=None)) for task in model.tasks.values()]
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(),
             "scaler": scaler.state_dict(), "iteration": log.done, "tasks": tasks,
             "config": asdict(model.config), "train": asdict(log.train), **extras}
    last = log.out / "last.pt"
    with data.whole_file(last, "wb") as file:
        torch.save(state, file)
        if last.exists():
            os.replace(last, log.out / "previous.pt")


def load_newest(out: Path) -> dict:
    """The newest whole checkpoint under `out`: last.pt, or previous.pt if a crash tore that one."""
    paths = [out / "last.pt", out / "previous.pt"]
    for path in filter(Path.exists, paths):
        try:
            state = evaluation.read_checkpoint(path)
            if lost := {"optimizer", "scaler", "iteration", "train"} - set(state):
                raise InputError(f"{path}: no run can go on from it: it has no {min(lost)}")
            return state
        except InputError as error:
            print(f"warning: {error}; trying the one before", file=sys.stderr)
    raise InputError(f"{out}: nothing to resume: no whole last.pt or previous.pt; check --out")


def require_finite_weights(model: UniT, iteration: int) -> None:
    """Gradients and losses are checked at each step, but the step itself may overflow, too."""
    for name, value in model.named_parameters():
        if not value.isfinite().all():
            raise InputError(f"{name} is not finite after iteration {iteration}, which is not "
                             "saved; a lower --lr may help")


# ---- Starting from another model (COCO init., Section 4.1) ---------------------------------------
def initialise_from(model: UniT, path: str, parts: tuple[str, ...], as_released: bool,
                    classes: dict[str, list[str]] | None = None) -> str:
    """Copies what fits by name and shape from a checkpoint of train.py, or from a file of the
    authors' -> a report. `parts`: only these, and an error if nothing of one fits, or if a head has
    another shape; `classes` (their names here, by task) are for that message."""
    theirs, their_classes, origin = evaluation.starting_weights(path)
    ours, sources, misfits = model.state_dict(), {}, {}  # {our name: theirs}
    wanted = [name for name in ours if not parts or part_of(name) in parts]
    for name in wanted:
        source = source_of(name, theirs, as_released)
        if source in theirs and theirs[source].shape == ours[name].shape:
            sources[name] = source
        elif source in theirs:
            misfits[name] = f"{name} {tuple(theirs[source].shape)} for {tuple(ours[name].shape)}"
    taken = {part_of(name) for name in sources if ours[name].dim() > 1}  # a bias alone is no part
    for name, problem in misfits.items():
        part, task = part_of(name), name.split(".")[1]
        if part in parts and (part == "heads" or part not in taken):
            if part == "heads":
                problem += (f": classes {named(their_classes.get(task))}, but here "
                            f"{named((classes or {}).get(task))}")
            raise InputError(f"{path}: {problem}; leave {part} out of --init_parts, or give the "
                             "data and sizes of its training")
    # Queries and heads may be lacking there: the tasks may be new here.
    lost = [part for part in parts if part not in taken and part not in ("queries", "heads")]
    if lost or not taken:
        raise InputError(f"{path}: none of its weights fit {', '.join(lost or parts or PARTS)}")
    for name, source in sources.items():
        ours[name].copy_(theirs[source])
    examples = textwrap.shorten("; ".join(misfits.values()), 200) or "none"
    left = by_module(name for name in wanted if name not in sources)
    dropped = by_module(key for key in theirs if key not in sources.values())
    return (f"init {path}, {origin}: tensors taken: {by_module(sources)}; left as they were: {left}"
            f" (of another shape: {examples}); dropped: {dropped}")


def part_of(name: str) -> str:
    return next(part for part in PARTS if name.startswith(part))


def source_of(name: str, theirs: dict[str, Tensor], as_released: bool) -> str:
    """Which tensor of another model our tensor `name` starts from. If that model has one decoder,
    all of ours start from it (Section 4.2); as released only those of the tasks that it knows."""
    if name in theirs or not name.startswith("decoders."):
        return name
    _, task, rest = name.split(".", 2)
    decoders = {key.split(".")[1] for key in theirs if key.startswith("decoders.")}
    known = task == "shared" or f"queries.{task}" in theirs
    if len(decoders) == 1 and (known or not as_released):
        return f"decoders.{decoders.pop()}.{rest}"
    return name  # which they do not have


def by_module(names) -> str:
    """How many tensors of each module: "heads.coco 8, queries.coco 1"."""
    counts = Counter(".".join(name.split(".")[:2]) for name in names)
    return ", ".join(f"{module} {count}" for module, count in counts.items()) or "none"


def named(classes: list[str] | None) -> str:
    return textwrap.shorten(", ".join(filter(None, classes or [])), 60) or "without names"


# ---- The log -------------------------------------------------------------------------------------
@dataclass
class Record:
    """One iteration until it is logged. Tensors stay on the device: nothing waits for them."""

    iteration: int            # iterations done, this one included
    task: str
    ids: list                 # of this process's samples
    replaced: list[str]       # why pictures of this process were replaced by others
    lr: float
    terms: dict[str, Tensor]  # this process's shares of the loss terms; after `gather` their sums
    norm: Tensor              # of the gradient before clipping
    norms: dict[str, Tensor]  # the same of each parameter that the task reached

    def fault(self) -> str:
        """Names a number that is not finite; "" if there is none."""
        for name, value in self.terms.items():
            if not math.isfinite(value):
                return f"term {name}, samples {self.ids} (this process's)"
        if self.norm.isfinite():
            return ""
        faulty = [name for name, norm in self.norms.items() if not norm.isfinite()]
        return f"gradient of {faulty[0] if faulty else 'all parameters together'}"


def gather(records: list[Record]) -> None:
    """Sums the processes' shares of loss terms, now numbers, and joins their `replaced`."""
    for record in records:
        record.terms = {name: float(value) for name, value in record.terms.items()}  # waits
    shares = gathered([(record.terms, record.replaced) for record in records])
    for record, parts in zip(records, zip(*shares)):
        for name in record.terms:
            record.terms[name] = sum(terms[name] for terms, _ in parts)
        record.replaced = sum((replaced for _, replaced in parts), [])


class Log:
    """A line of JSON in log.jsonl for each iteration, a line on the screen every `log_every`.

    | key                         | meaning                                                       |
    |-----------------------------|---------------------------------------------------------------|
    | `iteration`, `task`         | iterations done, from 1; the data set that this one drew      |
    | `loss`                      | the sum of its terms, in detection over all decoder layers    |
    | `class`                     | cross entropy of classes, per sample (Eq. 5; DETR)            |
    | `l1`, `giou`                | 5 x distance, 2 x (1 - generalised IoU), per box (Eq. 6)      |
    | `attribute`                 | 0.5 x cross entropy of attributes, per sample (Eq. 7; BUTD)   |
    | `answer`                    | cross entropy of the answer, per sample (Eq. 9)               |
    | `lr`                        | learning rate of all but the backbone                         |
    | `grad_norm`                 | norm of the gradient before clipping                          |
    | `samples_per_second`, `eta` | since the last line on the screen; seconds left to train      |
    | `unusable`                  | pictures met for the first time that cannot be used, and why  |
    | `results`                   | of an evaluation, beside `iteration`: percent by task, metric |

    Numbers that are not finite are written as null, since JSON has no NaN."""

    def __init__(self, out: Path, train: TrainConfig, start: int):
        self.out, self.path, self.train = out, out / "log.jsonl", train
        self.done, self.since = start, time.perf_counter()
        self.pending: list[Record] = []
        self.faults_in_a_row = 0
        self.met, self.unusable = Counter(), defaultdict(list)  # {task: samples}, {task: reasons}
        before = [x for x in evaluation.read_log(self.path) if x["iteration"] <= start]
        for entry in before:
            self.count(entry.get("task"), entry.get("unusable", []))
        if processes()[0] == 0:
            with data.whole_file(self.path) as file:  # killed here, the log stays as it was
                file.writelines(json.dumps(entry) + "\n" for entry in before)

    def add(self, record: Record) -> None:
        self.pending.append(record)
        if record.iteration % self.train.log_every == 0:
            self.flush()

    def flush(self) -> None:
        """Writes what is pending; an error if it was not finite."""
        records, self.pending = self.pending, []
        if not records:
            return
        gather(records)
        seconds = (time.perf_counter() - self.since) / len(records)  # of an iteration
        self.done = records[-1].iteration
        speed = round(self.train.batch_size / seconds, 2)
        eta = round((self.train.iterations - self.done) * seconds)
        pace = {"samples_per_second": speed, "eta": eta}
        losses = defaultdict(list)
        for record in records:
            losses[record.task].append(sum(record.terms.values()))
        line = "  ".join(f"{task} {sum(x) / len(x):.3f}" for task, x in losses.items())
        if skipped := sum(not record.norm.isfinite() for record in records):
            line += f"  skipped {skipped}"  # steps not taken: in fp16, to find the scale
        self.write([self.entry(record) | pace for record in records],
                   f"{line}  lr {records[-1].lr:.2e}  {speed:.1f} samples/s  "
                   f"ETA {timedelta(seconds=eta)}")
        for record in records:
            self.require_finite(record)

    def entry(self, record: Record) -> dict:
        """An iteration's line of log.jsonl."""
        numbers = {"loss": sum(record.terms.values()), **record.terms, "lr": record.lr,
                   "grad_norm": record.norm.item()}
        numbers = {key: x if math.isfinite(x) else None for key, x in numbers.items()}
        entry = {"iteration": record.iteration, "task": record.task, **numbers}
        if new := self.count(record.task, record.replaced):
            entry["unusable"] = new
            print("\n".join(f"replaced: {reason}" for reason in new))
        return entry

    def write(self, entries: list[dict], line: str) -> None:
        """Entries, and a line for the screen. One system call writes all entries (the usual buffer
        cuts at 8 KB), so that a kill leaves no half of one."""
        if processes()[0] == 0:
            try:
                lines = "".join(json.dumps(entry) + "\n" for entry in entries)
                with open(self.path, "ab", buffering=2**20) as file:
                    file.write(lines.encode())
            except OSError as error:
                raise InputError(f"{self.path}: cannot be written ({error.strerror}); make room, "
                                 "then --resume") from None
        print(f"{self.done:>7}/{self.train.iterations}  {line}", flush=True)
        self.since = time.perf_counter()

    def count(self, task: str, reasons: list[str]) -> list[str]:
        """Counts an iteration's samples, and pictures that could not be used -> the new ones."""
        new = [x for x in dict.fromkeys(reasons) if x not in self.unusable[task]]
        self.unusable[task] += new
        self.met[task] += self.train.batch_size
        return new

    def too_many_unusable(self) -> str:
        """Why so many pictures end the run; "" if they do not."""
        for task, reasons in self.unusable.items():
            if len(reasons) >= data.FEWEST_UNUSABLE and len(reasons) > self.met[task] / 100:
                return str(data.too_many_unusable(task, reasons, self.met[task], self.train.data))
        return ""

    def require_finite(self, record: Record) -> None:
        """An iteration that is not finite ends the run; in fp16 only 21 in a row: its scaler skips
        such a step and halves the scale, which begins at 65536."""
        fault, precision = record.fault(), self.train.precision
        self.faults_in_a_row = self.faults_in_a_row + 1 if fault else 0
        if self.faults_in_a_row > (20 if precision == "fp16" else 0):
            fix = "" if precision == "fp32" else ", or --precision fp32"
            raise InputError(f"the numbers are not finite: iteration {record.iteration}, task "
                             f"{record.task}, {fault}; this is not saved, what was before is "
                             f"intact; a lower --lr may help{fix}")


# ---- The command line ----------------------------------------------------------------------------
def make_parser() -> argparse.ArgumentParser:
    parser = data.Parser(
        usage="train.py [--tiny] [--experiment NAME] [--FLAG VALUE ...]",
        formatter_class=argparse.RawDescriptionHelpFormatter, description=__doc__,
        epilog="Order: defaults < --tiny < --experiment < --as_released < flags.")
    flag = parser.add_argument_group("what to run").add_argument
    flag("--tiny", action="store_true", help="a laptop's preset: tiny data sets, written here, and "
         "the values marked tiny below")
    flag("--experiment", default="", metavar="NAME",
         help="a line of the paper's tables (see --list) [T3.3; with --tiny none]")
    flag("--list", action="store_true", help="print all experiments and leave")
    flag("--out", type=os.path.expanduser, metavar="DIR",
         help="where everything goes [runs/EXPERIMENT, or runs/tiny]")
    flag("--resume", action="store_true", help="go on with what is in --out")
    flag("--overwrite", action="store_true", help="replace what is in --out")
    flag("--as_released", action="store_true",
         help="the authors' released system where it differs from the paper")
    for title, settings in (("the run (Section 3.5, Appendix A)", TrainConfig),
                            ("the model (Section 3, Table A.1)", Config)):
        unit.add_flags(parser.add_argument_group(title), settings, {"tiny": TINY})
    return parser


def chosen_settings(args: argparse.Namespace) -> tuple[dict, Path]:
    """{name: value} of all settings of model and run, and the run's folder. Later ones replace
    earlier ones in the order that --help ends with."""
    flags, prefix = vars(args), "tiny-" if args.tiny else ""
    name = args.experiment or ("" if args.tiny else "T3.3")
    if name and name not in EXPERIMENTS:
        raise InputError(f"--experiment {name}: no such line; `python train.py --list` shows all")
    changes = EXPERIMENTS.get(name, {})
    values = DEFAULTS | (TINY | scaled_to_tiny(changes) if args.tiny else changes)
    if args.as_released:
        states = {*unit.AS_RELEASED["all_text_states"], *values["all_text_states"]}
        values |= unit.AS_RELEASED | dict(init_parts=(), all_text_states=tuple(states))
    values |= flags
    if values["tasks"] != EIGHT:  # tiny's chances are for all eight
        first = tuple(task for task in values["first_tasks"] if task in values["tasks"])
        values |= dict(probabilities=(), first_tasks=first, first_probabilities=())
    if values["init"]:  # its first tasks are for random weights
        values |= dict(first_tasks=(), first_probabilities=())
    values |= flags  # again: flags also replace the two changes above
    out = Path(args.out or f"runs/{prefix}{name}".rstrip("-"))
    if values["init"] in EXPERIMENTS:  # the run beside this one: runs/T1.1-coco, runs/T1.4
        values["init"] = str(out.parent / (prefix + values["init"]) / "last.pt")
    return values, out


def scaled_to_tiny(experiment: dict) -> dict:
    """An experiment's settings at tiny's sizes. Iterations are tiny's, or twice as many if the
    paper's are twice the usual number (Table C.1 line 8)."""
    result = dict(experiment)
    longer = result.get("iterations", 0) // DEFAULTS["iterations"]
    result["iterations"] = TINY["iterations"] * max(1, longer)
    for name in SCALED & experiment.keys():
        value = TINY[name] * experiment[name] / DEFAULTS[name]
        step = 4 if "width" in name else 1  # tiny's 4 heads must divide it
        result[name] = value if name == "lr" else max(1, round(value / step)) * step
    return result


def configs(values: dict) -> list:
    """Config and TrainConfig from these settings; other keys are ignored."""
    made = []
    for kind in (Config, TrainConfig):
        names = values.keys() & kind.__annotations__
        made.append(kind(**{name: values[name] for name in names}))
    return made


def check(config: Config, train: TrainConfig, world_size: int, starting: bool) -> None:
    """Finds mistakes in combinations of settings, before anything is written."""
    known = [task.name for task in data.TASKS]
    if unknown := {*train.tasks, *config.all_text_states} - set(known):
        raise InputError(f"--tasks or --all_text_states: no task {min(unknown)!r}; there are "
                         f"{', '.join(known)}; --tasks_from reads a task of your own")
    if not train.tasks or len(set(train.tasks)) < len(train.tasks):
        raise InputError("--tasks is empty or names a task twice; name at least one, each once")
    if lost := set(train.first_tasks) - set(train.tasks):
        raise InputError(f"--first_tasks: {min(lost)} is not among --tasks")
    for flag, chances, tasks in (
            ("probabilities", train.probabilities, train.tasks),
            ("first_probabilities", train.first_probabilities, train.first_tasks)):
        if chances and (len(chances) != len(tasks) or sum(chances) == 0):
            raise InputError(f"--{flag}: give one for each of the tasks, in order, and not all 0")
    if train.warmup > train.iterations:
        print(f"WARNING: the run of {train.iterations} iterations ends within the warm-up of "
              f"{train.warmup}; a shorter --warmup lets it reach its learning rate")
    if train.batch_size % world_size:
        raise InputError(f"--batch_size must be a multiple of {world_size} (processes)")
    init = Path(train.init)
    if starting and train.init and not init.exists() and init.name not in unit.PUBLISHED:
        raise InputError(f"{init}: the checkpoint to start from is not there; "
                         f"{how_to_make(init, train.data)}")


def how_to_make(init: Path, data_folder: str) -> str:
    """The command that makes the checkpoint of an experiment; the authors' file in its place."""
    folder = init.parent
    name = folder.name.removeprefix("tiny-")
    if name not in EXPERIMENTS:
        return "check --init"
    tiny = "--tiny " if folder.name != name else ""
    how = f"`python train.py {tiny}--experiment {name} --out {folder}` makes it"
    if name in AUTHORS_RUNS and not tiny:
        how += f"; --init {data_folder}/{AUTHORS_RUNS[name]} fetches the authors' own"
    return how


def resume(out: Path, values: dict, flags) -> tuple[dict, dict]:
    """Settings and state of the run in `out`. Those of `values` that are `flags` must equal the
    run's, except FREE_ON_RESUME."""
    state = load_newest(out)
    saved = state["config"] | state["train"]
    if lost := DEFAULTS.keys() - saved.keys():
        raise InputError(f"{out}: has no setting {min(lost)!r}; use the code of its training")
    for name in flags & saved.keys():
        value, before = values[name], saved[name]
        if value != before and name not in FREE_ON_RESUME:
            raise InputError(f"--{name} {written(value)}: the run in {out} has {written(before)}; "
                             "leave it out, or choose another --out")
        saved[name] = value
    return saved, state


RESULT_FILES = ("config.json", "log.jsonl", "last.pt", "previous.pt", "last.pt.part",
                "results.json", "predictions.png", "curves.png", "predictions")


def earlier_run(out: Path, args: argparse.Namespace) -> list[Path]:
    """The files of a run in `out`. Only those of --tiny's default folder are replaced unasked."""
    found = [out / name for name in RESULT_FILES if (out / name).exists()]
    scratch = args.tiny and not args.out and not args.experiment
    if found and not (scratch or args.overwrite or args.resume):
        raise InputError(f"{out}: has {found[0].name}; give --resume, --overwrite or another --out")
    return found


def write_tiny_data(folder: Path) -> None:
    """Fills a folder that is absent or empty with the tiny data sets; under another name first, so
    that nobody finds half of them. Of two runs at once one uses what the other wrote."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        return
    new = f"{folder.absolute()}.{os.getpid()}"
    try:
        data.write_tiny(new)
        os.replace(new, folder)
    except OSError as error:
        shutil.rmtree(new, ignore_errors=True)
        if not folder.exists():  # no other run has written it meanwhile
            raise InputError(f"{folder}: cannot write there ({error.strerror}); give another "
                             "--data") from None
    print(f"tiny data sets written to {folder}")


def build(config: Config, train: TrainConfig, as_released: bool, state: dict | None):
    """-> model, data sets to train on, held-out ones, and `extras`: labels, vocabulary and numbers
    of samples, which go into each checkpoint."""
    folder, vocab = Path(train.data), []
    data.require_folder(folder)
    if any(task.text for task in data.tasks_named(train.tasks)):
        if train.pretrained:
            unit.download(folder / "bert/vocab.txt")
            config = replace(config, **unit.bert_config(folder / "bert"))
        vocab = state["vocab"] if state else data.read_vocabulary(folder / "bert/vocab.txt")
        config = replace(config, vocab_size=len(vocab))
    tasks, datasets = data.load(folder, train.tasks, "train", config.image_size, train.augment,
                                vocab)
    torch.manual_seed(train.seed)
    model = UniT(config, tasks)
    labels = {}
    for task in model.tasks.values():
        dataset = datasets[task.name]
        labels[task.name] = {"classes": dataset.class_names, "attributes": dataset.attribute_names}
        if task.kind == "detection" and (count := dataset.pictures_over(task.num_queries)):
            print(f"WARNING: {task.name}: {count} pictures have more than {task.num_queries} "
                  "boxes: some are not learned; raise --detection_queries")
    samples = {name: len(dataset) for name, dataset in datasets.items()}
    extras = {"labels": labels, "vocab": vocab, "samples": samples}
    held_out = evaluation.load_datasets(model, labels, vocab, train.tasks, "val", folder)
    for dataset in (*datasets.values(), *held_out.values()):
        print(dataset.summary)
    if state:
        unit.copy_weights(model.state_dict(), state["model"], f"checkpoint and data in {folder}",
                          "give the --data of its training")
        print(f"going on after iteration {state['iteration']} of {train.iterations}")
        if samples != state.get("samples"):
            print(f"WARNING: samples were {state.get('samples')}, now {samples}: another order")
    elif train.pretrained:
        print(*unit.load_pretrained(model, folder, train.imagenet_backbone), sep="\n")
    if train.init and not state:  # after the pretrained weights, which it replaces in part
        print(initialise_from(model, train.init, train.init_parts, as_released,
                              {name: d.class_names for name, d in datasets.items()}))
    for name, p in model.named_parameters():
        if part_of(name) in train.freeze:  # Table C.1 lines 10-12
            p.requires_grad_(False)
    return model, datasets, held_out, extras


def list_experiments() -> None:
    form = "{:<13} {:<19} {:>10}  {:<62} {}"
    print(form.format("name", "tasks", "iterations", "changes", "paper"))
    for name, row in EXPERIMENTS.items():
        changes = {"iterations": TrainConfig.iterations} | row
        tasks, iterations = changes.pop("tasks"), changes.pop("iterations")
        tasks = "all eight" if tasks == EIGHT else ",".join(tasks)
        changes = " ".join(f"--{k} {written(v)}" for k, v in changes.items()) or "-"
        paper = " ".join(f"{t} {v}" for t, v in evaluation.PAPER.get(name, {}).items())
        print(form.format(name, tasks, f"{iterations:,}", changes, paper))


def run(args: argparse.Namespace) -> None:
    if args.list:
        return list_experiments()
    values, out = chosen_settings(args)
    device = evaluation.start_processes()
    rank, world_size = processes()
    if rank > 0:
        sys.stdout = open(os.devnull, "w")  # only one process prints
    state = None
    if args.resume and (out / "config.json").exists() and not [*out.glob("*.pt")]:
        print(f"{out}: nothing was saved before the run ended; it starts anew")
    elif args.resume:
        values, state = resume(out, values, vars(args).keys())
    config, train = configs(values)
    check(config, train, world_size, starting=not state)
    if train.threads:
        torch.set_num_threads(train.threads)
    if rank == 0:
        old = earlier_run(out, args)
        evaluation.require_writable(out)
        if args.tiny:
            write_tiny_data(Path(train.data))
    else:
        gathered(None)  # waits: rank 0 writes and fetches the files that all of them read
    model, datasets, held_out, extras = build(config, train, args.as_released, state)
    if rank == 0:
        gathered(None)
    if rank == 0 and not state:
        if old:  # now that data and weights are there
            print(f"the earlier run in {out} is replaced (another --out keeps it)")
        for path in old:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        evaluation.write_json(out / "config.json",
                              {"config": asdict(model.config), "train": asdict(train)})
    model.to(device)
    count = sum(p.numel() for p in model.parameters())
    print(f"{count / 1e6:.1f}M parameters; {train.iterations} iterations of {train.batch_size} "
          f"samples on {world_size} x {device.type}; results go to {out}")
    results = training_loop(model, datasets, held_out, extras, train, out, state)
    if rank == 0:
        report(results, model, held_out, train, out)


def report(results: dict, model: UniT, held_out: dict, train: TrainConfig, out: Path) -> None:
    """results.json, the table beside the paper's numbers, and the pictures."""
    evaluation.write_json(out / "results.json", results)
    # A run's folder is named after its experiment; the paper's numbers need the same tasks.
    paper = train.tasks == EXPERIMENTS.get(out.name, {}).get("tasks")
    print(evaluation.results_table(results, out.name if paper else None))
    evaluation.predictions_picture(model.eval(), held_out, out / "predictions.png")
    evaluation.curves_picture(out / "log.jsonl", out / "curves.png")
    print(f"drawn: {out / 'predictions.png'}, {out / 'curves.png'}")


def main(argv: list[str] | None = None) -> None:
    data.command_line(make_parser(), run, argv)


if __name__ == "__main__":
    main()
