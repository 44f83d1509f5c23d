"""The operators of ``torch.ops.gradpress``: the bits of the plain functions, in graphs too."""

import copy
import inspect
import re

import pytest
import torch
import torch.nn.functional as F
from tests.ops.library_cases import CASES, HYPER, PLAIN, codes_of, values
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck
from torch.utils._pytree import tree_leaves, tree_map_only

import gradpress
from gradpress.nn import QuantizedWeight
from gradpress.ops import dynamic, lowrank, optim, quant

gp = torch.ops.gradpress
Tensor = torch.Tensor

#: Functions on tensors that are no operators, and why.
PLAIN_ONLY = {"allocate_codes": "returns memory of any content"}


@pytest.fixture(autouse=True)
def forget_compiled():
    yield
    torch._dynamo.reset()


def tensors(*trees):
    return [t for t in tree_leaves(trees) if isinstance(t, Tensor)]


def same(a, b):
    """Whether two trees hold tensors of the same bits, shapes and dtypes."""
    pairs = list(zip(tensors(a), tensors(b), strict=True))
    assert pairs
    return all(
        x.dtype == y.dtype
        and x.shape == y.shape
        and torch.equal(x.detach().reshape(-1).view(torch.uint8), y.reshape(-1).view(torch.uint8))
        for x, y in pairs
    )


def compiled(function, **options):
    return torch.compile(function, backend="aot_eager", fullgraph=True, **options)


def operators():
    names = (s.name for s in torch._C._jit_get_all_schemas())
    return {n.removeprefix("gradpress::") for n in names if n.startswith("gradpress::")}


# What is registered


def test_every_function_on_tensors_is_an_operator():
    missing = set()
    for module in (quant, dynamic, lowrank, optim):
        for name, function in inspect.getmembers(module, inspect.isfunction):
            if name.startswith("_") or function.__module__ != module.__name__:
                continue
            hints = " ".join(function.__annotations__.values())
            if {"Tensor", "Array"} & set(re.findall(r"\w+", hints)) and not {
                name,
                f"{name}_",
            } & operators():
                missing.add(name)
    assert missing == PLAIN_ONLY.keys()
    assert operators() == CASES.keys() == PLAIN.keys()


@pytest.mark.parametrize("name", CASES)
def test_devices(name):
    registered = torch._C._dispatch_has_kernel_for_dispatch_key
    assert all(registered(f"gradpress::{name}", key) for key in ("CPU", "CUDA", "Meta"))
    for key in ("XLA", "MPS", "XPU"):
        assert not registered(f"gradpress::{name}", key)
    args, kwargs = next(CASES[name]())
    args, kwargs = tree_map_only(Tensor, lambda t: torch.zeros(1).to_mkldnn(), (args, kwargs))
    with pytest.raises(NotImplementedError, match=f"gradpress::{name}.*Mkldnn"):
        getattr(gp, name)(*args, **kwargs)


# What opcheck itself makes PyTorch warn of.
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")
@pytest.mark.parametrize("name", CASES)
def test_opcheck(name):
    for args, kwargs in CASES[name]():
        results = PLAIN[name](*copy.deepcopy(args), **kwargs)
        utilities = ["test_schema", "test_autograd_registration", "test_faketensor"]
        # It compares values, of which NaN equals nothing; `test_bits` does without.
        if not any(t.isnan().any() for t in tensors(results)):
            utilities.append("test_aot_dispatch_dynamic")
        opcheck(getattr(gp, name).default, args, kwargs, test_utils=utilities)


# What they compute


@pytest.mark.parametrize("name", CASES)
def test_bits(name):
    operator, plain = getattr(gp, name), PLAIN[name]
    graph = compiled(lambda args, kwargs: operator(*args, **kwargs))
    for index, case in enumerate(CASES[name]()):
        (args, kwargs), mine, theirs = case, copy.deepcopy(case), copy.deepcopy(case)
        expected = plain(*args, **kwargs), args, kwargs
        assert same((operator(*mine[0], **mine[1]), mine), expected), index
        # Each case is a graph of its own.
        if index in (0, 3):
            assert same((graph(*theirs), theirs), expected), index


