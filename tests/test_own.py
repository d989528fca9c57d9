"""Other people's data: a real pretrained text encoder (skipped where ../shared is absent)."""
import json
import sys

import pytest
import torch
from conftest import ROOT, run_python

import data
import unit
from unit import Config, UniT

REALDATA = ROOT.parent / "shared/realdata"
MINILM, REVIEWS = REALDATA / "minilm", REALDATA / "own_text/glue/SST-2"
needs_minilm = pytest.mark.skipif(not (MINILM.exists() and REVIEWS.exists()),
                                  reason="needs ../shared/realdata")


@needs_minilm
def test_states_of_real_weights_are_transformers():
    """On 50 real sentences, padded to one length: what the decoder would see of BERT."""
    transformers = pytest.importorskip("transformers")
    theirs = transformers.BertModel.from_pretrained(MINILM, attn_implementation="eager").eval()
    task, = [t for t in data.TASKS if t.name == "sst2"]
    sizes = dict(decoder_width=32, decoder_layers=1, decoder_ff=32, task_embedding=False)
    ours = UniT(Config(**unit.bert_config(MINILM), **sizes), [task]).eval()
    unit.load_bert(ours, MINILM / "model.safetensors")
    lines = data.read_lines(REVIEWS / "dev.tsv")[1:51]
    tokenizer = data.Tokenizer(MINILM / "vocab.txt")
    encoded = [tokenizer.encode(line.split("\t")[0]) for line in lines]
    tokens, mask = data.pad([torch.tensor(ids) for ids, _ in encoded])
    types = torch.zeros_like(tokens)
    with torch.no_grad():
        found = ours.text_encoder.bert(tokens, types, mask, task.name)
        wanted = theirs(tokens, (~mask).long(), types).last_hidden_state
    assert mask.any() and wanted.std() > 0.1
    torch.testing.assert_close(found[~mask], wanted[~mask], rtol=0, atol=1e-5)


@needs_minilm
def test_fine_tuning_of_real_weights(tmp_path):
    """25 iterations through the command line: 15 points above the majority (50.9 on all of dev)."""
    for source, target in ((MINILM, "bert"), (REVIEWS, "glue/SST-2")):
        (tmp_path / target).parent.mkdir(exist_ok=True)
        (tmp_path / target).symlink_to(source)
    run_python([sys.executable, ROOT / "train.py", "--data", tmp_path, "--out", tmp_path / "run",
                "--tasks", "sst2", "--all_text_states", "sst2", "--decoder_width", 96,
                "--decoder_ff", 96, "--decoder_layers", 1, "--num_queries", 1, "--dropout", 0,
                "--batch_size", 16, "--iterations", 30, "--warmup", 3, "--lr", "3e-4", "--clip", 1,
                "--num_workers", 0, "--eval_samples", 200, "--threads", 1])
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert results["sst2"]["accuracy"] >= 66
