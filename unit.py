"""UniT (Hu & Singh, 2021), Section 3: the model, its losses, and the loading of pretrained weights.

| paper             | symbol                              | here                                   |
|-------------------|-------------------------------------|----------------------------------------|
| Section 3.1 Eq. 1 | x^v = B(I)                          | `Backbone`                             |
| Section 3.1 Eq. 2 | h^v = E_v(P_{b->e}(x^v), w_v^task)  | `ImageEncoder`                         |
| Section 3.2 Eq. 3 | h^t = BERT({w_1..w_S}, w_t^task)    | `TextEncoder`                          |
| Section 3.3 Eq. 4 | {h^{dec,l}} = D(h^enc, q^task)      | `Decoder`, `UniT.forward`              |
| Section 3.4 Eq. 5 | c^l = class_head(h^{dec,l})         | `DetectionHead.class_head`             |
| Section 3.4 Eq. 6 | b^l = box_head(h^{dec,l})           | `DetectionHead.box_head`               |
| Section 3.4 Eq. 7 | a^l = attr_head(h^{dec,l}, c^l)     | `AttributeHead`                        |
| Section 3.4 Eq. 8 | p = W_1 GeLU(W_2 h_1 + b_2) + b_1   | `Classifier`                           |
| Section 3.4 Eq. 9 | loss = CrossEntropyLoss(p, t)       | `classification_loss`                  |
| Section 3.4       | DETR's and BUTD's losses            | `match`, `detection_losses`            |

Where this differs from the paper's text:
* Section 3.1: positions are added to the queries and keys of every layer (DETR, released), not to
  the map. `positions_in_map` adds them there, too, so that values have them as well.
* Eq. 2: the encoder's input is added to its output. The paper does not say so, but the released
  weights need it.
* Eq. 7: in training the attribute head sees the class of the matched target (as in BUTD, which the
  paper cites), at test time the highest-scoring class of c^l.
* Section 3.5: only half of the pictures are cropped, before the last resize (`data.augment`).
* Table A.1 names one learning rate; the backbone has its own, DETR's (see train.py).

Where the paper is silent, the authors' released system decides: how d_v^e and d_t^e become d_t^d (a
linear map of the states, and one of their positions), task vectors without position or LayerNorm,
initialisation, loss weights, normalisers. In three other places the system contradicts the paper,
and the paper is the default: VQAv2's loss (Eq. 9), VQAv2's text states (Section 3.2), and the
classifier's LayerNorm and dropout (Eq. 8). `AS_RELEASED` holds the system's values.

Shapes: B batch, H x W image, L = H_v W_v image positions, S text tokens, M memory positions (of an
image L, of a text 1, or S if all are seen, of both the sum), n positions of any sequence, q
queries, d width, C classes (the paper's c_t), A attributes, N_d decoder layers, T true boxes of a
batch, K matched pairs. Batch first; masks are True at padding; "no-object": the paper's background.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import re
import socket
import tarfile
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import get_args, get_origin, get_type_hints

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn


class InputError(Exception):
    """Invalid user input: a file, a record or a flag. The message says what is wrong and how to fix
    it; the programs print it in one line and exit with status 2. Any other exception is a bug."""


@dataclass(frozen=True)
class Task:
    """One data set. The paper's seven tasks t are eight here: COCO and VG are both detection, but
    each has its own w^task and q^task (as released) and its own head (Section 3.4). `PAPER_TASKS`
    are the eight, `data.TASKS` add readers."""

    name: str
    kind: str                    # "detection" or "classification"
    image: bool                  # has an image: Section 3.1 applies
    text: bool                   # has a text: Section 3.2 applies
    num_classes: int             # C; detection: the largest category id + 1 (no-object on top)
    num_queries: int = 0         # q, the length of q^task; 0: from `Config`
    num_attributes: int = 0      # A, the largest attribute id + 1 (VG); 0: no attributes
    max_tokens: int = 128        # S at most, longer texts are truncated (released config)
    soft_scores: bool = False    # targets are scores in [0, 1] for several answers (VQAv2)
    dataset: type | None = None  # the class in data.py that reads its files; unused here


BOXES = dict(kind="detection", image=True, text=False)
BOTH = dict(kind="classification", image=True, text=True, max_tokens=25)
TEXT = dict(kind="classification", image=False, text=True)
PAPER_TASKS = [  # in the sizes of the official data sets (released config)
    Task("coco", **BOXES, num_classes=91),
    Task("vg", **BOXES, num_classes=1601, num_attributes=401),
    Task("vqa2", **BOTH, num_classes=3129, soft_scores=True),
    Task("snli_ve", **BOTH, num_classes=3),
    Task("qnli", **TEXT, num_classes=2),
    Task("mnli", **TEXT, num_classes=3),
    Task("qqp", **TEXT, num_classes=2),
    Task("sst2", **TEXT, num_classes=2)]


@dataclass
class Batch:
    """B samples of one task. Masks are True at padding; None: nothing is padded."""

    task: str                               # Task.name
    ids: list                               # B ids of images, questions or rows
    images: Tensor | None = None            # (B, 3, H, W) normalised, zeros at padding
    image_mask: Tensor | None = None        # (B, H, W) bool
    tokens: Tensor | None = None            # (B, S) int64
    token_types: Tensor | None = None       # (B, S) int64, 0 first sentence, 1 second
    text_mask: Tensor | None = None         # (B, S) bool
    sizes: Tensor | None = None             # (B, 2) int64, height and width of the original images
    boxes: list[Tensor] | None = None       # B times (n, 4) cx, cy, w, h in [0, 1]
    labels: list[Tensor] | None = None      # B times (n,) int64 category ids
    attributes: list[Tensor] | None = None  # B times (n, 16) int64 attribute ids, -1 pads
    scores: Tensor | None = None            # (B, C) target of each class; None on test splits

    def __len__(self) -> int:
        return len(self.ids)

    def to(self, device, dtype: torch.dtype | None = None) -> Batch:
        """A copy with every tensor on `device` (floating point ones as `dtype`, if given)."""
        def move(x):
            if isinstance(x, list):
                return [move(y) for y in x]
            if isinstance(x, Tensor):
                x = x.to(device, dtype if x.is_floating_point() else None, non_blocking=True)
            return x
        return Batch(**{name: move(x) for name, x in vars(self).items()})


def option(default, help: str, least: float | None = None, most: float = math.inf, choices=()):
    """A dataclass field that is also a flag; `help` names its source in the paper. A number lies
    between `least` and `most`; an integer is at least 1 unless said otherwise, or 0 where 0 is its
    default. A word is one of `choices`, if there are any."""
    if least is None:
        least = 1 if type(default) is int and default else 0
    return field(default=default, metadata=dict(help=help, least=least, most=most, choices=choices))


@dataclass(frozen=True)
class Config:
    """Every setting of the model. Defaults: the paper's, then the released configuration's."""

    encoder_width: int = option(256, "image encoder hidden size d_v^e (Table A.1)")
    encoder_heads: int = option(8, "image encoder heads (Table A.1)")
    encoder_ff: int = option(2048, "image encoder intermediate size (Table A.1)")
    encoder_layers: int = option(6, "image encoder layers N_v (Table A.1)", least=0)
    bert_width: int = option(768, "text encoder hidden size d_t^e (Section 3.2)")
    bert_heads: int = option(12, "text encoder heads (BERT-base)")
    bert_ff: int = option(3072, "text encoder intermediate size (BERT-base)")
    bert_layers: int = option(12, "text encoder layers N_t (Section 3.2)")
    vocab_size: int = option(30522, "word pieces (BERT-base uncased)")
    max_positions: int = option(512, "text positions (BERT-base)")
    decoder_width: int = option(768, "decoder hidden size d_t^d (Table A.1; 256 in Table 4 line 4)")
    decoder_heads: int = option(8, "decoder heads (Table A.1)")
    decoder_ff: int = option(2048, "decoder intermediate size (Table A.1)")
    decoder_layers: int = option(6, "decoder layers N_d (Table A.1; 8, 12 in Table 4 lines 2, 3)")
    dropout: float = option(0.1, "every dropout (0.1 in Table A.1, and in BERT)", most=1)
    detection_queries: int = option(100, "queries of a detection task (Appendix C)")
    num_queries: int = option(25, "queries of any other task (Table C.1 lines 4, 5)")
    image_size: int = option(800, "shorter side of a picture in evaluation (Section 3.5); its "
                                  "longest side and training's sizes keep their ratio to it")
    backbone: str = option("resnet50", "resnet50 (Section 3.1), or small for small pictures (ours)",
                           choices=("resnet50", "small"))
    shared_decoder: bool = option(True, "one decoder for all tasks, or one for each (Section 3.3)")
    task_embedding: bool = option(True, "task vectors in both encoders (Table 4 line 7)")
    all_text_states: tuple[str, ...] = option((), "tasks that see all text states (Table 4 line 5)")
    positions_in_map: bool = option(False, "add positions to the feature map, too (Section 3.1's "
                                           "words), not to queries and keys alone (DETR; released)")
    queries_as_input: bool = option(False, "q^task is also what the decoder begins with (ours; see "
                                           "Decoder.forward), not zeros (DETR; released)")
    attention_gain: float = option(1.0, "initial matrices of queries and keys in the image encoder "
                                   "and the decoder, times this (ours)")
    loss_on_all_layers: bool = option(False, "classify on every decoder layer (Table 4 line 6)")
    binary_vqa_loss: bool = option(False, "VQAv2's binary loss, as released; else as in Eq. 9")
    classifier_norm: bool = option(False, "LayerNorm, early dropout, as released; else as in Eq. 8")

    def __post_init__(self):
        for part in ("encoder", "bert", "decoder"):
            width, heads = getattr(self, f"{part}_width"), getattr(self, f"{part}_heads")
            if width % heads:
                raise InputError(f"--{part}_width {width} cannot be split among {heads} heads; "
                                 f"choose a width that --{part}_heads divides")
        if self.encoder_width % 4:
            raise InputError("--encoder_width must be a multiple of 4 (sines of rows and columns)")


# The three switches that make the model the released one where that differs from the paper.
AS_RELEASED = {"binary_vqa_loss": True, "classifier_norm": True, "all_text_states": ("vqa2",)}

ATTRIBUTE_EMBEDDING, ATTRIBUTE_HIDDEN = 256, 512  # released config; BUTD's attribute head
NO_OBJECT_WEIGHT = 0.1                            # DETR; released config
# Weights of a detection loss's terms, and of the matching cost's three (DETR; released config).
LOSS_WEIGHTS = {"class": 1.0, "l1": 5.0, "giou": 2.0, "attribute": 1.0}


# ---- Attention, and the one encoder layer of both encoders ---------------------------------------
def attention_bias(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Padding mask (B, S), True = padding -> (B, 1, 1, S), which attention adds to its scores.

    Trap: `scaled_dot_product_attention` reads a boolean mask the other way round (True = attend),
    and expands it to (B, heads, S, S). A float bias that broadcasts is used as it is."""
    if mask is None:
        return None
    bias = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
    return bias.masked_fill_(mask, -math.inf)[:, None, None]