@pytest.mark.parametrize("name", CASES)
def test_tensors_without_values(name):
    for args, kwargs in CASES[name]():
        want = tensors(getattr(gp, name)(*copy.deepcopy(args), **kwargs))
        meta = tree_map_only(Tensor, lambda t: t.to("meta"), (args, kwargs))
        with FakeTensorMode():
            cuda = tree_map_only(
                Tensor, lambda t: torch.empty(t.shape, dtype=t.dtype, device="cuda"), meta
            )
        for moved in (meta, cuda):
            got = tensors(getattr(gp, name)(*moved[0], **moved[1]))
            device = tensors(moved)[0].device
            assert [(t.shape, t.stride(), t.dtype, t.device) for t in got] == [
                (t.shape, t.stride(), t.dtype, device) for t in want
            ]


def test_seeds_of_all_64_bits():
    x = values(100)
    for seed in (2**63, 2**64 - 1, 2**63 - 1):
        signed = seed - 2**64 if seed >= 2**63 else seed
        want = quant.quantize_blockwise(x, seed=seed).codes
        assert torch.equal(gp.quantize_blockwise(x, seed=signed)[0], want)


def test_what_is_not_finite_is_counted_or_spread_and_nobody_waits():
    x = values(30, 20)
    x[3, 4] = float("inf")
    assert gp.quantize_blockwise(x)[3].tolist() == [1]
    assert gp.quantize_dynamic(x)[2].tolist() == [1]
    assert all(t.isnan().all() for t in gp.svd(x, 3))


def test_refusals():
    x = values(12, 8)
    cases = [
        (lambda: gp.quantize_blockwise(x, bits=5), ValueError, "bits must be 4 or 8"),
        (lambda: gp.quantize_blockwise(x, rounding="up"), ValueError, "rounding must be"),
        (lambda: gp.quantize_blockwise(x.double()), TypeError, "x must have dtype float32"),
        (lambda: gp.quantize_dynamic(x, bits=5), ValueError, "bits must be 4 or 8"),
        (lambda: gp.svd(x, 9), ValueError, "rank must be from 1 to 8, got 9"),
        (lambda: gp.svd(x[0], 1), ValueError, "x must have two dimensions"),
        (lambda: gp.project([x], [x[0]]), ValueError, "ranks must be given"),
        (lambda: gp.project([x], [x, x]), ValueError, "grads and bases must be as many"),
    ]
    for call, error, message in cases:
        with pytest.raises(error, match=message):
            call()
    scales = {"grad_scale": 2.0, "grad_scale_tensor": torch.ones(1), **HYPER}
    step = {"steps": [1], "nonfinite": torch.zeros(1, dtype=torch.int64), **scales}
    with pytest.raises(ValueError, match="adamw_direction_: grad_scale must be 1"):
        gp.adamw_direction_([x], [x], [x], **step)


def test_autograd_notices_what_is_written_and_parameters_may_be():
    p = nn.Parameter(values(12))
    moments, counter = [torch.zeros(12) for _ in range(2)], torch.zeros(1, dtype=torch.int64)
    options = {"steps": [1], "tensor_ids": [0], "nonfinite": counter, "weight_decay": 0.1, **HYPER}

    @compiled
    def step(p, grad, m, v):
        with torch.no_grad():
            gp.adamw_step_([p], [grad], [m], [v], **options)

    before, version = p.detach().clone(), p._version
    step(p, values(12), *moments)
    assert not torch.equal(p, before)
    assert p._version > version


# Shapes and numbers that change


