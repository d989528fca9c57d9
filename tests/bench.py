"""How fast and how large: this implementation beside yardsticks that anyone can install.

    python tests/bench.py                          # pictures of 800 x 1066; half an hour on 2 cores
    python tests/bench.py --quick                  # pictures of 480 x 640, fewer rounds: 5 minutes
    python tests/bench.py --only inference,text    # some of: inference, training, text, matching,
                                                   # data, annotations, evaluation, growth, cost,
                                                   # gpu
    python tests/bench.py --only gpu --peak_tflops 989

Ours and the yardstick take turns in one process (A B A B), on all cores, so that whatever else the
machine does hits both. `ratio` is the yardstick's time over ours, its median and, in brackets, the
least and the greatest of the rounds. Peaks of memory are those of a fresh process each.

* "the authors' way" is our model, with the same weights, that calls torch's MultiheadAttention as
  DETR and the released system do (it returns the attention weights), has frozen batch norms as
  layers of their own (torchvision's ResNet), matches layer by layer, each with a copy to the host,
  and looks at every gradient on the host in the optimiser's step.
* "transformers" is DetrForObjectDetection and BertModel of the same shapes, random weights.
* "PIL" decodes, crops and resizes with PIL through torchvision's first transforms.

Measured on 2 shared cores (AMD EPYC with AVX-512), fp32, full size, at commit 5987074; since then
the text encoder and the decoder compute what they then left out for [CLS] alone (7% of BERT):

| what                                    | beside          | ratio            | `--only`    |
|-----------------------------------------|-----------------|------------------|-------------|
| COCO inference, 800 x 1066              | the authors'    | 2.07 (1.95-2.12) | inference   |
|                                         | transformers    | 1.19 (0.95-1.91) |             |
| COCO training step, no dropout          | the authors'    | 2.08 (1.94-2.17) | training    |
| its peak memory                         |                 | 1.96             |             |
| the same with dropout 0.1               |                 | 0.91 (0.73-1.04) |             |
| VQA inference, 480 x 640, 14 tokens     | transformers    | 1.07 (0.94-1.11) | text        |
| GLUE inference, 16 x 128                | transformers    | 1.04 (1.00-1.16) |             |
| matching, 6 layers x 8 x 100 queries    | layer by layer  | 2.2 (2.1-2.4)    | matching    |
| a training image, JPEG to tensor        | PIL             | 2.3 (1.6-2.3)    | data        |
| loading annotations of COCO's size      | json.load, time | 0.76, 93 MiB     | annotations |
| of VQAv2's size                         |                 | 1.38, 240 MiB    |             |
| COCO's metric, our part                 | pycocotools     | 14.1%            | evaluation  |

With attention dropout PyTorch's CPU kernels materialise the L x L matrix, as the authors' way does;
CUDA's kernels do not. Nothing has been measured on a GPU yet.

`--only growth`, a COCO training step on those cores (fp32, no dropout): seconds, peak MiB

| a picture of side                | 32         | 160        | 320        | 800        |
|----------------------------------|------------|------------|------------|------------|
| `resnet50`                       | 0.38, 1705 | 0.53, 1742 | 1.66, 1823 | 5.91, 2440 |
| `small`                          | 0.35, 1285 | 0.56, 1354 | 1.67, 1527 | 24, 3168   |
| `small`, two of unequal width    | 0.47, 1315 | 0.96, 1434 | 3.98, 1877 | 52, 4733   |
"""

import argparse
import contextlib
import copy
import functools
import gc
import json
import multiprocessing
import os
import sys
import tempfile
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from unittest import mock

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no yardstick downloads anything

import numpy as np
import torch
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data  # noqa: E402
import eval as evaluation  # noqa: E402
import train  # noqa: E402
import unit  # noqa: E402

from torchvision.ops import box_convert, generalized_box_iou  # noqa: E402
from torchvision.transforms import functional as v1  # noqa: E402

TASKS = {task.name: task for task in data.TASKS}
MIB = 2 ** 20
CUDA = torch.device("cuda") if torch.cuda.is_available() else None
CPU = torch.device("cpu")
DEVICES = [CPU, CUDA] if CUDA else [CPU]
# Peak of dense half precision, 10^12 operations a second, by a part of the device's name.
PEAK_TFLOPS = {"V100": 125, "A100": 312, "H100": 989, "H200": 989}
GPU_PICTURE = dict(task="coco", image=(800, 1333))


# ---- Measuring and printing

def heading(title: str, columns=("ours", "yardstick")) -> None:
    print(f"\n{title}\n{'':<46}{columns[0]:>12}{columns[1]:>12}  {'ratio':<22}{'target':<14}",
          flush=True)


def row(what: str, ours="", theirs="", ratio="", target="", good: bool | None = None) -> None:
    """A line of a table; `good`: was the target met?"""
    met = "" if good is None else "met" if good else "MISSED"
    print(f"{what:<46}{ours:>12}{theirs:>12}  {ratio:<22}{target:<14}{met}".rstrip(), flush=True)


