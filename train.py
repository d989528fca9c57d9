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
import itertools
import json
import math
import os
import shutil
import signal
import sys
import textwrap
import time
from collections import Counter, defaultdict
from dataclasses import Field, asdict, dataclass, fields, replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

import data
import eval as evaluation
import unit
from unit import Batch, Config, InputError, UniT, option


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
    seed: int = option(0, "seed of weights, sampling, augmentation and dropout")
    precision: str = option("fp32", "fp32 (the paper's), fp16 (with loss scaling) or bf16")
    num_workers: int = option(4, "data workers per process")
    log_every: int = option(50, "iterations per line on the screen")
    save_every: int = option(10_000, "iterations between checkpoints (released config)")
    eval_every: int = option(10_000, "evaluate every so many (released config); 0: only at the end")
    eval_samples: int = option(0, "evaluate on so many samples of each task, 0: all")
    init: str = option("", "checkpoint, or file of the authors', to start from (Section 4.1)")
    init_parts: tuple[str, ...] = option((), f"of it: {', '.join(PARTS)}; none given: all")
    freeze: tuple[str, ...] = option((), "parts that are not trained (Table C.1 lines 10-12)")
    imagenet_backbone: bool = option(False, "ImageNet's backbone, not DETR's (Table C.1 line 3)")
    probabilities: tuple[float, ...] = option((), "chance of each of --tasks; none: Table A.2's")
    coco_first: float = option(0.0, "share of the run, at its start, on COCO alone (ours)")
    lr: float = option(5e-5, "learning rate (Table A.1)")
    lr_backbone: float = option(1e-5, "learning rate of the backbone (DETR; released config)")
    warmup: int = option(2000, "warm-up iterations (Table A.1)")
    weight_decay: float = option(1e-4, "AdamW's weight decay (released config)")
    clip: float = option(0.1, "largest norm of the gradient (released config)")
    update_unused: bool = option(False, "update what the task did not reach, too (footnote 2)")


# What may differ when a run goes on. Of these only micro_batch touches the weights that come out:
# by padding, and by the order of dropout's draws.
FREE_ON_RESUME = {"data", "num_workers", "log_every", "save_every", "eval_every", "eval_samples",
                  "micro_batch"}

# ---- Experiments: every line of Tables 1-4 and C.1 (data, not code) ------------------------------
TABLE_A2 = {  # sampling probabilities: all eight data sets (line 2), the ablations' three (line 3)
    EIGHT: dict(coco=.20, vg=.07, vqa2=.26, snli_ve=.12, qnli=.10, mnli=.10, qqp=.10, sst2=.05),
    ABLATION: dict(coco=.30, snli_ve=.50, mnli=.20)}
# "COCO init." takes other parts in Section 4.1 (and C.1 line 9) than in 4.2 (released configs).
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
    # Appendix B: eight models fine-tuned against one. How long is not said: 150k is ours.
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
    # Table C.1 (Appendix C): more ablations. Line 8: footnote 3's twice as many iterations.
    "TC.1.1": dict(tasks=ABLATION),
    "TC.1.2": dict(tasks=ABLATION, encoder_width=768),
    "TC.1.3": dict(tasks=ABLATION, imagenet_backbone=True),
    "TC.1.4": dict(tasks=ABLATION, num_queries=1),
    "TC.1.5": dict(tasks=ABLATION, num_queries=100),
    "TC.1.6": dict(tasks=ABLATION, lr=1e-4),
    "TC.1.7": dict(tasks=ABLATION, lr=1e-5),
    "TC.1.8": dict(tasks=ABLATION, iterations=1_000_000),
    "TC.1.9": dict(tasks=ABLATION, **COCO_INIT),
    "TC.1.10": dict(tasks=ABLATION, **COCO_INIT, freeze=("image_encoder", "text_encoder")),
    "TC.1.11": dict(tasks=ABLATION, init="T1.1-coco", init_parts=("image_encoder",),
                          freeze=("image_encoder", "text_encoder")),
    "TC.1.12": dict(tasks=ABLATION, **COCO_INIT, freeze=("image_encoder",)),
    # Section 4.2, "could lead to divergence in detection training", and Appendix A's two strategies
    "S4.2-1536": dict(tasks=ABLATION, decoder_width=1536),
    "A-skip": dict(tasks=DETECTION_VQA, iterations=450_000),  # the same run as T1.3
    "A-update": dict(tasks=DETECTION_VQA, iterations=450_000, update_unused=True)}

