"""Ranks chosen from gradients: by energy, within a budget, by hand or in an optimizer's steps."""

import copy
import itertools
import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import gradpress
from gradpress.optim import Apollo, Fira, GaLoreAdamW, QGaLoreAdamW, fused_backward
from gradpress.optim._rank_choice import RankChoice, choose_ranks, parse_bytes
from gradpress.optim._ranks import Curve, RankRule, Spectrum, allocate, choose, squared_norm
from gradpress.optim._scaling import Scale

#: What float32 singular values lose of a share.
NEAR = 4e-6

SPECTRA = {
    "power": lambda i: (1.0 + i) ** -1.0,
    "slow": lambda i: (1.0 + i) ** -0.5,
    "exact": lambda i: np.where(i < 5, 2.0 + i, 0.0),
    "flat": lambda i: np.ones(len(i)),
    "steep": lambda i: 0.5**i,
}
every_spectrum = pytest.mark.parametrize("kind", SPECTRA)


def matrix(shape, kind, seed=0):
    """A gradient with a known spectrum, and the shares that ranks capture, in float64."""
    generator = np.random.default_rng(seed)
    short = min(shape)
    left, right = (np.linalg.qr(generator.standard_normal((n, short)))[0] for n in shape)
    values = SPECTRA[kind](np.arange(short))
    return left * values @ right.T, np.cumsum(np.sort(values)[::-1] ** 2) / np.sum(values**2)


def captured(gradient):
    squares = np.linalg.svd(np.asarray(gradient, dtype=np.float64), compute_uv=False) ** 2
    return np.cumsum(squares) / squares.sum()


def parameter(gradient, **kwargs):
    p = nn.Parameter(torch.zeros(np.shape(gradient), **kwargs))
    p.grad = torch.tensor(np.asarray(gradient)).to(p.dtype)
    return p


class Layers(nn.Module):
    """Layers of several shapes whose gradients are given."""

    def __init__(self, shapes=((40, 64), (64, 40), (48, 48)), kinds=("power", "slow", "flat")):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(n, m) for m, n in shapes)
        self.kinds = kinds

    def backward(self, seed=0, only=None):
        for i, (layer, kind) in enumerate(zip(self.layers, self.kinds, strict=True)):
            if only is None or i in only:
                gradient, _ = matrix(tuple(layer.weight.shape), kind, seed + i)
                layer.weight.grad = torch.tensor(gradient).float()
                layer.bias.grad = torch.ones(layer.bias.shape)
        return self

    def weights(self):
        return [(f"layers.{i}.weight", layer.weight) for i, layer in enumerate(self.layers)]


def auto(model, optimizer_class=QGaLoreAdamW, **options):
    """An optimizer that chooses the ranks of a model's weights itself."""
    chosen = {id(p) for _, p in model.weights()}
    rest = [(n, p) for n, p in model.named_parameters() if id(p) not in chosen]
    return optimizer_class(
        [{"params": model.weights(), "rank": "auto"}, {"params": rest, "rank": None}], **options
    )


def half_of(model, optimizer_class=QGaLoreAdamW, **options):
    """A budget that is half of what the highest ranks of a model's weights would take."""
    highest = auto(model, optimizer_class, **options)
    planned = (highest._planned_state(highest.param_groups[0], p) for _, p in model.weights())
    return sum(t.nbytes for s in planned for t in s.values() if isinstance(t, torch.Tensor)) // 2


def bytes_of(optimizer, params):
    states = [optimizer.state[p] for p in params]
    return sum(t.nbytes for s in states for t in s.values() if isinstance(t, torch.Tensor))


def assert_equal(model, other):
    pairs = zip(model.parameters(), other.parameters(), strict=True)
    assert all(torch.equal(p, q) for p, q in pairs)


def ranks_in(optimizer, model):
    return {name: optimizer.state[p]["projector_rank"] for name, p in model.weights()}


# Energy


