"""The small example that scores and second-order results were computed for by hand."""

import torch

WEIGHT = torch.tensor([[0.5, -1.0, 0.25, 2.0], [-0.3, 0.8, -1.6, 0.1]])
INPUTS = torch.tensor([[1.0, 0.5, 0.0, 2.0], [0.5, -1.0, 1.0, 0.0], [0.0, 1.0, 2.0, -1.0]])
INPUT_SQ = INPUTS.square().sum(0)
GRADIENTS = 1e-3 * torch.tensor(
    [
        [[1.0, -2.0, 4.0, 0.5], [3.0, 1.0, -1.0, 2.0]],
        [[2.0, 1.0, -3.0, 1.0], [-1.0, 2.0, 6.0, -20.0]],
    ]
)
