"""The authors' weights load, and give the authors' numbers.

The numbers were recorded from the authors' system: the README.md beside the files describes them.
They are in the folder that UNIT_GOLDEN names, or in ../shared/golden. Without either, the tests
that need them are skipped; loading, fetching and hostile files are tested all the same.
"""
import argparse
import contextlib
import gzip
import io
import json
import os
import pickle
import re
import socket
import tarfile
from collections import Counter
from functools import cache
from hashlib import sha256
from pathlib import Path

import pytest
import torch
import unit  # before torchvision and transformers
from conftest import ROOT
from test_unit import SMALL as TINY
from torchvision.models import resnet50
from torchvision.models.resnet import Bottleneck, ResNet

import data
import train

GOLDEN = Path(os.environ.get("UNIT_GOLDEN") or ROOT.parent / "shared/golden")
FILES = {"shared decoder": "golden_small.pt", "separate decoders": "golden_small_separate.pt"}
CASES = ["detection_coco", "detection_visual_genome", "vqa2", "visual_entailment", "glue_qnli",
         "glue_mnli_mismatched", "glue_qqp", "glue_sst2", "detection_coco_empty_image"]
OURS = {their_name: name for name, (_, their_name, _) in unit.RELEASED_TASKS.items()}
TERMS = {"class": "loss_ce", "l1": "loss_bbox", "giou": "loss_giou", "attribute": "loss_attr"}


def golden_file(name):
    if not (GOLDEN / name).exists():
        pytest.skip(f"no {name} in {GOLDEN} (UNIT_GOLDEN can name another folder)")
    return GOLDEN / name


@cache
def golden(name):
    return torch.load(golden_file(name), weights_only=True)


def close(ours, theirs, tolerance=1e-4):
    torch.testing.assert_close(ours.detach(), theirs, atol=tolerance, rtol=0)


# ---- The authors' numbers ------------------------------------------------------------------------
class NarrowBottleneck(Bottleneck):
    expansion = 1


# Of the small files: classes and queries of each task, and Config's fields.
SIZES = dict(coco=(5, 9), vg=(7, 8), vqa2=(11, 5), snli_ve=(3, 4), qnli=(2, 3), mnli=(3, 3),
             qqp=(2, 3), sst2=(2, 2))
SMALL = dict(encoder_width=32, encoder_heads=4, encoder_ff=64, encoder_layers=2, bert_width=40,
             bert_heads=4, bert_ff=64, bert_layers=2, vocab_size=100, max_positions=40,
             decoder_width=48, decoder_heads=4, decoder_ff=64, decoder_layers=2, dropout=0.0)


@contextlib.contextmanager
def small_release():
    """Models of the small files' sizes in place of the published ones', with the one part that is
    not the authors': a narrow and short backbone."""
    tasks = [unit.replace(task, num_classes=SIZES[task.name][0], num_queries=SIZES[task.name][1],
                          num_attributes=6 * (task.name == "vg")) for task in unit.PAPER_TASKS]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(unit, "PAPER_TASKS", tasks)
        patch.setattr(unit, "AS_RELEASED", unit.AS_RELEASED | SMALL)
        patch.setattr(unit, "ResNet", lambda block, layers, **settings: ResNet(
            NarrowBottleneck, [1, 1, 1, 2], width_per_group=4, **settings))
        yield


@cache
def authors_model(name):
    with small_release():
        return unit.load_released(golden_file(name))


@pytest.fixture(params=FILES.values(), ids=FILES)
def file(request):
    return golden_file(request.param).name


@pytest.fixture
def model(file):
    """In training mode, whose dropout is 0 here, outputs are those of every layer."""
    model = authors_model(file).train()
    model.zero_grad(set_to_none=True)
    return model


def to_batch(given, model, sample=None):
    """A case's two samples padded to one size, or one of them as it is."""
    pick = slice(None) if sample is None else slice(sample, sample + 1)
    batch = unit.Batch(task=OURS[given["dataset_name"]], ids=[0, 1][pick])
    targets = given["targets"][pick]
    if "images" in given and sample is None:
        batch.images, batch.image_mask = given["images_padded"], given["images_mask"]
    elif "images" in given:
        batch.images = given["images"][sample][None]
    if "input_ids" in given:
        batch.tokens, batch.token_types = given["input_ids"][pick], given["segment_ids"][pick]
        batch.text_mask = given["input_mask"][pick] == 0
    if given["task_type"] == "detection":
        batch.sizes = given["orig_size"][pick]
        batch.boxes, batch.labels = [t["boxes"] for t in targets], [t["labels"] for t in targets]
        if "attributes" in targets[0]:
            batch.attributes = [t["attributes"] for t in targets]
    elif targets.is_floating_point():
        batch.scores = targets
    else:  # the right class, as a single 1
        batch.scores = torch.eye(model.tasks[batch.task].num_classes)[targets]
    return batch