@every_spectrum
@pytest.mark.parametrize("shape", [(33, 20), (20, 24), (1, 7)])
@given(energy=st.floats(0.01, 1.0), seed=st.integers(0, 9))
def test_the_rank_is_the_smallest_that_captures_the_energy(kind, shape, energy, seed):
    gradient, shares = matrix(shape, kind, seed)
    (row,) = choose_ranks([("w", parameter(gradient))], energy=energy, max_rank=99).rows
    assert shares[row.rank - 1] >= energy - NEAR
    assert row.rank == 1 or shares[row.rank - 2] < energy + NEAR
    assert row.energy == pytest.approx(shares[row.rank - 1], abs=NEAR)


def test_all_of_a_gradient_of_low_rank_is_captured_by_its_rank():
    gradient, _ = matrix((30, 50), "exact")
    assert choose_ranks([("w", parameter(gradient))], energy=1.0, max_rank=30).ranks == {"w": 5}


@pytest.mark.parametrize("kind", ["power", "slow", "noise"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_searches_that_do_not_see_all_directions_come_near(kind, dtype):
    """Of what a random search finds not more is claimed than there is."""
    shape = (400, 230)
    if kind == "noise":
        gradient = np.random.default_rng(0).standard_normal(shape)
    else:
        gradient, _ = matrix(shape, kind)
    p = parameter(gradient, dtype=dtype)
    shares = captured(p.grad.double())
    for energy in (0.3, 0.6):
        (row,) = choose_ranks([("w", p)], energy=energy).rows
        least = 1 + int(np.sum(shares < energy))
        assert least <= row.rank <= 1.1 * least + 1
        assert energy * (1 - 2e-6) <= row.energy <= shares[row.rank - 1] + NEAR


def test_by_default_ranks_stay_below_half():
    rows = choose_ranks([(str(n), parameter(matrix((n, 30), "flat")[0])) for n in (9, 10, 1, 2)])
    assert [row.rank for row in rows.rows] == [4, 4, 1, 1]
    assert rows.rows[0].energy == pytest.approx(4 / 9, abs=NEAR)


@given(
    short=st.integers(1, 50),
    smallest=st.integers(1, 60),
    extra=st.none() | st.integers(0, 60),
    multiple=st.integers(1, 17),
)
def test_candidates_keep_the_limits(short, smallest, extra, multiple):
    largest = None if extra is None else smallest + extra
    rule = RankRule(smallest=smallest, largest=largest, multiple=multiple)
    ranks = list(rule.candidates((short, 70)))
    assert ranks == sorted(set(ranks)) != []
    assert all(1 <= r <= short for r in ranks)
    assert all(min(short, smallest) <= r for r in ranks)
    assert largest is None or all(r <= largest for r in ranks)
    top = max((short - 1) // 2, min(short, smallest), 1) if largest is None else min(short, largest)
    legal = [r for r in range(smallest, top + 1) if r % multiple == 0]
    assert ranks == (legal or [top])


def test_limits_hold_whatever_the_energy():
    named = [("steep", parameter(matrix((40, 40), "steep")[0]))]
    named += [("flat", parameter(matrix((40, 40), "flat")[0]))]
    ranks = choose_ranks(named, energy=0.5, min_rank=3, max_rank=18, rank_multiple=4).ranks
    assert ranks == {"steep": 4, "flat": 16}


# Budgets

steps = st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9)), max_size=4)
problems = st.lists(steps, min_size=1, max_size=3)


def curve(start, steps):
    sizes = np.cumsum([start, *(size for size, _ in steps)])
    shares = np.cumsum([0, *(gain for _, gain in steps)]) / 64
    return Curve(range(1, len(sizes) + 1), sizes.tolist(), shares.tolist())


def best(curves, budget):
    """The most that any choice within the budget captures."""
    return max(
        sum(c.shares[i] for c, i in zip(curves, places, strict=True))
        for places in itertools.product(*(range(len(c.ranks)) for c in curves))
        if sum(c.sizes[i] for c, i in zip(curves, places, strict=True)) <= budget
    )