def test_dynamic_shapes_take_one_graph():
    def chain(x, step):
        codes, scale, zero_point, _ = gp.quantize_blockwise(x, bits=4, group_size=32, step=step)
        layout = {"bits": 4, "group_size": 32, "shape": x.shape}
        y = gp.dequantize_blockwise(codes, scale, zero_point, **layout)
        codes, scale, _ = gp.quantize_dynamic(y, bits=4)
        y = gp.dequantize_dynamic(codes, scale, bits=4, shape=x.shape)
        codes = gp.unpack_int4(gp.pack_int4(codes % 16), codes.numel())
        rounded = gp.round_bf16_stochastic(y, step=step)
        basis = gp.svd(y, 2)[2].T.contiguous()
        return (
            codes,
            rounded,
            gp.project([y], [basis])[0],
            gp.linear_blockwise(
                y, codes_of_five, scale_of_five, zero_of_five, None, shape=[5, 8], group_size=32
            ),
        )

    codes_of_five, scale_of_five, zero_of_five = codes_of(5, 8)
    counter = CompileCounterWithBackend("aot_eager")
    graph = torch.compile(chain, backend=counter, fullgraph=True, dynamic=True)
    for rows, step in ((40, 2), (64, 3), (101, 4)):
        x = values(rows, 8)
        torch._dynamo.mark_dynamic(x, 0)
        assert same(graph(x, step), chain(x, step)), rows
    assert counter.frame_count == 1


def test_steps_count_on_without_new_graphs():
    counter = CompileCounterWithBackend("aot_eager")
    nonfinite = torch.zeros(1, dtype=torch.int64)

    def step(p, grad, m, v, number):
        options = {"steps": [number], "tensor_ids": [0], "nonfinite": nonfinite, "seed": 3}
        gp.adamw_step_([p], [grad], [m], [v], weight_decay=0.1, **options, **HYPER)

    graph = torch.compile(step, backend=counter, fullgraph=True)
    runs = []
    for function in (step, graph):
        p, m, v = values(50).bfloat16(), torch.zeros(50), torch.zeros(50)
        for number in range(1, 7):
            function(p, values(50, seed=number).bfloat16(), m, v, number)
        runs.append((p, m, v))
    assert same(*runs)
    assert counter.frame_count <= 3  # the first number, and then any


# Products with quantized weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_blockwise_has_the_gradients_of_the_dense_product(dtype):
    parts, layout = codes_of(6, 10, bits=4), {"shape": [6, 10], "bits": 4, "group_size": 32}
    weight = PLAIN["dequantize_blockwise"](*parts, dtype=dtype, **layout)
    results = []
    for product in (
        lambda x, b: gp.linear_blockwise(x, *parts, b, **layout),
        compiled(lambda x, b: gp.linear_blockwise(x, *parts, b, **layout)),
        lambda x, b: F.linear(x, weight, b),
    ):
        x, b = (values(*s, dtype=dtype).requires_grad_() for s in ((4, 3, 10), (6,)))
        y = product(x, b)
        y.backward(values(4, 3, 6, dtype=dtype, seed=5))
        results.append((y, x.grad, b.grad))
    assert same(results[0], results[1])
    # bfloat16 is multiplied in float32 and rounded once; PyTorch rounds somewhere on its way.
    rtol = 2.0**-6 if dtype == torch.bfloat16 else 1e-5
    for mine, dense in zip(results[0], results[2], strict=True):
        torch.testing.assert_close(mine, dense, rtol=rtol, atol=rtol)


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.wide = nn.Linear(24, 40)
        self.tall = nn.Linear(40, 24, bias=False)
        self.norm = nn.LayerNorm(24)

    def forward(self, x):
        return self.norm(self.tall(torch.relu(self.wide(x))) + x)


def network(bits=8, dtype=torch.float32):
    torch.manual_seed(0)
    return gradpress.nn.quantize_(Network().to(dtype), bits=bits, group_size=32)


def gradients(model):
    return [p.grad for p in model.parameters()]


@pytest.mark.parametrize(
    ("bits", "dtype", "autocast"),
    [
        (8, torch.float32, False),
        (4, torch.bfloat16, False),
        (4, torch.float32, True),
        (8, torch.float64, False),
    ],
)
def test_compiled_models_equal_eager_ones(bits, dtype, autocast):
    results = []
    for wrap in (lambda model: model, compiled):
        model, x = network(bits, dtype), values(2, 3, 24, dtype=dtype).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = wrap(model)(x)
        y.square().sum().backward()
        assert all(type(g) is Tensor for g in gradients(model))
        results.append((y, x.grad, gradients(model)))
    assert same(*results)