class Attention(nn.Module):
    """Multi-head attention. PyTorch's kernels never materialise the L x L matrix (except on a CPU
    with dropout)."""

    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.q_proj, self.k_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.v_proj, self.out_proj = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None):
        """query (B, n, d), key and value (B, M, d), bias (B, 1, 1, M) -> (B, n, d)"""
        heads = (self.heads, -1)
        q = self.q_proj(query).unflatten(-1, heads).transpose(1, 2)   # (B, heads, n, d / heads)
        k = self.k_proj(key).unflatten(-1, heads).transpose(1, 2)     # (B, heads, M, d / heads)
        v = self.v_proj(value).unflatten(-1, heads).transpose(1, 2)   # (B, heads, M, d / heads)
        if bias is not None:
            bias = bias.to(q.dtype)  # under autocast q has the lower precision
        dropout = self.dropout if self.training else 0.0
        out = F.scaled_dot_product_attention(q, k, v, bias, dropout)  # (B, heads, n, d / heads)
        return self.out_proj(out.transpose(1, 2).flatten(2))


class EncoderLayer(nn.Module):
    """Post-norm transformer layer. DETR's has ReLU, epsilon 1e-5, dropout inside the feed-forward,
    and positions added to queries and keys. BERT's has GELU and epsilon 1e-12, not the last two."""

    def __init__(self, width: int, heads: int, ff: int, dropout: float, bert: bool):
        super().__init__()
        self.attention = Attention(width, heads, dropout)
        self.linear1, self.linear2 = nn.Linear(width, ff), nn.Linear(ff, width)
        eps = 1e-12 if bert else 1e-5
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=eps), nn.LayerNorm(width, eps=eps)
        self.dropout = nn.Dropout(dropout)
        self.inner_dropout = nn.Dropout(0.0 if bert else dropout)
        self.activation = F.gelu if bert else F.relu

    def forward(self, x: Tensor, positions: Tensor | None = None, bias: Tensor | None = None):
        """x, positions (B, n, d), bias (B, 1, 1, n) -> (B, n, d)"""
        placed = x if positions is None else x + positions  # queries and keys, not values (DETR)
        x = self.norm1(x + self.dropout(self.attention(placed, placed, x, bias)))
        hidden = self.inner_dropout(self.activation(self.linear1(x)))
        return self.norm2(x + self.dropout(self.linear2(hidden)))


class Encoder(nn.Module):
    """Both encoders: layers, task vectors, and linear maps of states and positions to d_t^d.

    w^task is a learned (1, d) vector for each task, drawn from N(0, 1), and a parameter of its own:
    as rows of one table, unused vectors would get gradients of zero and drift in the optimiser."""

    def add_layers(self, config: Config, tasks: list[Task], depth: int, width: int, heads: int,
                   ff: int, bert: bool):
        """Call last in `__init__`: initial weights depend on the order of the modules."""
        self.layers = nn.ModuleList(
            EncoderLayer(width, heads, ff, config.dropout, bert) for _ in range(depth))
        self.projection = nn.Linear(width, config.decoder_width)
        self.position_projection = nn.Linear(width, config.decoder_width)
        with_vector = tasks if config.task_embedding else []
        self.w_task = nn.ParameterDict({t.name: torch.randn(1, width) for t in with_vector})

    def transform(self, x: Tensor, positions: Tensor | None, mask: Tensor | None, task: str):
        """x, positions (B, n, d), mask (B, n) -> (B, n, d). The task vector goes in front, without
        position, LayerNorm or mask, and is taken off again."""
        if task in self.w_task:
            x = torch.cat([self.w_task[task].expand(len(x), 1, -1), x], dim=1)
            mask = None if mask is None else F.pad(mask, (1, 0), value=False)
            positions = None if positions is None else F.pad(positions, (0, 0, 1, 0))
        bias = attention_bias(mask, x.dtype)
        for layer in self.layers:                                     # E_v of Eq. 2, BERT of Eq. 3
            x = layer(x, positions, bias)
        return x[:, 1:] if task in self.w_task else x


# ---- Section 3.1. Image encoder (ResNet is imported under "torchvision", below) ------------------
def folded(conv: nn.Conv2d, norm: FrozenBatchNorm2d, x: Tensor) -> Tensor:
    """norm(conv(x)) as one convolution: a frozen batch norm only scales and shifts, and scaling the
    weights is cheaper than scaling the feature map."""
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    return F.conv2d(x, conv.weight * scale[:, None, None, None],
                    norm.bias - norm.running_mean * scale, conv.stride, conv.padding, conv.dilation)


