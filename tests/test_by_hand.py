"""Worked examples: what matching, losses, heads, metrics and the schedule compute, to be checked
with a pencil. Read this file first, with the paper beside it.

Boxes are cx, cy, w, h as shares of the picture's width and height. Logits are often written as
log p of some probabilities p: the softmax of log p is p again.
"""
import math
from dataclasses import replace

import pytest
import torch

import data
import eval as evaluation
import train
import unit

VG = unit.Task("vg", "detection", image=True, text=False, num_classes=2, num_queries=3)
SMALL = unit.Config(encoder_width=4, encoder_heads=1, encoder_ff=4, encoder_layers=1, bert_width=4,
                    bert_heads=1, bert_ff=4, bert_layers=1, decoder_width=4, decoder_heads=1,
                    decoder_ff=4, decoder_layers=1, backbone="small")


def close(found, expected, tolerance=1e-5):
    torch.testing.assert_close(found, torch.tensor(expected), rtol=tolerance, atol=tolerance)


# ---- Matching (Section 3.4, DETR): which query is responsible for which box ----------------------
#
# Three queries and two true boxes in a picture of side 1, cut into 2 x 2 quarters:
#
#     box 0    class 0, the upper left quarter        cx, cy, w, h = .25 .25 .5 .5
#     box 1    class 1, the lower right quarter                      .75 .75 .5 .5
#     query 0  p = .1 .8 (no-object .1), the lower right quarter     .75 .75 .5 .5
#     query 1  p = .6 .2 (no-object .2), the left half               .25 .5  .5 1.
#     query 2  p = .2 .2 (no-object .6), the whole picture           .5  .5  1. 1.
LOGITS = torch.tensor([[0.1, 0.8, 0.1], [0.6, 0.2, 0.2], [0.2, 0.2, 0.6]]).log()
QUERIES = torch.tensor([[0.75, 0.75, 0.5, 0.5], [0.25, 0.5, 0.5, 1.0], [0.5, 0.5, 1.0, 1.0]])
BOXES = torch.tensor([[0.25, 0.25, 0.5, 0.5], [0.75, 0.75, 0.5, 0.5]])
LABELS = torch.tensor([0, 1])
LAYER = LOGITS[None, None], QUERIES[None, None]  # of one layer and one image: (1, 1, 3, ...)


def test_generalised_iou():
    """GIoU = intersection / union - (hull - union) / hull, the smallest box around both."""
    #                    intersection  union  hull   GIoU
    # box 0, query 0          0         .5     1     0 - .5 / 1         = -.5
    # box 0, query 1         .25        .5    .5     .25 / .5 - 0       =  .5
    # box 0, query 2         .25       1     1       .25 / 1 - 0        =  .25
    # box 1, query 0         .25       .25   .25     1 - 0              =  1
    # box 1, query 1          0        .75     1     0 - .25 / 1        = -.25
    # box 1, query 2         .25       1     1       .25 / 1 - 0        =  .25
    found = unit.elementwise_giou(QUERIES[None], BOXES[:, None])
    close(found, [[-0.5, 0.5, 0.25], [1.0, -0.25, 0.25]])


def test_matching():
    """Each pair of box and query costs -p(class) + 5 L1 - 2 GIoU; the cheapest pairing wins."""
    #                      -p    + 5 L1                     - 2 GIoU
    # box 0, query 0      -.1    + 5 (.5 + .5 + 0 + 0)      + 1       =  5.9
    # box 0, query 1      -.6    + 5 (0 + .25 + 0 + .5)     - 1       =  2.15
    # box 0, query 2      -.2    + 5 (.25 + .25 + .5 + .5)  - .5      =  6.8
    # box 1, query 0      -.8    + 0                        - 2       = -2.8
    # box 1, query 1      -.2    + 5 (.5 + .25 + 0 + .5)    + .5      =  6.55
    # box 1, query 2      -.2    + 5 (.25 + .25 + .5 + .5)  - .5      =  6.8
    cost = unit.matching_cost(*LAYER, torch.tensor([0, 0]), LABELS, BOXES)
    close(cost, [[[5.9, 2.15, 6.8], [-2.8, 6.55, 6.8]]])
    # There are six ways to pair two boxes with two of three queries. Box 0 with query 1 and box 1
    # with query 0 is the cheapest: 2.15 - 2.8 = -.65. The target of query 2 is no-object.
    layer, image, query, target = unit.match(*LAYER, [LABELS], [BOXES])
    assert layer.tolist() == [0, 0] and image.tolist() == [0, 0]
    assert dict(zip(target.tolist(), query.tolist())) == {0: 1, 1: 0}