@pytest.mark.parametrize("name", CASES)
def test_forward(file, model, name):
    """From the backbone's features to answers and detections, for two padded samples."""
    case = golden(file)["cases"][name]
    batch, theirs = to_batch(case["input"], model), case["output"]
    task = model.tasks[batch.task]
    if task.image:
        close(model.image_encoder.backbone(batch.images), theirs["backbone_features"])
    if task.text:
        text = batch.tokens, batch.token_types, batch.text_mask
        states = model.text_encoder.bert(*text, task.name)
        close(states, theirs["bert_encoder_output"][:, 1:])           # without the task vector
    memory, positions, mask = model.encode(batch, task)
    close(memory, theirs["decoder_memory"].transpose(0, 1))
    close(positions.expand_as(memory), theirs["decoder_memory_pos"].transpose(0, 1))
    their_mask = theirs["decoder_memory_mask"]
    assert not their_mask.any() if mask is None else torch.equal(mask, their_mask)
    outputs = model(batch)
    close(outputs.hidden, theirs["decoder_hidden_states"])            # every layer
    if task.kind == "detection":
        close(outputs.logits, theirs["pred_logits"])
        close(outputs.boxes, theirs["pred_boxes"])
        found = unit.postprocess(model, outputs, batch)
        for i, (ours, their) in enumerate(zip(found, theirs["postprocess"], strict=True)):
            assert torch.equal(ours.labels, their["labels"])
            close(ours.scores, their["scores"])
            close(ours.boxes, their["boxes"], 1e-4 * batch.sizes.max().item())  # pixels
            if "attr_labels" in their:
                assert torch.equal(ours.attributes, their["attr_labels"])
    else:
        close(outputs.logits[-1], theirs["scores"])


def packed(name):
    """Our parameter's key in the files, where queries, keys and values are one packed matrix and
    the tasks' vectors one table."""
    key = re.sub(r"[qkv]_proj\.", "in_proj_", unit.released_key(name))
    return re.sub(r"^(task_embeddings_\w+)\..*", r"\1.weight", key)


def short(key):
    """A key without the prefix that our loader leaves out."""
    return next(iter(unit.unpack_released({key: torch.zeros(3, 3)})))


@pytest.mark.parametrize("name", CASES)
def test_losses_and_gradients(file, model, name):
    """As the paper trained: one sample a process, boxes (at least 1 a process) counted over both,
    gradients averaged. Ours add up to the batch's mean, so each of ours is half of theirs."""
    case = golden(file)["cases"][name]
    given, theirs = case["input"], case["two_ranks"]
    detection = given["task_type"] == "detection"
    boxes = sum(len(t["labels"]) for t in given["targets"]) if detection else None
    for sample, rank in enumerate(theirs["ranks"]):
        batch = to_batch(given, model, sample)
        outputs = model(batch)
        terms = model.losses(outputs, batch, batch_size=2, num_boxes=boxes)
        for term, value in terms.items():                             # weighted, all layers
            weighted = [v.item() for n, v in rank["losses_weighted"].items()
                        if n.startswith(TERMS.get(term, "loss_0"))]
            assert 2 * value.item() == pytest.approx(sum(weighted), rel=1e-5, abs=0), term
        loss = sum(terms.values())
        assert 2 * loss.item() == pytest.approx(rank["total_loss"].item(), rel=1e-5)
        loss.backward()
    squares, norms = Counter(), theirs["grad_norms"]
    for parameter, p in model.named_parameters():
        if p.grad is not None:
            squares[packed(parameter)] += p.grad.double().square().sum().item()
    assert set(squares) == set(map(short, norms))  # no gradient where they have none
    zero = set(map(short, case["output"]["grads_mathematically_zero"]))
    for key, norm in norms.items():
        allowed = dict(rel=0, abs=1e-4) if short(key) in zero else dict(rel=1e-3, abs=0)
        assert squares[short(key)] ** 0.5 == pytest.approx(norm, **allowed), key


