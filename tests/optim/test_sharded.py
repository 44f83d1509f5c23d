"""Parameters that `fully_shard` divides over processes, beside a process that has all of them.

Two processes run every case once; each test looks at what became of one.
"""

import copy
import io
import json
import os
import socket
import traceback
import warnings

import pytest
import torch
from torch import nn

import gradpress
from gradpress import optim
from gradpress.optim._sharded import Shard
from gradpress.optim._sharded_state import local_state

CASES = {}
#: Rows of 24 and 40 elements; of 25 rows, which two processes share unevenly.
SHAPES = {"0.weight": (40, 24), "2.weight": (25, 40)}


def case(function):
    CASES[function.__name__] = function
    return function


# What the processes do


class Net(nn.Sequential):
    def __init__(self, dtype=torch.float32):
        torch.manual_seed(0)
        layers = nn.Linear(24, 40), nn.ReLU(), nn.Linear(40, 25), nn.LayerNorm(25)
        super().__init__(*layers)
        self.to(dtype)


def mesh(*shape):
    from torch.distributed.tensor import init_device_mesh

    shape = shape or (2,)
    return init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])


def sharded(device_mesh=None, dtype=torch.float32):
    from torch.distributed.fsdp import fully_shard

    model = Net(dtype)
    for module in (model[0], model[2], model):
        fully_shard(module, mesh=device_mesh or mesh())
    return model


def divide(values):
    from torch.distributed.tensor import Shard, distribute_tensor

    return distribute_tensor(values, mesh(), [Shard(0)])


def backward(model, i):
    # Examples enough for gradients of full rank: Adam makes steps of rounding errors elsewhere.
    x = torch.randn(64, 24, generator=torch.Generator().manual_seed(i))
    model.zero_grad()
    (model(x.to(next(model.parameters()).dtype)) - 1).square().sum().backward()


def train(model, optimizer, first, last, alike=None):
    """Steps a sharded model; `alike`, a whole model and its optimizer, by the same gradients."""
    for i in range(first, last):
        backward(model, i)
        if alike is not None:
            for p, q in zip(alike[0].parameters(), model.parameters(), strict=True):
                p.grad = q.grad.full_tensor()
            alike[1].step()
        optimizer.step()


def whole(model):
    return [p.detach().full_tensor() for p in model.parameters()]


def apart(make, steps=4, dtype=torch.float32):
    """How far parameters are from those of one process, as shares of how far they moved."""
    model, other = sharded(dtype=dtype), Net(dtype)
    start = [p.detach().clone() for p in other.parameters()]
    optimizer, reference = make(model), make(other)
    train(model, optimizer, 0, steps, (other, reference))
    shares = [
        float(((ours - theirs).norm() / (theirs - old).norm()).detach())
        for ours, theirs, old in zip(whole(model), other.parameters(), start, strict=True)
    ]
    return shares, (model, optimizer), (other, reference)


def same_states(model, optimizer, other, reference):
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        state, expected = optimizer.state[p], reference.state[q]
        assert state.keys() == expected.keys()
        for name, value in expected.items():
            ours = state[name]
            if isinstance(value, torch.Tensor) and value.dim() and "projector" not in name:
                ours = ours.full_tensor().view(value.shape)
            assert torch.equal(torch.as_tensor(ours), torch.as_tensor(value)), name


def held(model, optimizer):
    """Everything that this process has."""
    found = {}
    for name, p in model.named_parameters():
        found[name] = p.detach().to_local().clone()
        for key, value in optimizer.state[p].items():
            value = getattr(value, "_local_tensor", value)
            found[f"{name}.{key}"] = torch.as_tensor(value).clone()
    return found


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert torch.equal(value, b[name]), name


def adamw(model, bits=8, block_size=None, **options):
    own = {"lr": 1e-2, "state_bits": bits, "min_8bit_size": 64, "block_size": block_size}
    return optim.AdamW8bit(model.parameters(), **{**own, **options})


def diffgrad(model, bits=8, block_size=None, **options):
    own = {"state_bits": bits, "min_8bit_size": 64, "block_size": block_size}
    return optim.DiffGrad(model.parameters(), lr=1e-2, weight_decay=1e-3, **own, **options)