def totals(curves, ranks):
    places = [rank - 1 for rank in ranks]
    size = sum(c.sizes[i] for c, i in zip(curves, places, strict=True))
    return size, sum(c.shares[i] for c, i in zip(curves, places, strict=True))


@given(problem=problems, room=st.integers(0, 60))
def test_budgets_are_spent_as_well_as_by_brute_force(problem, room):
    """Of whatever form the curves are: what is missing is less than one step of a hull."""
    curves = [curve(3, steps) for steps in problem]
    budget = 3 * len(curves) + room
    size, share = totals(curves, allocate(curves, budget))
    assert size <= budget
    gains = [c.shares[j] - c.shares[i] for c in curves for i, j in itertools.pairwise(c.hull())]
    missing = best(curves, budget) - share
    assert missing >= 0
    assert missing == 0 or missing < max(gains)


@given(problem=problems, room=st.integers(0, 12), unit=st.integers(1, 5))
def test_budgets_are_spent_in_the_best_way_where_steps_cost_the_same(problem, room, unit):
    """And gains fall, as those of singular values do."""
    falling = [sorted((gain for _, gain in steps), reverse=True) for steps in problem]
    curves = [curve(3, [(unit, gain) for gain in gains]) for gains in falling]
    budget = 3 * len(curves) + room * unit
    ranks = allocate(curves, budget)
    assert totals(curves, ranks)[1] == best(curves, budget)


def test_sizes_that_fall_are_passed_by():
    """Moments that become codes once they are many: rank 3 takes less than rank 2."""
    dip = Curve([1, 2, 3, 4], [40, 80, 30, 40], [0.4, 0.6, 0.7, 0.75])
    assert allocate([dip], 39) == [3]
    assert allocate([dip], 40) == [4]
    with pytest.raises(ValueError, match=r"budget .* must be at least 30 bytes"):
        allocate([dip], 29)


def test_equal_steps_go_to_the_first():
    assert allocate([curve(1, [(2, 4), (2, 4)]) for _ in range(3)], 9) == [3, 2, 1]


def test_nothing_is_spent_on_nothing():
    assert allocate([curve(1, [(2, 4), (2, 0)])], 99) == [2]


@pytest.mark.parametrize("budget", [20_000, 36_000, "0.05MB"])
def test_budgets_agree_with_exact_spectra(budget):
    """With ranks beyond what is looked at first, against float64 decompositions."""
    kinds = ["slow", "power", "flat"]
    named = [(kind, parameter(matrix((170, 200), kind)[0])) for kind in kinds]
    choice = choose_ranks(named, budget=budget)
    size = parse_bytes(budget)
    costs = {r: _cost((170, 200), r) for r in range(1, 85)}
    exact = [captured(p.grad.double()) for _, p in named]
    curves = [Curve(range(1, 85), list(costs.values()), shares[:84].tolist()) for shares in exact]
    _, want = totals(curves, allocate(curves, size))
    found = sum(shares[row.rank - 1] for shares, row in zip(exact, choice.rows, strict=True))
    assert choice.total_bytes <= size
    assert found >= want - 0.01
    # Better than the same rank for all.
    even = max(r for r, cost in costs.items() if 3 * cost <= size)
    assert found > sum(shares[even - 1] for shares in exact)
    assert max(row.rank for row in choice.rows) > even


def _cost(shape, rank):
    p = nn.Parameter(torch.zeros(shape))
    p.grad = torch.ones(shape)
    optimizer = QGaLoreAdamW([p], rank=rank)
    optimizer.step()
    return bytes_of(optimizer, [p])


def test_with_both_the_energy_is_enough():
    model = Layers().backward()
    alone = choose_ranks(model, energy=0.6)
    assert choose_ranks(model, energy=0.6, budget="1GiB").ranks == alone.ranks
    less = choose_ranks(model, energy=0.6, budget=alone.total_bytes - 1)
    assert less.total_bytes < alone.total_bytes
    assert all(less.ranks[name] <= rank for name, rank in alone.ranks.items())


