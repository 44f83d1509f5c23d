"""States that live elsewhere between steps are stepped to the same bits."""

import copy
import io
import pickle
import weakref

import pytest
import torch
from tests.optim.test_drop_in import (
    MAKERS,
    Block,
    adamw8bit,
    adamw8bit_int8,
    assert_same,
    galore_rotating,
    qgalore,
    qgalore_int8,
    setup,
    snapshot,
    train,
)
from torch import nn

import gradpress
from gradpress.optim import fused_backward, offload_states

every = pytest.mark.parametrize("make", MAKERS, ids=lambda make: make.__name__)
some = pytest.mark.parametrize(
    "make", [adamw8bit, adamw8bit_int8, qgalore, qgalore_int8, galore_rotating]
)


def moving(optimizer):
    """The tensors that come and go, by parameter and name."""
    names = optimizer._KEEP_DTYPE - optimizer._ON_HOST
    return {
        (i, name): value
        for i, p in enumerate(p for g in optimizer.param_groups for p in g["params"])
        for name, value in optimizer.state.get(p, {}).items()
        if name in names and isinstance(value, torch.Tensor)
    }


def addresses(optimizer):
    return {key: t.data_ptr() for key, t in moving(optimizer).items() if t.numel()}


class Watch:
    """What is where, while parameters are stepped."""

    def __init__(self, optimizer):
        self.optimizer, self.portions = optimizer, []
        self.addresses, self.copies = {}, []
        self.step = optimizer._step_resident
        optimizer._step_resident = self

    def __call__(self, group, portion, scale):
        states = [t for p in portion for t in self.optimizer.state[p].values()]
        size = sum(t.nbytes for t in states if isinstance(t, torch.Tensor) and t.dim())
        self.portions.append((len(portion), size))
        self.step(group, portion, scale)
        inside = {id(t) for p in portion for t in self.optimizer.state[p].values()}
        for key, t in moving(self.optimizer).items():
            if id(t) in inside and t.numel():
                self.addresses[key] = t.data_ptr()
                self.copies.append(weakref.ref(t))


@every
@pytest.mark.parametrize("portion_bytes", [1, 3000])
def test_same_bits(make, portion_bytes):
    """Whatever the portions, with refreshes, and with states that are made or made anew in them."""
    model, optimizer = setup(make)
    reference, plain = setup(make)
    offload_states(optimizer, portion_bytes=portion_bytes)
    for first in (0, 3):
        train(model, optimizer, first, first + 4)
        train(reference, plain, first, first + 4)
        assert_same(snapshot(model, optimizer), snapshot(reference, plain))
    order = [list(o.state_dict()["state"]) for o in (optimizer, plain)]
    assert order[0] == order[1]


@some
def test_states_are_elsewhere_between_steps(make):
    model, optimizer = setup(make)
    train(model, optimizer, 0, 2)
    before = addresses(optimizer)
    offload_states(optimizer, portion_bytes=1)
    homes = addresses(optimizer)
    assert homes.keys() == before.keys()
    assert homes
    assert all(homes[key] != address for key, address in before.items())
    watch = Watch(optimizer)
    for step in range(2, 5):
        train(model, optimizer, step, step + 1)
        assert watch.addresses.keys() == homes.keys()
        assert not any(watch.addresses[key] == homes[key] for key in homes)
        # Nothing of what a step has used is left, and where it goes is not allocated anew.
        assert not any(copy() is not None for copy in watch.copies)
        assert addresses(optimizer) == homes
    assert {count for count, _ in watch.portions} == {1}