def projecting(name, model, rank=4, **options):
    matrices = [p for p in model.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if p.dim() != 2]
    groups = [{"params": matrices, "rank": rank}, {"params": others, "rank": None}]
    options = {"update_proj_gap": 3, "min_8bit_size": 100, **options}
    return getattr(optim, name)(groups, lr=1e-2, **options)


PROJECTED = [
    ("GaLoreAdamW", {}),
    ("GaLoreAdamW", {"rank": 16, "reference": True, "weight_decay": 0.1, "maximize": True}),
    ("QGaLoreAdamW", {"state_bits": 32}),
    ("Fira", {"weight_decay": 0.1}),
    ("Fira", {"rank": 16, "reference": True, "weight_decay": 0.1}),
    ("Apollo", {"weight_decay": 0.1}),
    ("Apollo", {"scale_type": "tensor", "scale_front": True, "maximize": True}),
    ("ApolloMini", {"rank": 1}),
]


@case
def float32_moments_have_the_bits_of_one_process(rank):
    for make in (adamw, diffgrad):
        shares, *runs = apart(lambda model, make=make: make(model, 32))
        assert shares == [0] * 6
        same_states(*runs[0], *runs[1])


@case
def codes_have_the_bits_of_one_process_where_blocks_end_with_shards(rank):
    # Blocks of which rows of 24 and of 40 have a whole number.
    for make, bits, size in [(adamw, 8, 8), (adamw, 4, 4), (diffgrad, 8, 8), (diffgrad, 4, 2)]:
        shares, *runs = apart(lambda model, m=make, b=bits, s=size: m(model, b, s))
        assert shares == [0] * 6
        if bits == 8:
            same_states(*runs[0], *runs[1])
    model, optimizer = runs[0]
    # A block of 480 is the whole shard of the first weight.
    for size, equal in ((480, True), (200, False)):
        shares, (model, optimizer), _ = apart(lambda model, s=size: adamw(model, 8, s))
        assert "shard_numel" in optimizer.state[model[0].weight]
        assert (shares[0] == 0) == equal


@case
def other_codes_are_as_far_from_one_process_as_quantization_errors(rank):
    # One code of 8 bits is off by 1/64 of its value at the most, one of 4 bits by about a quarter.
    for make in (adamw, diffgrad):
        for bits, tolerance in ((8, 1 / 64), (4, 1 / 4)):
            shares, *_ = apart(lambda model, m=make, b=bits: m(model, b))
            assert 0 < max(shares) < tolerance


@case
def sizes_of_whole_parameters_decide_about_codes(rank):
    p = nn.Parameter(divide(torch.zeros(8, 600)))
    q = nn.Parameter(divide(torch.zeros(8, 500)))
    optimizer = optim.AdamW8bit([p, q])
    for x in (p, q):
        x.grad = divide(torch.ones(x.shape))
    optimizer.step()
    assert optimizer.state[p]["exp_avg_codes"].dtype == torch.uint8
    assert optimizer.state[q]["exp_avg"].dtype == torch.float32


@case
def norms_are_those_of_whole_parameters(rank):
    for delta in (0.0, 0.7, 10.0):  # none, some and all parameters count as scale-invariant
        for name, options in [
            ("AdamP", {"nesterov": delta == 0.7}),
            ("SGDP", {"momentum": 0.9, "nesterov": True}),
        ]:
            options |= {"lr": 1e-3, "delta": delta, "weight_decay": 0.1, "state_bits": 32}
            make = getattr(optim, name)
            shares, *_ = apart(lambda model, m=make, o=options: m(model.parameters(), **o))
            # Sums over processes are rounded in another order.
            assert max(shares) < 1e-6


@case
def projected_weights_go_the_way_of_one_process(rank):
    for name, options in PROJECTED:
        make = lambda model, n=name, o=options: projecting(n, model, **o)  # noqa: E731
        shares, (model, optimizer), (other, reference) = apart(make, 5)
        # Sums over rows and processes are rounded in another order.
        assert max(shares) < 1e-5, (name, options)
        assert optimizer.refresh_counts() == reference.refresh_counts()
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            for key, value in reference.state[q].items():
                if "projector" in key:
                    assert torch.equal(*map(torch.as_tensor, (optimizer.state[p][key], value)))
        assert model[0].weight.shape == SHAPES["0.weight"]
        moments = [optimizer.state[m.weight]["exp_avg"] for m in (model[0], model[2])]
        r = options.get("rank", 4)
        assert [tuple(m.shape) for m in moments] == [(40, r), (r, 40)]