@pytest.mark.parametrize(
    ("optimizer_class", "options"),
    [
        (QGaLoreAdamW, {}),
        (QGaLoreAdamW, {"min_8bit_size": 600}),
        (QGaLoreAdamW, {"min_8bit_size": 64, "state_bits": 4, "projector_group_size": 64}),
        (Fira, {"projector_bits": 8}),
        (GaLoreAdamW, {}),
        *((GaLoreAdamW, {"proj_type": t}) for t in ("reverse_std", "left", "right", "full")),
    ],
)
@pytest.mark.parametrize("by", ["groups", "steps"])
def test_budgets_are_kept_to_the_byte(optimizer_class, options, by):
    model = Layers().backward()
    budget = half_of(model, optimizer_class, **options)
    if by == "groups":
        groups = gradpress.optim.param_groups(
            model, "auto", budget=budget, optimizer=optimizer_class, verbose=False, **options
        )
        claimed = choose_ranks(model, budget=budget, optimizer=optimizer_class, **options)
        optimizer = optimizer_class(groups)
    else:
        optimizer = auto(model, optimizer_class, rank_budget=budget, **options)
    optimizer.step()
    weights = [p for _, p in model.weights()]
    used = bytes_of(optimizer, weights)
    if by == "groups":
        assert used == claimed.total_bytes
        assert ranks_in(optimizer, model) == claimed.ranks
    counted = gradpress.memory.count(model, optimizer).by_category
    rest = bytes_of(optimizer, [layer.bias for layer in model.layers])
    assert counted["optimizer_states"] + counted["projectors"] - rest == used
    # No weight below its largest rank has room for one more.
    assert used <= budget
    assert len({*ranks_in(optimizer, model).values()}) > 1
    for name, p in model.weights():
        rank = optimizer.state[p]["projector_rank"]
        if rank < (min(p.shape) - 1) // 2:
            (group,) = (g for g in optimizer.param_groups if any(q is p for q in g["params"]))
            more = optimizer._state_bytes(group, tuple(p.shape), rank + 1)
            assert used - bytes_of(optimizer, [p]) + more > budget, name


# Groups


def test_groups_have_one_rank_each(capsys):
    model = Layers().backward()
    choice = choose_ranks(model, energy=0.7)
    groups = gradpress.optim.param_groups(model, rank="auto", energy=0.7, update_proj_gap=7, lr=0.1)
    *projected, rest = groups
    assert [g["rank"] for g in projected] == sorted({*choice.ranks.values()})
    assert all(type(g["rank"]) is int and g["lr"] == 0.1 for g in projected)
    assert {n: g["rank"] for g in projected for n, _ in g["params"]} == choice.ranks
    assert all(g["update_proj_gap"] == 7 for g in projected)
    assert [n for n, _ in rest["params"]] == [f"layers.{i}.bias" for i in range(3)]
    low, high = min(choice.ranks.values()), max(choice.ranks.values())
    shares = [row.energy for row in choice.rows]
    words = f"ranks {low} to {high} ({min(shares):.2f} to {max(shares):.2f} of the gradients, "
    assert words + f"{choice.total_bytes:,} bytes): 3 weights" in capsys.readouterr().out
    again = gradpress.optim.param_groups(Layers(), rank=choice.ranks, verbose=False)
    assert [g["rank"] for g in again] == [g["rank"] for g in groups]


def test_refreshes_are_spread_over_groups_of_one_weight():
    model = Layers().backward()
    groups = gradpress.optim.param_groups(model, "auto", update_proj_gap=30, verbose=False)
    assert len(groups) == 4
    optimizer = QGaLoreAdamW(groups)
    optimizer.step()
    offsets = {optimizer.state[p]["projector_offset"] for _, p in model.weights()}
    assert offsets == {0, 10, 20}