def timed(function) -> float:
    """Seconds of one call; on a GPU until its work is done."""
    start = time.perf_counter()
    function()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def spread(ratios: list[float]) -> str:
    return f"{median(ratios):.2f} ({min(ratios):.2f}..{max(ratios):.2f})"


def in_turn(ours, theirs, rounds: int) -> list[tuple[float, float]]:
    """Seconds of both, round by round."""
    return [(timed(ours), timed(theirs)) for _ in range(rounds)]


def compare(what: str, ours, theirs, rounds: int, least: float | None) -> None:
    """Times both and prints the row; `least`: the target, how many times theirs must take."""
    ours(), theirs()  # the first call allocates and chooses algorithms
    pairs = in_turn(ours, theirs, rounds)
    a, b = (median(column) for column in zip(*pairs))
    ratios = [y / x for x, y in pairs]
    target = (f">= {least}", median(ratios) >= least) if least else ()
    row(what, f"{a:.3g} s", f"{b:.3g} s", spread(ratios), *target)


def memory(field: str, file: str = "status") -> float:
    """MiB of this process, as Linux tells. VmHWM is its peak; getrusage's ru_maxrss would start at
    the peak of the process that started this one."""
    for line in Path(f"/proc/self/{file}").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) / 1024
    raise KeyError(field)


def in_child(function, *arguments, **more):
    """function(*arguments, **more) in a fresh process -> its value."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as pool:  # a Pool's could not fork a worker
        return pool.submit(function, *arguments, **more).result()


# ---- The authors' way, transformers

class AuthorsAttention(nn.Module):
    """torch's attention as DETR calls it: with all weights, averaged over heads."""

    def __init__(self, ours: unit.Attention):
        super().__init__()
        projections, width = (ours.q_proj, ours.k_proj, ours.v_proj), ours.out_proj.in_features
        self.attention = nn.MultiheadAttention(width, ours.heads, ours.dropout, batch_first=True)
        self.attention.load_state_dict({
            "in_proj_weight": torch.cat([p.weight for p in projections]),
            "in_proj_bias": torch.cat([p.bias for p in projections]),
            "out_proj.weight": ours.out_proj.weight, "out_proj.bias": ours.out_proj.bias})

    def forward(self, query, key, value, bias=None):
        padding = None if bias is None else bias[:, 0, 0]
        return self.attention(query, key, value, key_padding_mask=padding, need_weights=True)[0]


def authors_way(model: unit.UniT) -> unit.UniT:
    """A copy of our model, in its mode, whose every attention is torch's, and every residual block
    torchvision's."""
    theirs = copy.deepcopy(model)
    if model.config.backbone == "resnet50" and theirs.image_encoder:
        *layers, _pooling = theirs.image_encoder.backbone.body.children()
        theirs.image_encoder.backbone = nn.Sequential(*layers)
    for parent in list(theirs.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, unit.Attention):
                setattr(parent, name, AuthorsAttention(child).to(child.q_proj.weight))
    return theirs.train(model.training)


@torch.no_grad()
def authors_match(logits: Tensor, boxes: Tensor, labels: list[Tensor], targets: list[Tensor]):
    """`unit.match` as DETR does it: for each layer all pairs of the batch, a copy to the host, and
    from there image by image."""
    all_labels, all_targets = torch.cat(labels), torch.cat(targets)
    counts, found = [len(x) for x in labels], []
    corners = box_convert(all_targets, "cxcywh", "xyxy")
    for layer, (scores, candidates) in enumerate(zip(logits.flatten(1, 2), boxes.flatten(1, 2))):
        cost = 5 * torch.cdist(candidates, all_targets, p=1) - scores.softmax(-1)[:, all_labels]
        cost -= 2 * generalized_box_iou(box_convert(candidates, "cxcywh", "xyxy"), corners)
        cost, start = cost.view(len(labels), -1, sum(counts)).cpu(), 0
        for i, part in enumerate(cost.split(counts, -1)):
            query, target = linear_sum_assignment(part[i])
            found.append(np.stack([np.full_like(query, layer), np.full_like(query, i), query,
                                   target + start]))
            start += counts[i]
    return torch.from_numpy(np.concatenate(found, 1)).unbind()


class AuthorsAdamW(torch.optim.AdamW):
    """A parameter at a time, and not if all of its gradient is zero, which the host must know."""

    def step(self, closure=None):
        self.found_inf = None  # only the fused one knows it
        for p in (p for group in self.param_groups for p in group["params"]):
            if p.grad is not None and p.grad.abs().sum().item() == 0:
                p.grad = None
        return super().step(closure)


def trainer(model: unit.UniT, batch: unit.Batch, authors: bool, precision: str = "fp32",
            lr: float = 1e-9):
    """A function that takes one training step, as train.py does. The learning rate is so small that
    all steps see the same weights."""
    run = train.TrainConfig(batch_size=len(batch), precision=precision, lr=lr, lr_backbone=lr)
    step, optimizer, scaler = train.set_up(model, run, None)
    train.set_learning_rate(optimizer, run.warmup, run)
    if authors:
        for group in optimizer.param_groups:
            group.update(fused=False, foreach=False)
        optimizer = AuthorsAdamW(optimizer.param_groups)
    match = authors_match if authors else unit.match

    def take_step():
        with mock.patch.object(unit, "match", match):
            return train.update(step, optimizer, scaler, [batch], run, train.count_boxes([batch]))
    return take_step


