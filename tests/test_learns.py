"""A short training through the command line: a broken loss, mask, matcher or sampler costs it more
points than luck does."""
import json
import sys

from conftest import ROOT, run_python


def test_a_short_training_learns(tmp_path):
    """COCO's boxes and SST-2's sentences on the tiny data, in about 35 s on one core."""
    out = tmp_path / "run"
    run_python([sys.executable, ROOT / "train.py", "--tiny", "--data", tmp_path / "data", "--out", out,
                "--tasks", "coco,sst2", "--probabilities", "0.75,0.25", "--first_share", 0,
                "--iterations", 900, "--eval_every", 0])
    results = json.loads((out / "results.json").read_text())
    assert results["coco"]["AP50"] > 40
    assert results["sst2"]["accuracy"] > 95
