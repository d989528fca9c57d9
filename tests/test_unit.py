"""Section 3: what matching, each loss and each part of the model computes.

The yardsticks share no code with unit.py: a slow loop over layers, images and boxes, and other
people's implementations with the same weights (DETR here, BERT in test_released.py). Worked
examples are in test_by_hand.py.
"""
import itertools
import math
from dataclasses import replace

import pytest
import torch
import unit  # before torchvision
from scipy.optimize import linear_sum_assignment
from torch import nn
from torchvision.ops import box_convert, generalized_box_iou

SHAPES = unit.Task("shapes", "detection", image=True, text=False, num_queries=5, num_classes=4,
                   num_attributes=6)
QUESTIONS = unit.Task("questions", "classification", image=True, text=True, num_queries=3,
                      num_classes=7, soft_scores=True)
SENTENCES = unit.Task("sentences", "classification", image=False, text=True, num_queries=3,
                      num_classes=2)
TASKS = [SHAPES, QUESTIONS, SENTENCES]

SMALL = unit.Config(
    encoder_width=16, encoder_heads=2, encoder_ff=24, encoder_layers=2, bert_width=12, bert_heads=3,
    bert_ff=20, bert_layers=2, vocab_size=40, max_positions=16, decoder_width=20, decoder_heads=4,
    decoder_ff=28, decoder_layers=3, dropout=0.0, backbone="small")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def float64():
    """Double precision throughout, so that any difference left is a mistake and not rounding."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def close(a, b, tolerance=1e-9):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def make_model(tasks=TASKS, **changes):
    """A small model in which no parameter is left at zero or one, where it could hide a mistake."""
    model = unit.UniT(replace(SMALL, **changes), tasks)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def text_batch(task="sentences", size=2, **more):
    classes = QUESTIONS.num_classes if task == "questions" else SENTENCES.num_classes
    return unit.Batch(task, list(range(size)), tokens=torch.randint(40, (size, 6)),
                      token_types=torch.randint(2, (size, 6)), scores=torch.rand(size, classes),
                      **more)


def random_boxes(n):
    """(n, 4) cx, cy, w, h that overlap often enough to be interesting"""
    return torch.cat([0.3 + 0.4 * torch.rand(n, 2), 0.1 + 0.5 * torch.rand(n, 2)], -1)


def random_detections(counts, queries=5, layers=3):
    """Outputs that any model might give, and a batch of images with `counts` boxes each."""
    size = (layers, len(counts), queries)
    outputs = unit.Outputs(torch.randn(*size, 20), 2 * torch.randn(*size, 5),
                           random_boxes(math.prod(size)).view(*size, 4))
    attributes = [torch.randint(-1, 6, (n, 16)) for n in counts]  # -1: padding, anywhere
    for a in attributes:
        a[1::2] = -1  # every second box has no attribute at all
    batch = unit.Batch("shapes", list(range(len(counts))), boxes=[random_boxes(n) for n in counts],
                       labels=[torch.randint(4, (n,)) for n in counts], attributes=attributes)
    return outputs, batch


# ---- Matching and losses, against slow loops written from the paper ------------------------------
def test_a_diverged_model_is_matched_and_seen_in_its_loss():
    """No error in the middle of a step, where other processes would wait for this one: any pairing
    will do, and the loss that is not finite stops the run (train.py)."""
    outputs, batch = random_detections([2])
    outputs.logits[0, 0, 0, 0] = math.nan
    *_, target = unit.match(outputs.logits, outputs.boxes, batch.labels, batch.boxes)
    assert sorted(target.tolist()) == sorted([0, 1] * len(outputs.logits))
    terms = unit.detection_losses(outputs, batch, make_model([SHAPES]).heads["shapes"])
    assert not terms["class"][0].isfinite() and terms["class"][1:].isfinite().all()


def slow_detection_losses(outputs, batch, attribute_head):
    """Section 3.4's detection losses with the weights and normalisers of DETR and BUTD, one layer,
    image and attribute after another."""
    loss = dict.fromkeys(("class", "l1", "giou", "attribute"), torch.tensor(0.0))
    num_images = len(batch)
    num_boxes = max(sum(map(len, batch.labels)), num_images)
    no_object, weight = 4, torch.tensor([1.0, 1.0, 1.0, 1.0, 0.1])  # most queries have no object
    for layer, i in itertools.product(range(len(outputs.logits)), range(num_images)):
        logits, boxes = outputs.logits[layer, i], outputs.boxes[layer, i]
        labels, targets = batch.labels[i], batch.boxes[i]
        giou = generalized_box_iou(box_convert(boxes, "cxcywh", "xyxy"),
                                   box_convert(targets, "cxcywh", "xyxy"))
        l1 = torch.cdist(boxes, targets, p=1)
        cost = 5 * l1 - 2 * giou - logits.softmax(-1)[:, labels]
        pairs = linear_sum_assignment(cost.detach())
        wanted = torch.full((len(logits),), no_object)
        wanted[pairs[0]] = labels[pairs[1]]
        mean = nn.functional.cross_entropy(logits, wanted, weight)
        loss["class"] = loss["class"] + mean / num_images
        loss["l1"] = loss["l1"] + 5 * l1[pairs].sum() / num_boxes
        loss["giou"] = loss["giou"] + 2 * (1 - giou[pairs]).sum() / num_boxes
        described = []  # an object may be large and red: half the mean over its attributes
        for query, box in zip(*pairs):
            scores = attribute_head(outputs.hidden[layer, i, query], labels[box])
            ids = [a for a in batch.attributes[i][box].tolist() if a >= 0]
            if ids:
                described.append(-0.5 * scores.log_softmax(-1)[ids].mean())
        if described:
            loss["attribute"] = loss["attribute"] + sum(described) / len(described) / num_images
    return loss


@pytest.mark.parametrize("counts", [[1], [2, 3], [4, 0, 1], [0, 0], [7]], ids=str)
def test_detection_losses(float64, counts):
    """Class, L1, GIoU and attribute loss on every decoder layer, each layer with its own matching,
    and their gradients, also without boxes and with more boxes than queries."""
    model = make_model([SHAPES])
    outputs, batch = random_detections(counts)
    inputs = [x.requires_grad_() for x in (outputs.hidden, outputs.logits, outputs.boxes)]
    terms = model.losses(outputs, batch)
    expected = slow_detection_losses(outputs, batch, model.heads["shapes"].attribute_head)
    assert terms.keys() == expected.keys()
    for name in terms:
        close(terms[name], expected[name])
    gradients, wanted = (torch.autograd.grad(sum(x.values()), inputs, materialize_grads=True)
                         for x in (terms, expected))
    for ours, theirs in zip(gradients, wanted):
        close(ours, theirs)


def test_answer_loss(float64):
    """With a single 1 among the scores, Eq. 9 is torch's cross entropy with that class: a mean over
    samples, a sum over layers. VQAv2's binary loss is for tasks with soft scores alone, and sums
    over the answers."""
    model = make_model(binary_vqa_loss=True)
    logits, classes = torch.randn(3, 4, 2), torch.tensor([0, 1, 1, 0])
    batch = unit.Batch("sentences", [0] * 4, scores=torch.eye(2)[classes])
    close(model.losses(unit.Outputs(None, logits), batch)["answer"],
          sum(nn.functional.cross_entropy(layer, classes) for layer in logits))

    logits, scores = torch.randn(3, 4, 7), torch.rand(4, 7)
    batch = unit.Batch("questions", [0] * 4, scores=scores)
    each = sum(nn.functional.binary_cross_entropy(layer.sigmoid(), scores) for layer in logits)
    close(model.losses(unit.Outputs(None, logits), batch)["answer"], 7 * each)


# ---- What enters the transformers ----------------------------------------------------------------
def test_task_vector_is_put_in_front_and_stripped(float64):
    """w^task is one more position in front of an encoder's input. It is not in the output, but that
    depends on the task. Without task embeddings there is none."""
    model = make_model().eval()
    seen = []
    hook = model.image_encoder.layers[0].register_forward_pre_hook(lambda _, x: seen.extend(x))
    model.image_encoder.transform(torch.zeros(2, 2, 16), torch.ones(2, 2, 16),
                                  torch.tensor([[False, True]] * 2), "shapes")
    hook.remove()
    x, positions, bias = seen
    close(x[:, 0], model.image_encoder.w_task["shapes"].expand(2, -1))
    assert x.shape == (2, 3, 16) and not x[:, 1:].any()
    assert positions[..., 0].tolist() == [[0, 1, 1]] * 2  # it has no position
    assert bias[:, 0, 0].tolist() == [[0, 0, -math.inf]] * 2  # and is never masked

    image = torch.randn(1, 3, 16, 24)
    one, other = (model.image_encoder(image, None, task)[0] for task in ("shapes", "questions"))
    assert one.shape == (1, 2 * 3, 20) and not torch.allclose(one, other)
    assert not make_model(task_embedding=False).image_encoder.w_task


def test_memory_is_image_then_text(float64):
    """Section 3.3: h^enc is the image, the text, or image and text in this order; of the text [CLS]
    alone, or all states of the tasks that are named."""
    images, image_mask = padded_images()
    text_mask = torch.tensor([[False] * 6, [False] * 5 + [True]])
    batch = text_batch("questions", images=images, image_mask=image_mask, text_mask=text_mask)
    model = make_model(all_text_states=("questions",)).eval()
    memory, positions, mask = model.encode(batch, QUESTIONS)
    assert memory.shape == positions.shape == (2, 4 * 5 + 6, 20)
    close(memory[:, :20], model.image_encoder(images, image_mask, "questions")[0])
    text = batch.tokens, batch.token_types, text_mask, "questions"
    close(memory[:, 20:], model.text_encoder(*text)[0])
    # The second picture's mask, at the features' resolution, and its text's last token.
    assert not mask[0].any()
    assert mask[1].tolist() == ([False] * 3 + [True] * 2) * 4 + [False] * 5 + [True]
    memory = make_model().eval().encode(batch, QUESTIONS)[0]
    assert memory.shape == (2, 4 * 5 + 1, 20)  # [CLS]


def test_positions_in_map(float64):
    """Without layers the encoder doubles its input, and so the positions that are added to it."""
    encoder = make_model(positions_in_map=True, encoder_layers=0).image_encoder
    images = torch.randn(2, 3, 24, 40)
    with_them, _, _ = encoder(images, None, "questions")
    encoder.positions_in_map = False
    without, _, _ = encoder(images, None, "questions")
    positions = unit.sine_positions(torch.ones(2, 3, 5, dtype=torch.bool), SMALL.encoder_width)
    close(with_them - without, 2 * positions @ encoder.projection.weight.T)


# ---- Decoder and queries -------------------------------------------------------------------------
def test_queries_as_input(float64):
    """With [CLS] alone attention over the memory is constant, and contents that start equal stay
    equal, whatever the queries. Where content starts at q^task they differ, in eval mode as in
    training. The first layer is computed step by step."""
    batch = text_batch()
    hidden = make_model().eval()(batch).hidden
    close(hidden, hidden[:, :, :1].expand(-1, -1, 3, -1), 1e-12)
    model = make_model(queries_as_input=True)
    hidden = model(batch).hidden
    assert (hidden[-1, :, 0] - hidden[-1, :, 1]).abs().max() > 1e-3
    close(model.eval()(batch).hidden[-1], hidden[-1])
    memory, positions, _ = model.encode(batch, model.tasks["sentences"])
    decoder, q_task = model.decoders["shared"], model.queries["sentences"].expand(2, -1, -1)
    x = decoder.layers[0](q_task, q_task, memory, memory + positions, None)
    close(decoder(memory, positions, None, q_task[0])[0], decoder.norm(x))


@pytest.mark.parametrize("shared", [True, False], ids=["shared decoder", "separate decoders"])
def test_parts_not_used_have_no_gradient(shared):
    """The optimiser skips what has no gradient (footnote 2, Appendix A), which is not the same as a
    gradient of zeros. A step on sentences leaves images, other heads, queries and vectors alone."""
    model = make_model(shared_decoder=shared)
    batch = text_batch()
    model.losses(model(batch), batch)["answer"].backward()
    with_grad = {name for name, p in model.named_parameters() if p.grad is not None}
    decoder = "shared" if shared else "sentences"
    expected = {name for name, _ in model.named_parameters()
                if name.startswith(("text_encoder.", f"decoders.{decoder}.", "heads.sentences."))
                or name == "queries.sentences"} - {"text_encoder.w_task.questions"}
    assert with_grad == expected


def test_eval_mode_gives_the_top_layer():
    """Of the outputs of every decoder layer, which training has: the same numbers."""
    model = make_model()
    images, mask = padded_images()
    batch = unit.Batch("shapes", [0, 1], images=images, image_mask=mask)
    trained, tested = model.train()(batch), model.eval()(batch)
    assert trained.logits.shape == (3, 2, 5, 5) and tested.logits.shape == (1, 2, 5, 5)
    close(tested.logits[-1], trained.logits[-1], 1e-5)
    close(tested.boxes[-1], trained.boxes[-1], 1e-5)
    assert model.train()(text_batch()).logits.shape == (1, 2, 2)
    assert make_model(loss_on_all_layers=True)(text_batch()).logits.shape == (3, 2, 2)


def test_number_of_queries():
    """Config's, by kind (Table C.1 changes all but detection's), unless the task has its own."""
    tasks = [replace(SHAPES, num_queries=0), replace(QUESTIONS, num_queries=0), SENTENCES]
    model = unit.UniT(replace(SMALL, detection_queries=6, num_queries=9), tasks)
    assert {name: len(q) for name, q in model.queries.items()} == {
        "shapes": 6, "questions": 9, "sentences": 3}
    assert [task.num_queries for task in model.tasks.values()] == [6, 9, 3]


# ---- The same as DETR ----------------------------------------------------------------------------
def copy(ours, theirs, names):
    """Weights and biases of another implementation; {a part of our names: that of theirs}."""
    found = theirs.state_dict()
    ours.load_state_dict({name: found[unit.renamed(name, names)] for name in ours.state_dict()})


def padded_images():
    """Two images, the second 32 x 24 padded to 32 x 40: images and their mask, True at padding."""
    images, mask = torch.randn(2, 3, 32, 40), torch.zeros(2, 32, 40, dtype=torch.bool)
    images[1, :, :, 24:], mask[1, :, 24:] = 0.0, True
    return images, mask


def test_encoder_decoder_and_heads_are_detrs(float64):
    """From the same picture's features on, sine positions, encoder, decoder and heads give the
    classes and boxes of transformers' DETR to 1e-9. (UniT's residual around the encoder and the two
    projections behind it are left out here.)"""
    transformers = pytest.importorskip("transformers")
    theirs = transformers.DetrForObjectDetection(transformers.DetrConfig(
        backbone_config=transformers.ResNetConfig(
            embedding_size=8, hidden_sizes=[8, 64], depths=[1, 1], out_features=["stage2"]),
        num_queries=5, num_labels=4, d_model=16, encoder_layers=2, encoder_attention_heads=2,
        encoder_ffn_dim=24, decoder_layers=3, decoder_attention_heads=2, decoder_ffn_dim=28)).eval()
    for p in theirs.parameters():
        nn.init.normal_(p, std=0.3)  # away from the initial zeros and ones, as training would be
    config = replace(SMALL, decoder_width=16, decoder_heads=2, task_embedding=False)
    encoder, decoder = unit.ImageEncoder(config, [SHAPES]).eval(), unit.Decoder(config).eval()
    head = unit.DetectionHead(16, replace(SHAPES, num_attributes=0))
    names = {"norm.": "layernorm.", "out_proj": "o_proj", "linear": "mlp.fc",
             "norm1": "self_attn_layer_norm"}
    copy(encoder.layers, theirs.model.encoder.layers,
         {"attention.": "self_attn.", **names, "norm2": "final_layer_norm"})
    copy(decoder, theirs.model.decoder,
         {"self_attention.": "self_attn.", "cross_attention.": "encoder_attn.", **names,
          "norm2": "encoder_attn_layer_norm", "norm3": "final_layer_norm"})
    copy(head, theirs, {
        "class_head": "class_labels_classifier", "box_head.0": "bbox_predictor.layers.0",
        "box_head.2": "bbox_predictor.layers.1", "box_head.4": "bbox_predictor.layers.2"})
    copy(encoder.input_proj, theirs.model.input_projection, {})

    images, mask = padded_images()
    expected = theirs(images, pixel_mask=(~mask).long())
    features, valid = theirs.model.backbone(images, ~mask)[-1]
    positions = unit.sine_positions(valid, 16)
    x = encoder.input_proj(features).flatten(2).transpose(1, 2)
    padding = ~valid.flatten(1)
    memory = encoder.transform(x, positions, padding, "shapes")
    close(memory[~padding], expected.encoder_last_hidden_state[~padding])
    hidden = decoder(memory, positions, padding, theirs.model.query_position_embeddings.weight)
    close(hidden[-1], expected.last_hidden_state)
    logits, boxes = head(hidden)
    close(logits[-1], expected.logits)
    close(boxes[-1], expected.pred_boxes)


# ---- Sizes and initial weights -------------------------------------------------------------------
def full_size(**changes):
    """The model of the eight tasks at its real size, on the meta device: shapes without memory."""
    with torch.device("meta"):
        return unit.UniT(unit.Config(**changes), unit.PAPER_TASKS)


def size(module):
    return sum(p.numel() for p in module.parameters())


def test_number_of_parameters():
    """Built as released, the model has exactly those of the published one, less what is never used
    there: BERT's pooler (590,592) and the task tables' idle rows (of 256, 4 tasks have images, 6
    have text). Section 4.2 has 201 and 532 millions."""
    unused, model = 590_592 + 252 * 256 + 250 * 768, full_size(**unit.AS_RELEASED)
    assert size(model) == 201_507_900 - unused
    assert size(full_size(shared_decoder=False, **unit.AS_RELEASED)) == 532_389_948 - unused
    assert sum(p.numel() for p in model.parameters() if not p.requires_grad) == 222_400


def test_initial_weights():
    """Xavier's bound is sqrt(6 / (rows + columns)); queries, keys and values count as one (3 d, d)
    matrix. Queries and task vectors are drawn from N(0, 1), BERT's matrices and the attribute
    head from narrower normal distributions. `attention_gain` narrows queries and keys alone."""
    model = unit.UniT(replace(SMALL, shared_decoder=False, decoder_width=60, decoder_ff=90), TASKS)
    image, text = model.image_encoder, model.text_encoder
    xavier = [(image.layers[0].attention.q_proj, 3 * 16, 16), (image.projection, 60, 16),
              (image.position_projection, 60, 16), (text.projection, 60, 12)]
    for layer in itertools.chain(*(decoder.layers for decoder in model.decoders.values())):
        xavier += [(layer.linear1, 90, 60), (layer.linear2, 60, 90)]
        for attention in (layer.self_attention, layer.cross_attention):
            projections = attention.q_proj, attention.k_proj, attention.v_proj
            xavier += [(projection, 3 * 60, 60) for projection in projections]
            xavier.append((attention.out_proj, 60, 60))
            assert not any(x.bias.any() for x in (*projections, attention.out_proj))
    for linear, rows, columns in xavier:
        bound = math.sqrt(6 / (rows + columns))
        assert 0.95 * bound < linear.weight.abs().max() <= bound
    attributes = model.heads["shapes"].attribute_head
    vectors = [*image.w_task.values(), *text.w_task.values()]
    for weight, std in (
            (torch.cat([*model.queries.values()]), 1.0), (torch.cat(vectors, 1), 1.0),
            (text.word_embeddings.weight, 1.0), (text.layers[0].linear1.weight, 12 ** -0.5),
            (attributes.linear1.weight, 0.01), (attributes.class_embedding.weight, 0.01)):
        assert abs(weight.std() / std - 1) < 0.2 and weight.abs().max() > 2 * std
    layer = unit.UniT(replace(SMALL, attention_gain=0.5), TASKS).decoders["shared"].layers[1]
    bound, attention = math.sqrt(6 / (4 * 20)), layer.cross_attention
    for linear, share in ((attention.q_proj, 0.5), (attention.k_proj, 0.5), (attention.v_proj, 1)):
        assert 0.9 * share * bound < linear.weight.abs().max() <= share * bound
    assert not attributes.linear1.bias.any() and not attributes.linear2.bias.any()


# ---- Precision, and Figure 2 ---------------------------------------------------------------------
def test_mixed_precision_spares_heads_and_losses():
    """Under autocast the transformers compute in bfloat16, whose step near 0.5 is 5 pixels of 1333.
    So detection heads and losses stay in float32: from the same states, the same numbers."""
    model = make_model([SHAPES])
    outputs, batch = random_detections([3, 2])
    head, hidden = model.heads["shapes"], outputs.hidden.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        logits, boxes = head(hidden)
        terms = model.losses(outputs, batch)
    close(logits, head(hidden.float())[0], 1e-6)
    close(boxes, head(hidden.float())[1], 1e-6)
    for name, term in model.losses(outputs, batch).items():
        close(terms[name], term, 1e-6)


@pytest.mark.parametrize("changes, millions", [
    ({}, 201), (dict(shared_decoder=False), 532),
    (dict(task_embedding=False, decoder_width=256), None),
    (dict(backbone="small", all_text_states=("vqa2",), image_size=32), None)])
def test_figure_2_alive(changes, millions, capsys):
    """Its parts' parameters add up to the model's, which Section 4.2 gives in millions."""
    flags = [f"--{name}={unit.written(value)}" for name, value in changes.items()]
    unit.main(flags)
    lines = capsys.readouterr().out.splitlines()
    parts = [int(line.split()[-1].replace(",", "")) for line in lines[1:-1]]
    count = size(full_size(**changes))
    assert sum(parts) == count and lines[-1].startswith(f"{count:,} parameters")
    assert millions is None or round(count / 1e6) == millions
    assert all(f"Eq. {n}" in "\n".join(lines) for n in range(1, 9))
