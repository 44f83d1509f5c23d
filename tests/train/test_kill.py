import json
import os
import subprocess
import sys
from pathlib import Path

import gradpress
from gradpress.train import resume_run, start_run
from gradpress.train.checkpoint import newest_checkpoint

from .test_loop import assert_same_run

# How the process dies, and the step of the newest checkpoint that is left.
WAYS = {
    "half_written_optimizer": 3,
    "before_rename": 3,
    "before_removing_the_old_one": 6,
    "while_removing_the_old_one": 6,
    "in_the_middle_of_a_metrics_line": 3,
}


def test_killed_while_writing_loses_only_unfinished_steps(small, quiet, tmp_path):
    config = small(steps=8)
    start_run(config, quiet(save_every=3), tmp_path / "straight")
    script = Path(__file__).with_name("killed_runs.py")
    packages = [str(Path(gradpress.__file__).parents[1]), *sys.path]
    subprocess.run(
        [sys.executable, script, json.dumps(config.to_dict()), tmp_path, *WAYS],
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(packages)},
        stdout=subprocess.DEVNULL,
        timeout=120,
    )
    for way, step in WAYS.items():
        folder = tmp_path / way
        assert newest_checkpoint(folder / "checkpoints").step == step, way
        resume_run(folder, {}, {})
        assert_same_run(tmp_path / "straight", folder, 8)
        names = sorted(path.name for path in (folder / "checkpoints").iterdir())
        assert names == ["step-8"], way