TINY = dict(  # --tiny: same model and losses in other sizes, for 32-pixel pictures (ours; README)
    encoder_width=64, encoder_heads=4, encoder_ff=128, encoder_layers=2, backbone="small",
    bert_width=64, bert_heads=4, bert_ff=128, bert_layers=2, max_positions=64,
    decoder_width=64, decoder_heads=4, decoder_ff=128, decoder_layers=2, dropout=0.0,
    # One [CLS] among 16 picture positions is noticed late, the words at once (as Table 4 line 5).
    all_text_states=("vqa2", "snli_ve"),
    # From scratch, two detection sets starve each other: COCO comes first (the paper's COCO init.).
    coco_first=0.22, probabilities=(.17, .13, .21, .19, .07, .08, .07, .08),
    iterations=5400, batch_size=32, lr=9e-4, lr_backbone=1.2e-3, warmup=200, clip=1.0,
    num_workers=1, log_every=250, save_every=1000, eval_every=1350, data="runs/tiny-data")
# What an experiment changes is scaled to tiny's sizes: a decoder of 1536 is twice tiny's width.
SCALED = {name: TINY[name] for name in ("encoder_width", "decoder_width", "decoder_layers", "lr",
                                        "batch_size")} | {"num_queries": 4}  # for 25 (data.py)


def table_a2(tasks: tuple[str, ...]) -> tuple[float, ...]:
    """Table A.2: the sampling probabilities of these tasks, from the line that they belong to."""
    if set(tasks) <= set(DETECTION_VQA):
        return (1.0,) * len(tasks)                 # line 1: equal chances (Section 4.1)
    line = TABLE_A2[ABLATION if set(tasks) == set(ABLATION) else EIGHT]
    return tuple(line.get(t, 0.1) for t in tasks)  # 0.1: a ninth task


# ---- Processes -----------------------------------------------------------------------------------
def sum_over_processes(*numbers: float) -> list[float]:
    total = torch.tensor(numbers, dtype=torch.float64)
    if dist.is_initialized():
        dist.all_reduce(total)
    return total.tolist()


def note_signals() -> list[int]:
    """A list that SIGTERM (a cluster's) and Ctrl-C go into: the iteration is finished first."""
    noted = []

    def note(number, frame):
        noted.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # the next Ctrl-C: at once
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, note)
    return noted


# ---- Optimiser and schedule (Section 3.5) --------------------------------------------------------
def make_optimizer(model: UniT, train: TrainConfig) -> torch.optim.AdamW:
    """AdamW (Section 3.5) with Adam's betas of Table A.1; weight decay on everything, as released.

    PyTorch's AdamW adds eps after the bias correction, the released code's before. Gradients
    clipped to 0.1 are tiny, so the first updates differ: by a tenth at gradients of about 7e-6."""
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    if not trained:
        raise InputError("--freeze leaves no parameter to train; freeze fewer parts")
    groups = [{"params": [p for n, p in trained if ("backbone" in n) == backbone], "base_lr": lr}
              for backbone, lr in ((False, train.lr), (True, train.lr_backbone))]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=train.lr, betas=(0.9, 0.999),
                             eps=1e-8, weight_decay=train.weight_decay, fused=True)


def lr_factor(iteration: int, train: TrainConfig) -> float:
    """Warm-up cosine (Section 3.5): up in `warmup` iterations, then down towards zero."""
    if iteration < train.warmup:
        return (iteration + 1) / train.warmup
    done = (iteration - train.warmup) / (train.iterations - train.warmup)
    return 0.5 * (1 + math.cos(math.pi * done))


class Step(nn.Module):
    """Forward and loss in one module: DistributedDataParallel must see everything that is used."""

    def __init__(self, model: UniT):
        super().__init__()
        self.model = model

    def forward(self, batch: Batch, batch_size: int, num_boxes: float) -> dict[str, Tensor]:
        return self.model.losses(self.model(batch), batch, batch_size, num_boxes)


# ---- Checkpoints ---------------------------------------------------------------------------------
def save(out: Path, model, optimizer, scaler, iteration, train, names) -> None:
    """Plain values and tensors only, so that it opens with `torch.load(weights_only=True)`.
    Atomically: whatever happens and whenever, `last.pt` or `previous.pt` is whole."""
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(),
             "scaler": scaler.state_dict(), "iteration": iteration,
             "config": asdict(model.config), "train": asdict(train),
             "tasks": [{k: v for k, v in vars(t).items() if k != "dataset"}
                       for t in model.tasks.values()]}
    with data.whole_file(out / "last.pt", "wb") as file:
        torch.save(state | names, file)
        if (out / "last.pt").exists():
            file.flush()
            os.fsync(file.fileno())  # the new one is on the disk before the old one moves
            os.replace(out / "last.pt", out / "previous.pt")


