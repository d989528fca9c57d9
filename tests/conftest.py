"""Puts the flat modules of the project on the path, so that bare `pytest` finds them too."""
import json
import multiprocessing
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

# The tests run many small models: threads that wait for each other cost more than they bring, and
# processes that fork behind a parent's threads may wait for ever. So before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest  # noqa: E402
import torch  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


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


class Forked:
    """main(arguments) in forked processes, with the environment that torchrun sets if there are
    several. Much faster than commands, as nothing is imported again; `first()` is called before.
    What all of them print is read from `stdout`."""

    def __init__(self, main, arguments, processes=1, first=None):
        read, write = os.pipe()
        with socket.create_server(("127.0.0.1", 0)) as server:
            ranks = dict(WORLD_SIZE=str(processes), MASTER_ADDR="127.0.0.1",
                         MASTER_PORT=str(server.getsockname()[1]))
        self.processes = []
        for rank in range(processes):
            environment = ranks | dict(RANK=str(rank), LOCAL_RANK=str(rank))
            self.processes.append(multiprocessing.get_context("fork").Process(
                target=run_child, args=(main, [str(x) for x in arguments], write, first,
                                        environment if processes > 1 else {})))
            self.processes[-1].start()
        os.close(write)
        self.stdout = open(read, errors="replace")

    def wait(self, *expected, timeout=120):
        """What was printed (and not read yet), once all have ended with the `expected` exit status
        (default 0)."""
        alarm = threading.Timer(timeout, lambda: [process.kill() for process in self.processes])
        alarm.start()
        output = self.stdout.read()  # until the last process has closed it
        for process in self.processes:
            process.join()
        alarm.cancel()
        assert all(x.exitcode in (expected or [0]) for x in self.processes), output
        return output


def run_child(main, arguments, write, first, environment):
    os.dup2(write, 1)
    os.dup2(write, 2)
    sys.stdout = sys.stderr = open(1, "w", buffering=1, closefd=False)
    os.environ.update(environment)
    torch.cuda.is_available = lambda: False  # CUDA does not survive a fork
    if first:
        first()
    main(arguments)


@pytest.fixture(scope="session")
def small_tiny_data(tmp_path_factory):
    """The tiny data sets, a few of each, with COCO pictures without boxes among them."""
    import data
    folder = tmp_path_factory.mktemp("tiny") / "data"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "TINY_SIZES", dict(coco=(48, 12), vg=(40, 8), snli_ve=(36, 12),
                                               glue=(60, 24)))
        data.write_tiny(folder)
    path = folder / "coco/annotations/instances_train2017.json"
    content = json.loads(path.read_text())
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] % 4]
    path.write_text(json.dumps(content))
    return folder