def test_the_table():
    choice = choose_ranks(Layers().backward(), energy=0.5)
    assert isinstance(choice, RankChoice)
    text = str(choice).splitlines()
    assert [line.split()[0] for line in text] == ["name", *choice.ranks, "total"]
    assert text[1].split()[1:3] == ["40x64", str(choice.rows[0].rank)]
    assert text[-1].split()[-1] == f"{choice.total_bytes:,}"
    assert choice.to_dict()[0] == {
        "name": "layers.0.weight",
        "shape": (40, 64),
        "rank": choice.rows[0].rank,
        "energy": choice.rows[0].energy,
        "bytes": choice.rows[0].bytes,
    }


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda p: setattr(p, "grad", None), "layers.1.weight has none"),
        (lambda p: p.grad.zero_(), "layers.1.weight has one that is zero"),
        (lambda p: p.grad[0].fill_(float("nan")), "layers.1.weight has one that is zero or not"),
        (lambda p: p.grad[0].fill_(float("inf")), "layers.1.weight has one that is zero or not"),
    ],
)
def test_gradients_that_say_nothing_are_an_error(spoil, message):
    model = Layers().backward()
    spoil(model.layers[1].weight)
    with pytest.raises(ValueError, match=f"rank='auto' needs a gradient .* {message}"):
        gradpress.optim.param_groups(model, rank="auto")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"energy": 0.0}, "Invalid energy value: 0.0"),
        ({"energy": 1.5}, "Invalid energy value: 1.5"),
        ({"budget": 0}, "Invalid budget value: 0"),
        ({"budget": "many"}, "budget must be a number of bytes or a text as '64MB'.* got 'many'"),
        ({"budget": 99}, r"budget .* must be at least [\d,]+ bytes"),
        ({"min_rank": 0}, "Invalid min_rank value: 0"),
        ({"min_rank": 4, "max_rank": 3}, "Invalid max_rank value: 3"),
        ({"rank_multiple": 0}, "Invalid rank_multiple value: 0"),
        ({"optimizer": Apollo}, "optimizer must project as gradients say, got Apollo"),
        ({"proj_type": "left"}, "optimizer must take .* QGaLoreAdamW says: Invalid proj_type"),
        ({"rank": 4, "energy": 0.5}, "energy is for rank='auto', got 4"),
        ({"rank": "much"}, "rank must be a number, 'auto' or a dict, got 'much'"),
        ({"rank": {"layers.0.weight": 3, "x": 1}}, r"lacks \['layers.1.weight', .*has \['x'\]"),
    ],
)
def test_invalid_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        gradpress.optim.param_groups(Layers().backward(), **{"rank": "auto", **arguments})


def test_only_matrices_have_ranks():
    with pytest.raises(ValueError, match="b has shape"):
        choose_ranks([("b", parameter(np.ones(3)))])


def test_sizes_in_words():
    words = {"64MB": 64 * 10**6, "1.5 GiB": 3 << 29, "12": 12, "3kb": 3000, ".5KiB": 512, 7: 7}
    assert {word: parse_bytes(word) for word in words} == words


@pytest.mark.parametrize("bits", [8, 4])
def test_quantized_weights(bits):
    plain = Layers().backward()
    model = gradpress.nn.quantize_(Layers(), bits=bits).backward()
    choice = choose_ranks(model, energy=0.7)
    assert choice == choose_ranks(plain, energy=0.7)
    optimizer = auto(model, rank_energy=0.7)
    before = gradpress.nn.flatten_state_dict(copy.deepcopy(model))
    optimizer.step()
    assert ranks_in(optimizer, model) == choice.ranks
    after = gradpress.nn.flatten_state_dict(model)
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_tensors_of_other_forms():
    """Strides and orders do not matter: the first dimension against all others."""
    gradient, _ = matrix((36, 60), "slow")
    strided = nn.Parameter(torch.zeros(60, 36).t())
    strided.grad = torch.tensor(gradient).float().t().contiguous().t()
    kernel = nn.Parameter(torch.zeros(36, 15, 2, 2))
    kernel.grad = torch.tensor(gradient).float().view(kernel.shape)
    kernel.grad = kernel.grad.to(memory_format=torch.channels_last)
    named = [("plain", parameter(gradient)), ("strided", strided), ("kernel", kernel)]
    assert len({*choose_ranks(named, energy=0.8, max_rank=36).ranks.values()}) == 1