def load_newest(out: Path) -> dict:
    """The newest whole checkpoint under `out`: last.pt, or previous.pt if a crash tore that one."""
    for path in filter(Path.exists, (out / "last.pt", out / "previous.pt")):
        try:
            state = evaluation.read_checkpoint(path)
            if lost := {"optimizer", "scaler", "iteration", "train"} - set(state):
                raise InputError(f"{path}: no run can go on from it: it has no {min(lost)}")
            return state
        except InputError as error:
            print(f"warning: {error}; trying the one before", file=sys.stderr)
    raise InputError(f"{out}: nothing to resume: no whole last.pt or previous.pt; give the "
                     "--out (or --tiny, --experiment) of the run")


def part_of(name: str) -> str:
    return next((part for part in PARTS if name.startswith(part)), "others")


def fetch_weights(train: TrainConfig) -> None:
    """Downloads what `build` will read and is not there, in one process while the others wait.
    What cannot be had is left to `build` to report."""
    tasks = [task for task in data.TASKS if task.name in train.tasks]
    bert, backbone = unit.pretrained_files(Path(train.data), train.imagenet_backbone)
    files = [bert.with_name("vocab.txt"), bert] if any(task.text for task in tasks) else []
    if any(task.image for task in tasks):
        files.append(backbone)
    if train.init:
        files.append(Path(train.init))
    for path in files:
        with contextlib.suppress(unit.MissingFile):
            unit.fetch(path)


def source_of(name: str, theirs: dict[str, Tensor], as_released: bool) -> str:
    """The name in another model's tensors of the one that our `name` starts from. If it has a single
    decoder, each of ours starts from that (Section 4.2); as released only those of its tasks."""
    if name in theirs or not name.startswith("decoders."):
        return name
    _, task, rest = name.split(".", 2)
    others = {key.split(".")[1] for key in theirs if key.startswith("decoders.")}
    foreign = as_released and task != "shared" and f"queries.{task}" not in theirs
    return name if foreign or len(others) != 1 else f"decoders.{others.pop()}.{rest}"


def by_module(names) -> str:
    """How many tensors of each module: "heads.coco 8, queries.coco 1"."""
    counts = Counter(".".join(name.split(".")[:2]) for name in names)
    return ", ".join(f"{module} {count}" for module, count in counts.items()) or "none"


def classes_of(task: str, tensors: dict[str, Tensor], names: list[str]) -> str:
    """The classes of a task's head, with their names if those are known."""
    class_head, linear = (f"heads.{task}.{name}.bias" for name in ("class_head", "linear1"))
    number = len(tensors[linear]) if linear in tensors else len(tensors[class_head]) - 1
    names = textwrap.shorten(", ".join(filter(None, names)), 60, placeholder=" ...")
    return f"{number} classes ({names or 'names unknown'})"


def initialise_from(model: UniT, path: str, parts: tuple[str, ...], as_released: bool,
                    classes: dict[str, list[str]] | None = None) -> str:
    """Takes from a checkpoint of train.py, or from a file of the authors', what fits by name and
    shape, and leaves the rest as it is -> what it did, in words. `parts`: of these alone; then it is
    an error if nothing of one fits, or if a head has other classes there than here (`classes`)."""
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
        if part in parts and part == "heads":
            problem += (f": {classes_of(task, theirs, their_classes.get(task, []))}, but here "
                        f"{classes_of(task, ours, (classes or {}).get(task, []))}")
        if part in parts and (part == "heads" or part not in taken):
            raise InputError(f"{path}: {problem}; leave {part} out of --init_parts, and it starts "
                             "anew, or give the data and sizes of its training")
    # Tasks that are new here have no queries and heads there: that is no mistake.
    lost = [part for part in parts if part not in taken and part not in ("queries", "heads")]
    if lost or not taken:
        raise InputError(f"{path}: none of its weights fit {', '.join(lost or parts or PARTS)}")
    unit.copy_weights({name: ours[name] for name in sources},
                      {source: theirs[source] for source in sources.values()}, path, "", sources)
    examples = textwrap.shorten("; ".join(misfits.values()), 200, placeholder=" ...")
    left = by_module(name for name in wanted if name not in sources)
    dropped = by_module(key for key in theirs if key not in sources.values())
    return (f"init {path}, {origin}: tensors taken: {by_module(sources)}; left as they were: {left}"
            f" (of another shape: {examples or 'none'}); dropped: {dropped}")


