"""What programs around an optimizer rely on: constructors, hosts, checkpoints, processes."""

import copy
import inspect
import os
import socket

import pytest
import torch
from tests.optim.test_drop_in import (
    MAKERS,
    adamp_int8,
    assert_same,
    every,
    qgalore,
    qgalore_int8,
    setup,
    snapshot,
    train,
)
from torch import nn

import gradpress

CLASSES = [
    gradpress.optim.AdamW4bit,
    gradpress.optim.AdamW8bit,
    gradpress.optim.QGaLoreAdamW,
    gradpress.optim.GaLoreAdamW,
    gradpress.optim.Apollo,
    gradpress.optim.ApolloMini,
    gradpress.optim.Fira,
    gradpress.optim.SubTrack,
    gradpress.optim.GradNormLoRP,
]
# Their own papers' defaults stand before those of AdamW.
OTHERS = [gradpress.optim.AdamP, gradpress.optim.DiffGrad, gradpress.optim.LDAdamW]
classes = pytest.mark.parametrize("optimizer_class", CLASSES)


@classes
def test_signature_extends_that_of_pytorch(optimizer_class):
    options = dict(inspect.signature(optimizer_class).parameters)
    options |= dict(inspect.signature(gradpress.optim.AdamW8bit).parameters)
    for name, theirs in inspect.signature(torch.optim.AdamW).parameters.items():
        if name == "amsgrad":  # there is none
            continue
        assert options[name].default == theirs.default, name
        assert options[name].kind == theirs.kind, name
    own = [p for p in inspect.signature(optimizer_class).parameters.values() if p.name != "params"]
    positional = [p.name for p in own if p.kind == p.POSITIONAL_OR_KEYWORD]
    assert positional == ["lr", "betas", "eps", "weight_decay"]


@pytest.mark.parametrize("optimizer_class", [*CLASSES, *OTHERS])
def test_parameters_come_in_every_form(optimizer_class):
    def fresh():
        return [nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(3))]

    one_pass = (p for p in fresh())
    assert len(optimizer_class(one_pass).param_groups[0]["params"]) == 2
    named = zip(["w", "b"], fresh(), strict=True)
    assert optimizer_class(named).param_groups[0]["param_names"] == ["w", "b"]
    w, b = fresh()
    groups = [{"params": w, "lr": 1.0, "mine": "kept"}, {"params": [b], "betas": (0.5, 0.6)}]
    optimizer = optimizer_class(groups, lr=1e-3)
    first, second = optimizer.param_groups
    assert (first["lr"], first["mine"], second["lr"], second["betas"]) == (
        1.0,
        "kept",
        1e-3,
        (0.5, 0.6),
    )
    with pytest.raises(ValueError, match="empty parameter list"):
        optimizer_class([])
    with pytest.raises(ValueError, match="some parameters appear in more than one"):
        optimizer_class([{"params": [w]}, {"params": [w]}])


@every
def test_parameters_are_looked_up_at_every_step(make):
    """Hosts replace the tensors of a group after construction, or a parameter's data."""
    model, optimizer = setup(make)
    other = copy.deepcopy(model)
    by_old = dict(zip(model.parameters(), other.parameters(), strict=True))
    for group in optimizer.param_groups:
        group["params"] = [by_old[p] for p in group["params"]]
    before = snapshot(model, optimizer)
    train(other, optimizer, 0, 2)
    assert set(optimizer.state) == set(other.parameters())
    assert_same(before, {k: v for k, v in snapshot(model, optimizer).items() if k in before})
    reference, expected = setup(make)
    train(reference, expected, 0, 2)
    assert_same(snapshot(reference, expected), snapshot(other, optimizer))


def test_swapped_data_is_what_is_stepped():
    p = nn.Parameter(torch.ones(64, 64))
    optimizer = gradpress.optim.AdamW8bit([p], lr=0.1)
    p.grad = torch.ones(64, 64)
    optimizer.step()
    old = p.data
    kept = old.clone()
    p.data = torch.zeros(64, 64)
    p.grad = torch.ones(64, 64)
    optimizer.step()
    assert torch.equal(old, kept)
    assert (p < 0).all()


@every
def test_empty_state_survives_a_load(make):
    """What accelerate does as it wraps an optimizer."""
    model, optimizer = setup(make)
    reference, expected = setup(make)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(model, optimizer, 0, 3)
    train(reference, expected, 0, 3)
    assert_same(snapshot(model, optimizer), snapshot(reference, expected))


@every
def test_profiler_names_the_step(make):
    model, optimizer = setup(make)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        train(model, optimizer, 0, 1)
    names = {event.name for event in profile.events()}
    assert f"Optimizer.step#{type(optimizer).__name__}.step" in names