def test_same_bits_for_all_threads(restore_threads):
    gradients = [np.random.default_rng(i).standard_normal((300, 420)) for i in range(2)]
    named = [(str(i), parameter(g)) for i, g in enumerate(gradients)]
    results = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        results.append(choose_ranks(named, energy=0.6, budget="1MB"))
    assert results[0] == results[1]
    assert all(64 < row.rank < 149 for row in results[0].rows)
    for p in (named[0][1], parameter(np.full((3, 5), 1e30)), parameter(np.full((2, 2), 1e-30))):
        assert squared_norm(p.grad) == pytest.approx(float(p.grad.double().square().sum()))


def test_searches_widen_as_far_as_they_must(monkeypatch):
    from gradpress.ops import lowrank as kernels

    widths = []
    svd = kernels.svd
    monkeypatch.setattr(kernels, "svd", lambda x, **o: (widths.append(o["rank"]), svd(x, **o))[1])
    rule = RankRule(energy=0.5, largest=300)
    for kind, want in (("steep", [64]), ("flat", [64, 128, 256])):
        gradient = torch.tensor(matrix((400, 310), kind)[0]).float()
        spectrum = Spectrum(gradient, rule.candidates((400, 310)), 0)
        (rank,) = choose([spectrum], rule, None)
        assert widths == want, kind
        assert rank == (1 if kind == "steep" else 155)
        widths.clear()


# Steps


@pytest.mark.parametrize("optimizer_class", [QGaLoreAdamW, GaLoreAdamW, Fira])
def test_first_gradients_decide(optimizer_class):
    model = Layers().backward()
    choice = choose_ranks(model, energy=0.7, optimizer=optimizer_class)
    optimizer = auto(model, optimizer_class, rank_energy=0.7)
    twin = copy.deepcopy(model).backward()
    groups = [{"params": [row], "rank": choice.ranks[row[0]]} for row in twin.weights()]
    rest = [(f"layers.{i}.bias", layer.bias) for i, layer in enumerate(twin.layers)]
    by_hand = optimizer_class([*groups, {"params": rest, "rank": None}])
    for step in range(3):
        for m, o in ((model, optimizer), (twin, by_hand)):
            o.step()
            m.backward(10 * step)
    assert ranks_in(optimizer, model) == choice.ranks
    assert optimizer.param_groups[0]["rank"] == "auto"
    assert_equal(model, twin)
    report = {row.name: row for row in optimizer.report().rows}
    for row in choice.rows:
        assert report[row.name].energy == pytest.approx(row.energy, abs=0.02)


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_useless_gradients_decide_nothing(value):
    model, twin = Layers(), Layers()
    twin.load_state_dict(model.state_dict())
    optimizer = auto(model, rank_energy=0.7, rank_min=2, min_8bit_size=100)
    for p in model.parameters():
        p.grad = torch.full(p.shape, value)
    optimizer.param_groups[0]["weight_decay"] = optimizer.param_groups[1]["weight_decay"] = 0.0
    for _ in range(2):
        optimizer.step()
    assert_equal(model, twin)
    assert {*ranks_in(optimizer, model).values()} == {2}
    keys = [set(optimizer.state[p]) for _, p in model.weights()]
    model.backward()
    optimizer.step()
    assert ranks_in(optimizer, model) == choose_ranks(model, energy=0.7, min_rank=2).ranks
    assert keys == [set(optimizer.state[p]) for _, p in model.weights()]
    assert all(float(optimizer.state[p]["step"]) == 3 for p in model.parameters())
    # Once for all.
    before = ranks_in(optimizer, model)
    model.kinds = ("flat", "flat", "flat")
    model.backward()
    optimizer.step()
    assert ranks_in(optimizer, model) == before


