"""Built-in model sizes: the LLaMA family that low-rank training papers share.

60M to 7B are the configurations of GaLore (Zhao et al. 2024, arXiv:2403.03507) and Q-GaLore
(Zhang et al. 2024, arXiv:2407.08296). 9M and 35M continue the series downwards with the same
vocabulary; `tiny` trains in about a minute on two CPU cores.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ModelSize:
    """Shape of one LLaMA and the settings that go with it.

    Attributes:
        hidden_size: Width of the residual stream.
        intermediate_size: Width of the SwiGLU layer.
        heads: Attention heads; they divide `hidden_size`.
        layers: Transformer blocks.
        vocab_size: Rows of the embedding and of the (untied) head.
        sequence_length: Tokens a training window predicts.
        batch_size: Windows per forward pass.
        steps: Optimizer steps of a run.
        rank: Rank of the projected gradients.
        lr_qgalore: Peak learning rate of Q-GaLore: the published one from 60M on, for `tiny` the
            best of three (1e-3, 3e-3, 1e-2).
    """

    hidden_size: int
    intermediate_size: int
    heads: int
    layers: int
    vocab_size: int = 32000
    sequence_length: int = 256
    batch_size: int = 16
    steps: int = 1000
    rank: int
    lr_qgalore: float = 0.01


SIZES: dict[str, ModelSize] = {
    "tiny": ModelSize(
        hidden_size=256,
        intermediate_size=688,
        heads=4,
        layers=4,
        vocab_size=1024,
        sequence_length=128,
        batch_size=8,
        steps=300,
        rank=64,
        lr_qgalore=0.003,
    ),
    "9M": ModelSize(hidden_size=128, intermediate_size=352, heads=4, layers=4, rank=32),
    "35M": ModelSize(hidden_size=384, intermediate_size=1024, heads=8, layers=6, rank=96),
    "60M": ModelSize(
        hidden_size=512, intermediate_size=1376, heads=8, layers=8, rank=128, lr_qgalore=0.015
    ),
    "130M": ModelSize(
        hidden_size=768, intermediate_size=2048, heads=12, layers=12, rank=256, lr_qgalore=0.015
    ),
    "350M": ModelSize(hidden_size=1024, intermediate_size=2736, heads=16, layers=24, rank=256),
    # 32 heads, 24 layers: the papers' tables exchange the two, and 24 does not divide 2048.
    "1B": ModelSize(hidden_size=2048, intermediate_size=5461, heads=32, layers=24, rank=512),
    "7B": ModelSize(
        hidden_size=4096, intermediate_size=11008, heads=32, layers=32, rank=1024, lr_qgalore=0.004
    ),
}
