"""Optimizers with small states: drop-in for `torch.optim`."""

from gradpress.optim._fused_backward import FusedBackward, fused_backward
from gradpress.optim._groups import param_groups
from gradpress.optim._offload import OffloadedStates, offload_states
from gradpress.optim._rank_choice import RankChoice, choose_ranks
from gradpress.optim._report import OptimizerReport
from gradpress.optim.adamp import SGDP, AdamP
from gradpress.optim.adamw4bit import AdamW4bit
from gradpress.optim.adamw8bit import AdamW8bit
from gradpress.optim.apollo import Apollo, ApolloMini
from gradpress.optim.diffgrad import DiffGrad
from gradpress.optim.fira import Fira
from gradpress.optim.galore import GaLoreAdamW
from gradpress.optim.galore_adafactor import GaLoreAdafactor
from gradpress.optim.gradnormlorp import GradNormLoRP, gradnormlorp_groups
from gradpress.optim.ldadam import LDAdamW
from gradpress.optim.qgalore import QGaLoreAdamW
from gradpress.optim.subtrack import SubTrack

__all__ = [
    "SGDP",
    "AdamP",
    "AdamW4bit",
    "AdamW8bit",
    "Apollo",
    "ApolloMini",
    "DiffGrad",
    "Fira",
    "FusedBackward",
    "GaLoreAdafactor",
    "GaLoreAdamW",
    "GradNormLoRP",
    "LDAdamW",
    "OffloadedStates",
    "OptimizerReport",
    "QGaLoreAdamW",
    "RankChoice",
    "SubTrack",
    "choose_ranks",
    "fused_backward",
    "gradnormlorp_groups",
    "offload_states",
    "param_groups",
]