def test_matching_is_not_greedy():
    """The closest pair is not always matched: the sum over all boxes of an image decides.

    Boxes lie at .3 and .5 on a line, queries at .45 and .7, and all classes are alike. The closest
    pair is box .5 with query .45, which leaves box .3 with query .7: distances .05 + .4. The other
    way round they are .15 + .2. (The GIoUs agree.)"""
    boxes = torch.tensor([[0.3, 0.5, 0.4, 0.5], [0.5, 0.5, 0.4, 0.5]])
    queries = torch.tensor([[0.45, 0.5, 0.4, 0.5], [0.7, 0.5, 0.4, 0.5]])
    _, _, query, target = unit.match(torch.zeros(1, 1, 2, 2), queries[None, None],
                                     [torch.tensor([0, 0])], [boxes])
    assert dict(zip(target.tolist(), query.tolist())) == {0: 0, 1: 1}


def test_more_boxes_than_queries():
    """A query is responsible for one box at most. Here there is one query, on the second box."""
    logits, boxes = torch.zeros(1, 1, 1, 3), BOXES[None, None, 1:]
    _, _, query, target = unit.match(logits, boxes, [LABELS], [BOXES])
    assert query.tolist() == [0] and target.tolist() == [1]


# ---- Losses (Section 3.4) ------------------------------------------------------------------------
def test_detection_losses():
    """The losses of the picture above: two matched queries, and one whose target is no-object."""
    outputs = unit.Outputs(torch.zeros(1, 1, 3, 4), *LAYER)
    batch = unit.Batch("vg", [0], boxes=[BOXES], labels=[LABELS])
    losses = unit.UniT(SMALL, [VG]).losses(outputs, batch)
    # Class: the mean of -log p(target), in which no-object weighs a tenth, since it is the target
    # of most queries. The targets here: class 1 (p = .8), class 0 (.6), no-object (.6).
    total = -math.log(0.8) - math.log(0.6) - 0.1 * math.log(0.6)
    assert losses["class"].item() == pytest.approx(total / (1 + 1 + 0.1), rel=1e-5)
    # L1: query 0 lies on its box, query 1 is .25 + .5 off. Weight 5, mean over the two boxes.
    assert losses["l1"].item() == pytest.approx(5 * (0 + 0.75) / 2, rel=1e-5)
    # GIoU: 1 - GIoU of the two pairs, from the table above. Weight 2, mean over the two boxes.
    assert losses["giou"].item() == pytest.approx(2 * ((1 - 1) + (1 - 0.5)) / 2, rel=1e-5)


def test_attribute_loss():
    """A box with the attributes 0 and 2 (p = .5 and .25): half the mean of their -log p, which are
    log 2 and 2 log 2. A box without attributes costs nothing."""
    scores = torch.tensor([[0.5, 0.25, 0.25]] * 2).log()
    loss, described = unit.attribute_loss(scores, torch.tensor([[0, 2, -1], [-1, -1, -1]]))
    close(loss, [0.5 * 1.5 * math.log(2), 0.0])
    assert described.tolist() == [True, False]


def test_answer_loss():
    """Eq. 9 with VQAv2's soft scores. Ten people were asked: 7 say answer 0, 2 say answer 1, one
    says answer 2. As `test_vqa_accuracy` shows below, these answers score 1, .6 and .3."""
    scores = torch.tensor([[1.0, 0.6, 0.3, 0.0]])
    logits = torch.tensor([[[0.5, 0.25, 0.125, 0.125]]]).log()
    # Divided by their sum, the targets are 1, .6, .3 of 1.9; -log p is log 2 times 1, 2, 3, 3.
    expected = math.log(2) * (1 * 1 + 0.6 * 2 + 0.3 * 3) / 1.9
    assert unit.classification_loss(logits, scores).item() == pytest.approx(expected, rel=1e-5)


