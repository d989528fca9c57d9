"""bench.py's yardstick does the same work: the authors' way gives our outputs and gradients."""
from dataclasses import replace

import pytest
import torch

import bench
import unit
from test_unit import QUESTIONS, SENTENCES, SHAPES, close, float64, make_model, seed  # noqa: F401
from test_unit import random_boxes, text_batch


def batches():
    """A detection batch of two padded pictures, a question about each, two sentences."""
    images, mask = torch.randn(2, 3, 40, 48), torch.zeros(2, 40, 48, dtype=torch.bool)
    mask[1, :, 32:] = True
    pictures = dict(images=images, image_mask=mask)
    hidden = torch.arange(6) >= torch.tensor([[6], [4]])  # the second text is shorter
    return [unit.Batch(SHAPES.name, [0, 1], **pictures, boxes=[random_boxes(3), random_boxes(7)],
                       labels=[torch.randint(4, (3,)), torch.randint(4, (7,))],
                       attributes=[torch.randint(-1, 6, (n, 16)) for n in (3, 7)]),
            text_batch(QUESTIONS.name, text_mask=hidden, **pictures),
            text_batch(SENTENCES.name, text_mask=hidden)]


def gradients(model, batch) -> dict:
    """The losses, and the gradients under our names, in eval or training mode."""
    model.zero_grad()
    losses = model.losses(model(batch), batch)
    sum(losses.values()).backward()
    found = dict(losses)
    for name, p in model.named_parameters():
        if p.grad is None:
            continue
        if "in_proj_" in name:  # queries, keys and values on top of each other
            for part, grad in zip("qkv", p.grad.chunk(3)):
                found[name.replace("attention.in_proj_", f"{part}_proj.")] = grad
        else:
            found[name.replace("attention.attention.", "attention.")] = p.grad
    return found


def test_the_authors_way_is_the_same_work(float64, monkeypatch):  # noqa: F811
    ours = make_model()
    theirs = bench.authors_way(ours)
    assert not any(isinstance(m, unit.Attention) for m in theirs.modules())
    for batch in batches():
        for mode in (True, False):
            ours.train(mode), theirs.train(mode)
            with torch.no_grad():
                a, b = ours(batch), theirs(batch)
            close(a.logits, b.logits)
            assert a.boxes is None or torch.allclose(a.boxes, b.boxes, rtol=0, atol=1e-9)
        ours.train(), theirs.train()
        expected = gradients(ours, batch)
        with monkeypatch.context() as patch:
            patch.setattr(unit, "match", bench.authors_match)
            found = gradients(theirs, batch)
        assert found.keys() == expected.keys()
        for name in expected:
            close(found[name], expected[name], 1e-8)


def test_their_step_is_our_step(float64):  # noqa: F811
    """train.update with either optimiser: the same weights, but where all of a gradient is zero."""
    ours, batch = make_model(), batches()[0]
    theirs, before = bench.authors_way(ours), ours(batch).logits
    for model, authors in ((ours, False), (theirs, True)):
        step = bench.trainer(model, batch, authors, lr=1e-3)
        step(), step()
    a, b = ours(batch).logits, theirs(batch).logits
    assert (a - before).abs().max() > 1e-3  # the steps did something
    close(a, b, 1e-6)


def test_pictures_are_the_same_as_with_pil(tmp_path):
    [path] = bench.write_pictures(tmp_path, 1)
    boxes = bench.np.zeros((0, 4))
    for seed_ in range(4):
        rngs = [bench.np.random.default_rng(seed_) for _ in range(2)]
        ours = bench.data.augment(bench.data.read_image(path), boxes, rngs[0])[0]
        difference = bench.data.normalise(ours) - bench.with_pil(path, boxes, rngs[1])
        assert difference.abs().max() < 0.05  # a few steps of 1/255