def tiny_model(*names, **changes):
    sizes = dict(bert_width=24, bert_heads=2, bert_ff=32, vocab_size=50, max_positions=20,
                 backbone="resnet50") | changes
    return unit.UniT(unit.replace(TINY, **sizes), [t for t in data.TASKS if t.name in names])


# ---- The published layouts at full size ----------------------------------------------------------
def published():
    """The keys of the shared-decoder model, with zeros: all of one element, for a small file."""
    text = golden_file("released_keys.txt").read_text().split("# DETR")[0]
    state = {}
    for key, shape in re.findall(r"^([^#\s]+)\t\((.*?),?\)", text, re.MULTILINE):
        state[key] = torch.zeros(()).expand(json.loads(f"[{shape}]"))
    return state


# Keys of the files that we do not use: BERT's pooler, counters, constants of the losses, tables
# that are read row by row, packed matrices, and the same tensors under second names.
UNUSED = re.compile(r"\.pooler\.|position_ids|num_batches_tracked|empty_weight|^task_embeddings_"
                    r"|in_proj_|^bert_model\.embeddings\.|^decoders\.\w+\.\w+\.\w")


def test_full_size(tmp_path):
    """The eight-task checkpoint: nothing is missing or left over, except what UNUSED lists."""
    state = published()
    torch.save(state, tmp_path / "unit.pth")
    model = unit.load_released(tmp_path / "unit.pth")
    assert not model.training and model.config == unit.Config(**unit.AS_RELEASED)
    assert list(model.tasks) == [task.name for task in data.TASKS]
    assert all(not p.any() for p in model.parameters())               # all were filled
    used = set(map(unit.released_key, model.state_dict()))
    left = unit.unpack_released(state).keys() - used
    assert left and all(UNUSED.search(key) for key in left)