# ---- The log -------------------------------------------------------------------------------------
class Log:
    """A line per iteration in log.jsonl, one every `log_every` on the screen. Numbers stay on the
    device until `flush`: most iterations need not wait for them."""

    def __init__(self, out: Path, train: TrainConfig, start: int, main: bool):
        self.path, self.train, self.main = out / "log.jsonl", train, main
        self.done, self.since = start, time.perf_counter()
        self.pending = []  # (task, ids, learning rate, loss terms, gradient's norm)
        if main:
            before = evaluation.read_log(self.path)
            with data.whole_file(self.path) as file:  # killed here, the log stays as it was
                file.writelines(json.dumps(x) + "\n" for x in before if x["iteration"] <= start)

    def write(self, records: list[dict], line: str) -> None:
        """Records, and a line for the screen. All go to the system in one call (the usual buffer
        cuts at 8 KB): a kill leaves no half of one."""
        if self.main:
            try:
                with open(self.path, "ab", buffering=2**20) as file:
                    file.write("".join(json.dumps(r) + "\n" for r in records).encode())
            except OSError as error:
                raise InputError(f"{self.path}: cannot be written ({error.strerror}); make room, "
                                 "go on with --resume") from None
        print(f"{self.done:>7}/{self.train.iterations}  {line}", flush=True)
        self.since = time.perf_counter()

    def flush(self) -> None:
        """Writes what is pending. A loss that is not finite ends the run; in fp16, whose scaler
        skips such steps, only if all were skipped."""
        if not self.pending:
            return
        # Each process has its share of a term; the norm is everyone's.
        shares = [x.double() for *_, terms, _ in self.pending for x in terms.values()]
        shares = iter(sum_over_processes(*torch.stack(shares).tolist()))
        seconds = (time.perf_counter() - self.since) / len(self.pending)  # that an iteration took
        pace = {"samples_per_second": round(self.train.batch_size / seconds, 2),
                "eta": round((self.train.iterations - self.done - len(self.pending)) * seconds)}
        records, losses, faults, skipped = [], defaultdict(list), [], 0
        for task, ids, lr, terms, norm in self.pending:
            self.done += 1
            terms = {name: next(shares) for name in terms}
            # JSON has no NaN: null.
            numbers = {"loss": sum(terms.values()), **terms, "lr": lr, "grad_norm": norm.item()}
            numbers = {k: x if math.isfinite(x) else None for k, x in numbers.items()}
            records.append({"iteration": self.done, "task": task, **numbers, **pace})
            losses[task].append(sum(terms.values()))
            faults += [f"iteration {self.done}, task {task}, term {name}, samples {ids}"
                       for name, value in terms.items() if not math.isfinite(value)]
            skipped += not norm.isfinite()  # by fp16's loss scaling
        self.pending = []
        means = "  ".join(f"{task} {sum(x) / len(x):.3f}" for task, x in losses.items())
        self.write(records, f"{means}  lr {lr:.2e}  {pace['samples_per_second']:.1f} samples/s  "
                   f"ETA {timedelta(seconds=pace['eta'])}" + f"  skipped {skipped}" * (skipped > 0))
        if faults and (self.train.precision != "fp16" or skipped == len(records)):
            raise InputError(f"the loss is not finite: {faults[0]}; nothing of it was saved; "
                             "a lower --lr, or --precision fp32, may help")

    def add_results(self, results: dict) -> None:
        """An evaluation: its record, and a line with the first metric of each task."""
        first = "  ".join(f"{task} {[*x.values()][0]:.1f}" for task, x in results.items())
        self.write([{"iteration": self.done, "results": results}], f"held out:  {first}")