def test_answer_loss_as_released():
    """A yes-no question for each answer. A logit of log 3 says "yes" with p = 3/4: the score .6
    costs -(.6 log 3/4 + .4 log 1/4). A logit of 0 says p = 1/2, which costs log 2 at any score."""
    logits, scores = torch.tensor([[[math.log(3), 0.0]]]), torch.tensor([[0.6, 1.0]])
    found = unit.classification_loss(logits, scores, binary=True)
    expected = -(0.6 * math.log(3 / 4) + 0.4 * math.log(1 / 4)) + math.log(2)
    assert found.item() == pytest.approx(expected, rel=1e-5)


# ---- Heads and positions -------------------------------------------------------------------------
def linear(layer, weight, bias):
    layer.weight.data, layer.bias.data = torch.tensor(weight), torch.tensor(bias)


def test_classifier():
    """Eq. 8: p = W_1 GeLU(W_2 h_1 + b_2) + b_1. GeLU(x) is x times the share of a normal
    distribution below x: GeLU(2) = 2 x 0.97725 = 1.9545 and GeLU(-1) = -1 x 0.15866."""
    head = unit.Classifier(2, 1, dropout=0.1, as_released=False).eval()
    linear(head.linear2, [[1.0, 1.0], [0.0, -1.0]], [0.0, 0.5])
    linear(head.linear1, [[10.0, 100.0]], [7.0])
    # h_1 = (0.5, 1.5): W_2 h_1 + b_2 = (2, -1); 10 x 1.9545 - 100 x 0.15866 + 7 = 10.679
    close(head(torch.tensor([[0.5, 1.5]])), [[10.679]], 1e-3)


@pytest.mark.parametrize("dropout, expected", [(0.0, -10 + 1 + 7), (1.0, 10 - 1 + 7)])
def test_classifier_as_released(dropout, expected):
    """A LayerNorm before the last layer makes +-1 of any two features: h_1 + b_2 = (6, 9) becomes
    (-1, 1). Dropout comes first: if it drops all of h_1, b_2 = (5, 0) becomes (1, -1)."""
    head = unit.Classifier(2, 1, dropout, as_released=True).train()
    linear(head.linear2, [[1.0, 0.0], [0.0, 1.0]], [5.0, 0.0])
    linear(head.linear1, [[10.0, 1.0]], [7.0])
    close(head(torch.tensor([[1.0, 9.0]])), [[float(expected)]], 1e-4)


def test_dropout_of_the_classifier():
    """In Eq. 8 the dropout of Table A.1 comes behind GeLU: if it drops everything, b_1 is left."""
    head = unit.Classifier(2, 1, dropout=1.0, as_released=False).train()
    linear(head.linear1, [[10.0, 1.0]], [7.0])
    close(head(torch.rand(1, 2)), [[7.0]])


def test_attribute_head():
    """Eq. 7: the embedding of the class is put behind the state; two linear layers without anything
    between them, and (as released) a ReLU at the end."""
    head = unit.AttributeHead(2, replace(VG, num_attributes=2))
    for p in head.parameters():
        torch.nn.init.zeros_(p)
    head.class_embedding.weight.data[1, 0] = 3.0      # class 1 is embedded as (3, 0, 0, ...)
    head.linear1.weight.data[0, :3] = torch.tensor([1.0, 10.0, 100.0])  # of state and class
    head.linear1.bias.data[0] = -400.0
    head.linear2.weight.data[:, 0] = torch.tensor([1.0, -1.0])
    # State (4, 5) and class 1: 1 x 4 + 10 x 5 + 100 x 3 - 400 = -46; then 1 x -46 and -1 x -46.
    close(head(torch.tensor([4.0, 5.0]), torch.tensor(1)), [0.0, 46.0])
    assert len(head.class_embedding.weight) == 2 + 1  # no-object has a row, too