class Backbone(nn.Module):
    """B of Eq. 1: torchvision's ResNet-50, with dilation in place of the last stride. conv1 and
    layer1 are never trained; neither are batch norms (released config)."""

    def __init__(self):
        super().__init__()
        self.body = ResNet(Bottleneck, [3, 4, 6, 3], norm_layer=FrozenBatchNorm2d,
                           replace_stride_with_dilation=[False, False, True])
        self.channels = self.body.inplanes  # d_v^b = 2048
        del self.body.fc                    # ImageNet's classifier
        for module in (self.body.conv1, self.body.layer1):
            module.requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, d_v^b, H / 16, W / 16)"""
        body = self.body
        # On CPUs channels-last speeds up the forward pass but slows down the backward pass.
        if images.device.type == "cpu" and not torch.is_grad_enabled():
            images = images.contiguous(memory_format=torch.channels_last)
        x = body.maxpool(F.relu_(folded(body.conv1, body.bn1, images)))
        for block in [*body.layer1, *body.layer2, *body.layer3, *body.layer4]:
            out = F.relu_(folded(block.conv1, block.bn1, x))
            out = F.relu_(folded(block.conv2, block.bn2, out))
            out = folded(block.conv3, block.bn3, out)                 # (B, 4 x planes, H', W')
            x = F.relu_(out.add_(x if block.downsample is None else folded(*block.downsample, x)))
        return x


class SmallBackbone(nn.Module):
    """B for small pictures (ours): three convolutions of stride 2, then two residual ones. Group
    norm, since statistics over a batch would make the update depend on how the batch is split.

    Each picture is standardised first, and no ReLU comes last: otherwise features common to all
    pictures drown the differences between them, most of all in pale or dark ones."""

    channels = 64

    def __init__(self):
        super().__init__()
        self.down = nn.ModuleList([nn.Conv2d(3, 32, 3, stride=2, padding=1),
                                   nn.Conv2d(32, 64, 3, stride=2, padding=1),
                                   nn.Conv2d(64, 64, 3, stride=2, padding=1)])
        self.residual = nn.ModuleList(nn.Conv2d(64, 64, 3, padding=1) for _ in range(2))
        self.norms = nn.ModuleList(nn.GroupNorm(8, n) for n in (32, 64, 64, 64, 64, 64))

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, 64, H / 8, W / 8)"""
        x = F.group_norm(images, 1)  # one group: all pixels of a picture, padding included
        for conv, norm in zip(self.down, self.norms[:3]):
            x = F.relu(norm(conv(x)))
        for conv, norm in zip(self.residual, self.norms[3:5]):
            x = x + F.relu(norm(conv(x)))
        return self.norms[5](x)


def sine_positions(valid: Tensor, width: int) -> Tensor:
    """2-D sine positions of DETR: (B, H_v, W_v) bool, True where there is image -> (B, L, width).

    The first half of the features encodes y, the second x. Counts run over unpadded positions and
    are scaled so that the last one is 2 pi: positions are relative to the image, not the batch."""
    half = width // 2
    index = torch.arange(half, device=valid.device) // 2 * 2
    wavelength = 10000.0 ** (index / half)                            # (half,)
    encoded = []
    for dim in (1, 2):
        count = valid.cumsum(dim, dtype=wavelength.dtype)             # (B, H_v, W_v)
        last = count.narrow(dim, -1, 1)
        angle = (count / (last + 1e-6) * 2 * math.pi)[..., None] / wavelength  # (B, H_v, W_v, half)
        sines, cosines = angle[..., 0::2].sin(), angle[..., 1::2].cos()
        encoded.append(torch.stack([sines, cosines], dim=-1).flatten(-2))
    return torch.cat(encoded, dim=-1).flatten(1, 2)


class ImageEncoder(Encoder):
    """Section 3.1: backbone B, projection P_{b->e}, transformer E_v. w_v^task is (1, d_v^e)."""

    def __init__(self, config: Config, tasks: list[Task]):
        super().__init__()
        width = config.encoder_width
        self.backbone = SmallBackbone() if config.backbone == "small" else Backbone()
        self.input_proj = nn.Conv2d(self.backbone.channels, width, 1)  # P_{b->e}
        self.positions_in_map = config.positions_in_map
        self.add_layers(config, [t for t in tasks if t.image], config.encoder_layers, width,
                        config.encoder_heads, config.encoder_ff, bert=False)

    def forward(self, images: Tensor, image_mask: Tensor | None, task: str):
        """images (B, 3, H, W), image_mask (B, H, W) -> h^v, projected to the decoder's width d
        (B, L, d), its positions (B, L, d) and its padding mask (B, L) or None."""
        x = self.backbone(images)                                     # Eq. 1, (B, d_v^b, H_v, W_v)
        x = self.input_proj(x)                                 # P_{b->e}(x^v), (B, d_v^e, H_v, W_v)
        padding, valid = None, torch.ones_like(x[:, 0], dtype=torch.bool)  # (B, L), (B, H_v, W_v)
        if image_mask is not None:  # nearest-neighbour resize to the feature map
            valid = F.interpolate((~image_mask)[:, None].float(), size=x.shape[-2:])[:, 0] > 0.5
            padding = ~valid.flatten(1)
        positions = sine_positions(valid, x.shape[1]).to(x.dtype)     # (B, L, d_v^e)
        x = x.flatten(2).transpose(1, 2)                              # (B, L, d_v^e)
        if self.positions_in_map:                                     # Section 3.1's words
            x = x + positions                                         # (B, L, d_v^e)
        h = self.transform(x, positions, padding, task) + x           # Eq. 2 is silent on the sum
        return self.projection(h), self.position_projection(positions), padding


# ---- Section 3.2. Text encoder -------------------------------------------------------------------
class TextEncoder(Encoder):
    """Section 3.2: BERT without its pooler. w_t^task is (1, d_t^e)."""

    def __init__(self, config: Config, tasks: list[Task]):
        super().__init__()
        width = config.bert_width
        self.word_embeddings = nn.Embedding(config.vocab_size, width)
        self.position_embeddings = nn.Embedding(config.max_positions, width)
        self.token_type_embeddings = nn.Embedding(2, width)
        self.norm = nn.LayerNorm(width, eps=1e-12)  # BERT's epsilon
        self.dropout = nn.Dropout(config.dropout)
        self.add_layers(config, [t for t in tasks if t.text], config.bert_layers, width,
                        config.bert_heads, config.bert_ff, bert=True)
        self.all_states = config.all_text_states

    def forward(self, tokens: Tensor, types: Tensor, mask: Tensor | None, task: str):
        """tokens, types, mask (B, S) -> h^t, projected to the decoder's width d (B, S or 1, d), its
        positions of that shape and its padding mask (B, S) or None. One state: [CLS] alone."""
        states = self.bert(tokens, types, mask, task)                 # h^t, (B, S, d_t^e)
        if task not in self.all_states:                               # Section 3.2: [CLS] alone
            states, mask = states[:, :1], None                        # (B, 1, d_t^e)
        # The decoder's text positions are BERT's own position embeddings 0..S-1, projected.
        positions = self.position_projection(self.position_embeddings.weight[:states.shape[1]])
        return self.projection(states), positions.expand(len(states), -1, -1), mask

    def bert(self, tokens: Tensor, types: Tensor, mask: Tensor | None, task: str) -> Tensor:
        """(B, S) -> h^t (B, S, d_t^e). The task vector is prepended after position embeddings are
        added: token positions start at 0 as usual."""
        length, positions = tokens.shape[1], self.position_embeddings.weight
        if length > len(positions):
            raise InputError(f"{task}: a text of {length} tokens; this model has {len(positions)} "
                             "positions (--max_positions)")
        embedded = self.word_embeddings(tokens) + self.token_type_embeddings(types)
        x = self.dropout(self.norm(embedded + positions[:length]))    # (B, S, d_t^e)
        return self.transform(x, None, mask, task)                    # Eq. 3


# ---- Section 3.3. Domain-agnostic decoder --------------------------------------------------------
class DecoderLayer(nn.Module):
    """DETR's: self-attention among the queries, cross-attention to the memory, feed-forward."""

    def __init__(self, config: Config):
        super().__init__()
        width, ff = config.decoder_width, config.decoder_ff
        self.self_attention = Attention(width, config.decoder_heads, config.dropout)
        self.cross_attention = Attention(width, config.decoder_heads, config.dropout)
        self.linear1, self.linear2 = nn.Linear(width, ff), nn.Linear(ff, width)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, q_task: Tensor, memory: Tensor, keys: Tensor, bias: Tensor | None):
        """content x and q_task (B, q, d), memory and keys (memory plus its positions) (B, M, d),
        bias (B, 1, 1, M) -> (B, q, d)"""
        placed = x + q_task
        x = self.norm1(x + self.dropout(self.self_attention(placed, placed, x)))
        x = self.norm2(x + self.dropout(self.cross_attention(x + q_task, keys, memory, bias)))
        hidden = self.dropout(F.relu(self.linear1(x)))
        return self.norm3(x + self.dropout(self.linear2(hidden)))