@pytest.mark.parametrize("task_embedding", [True, False], ids=["", "without task embedding"])
def test_full_size_single_task(tmp_path, task_embedding):
    """The COCO checkpoint has one (separate) decoder, and a text encoder that nothing uses. As an
    archive, with the prefixes that some files have, nested under a key."""
    others = "visual_genome|vqa2|visual_entailment|glue_"
    state = {"module." + key.replace("unit_base_model.", "detr_model."): zeros
             for key, zeros in published().items()
             if not re.search(others + r"|\.transformer\.decoder\.", key)
             and (task_embedding or "task_embeddings" not in key)}
    torch.save({"model": state, "best_update": 150_000}, tmp_path / "coco.pth")
    with tarfile.open(tmp_path / "unit.coco.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "coco.pth", "unit.coco/coco.pth")
        archive.addfile(tarfile.TarInfo("unit.coco/config.yaml"))
    model = unit.load_released(tmp_path / "unit.coco.tar.gz")
    assert list(model.tasks) == list(model.decoders) == ["coco"] and model.text_encoder is None
    assert model.config == unit.Config(shared_decoder=False, task_embedding=task_embedding,
                                       **unit.AS_RELEASED)
    assert sorted(os.listdir(tmp_path)) == ["coco.pth", "unit.coco.tar.gz"]


@pytest.mark.parametrize("key, tensors, message", [
    ("bert_projection.bias", {}, "bert_projection.bias is missing"),
    ("class_embeds.detection_coco.bias", {"class_embeds.detection_coco.bias": torch.zeros(4)},
     r"class_embeds.detection_coco.bias is \(4,\)")])
def test_what_does_not_fit_is_named(tmp_path, key, tensors, message):
    state = dict(golden("golden_small.pt")["state_dict"])
    del state[key]
    torch.save(state | tensors, tmp_path / "unit.pth")
    with small_release(), pytest.raises(unit.InputError, match=f"unit.pth: {message}"):
        unit.load_released(tmp_path / "unit.pth")


# ---- Training that starts from them (--init) -----------------------------------------------------
def untrained(file, **changes):
    theirs = authors_model(file)
    torch.manual_seed(9)
    with small_release():
        return unit.UniT(unit.replace(theirs.config, **changes), [*theirs.tasks.values()])


def start(model, file, parts=(), as_released=False, path=None):
    with small_release():
        return train.initialise_from(model, path or GOLDEN / file, parts, as_released)


@pytest.mark.parametrize("part", ["", *train.PARTS])
def test_init(file, part):
    """All, or the named part, become the authors'; no other part changes."""
    model, theirs = untrained(file), authors_model(file).state_dict()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    said = start(model, file, (part,) if part else ())
    for name, x in model.state_dict().items():
        assert torch.equal(x, theirs[name] if name.startswith(part) else before[name]), name
    assert "the authors' weights" in said and "left as they were: none" in said


def test_init_as_in_the_paper_drops_what_the_paper_lacks():
    """Eq. 8 has no LayerNorm: the released one's is dropped, and said."""
    said = start(untrained("golden_small.pt", classifier_norm=False), "golden_small.pt")
    assert "dropped: heads.vqa2 2, heads.snli_ve 2, heads.qnli 2" in said


@pytest.mark.parametrize("as_released", [False, True])
@pytest.mark.parametrize("shared", [True, False])
def test_init_from_the_single_task_file(tmp_path, shared, as_released):
    """Its one decoder, a separate one, starts a shared decoder or each of several; as released, of
    several only COCO's."""
    file, path = "golden_small_separate.pt", tmp_path / "unit.tar.gz"
    others = "visual_genome|vqa2|visual_entailment|classifiers|decoders.glue"
    state = {k: v for k, v in golden(file)["state_dict"].items() if not re.search(others, k)}
    path.write_bytes(archive_of(("unit/coco.pth", saved({"model": state}))))
    coco = authors_model(file).decoders["coco"].state_dict()
    model = untrained(file, shared_decoder=shared)
    before = {n: x.clone() for n, x in model.state_dict().items()}
    start(model, file, ("decoder",), as_released, path)
    for owner, decoder in model.decoders.items():
        taken = not as_released or owner in ("shared", "coco")
        for name, x in decoder.state_dict().items():
            old = before[f"decoders.{owner}.{name}"]
            assert torch.equal(x, coco[name] if taken else old), (owner, name)


def test_init_from_strangers(tmp_path):
    torch.save({"conv1.weight": torch.zeros(1)}, tmp_path / "resnet.pth")
    with pytest.raises(unit.InputError, match="resnet.pth: not a model of the authors'"):
        train.initialise_from(tiny_model("coco"), tmp_path / "resnet.pth", (), False)


# ---- BERT and the backbone, as others publish them -----------------------------------------------
def random_bert():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    bert = transformers.BertForPreTraining(transformers.BertConfig(
        vocab_size=50, hidden_size=24, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=20, attn_implementation="eager")).eval()
    for p in bert.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return bert


def write_safetensors(path, tensors, **metadata):
    """The format by hand: our reader is tested against its text, not against our own writer."""
    header, blob = {"__metadata__": metadata}, b""
    for name, tensor in tensors.items():
        content = tensor.numpy().tobytes()
        dtype = {torch.float32: "F32", torch.int64: "I64"}[tensor.dtype]
        header[name] = entry(len(blob), len(blob) + len(content), tensor.shape, dtype)
        blob += content
    path.write_bytes(safetensors(header)[:-16] + blob)


def old_names(state):
    """As google-bert published it: gamma, beta, the pretraining model's prefix and heads."""
    return {key.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
        "LayerNorm.bias", "LayerNorm.beta"): value for key, value in state.items()}


def new_names(state):
    """As re-saved by BertModel: no prefix, no heads, with position ids."""
    return {key.removeprefix("bert."): value for key, value in state.items()
            if key.startswith("bert.")} | {"embeddings.position_ids": torch.arange(20)[None]}