def test_positions():
    """Rows and columns are counted from 1 and scaled so that the last is 2 pi. The first 4 of 8
    features encode the row: sine and cosine of the angle, then of a hundredth of it."""
    positions = unit.sine_positions(torch.ones(1, 2, 4, dtype=torch.bool), 8).view(2, 4, 8)
    first_row, third_column = 2 * math.pi * 1 / 2, 2 * math.pi * 3 / 4
    expected = [f(angle / slow) for angle in (first_row, third_column) for slow in (1, 100)
                for f in (math.sin, math.cos)]
    close(positions[0, 2], expected)
    close(positions[1, 3, :2], [0.0, 1.0])  # the last row: sin 2 pi, cos 2 pi


def test_detections():
    """A detection is a query's best class except no-object, its probability, and its box in pixels
    of the original picture (100 high and 200 wide here)."""
    # Query 0 is of class 1 for sure. For query 1 no-object is likelier (.6) than class 0 (.3).
    logits = torch.tensor([[0.02, 0.96, 0.02], [0.3, 0.1, 0.6]]).log()
    boxes = torch.tensor([[0.5, 0.5, 0.2, 0.4], [0.1, 0.2, 0.2, 0.2]])
    outputs = unit.Outputs(torch.zeros(1, 1, 2, 4), logits[None, None], boxes[None, None])
    batch = unit.Batch("vg", [7], sizes=torch.tensor([[100, 200]]))
    (found,) = unit.postprocess(unit.UniT(SMALL, [VG]), outputs, batch)
    assert found.labels.tolist() == [1, 0]
    close(found.scores, [0.96, 0.3])
    # cx .5 and w .2 of 200 pixels: from 80 to 120; cy .5 and h .4 of 100 pixels: from 30 to 70.
    close(found.boxes, [[80.0, 30.0, 120.0, 70.0], [0.0, 10.0, 40.0, 30.0]])


# ---- VQA accuracy (Section 4.2) ------------------------------------------------------------------
@pytest.mark.parametrize("others, expected", [
    (10, 0.0),  # nobody said "cat"
    (9, 0.3),   # 9 x 1/3 + 1 x 0: without the one who said it, nobody did
    (8, 0.6),   # 8 x 2/3 + 2 x 1/3
    (7, 0.9),   # 7 x 1 + 3 x 2/3
    (6, 1.0), (0, 1.0)])
def test_vqa_accuracy(others, expected):
    """An answer is right if three people gave it. Ten times one of the ten is left out, the answer
    scores min(1, number of the other nine who gave it / 3), and the mean of the ten counts."""
    ten = ["dog"] * others + ["cat"] * (10 - others)
    assert evaluation.vqa_accuracy("cat", ten) == pytest.approx(expected)


# ---- The schedule (Section 3.5, Tables A.1 and A.2) ----------------------------------------------
def test_learning_rate():
    """It rises to its value within 2,000 iterations, then falls along half a cosine to zero."""
    run = train.TrainConfig(iterations=10_000, warmup=2000)
    assert train.lr_factor(0, run) == 1 / 2000
    assert train.lr_factor(1999, run) == 1
    assert train.lr_factor(6000, run) == pytest.approx(0.5)   # half of the way down
    assert train.lr_factor(9999, run) < 1e-6


def test_sampling_probabilities():
    """The three lines of Table A.2, in the order of `train.EIGHT`."""
    assert train.table_a2(("coco", "vqa2")) == (1.0, 1.0)
    assert train.table_a2(train.EIGHT) == (0.20, 0.07, 0.26, 0.12, 0.10, 0.10, 0.10, 0.05)
    assert train.table_a2(train.ABLATION) == (0.30, 0.50, 0.20)


def test_sampling():
    """Each iteration draws a task and takes the next samples of its data set; a data set that is
    used up begins anew. Task "a" has 3 samples here: two iterations of 3 are two full epochs."""
    schedule = data.Schedule({"a": 3, "b": 50}, {"a": 1.0, "b": 3.0}, 3, iterations=4000, seed=0)
    tasks = [schedule.task(i) for i in range(4000)]
    assert tasks.count("b") == pytest.approx(3000, abs=100)  # 3 of 4; the deviation is 27
    first, second = [i for i in range(4000) if tasks[i] == "a"][:2]
    assert sorted(schedule.samples(first)) == sorted(schedule.samples(second)) == [0, 1, 2]
