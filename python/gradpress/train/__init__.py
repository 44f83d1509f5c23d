"""Pre-training a LLaMA on text: `gradpress train` and `gradpress demo`."""

from gradpress.train.config import TrainConfig
from gradpress.train.errors import DivergedError, UserError
from gradpress.train.folder import RunOptions
from gradpress.train.loop import Outcome, resume_run, start_run
from gradpress.train.sizes import SIZES, ModelSize

__all__ = [
    "SIZES",
    "DivergedError",
    "ModelSize",
    "Outcome",
    "RunOptions",
    "TrainConfig",
    "UserError",
    "resume_run",
    "start_run",
]