@pytest.mark.parametrize("kind", ["old bin", "old zip", "new bin", "new safetensors"])
def test_bert(tmp_path, kind):
    """Every published layout of BERT gives the hidden states of transformers' BertModel, with texts
    of unequal length in one batch. In double precision, where LayerNorm's epsilon shows."""
    bert = random_bert()
    state = {k: v.clone() for k, v in bert.state_dict().items()}
    path = tmp_path / "pytorch_model.bin"
    if kind.startswith("old"):
        torch.save(old_names(state), path, _use_new_zipfile_serialization=kind == "old zip")
    elif kind == "new bin":
        torch.save(new_names(state), path)
    else:
        path = tmp_path / "model.safetensors"
        write_safetensors(path, new_names(state), format="pt")
    (tmp_path / "config.json").write_text(bert.config.to_json_string())
    model = tiny_model("sst2", **unit.bert_config(tmp_path), task_embedding=False)
    unit.load_bert(model, path)
    projection = model.text_encoder.projection.weight  # released: nn.Linear's start, not Xavier's
    assert 0.9 < projection.abs().max() * projection.shape[1] ** 0.5 <= 1
    tokens, types = torch.randint(50, (3, 9)), torch.randint(2, (3, 9))
    mask = torch.arange(9) >= torch.tensor([9, 5, 7])[:, None]
    expected = bert.double().bert(tokens, (~mask).long(), types).last_hidden_state.detach()
    states = model.eval().double().text_encoder.bert(tokens, types, mask, "sst2")
    close(states[~mask], expected[~mask], 1e-9)


def test_bert_config(tmp_path):
    assert unit.bert_config(tmp_path) == {}
    given = dict(hidden_size=24, num_attention_heads=3, intermediate_size=32, num_hidden_layers=2,
                 vocab_size=50, max_position_embeddings=20, hidden_act="gelu", layer_norm_eps=1e-12)
    config = tmp_path / "config.json"
    config.write_text(json.dumps(given))
    assert unit.bert_config(tmp_path) == dict(bert_width=24, bert_heads=3, bert_ff=32,
                                              bert_layers=2, vocab_size=50, max_positions=20)
    for text, message in ((json.dumps(given | {"hidden_act": "relu"}), "hidden_act is relu, not"),
                          (json.dumps(given | {"hidden_size": "wide"}), "not BERT's settings"),
                          ("[1]", "not BERT's settings"), ("{", "not BERT's settings")):
        config.write_text(text)
        with pytest.raises(unit.InputError, match=message):
            unit.bert_config(tmp_path)


@pytest.mark.parametrize("change, message", [
    (dict(vocab_size=60), r"embeddings.word_embeddings.weight is \(50, 24\), .* \(60, 24\)"),
    (dict(bert_layers=1), r"encoder.layer.1.* fit nowhere"),
    (dict(bert_layers=3), r"encoder.layer.2.* is missing")])
def test_bert_of_other_sizes_is_refused_whole(tmp_path, change, message):
    """Nothing is loaded by half: the model is as it was."""
    torch.save(old_names(random_bert().state_dict()), tmp_path / "pytorch_model.bin")
    model = tiny_model("sst2", **change)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    with pytest.raises(unit.InputError, match=message):
        unit.load_bert(model, tmp_path / "pytorch_model.bin")
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())


@pytest.mark.parametrize("source", ["torchvision", "DETR"])
def test_backbone(tmp_path, source):
    """Features are those of torchvision's ResNet-50 with the last stride replaced by dilation (1/16
    of the image), from its file or DETR's, which has more keys, and flags. All learns except conv1,
    layer1 and batch norms (which are buffers), also in training mode."""
    torch.manual_seed(0)
    theirs = resnet50(replace_stride_with_dilation=[False, False, True]).eval()
    for name, buffer in theirs.named_buffers():
        if "running" in name:
            torch.nn.init.uniform_(buffer, 0.5, 1.5)
    content = theirs.state_dict()
    if source == "DETR":
        rest = {f"{key}.weight": torch.zeros(1) for key in (
            "transformer.norm", "class_embed", "bbox_embed.0", "query_embed", "input_proj")}
        body = {f"backbone.0.body.{key}": x for key, x in content.items() if key[:2] != "fc"}
        content = {"model": body | rest, "args": argparse.Namespace(lr=1e-4)}
    torch.save(content, tmp_path / "backbone.pth", _use_new_zipfile_serialization=False)
    model = tiny_model("coco")
    unit.load_backbone(model, tmp_path / "backbone.pth")
    image, backbone = torch.randn(1, 3, 64, 96), model.image_encoder.backbone.train()
    theirs.avgpool = theirs.fc = torch.nn.Identity()
    features, expected = backbone(image), theirs(image)
    assert features.shape == (1, 2048, 4, 6)
    torch.testing.assert_close(features.flatten(1), expected, atol=1e-4, rtol=1e-4)
    features.square().mean().backward()
    for name, p in backbone.body.named_parameters():
        assert (p.grad is None) == name.startswith(("conv1", "layer1")), name
    with torch.inference_mode():
        torch.testing.assert_close(backbone(image), features)         # channels last