@case
def projected_codes_go_the_way_of_one_process(rank):
    # Blocks of one row of a projected gradient, where rows are divided.
    for name in ("GaLoreAdamW", "QGaLoreAdamW", "Fira"):
        options = {"state_bits": 8, "block_size": 4, "projector_bits": 4}
        shares, *_ = apart(lambda model, n=name, o=options: projecting(n, model, **o), 5)
        assert max(shares) < 1e-2, name  # a code that is off where its value is at the brink


@case
def processes_without_rows_take_part(rank):
    makers = [
        lambda params: optim.AdamW8bit(params, min_8bit_size=0),
        lambda params: optim.AdamW4bit(params, min_8bit_size=0),
        lambda params: optim.DiffGrad(params, min_8bit_size=0),
        lambda params: optim.AdamP(params, min_8bit_size=0, delta=0.9),
        lambda params: optim.SGDP(params, lr=0.1, momentum=0.9, min_8bit_size=0),
        lambda params: optim.GaLoreAdamW(params, rank=1),
        lambda params: optim.QGaLoreAdamW(params, rank=2, min_8bit_size=0),
        lambda params: optim.Fira(params, rank=1),
        lambda params: optim.Apollo(params, rank=1),
    ]
    torch.manual_seed(3)
    shapes = [(1, 7), (1, 1), (3,), (1,), (0, 4), (3, 2, 2), (5, 0)]
    values = [[torch.randn(s) for s in shapes] for _ in range(4)]
    for make in makers:
        ours = [nn.Parameter(divide(v)) for v in values[0]]
        theirs = [nn.Parameter(v.clone()) for v in values[0]]
        one, other = make(ours), make(theirs)
        for grads in values[1:]:
            for p, q, grad in zip(ours, theirs, grads, strict=True):
                p.grad, q.grad = divide(grad), grad
            one.step()
            other.step()
        for p, q in zip(ours, theirs, strict=True):
            assert torch.allclose(p.detach().full_tensor(), q, atol=3e-3), (one, p.shape)
        one.report()


#: Blocks that cross the borders of shards, blocks of rows, and projectors; moments of all kinds.
CHECKPOINTED = [
    lambda model: adamw(model, 8),
    lambda model: diffgrad(model, 4, 20),
    lambda model: projecting("QGaLoreAdamW", model),
    lambda model: projecting("Fira", model, state_bits=4),
]


@case
def checkpoints_resume_bit_for_bit(rank):
    from torch.distributed.checkpoint import state_dict as dcp

    for make in CHECKPOINTED:
        model = sharded()
        optimizer = make(model)
        train(model, optimizer, 0, 4)
        saved = []
        for flatten, full in ((False, False), (True, False), (False, True)):
            options = dcp.StateDictOptions(
                flatten_optimizer_state_dict=flatten, full_state_dict=full
            )
            state = dcp.get_state_dict(model, optimizer, options=options)
            saved.append((*copy.deepcopy(state), options))
        train(model, optimizer, 4, 6)
        expected = held(model, optimizer)
        for weights, state, options in saved:
            other = sharded()
            restored = make(other)
            dcp.set_state_dict(
                other, restored, model_state_dict=weights, optim_state_dict=state, options=options
            )
            train(other, restored, 4, 6)
            assert_same(expected, held(other, restored))


