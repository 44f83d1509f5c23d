"""Runs one training per way of dying, each in a child that SIGKILL ends; no test by itself.

Arguments: the configuration as JSON, the folder of the runs, the names of the ways.
"""

import json
import os
import shutil
import signal
import sys
from pathlib import Path

import torch

from gradpress.train import RunOptions, TrainConfig, checkpoint, files, start_run
from gradpress.train.metrics import MetricsWriter


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def half_written_optimizer():
    save = torch.save

    def torch_save(state, path):
        save(state, path)
        if ".step-6" in str(path):
            os.truncate(path, path.stat().st_size // 2)
            die()

    torch.save = torch_save


def before_rename():
    rename = os.rename

    def os_rename(source, target):
        if Path(target).name == "step-6":
            die()
        rename(source, target)

    os.rename = os_rename


def before_removing_the_old_one():
    remove = checkpoint.remove_folder

    def remove_folder(path):
        if path.name == "step-3":
            die()
        remove(path)

    checkpoint.remove_folder = remove_folder


def while_removing_the_old_one():
    remove_tree = shutil.rmtree

    def rmtree(path, *arguments, **options):
        if Path(path).name.startswith(".step-3.old") and Path(path).exists():
            (Path(path) / "optimizer.pt").unlink()
            die()
        remove_tree(path, *arguments, **options)

    files.shutil.rmtree = rmtree


def in_the_middle_of_a_metrics_line():
    write = MetricsWriter.write

    def write_half(self, kind, **values):
        if values["step"] == 5:
            self._file.write('{"kind": "step", "step": 5, "lo')
            self._file.flush()
            die()
        write(self, kind, **values)

    MetricsWriter.write = write_half


if __name__ == "__main__":
    config = TrainConfig.from_dict(json.loads(sys.argv[1]))
    for way in sys.argv[3:]:
        child = os.fork()
        if child == 0:
            globals()[way]()
            options = RunOptions(threads=1, device="cpu", plot=False, save_every=3)
            start_run(config, options, Path(sys.argv[2]) / way)
            os._exit(1)
        _, status = os.waitpid(child, 0)
        assert os.WTERMSIG(status) == signal.SIGKILL, way