class Decoder(nn.Module):
    """D of Section 3.3."""

    def __init__(self, config: Config):
        super().__init__()
        self.queries_as_input = config.queries_as_input
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.decoder_layers))
        self.norm = nn.LayerNorm(config.decoder_width)  # one, applied to every layer's output

    def forward(self, memory: Tensor, positions: Tensor, mask: Tensor | None, q_task: Tensor):
        """memory h^enc and its positions (B, M, d), mask (B, M), q_task (q, d)
        -> h^{dec,l} (N_d, B, q, d)

        Content starts at zero; in every layer q^task is added as the queries' positions (DETR). So
        every value of the first self-attention is its bias: the value matrix gets no gradient, nor
        do, without dropout, the query and key matrices. For a long time small models then predict
        the same boxes for every picture; `queries_as_input` starts from q^task, as Eq. 4 allows."""
        q_task = q_task.expand(len(memory), -1, -1)                   # (B, q, d)
        keys, bias = memory + positions, attention_bias(mask, memory.dtype)
        x, states = q_task if self.queries_as_input else torch.zeros_like(q_task), []
        for layer in self.layers:
            x = layer(x, q_task, memory, keys, bias)
            states.append(self.norm(x))
        return torch.stack(states)                                    # Eq. 4


# ---- Section 3.4. Task-specific output heads -----------------------------------------------------
class AttributeHead(nn.Module):
    """BUTD's: a^l from state and class. As released: a ReLU after the last layer, none between."""

    def __init__(self, width: int, task: Task):
        super().__init__()
        self.class_embedding = nn.Embedding(task.num_classes + 1, ATTRIBUTE_EMBEDDING)
        self.linear1 = nn.Linear(width + ATTRIBUTE_EMBEDDING, ATTRIBUTE_HIDDEN)
        self.linear2 = nn.Linear(ATTRIBUTE_HIDDEN, task.num_attributes)

    def forward(self, hidden: Tensor, classes: Tensor) -> Tensor:
        """hidden (..., d), classes (...) int64 -> (..., A) scores"""
        x = torch.cat([hidden, self.class_embedding(classes)], dim=-1)
        return F.relu(self.linear2(self.linear1(x)))                  # Eq. 7


class DetectionHead(nn.Module):
    """Class, box and attribute head. COCO's 80 classes take 92 outputs: category ids are used as
    they are and the largest is 90, so 0..90 need 91 places (eleven idle); the last is no-object."""

    def __init__(self, width: int, task: Task):
        super().__init__()
        self.class_head = nn.Linear(width, task.num_classes + 1)
        self.box_head = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width),
                                      nn.ReLU(), nn.Linear(width, 4))
        self.attribute_head = AttributeHead(width, task) if task.num_attributes else None

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """h^{dec,l} (N_d, B, q, d) -> c^l (N_d, B, q, C + 1), b^l (N_d, B, q, 4)"""
        # Boxes stay in full precision: the step of bfloat16 near 0.5 is five pixels at 1333.
        with torch.autocast(hidden.device.type, enabled=False):
            hidden = hidden.to(self.class_head.weight.dtype)
            logits = self.class_head(hidden)                          # Eq. 5
            boxes = self.box_head(hidden).sigmoid()                   # Eq. 6
        return logits, boxes


class Classifier(nn.Module):
    """Two layers on the first query's state. As in Eq. 8, linear2 (W_2, b_2) comes first."""

    def __init__(self, width: int, num_classes: int, dropout: float, as_released: bool):
        super().__init__()
        self.linear2, self.linear1 = nn.Linear(width, width), nn.Linear(width, num_classes)
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(width, eps=1e-12) if as_released else None

    def forward(self, h_1: Tensor) -> Tensor:
        """h_1^{dec} (..., d) -> p (..., C)"""
        if self.norm is not None:  # as released, not as in Eq. 8
            hidden = F.gelu(self.linear2(self.dropout(h_1)))
            return self.linear1(self.norm(hidden))
        hidden = F.gelu(self.linear2(h_1))
        return self.linear1(self.dropout(hidden))                     # Eq. 8


# ---- The model -----------------------------------------------------------------------------------
@dataclass
class Outputs:
    """The model's outputs for a batch. The last layer is the prediction; eval mode has only it.
    Attributes a^l follow once the class is known (`detection_losses`, `postprocess`)."""

    hidden: Tensor               # (N_d, B, q, d)
    logits: Tensor               # detection c^l (N_d, B, q, C + 1); else p (N_d or 1, B, C)
    boxes: Tensor | None = None  # detection b^l (N_d, B, q, 4) cx, cy, w, h in [0, 1]


class UniT(nn.Module):
    """Figure 2, for the given tasks alone; all eight make 201M parameters (Section 4.2)."""

    def __init__(self, config: Config, tasks: list[Task]):
        super().__init__()
        self.config = config
        defaults = {"detection": config.detection_queries, "classification": config.num_queries}
        tasks = [replace(t, num_queries=t.num_queries or defaults[t.kind]) for t in tasks]
        self.tasks = {t.name: t for t in tasks}
        width = config.decoder_width
        self.image_encoder = ImageEncoder(config, tasks) if any(t.image for t in tasks) else None
        self.text_encoder = TextEncoder(config, tasks) if any(t.text for t in tasks) else None
        # D^shared, or D_t^sep for each task t (Section 3.3).
        names = ["shared"] if config.shared_decoder else self.tasks
        self.decoders = nn.ModuleDict({name: Decoder(config) for name in names})
        # q^task: for each task a learned table, a row per query, drawn from N(0, 1).
        self.queries = nn.ParameterDict({t.name: torch.randn(t.num_queries, width) for t in tasks})
        self.heads = nn.ModuleDict({
            t.name: DetectionHead(width, t) if t.kind == "detection" else
            Classifier(width, t.num_classes, config.dropout, config.classifier_norm)
            for t in tasks})
        initialise(self)

    def forward(self, batch: Batch) -> Outputs:
        task = self.tasks[batch.task]
        memory, positions, mask = self.encode(batch, task)
        q_task = self.queries[task.name]                              # (q, d)
        decoder = self.decoders["shared" if self.config.shared_decoder else task.name]
        # Where [CLS] alone is seen, attention over that one position returns the same to every
        # query: if content starts at zero, all q states are equal (up to dropout in training).
        hidden = decoder(memory, positions, mask, q_task)             # Eq. 4, (N_d, B, q, d)
        if not self.training:
            hidden = hidden[-1:]  # at test time only the top layer (Section 3.4)
        head = self.heads[task.name]
        if task.kind == "detection":
            return Outputs(hidden, *head(hidden))
        layers = hidden if self.config.loss_on_all_layers else hidden[-1:]  # all: Table 4 line 6
        return Outputs(hidden, head(layers[:, :, 0]))                 # h_1, the first query's state

    def encode(self, batch: Batch, task: Task):
        """h^enc of Section 3.3: image, text, or first image then text -> (B, M, d), its positions
        (B, M, d) and its padding mask (B, M) or None."""
        parts, mask = [], None
        if task.image:
            parts.append(self.image_encoder(batch.images, batch.image_mask, task.name))
        if task.text:
            parts.append(self.text_encoder(batch.tokens, batch.token_types, batch.text_mask,
                                           task.name))
        if len(parts) == 1:
            return parts[0]
        states, positions, masks = zip(*parts)
        if any(m is not None for m in masks):
            mask = torch.cat([h.new_zeros(h.shape[:2], dtype=torch.bool) if m is None else m
                              for h, m in zip(states, masks)], dim=1)
        return torch.cat(states, dim=1), torch.cat(positions, dim=1), mask  # concat(h^v, h^t)

    def losses(self, outputs: Outputs, batch: Batch, batch_size: int | None = None,
               num_boxes: float | None = None) -> dict[str, Tensor]:
        """The weighted terms whose sum is the loss of this part of a batch (Section 3.4).

        A batch of `batch_size` samples with `num_boxes` boxes may be spread over micro-batches and
        processes: the terms of all parts add up to the batch's. Default: this part is the batch."""
        task, n = self.tasks[batch.task], batch_size or len(batch)
        if task.kind == "classification":
            binary = task.soft_scores and self.config.binary_vqa_loss
            return {"answer": classification_loss(outputs.logits, batch.scores, binary) / n}
        terms = detection_losses(outputs, batch, self.heads[task.name])
        # DETR divides by the boxes per process, at least 1, and averages over processes. With one
        # image per process (Section 3.5) that divides the batch's sum by max(boxes, samples).
        boxes = max(num_boxes or sum(map(len, batch.labels)), n)
        divisor = {"class": n, "l1": boxes, "giou": boxes, "attribute": n}
        return {k: LOSS_WEIGHTS[k] / divisor[k] * v.sum() for k, v in terms.items()}