# ---- Downloads -----------------------------------------------------------------------------------
def test_download(tmp_path, monkeypatch):
    """By torch's own downloader from a shelf of this machine: refused where the hash is another,
    then put into the data folder, once. Only published files can be had."""
    shelf, path, content = tmp_path / "shelf", tmp_path / "bert/vocab.txt", b"piece\n" * 1000
    published = shelf.as_uri(), sha256(content).hexdigest()
    monkeypatch.setitem(unit.PUBLISHED, "vocab.txt", published)
    shelf.write_bytes(b"something else")
    with pytest.raises(unit.InputError, match="invalid hash"):
        unit.download(path)
    assert os.listdir(path.parent) == []
    shelf.write_bytes(content)
    unit.download(path)
    assert path.read_bytes() == content and os.listdir(path.parent) == ["vocab.txt"]
    monkeypatch.setattr(torch.hub, "download_url_to_file", None)      # not called again
    unit.download(path)
    with pytest.raises(unit.InputError, match="no such file"):
        unit.download(tmp_path / "mine.pth")


def offline(*args, **kwargs):
    raise OSError("no route to host")


@pytest.mark.parametrize("name", unit.PUBLISHED)
def test_download_without_a_net(tmp_path, monkeypatch, name):
    """The message says where the file is, how to know it, and where to put it."""
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(unit.InputError) as error:
        unit.download(tmp_path / name)
    url, digest = unit.PUBLISHED[name]
    for part in (str(tmp_path / name), url, digest, "no route to host", "put it there"):
        assert part in str(error.value)
    assert url.endswith("/" + name) and re.fullmatch("[0-9a-f]{8}|[0-9a-f]{64}", digest)