def test_some_gradients_may_come_later():
    """The rest of the budget is kept for them."""
    model = Layers()
    budget = half_of(model)
    optimizer = auto(model, rank_budget=budget)
    model.backward(only=[0])
    model.layers[1].weight.grad = torch.zeros(64, 40)
    optimizer.step()
    weights = [p for _, p in model.weights()]
    first = optimizer.state[weights[0]]["projector_rank"]
    group = optimizer.param_groups[0]
    even = optimizer._even_ranks(group)
    kept = sum(optimizer._state_bytes(group, shape, even[shape]) for shape in ((64, 40), (48, 48)))
    assert bytes_of(optimizer, weights[:1]) <= budget - kept
    assert optimizer._state_bytes(group, (40, 64), first + 1) > budget - kept
    model.backward()
    optimizer.step()
    assert optimizer.state[weights[0]]["projector_rank"] == first
    assert budget - 800 < bytes_of(optimizer, weights) <= budget


def test_stepping_during_the_backward_pass_keeps_the_budget():
    torch.manual_seed(0)
    model = Layers()
    budget = half_of(model)
    optimizer = auto(model, rank_budget=budget)
    handle = fused_backward(model, optimizer)
    sum(
        layer(torch.randn(64, layer.in_features)).square().sum() for layer in model.layers
    ).backward()
    handle.remove()
    ranks = ranks_in(optimizer, model)
    even = optimizer._even_ranks(optimizer.param_groups[0])
    assert all(ranks[name] >= even[tuple(p.shape)] for name, p in model.weights())
    assert bytes_of(optimizer, [p for _, p in model.weights()]) <= budget


def test_skipped_steps_decide_nothing():
    """What a device tells about overflow, without the host."""
    model = Layers().backward()
    optimizer = auto(model)
    group, weights = optimizer.param_groups[0], [p for _, p in model.weights()]
    before = [p.detach().clone() for p in weights]
    with torch.no_grad():
        optimizer._step_group(group, weights, Scale(1.0, torch.ones(1), torch.ones(1)))
        assert all(optimizer.state[p]["rank_chosen"] == 0 for p in weights)
        assert all(torch.equal(p, q) for p, q in zip(weights, before, strict=True))
        optimizer._step_group(group, weights, Scale(1.0, torch.ones(1), torch.zeros(1)))
    assert all(optimizer.state[p]["rank_chosen"] == 1 for p in weights)
    assert not any(torch.equal(p, q) for p, q in zip(weights, before, strict=True))


@pytest.mark.parametrize("before", ["chosen", "open"])
@pytest.mark.parametrize("options", [{}, {"rank_budget": 15_000}])
def test_resume_is_bit_exact(before, options):
    model = Layers()
    optimizer = auto(model, update_proj_gap=3, **options)
    model.backward()
    if before == "open":
        for p in model.parameters():
            p.grad.zero_()
    optimizer.step()
    other = copy.deepcopy(model)
    restored = auto(other, update_proj_gap=3, **options)
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for step in range(1, 6):
        for m, o in ((model, optimizer), (other, restored)):
            m.backward(step)
            o.step()
    assert restored.param_groups[0]["rank"] == "auto"
    assert_equal(model, other)
    states = zip(optimizer.state.values(), restored.state.values(), strict=True)
    for ours, theirs in states:
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(*map(torch.as_tensor, (ours[k], theirs[k]))) for k in ours)


@pytest.mark.parametrize("flatten", [False, True])
def test_checkpoints_of_other_ranks(flatten, tmp_path):
    """PyTorch's distributed checkpoints step with zero gradients before they load."""
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint import state_dict as dcp

    options = dcp.StateDictOptions(flatten_optimizer_state_dict=flatten)
    model = Layers().backward()
    optimizer = auto(model, min_8bit_size=100)
    optimizer.step()
    other = copy.deepcopy(model)
    restored = auto(other, min_8bit_size=100)
    saved = copy.deepcopy(dcp.get_optimizer_state_dict(model, optimizer, options=options))
    dcp.set_optimizer_state_dict(other, restored, copy.deepcopy(saved), options=options)
    assert ranks_in(restored, other) == ranks_in(optimizer, model)
    for m, o in ((model, optimizer), (other, restored)):
        m.backward(1)
        o.step()
    assert_equal(model, other)
    if flatten:
        return
    # What fills the tensors that are there says that they are of other sizes.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        checkpoint.save({"optimizer": saved}, checkpoint_id=tmp_path, no_dist=True)
        blank = copy.deepcopy(model)
        empty = {"optimizer": dcp.get_optimizer_state_dict(blank, auto(blank, min_8bit_size=100))}
        with pytest.raises(checkpoint.api.CheckpointException, match=r"Size mismatch"):
            checkpoint.load(empty, checkpoint_id=tmp_path, no_dist=True)