def test_graphs_keep_codes_and_not_values_for_the_backward_pass():
    kept = []

    def record(graph, inputs):
        (results,) = (node.args[0] for node in graph.graph.nodes if node.op == "output")
        kept.extend(node.meta["val"] for node in results[1:])
        return graph

    backend = aot_autograd(fw_compiler=record, bw_compiler=lambda graph, _: graph)
    model = network()
    torch.compile(model, backend=backend, fullgraph=True)(values(5, 24).requires_grad_())
    shapes = {weight.shape for weight in (model.wide.weight, model.tall.weight)}
    assert {t.shape for t in kept if t.dtype == torch.uint8} >= shapes
    assert not [t for t in kept if t.is_floating_point() and t.shape in shapes]


def test_other_uses_of_a_weight_in_graphs():
    weight = network().wide.weight
    x = values(3, 24, dtype=torch.bfloat16)
    for use in (
        lambda w: w.dequantize(torch.float16),
        lambda w: w.square().sum() + w.norm(),
        lambda w: F.linear(x, w.to(torch.bfloat16)),
        lambda w: (w.detach().clone() @ w.T)[0],
    ):
        assert same(compiled(use)(weight), use(weight))


def test_batches_of_any_size_and_models_without_values():
    counter = CompileCounterWithBackend("aot_eager")
    model, twin = network(), network()
    graph = torch.compile(twin, backend=counter, fullgraph=True, dynamic=True)
    frames = []
    for rows in (3, 8, 17):
        for one in (model, twin):
            one.zero_grad()
        outputs = [one(values(rows, 24)) for one in (model, graph)]
        for y in outputs:
            y.square().sum().backward()
        assert same((outputs[0], gradients(model)), (outputs[1], gradients(twin)))
        frames.append(counter.frame_count)
    assert frames == frames[:1] * 3  # all sizes run what the first one compiled
    assert model.to("meta")(torch.empty(7, 24, device="meta")).shape == (7, 24)


def adamw8bit(model):
    return gradpress.optim.AdamW8bit(model.parameters(), lr=1e-2, min_8bit_size=64)


def qgalore(model):
    groups = gradpress.optim.param_groups(model, rank=4, update_proj_gap=3, verbose=False)
    return gradpress.optim.QGaLoreAdamW(groups, lr=1e-2, min_8bit_size=64)


@pytest.mark.parametrize("make", [adamw8bit, qgalore])
@pytest.mark.parametrize("bits", [8, 4])
def test_training_a_compiled_model_gives_the_same_bits(make, bits):
    runs, counter = [], CompileCounterWithBackend("aot_eager")
    for wrap in (lambda m: m, lambda m: torch.compile(m, backend=counter, fullgraph=True)):
        model = network(bits)
        optimizer, forward, losses = make(model), wrap(model), []
        before = gradpress.nn.flatten_state_dict(copy.deepcopy(model))
        for step in range(8):
            loss = (forward(values(6, 24, seed=step)) - 1).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
        after = gradpress.nn.flatten_state_dict(model)
        assert all(not torch.equal(before[name], after[name]) for name in before if "codes" in name)
        runs.append((losses, after, optimizer.state_dict()["state"]))
    assert same(*runs)
    assert counter.frame_count == 1


def test_writing_to_weights_in_lists_is_refused():
    weight = network().wide.weight.detach()
    with pytest.raises(NotImplementedError, match="in-place arithmetic on a QuantizedWeight"):
        torch._foreach_mul_([torch.ones(1), weight], 2.0)
    layout = {"scale": 1.0, "tensor_ids": [0], "steps": [1]}
    with pytest.raises(NotImplementedError, match="in-place arithmetic on a QuantizedWeight"):
        gp.project_back_add_([weight], [values(40, 2)], [values(24, 2)], **layout)
    assert isinstance(weight, QuantizedWeight)
