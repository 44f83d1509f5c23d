"""Arguments of every operator of ``torch.ops.gradpress``, and the plain functions beside them."""

import torch

from gradpress.ops import dynamic, linear, lowrank, optim, quant

HYPER = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8}


def values(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype)


def codes_of(*shape, bits=8, group_size=32, symmetric=False, seed=0):
    x = values(*shape, seed=seed)
    options = {"bits": bits, "group_size": group_size, "symmetric": symmetric}
    q = quant.quantize_blockwise(x, rounding="nearest", **options)
    return q.codes, q.scale, q.zero_point


def basis(rows, rank, seed=1):
    return torch.linalg.qr(values(rows, rank, seed=seed))[0].contiguous()


def quantize_cases():
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        yield (values(9, 31, dtype=dtype),), {"bits": 4, "group_size": 32, "seed": 7, "step": 3}
    yield (values(64).view(8, 8).T,), {"symmetric": True, "rounding": "nearest"}
    yield (values(0),), {"bits": 4, "symmetric": True}
    yield (torch.tensor([1.0, float("nan"), float("inf")]),), {"seed": -1, "tensor_id": 5}


def dequantize_cases():
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        layout = {"bits": 4, "group_size": 32}
        yield codes_of(9, 31, **layout), {"shape": [9, 31], "dtype": dtype, **layout}
    yield codes_of(16, 4, symmetric=True), {"shape": [16, 4], "group_size": 32}
    yield codes_of(0), {"shape": [0], "group_size": 32}


def linear_cases():
    for dtype, bits, *rows in (
        (torch.float32, 8, 5),
        (torch.bfloat16, 4, 2, 3),
        (torch.float64, 8),
    ):
        parts = codes_of(6, 10, bits=bits)
        layout = {"shape": [6, 10], "bits": bits, "group_size": 32}
        x = values(*rows, 10, dtype=dtype).requires_grad_()
        yield (x, *parts, None if rows else values(6, dtype=dtype).requires_grad_()), layout
        yield (x.detach(), *parts, values(6, dtype=dtype)), layout


def input_grad_cases():
    for (x, *parts, _bias), layout in linear_cases():
        yield (values(*x.shape[:-1], 6, dtype=x.dtype), *parts), layout


def pack_cases():
    for shape in ((7,), (4, 5), (0,)):
        yield (torch.arange(torch.Size(shape).numel(), dtype=torch.uint8).view(shape) % 16,), {}