def test_download_gives_up_on_silence(tmp_path, monkeypatch):
    """A server that says nothing does not hang a run; the setting is put back."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(unit, "TIMEOUT", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"http://127.0.0.1:{server.getsockname()[1]}/vocab.txt"
        monkeypatch.setitem(unit.PUBLISHED, "vocab.txt", (address, "00"))
        with pytest.raises(unit.InputError, match="timed out"):
            unit.download(tmp_path / "vocab.txt")
    assert socket.getdefaulttimeout() is None and not list(tmp_path.iterdir())


def test_load_pretrained(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    model, bert = tiny_model("coco", "sst2"), random_bert()
    for line, file in zip(unit.load_pretrained(model, tmp_path),
                          ("model.safetensors", "detr-r50-dc5-f0fb7ef5.pth"), strict=True):
        assert f"{file}: not there" in line and line.startswith("WARNING") and "RANDOM" in line
    torch.save(old_names(bert.state_dict()), tmp_path / "bert" / "pytorch_model.bin")
    torch.save(resnet50().state_dict(), tmp_path / "resnet50-0676ba61.pth")
    lines = unit.load_pretrained(model, tmp_path, imagenet=True)
    for line, file in zip(lines, ("pytorch_model.bin", "resnet50-0676ba61.pth"), strict=True):
        assert file in line and "RANDOM" not in line
    words = bert.state_dict()["bert.embeddings.word_embeddings.weight"]
    assert torch.equal(model.text_encoder.word_embeddings.weight, words)
    assert len(unit.load_pretrained(tiny_model("sst2"), tmp_path)) == 1
    assert len(unit.load_pretrained(tiny_model("coco", "sst2", backbone="small"), tmp_path)) == 2


# ---- Hostile files: a clear error, no code run, nothing written ----------------------------------
class Bomb:
    """A pickle of this would create a file where it is loaded."""

    def __reduce__(self):
        return open, ("trap", "w")


def safetensors(header):
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(16)


def entry(start, stop, shape=(2,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, stop]}


def archive_of(*members):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def saved(thing):
    buffer = io.BytesIO()
    torch.save(thing, buffer)
    return buffer.getvalue()


GOOD = saved({"a": torch.arange(1000.0)})
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 440473133\n"
DAMAGED = "cut short, damaged, or not weights"
HOSTILE = {  # name: content, what the error says
    "code.pth": (saved({"a": Bomb()}), "run code"),
    "namespace.pth": (saved({"a": argparse.Namespace()}), "argparse.Namespace"),
    "list.pth": (saved([torch.zeros(1)]), "no weights"),
    "values.pth": (saved({"a": torch.zeros(1), "b": 3}), "or more than weights"),
    "short.pth": (GOOD[:len(GOOD) // 2], DAMAGED),
    "short.tar.gz": (archive_of(("m.pth", os.urandom(5000)))[:3000], "cut short"),
    "pickle.bin": (pickle.dumps({"a": 1}, protocol=4), DAMAGED),
    "pytorch_model.bin": (POINTER, "a Git LFS pointer.* again from https://.*/pytorch_model.bin$"),
    "pointer.safetensors": (POINTER, "Git LFS pointer: `git lfs pull`"),
    "page.pth": (b"\n<!DOCTYPE html><title>Sign in</title>", "a web page"),
    "error.bin": (b'{"error": "Entry not found"}', "it begins with .*Entry not found"),
    "empty.pth": (b"", "an empty file"),
    "zipped.bin": (gzip.compress(GOOD), "a gzip file: .* not unpacked"),
    "two.tar.gz": (archive_of(("m.pth", GOOD), ("n.pth", GOOD)), "holds 2 checkpoints"),
    "none.tar.gz": (archive_of(("m.txt", GOOD)), "holds 0 checkpoints"),
    "long.safetensors": (b"\xff" * 24, DAMAGED),
    "deep.safetensors": ((10 ** 5).to_bytes(8, "little") + b"[" * 10 ** 5, DAMAGED),
    "header.safetensors": (safetensors({"a": entry(0, 16, (4,))})[:40], DAMAGED),
    "overlap.safetensors": (safetensors({"a": entry(0, 8), "b": entry(4, 12)}), "b is at 4..12"),
    "gap.safetensors": (safetensors({"a": entry(0, 4, (1,)), "b": entry(8, 16)}), "b is at 8..16"),
    "outside.safetensors": (safetensors({"a": entry(0, 24, (6,))}), "a is at 0..24 of 16 bytes"),
    "shape.safetensors": (safetensors({"a": entry(0, 16, (5,))}), DAMAGED),
    "type.safetensors": (safetensors({"a": entry(0, 16, (4,), "F99")}), DAMAGED),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files(tmp_path, monkeypatch, name):
    content, message = HOSTILE[name]
    monkeypatch.chdir(tmp_path)
    Path(name).write_bytes(content)
    with pytest.raises(unit.InputError, match=f"{name}: .*{message}") as error:
        unit.read_weights(name)
    assert "\n" not in str(error.value)
    assert "weights_only" not in str(error.value)  # PyTorch's advice on loading it all the same
    assert os.listdir() == [name]                  # no trap


def test_texts_that_are_none(tmp_path):
    """The same rule for texts, whether their bytes are letters or not."""
    for content, says in ((POINTER, "a Git LFS pointer"), (gzip.compress(b"[CLS]"), "a gzip file")):
        (tmp_path / "vocab.txt").write_bytes(content)
        with pytest.raises(unit.InputError, match=f"vocab.txt: {says}"):
            data.read_vocabulary(tmp_path / "vocab.txt")


def test_detr_may_keep_its_flags_and_nothing_else(tmp_path, monkeypatch):
    """Only load_backbone admits argparse.Namespace; what a Namespace holds is not admitted."""
    monkeypatch.chdir(tmp_path)
    torch.save({"model": {}, "args": argparse.Namespace(x=Bomb())}, "detr.pth")
    with pytest.raises(unit.InputError, match="run code"):
        unit.load_backbone(tiny_model("coco"), Path("detr.pth"))
    assert os.listdir() == ["detr.pth"]


def test_safetensors_types(tmp_path):
    """Every type that the format and PyTorch share; scalars, empty tensors."""
    path, sizes = tmp_path / "x.safetensors", dict(F64=8, F32=4, F16=2, BF16=2, I64=8, I32=4, I16=2,
                                                   I8=1, U8=1, BOOL=1)
    for dtype, size in sizes.items():
        path.write_bytes(safetensors({"a": entry(0, 16 - size, (16 // size - 1,), dtype),
                                      "none": entry(16 - size, 16 - size, (0, 4), dtype),
                                      "scalar": entry(16 - size, 16, (), dtype)}))
        found = unit.read_weights(path)
        assert [found[name].tolist() for name in ("none", "scalar")] == [[], 0], dtype
        assert found["a"].tolist() == [0] * (16 // size - 1)