def initialise(model: UniT) -> None:
    """Random weights as in the released code, except for a BERT that is not pretrained (ours)."""
    image, text = model.image_encoder, model.text_encoder
    xavier = nn.ModuleList(model.decoders.values())
    if image:
        xavier += [image.layers, image.projection, image.position_projection]
    if text:  # as the image's, for a random BERT; `load_bert` gives PyTorch's default, as released
        xavier += [text.projection, text.position_projection]
    for name, p in xavier.named_parameters():
        if p.dim() > 1:
            # Queries, keys and values count as one packed (3 d, d) matrix: its bound is 1/sqrt 2 of
            # that of each alone. (The released code skips separate decoders.)
            packed = re.search(r"\b[qkv]_proj\.", name)
            gain = math.sqrt(0.5) if packed else 1.0
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                gain *= model.config.attention_gain
            nn.init.xavier_uniform_(p, gain)
        elif "attention" in name and name.endswith("bias"):
            nn.init.zeros_(p)  # as in torch's packed attention
    for name, p in text.named_parameters() if text else ():  # a random BERT (ours)
        if name.startswith(OUR_OWN) or "embeddings" in name:
            continue  # embeddings stay N(0, 1): BERT's 0.02 would hide positions from the decoder
        if p.dim() > 1:  # BERT's 0.02 is for a width of 768; at 64 the signal would vanish
            nn.init.normal_(p, std=p.shape[1] ** -0.5)
        elif name.endswith("bias"):
            nn.init.zeros_(p)
    for name, p in model.heads.named_parameters():
        if "attribute_head" in name:
            nn.init.normal_(p, std=0.01) if p.dim() > 1 else nn.init.zeros_(p)


# ---- Section 3.4. Losses -------------------------------------------------------------------------
def classification_loss(logits: Tensor, scores: Tensor, binary: bool = False) -> Tensor:
    """logits p (N_d or 1, B, C), scores t (B, C) -> (), summed over layers and samples.

    A sample of one class has scores with a single 1. VQAv2's soft scores are divided by their sum;
    as released (`binary`, not as in Eq. 9) they are 3129 yes-no questions, whose losses add up."""
    full = torch.promote_types(logits.dtype, torch.float32)  # under autocast logits are in half
    logits, target = logits.to(full), scores.to(full).expand_as(logits)
    if binary:
        return F.binary_cross_entropy_with_logits(logits, target, reduction="sum")
    target = target / target.sum(-1, keepdim=True).clamp(min=1e-6)
    return -(target * logits.log_softmax(-1)).sum()                   # Eq. 9


def matching_cost(logits: Tensor, boxes: Tensor, image: Tensor, labels: Tensor, targets: Tensor):
    """The cost of matching each true box with each query of its image: logits (N_d, B, q, C + 1),
    boxes (N_d, B, q, 4); for the true boxes image, labels (T,) and targets (T, 4) -> (N_d, T, q).

    The class costs -p, where the loss has -log p: it is bounded like the box terms (DETR)."""
    probability = logits.softmax(-1).permute(1, 3, 0, 2)              # (B, C + 1, N_d, q)
    class_cost = -probability[image, labels].transpose(0, 1)          # (N_d, T, q)
    candidates, wanted = boxes[:, image], targets[None, :, None]      # (N_d, T, q, 4), (1, T, 1, 4)
    l1_cost = (candidates - wanted).abs().sum(-1)                     # (N_d, T, q)
    giou_cost = -elementwise_giou(candidates, wanted)                 # (N_d, T, q)
    return (LOSS_WEIGHTS["class"] * class_cost + LOSS_WEIGHTS["l1"] * l1_cost
            + LOSS_WEIGHTS["giou"] * giou_cost)


@torch.no_grad()
def match(logits: Tensor, boxes: Tensor, labels: list[Tensor], target_boxes: list[Tensor]):
    """Hungarian matching (DETR) of all layers and images at once.

    logits (N_d, B, q, C + 1), boxes (N_d, B, q, 4), labels B x (n,), target_boxes B x (n, 4)
    -> layer, image, query, target, each (K,) on the CPU: `target` indexes the boxes of all
    images, concatenated. More boxes than queries: the q that fit best are matched."""
    counts = [len(x) for x in labels]
    # (T,), each box's image; made on the CPU, since on the GPU this would wait for the counts.
    box_image = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    box_image = box_image.to(logits.device, non_blocking=True)
    cost = matching_cost(logits, boxes, box_image, torch.cat(labels), torch.cat(target_boxes))
    # The one copy to the host. If the model has diverged (NaN), any pairing will do: raising here
    # would leave other processes waiting. The loss is NaN as well, and train.py stops them all.
    cost = cost.nan_to_num(nan=1e4, posinf=1e4, neginf=-1e4).cpu().numpy()
    pairs = []
    for layer in range(len(cost)):
        start = 0
        for image, count in enumerate(counts):
            targets, queries = linear_sum_assignment(cost[layer, start:start + count])
            for target, query in zip(targets.tolist(), queries.tolist()):
                pairs.append((layer, image, query, start + target))
            start += count
    return torch.tensor(pairs, dtype=torch.int64).view(len(pairs), 4).unbind(1)


def elementwise_giou(boxes: Tensor, targets: Tensor) -> Tensor:
    """Generalised IoU of boxes that broadcast against each other, (..., 4) cx, cy, w, h -> (...).
    torchvision's does the same, but waits for the GPU (it indexes by a mask)."""
    def corners(boxes):  # upper left and lower right; sides above zero, so that no union is zero
        centre, sides = boxes.split(2, dim=-1)
        half = 0.5 * sides.clamp(min=1e-6)
        return centre - half, centre + half

    def area(low, high):
        width, height = (high - low).clamp(min=0).unbind(-1)
        return width * height

    (a0, a1), (b0, b1) = corners(boxes), corners(targets)
    overlap = area(torch.maximum(a0, b0), torch.minimum(a1, b1))
    union = area(a0, a1) + area(b0, b1) - overlap
    hull = area(torch.minimum(a0, b0), torch.maximum(a1, b1))  # the smallest box around both
    return overlap / union - (hull - union) / hull


def detection_losses(outputs: Outputs, batch: Batch, head: DetectionHead) -> dict[str, Tensor]:
    """DETR's losses on every decoder layer, and BUTD's on attributes: unweighted, (N_d,) each.

    class: sum over images of each image's weighted mean over its queries; l1, giou: sums over
    matched boxes; attribute: sum over images of each image's mean over its boxes with attributes.
    With one image per process, as the paper trained, these are the released system's terms."""
    logits, boxes = outputs.logits, outputs.boxes
    no_object = logits.shape[-1] - 1
    pairs = match(logits, boxes, batch.labels, batch.boxes)
    layer, image, query, target = (x.to(logits.device, non_blocking=True) for x in pairs)  # (K,)
    labels = torch.cat(batch.labels)[target]                          # (K,)
    targets = torch.cat(batch.boxes)[target]                          # (K, 4)

    wanted = torch.full(logits.shape[:3], no_object, device=logits.device)  # (N_d, B, q)
    wanted[layer, image, query] = labels
    weight = torch.where(wanted == no_object, NO_OBJECT_WEIGHT, 1.0).to(logits.dtype)
    cross_entropy = F.cross_entropy(logits.flatten(0, 2), wanted.flatten(), reduction="none")
    class_loss = (weight * cross_entropy.view_as(weight)).sum(-1) / weight.sum(-1)  # (N_d, B)

    def per_image(values: Tensor) -> Tensor:                          # (K,) -> (N_d, B), sums
        zeros = values.new_zeros(logits.shape[:2])
        return zeros.index_put((layer, image), values, accumulate=True)

    predicted = boxes[layer, image, query]                            # (K, 4)
    terms = {"class": class_loss.sum(-1),
             "l1": per_image((predicted - targets).abs().sum(-1)).sum(-1),
             "giou": per_image(1 - elementwise_giou(predicted, targets)).sum(-1)}
    if head.attribute_head is not None:
        with torch.autocast(logits.device.type, enabled=False):
            hidden = outputs.hidden[layer, image, query].to(head.class_head.weight.dtype)
            scores = head.attribute_head(hidden, labels)              # Eq. 7, (K, A)
        loss, described = attribute_loss(scores, torch.cat(batch.attributes)[target])
        mean = per_image(loss) / per_image(described.to(loss.dtype)).clamp(min=1)  # (N_d, B)
        terms["attribute"] = mean.sum(-1)
    return terms