# ---- The loop (Section 3.5) ----------------------------------------------------------------------
def update(step, optimizer, scaler, batches, train, num_boxes, world_size, device):
    """One update from this process's micro-batches -> its shares of the loss terms (a dict), and
    the gradient's norm before clipping."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    totals: dict[str, Tensor] = {}
    for k, batch in enumerate(batches):
        wait = k < len(batches) - 1 and dist.is_initialized()
        with step.no_sync() if wait else contextlib.nullcontext():  # synchronise once per iteration
            with evaluation.autocast(device, train.precision):
                terms = step(batch.to(device, parameters[0].dtype), train.batch_size, num_boxes)
            # DistributedDataParallel averages gradients; the batch's loss is the sum of the shares.
            scaler.scale(sum(terms.values()) * world_size).backward()
        for name, value in terms.items():
            totals[name] = totals.get(name, 0) + value.detach()
    scaler.unscale_(optimizer)
    if train.update_unused:
        for p in parameters:  # Appendix A's worse strategy: zeros where the task did not reach
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    norm = nn.utils.clip_grad_norm_(parameters, train.clip)
    # Footnote 2, Appendix A: parameters that the task did not reach have grad None, and AdamW
    # leaves them and their momentum alone.
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return totals, norm


def set_up(model: UniT, train: TrainConfig, state: dict | None, device):
    """The step, for all processes, and optimiser and loss scaler as `state` left them."""
    optimizer = make_optimizer(model, train)
    scaler = torch.amp.GradScaler(device.type, enabled=train.precision == "fp16")
    if state:
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
        state.clear()  # all of it lives on in model and optimiser: 2.4 GB for each process
    step = Step(model)
    if dist.is_initialized():
        step = nn.parallel.DistributedDataParallel(
            step, find_unused_parameters=True, forward_sync_buffers=False,
            gradient_as_bucket_view=True,  # no second copy of the gradients
            device_ids=[device] if device.type == "cuda" else None)
    return step, optimizer, scaler


def training_loop(model, datasets, held_out, names, train: TrainConfig, out, state,
                  rank: int, world_size: int, device):
    """Trains from `state` (a checkpoint, or None) to the end -> the last results. `names`, labels
    and vocabulary, go into each checkpoint."""
    start = state["iteration"] if state else 0
    step, optimizer, scaler = set_up(model, train, state, device)
    chances = dict(zip(train.tasks, train.probabilities or table_a2(train.tasks)))
    schedule = data.Schedule({t: len(datasets[t]) for t in train.tasks}, chances, train.batch_size,
                             train.iterations, train.seed,
                             round(train.coco_first * train.iterations))
    loader = data.train_loader(datasets, schedule, start, rank, world_size, train.micro_batch,
                               train.num_workers, train.seed)
    log, signals = Log(out, train, start, rank == 0), note_signals()

    def keep(iteration):
        log.flush()  # first: a loss that is not finite must not reach a checkpoint
        if rank == 0:
            save(out, model, optimizer, scaler, iteration, train, names)

    def score():
        workers = 0 if evaluation.is_tiny(model.config) else train.num_workers
        results = evaluation.evaluate(model, held_out, device, num_workers=workers, out=out,
                                      limit=train.eval_samples, precision=train.precision)
        log.add_results(results)
        return results

    gc.freeze()  # or the first full collection copies 75 MB that the data workers share
    model.train()
    with contextlib.closing(loader):  # its workers would wait half a minute for more
        for i, group in itertools.groupby(loader, key=lambda item: item[0]):
            batches = [batch for _, batch in group]
            broken = next((x for x in batches if isinstance(x, InputError)), None)  # a picture
            own = 0 if broken else sum(len(x) for b in batches for x in b.labels or [])
            num_boxes, stopping = sum_over_processes(own, len(signals) + bool(broken))
            if stopping:  # all processes stop before the same iteration
                keep(i)
                sum_over_processes(0)  # until it is saved: torchrun kills all once one has left
                print(f"stopped after iteration {i}; saved in {out}: go on with --resume")
                if broken:
                    raise broken
                sys.exit(128 + signals[0] if signals else 1)
            # Dropout follows from this alone: resuming needs no generator's state.
            torch.manual_seed(((train.seed * 1_000_003 + i) * 4099 + rank) % 2**63)
            factor, done = lr_factor(i, train), i + 1
            for param_group in optimizer.param_groups:
                param_group["lr"] = param_group["base_lr"] * factor
            terms, norm = update(step, optimizer, scaler, batches, train, num_boxes, world_size,
                                 device)
            ids = [x for b in batches for x in b.ids]
            log.pending.append((batches[0].task, ids, train.lr * factor, terms, norm))
            if done % train.log_every == 0:
                log.flush()
            last = done == train.iterations
            scoring = train.eval_every and done % train.eval_every == 0
            if last or scoring or done % train.save_every == 0:
                keep(done)  # before the evaluation: a job's time may end in one
            if scoring and not last:
                score()
    return score()


# ---- The command line ----------------------------------------------------------------------------
# The groups of --help after "every day": each begins at this setting.
GROUPS = {"init": "starting from other weights (Sections 4.1, 4.2, Table C.1)",
          "probabilities": "sampling, optimiser, schedule (Section 3.5, Table A.1)",
          "encoder_width": "the model (Table A.1)",
          "shared_decoder": "ablations (Tables 1-4, C.1) and the released system"}
METAVARS = {int: "INT", float: "FLOAT", bool: "BOOL", str: "NAME", tuple: "A,B"}
CHOICES = {"init_parts": PARTS, "freeze": PARTS, "precision": tuple(evaluation.PRECISIONS),
           "backbone": ("resnet50", "small")}
# The least and the greatest value of a flag; of all others see `flag_type`.
LIMITS = {"clip": (1e-6, math.inf), "seed": (0, 2**63 - 1), "dropout": (0, 1), "coco_first": (0, 1)}
LIMITS |= dict.fromkeys(("warmup", "num_workers", "eval_every", "encoder_layers"), (0, math.inf))


def flag_type(field: Field):
    """How a flag's text becomes the field's value; tuples are written with commas."""
    many = isinstance(field.default, tuple)
    kind = float if "float" in field.type else str if many else type(field.default)
    known = ("true", "false") if kind is bool else CHOICES.get(field.name)
    if field.name in ("tasks", "all_text_states"):
        known = [t.name for t in data.TASKS]

    def choice(text):
        text = text.lower() if known else text
        if known and text not in known:
            raise argparse.ArgumentTypeError(f"{text}: choose from {', '.join(known)}")
        return text == "true" if kind is bool else text
    least = 1 if kind is int and field.default else 0
    number = data.between(*LIMITS.get(field.name, (least, math.inf)), kind)
    one = number if kind in (int, float) else choice
    return (lambda text: tuple(one(x) for x in text.split(",") if x)) if many else one


def written(value) -> str:
    """A setting as typed on the command line."""
    text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
    return text.lower() if isinstance(value, bool) else text


def make_parser() -> argparse.ArgumentParser:
    parser = data.Parser(
        usage="train.py [--tiny] [--experiment NAME] [--FLAG VALUE ...]", allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter, description=__doc__,
        epilog="Order: defaults < --tiny < --experiment < flags.")
    flag = parser.add_argument_group("every day").add_argument
    flag("--tiny", action="store_true", help="tiny data sets, written here, and a tiny model")
    flag("--experiment", default="", metavar="NAME",
         help="a line of the paper's tables (see --list) [T3.3; with --tiny none]")
    flag("--list", action="store_true", help="print all experiments and leave")
    flag("--out", metavar="DIR", help="where everything goes [runs/EXPERIMENT, or runs/tiny]")
    flag("--resume", action="store_true", help="go on with what is in --out")
    flag("--overwrite", action="store_true", help="replace what is in --out")
    flag("--as_released", action="store_true",
         help="the authors' released system where it differs from the paper")
    for field in (*fields(TrainConfig), *fields(Config)):
        if field.name in GROUPS:
            flag = parser.add_argument_group(GROUPS[field.name]).add_argument
        tiny = f"; tiny: {written(TINY[field.name])}" if field.name in TINY else ""
        flag(f"--{field.name}", type=flag_type(field), default=argparse.SUPPRESS,
             metavar=METAVARS[type(field.default)],
             help=f"{field.metadata['help']} [{written(field.default) or 'none'}{tiny}]")
    return parser


def configs(values: dict) -> tuple[Config, TrainConfig]:
    """Config and TrainConfig from these settings; other keys are ignored."""
    return tuple(c(**{f.name: values[f.name] for f in fields(c) if f.name in values})
                 for c in (Config, TrainConfig))


def scaled_to_tiny(overrides: dict) -> dict:
    """An experiment's settings at tiny's sizes: what it changes keeps its ratio to the default."""
    result = {k: v for k, v in overrides.items() if k != "iterations"}
    paper = asdict(Config()) | asdict(TrainConfig()) | {"num_queries": 25}
    for name in set(SCALED) & set(result):
        value = SCALED[name] * result[name] / paper[name]
        step = 4 if "width" in name else 1  # tiny's 4 heads must divide it
        result[name] = value if name == "lr" else max(1, round(value / step)) * step
    return result


def settings(args: argparse.Namespace) -> tuple[Config, TrainConfig, Path]:
    """defaults < --tiny < --experiment < flags"""
    name = args.experiment = args.experiment or ("" if args.tiny else "T3.3")
    if name and name not in EXPERIMENTS:
        raise InputError(f"--experiment {name}: no such line; `python train.py --list` shows all")
    out = Path(args.out or "runs/" + "-".join(["tiny"] * args.tiny + [name] * bool(name)))
    values = dict(EXPERIMENTS.get(name, {"tasks": EIGHT}))
    if args.tiny:
        values = TINY | scaled_to_tiny(values)
    if args.as_released:
        states = {*unit.AS_RELEASED["all_text_states"], *values.get("all_text_states", ())}
        values |= unit.AS_RELEASED | dict(init_parts=(), all_text_states=tuple(sorted(states)))
    values |= vars(args)
    if values["tasks"] != EIGHT and "probabilities" not in args:  # tiny's own are for all eight
        values["probabilities"] = ()
    if "coco_first" not in args and (values.get("init") or "coco" not in values["tasks"]):
        values["coco_first"] = 0.0
    if values.get("init") in EXPERIMENTS:  # its sibling: runs/T1.1-coco beside runs/T1.4
        values["init"] = str(out.parent / ("tiny-" * args.tiny + values["init"]) / "last.pt")
        vars(args).update({"init": values["init"]} if "init" in args else {})
    return *configs(values), out


def check(train: TrainConfig, world_size: int, starting: bool = True) -> None:
    """Mistakes that show only in a combination of settings, before anything is written."""
    if not train.tasks or len(set(train.tasks)) < len(train.tasks):
        raise InputError("--tasks is empty or names a task twice; name at least one, each once")
    if train.probabilities and (len(train.probabilities) != len(train.tasks)
                                or not sum(train.probabilities)):
        raise InputError("--probabilities: give one for each of --tasks, in order, and not all 0")
    if train.coco_first and "coco" not in train.tasks:
        raise InputError(f"--coco_first {train.coco_first}: coco is not among --tasks")
    if train.batch_size % world_size:
        raise InputError(f"--batch_size must be a multiple of {world_size} (processes)")
    init = Path(train.init)
    if starting and train.init and not init.exists() and init.name not in unit.PUBLISHED:
        folder = init.parent
        name = folder.name.removeprefix("tiny-")
        tiny = "--tiny " * (name != folder.name)
        how = (f"`python train.py {tiny}--experiment {name} --out {folder}` makes it; with "
               "this run's --iterations and --seed, if it has its own"
               if name in EXPERIMENTS else "check --init")
        if name in AUTHORS_RUNS and not tiny:
            how += (f"; or take the authors' own with --init {train.data}/{AUTHORS_RUNS[name]}, "
                    "which is fetched if it is not there")
        raise InputError(f"{train.init}: the checkpoint to start from is not there; {how}")


def resume(out: Path, args: argparse.Namespace) -> tuple[Config, TrainConfig, dict]:
    """Settings and state of the run in `out`. Flags may repeat its settings or change free ones."""
    state, given = load_newest(out), vars(args)
    saved = state["config"] | state["train"]
    if lost := (asdict(Config()) | asdict(TrainConfig())).keys() - saved.keys():
        raise InputError(f"{out}: has no setting {min(lost)!r}; use the code of its training")
    for name in given.keys() & saved.keys() - FREE_ON_RESUME:
        if given[name] != saved[name]:
            raise InputError(f"--{name} {written(given[name])}: the run in {out} has "
                             f"{written(saved[name])}; leave it out, or choose another --out")
    return *configs(saved | given), state


RESULT_FILES = ("config.json", "log.jsonl", "last.pt", "previous.pt", "last.pt.part",
                "results.json", "predictions.png", "curves.png", "predictions")


def earlier_run(out: Path, args: argparse.Namespace) -> list[Path]:
    """The files of a run in `out`. Never replaced unasked: only --tiny's default is scratch."""
    found = [out / name for name in RESULT_FILES if (out / name).exists()]
    scratch = args.tiny and not args.out and not args.experiment
    if found and not (scratch or args.overwrite or args.resume):
        raise InputError(f"{out}: has {found[0].name}; give --resume, --overwrite or another --out")
    return found