@case
def own_checkpoints_and_copies_go_on_alike(rank):
    model = sharded()
    optimizer = projecting("QGaLoreAdamW", model)
    train(model, optimizer, 0, 4)
    buffer = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict()], buffer)
    train(model, optimizer, 4, 6)
    buffer.seek(0)
    weights, state = torch.load(buffer, weights_only=True)
    other = sharded()
    restored = projecting("QGaLoreAdamW", other)
    other.load_state_dict(weights)
    restored.load_state_dict(state)
    train(other, restored, 4, 6)
    assert_same(held(model, optimizer), held(other, restored))
    p = nn.Parameter(divide(torch.ones(8, 8)))
    p.grad = torch.ones_like(p)
    one = optim.AdamW8bit([p], min_8bit_size=0)
    one.step()
    q, other = copy.deepcopy((p, one))
    for x, each in ((p, one), (q, other)):
        x.grad = torch.ones_like(x)
        each.step()
    assert torch.equal(p.to_local(), q.to_local())
    assert_same(
        {k: torch.as_tensor(getattr(v, "_local_tensor", v)) for k, v in one.state[p].items()},
        {k: torch.as_tensor(getattr(v, "_local_tensor", v)) for k, v in other.state[q].items()},
    )


@case
def files_load_on_other_numbers_of_processes(rank):
    import torch.distributed.checkpoint as files
    from torch.distributed.checkpoint import state_dict as dcp

    def load(size, folder):
        """What a process has that has all rows."""
        model = sharded(mesh(2, 1))
        optimizer = adamw(model, 8, size)
        weights, state = dcp.get_state_dict(model, optimizer)
        files.load({"model": weights, "optim": state}, checkpoint_id=folder)
        dcp.set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
        return model, optimizer

    # Blocks are parts of rows; or cross the border between 13 and 12 rows of 40.
    for size in (8, 200):
        folder = f"{os.environ['SHARDED_FOLDER']}/{size}"
        model = sharded()
        optimizer = adamw(model, 8, size)
        train(model, optimizer, 0, 4)
        weights, state = dcp.get_state_dict(model, optimizer)
        files.save({"model": weights, "optim": state}, checkpoint_id=folder)
        if size == 200:
            with pytest.raises(files.api.CheckpointException, match=r"exp_avg\w*_scale"):
                load(size, folder)
            continue
        other, restored = load(size, folder)
        train(model, optimizer, 4, 6, (other, restored))
        assert all(torch.equal(*pair) for pair in zip(whole(model), whole(other), strict=True))


@case
def borders_that_moved_are_refused(rank):
    model = sharded()
    optimizer = adamw(model, 8, 200)
    train(model, optimizer, 0, 2)
    saved = copy.deepcopy(optimizer.state_dict())
    before = saved["state"][2]["shard_numel"]
    assert before == 13 * 40
    saved["state"][2]["shard_numel"] = 7 * 40
    with pytest.raises(ValueError, match="saved in shards of 280 elements"):
        adamw(sharded(), 8, 200).load_state_dict(saved)
    plain = {name: torch.ones(3) for name in ("exp_avg", "exp_avg_sq")}
    saved["state"] = {0: {"step": torch.tensor(1.0), "tensor_id": 0, **plain}}
    with pytest.raises(ValueError, match=r"state exp_avg of a sharded parameter .* got Tensor"):
        adamw(sharded(), 32).load_state_dict(saved)


@case
def replicated_shards_stay_the_same(rank):
    model = sharded(mesh(2, 1), torch.bfloat16)
    other = Net(torch.bfloat16)
    optimizer, reference = adamw(model), adamw(other)
    train(model, optimizer, 0, 3, (other, reference))
    assert all(torch.equal(a, b) for a, b in zip(whole(model), other.parameters(), strict=True))


@case
def random_numbers_differ_from_shard_to_shard(rank):
    p = nn.Parameter(divide(torch.ones(64, 64, dtype=torch.bfloat16)))
    q = nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
    grad = torch.ones(64, 64, dtype=torch.bfloat16)
    # A tenth of the distance to the next number.
    one, other = (optim.AdamW8bit([x], lr=1 / 2560, weight_decay=0.0) for x in (p, q))
    p.grad, q.grad = divide(grad), grad
    one.step()
    other.step()
    upper, lower = p.detach().full_tensor().split(32)
    assert torch.equal(upper, q[:32])
    assert not torch.equal(upper, lower)
    for half in (upper, lower):
        moved = (half != 1).float().mean()
        assert abs(float(moved) - 0.1) < 0.03  # 4 standard deviations of 2048 decisions


