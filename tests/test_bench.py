"""bench.py's yardstick does the same work: the authors' way gives our outputs and gradients."""
import argparse
import functools
from dataclasses import replace

import pytest
import torch

import bench
import unit
from test_unit import QUESTIONS, SENTENCES, SHAPES, SMALL, close, make_model, random_boxes
from test_unit import float64, seed, text_batch  # noqa: F401


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


def test_their_backbone_is_our_backbone(float64):  # noqa: F811
    ours = bench.make_model(encoder_layers=1, decoder_layers=1)
    for norm in (m for m in ours.modules() if isinstance(m, unit.FrozenBatchNorm2d)):
        for values in norm.buffers():
            values.uniform_(0.5, 1.5)
    theirs = bench.authors_way(ours).image_encoder.backbone
    images = torch.randn(1, 3, 48, 64)
    close(theirs(images), ours.image_encoder.backbone(images))


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
    for number in range(4):
        rngs = [bench.np.random.default_rng(number) for _ in range(2)]
        ours, _ = bench.data.augment(bench.data.read_image(path), bench.np.zeros((0, 4)), rngs[0])
        difference = bench.data.normalise(ours) - bench.with_pil(path, rngs[1])
        assert difference.abs().max() < 0.05  # a few steps of 1/255


def test_operations_by_hand(monkeypatch):
    """A sentence of 6 tokens behind the task vector, [CLS] alone, 25 queries; 2 a product."""
    monkeypatch.setitem(bench.OFFICIAL, "qnli", dict(tokens=6))
    w, ff, d, dff, n, q = 8, 16, 4, 12, 7, 25
    config = unit.Config(bert_width=w, bert_heads=2, bert_ff=ff, bert_layers=3, vocab_size=30_000,
                         decoder_width=d, decoder_heads=2, decoder_ff=dff, decoder_layers=2)
    bert_layer = 4 * n * w * w + 2 * n * n * w + 2 * n * w * ff
    into_decoder = 2 * w * d                                  # [CLS], and its position
    self_attention = 4 * q * d * d + 2 * q * q * d
    cross_attention = 2 * q * d * d + 2 * d * d + 2 * q * d   # keys and values of one state
    head = d * d + 2 * d
    by_hand = 2 * (3 * bert_layer + into_decoder + head
                   + 2 * (self_attention + cross_attention + 2 * q * d * dff))
    forward, total, kept = bench.count(config, "qnli")
    assert forward == by_hand and 2.5 < total / forward < 3.5
    # Of three the mean, but for the position, which is projected once.
    assert bench.count(config, "qnli", (), 3)[0] * 3 == by_hand * 3 - 2 * 2 * w * d
    assert 2 < bench.count(config, "qnli", (), 3)[2] / kept < 3
    assert bench.count(config, "qnli", ("text_encoder",))[1] < total - forward / 2


def test_what_autograd_keeps_is_counted_once():
    """x * x keeps x, exp its result, which `sin` keeps again; a parameter is not counted."""
    model = torch.nn.Linear(4, 4, bias=False)
    x = torch.randn(10, 4, requires_grad=True)
    _, kept = bench.kept_by_autograd(model, lambda: model((x * x).exp().sin()))
    assert kept == 4 * (40 + 40 + 40)  # x, exp's result, sin's, which the product keeps


def test_cost_of_an_experiment(monkeypatch):
    """Table A.2's mix (0.65 of it has pictures), 64 samples, 500k iterations."""
    monkeypatch.setattr(bench, "count", lambda config, task, frozen: (
        0, 1e12 if bench.TASKS[task].image else 1e11, 0))
    found = bench.experiment_cost("T3.3")
    assert found["iteration"] == pytest.approx(64 * (0.65 * 1e12 + 0.35 * 1e11))
    assert found["total"] == pytest.approx(found["iteration"] * 500_000)
    assert found["days"]["8 V100 fp32"] == pytest.approx(
        found["total"] / (8 * 15.7e12 * 0.16 * 86400))
    # 201M parameters less what the release carries without use; 222,400 are frozen.
    assert found["parameters"] == pytest.approx(0.803, abs=0.002)
    assert found["checkpoint"] == pytest.approx(3 * 0.803, abs=0.005)
    assert found["traffic"] == pytest.approx(0.802 * 7 / 4, abs=0.005)
    frozen = bench.experiment_cost("TC.1.10")
    assert frozen["traffic"] < 0.5 * bench.experiment_cost("TC.1.9")["traffic"]


def test_the_gpu_part_runs(monkeypatch, capsys):
    """Each line of it, with the CPU in the GPU's place and everything small: its figures mean
    nothing here, but the day on which a GPU is there shall not be lost to a misprint."""
    batch = bench.make_batch
    monkeypatch.setattr(unit, "Config", lambda **changes: replace(SMALL, **changes))
    monkeypatch.setattr(bench, "make_batch", lambda task, size, image, **more: batch(
        task, size, (32, 40), **more))
    monkeypatch.setattr(bench, "CUDA", torch.device("cpu"))
    monkeypatch.setattr(bench, "gpu_busy", functools.partial(bench.gpu_busy, number=4))
    for name, value in dict(SCALES=(32,), CROP_SCALES=(40,), LONGEST=64).items():
        monkeypatch.setattr(bench.data, name, value)
    for name in ("empty_cache", "reset_peak_memory_stats", "set_sync_debug_mode"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda emulated: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla V100-SXM2-32GB")
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 2 ** 30)
    bench.gpu(argparse.Namespace(peak_tflops=None, workers=1))
    lines = capsys.readouterr().out.splitlines()
    assert "V100" in lines[1] and lines[3].startswith("the authors' way, fp32")
    rows = [line.split()[0] for line in lines if "micro-batch" in line and "% of 125" in line]
    assert rows == ["fp32,"] * 4 + ["fp16,"] * 4 + ["bf16,"] * 4
    assert lines[-2].startswith("synchronisations a step") and "GPU busy with 1" in lines[-1]
