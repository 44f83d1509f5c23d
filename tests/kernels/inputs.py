"""Values that a kernel may stumble over."""

import torch
from tests.kernels.launch import DTYPES

SIZES = (1, 31, 255, 256, 257, 1000, 4097)
# Plain sizes first.
GROUPS = (32, 64, 128, 256, 512, 768, 2048, 1, 2, 7, 33, 96, 2304, 5461)


def normal(numel: int, seed: int, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(numel, generator=torch.Generator().manual_seed(seed)) * scale


def kinds(name: str, numel: int, seed: int) -> dict[str, torch.Tensor]:
    """Tensors of a dtype by what is special about them."""
    dtype = DTYPES[name]
    x = normal(numel, seed)
    largest = torch.finfo(dtype).max
    tiny = torch.finfo(dtype).smallest_normal / 64
    holes = x.clone()
    holes[::7] = float("nan")
    holes[3::11] = float("inf")
    holes[5::13] = -float("inf")
    nothing = torch.full((numel,), float("nan"))
    nothing[1::2] = float("-inf")
    scales = 10.0 ** torch.linspace(-20, 18, numel)
    return {
        "normal": x.to(dtype),
        "holes": holes.to(dtype),
        "nothing finite": nothing.to(dtype),
        "equal": torch.full((numel,), -0.3).to(dtype),
        "zeros": torch.zeros(numel).copysign(x).to(dtype),
        "huge": ((torch.rand(numel) * 2 - 1) * largest).to(dtype),
        "one sign": (x.abs() + 1).to(dtype),
        "subnormal": (x * tiny).to(dtype),
        "all scales": (x * scales).to(dtype),
    }