@every
def test_older_checkpoints_take_defaults_and_newer_ones_are_refused(make):
    model, optimizer = setup(make)
    train(model, optimizer, 0, 3)
    saved = copy.deepcopy(optimizer.state_dict())
    for group in saved["param_groups"]:
        del group["state_layout"], group["maximize"]
    other, restored = setup(make)
    gradpress.nn.load_flat_state_dict_(other, gradpress.nn.flatten_state_dict(model))
    restored.load_state_dict(saved)
    assert all(group["maximize"] is False for group in restored.param_groups)
    train(model, optimizer, 3, 5)
    train(other, restored, 3, 5)
    assert_same(snapshot(model, optimizer), snapshot(other, restored))
    before = snapshot(other, restored)
    saved["param_groups"][0]["state_layout"] = 99
    with pytest.raises(ValueError, match="state_layout 99"):
        restored.load_state_dict(saved)
    assert_same(before, snapshot(other, restored))


@every
def test_loaded_state_is_a_copy_on_the_parameters_device(make):
    model, optimizer = setup(make)
    train(model, optimizer, 0, 2)
    saved = optimizer.state_dict()
    other, restored = setup(make)
    restored.load_state_dict(saved)
    for ours, theirs in zip(restored.state.values(), saved["state"].values(), strict=True):
        for name, value in ours.items():
            if isinstance(value, torch.Tensor) and value.numel():
                assert value.dtype == theirs[name].dtype
                if name != "step":  # PyTorch's own rule shares it
                    assert value.data_ptr() != theirs[name].data_ptr()
    assert all(s["step"].device.type == "cpu" for s in restored.state.values())
    assert other is not model


@every
def test_compiled_step_is_left_alone(make):
    """Dynamo breaks the graph at the step instead of tracing into it."""
    model, optimizer = setup(make)
    reference, expected = setup(make)

    def run(model, optimizer):
        for p in model.parameters():
            p.grad = torch.ones(p.shape)
        optimizer.step()

    run(reference, expected)
    for p in model.parameters():
        p.grad = torch.ones(p.shape)
    torch.compile(lambda: optimizer.step(), backend="eager")()
    assert_same(snapshot(reference, expected), snapshot(model, optimizer))


def test_flattened_parameters_are_named():
    flat = nn.Parameter(torch.randn(4096))
    flat.grad = torch.randn(4096)
    before = flat.detach().clone()
    with pytest.raises(ValueError, match="DeepSpeed ZeRO and FSDP1 flatten parameters"):
        gradpress.optim.QGaLoreAdamW([flat], rank=4).step()
    assert torch.equal(flat, before)


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def join(rank, world, port):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=world)


def leave():
    torch.distributed.barrier()
    # Without the interpreter's end, in which a thread of PyTorch's that still runs would abort.
    os._exit(0)


def replicate(rank, world, port, name):
    make = {make.__name__: make for make in MAKERS}[name]
    join(rank, world, port)
    model, optimizer = setup(make)
    parallel = nn.parallel.DistributedDataParallel(model)
    for i in range(5):
        x = torch.randn(8, 24, generator=torch.Generator().manual_seed(100 * rank + i))
        optimizer.zero_grad()
        (parallel(x) - x.roll(1, 1)).square().mean().backward()
        optimizer.step()
    mine = torch.cat([t.flatten().double() for t in snapshot(model, optimizer).values()])
    everyone = [torch.empty_like(mine) for _ in range(world)]
    torch.distributed.all_gather(everyone, mine)
    assert all(torch.equal(everyone[0].nan_to_num(), other.nan_to_num()) for other in everyone)
    leave()


@pytest.mark.parametrize(
    "make", [qgalore, qgalore_int8, adamp_int8], ids=lambda make: make.__name__
)
def test_replicas_agree_bit_for_bit(make):
    arguments = (2, free_port(), make.__name__)
    torch.multiprocessing.spawn(replicate, arguments, nprocs=2)


def shard(rank, world, port):
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    join(rank, world, port)
    mesh = init_device_mesh("cpu", (world,))
    p = nn.Parameter(distribute_tensor(torch.ones(8, 8), mesh, [Shard(1)]))
    p.grad = distribute_tensor(torch.ones(8, 8), mesh, [Shard(1)])
    with pytest.raises(NotImplementedError, match="sharded parameters"):
        gradpress.optim.AdamW8bit([p]).step()
    assert (p.to_local() == 1).all()
    leave()


def test_sharded_columns_are_refused_clearly():
    torch.multiprocessing.spawn(shard, (2, free_port()), nprocs=2)
