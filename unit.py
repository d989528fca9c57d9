"""UniT (Hu & Singh, 2021), Section 3: the model, its losses, and the loading of pretrained weights.

| paper            | symbol                            | here                                             |
|------------------|-----------------------------------|--------------------------------------------------|
| Section 3.1 Eq.1 | x^v = B(I)                        | `Backbone`                                       |
| Section 3.1 Eq.2 | h^v = E_v(P_{b->e}(x^v), w_v)     | `ImageEncoder`                                   |
| Section 3.2 Eq.3 | h^t = BERT({w_1..w_S}, w_t)       | `TextEncoder`                                    |
| Section 3.3 Eq.4 | {h^{dec,l}} = D(h^enc, q^task)    | `Decoder`, `UniT.forward`                        |
| Section 3.4 Eq.5 | c^l = class_head(h^{dec,l})       | `DetectionHead.class_head`                       |
| Section 3.4 Eq.6 | b^l = box_head(h^{dec,l})         | `DetectionHead.box_head`                         |
| Section 3.4 Eq.7 | a^l = attr_head(h^{dec,l}, c^l)   | `AttributeHead`                                  |
| Section 3.4 Eq.8 | p = W_1 GeLU(W_2 h_1 + b_2) + b_1 | `Classifier`                                     |
| Section 3.4 Eq.9 | CrossEntropyLoss(p, t)            | `classification_losses`                          |
| DETR's losses    |                                   | `match`, `detection_losses`                      |
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor


class InputError(Exception):
    """A mistake in what the user gave (a file, a record, a flag). The message names it and the fix.

    The command lines print it as one line and exit with status 2; everything else is a bug of ours.
    """


@dataclass(frozen=True)
class Task:
    """What the rooms need to know of a data set. `data.TASKS` holds the eight; a ninth is one more row."""

    name: str
    kind: str                    # "detection" or "classification"
    image: bool                  # has an image: Section 3.1 applies
    text: bool                   # has a text: Section 3.2 applies
    num_queries: int             # q, the length of q^task (released config)
    num_classes: int             # C; for detection the largest category id + 1 (no-object comes on top)
    num_attributes: int = 0      # largest attribute id + 1 (VG), 0: the data set has no attributes
    text_states: str = "cls"     # what of h^t the decoder sees: "cls" or "all" (Section 3.2)
    max_tokens: int = 128        # S at most, longer texts are truncated (released config)
    soft_scores: bool = False    # targets are scores in [0, 1] for several answers (VQAv2)
    dataset: type | None = None  # the class in data.py that reads its files; the model never looks


@dataclass
class Batch:
    """Samples of one task. B samples, S tokens, masks are True at padding (None: nothing is padded)."""

    task: str                               # Task.name
    ids: list                               # (B) image, question or row ids, for metrics and messages
    images: Tensor | None = None            # (B, 3, H, W) normalised, zeros at padding
    image_mask: Tensor | None = None        # (B, H, W) bool
    tokens: Tensor | None = None            # (B, S) int64
    token_types: Tensor | None = None       # (B, S) int64, 0 first sentence, 1 second
    text_mask: Tensor | None = None         # (B, S) bool
    sizes: Tensor | None = None             # (B, 2) int64, height and width of the original images
    boxes: list[Tensor] | None = None       # B times (n, 4) cx, cy, w, h in [0, 1]
    labels: list[Tensor] | None = None      # B times (n,) int64 category ids
    attributes: list[Tensor] | None = None  # B times (n, 16) int64 attribute ids, -1 pads
    scores: Tensor | None = None            # (B, C) float, target score of each class; None on test splits

    def __len__(self) -> int:
        return len(self.ids)

    def to(self, device, dtype: torch.dtype | None = None) -> "Batch":
        """A copy with every tensor on `device` (floating point ones as `dtype`, if given)."""
        def move(x):
            if isinstance(x, Tensor):
                kind = dtype if x.is_floating_point() else None
                return x.to(device=device, dtype=kind, non_blocking=True)
            if isinstance(x, list):
                return [move(y) for y in x]
            return x
        return replace(self, **{f.name: move(getattr(self, f.name)) for f in fields(self)})