def test_portions_are_bounded():
    model, optimizer = setup(adamw8bit)
    offload_states(optimizer, portion_bytes=2200)
    watch = Watch(optimizer)
    train(model, optimizer, 0, 2)
    counts = [count for count, _ in watch.portions]
    assert counts[: len(counts) // 2] == counts[len(counts) // 2 :]
    assert max(counts) > 1
    assert sum(counts) == 2 * len(list(model.parameters()))
    assert all(size <= 2200 for _, size in watch.portions)


@every
def test_checkpoints_are_exchanged(make):
    """Saved with, loaded without, and the other way round; loading writes to the host at once."""
    for offloaded in ((True, False), (False, True)):
        model, optimizer = setup(make)
        other, loaded = setup(make)
        for is_offloaded, which in zip(offloaded, (optimizer, loaded), strict=True):
            if is_offloaded:
                offload_states(which, portion_bytes=1)
        train(model, optimizer, 0, 4)
        buffer = io.BytesIO()
        torch.save(optimizer.state_dict(), buffer)
        buffer.seek(0)
        saved = torch.load(buffer, weights_only=True)
        gradpress.nn.load_flat_state_dict_(other, gradpress.nn.flatten_state_dict(model))
        loaded.load_state_dict(saved)
        values = [v for state in saved["state"].values() for v in state.values()]
        given = {v.data_ptr() for v in values if isinstance(v, torch.Tensor) and v.numel()}
        assert not given & set(addresses(loaded).values())
        assert_same(snapshot(model, optimizer), snapshot(other, loaded))
        train(model, optimizer, 4, 8)
        train(other, loaded, 4, 8)
        assert_same(snapshot(model, optimizer), snapshot(other, loaded))


def test_loading_leaves_nothing_to_bring_to_the_device(monkeypatch):
    """PyTorch's own loading, which moves every tensor, sees none of those that live elsewhere."""
    model, optimizer = setup(adamw8bit)
    train(model, optimizer, 0, 1)
    offload_states(optimizer)
    names = []
    cast = torch.optim.Optimizer._process_value_according_to_param_policy

    def watched(param, value, param_id, param_groups, key=None):
        names.append(key)
        return cast(param, value, param_id, param_groups, key)

    monkeypatch.setattr(
        torch.optim.Optimizer, "_process_value_according_to_param_policy", staticmethod(watched)
    )
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert set(names) == {"step"}


@some
@pytest.mark.parametrize("how", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_copies_are_offloaded_too(make, how):
    model, optimizer = setup(make)
    offload_states(optimizer, portion_bytes=1)
    train(model, optimizer, 0, 3)
    other, copied = how((model, optimizer))
    assert not set(addresses(copied).values()) & set(addresses(optimizer).values())
    watch = Watch(copied)
    train(model, optimizer, 3, 7)
    train(other, copied, 3, 7)
    assert {count for count, _ in watch.portions} == {1}
    assert_same(snapshot(model, optimizer), snapshot(other, copied))
    homes = moving(copied)
    handle = offload_states(copied)
    assert all(t is homes[key] for key, t in moving(copied).items())
    handle.remove()
    assert all(t.data_ptr() != homes[key].data_ptr() for key, t in moving(copied).items())
    train(model, optimizer, 7, 9)
    train(other, copied, 7, 9)
    assert_same(snapshot(model, optimizer), snapshot(other, copied))


@some
def test_fused_backward(make):
    results = []
    for offloaded in (False, True):
        model, optimizer = setup(make)
        if offloaded:
            offload_states(optimizer)
            watch = Watch(optimizer)
        fused_backward(model, optimizer)
        train(model, optimizer, 0, 7)
        results.append(snapshot(model, optimizer))
    assert_same(*results)
    assert {count for count, _ in watch.portions} <= {0, 1}
    assert not any(copy() is not None for copy in watch.copies)


def test_gradients_that_are_never_formed():
    """Projectors, which backward passes need, stay; moments do not."""
    results = []
    for offloaded in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(24, 40), nn.Tanh(), nn.Linear(40, 24))
        gradpress.nn.quantize_(model, target_modules=["0", "2"])
        groups = gradpress.optim.param_groups(model, rank=4, update_proj_gap=50, verbose=False)
        own = {"materialize_gradients": False, "min_8bit_size": 64}
        optimizer = gradpress.optim.QGaLoreAdamW(groups, lr=1e-2, **own)
        if offloaded:
            offload_states(optimizer, portion_bytes=1)
        train(model, optimizer, 0, 4)
        before = addresses(optimizer)
        if offloaded:
            watch = Watch(optimizer)
        train(model, optimizer, 4, 6)
        results.append(snapshot(model, optimizer))
    assert_same(*results)
    moved = {name for key in before for name in key[1:] if watch.addresses[key] != before[key]}
    stayed = {name for key in before for name in key[1:] if watch.addresses[key] == before[key]}
    assert moved == {name for name in moved if name.startswith("exp_avg")}
    assert {"projector_codes", "projector_vector"} <= stayed


def test_ranks_are_chosen_as_without():
    results = []
    for offloaded in (False, True):
        torch.manual_seed(0)
        model = Block()
        groups = [{"params": list(model.parameters()), "rank": "auto", "update_proj_gap": 3}]
        own = {"rank_budget": 9000, "min_8bit_size": 64}
        optimizer = gradpress.optim.GaLoreAdamW(groups, lr=1e-2, **own)
        if offloaded:
            offload_states(optimizer, portion_bytes=1)
            watch = Watch(optimizer)
        train(model, optimizer, 0, 5)
        results.append(snapshot(model, optimizer))
    assert_same(*results)
    counts = [count for count, _ in watch.portions]
    assert counts == [5] + [1] * 20


def test_skipped_steps_and_reports():
    results = []
    for offloaded in (False, True):
        model, optimizer = setup(qgalore_int8)
        if offloaded:
            offload_states(optimizer, portion_bytes=1)
        for flag in (0.0, 1.0, 0.0):
            for i, p in enumerate(p for g in optimizer.param_groups for p in g["params"]):
                g = torch.Generator().manual_seed(i)
                p.grad = torch.randn(p.shape, generator=g) * 1024
            optimizer.grad_scale, optimizer.found_inf = torch.tensor(1024.0), torch.tensor(flag)
            optimizer.step()
        results.append(snapshot(model, optimizer))
        results[-1]["report"] = torch.tensor([row.state_bytes for row in optimizer.report().rows])
    assert_same(*results)


def test_an_error_leaves_the_states_elsewhere():
    model, optimizer = setup(adamw8bit)
    offload_states(optimizer)
    train(model, optimizer, 0, 1)
    homes, before = addresses(optimizer), snapshot(model, optimizer)

    def fail(*_):
        raise RuntimeError("no")

    optimizer._step_group = fail
    with pytest.raises(RuntimeError, match="no"):
        optimizer.step()
    assert addresses(optimizer) == homes
    assert_same(snapshot(model, optimizer), before)


def test_later_groups_and_removal():
    model, optimizer = setup(adamw8bit)
    reference, plain = setup(adamw8bit)
    with offload_states(optimizer, portion_bytes=1) as handle:
        for m, o in ((model, optimizer), (reference, plain)):
            train(m, o, 0, 1)
            torch.manual_seed(5)
            extra = nn.Parameter(torch.randn(9, 16))
            o.add_param_group({"params": [("extra", extra)]})
            extra.grad = torch.ones_like(extra)
            o.step()
        homes = addresses(optimizer)
        watch = Watch(optimizer)
        train(model, optimizer, 1, 2)
        train(reference, plain, 1, 2)
        assert watch.addresses.keys() <= homes.keys()
        assert addresses(optimizer) == homes
    del optimizer._step_resident
    handle.remove()
    kept = addresses(optimizer)
    assert all(kept[key] != homes[key] for key in homes)
    train(model, optimizer, 2, 4)
    train(reference, plain, 2, 4)
    assert addresses(optimizer) == kept
    assert_same(snapshot(model, optimizer), snapshot(reference, plain))


def test_bad_arguments_are_named():
    model, optimizer = setup(adamw8bit)
    with pytest.raises(TypeError, match=r"optimizer must be one of gradpress\.optim, got AdamW"):
        offload_states(torch.optim.AdamW(model.parameters()))
    with pytest.raises(ValueError, match="portion_bytes must be at least 1, got 0"):
        offload_states(optimizer, portion_bytes=0)


def test_sharded_parameters_are_refused():
    from torch.distributed.tensor import DTensor, Shard, init_device_mesh

    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        p = nn.Parameter(DTensor.from_local(torch.ones(4, 4), mesh, [Shard(0)]))
        optimizer = gradpress.optim.AdamW8bit([p])
        with pytest.raises(NotImplementedError, match="parameters must not be sharded"):
            offload_states(optimizer)
        optimizer = gradpress.optim.AdamW8bit([nn.Parameter(torch.ones(2))])
        offload_states(optimizer)
        optimizer.add_param_group({"params": [p]})
        p.grad = torch.ones_like(p)
        with pytest.raises(NotImplementedError, match="parameters must not be sharded"):
            optimizer.step()
    finally:
        torch.distributed.destroy_process_group()