def unpack_cases():
    for count in (7, 8, 0):
        yield (torch.arange((count + 1) // 2, dtype=torch.uint8) * 17, count), {}


def round_cases():
    for shape in ((257,), (3, 5), (0,)):
        yield (values(*shape),), {"seed": 1, "step": 2}
    yield (values(8, 8).T,), {"tensor_id": 3}


def dynamic_cases():
    for dtype, bits, shape in (
        (torch.float32, 8, (300,)),
        (torch.bfloat16, 4, (3, 43)),
        (torch.float16, 8, (0,)),
    ):
        yield (values(*shape, dtype=dtype),), {"bits": bits, "signed": dtype != torch.float16}


def dequantize_dynamic_cases():
    for (x,), options in dynamic_cases():
        codes, scale, _count = dynamic.quantize_dynamic(x, **options)
        yield (codes, scale), {"shape": list(x.shape), **options}
        yield (codes, scale), options


def packed_bases(bits):
    """Bases of a tall and of a wide gradient, in codes of `bits`."""
    parts = [quant.quantize_blockwise(basis(8, 3), bits=bits, group_size=8) for _ in range(2)]
    codes, scales, zero_points = ([p[i] for p in parts] for i in range(3))
    return (codes, scales, zero_points), {"basis_bits": bits, "basis_group_size": 8}


def project_cases():
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        grads = [values(12, 8, dtype=dtype), values(8, 20, dtype=dtype)]
        yield (grads, [basis(8, 3), basis(8, 2)]), {}
    for bits in (4, 8):
        lists, options = packed_bases(bits)
        yield (grads, *lists), {"ranks": [3, 3], **options}


def project_back_add_cases():
    keys = {"tensor_ids": [4, 9], "steps": [1, 2], "scale": 0.5}
    for dtype, options in (
        (torch.float32, {}),
        (torch.float16, {"decay": 0.1}),
        (torch.bfloat16, {"stochastic_rounding": True, "seed": -3, "found_inf": torch.zeros(1)}),
    ):
        params = [values(12, 8, dtype=dtype), values(8, 20, dtype=dtype)]
        updates = [values(12, 3), values(3, 20)]
        yield (params, updates, [basis(8, 3), basis(8, 3)]), {**keys, **options}
    lists, options = packed_bases(4)
    yield (params, updates, *lists), {**keys, **options}


def project_back_requantize_cases():
    keys = {"tensor_ids": [4, 9], "steps": [1, 2], "scale": 0.5, "seed": 11}
    shapes = {"rows": [12, 8], "columns": [8, 20]}
    for bits, symmetric in ((8, False), (4, False), (8, True)):
        layout = {"bits": bits, "group_size": 32}
        parts = [codes_of(*s, symmetric=symmetric, **layout) for s in ((12, 8), (8, 20))]
        lists = [[p[i] for p in parts if p[i] is not None] for i in range(3)]
        updates = [values(12, 3), values(3, 20)]
        yield (*lists, updates, [basis(8, 3), basis(8, 3)]), {**shapes, **layout, **keys}
    dense = [values(12, 8), values(8, 20)]
    yield (*lists, dense, []), {**shapes, **layout, **keys, "stochastic": False, "decay": 0.1}


def refresh_basis_cases():
    for dtype, warm in ((torch.float32, True), (torch.bfloat16, True), (torch.float32, False)):
        grads = [values(12, 8, dtype=dtype), values(8, 20, dtype=dtype)]
        if not warm:
            grads += [torch.zeros(9, 9), torch.full((9, 9), float("nan"))]
        bases = [basis(min(g.shape), 3) for g in grads]
        vectors = [b[:, 0].clone() for b in bases]
        count = len(grads)
        options = {"warm": [warm] * count, "tensor_ids": list(range(count)), "steps": [5] * count}
        yield (grads, bases, vectors), {"seed": 3, **options}


def svd_cases():
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        yield (values(12, 20, dtype=dtype), 4), {"seed": -5}
    yield (values(20, 12).T, 12), {"n_iter": 0, "oversample": 0}


def adamw_cases(*, blockwise=False, direction=False):
    shapes = ((300,), (5, 7))
    for bits, dtype, options in (
        (8, torch.float32, {"maximize": True}),
        (4, torch.bfloat16, {"grad_scale_tensor": torch.tensor([2.0])}),
        (8, torch.float16, {"grad_scale": 2.0, "found_inf": torch.zeros(1)}),
    ):
        grads = [values(*s, dtype=torch.float32 if direction else dtype, seed=2) for s in shapes]
        grads[1][0, 0] = float("nan")
        moments = [[values(*s, seed=i) ** 2 for s in shapes] for i in (3, 4)]
        if blockwise:
            size = dynamic.BLOCK_SIZES[bits]
            options = {**options, "bits": bits, "block_size": size}
            coded = [
                [dynamic.quantize_dynamic(m, signed=signed, bits=bits)[:2] for m in moment]
                for moment, signed in zip(moments, (True, False), strict=True)
            ]
            moments = [[pair[i] for pair in pairs] for pairs in coded for i in (0, 1)]
        counter = torch.zeros(1, dtype=torch.int64)
        steps = {"steps": [3, 4]}
        if dtype == torch.float16:
            counters = [torch.tensor(3.0), torch.tensor(4.0)]
            steps = {"steps": [], "step_tensors": counters, "lr_tensor": torch.tensor(2e-2)}
        options = {**steps, "nonfinite": counter, **HYPER, **options}
        if direction:
            yield (grads, *moments), options
            continue
        params = [values(*s, dtype=dtype) for s in shapes]
        yield (params, grads, *moments), {"tensor_ids": [0, 1], "weight_decay": 0.1, **options}


CASES = {
    "quantize_blockwise": quantize_cases,
    "dequantize_blockwise": dequantize_cases,
    "linear_blockwise": linear_cases,
    "linear_blockwise_input_grad": input_grad_cases,
    "pack_int4": pack_cases,
    "unpack_int4": unpack_cases,
    "round_bf16_stochastic": round_cases,
    "quantize_dynamic": dynamic_cases,
    "dequantize_dynamic": dequantize_dynamic_cases,
    "project": project_cases,
    "project_back_add_": project_back_add_cases,
    "project_back_requantize_": project_back_requantize_cases,
    "refresh_basis_": refresh_basis_cases,
    "svd": svd_cases,
    "adamw_step_": adamw_cases,
    "adamw_blockwise_step_": lambda: adamw_cases(blockwise=True),
    "adamw_direction_": lambda: adamw_cases(direction=True),
    "adamw_blockwise_direction_": lambda: adamw_cases(blockwise=True, direction=True),
}


# The plain functions, called with an operator's arguments.


def signless(kwargs):
    """The same with the seed as the plain functions take it."""
    return {**kwargs, "seed": kwargs["seed"] % 2**64} if "seed" in kwargs else kwargs


def plain_quantize(x, **kwargs):
    codes, scale, zero_point, nonfinite = quant.quantize_blockwise(x, **signless(kwargs))
    zero_point = torch.empty(0, dtype=torch.uint8) if zero_point is None else zero_point
    return codes, scale, zero_point, torch.tensor([nonfinite])


def plain_dequantize(*parts, shape, dtype=torch.float32, **layout):
    name = "float32" if dtype == torch.float64 else str(dtype).removeprefix("torch.")
    return quant.dequantize_blockwise(*parts, shape=shape, dtype=name, **layout).to(dtype)


def _weight(codes, scale, zero_point, kwargs):
    return linear.Codes(codes, scale, zero_point, tuple(kwargs["shape"]), *_layout(kwargs))


def _layout(kwargs):
    return kwargs.get("bits", 8), kwargs.get("group_size", 256)


def plain_linear(x, codes, scale, zero_point, bias, **kwargs):
    return linear.linear_blockwise(x, _weight(codes, scale, zero_point, kwargs), bias)


def plain_input_grad(grad, codes, scale, zero_point, **kwargs):
    return linear.linear_blockwise_input_grad(grad, _weight(codes, scale, zero_point, kwargs))


def plain_dynamic(x, **kwargs):
    codes, scale, nonfinite = dynamic.quantize_dynamic(x, **kwargs)
    return codes, scale, torch.tensor([nonfinite])


def plain_bases(bases, scales=None, zero_points=None, *, basis_bits=8, basis_group_size=256):
    if scales is None:
        return bases
    return lowrank.PackedBases(bases, scales, zero_points, basis_bits, basis_group_size)


def split_options(kwargs):
    """What tells how bases are packed, and all else."""
    of_bases = {k: v for k, v in kwargs.items() if k.startswith("basis_")}
    return of_bases, signless({k: v for k, v in kwargs.items() if k not in of_bases})


def plain_project(grads, *lists, ranks=(3, 2), **of_bases):
    shapes = [lowrank.projected_shape(*g.shape, r) for g, r in zip(grads, ranks, strict=True)]
    outs = [torch.empty(shape) for shape in shapes]
    lowrank.project(grads, plain_bases(*lists, **of_bases), outs)
    return outs


def plain_project_back_add(params, updates, *lists, **kwargs):
    of_bases, options = split_options(kwargs)
    lowrank.project_back_add(params, updates, plain_bases(*lists, **of_bases), **options)


def plain_project_back_requantize(*lists, rows, columns, **kwargs):
    codes, scales, zero_points, updates, *bases = lists
    of_bases, options = split_options(kwargs)
    shapes = list(zip(rows, columns, strict=True))
    bases = plain_bases(*bases, **of_bases)
    lowrank.project_back_requantize(codes, scales, zero_points, shapes, updates, bases, **options)


def plain_refresh_basis(*lists, **kwargs):
    outcomes = lowrank.refresh_basis(*lists, **kwargs)
    return torch.tensor([list(outcome) for outcome in outcomes], dtype=torch.float64)


def plain_svd(x, rank, *, n_iter=2, oversample=8, seed=0):
    return lowrank.svd(x, rank=rank, n_iter=n_iter, oversample=oversample, seed=seed % 2**64)


def plain_adamw(step):
    def run(*lists, grad_scale=1.0, grad_scale_tensor=None, **kwargs):
        for name, tensors in (("lr", "lr_tensor"), ("steps", "step_tensors")):
            kwargs[name] = kwargs.pop(tensors, kwargs[name])
        scale = grad_scale if grad_scale_tensor is None else grad_scale_tensor
        step(*lists, grad_scale=scale, **kwargs)

    return run


PLAIN = {
    "quantize_blockwise": plain_quantize,
    "dequantize_blockwise": plain_dequantize,
    "linear_blockwise": plain_linear,
    "linear_blockwise_input_grad": plain_input_grad,
    "pack_int4": quant.pack_int4,
    "unpack_int4": quant.unpack_int4,
    "round_bf16_stochastic": quant.round_bf16_stochastic,
    "quantize_dynamic": plain_dynamic,
    "dequantize_dynamic": dynamic.dequantize_dynamic,
    "project": plain_project,
    "project_back_add_": plain_project_back_add,
    "project_back_requantize_": plain_project_back_requantize,
    "refresh_basis_": plain_refresh_basis,
    "svd": plain_svd,
    "adamw_step_": plain_adamw(optim.adamw_step),
    "adamw_blockwise_step_": plain_adamw(optim.adamw_blockwise_step),
    "adamw_direction_": plain_adamw(optim.adamw_direction),
    "adamw_blockwise_direction_": plain_adamw(optim.adamw_blockwise_direction),
}