def attribute_loss(scores: Tensor, attributes: Tensor) -> tuple[Tensor, Tensor]:
    """BUTD's: half the mean of the cross entropies of a box's attributes. scores (K, A), attributes
    (K, 16) padded with -1 -> (K,), 0 where a box has none, and (K,) bool: does it have any?"""
    known = attributes >= 0                                           # (K, 16)
    log_p = scores.log_softmax(-1).gather(-1, attributes.clamp(min=0))
    count = known.sum(-1)                                             # (K,)
    return -0.5 * (log_p * known).sum(-1) / count.clamp(min=1), count > 0


# ---- From outputs to detections (Section 3.4: "post-processed into object bounding boxes") -------
@dataclass
class Detections:
    """One image's predictions, one for each query, on the CPU; no threshold, no suppression."""

    scores: Tensor                          # (q,) probability of the class
    labels: Tensor                          # (q,) the best class that is not no-object
    boxes: Tensor                           # (q, 4) x0, y0, x1, y1 in pixels of the original image
    attributes: Tensor | None = None        # (q,) the highest-scoring attribute


@torch.no_grad()
def postprocess(model: UniT, outputs: Outputs, batch: Batch) -> list[Detections]:
    """The top layer's outputs as detections, one entry per image."""
    scores, labels = outputs.logits[-1].softmax(-1)[..., :-1].max(-1)  # (B, q)
    scale = batch.sizes.to(scores.device).flip(-1).repeat(1, 2)[:, None]  # (B, 1, 4), width first
    boxes = box_convert(outputs.boxes[-1], "cxcywh", "xyxy") * scale
    columns = [scores, labels, boxes]
    head = model.heads[batch.task].attribute_head
    if head is not None:                                  # Eq. 7 with the highest-scoring class
        columns.append(head(outputs.hidden[-1], labels).argmax(-1))      # (B, q, A) -> (B, q)
    columns = [column.cpu() for column in columns]
    return [Detections(*image) for image in zip(*columns)]


# ---- torchvision ---------------------------------------------------------------------------------
try:
    import torchvision.ops
