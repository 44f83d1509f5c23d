"""What a watch counts, against sums that are known."""

import gc
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.profiler import ProfilerActivity, profile

import gradpress
from gradpress.memory import count, watch


def test_storages_count_from_creation_to_their_end():
    with watch() as watched:
        a = torch.empty(1000)
        b = torch.empty(500)
        del a
        c = torch.empty(100)
        assert watched.current == 4 * 600
    assert watched.peak == 4 * 1500
    assert watched.peak_by_category == {"temporaries": 4 * 1500}
    assert (b.numel(), c.numel()) == (500, 100)


PROGRAMS = st.lists(
    st.tuples(st.sampled_from(["make", "view", "write", "drop"]), st.integers(1, 300)), max_size=40
)


@given(PROGRAMS)
def test_any_program_of_allocations_and_views(program):
    """A model of it: tensors are names of storages, which live as long as one of them does."""
    tensors, sizes = [], {}
    owner: list[int] = []
    peak = made = 0
    with watch(min_bytes=0) as watched:
        for kind, number in program:
            if kind == "make":
                tensors.append(torch.zeros(number))
                owner.append(made)
                sizes[made] = 4 * number
                made += 1
            elif tensors:
                i = number % len(tensors)
                if kind == "view":
                    tensors.append(tensors[i][number % 3 :].view(-1, 1))
                    owner.append(owner[i])
                elif kind == "write":
                    tensors[i].add_(1.0)
                else:
                    del tensors[i], owner[i]
            live = sum(sizes[key] for key in set(owner))
            peak = max(peak, live)
            assert watched.current == live
    assert watched.peak == peak
    assert sum(creation.count for creation in watched.created()) == made


def test_what_exists_before_counts_where_it_is_given():
    model = nn.Linear(64, 32)
    with watch() as alone, watch(model) as baseline:
        model.weight.detach().view(-1)[:5].mul_(2)
    assert alone.peak == 0
    assert baseline.peak_by_category == {"weights": 4 * (64 * 32 + 32)}


def test_results_that_are_resized_and_written():
    with watch() as watched:
        out = torch.empty(0)
        torch.add(torch.ones(100), 1.0, out=out)
        assert watched.current == 400
        out.resize_(300)
        assert watched.current == 1200


def test_gradients_states_and_activations_are_told_apart():
    model = nn.Sequential(nn.Linear(128, 96, bias=False), nn.ReLU(), nn.Linear(96, 16, bias=False))
    optimizer = gradpress.optim.AdamW8bit(model.parameters(), min_8bit_size=64)
    x = torch.randn(50, 128)
    with watch(model, optimizer) as watched:
        model(x).sum().backward()
        optimizer.step()
        after = count(model, optimizer).by_category
        now = watched.current_by_category
    for name, size in after.items():
        # A counter of gradients that are not finite stands beside the states.
        assert now[name] == size + (8 if name == "optimizer_states" else 0)
    with watch(model, optimizer) as second:
        hidden = model[1](model[0](x))
        loss = model[2](hidden).sum()
        loss.backward()
    # For the backward pass: ReLU's result; the product before it went when ReLU had been applied.
    assert second.current_by_category["activations"] == 4 * 50 * 96 + loss.nbytes


def test_states_made_before_the_peak_are_named_afterwards():
    model = nn.Linear(300, 200, bias=False)
    optimizer = torch.optim.AdamW(model.parameters())
    with watch(model, optimizer) as watched:
        model(torch.ones(1, 300)).sum().backward()
        optimizer.step()
    size = 4 * 300 * 200
    parts = watched.peak_by_category
    assert parts["gradients"] == parts["weights"] == size
    assert parts["optimizer_states"] == 2 * size + 4
    assert sum(parts.values()) == watched.peak


def test_kernels_and_dequantized_weights_are_seen():
    weight = gradpress.nn.QuantizedWeight.from_float(torch.randn(64, 128))
    with watch() as watched:
        weight.norm()
        copy = weight.clone()
    largest = watched.largest_floating
    assert (largest.shape, largest.dtype, largest.bytes) == ((64, 128), "float32", 4 * 64 * 128)
    assert "_weight.py" in largest.source
    assert watched.current == copy.stored_bytes


def test_operators_for_graphs_are_seen_inside():
    weight = gradpress.nn.QuantizedWeight.from_float(torch.randn(64, 128))
    x = torch.randn(3, 128)
    parts = weight.codes, weight.scale, weight.zero_point
    with watch(min_bytes=0) as watched:
        y = torch.ops.gradpress.linear_blockwise(
            x, *parts, None, shape=[64, 128], bits=8, group_size=256
        )
    assert torch.equal(y, torch.nn.functional.linear(x, weight))
    made = sum(c.numel * c.count for c in watched.created() if c.is_floating_point)
    assert made >= 64 * 128 // 2  # the halves share their memory


def test_composite_operators_are_seen_inside_without_autograd():
    a, b = torch.randn(8, 16, 32), torch.randn(32, 24).t().contiguous().t()
    with torch.inference_mode(), watch(min_bytes=0) as watched:
        torch.einsum("bij,jk->bik", a, b)
    assert not any("einsum" in creation.operator for creation in watched.created())
    assert watched.peak >= 4 * 8 * 16 * 24


