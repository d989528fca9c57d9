"""Puts the flat modules of the project on the path, so that bare `pytest` finds them too."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
# The tests run many small models: threads that wait for each other cost more than they bring.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def run_python(arguments, wait=True, expect=0, gpu=False, timeout=300, **kwargs):
    """A command as a user types it. With `wait` its output, having checked the exit status."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1",
                   "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    if not gpu:  # several processes cannot share one GPU
        environment["CUDA_VISIBLE_DEVICES"] = ""
    process = subprocess.Popen([str(a) for a in arguments], env=environment, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **kwargs)
    if not wait:
        return process
    output = process.communicate(timeout=timeout)[0]
    assert process.returncode == expect, output
    return output


@pytest.fixture(scope="session")
def small_tiny_data(tmp_path_factory):
    """The tiny data sets, a few of each, with COCO pictures without boxes among them."""
    import data
    folder = tmp_path_factory.mktemp("tiny") / "data"
    full = data.TINY_SIZES.copy()
    try:
        data.TINY_SIZES.update(coco=(48, 12), vg=(40, 8), snli_ve=(36, 12), glue=(60, 24))
        data.write_tiny(folder)
    finally:
        data.TINY_SIZES.update(full)
    path = folder / "coco/annotations/instances_train2017.json"
    content = json.loads(path.read_text())
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] % 4]
    path.write_text(json.dumps(content))
    return folder