@case
def every_process_skips_what_one_cannot_use(rank):
    for make in (adamw, lambda model: projecting("GaLoreAdamW", model)):
        model = sharded()
        optimizer = make(model)
        train(model, optimizer, 0, 2)
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
        before = held(model, optimizer)
        loss = model(torch.ones(2, 24)).square().sum()
        model.zero_grad()
        scaler.scale(loss).backward()
        if rank == 1:
            model[0].weight.grad._local_tensor[0, 0] = float("inf")
        scaler.step(optimizer)
        assert_same(before, held(model, optimizer))
        scaler.update()
        model.zero_grad()
        scaler.scale(model(torch.ones(2, 24)).square().sum()).backward()
        scaler.step(optimizer)
        assert not torch.equal(before["0.weight"], held(model, optimizer)["0.weight"])


@case
def nonfinite_gradients_are_left_alone(rank):
    for make in (adamw, lambda model: projecting("QGaLoreAdamW", model)):
        model = sharded()
        optimizer = make(model)
        train(model, optimizer, 0, 2)
        for group in optimizer.param_groups:
            group["weight_decay"] = 0.0
        before = whole(model)
        for p in model.parameters():
            p.grad._local_tensor.fill_(float("nan"))
        optimizer.step()
        assert optimizer.nonfinite_gradients > 0
        assert all(torch.equal(a, b) for a, b in zip(before, whole(model), strict=True))
        train(model, optimizer, 2, 4)
        assert all(t.isfinite().all() for t in whole(model))


@case
def gradients_and_states_are_left_as_they_are(rank):
    from torch.distributed.tensor import DTensor

    for make in (adamw, diffgrad, lambda model: projecting("Fira", model, state_bits=4)):
        model = sharded()
        optimizer = make(model)
        backward(model, 0)
        grads = [(p.grad, p.grad.full_tensor()) for p in model.parameters()]
        groups = copy.deepcopy([{**g, "params": None} for g in optimizer.param_groups])
        optimizer.step()
        optimizer.step()
        for p, (grad, copied) in zip(model.parameters(), grads, strict=True):
            assert p.grad is grad
            assert torch.equal(grad.full_tensor(), copied)
        assert groups == [{**g, "params": None} for g in optimizer.param_groups]
        params = list(model.parameters())
        assert all(any(p is q for q in params) for p in optimizer.state)
        values = [v for state in optimizer.state.values() for v in state.values()]
        assert {type(v) for v in values} <= {torch.Tensor, DTensor, int, float}
        assert "_stand_ins" not in vars(optimizer)


@case
def nothing_moves_without_a_learning_rate(rank):
    for make in CHECKPOINTED:
        model = sharded()
        optimizer = make(model)
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        before = whole(model)
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
        assert all(torch.equal(a, b) for a, b in zip(before, whole(model), strict=True))
        keys = [set(state) for state in optimizer.state.values()]
        train(model, optimizer, 0, 4)
        assert keys == [set(state) for state in optimizer.state.values()]