def test_no_weight_was_ever_dense():
    torch.manual_seed(0)
    model = gradpress.nn.quantize_(nn.Sequential(nn.Linear(256, 256, bias=False), nn.ReLU()))
    groups = gradpress.optim.param_groups(model, rank=8, verbose=False)
    optimizer = gradpress.optim.QGaLoreAdamW(groups, materialize_gradients=False)
    with watch(model, optimizer) as watched:
        for _ in range(2):
            model(torch.randn(4, 256)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert watched.largest_floating.numel < 256 * 256
    assert not [c for c in watched.created() if c.numel >= 256 * 256 and c.is_floating_point]


def test_accumulators_are_told_apart():
    model = gradpress.nn.quantize_(nn.Sequential(nn.Linear(256, 128, bias=False), nn.ReLU()))
    groups = gradpress.optim.param_groups(model, rank=8, verbose=False)
    optimizer = gradpress.optim.QGaLoreAdamW(groups, materialize_gradients=False)
    with watch(model, optimizer) as watched:
        model(torch.randn(4, 256)).square().sum().backward()
        assert watched.current_by_category["accumulators"] == 4 * 8 * 256


def test_the_operator_and_the_line_of_a_creation():
    with watch() as watched:
        torch.ones(64, 32) @ torch.ones(32, 128)
    largest = watched.largest
    assert (largest.operator, largest.shape, largest.bytes) == ("aten.mm.default", (64, 128), 32768)
    assert largest.source.startswith("memory/test_watch.py:")
    assert largest.source.endswith(" test_the_operator_and_the_line_of_a_creation")
    assert "aten.mm.default" in str(largest)
    assert "float32 64x128" in str(watched)


def test_creations_below_the_bound_are_not_listed():
    with watch(min_bytes=4000) as watched:
        torch.ones(999)
        for _ in range(3):
            torch.ones(1000)
    assert [(c.bytes, c.count) for c in watched.created()] == [(4000, 3)]
    with pytest.raises(ValueError, match=r"Watch\.created: min_bytes .* 4000, got 10"):
        watched.created(10)


def test_watches_in_one_another_count_by_themselves():
    with watch() as outer:
        a = torch.empty(10)
        with watch() as inner:
            b = torch.empty(20)
            weight = gradpress.nn.QuantizedWeight.from_float(torch.randn(16, 16)).clone()
        c = torch.empty(40)
    assert inner.current == 4 * 20 + weight.stored_bytes
    assert outer.current == inner.current + a.nbytes + c.nbytes
    assert b.nbytes == 80


def test_a_watch_measures_once_and_leaves_nothing_behind():
    model = nn.Linear(8, 8)
    optimizer = torch.optim.SGD(model.parameters())
    watched = watch(model, optimizer)
    with pytest.raises(ZeroDivisionError), watched:
        raise ZeroDivisionError
    with pytest.raises(RuntimeError, match="measures once"), watched:
        pass
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    assert not model.weight._post_accumulate_grad_hooks
    before = watched.peak
    torch.empty(1000)
    assert watched.peak == before


def allocated_at_most(run):
    """What PyTorch's own profiler says: it follows the allocator, which knows of no operators."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = profiler.profiler.kineto_results.events()
    memory = sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns())
    return max(itertools.accumulate(e.nbytes() for e in memory))


@pytest.mark.parametrize("materialize_gradients", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_allocator_agrees(dtype, materialize_gradients):
    blocks = [nn.Sequential(nn.Linear(256, 384), nn.GELU(), nn.Linear(384, 256)) for _ in range(3)]
    model = gradpress.nn.quantize_(nn.Sequential(*blocks, nn.LayerNorm(256)).to(dtype))
    groups = gradpress.optim.param_groups(model, rank=16, verbose=False)
    optimizer = gradpress.optim.QGaLoreAdamW(
        groups, materialize_gradients=materialize_gradients, stagger=False
    )
    x = torch.randn(200, 256, dtype=dtype)

    def step():
        model(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    with watch(model, optimizer) as watched:
        before = watched.current
        step()
    # Operators may take memory and give it back, for a row of a product at a time.
    assert watched.peak - before == pytest.approx(allocated_at_most(step), rel=0.01)


def test_meta_tensors_take_nothing():
    with watch() as watched:
        torch.empty(1 << 40, device="meta")
    assert watched.peak == 0


def test_training_is_the_same_under_a_watch():
    def train(watching):
        torch.manual_seed(0)
        model = gradpress.nn.quantize_(nn.Sequential(nn.Linear(64, 64), nn.Tanh()))
        groups = gradpress.optim.param_groups(model, rank=4, verbose=False)
        optimizer = gradpress.optim.QGaLoreAdamW(groups, lr=0.1)
        with watch(model, optimizer) if watching else torch.enable_grad():
            for _ in range(3):
                model(torch.randn(8, 64)).square().sum().backward()
                optimizer.step()
                optimizer.zero_grad()
        return model[0].weight

    plain, watched = train(False), train(True)
    assert all(torch.equal(plain.parts[name], part) for name, part in watched.parts.items())


def test_memory_of_a_long_training_stays():
    with watch() as watched:
        x = torch.zeros(100)
        for _ in range(200):
            x = x + 1
        gc.collect()
        assert watched.current == 400
        assert len(watched._accountant._live) == 1
    assert watched.peak == 800