def write_tiny_data(folder: Path) -> None:
    """The tiny data sets, once; under another name first, so that half of them never stays."""
    if (folder / "coco").exists():
        return
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise InputError(f"{folder}: has something else than tiny data; give another --data")
    new = f"{folder.absolute()}.{os.getpid()}"
    try:
        data.write_tiny(new)
        os.replace(new, folder)
    except OSError as error:
        shutil.rmtree(new, ignore_errors=True)
        raise InputError(f"{folder}: cannot write there ({error.strerror}); give another --data")
    print(f"tiny data sets written to {folder}")


def build(config: Config, train: TrainConfig, as_released: bool, state: dict | None):
    """-> model, data sets to train on, held-out ones, names that go into each checkpoint."""
    folder, tiny, vocab = Path(train.data), evaluation.is_tiny(config), []
    data.require_folder(folder)
    if any(t.text for t in data.TASKS if t.name in train.tasks):
        if not tiny:
            unit.fetch(folder / "bert/vocab.txt")
            config = replace(config, **unit.bert_config(folder / "bert"))
        vocab = data.read_vocabulary(folder / "bert/vocab.txt")
        config = replace(config, vocab_size=len(vocab))
    tasks, datasets = data.load(folder, train.tasks, "train", tiny)
    _, held_out = data.load(folder, train.tasks, "val", tiny)
    for dataset in (*datasets.values(), *held_out.values()):
        print(dataset.summary)
    torch.manual_seed(train.seed)
    model = UniT(config, tasks)
    if state:
        unit.copy_weights(model.state_dict(), state["model"],
                          f"the checkpoint and the data in {folder}",
                          "give the --data of its training")
        print(f"going on after iteration {state['iteration']} of {train.iterations}")
    elif not tiny:
        print(*unit.load_pretrained(model, folder, train.imagenet_backbone), sep="\n")
    if train.init and not state:  # after the pretrained weights, which it replaces in part
        print(initialise_from(model, train.init, train.init_parts, as_released,
                              {name: d.class_names for name, d in datasets.items()}))
    for name, p in model.named_parameters():
        if part_of(name) in train.freeze:  # Table C.1 lines 10-12
            p.requires_grad_(False)
    labels = {name: {"classes": d.class_names, "attributes": d.attribute_names}
              for name, d in datasets.items()}
    samples = {name: len(d) for name, d in datasets.items()}
    if state and samples != state.get("samples", samples):
        print(f"WARNING: there were {state['samples']} samples, now {samples}: their order changes")
    return model, datasets, held_out, {"labels": labels, "vocab": vocab, "samples": samples}