@case
def reports_tell_of_this_process(rank):
    for make in (
        lambda model: adamw(model, 4, 200),
        lambda model: projecting("QGaLoreAdamW", model, state_bits=4),
    ):
        model = sharded()
        optimizer = make(model)
        train(model, optimizer, 0, 3)
        report = optimizer.report()
        counted = gradpress.memory.count(model, optimizer).by_category
        assert report.totals["state_bytes"] == counted["optimizer_states"]
        assert report.totals["projector_bytes"] == counted.get("projectors", 0)
        assert report.totals["weight_bytes"] == counted["weights"]
        assert counted["weights"] == counted["gradients"]
        by_shape = {row.shape: row for row in report.rows}
        rows = 13 if rank == 0 else 12
        assert by_shape[25, 40].weight_bytes == 4 * rows * 40
        assert all(0 < row.moment_saturation <= 1 for row in report.projected)
        for p, row in zip(
            [p for g in optimizer.param_groups for p in g["params"]], report.rows, strict=True
        ):
            state = local_state(Shard.of(p, ""), optimizer.state[p], optimizer.param_groups[0])
            if "exp_avg_codes" not in state or row.rank is not None:
                continue
            count, ends = p.to_local().numel(), 0
            for name, low in (("exp_avg", 0), ("exp_avg_sq", 0)):
                packed, scale = state[f"{name}_codes"], state[f"{name}_scale"]
                codes = [int(packed[i // 2]) >> 4 * (i % 2) & 15 for i in range(count)]
                ends += sum(c in (low, 15) and scale[i // 200] != 0 for i, c in enumerate(codes))
            assert row.moment_saturation == ends / (2 * count)


@case
def what_is_not_supported_is_named(rank):
    from torch.distributed.tensor import Replicate, distribute_tensor
    from torch.distributed.tensor import Shard as Divided

    class Other(gradpress.optim._base.LowBitOptimizer):
        pass

    class Mine(optim.GaLoreAdamW):
        pass

    def step(make, placements, device_mesh, **options):
        p = nn.Parameter(distribute_tensor(torch.ones(8, 8), device_mesh, placements))
        p.grad = torch.ones_like(p)
        optimizer = make([p], **options)
        try:
            optimizer.step()
        finally:
            assert (p.to_local() == 1).all()
            assert not any(optimizer.state.values())

    rows = ([Divided(0)], mesh())
    refused = [
        (optim.AdamW8bit, ([Divided(1)], mesh()), {}, "must be divided along their first"),
        (optim.AdamW8bit, ([Divided(0), Divided(0)], mesh(1, 2)), {}, "one dimension of the"),
        (Mine, rows, {"rank": 2}, "Mine: sharded parameters .* are stepped by Apollo, "),
        (optim.GaLoreAdamW, rows, {"rank": 2, "proj_type": "full"}, "with proj_type='std' only"),
        (optim.GaLoreAdamW, rows, {"rank": 2, "moments": "rotate"}, "with moments='keep' only"),
        (optim.GaLoreAdamW, rows, {"rank": "auto"}, "need a rank that is a number"),
    ]
    for make, (placements, device_mesh), options, message in refused:
        with pytest.raises(NotImplementedError, match=message):
            step(make, placements, device_mesh, **options)
    defaults = {"lr": 1.0, "eps": 0.0, "weight_decay": 0.0}
    defaults |= {"differentiable": False, "capturable": False}
    with pytest.raises(NotImplementedError, match=r"Other: sharded parameters .* not supported"):
        step(Other, *rows, defaults=defaults)
    model = sharded()
    with pytest.raises(TypeError, match="must not be sharded by fully_shard"):
        optim.fused_backward(model, adamw(model))
    # All of it on every process is no shard.
    p = nn.Parameter(distribute_tensor(torch.ones(8, 8), mesh(), [Replicate()]))
    p.grad = torch.ones_like(p)
    optim.AdamW8bit([p], lr=0.5).step()
    assert (p.to_local() < 1).all()


@case
def gradients_placed_otherwise_are_brought_in_place(rank):
    from torch.distributed.tensor import DTensor, Partial

    p = nn.Parameter(divide(torch.zeros(6, 4)))
    q = nn.Parameter(torch.zeros(6, 4))
    grad = torch.arange(24.0).view(6, 4) - 7
    p.grad = DTensor.from_local(grad / 2, mesh(), [Partial()], run_check=False)
    q.grad = grad
    for x in (p, q):
        optim.AdamW8bit([x]).step()
    assert torch.equal(p.detach().full_tensor(), q)


# The processes


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def work(rank, world, port, folder):
    from datetime import timedelta

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), SHARDED_FOLDER=folder)
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", rank=rank, world_size=world, timeout=timedelta(seconds=60)
    )
    warnings.filterwarnings("ignore", module="torch")
    outcomes = {}
    for name, function in CASES.items():
        try:
            function(rank)
            outcomes[name] = ""
        except Exception:
            outcomes[name] = traceback.format_exc()
        with open(f"{folder}/{rank}.json", "w") as file:
            json.dump(outcomes, file)
        # A case that failed on one process only would mix up the messages of those after it.
        alright = torch.tensor(float(not outcomes[name]))
        torch.distributed.all_reduce(alright)
        if alright not in (0, world):
            break
    os._exit(0)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    torch.multiprocessing.spawn(work, (2, free_port(), str(folder)), nprocs=2)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("name", CASES)
def test_case(outcomes, name):
    for rank, found in enumerate(outcomes):
        assert found.get(name, "not reached") == "", f"process {rank}:\n{found[name]}"