def test_plans():
    """By energy an upper bound; with a budget what equal ranks take of it."""
    model = Layers().backward()
    budget = half_of(model)
    for options in ({"rank_max": 12}, {"rank_budget": budget}):
        optimizer = auto(model, **options)
        planned = gradpress.memory.plan(model, optimizer).by_category
        optimizer.step()
        counted = gradpress.memory.count(model, optimizer).by_category
        rest = bytes_of(optimizer, [layer.bias for layer in model.layers])
        before, after = (c["optimizer_states"] + c["projectors"] - rest for c in (planned, counted))
        if "rank_max" in options:
            assert after < before == sum(_cost(tuple(p.shape), 12) for _, p in model.weights())
        else:
            # One rank more for all would be too much.
            assert budget - 3 * 800 < before <= budget
            assert after <= budget
        assert optimizer.report().rows  # goes by the ranks that there are


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": "autp"}, "Invalid rank value: 'autp'"),
        ({"rank_energy": 1.1}, "Invalid rank_energy value: 1.1"),
        ({"rank_budget": 0}, "Invalid rank_budget value: 0"),
        ({"rank_budget": 99}, r"rank_budget .* must be at least [\d,]+ bytes"),
        ({"rank_min": 0}, "Invalid rank_min value: 0"),
        ({"rank_min": 9, "rank_max": 8}, "Invalid rank_max value: 8"),
        ({"rank_multiple": 0}, "Invalid rank_multiple value: 0"),
    ],
)
def test_invalid_options(options, message):
    with pytest.raises(ValueError, match=message):
        QGaLoreAdamW([nn.Parameter(torch.ones(64, 64))], **{"rank": "auto", **options})


def test_random_projections_have_numbers_for_ranks():
    with pytest.raises(ValueError, match="Apollo: rank must be a number, got 'auto'"):
        Apollo([nn.Parameter(torch.ones(8, 8))], rank="auto")


# Large states


def test_states_that_projection_makes_larger_draw_a_warning():
    big, bigger, small = (nn.Parameter(torch.zeros(n, 512)) for n in (512, 640, 40))
    named = [("big", big), ("bigger", bigger), ("small", small)]
    # 3 * 4 bytes a row and rank, of 512 * 512 * 2.03 and a bit.
    fits = math.floor(512 * 2.03125 / 12) - 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        GaLoreAdamW(named, rank=fits)
        QGaLoreAdamW(named, rank=255)
        GaLoreAdamW(named, rank=None)
    with pytest.warns(UserWarning, match=r"8-bit Adam without a projection; .* 2 weights") as seen:
        GaLoreAdamW(named, rank=200)
    (text,) = (str(w.message) for w in seen)
    own = 4 * (2 * 640 * 200 + 512 * 200 + 512 + 1)  # moments, projector, its direction, the step
    plain = 2 * 640 * 512 + 2 * 4 * 640 * 512 // 256 + 4
    assert text.startswith(
        f"GaLoreAdamW: the states of bigger (640, 512) take {own:,} bytes at rank 200, more than"
        f" the {plain:,} of 8-bit Adam"
    )


def test_ranks_that_are_chosen_draw_it_too():
    p = parameter(np.random.default_rng(0).standard_normal((384, 384)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer = GaLoreAdamW([("w", p)], rank="auto", rank_energy=0.5)
    with pytest.warns(UserWarning, match=r"the states of w \(384, 384\) take .* at rank"):
        optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