def transformers_detr(num_queries: int, num_classes: int):
    """transformers' DETR of our image side's shapes, dilated. Its `dilation` needs timm, which
    would be one more package: its own ResNet-50 gets the last stage's strides changed instead."""
    from transformers import DetrConfig, DetrForObjectDetection, ResNetConfig
    config = DetrConfig(backbone_config=ResNetConfig(out_features=["stage4"]),
                        num_queries=num_queries, num_labels=num_classes)
    model = DetrForObjectDetection(config).eval()
    assert model.config._attn_implementation == "sdpa"
    for block, layer in enumerate(model.model.backbone.model.encoder.stages[-1].layers):
        for conv in (m for m in layer.modules() if isinstance(m, nn.Conv2d)):
            conv.stride = (1, 1)
            if conv.kernel_size == (3, 3) and block > 0:
                conv.dilation = conv.padding = (2, 2)
    return model


# ---- Models and batches of random numbers, at the paper's sizes

def make_model(names=("coco",), device=CPU, **config) -> unit.UniT:
    torch.manual_seed(0)
    return unit.UniT(unit.Config(**config), [TASKS[name] for name in names]).to(device)


def make_batch(task: str, size: int, image=None, tokens=None, padded=False, device=CPU):
    """`size` samples: pictures of `image` (height, width), texts of `tokens` word pieces. `padded`:
    the last picture is a quarter narrower. 7 boxes: those of an average picture of COCO."""
    torch.manual_seed(1)
    batch, row = unit.Batch(task, list(range(size))), TASKS[task]
    if image:
        batch.images = torch.randn(size, 3, *image)
    if padded:
        batch.image_mask = torch.zeros(size, *image, dtype=torch.bool)
        batch.image_mask[-1, :, image[1] * 3 // 4:] = True
    if tokens:
        batch.tokens = torch.randint(1000, 30000, (size, tokens))
        batch.token_types = torch.zeros_like(batch.tokens)
    if row.kind == "detection":
        batch.boxes = [0.2 + 0.4 * torch.rand(7, 4) for _ in range(size)]
        batch.labels = [torch.randint(1, row.num_classes, (7,)) for _ in range(size)]
    else:
        batch.scores = torch.eye(row.num_classes)[torch.randint(row.num_classes, (size,))]
    return batch.to(device)


# ---- The model beside others (that they do the same work: test_bench.py)

@torch.no_grad()
def inference(flags) -> None:
    heading(f"Inference, COCO, one picture of {flags.image}, fp32")
    for device in DEVICES:
        batch = make_batch("coco", 1, flags.image, device=device)
        ours = make_model(device=device).eval()
        theirs, detr = authors_way(ours), transformers_detr(100, 91).to(device)
        compare(f"the authors' way, {device}", lambda: ours(batch), lambda: theirs(batch),
                flags.rounds, 1.6)
        compare(f"transformers' DETR, {device}", lambda: ours(batch), lambda: detr(batch.images),
                flags.rounds, 1.0)


def make_step(batch: dict, authors=False, precision="fp32", device=CPU, **config):
    """`trainer` for make_batch(**batch) and our model, or the authors' way of it."""
    model = make_model([batch["task"]], device, **config).train()
    model = authors_way(model) if authors else model  # of the two only one stays in memory
    return trainer(model, make_batch(**batch, device=device), authors, precision)


def step_cost(batch: dict, authors: bool = False, **config) -> tuple[float, float]:
    """Seconds of the second step, which has the optimiser's state; the process's peak in MiB."""
    step = make_step(batch, authors, dropout=0.0, **config)
    step()
    return timed(step), memory("VmHWM")


def training(flags) -> None:
    heading(f"Training step, COCO, one picture of {flags.image}, fp32")
    batch = dict(task="coco", size=1, image=flags.image)
    for device in DEVICES:
        for dropout, least in ((0.0, 2.0), (0.1, 1.0)):
            ours, theirs = (make_step(batch, authors, device=device, dropout=dropout)
                            for authors in (False, True))
            what = f"the authors' way, dropout {dropout}, {device}"
            compare(what, ours, theirs, flags.rounds, least)
    a, b = (in_child(step_cost, batch, authors)[1] for authors in (False, True))
    row("peak memory, dropout 0.0, cpu", f"{a:.0f} MiB", f"{b:.0f} MiB", f"{b / a:.2f}", ">= 2.0",
        b / a >= 2)


@torch.no_grad()
def text(flags) -> None:
    from transformers import BertConfig, BertModel
    heading("Inference with text, fp32")
    for device in DEVICES:
        ours = make_model(("vqa2", "qnli"), device).eval()
        bert = BertModel(BertConfig(attn_implementation="sdpa"), add_pooling_layer=False)
        bert, detr = bert.eval().to(device), transformers_detr(25, 91).to(device)
        vqa = make_batch("vqa2", 1, (480, 640), 14, device=device)
        compare(f"VQA, 480 x 640, 14 tokens: DETR + BERT, {device}", lambda: ours(vqa),
                lambda: (detr(vqa.images), bert(vqa.tokens)), flags.rounds, 1.0)
        glue = make_batch("qnli", 16, tokens=128, device=device)
        compare(f"GLUE, 16 x 128: BERT, {device}", lambda: ours(glue), lambda: bert(glue.tokens),
                flags.rounds, 1.0)


def matching(flags) -> None:
    heading("Matching, 6 layers x 8 pictures x 100 queries")
    for device in DEVICES:
        batch = make_batch("coco", 8, device=device)
        logits, boxes = torch.randn(6, 8, 100, 92), 0.2 + 0.4 * torch.rand(6, 8, 100, 4)
        arguments = logits.to(device), boxes.to(device), batch.labels, batch.boxes
        compare(f"layer by layer, {device}", lambda: unit.match(*arguments),
                lambda: authors_match(*arguments), 10, None)


# ---- Pictures

def write_pictures(folder: Path, number: int) -> list[Path]:
    """JPEGs of COCO's sizes: blurred noise with a little sharp noise, as large as photographs."""
    rng, paths = np.random.default_rng(0), []
    folder.mkdir(parents=True, exist_ok=True)
    for n in range(number):
        size = [(640, 480), (480, 640), (640, 427), (500, 375)][n % 4]
        small = Image.fromarray(rng.integers(0, 256, (24, 32, 3), np.uint8))
        pixels = np.asarray(small.resize(size, Image.BICUBIC), np.int16)
        pixels = (pixels + rng.normal(0, 8, pixels.shape)).clip(0, 255).astype(np.uint8)
        paths.append(folder / f"{n + 1:012}.jpg")
        Image.fromarray(pixels).save(paths[-1], quality=90)
    return paths


def with_pil(path: Path, rng) -> Tensor:
    """`data.augment` step by step on PIL's pictures, with the same draws."""
    def resize(image, shortest, longest):
        height, width = data.fitted_size(image.height, image.width, int(shortest), longest, False)
        return v1.resize(image, [height, width])

    with Image.open(path) as file:
        image = file.convert("RGB")
    if rng.random() < 0.5:
        image = v1.hflip(image)
    if rng.random() < 0.5:
        image = resize(image, rng.choice(data.CROP_SCALES), 10_000)
        sides = np.array([image.height, image.width])
        low, high = (np.minimum(sides, side) for side in data.CROP_SIDES)
        h, w = rng.integers(low, high, endpoint=True)
        y, x = rng.integers(0, sides - (h, w), endpoint=True)
        image = v1.crop(image, int(y), int(x), int(h), int(w))
    image = resize(image, rng.choice(data.SCALES), data.LONGEST)
    return v1.normalize(v1.to_tensor(image), data.MEAN, data.STD)


def pictures(flags) -> None:
    heading("Training pictures, from JPEG to tensor, one core")
    threads, boxes = torch.get_num_threads(), np.array([[0.1, 0.2, 0.5, 0.6]])
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        paths = write_pictures(Path(folder), 16)

        def ours():
            for seed, path in enumerate(paths):
                rng = np.random.default_rng(seed)
                data.normalise(data.augment(data.read_image(path), boxes, rng)[0])

        def theirs():
            for seed, path in enumerate(paths):
                with_pil(path, np.random.default_rng(seed))
        compare(f"PIL, {len(paths)} pictures", ours, theirs, flags.rounds, 1.5)
    torch.set_num_threads(threads)


# ---- Annotations

def write_coco(folder: Path, num_images: int, num_boxes: int) -> None:
    """A file as large as instances_train2017.json, polygons and all, and its pictures (empty)."""
    rng = np.random.default_rng(0)
    (folder / "coco/train2017").mkdir(parents=True, exist_ok=True)
    (folder / "coco/annotations").mkdir(exist_ok=True)
    images = [{"license": 3, "file_name": f"{n:012}.jpg", "height": 480, "width": 640, "id": n,
               "coco_url": f"http://images.cocodataset.org/train2017/{n:012}.jpg",
               "date_captured": "2013-11-14 16:28:13"} for n in range(1, num_images + 1)]
    for image in images:
        (folder / "coco/train2017" / image["file_name"]).touch()
    polygons = rng.uniform(0, 640, (5000, 1, 46)).round(2).tolist()
    boxes = rng.uniform(0, 300, (num_boxes, 4)).round(2).tolist()
    owners = rng.integers(1, num_images + 1, num_boxes).tolist()
    labels = rng.integers(1, 91, num_boxes).tolist()
    annotations = [{"segmentation": polygons[n % 5000], "area": box[2] * box[3], "iscrowd": 0,
                    "image_id": owners[n], "bbox": box, "category_id": labels[n], "id": n + 1}
                   for n, box in enumerate(boxes)]
    categories = [{"supercategory": "x", "id": n, "name": str(n)} for n in range(1, 91)]
    for split, rows, things in (("train", images, annotations), ("val", images[:1], [])):
        content = {"info": {}, "images": rows, "annotations": things, "categories": categories}
        (folder / f"coco/annotations/instances_{split}2017.json").write_text(json.dumps(content))


def write_vqa(folder: Path, num_images: int, num_questions: int) -> None:
    """Questions and ten answers each, in the sizes of VQAv2's train and val files together."""
    rng, middle = np.random.default_rng(0), num_questions * 2 // 3
    (folder / "vqa2").mkdir(exist_ok=True)
    words = [f"answer {n}" for n in range(num_questions // 4)]
    chosen = (len(words) * rng.random((num_questions, 10)) ** 8).astype(int).tolist()
    for split, part in (("train2014", range(middle)), ("val2014", range(middle, num_questions))):
        questions, annotations = [], []
        for n in part:
            both = {"image_id": n % num_images + 1, "question_id": n}
            text = f"What is the number {n} of the things in this picture?"
            questions.append(both | {"question": text})
            ten = [{"answer": words[w], "answer_confidence": "yes", "answer_id": k}
                   for k, w in enumerate(chosen[n], 1)]
            annotations.append(both | {"question_type": "what is", "answer_type": "other",
                                       "answers": ten, "multiple_choice_answer": ten[0]["answer"]})
        for name, content in ((f"v2_OpenEnded_mscoco_{split}_questions", {"questions": questions}),
                              (f"v2_mscoco_{split}_annotations", {"annotations": annotations})):
            (folder / f"vqa2/{name}.json").write_text(json.dumps(content))


def load(name: str, folder: str):
    return TASKS[name].dataset(TASKS[name], Path(folder), "train")


def read_through(dataset, pipe) -> None:
    """In a forked worker: every sample once, without decoding pictures; sends by how many MiB the
    memory grew that this process has for itself."""
    pixel = torch.zeros(3, 1, 1, dtype=torch.uint8)
    dataset.tokenizer = SimpleNamespace(encode=lambda *texts, max_length: ([0], [0]))
    torch.set_num_threads(1)
    with mock.patch.multiple(data, read_image=lambda path, size=None: pixel,
                             resize=lambda x, *_, **__: x):
        for index in range(200):  # brings in code and buffers
            dataset.sample(index)
        before = memory("Private_Dirty", "smaps_rollup")
        for index in range(len(dataset)):
            dataset.sample(index)
    pipe.send(memory("Private_Dirty", "smaps_rollup") - before)


def loading_cost(name: str, folder: str, rounds: int) -> tuple[float, float, list]:
    """MiB that a process keeps after loading, MiB by which a worker of it grows, and seconds of
    our loading and of json.load, round by round."""
    def parse():
        for file in TASKS[name].dataset.needed(Path(folder), "train"):
            with open(Path(folder) / file) as opened:
                json.load(opened)

    gc.collect()
    before = memory("VmRSS")
    dataset = load(name, folder)
    gc.collect()
    kept = memory("VmRSS") - before
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    worker = context.Process(target=read_through, args=(dataset, theirs))
    worker.start()
    grown = ours.recv()
    worker.join()
    return kept, grown, in_turn(lambda: load(name, folder), parse, rounds)


def annotations(flags) -> None:
    share = 10 if flags.quick else 1
    images, boxes, questions = 118_287 // share, 860_001 // share, 658_111 // share
    heading(f"Annotations, {images:,} images, {boxes:,} boxes, {questions:,} questions")
    with tempfile.TemporaryDirectory() as folder:
        write_coco(Path(folder), images, boxes)
        write_vqa(Path(folder), images, questions)
        for name, limit in (("coco", 300 / share), ("vqa2", 600 / share)):
            kept, grown, times = in_child(loading_cost, name, folder, min(flags.rounds, 3))
            row(f"{name}: kept in memory once loaded", f"{kept:.0f} MiB",
                target=f"< {limit:.0f} MiB", good=kept < limit)
            row(f"{name}: growth of a worker that reads all", f"{grown:.1f} MiB",
                target="< 1 MiB", good=grown < 1)
            a, b = (median(column) for column in zip(*times))
            ratios = [x / y for x, y in times]
            row(f"{name}: loading, json.load of the files", f"{a:.3g} s", f"{b:.3g} s",
                spread(ratios), "<= 1.5", median(ratios) <= 1.5)


# ---- Evaluation

def random_boxes(num_images: int, num_classes: int, each: int):
    """Truth with `each` boxes an image, and {image: 100 predictions (100, 6) as of `eval.to_rows`},
    the first of which lie near the true boxes."""
    rng, truth, annotations, found = np.random.default_rng(0), COCO(), [], {}
    for image in range(1, num_images + 1):
        true = rng.uniform((0, 0, 20, 20), (400, 400, 200, 200), (each, 4))
        boxes = rng.uniform(0, 300, (100, 4))
        boxes[:each] = true + rng.normal(0, 5, (each, 4))
        labels = rng.integers(1, num_classes + 1, 100)
        found[image] = np.column_stack([boxes, rng.random(100), labels])
        for box, label in zip(true.tolist(), labels.tolist()):
            annotations.append(dict(id=len(annotations) + 1, image_id=image, category_id=label,
                                    bbox=box, area=box[2] * box[3], iscrowd=0))
    truth.dataset = {"images": [{"id": n} for n in found], "annotations": annotations,
                     "categories": [{"id": n} for n in range(1, num_classes + 1)]}
    with contextlib.redirect_stdout(None):
        truth.createIndex()
    return truth, found


def metric_cost(*sizes: int) -> tuple[float, float, float]:
    """Seconds of the metric of `random_boxes(*sizes)`, those within pycocotools' own methods, and
    the process's peak in MiB."""
    truth, found = random_boxes(*sizes)
    spent = []

    def clocked(method):
        def call(self):
            start = time.perf_counter()
            method(self)
            spent.append(time.perf_counter() - start)
        return call
    with mock.patch.multiple(COCOeval, evaluate=clocked(COCOeval.evaluate),
                             accumulate=clocked(COCOeval.accumulate)), \
            mock.patch.object(COCO, "createIndex", clocked(COCO.createIndex)):
        seconds = timed(lambda: evaluation.average_precision(truth, found))
    return seconds, sum(spent), memory("VmHWM")


def metric(flags) -> None:
    num_images, num_vg = (500, 200) if flags.quick else (5000, 2000)
    heading(f"The COCO metric, {num_images} pictures x 100 boxes", ("ours", "pycocotools"))
    whole, theirs, _ = in_child(metric_cost, num_images, 80, 7)
    part = (whole - theirs) / theirs
    row("our part beside pycocotools' within it", f"{whole - theirs:.3g} s", f"{theirs:.3g} s",
        f"{part:.1%}", "< 15%", part < 0.15)
    seconds, _, peak = in_child(metric_cost, num_vg, 1600, 20)
    row(f"VG: 1600 classes, {num_vg} pictures", f"{peak:.0f} MiB", f"{seconds:.3g} s",
        target="< 4096 MiB", good=peak < 4096)


# ---- Growth and GPU

def growth(flags) -> None:
    heading("How a training step grows (dropout 0), cpu", ("time", "peak"))
    picture, pair = dict(task="coco", size=1), dict(task="coco", size=2, padded=True)
    sides, small = (32, 160, 320, 800), dict(backbone="small")
    for what, batch, values, config in (
            ("a picture of side", picture, (*sides, 1333), {}),
            ("small backbone, a picture of side", picture, sides, small),
            ("small, two unequal pictures of side", pair, sides, small),
            ("4 texts of tokens", dict(task="qnli", size=4), (16, 128, 512), {})):
        for value in values[:2] if flags.quick else values:
            more = dict(tokens=value) if batch["task"] == "qnli" else dict(image=(value, value))
            seconds, peak = in_child(step_cost, batch | more, **config)
            row(f"{what} {value}", f"{seconds:.3g} s", f"{peak:.0f} MiB")


def gpu(flags) -> None:
    if CUDA is None:
        return print("\nGPU\nno CUDA device: not measured")
    name = torch.cuda.get_device_name()
    peak = flags.peak_tflops or next((v for k, v in PEAK_TFLOPS.items() if k in name), None)
    heading(f"Training on {name}, COCO, 800 x 1333", ("images/s", "peak"))
    theirs, their_peak, _ = gpu_speed("fp32", 1, authors=True)
    row("the authors' way, fp32, micro-batch 1", f"{theirs:.1f}", f"{their_peak:.0f} MiB")
    for precision, least in (("fp32", 2), ("fp16", 4), ("bf16", 4)):
        if precision == "bf16" and not torch.cuda.is_bf16_supported(False):  # not by emulation
            row("bf16", "this GPU has none")
            continue
        for size in (1, 2, 4, 8):
            speed, most, flops = gpu_speed(precision, size)
            # fp32's convolutions may take TensorFloat-32, half as fast as half precision.
            share = f"{speed * flops / (peak * 1e12):.1%} of {peak}" if peak else "peak not known"
            row(f"{precision}, micro-batch {size}", f"{speed:.1f}", f"{most:.0f} MiB",
                share if speed else "no memory")
            if size == 1 and theirs:
                faster, smaller = speed / theirs, most / their_peak
                row("  beside the authors' way", f"{faster:.2f}", f"{smaller:.2f}",
                    target=f">= {least}, <= 0.4", good=faster >= least and smaller <= 0.4)
    count = synchronisations()
    row("synchronisations a step", str(count), target="<= 1", good=count <= 1)
    busy, alone = gpu_busy(flags.workers)
    row(f"GPU busy with {flags.workers} data workers", f"{busy:.1%}", f"{alone:.1f}/s alone",
        target="> 90%", good=busy > 0.9)


def gpu_speed(precision: str, size: int, authors: bool = False) -> tuple[float, float, float]:
    """Images a second, peak MiB, operations an image; zeros where memory does not suffice."""
    from torch.utils.flop_counter import FlopCounterMode
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    try:
        step = make_step(dict(GPU_PICTURE, size=size), authors, precision, CUDA)
        with FlopCounterMode(display=False) as counter:
            step()
        seconds = median(timed(step) for _ in range(5))
    except torch.cuda.OutOfMemoryError:
        return 0.0, torch.cuda.max_memory_allocated() / MIB, 0.0
    most = torch.cuda.max_memory_allocated() / MIB
    return size / seconds, most, counter.get_total_flops() / size


def synchronisations() -> int:
    """How often a step makes the host wait for the GPU."""
    step = make_step(dict(GPU_PICTURE, size=1), device=CUDA)
    step()
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        step()
    torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(w.message) for w in caught)


def gpu_busy(workers: int, number: int = 200) -> tuple[float, float]:
    """Share of the time in which the GPU works when pictures come from data workers (the time
    that the same steps take on pictures already there, over that with workers), and images a
    second without waiting."""
    with tempfile.TemporaryDirectory() as folder:
        write_coco(Path(folder), number, 7 * number)
        write_pictures(Path(folder) / "coco/train2017", number)
        sets = {"coco": load("coco", folder)}
        schedule = data.Schedule({"coco": number}, {"coco": 1.0}, 1, number, 0)
        run = train.TrainConfig(batch_size=1)
        step, optimizer, scaler = train.set_up(make_model(device=CUDA).train(), run, None)

        def loaded():
            return data.train_loader(sets, schedule, num_workers=workers)

        def take_steps(stream):
            for batches, _ in stream:
                train.update(step, optimizer, scaler, batches, run, train.count_boxes(batches))
        ready = [([batch.to(CUDA)], reasons) for (batch,), reasons in loaded()]
        take_steps(ready)  # every size of picture once
        alone = timed(lambda: take_steps(ready))
        fed = timed(lambda: take_steps(loaded()))
    return alone / fed, number / alone


# ---- What a run costs, calculated

# Mean sizes of official rows after data.py's transforms: pictures (height, width), of 100 rows of
# COCO (VQAv2's pictures too) and VG, 15 of Flickr30k; word pieces, of 160 to 1,000 rows of each.
OFFICIAL = {"coco": dict(image=(722, 772)), "vg": dict(image=(669, 789)),
            "vqa2": dict(image=(906, 1020), tokens=10),
            "snli_ve": dict(image=(844, 1099), tokens=11), "qnli": dict(tokens=82),
            "mnli": dict(tokens=70), "qqp": dict(tokens=51), "sst2": dict(tokens=29)}
# GPUs, their peak (10^12 operations a second each, dense, of NVIDIA's data sheets), and the share
# of it that a training reaches: in fp32 as DETR's (an epoch of COCO in 28 minutes on 8 V100, its
# README says); in half precision as NVIDIA's ResNet-50 on 8 V100, assumed for the newer ones, too.
MACHINES = {"8 V100 fp32": (8, 15.7, 0.16), "8 V100 fp16": (8, 125, 0.06),
            "8 A100 bf16": (8, 312, 0.06), "8 H100 bf16": (8, 989, 0.06),
            "1 4090 bf16": (1, 165, 0.06)}
GB = 10 ** 9


def first_query(logits, boxes, labels, targets):
    """In place of `unit.match`, which needs numbers: as many pairs."""
    return torch.zeros(4, len(logits) * sum(map(len, labels)), dtype=torch.int64)


def gpu_attention(query, key, value, bias=None, dropout=0.0):
    """By the memory-efficient kernel, whose backward pass computes the scores again."""
    kernel = torch.ops.aten._scaled_dot_product_efficient_attention
    return kernel(query, key, value, bias, True, dropout)[0]


def gpu_dropout(x, p=0.5, training=True, inplace=False):
    return torch.native_dropout(x, p, True)[0] if training and p else x


def kept_by_autograd(model: unit.UniT, forward) -> tuple[Tensor, int]:
    """forward(), and the bytes that autograd keeps for the backward pass: each storage once, those
    of parameters and buffers not."""
    kept, own = {}, {x.untyped_storage()._cdata for x in model.state_dict().values()}

    def pack(x):
        storage = x.untyped_storage()
        kept[storage._cdata] = storage
        return x
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        value = forward()
    return value, sum(storage.nbytes() for key, storage in kept.items() if key not in own)


def on_meta(config: unit.Config, tasks, frozen=()) -> unit.UniT:
    with torch.device("meta"):
        model = unit.UniT(config, [TASKS[task] for task in tasks]).train()
    for name, p in model.named_parameters():
        p.requires_grad_(p.requires_grad and train.part_of(name) not in frozen)
    return model


def sizes(model: unit.UniT) -> tuple[int, int]:
    """How many numbers of the model are trained, and how many a checkpoint has."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return sum(map(torch.numel, trained)), sum(map(torch.numel, model.state_dict().values()))


@functools.cache
def count(config: unit.Config, task: str, frozen: tuple = (), size: int = 1):
    """Operations a sample, forward and in all, and bytes kept by autograd for `size` samples, on a
    GPU; operations are those of products, convolutions and attention (2 a multiplication)."""
    from torch.utils.flop_counter import FlopCounterMode
    model, batch = on_meta(config, [task], frozen), make_batch(task, size, **OFFICIAL[task])
    if TASKS[task].num_attributes:
        batch.attributes = [torch.zeros(len(x), 16, dtype=torch.int64) for x in batch.labels]
    batch = batch.to("meta")
    with mock.patch.multiple(nn.functional, dropout=gpu_dropout,
                             scaled_dot_product_attention=gpu_attention), \
            mock.patch.object(unit, "match", first_query), \
            mock.patch.object(torch, "autocast", lambda *_, **__: contextlib.nullcontext()), \
            FlopCounterMode(display=False) as counter:
        loss, kept = kept_by_autograd(
            model, lambda: sum(model.losses(model(batch), batch).values()))
        forward = counter.get_total_flops()
        loss.backward()
    return forward / size, counter.get_total_flops() / size, kept


def experiment_cost(name: str) -> dict:
    """Of one of train.EXPERIMENTS: operations of an iteration and in all, days by machine, and GB
    of parameters, of gradients that a GPU of 8 sends, of a checkpoint."""
    config, run = train.configs(train.EXPERIMENTS[name])
    trained, stored = sizes(on_meta(config, run.tasks, run.freeze))
    alike = replace(config, shared_decoder=True)  # a sample passes one decoder in any case
    chances = train.table_a2(run.tasks)
    mean = sum(p * count(alike, task, run.freeze)[1] for task, p in zip(run.tasks, chances))
    iteration = mean / sum(chances) * run.batch_size
    total = iteration * run.iterations
    days = {machine: total / (gpus * peak * 1e12 * share) / 86400
            for machine, (gpus, peak, share) in MACHINES.items()}
    return dict(iteration=iteration, total=total, days=days, parameters=4 * stored / GB,
                traffic=2 * 7 / 8 * 4 * trained / GB, checkpoint=4 * (stored + 2 * trained) / GB)


def cost(flags) -> None:
    print("\nCost, calculated: TFLOP an iteration, EFLOP a run, days on each machine, GB of "
          "gradients that\na GPU of 8 sends in an iteration, GB of a checkpoint")
    print(f"{'':<13}{'T/it':>7}{'EFLOP':>7}", *(f"{name:>12}" for name in MACHINES),
          f"{'sent':>6}{'file':>6}")
    for name in ("T1.1-coco", "T3.3", "T4.1") if flags.quick else train.EXPERIMENTS:
        c = experiment_cost(name)
        print(f"{name:<13}{c['iteration'] / 1e12:>7.1f}{c['total'] / 1e18:>7.1f}",
              *(f"{days:>12.1f}" for days in c["days"].values()),
              f"{c['traffic']:>6.2f}{c['checkpoint']:>6.2f}", flush=True)
    trained, stored = sizes(on_meta(unit.Config(), TASKS))
    print(f"\nA sample in fp32: TFLOP, GB beside the {4 * (stored + 3 * trained) / GB:.1f} of "
          "parameters, gradients and AdamW")
    for task, size in OFFICIAL.items():
        one, two = (count(unit.Config(), task, (), n) for n in (1, 2))
        print(f"{task:<10}{str(size)[1:-1]:<32}{one[1] / 1e12:>7.3f}"
              f"{(two[2] - one[2]) / GB:>8.3f}", flush=True)


PARTS = {"inference": inference, "training": training, "text": text, "matching": matching,
         "data": pictures, "annotations": annotations, "evaluation": metric, "growth": growth,
         "cost": cost, "gpu": gpu}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="smaller pictures, fewer rounds")
    parser.add_argument("--only", default=",".join(PARTS), metavar="PART,PART")
    parser.add_argument("--rounds", type=int, help="turns of each side, 5 (2 with --quick)")
    parser.add_argument("--peak_tflops", type=float, help="the GPU's peak, if it is not known here")
    parser.add_argument("--workers", type=int, default=8, help="data workers (gpu) [8]")
    flags = parser.parse_args()
    if unknown := set(flags.only.split(",")) - set(PARTS):
        parser.error(f"no part {min(unknown)!r}; there are {', '.join(PARTS)}")
    flags.image = (480, 640) if flags.quick else (800, 1066)
    flags.rounds = flags.rounds or (2 if flags.quick else 5)
    start, load = time.time(), os.getloadavg()[0]
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, load {load:.1f}")
    for name, part in PARTS.items():
        if name in flags.only.split(","):
            begun = time.time()
            part(flags)
            print(f"({name}: {time.time() - begun:.0f} s)")
            gc.collect()
    print(f"\n{time.time() - start:.0f} s, load {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