def list_experiments() -> None:
    form = "{:<13} {:<19} {:>10}  {:<62} {}"
    print(form.format("name", "tasks", "iterations", "changes", "paper"))
    for name, row in EXPERIMENTS.items():
        tasks = "all eight" if row["tasks"] == EIGHT else ",".join(row["tasks"])
        iterations = f"{row.get('iterations', TrainConfig.iterations):,}"
        changes = " ".join(f"--{k} {written(v)}" for k, v in row.items()
                           if k not in ("tasks", "iterations"))
        paper = " ".join(f"{t} {v}" for t, v in evaluation.PAPER.get(name, {}).items())
        print(form.format(name, tasks, iterations, changes or "-", paper))


def run(args: argparse.Namespace) -> None:
    if args.list:
        return list_experiments()
    config, train, out = settings(args)
    rank, world_size, device = evaluation.start_processes()
    if rank > 0:
        sys.stdout = open(os.devnull, "w")  # one process speaks for all
    if args.resume and (out / "config.json").exists() and not [*out.glob("*.pt")]:
        print(f"{out}: nothing was saved before the run ended; it starts anew")
        args.resume, args.overwrite = False, True
    config, train, state = resume(out, args) if args.resume else (config, train, None)
    check(train, world_size, starting=not state)
    if tiny := evaluation.is_tiny(config):
        torch.set_num_threads(1)  # a second one costs such small matrices more than it brings
    if rank == 0:
        replaced = earlier_run(out, args)
        evaluation.require_writable(out)
        if args.tiny:
            write_tiny_data(Path(train.data))
        elif not state:
            data.require_folder(Path(train.data))
            fetch_weights(train)
    sum_over_processes(0)  # the others wait for the files
    model, datasets, held_out, names = build(config, train, args.as_released, state)
    if rank == 0 and not state:
        if replaced:  # now that data and weights are there
            print(f"the earlier run in {out} is replaced (another --out keeps it)")
        for path in replaced:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        evaluation.write_json(out / "config.json",
                              {"config": asdict(model.config), "train": asdict(train)})
    model.to(device)
    count = sum(p.numel() for p in model.parameters())
    print(f"{count / 1e6:.1f}M parameters; {train.iterations} iterations of {train.batch_size} "
          f"samples on {world_size} x {device.type}; results go to {out}")
    results = training_loop(model, datasets, held_out, names, train, out, state, rank, world_size,
                            device)
    if rank == 0:
        evaluation.write_json(out / "results.json", results)
        # The paper's numbers only beside the paper's data sets.
        name = out.name if args.resume else args.experiment
        paper = not tiny and train.tasks == EXPERIMENTS.get(name, {}).get("tasks")
        print(evaluation.results_table(results, name if paper else None))
        if tiny:
            evaluation.predictions_picture(model.eval(), held_out, device, out / "predictions.png")
            evaluation.curves_picture(out / "log.jsonl", out / "curves.png")
            print(f"drawn: {out / 'predictions.png'}, {out / 'curves.png'}")


def main(argv: list[str] | None = None) -> None:
    data.command_line(make_parser(), run, argv)


if __name__ == "__main__":
    main()