except RuntimeError:
    # torchvision compiled for CUDA beside a CPU-only torch lacks its compiled operators, and stops
    # at the first that it looks up. We use its Python parts alone: declaring two is enough.
    for _name in ("torchvision::nms", "torchvision::qnms"):
        torch.library.define(_name, "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
from torchvision.models.resnet import Bottleneck, ResNet
from torchvision.ops import FrozenBatchNorm2d, box_convert


# ---- Pretrained weights: BERT (Section 3.2) and the backbone (Section 3.1) -----------------------
OUR_OWN = ("projection.", "position_projection.", "w_task.")  # of TextEncoder; BERT has none of it
BERT_NAMES = {  # parts of our names, and of those in BERT's files
    "word_embeddings": "embeddings.word_embeddings",
    "position_embeddings": "embeddings.position_embeddings",
    "token_type_embeddings": "embeddings.token_type_embeddings",
    "norm.": "embeddings.LayerNorm.", "layers.": "encoder.layer.",
    "attention.q_proj": "attention.self.query", "attention.k_proj": "attention.self.key",
    "attention.v_proj": "attention.self.value", "attention.out_proj": "attention.output.dense",
    "norm1": "attention.output.LayerNorm", "norm2": "output.LayerNorm",
    "linear1": "intermediate.dense", "linear2": "output.dense"}
BERT_SIZES = {  # entries of BERT's config.json, and of Config
    "hidden_size": "bert_width", "num_attention_heads": "bert_heads",
    "intermediate_size": "bert_ff", "num_hidden_layers": "bert_layers",
    "vocab_size": "vocab_size", "max_position_embeddings": "max_positions"}
# Keys with these parts are not used: BERT's pretraining heads; DETR's rest, ImageNet's classifier.
BERT_UNUSED = ("cls.", "pooler.", "position_ids")
BACKBONE_UNUSED = ("transformer.", "class_embed.", "bbox_embed.", "query_embed.", "input_proj.",
                   "fc.", "num_batches_tracked")


def renamed(name: str, names: dict[str, str]) -> str:
    """`name` with every part that is among `names` replaced."""
    for ours, theirs in names.items():
        name = name.replace(ours, theirs)
    return name


def copy_weights(ours: dict[str, Tensor], found: dict[str, Tensor], path, fix: str, keys=None):
    """Copies the tensors `found` in the file `path` into ours, once every one of them fits; else
    raises InputError. keys: {our name: the file's key}; None: they are the same."""
    keys = keys or {name: name for name in ours}
    for name, tensor in ours.items():
        key, shape = keys[name], tuple(tensor.shape)
        their_shape = tuple(found[key].shape) if key in found else "missing"
        if their_shape != shape:
            raise InputError(f"{path}: {key} is {their_shape}, our {name} is {shape}: it does not "
                             f"fit; {fix}")
    if left := found.keys() - keys.values():
        raise InputError(f"{path}: {min(left)} ({len(left)} in all) fit nowhere; {fix}")
    for name, tensor in ours.items():
        tensor.copy_(found[keys[name]])


def bert_config(folder: Path) -> dict[str, int]:
    """The fields of Config that BERT's own config.json sets (none if there is no such file)."""
    path = folder / "config.json"
    if not path.exists():
        return {}
    try:
        given = dict(json.loads(path.read_text(encoding="utf-8")))
        sizes = {ours: int(given[key]) for key, ours in BERT_SIZES.items() if key in given}
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{path}: not BERT's settings ({error}); get it again") from None
    for key, value in {"hidden_act": "gelu", "position_embedding_type": "absolute",
                       "type_vocab_size": 2, "layer_norm_eps": 1e-12}.items():
        if given.get(key, value) != value:
            raise InputError(f"{path}: {key} is {given[key]}, not {value}; take another BERT")
    return sizes


def load_bert(model: UniT, path: Path) -> None:
    """BERT's weights, under old names (gamma, beta) or new ones, with or without a prefix."""
    found = {}
    for key, tensor in read_weights(path, BERT_UNUSED, "bert.").items():
        found[key.replace(".gamma", ".weight").replace(".beta", ".bias")] = tensor
    ours = model.text_encoder.state_dict()
    ours = {name: tensor for name, tensor in ours.items() if not name.startswith(OUR_OWN)}
    copy_weights(ours, found, path, "vocab.txt, config.json and weights must be of one BERT",
                 {name: renamed(name, BERT_NAMES) for name in ours})
    for projection in (model.text_encoder.projection, model.text_encoder.position_projection):
        projection.reset_parameters()  # PyTorch's defaults, as released


def load_backbone(model: UniT, path: Path) -> None:
    """ResNet-50 from DETR's file (nothing else of it, as released) or torchvision's."""
    with torch.serialization.safe_globals([argparse.Namespace]):  # DETR's files keep their flags
        found = read_weights(path, BACKBONE_UNUSED, "backbone.0.body.")
    copy_weights(model.image_encoder.backbone.body.state_dict(), found, path,
                 "give DETR's detr-r50-dc5 or resnet50-0676ba61")


def load_pretrained(model: UniT, folder: Path, imagenet: bool = False) -> list[str]:
    """The paper's start: BERT (Section 3.2) and DETR's backbone (or ImageNet's, Table C.1 line 3)
    -> a sentence about each. A missing file is a warning among them, not an error."""
    bert, older = folder / "bert/model.safetensors", folder / "bert/pytorch_model.bin"
    if older.exists() and not bert.exists():
        bert = older
    backbone = folder / ("resnet50-0676ba61.pth" if imagenet else "detr/detr-r50-dc5-f0fb7ef5.pth")
    wanted, lines = [], []
    if model.text_encoder:
        wanted.append(("BERT", load_bert, bert))
    if model.image_encoder and model.config.backbone == "resnet50":
        wanted.append(("backbone", load_backbone, backbone))
    elif model.image_encoder:
        lines.append("backbone: the small one starts from random weights (none are published)")
    for name, load, path in wanted:
        try:
            download(path)
        except InputError as error:
            lines.append(f"WARNING: {name} starts from RANDOM weights, unless --init has them: "
                         f"{error}")
        else:
            load(model, path)
            lines.append(f"{name}: pretrained weights of {path}")
    return lines


# ---- The authors' released weights ---------------------------------------------------------------
RELEASED_TASKS = {  # our tasks: group and name in the released files, row of the task tables
    "coco": ("detection", "detection_coco", 0), "vg": ("detection", "detection_visual_genome", 1),
    "vqa2": ("vl", "vqa2", 3), "snli_ve": ("vl", "visual_entailment", 9),
    "qnli": ("glue", "glue_qnli", 5), "mnli": ("glue", "glue_mnli_mismatched", 6),
    "qqp": ("glue", "glue_qqp", 8), "sst2": ("glue", "glue_sst2", 7)}
RELEASED_NAMES = {  # parts of our names, and of those in the released files
    "image_encoder.backbone.": "backbone.0.", "image_encoder.input_proj.": "input_proj.",
    "image_encoder.layers.": "encoder.layers.", "image_encoder.projection.": "enc2dec_proj.",
    "image_encoder.position_projection.": "pos_embed_proj.",
    "image_encoder.w_task.": "task_embeddings_enc.", "text_encoder.projection.": "bert_projection.",
    "text_encoder.position_projection.": "bert_pos_projection.",
    "text_encoder.w_task.": "task_embeddings_lang.",
    "decoders.shared.": "decoder.", "decoders.TASK.": "decoders.{group}.{name}.",
    "queries.TASK": "query_embeds.{group}.{name}.weight",
    "heads.TASK.class_head.": "class_embeds.{name}.",
    "heads.TASK.box_head.0.": "bbox_embeds.{name}.layers.0.",
    "heads.TASK.box_head.2.": "bbox_embeds.{name}.layers.1.",
    "heads.TASK.box_head.4.": "bbox_embeds.{name}.layers.2.",
    "heads.TASK.attribute_head.class_embedding.": "det_losses.{name}.attribute_head.cls_embed.",
    "heads.TASK.attribute_head.linear": "det_losses.{name}.attribute_head.attr_linear",
    "heads.TASK.linear2.": "classifiers.{group}.{name}.0.dense.",
    "heads.TASK.norm.": "classifiers.{group}.{name}.0.LayerNorm.",
    "heads.TASK.linear1.": "classifiers.{group}.{name}.1.",
    ".attention.": ".self_attn.", ".self_attention.": ".self_attn.",
    ".cross_attention.": ".multihead_attn."}


def released_key(name: str) -> str:
    """The key of our tensor `name` in what `unpack_released` returns."""
    task = name.split(".")[1]
    group, their_name, _ = RELEASED_TASKS.get(task, ("", "", 0))
    key = renamed(name.replace(f".{task}", ".TASK") if group else name, RELEASED_NAMES)
    if key.startswith("text_encoder."):
        return "bert_model.module." + renamed(name.removeprefix("text_encoder."), BERT_NAMES)
    return key.format(group=group, name=their_name)


def unpack_released(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """A released file's tensors one by one: without prefixes, attention's packed matrices as three,
    and of the tables of task vectors a row for each of our tasks."""
    tensors = {}
    for key, tensor in found.items():
        for prefix in ("unit_base_model.", "detr_model.", "transformer."):  # in this order, or none
            key = key.removeprefix(prefix)
        tensors[key] = tensor
        if "in_proj_" in key:
            for name, third in zip("qkv", tensor.chunk(3)):
                tensors[key.replace("in_proj_", f"{name}_proj.")] = third
        elif key.startswith("task_embeddings_"):
            for task, (_, _, row) in RELEASED_TASKS.items():
                tensors[key.replace("weight", task)] = tensor[row:row + 1]
    return tensors


def load_released(path: Path | str) -> UniT:
    """The authors' model in eval mode, from their archive or the file in it."""
    fix = "give one of the authors' files (README)"
    found, tasks = unpack_released(read_weights(path)), []
    for task in PAPER_TASKS:
        last = "class_head" if task.kind == "detection" else "linear1"
        if released_key(f"heads.{task.name}.{last}.bias") in found:
            tasks.append(task)
    if not tasks:
        raise InputError(f"{path}: not a model of the authors'; {fix}")
    config = Config(shared_decoder="decoder.norm.weight" in found,
                    task_embedding="task_embeddings_enc.coco" in found, **AS_RELEASED)
    model = UniT(config, tasks)
    keys = {name: released_key(name) for name in model.state_dict()}
    used = {key: found[key] for key in keys.values() if key in found}
    copy_weights(model.state_dict(), used, path, fix, keys)
    return model.eval()


# ---- Files of weights ----------------------------------------------------------------------------
_HF = ("https://huggingface.co/google-bert/bert-base-uncased/resolve/"
       "86b5e0934494bd15c9632b12f734a8a67f723594/")
_UNIT = "https://dl.fbaipublicfiles.com/mmf/data/models/unit_models/unit."
# The published files by name: address and SHA-256 (of some only the beginning is published).
PUBLISHED = {url.rpartition("/")[2]: (url, sha256) for url, sha256 in (
    (_HF + "vocab.txt", "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3"),
    (_HF + "model.safetensors", "68d45e234eb4a928074dfd868cead0219ab85354cc53d20e772753c6bb9169d3"),
    (_HF + "pytorch_model.bin", "097417381d6c7230bd9e3557456d726de6e83245ec8b24f529f60198a67b203a"),
    ("https://dl.fbaipublicfiles.com/detr/detr-r50-dc5-f0fb7ef5.pth", "f0fb7ef5"),
    ("https://download.pytorch.org/models/resnet50-0676ba61.pth", "0676ba61"),
    (_UNIT + "coco.single_task.tar.gz",
     "d235fe2d27b47d8f19ce82bea2b1bc6d33151b7c6c1a5558c2a501911b9f4880"),
    (_UNIT + "coco.single_task_without_task_embedding.tar.gz",
     "ded272f84b6fb27e3aaca3de4d494f8bbfdb1b6a870a43069b43aed6d94bd7d3"),
    (_UNIT + "all_8_datasets.shared_dec_with_coco_init.tar.gz",
     "63cd3a5cfd6728b6e529714d5dcdc5cb3d9b7d1038dbbb2351264d145e5852d4"),
    (_UNIT + "all_8_datasets.shared_dec_with_coco_init_without_task_embedding.tar.gz",
     "c4a3c1072f07e605de76402ff7c0e2bc8d4514561c52dc94b3d28b3d4d7f698e"))}
TIMEOUT = 10  # seconds without an answer, after which a machine counts as offline


def download(path: Path) -> None:
    """Downloads a published file, known by its name, if it is not there; or raises InputError."""
    if path.exists():
        return
    if path.name not in PUBLISHED:
        raise InputError(f"{path}: no such file; check the path")
    url, sha256 = PUBLISHED[path.name]
    before = socket.getdefaulttimeout()
    try:
        path.parent.mkdir(exist_ok=True)
        socket.setdefaulttimeout(TIMEOUT)  # torch's downloader has none of its own
        torch.hub.download_url_to_file(url, str(path), hash_prefix=sha256)
    except Exception as error:
        raise InputError(f"{path}: not there, and downloading it failed ({error}); get {url} "
                         f"(SHA-256 {sha256}) by other means and put it there") from None
    finally:
        socket.setdefaulttimeout(before)


SIGNATURES = {  # beginnings of files that people often have in place of the one they wanted
    b"version https://git-lfs": "a Git LFS pointer: `git lfs pull` in its folder gets the file",
    b"<": "a web page or other markup", b"\x1f\x8b": "a gzip file: cut short, or not unpacked"}


def what_is_wrong(path: Path, otherwise: str) -> str:
    """Why a file cannot be read, by its first bytes: `otherwise`, unless these say more."""
    with open(path, "rb") as file:
        start = file.read(40).lstrip()
    if not start:
        return "an empty file"
    for beginning, words in SIGNATURES.items():
        if start.startswith(beginning):
            return words
    return f"{otherwise}; it begins with {start!r}"


def read_file(path: Path | str, fix: str = ""):
    """The content of a PyTorch or safetensors file, or of the one PyTorch file in a tar archive. A
    published file that is absent is downloaded first. Raises InputError. A pickle that asks for
    more than tensors, plain values and `safe_globals` is refused before any of its code runs."""
    path = Path(path)
    download(path)
    reason = "cut short, damaged, or not weights"
    try:
        if path.suffix == ".safetensors":
            return read_safetensors(path)
        source = read_archive(path) if tarfile.is_tarfile(path) else path
        return torch.load(source, map_location="cpu", weights_only=True)
    except (OSError, ValueError) as error:
        reason = f"{reason}: {error}"
    except Exception as error:  # a broken file can break a reader in any way
        reason = what_is_wrong(path, reason)  # not PyTorch's words, which give unsafe advice
        if refused := re.search(r"GLOBAL (\S+)", str(error)):
            reason = f"more than tensors: {refused[1]}, and loading that could run code"
    source, _ = PUBLISHED.get(path.name, ("its source", ""))
    raise InputError(f"{path}: cannot be read ({reason}); {fix or f'get it again from {source}'}")


def read_weights(path: Path | str, unused: tuple[str, ...] = (), prefix: str = ""):
    """The tensors in such a file {name: Tensor}, except those whose names have a part that is
    `unused`; their names without `prefix`. Raises InputError."""
    found = read_file(path)
    if isinstance(found, dict):  # training programs put the weights under one of these keys
        found = found.get("model", found.get("state_dict", found))
    if not isinstance(found, dict) or not all(isinstance(x, Tensor) for x in found.values()):
        raise InputError(f"{path}: holds no weights, or more than weights; give named tensors")
    weights = {}
    for key, tensor in found.items():
        if not any(part in key for part in unused):
            weights[key.removeprefix("module.").removeprefix(prefix)] = tensor
    return weights


_TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
          "U8": torch.uint8, "BOOL": torch.bool}


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The format: 8 bytes, the header's length (little-endian); the header, JSON, with dtype, shape
    and data_offsets by name; the data, in which the tensors follow one another without gaps."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        data = torch.frombuffer(bytearray(file.read()), dtype=torch.uint8)
    header.pop("__metadata__", None)
    tensors, end = {}, 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        start, stop = entry["data_offsets"]
        if start != end or stop > len(data):
            raise ValueError(f"{name} is at {start}..{stop} of {len(data)} bytes, not at {end}")
        raw = data[start:stop].clone()  # a copy is aligned
        tensors[name] = raw.view(_TYPES[entry["dtype"]]).reshape(entry["shape"])
        end = stop
    return tensors


def read_archive(path: Path) -> io.BytesIO:
    """The one checkpoint in a tar archive, in memory: nothing is written to the disk."""
    found = []
    with tarfile.open(path) as archive:
        for member in archive:
            if member.isfile() and member.name.endswith((".pth", ".pt", ".ckpt")):
                found.append(archive.extractfile(member).read())
    if len(found) != 1:
        raise ValueError(f"it holds {len(found)} checkpoints, but should hold one")
    return io.BytesIO(found[0])


# ---- Settings as flags, and Figure 2 on the command line -----------------------------------------
METAVARS = {int: "INT", float: "FLOAT", bool: "BOOL", str: "NAME", tuple: "A,B"}


def parse(text: str, kind: type, least: float = 0, most: float = math.inf, choices: tuple = ()):
    """A flag's text -> a value of this kind within the limits of its `option`."""
    if get_origin(kind) is tuple:
        parts = [part for part in text.split(",") if part]
        return tuple(parse(part, get_args(kind)[0], least, most, choices) for part in parts)
    if kind in (int, float):
        with suppress(ValueError):
            if least <= kind(text) <= most and kind(text) < math.inf:
                return kind(text)
        limits = f"from {least} to {most}" if most < math.inf else f"of at least {least}"
        number = "an integer" if kind is int else "a number"
        raise argparse.ArgumentTypeError(f"{text}: must be {number} {limits}")
    choices = ("true", "false") if kind is bool else choices
    if not choices:
        return os.path.expanduser(text)  # a name or a path; in a path, ~ means home
    if text.lower() not in choices:
        raise argparse.ArgumentTypeError(f"{text}: choose from {', '.join(choices)}")
    return text.lower() == "true" if kind is bool else text.lower()


def written(value) -> str:
    """A setting as typed on the command line."""
    text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
    return text.lower() if isinstance(value, bool) else text


def add_flags(group, settings: type, presets: dict[str, dict] | None = None) -> None:
    """A flag for each field of a dataclass of `option`s; its help shows the default and each
    preset's value. A flag that is not given leaves no attribute."""
    kinds = get_type_hints(settings)
    for setting in fields(settings):
        values = [written(setting.default) or "none"]
        for name, preset in (presets or {}).items():
            if setting.name in preset:
                values.append(f"{name}: {written(preset[setting.name])}")
        limits = dict(setting.metadata)
        help = f"{limits.pop('help')} [{'; '.join(values)}]"
        group.add_argument(f"--{setting.name}", default=argparse.SUPPRESS, help=help,
                           type=partial(parse, kind=kinds[setting.name], **limits),
                           metavar=METAVARS[type(setting.default)])


@torch.no_grad()
def figure_2(config: Config) -> None:
    """Prints Figure 2 for one picture and one text. On the meta device: shapes without memory."""
    with torch.device("meta"):
        model = UniT(config, PAPER_TASKS)
        images = torch.empty(1, 3, config.image_size, config.image_size * 4 // 3)
        tokens = torch.zeros(1, 20, dtype=torch.int64)
    image, text = model.image_encoder, model.text_encoder
    decoder = model.decoders["shared" if config.shared_decoder else "vg"]
    coco, vg, vqa2, *others = model.heads.values()
    x_v = image.backbone(images)
    h_v, h_t = image(images, None, "vqa2")[0], text(tokens, tokens, None, "vqa2")[0]
    h_enc = torch.cat([h_v, h_t], dim=1)
    h = decoder(h_enc, torch.zeros_like(h_enc), None, model.queries["vg"])
    h_1, c = h[-1, :, 0], vg.class_head(h)
    a = vg.attribute_head(h, c[..., :-1].argmax(-1))
    rows = [  # symbol, place, input, output, modules: the first is named, all are counted
        ("x^v = B(I)", "Eq. 1", images, x_v, image.backbone),
        ("P_{b->e}(x^v)", "Eq. 2", x_v, image.input_proj(x_v), image.input_proj),
        ("h^v = E_v(.., w_v^task)", "Eq. 2", images, h_v, image),
        ("h^t = BERT(.., w_t^task)", "Eq. 3", tokens, h_t, text),
        ("h^{dec,l} = D(.., q^task)", "Eq. 4", h_enc, h, decoder, model.decoders, model.queries),
        ("c^l = class_head(h)", "Eq. 5", h, c, vg.class_head, coco.class_head),
        ("b^l = box_head(h)", "Eq. 6", h, vg.box_head(h), vg.box_head, coco.box_head),
        ("a^l = attr_head(h, c^l)", "Eq. 7", h, a, vg.attribute_head),
        ("p = W_1 GeLU(W_2 h_1)", "Eq. 8", h_1, vqa2(h_1), vqa2, *others)]
    form = "{:<26} {:<6} {:<14} {:>19} {:>19} {:>12}"
    print(form.format("symbol", "paper", "class", "input", "output", "parameters"))
    counted = set()
    for symbol, place, x, output, *modules in rows:
        shapes = [" x ".join(map(str, tensor.shape)) for tensor in (x, output)]
        parameters = set(nn.ModuleList(modules).parameters()) - counted
        counted |= parameters
        count = sum(p.numel() for p in parameters)
        print(form.format(symbol, place, type(modules[0]).__name__, *shapes, f"{count:,}"))
    total = sum(p.numel() for p in counted)
    print(f"{total:,} parameters in all (Section 4.2: 201M; 532M with --shared_decoder false)")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description="Prints Figure 2: each part's symbol, place in the paper, class, input and "
        "output shape (a picture of 4:3, 20 words, VG's queries) and parameters (all tasks).")
    add_flags(parser, Config)
    try:
        figure_2(Config(**vars(parser.parse_args(argv))))
    except InputError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
