"""Recipes on models: the laws that pruning keeps, allocations, and options that do not fit."""

import copy
import itertools
import re

import pytest
import torch
from torch import nn

import gradpress
from gradpress import prune

GRADIENTS = (prune.Gradient, prune.GBLM)
SCORES = (prune.Magnitude, prune.Wanda, *GRADIENTS)
ALL = (*SCORES, prune.SparseGPT)
every = pytest.mark.parametrize("recipe", ALL)
by_score = pytest.mark.parametrize("recipe", SCORES)


def loss(model, batch):
    return model(batch).square().mean()


class Attention(nn.Module):
    def __init__(self, columns):
        super().__init__()
        self.query, self.key = nn.Linear(columns, 16), nn.Linear(16, 16)

    def forward(self, x):
        return torch.tanh(self.key(torch.tanh(self.query(x))))


class Network(nn.Module):
    """Three layers, by names that share parts."""

    def __init__(self, columns):
        super().__init__()
        self.attention, self.output = Attention(columns), nn.Linear(16, 8)

    def forward(self, x):
        return self.output(self.attention(x))


def network(columns=12, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return Network(columns).to(dtype)


def batches(columns=12, dtype=torch.float32, count=3, scale=1.0):
    g = torch.Generator().manual_seed(1)
    return [(torch.randn(4, columns, generator=g) * scale).to(dtype) for _ in range(count)]


def pruned(recipe, model=None, calibration=None, by=loss):
    """The weights by name after a recipe, and its report."""
    model = copy.deepcopy(network() if model is None else model)
    report = gradpress.compress(
        model,
        recipe,
        calibration=batches() if calibration is None else calibration,
        loss=by,
        progress=False,
    )
    found = {row.name: model.get_submodule(row.name).weight.detach() for row in report.rows}
    return found, report


def masks(*arguments, **options):
    return {name: weight != 0 for name, weight in pruned(*arguments, **options)[0].items()}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def dense(model=None):
    model = network() if model is None else model
    return {n: m.weight.detach().clone() for n, m in model.named_modules() if hasattr(m, "weight")}


@every
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.99, 1.0])
def test_exact_counts(recipe, sparsity):
    found, report = pruned(recipe(sparsity=sparsity))
    for weight in found.values():
        gone = weight == 0
        if recipe in (prune.Magnitude, prune.SparseGPT):  # of fewer columns than a block
            assert int(gone.sum()) == int(weight.numel() * sparsity)
        else:
            assert set(gone.sum(1).tolist()) == {int(weight.shape[1] * sparsity)}
    share = sum(int((w == 0).sum()) for w in found.values()) / sum(
        w.numel() for w in found.values()
    )
    assert report.sparsity == pytest.approx(share)
    if sparsity == 0:
        assert equal(found, dense())


@every
@pytest.mark.parametrize(("keep", "size"), [(2, 4), (1, 4), (4, 8), (1, 2), (4, 4)])
def test_patterns(recipe, keep, size):
    model = network(columns=16)
    found, report = pruned(recipe(pattern=f"{keep}:{size}"), model, batches(columns=16))
    for weight in found.values():
        assert ((weight != 0).reshape(-1, size).sum(1) == keep).all()
    assert report.sparsity == pytest.approx(1 - keep / size)


@by_score
def test_what_stays_keeps_its_bits(recipe):
    old = dense()
    found, _ = pruned(recipe())
    for name, weight in found.items():
        assert torch.equal(weight, torch.where(weight != 0, old[name], 0.0))
        assert not torch.signbit(weight[weight == 0]).any()


@by_score
def test_more_sparsity_takes_more_of_the_same_weights(recipe):
    # The first layer, since those behind it see what it has become.
    model = network()
    steps = [masks(recipe(sparsity=s, modules="query"), model) for s in (0.2, 0.5, 0.8)]
    for some, more in itertools.pairwise(steps):
        assert not (more["attention.query"] & ~some["attention.query"]).any()


@by_score
def test_equal_scores_go_from_the_left(recipe):
    model = network()
    with torch.no_grad():
        model.attention.query.weight.fill_(0.5)
        model.attention.query.bias.zero_()
        # All outputs count alike, so that all gradients are the same.
        model.attention.key.weight.fill_(0.25)
    calibration = [torch.ones(2, 12)]
    for group in ("row", "matrix"):
        found = masks(recipe(modules="query", group=group), model, calibration)
        kept = found["attention.query"]
        expected = torch.ones(16, 12, dtype=torch.bool)
        if group == "row":
            expected[:, :6] = False
        else:
            expected[:8] = False
        assert torch.equal(kept, expected)


@by_score
@pytest.mark.parametrize("seed", range(4))
def test_permutations(recipe, seed):
    """Of rows and columns, together with what is connected to them."""
    model = network()
    g = torch.Generator().manual_seed(seed)
    columns, rows = torch.randperm(12, generator=g), torch.randperm(16, generator=g)
    moved = copy.deepcopy(model)
    with torch.no_grad():
        moved.attention.query.weight.copy_(model.attention.query.weight[rows][:, columns])
        moved.attention.query.bias.copy_(model.attention.query.bias[rows])
        moved.attention.key.weight.copy_(model.attention.key.weight[:, rows])
    settings = recipe(modules="query", group="row")
    before = masks(settings, model)["attention.query"]
    after = masks(settings, moved, [batch[:, columns] for batch in batches()])["attention.query"]
    assert torch.equal(after, before[rows][:, columns])


@every
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtype_of_storage(recipe, dtype):
    """Of the same values the same masks, as far as inputs and gradients are the same."""
    model = network(dtype=dtype)
    settings = recipe(modules="query")
    wide = model.float() if recipe is prune.Magnitude else copy.deepcopy(model).float()
    found, report = pruned(settings, network(dtype=dtype), batches(dtype=dtype))
    assert all(weight.dtype == dtype for weight in found.values())
    assert report.sparsity == 0.5
    if recipe in (prune.Magnitude, prune.Wanda, prune.SparseGPT):
        calibration = [batch.float() for batch in batches(dtype=dtype)]
        expected = masks(settings, wide, calibration)
        assert equal({name: weight != 0 for name, weight in found.items()}, expected)


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_wanda_depends_on_relative_sizes_alone(pattern):
    model = network()
    settings = prune.Wanda(modules="query", pattern=pattern)
    expected = masks(settings, model)
    assert equal(masks(settings, model, batches(scale=8.0)), expected)
    scaled = copy.deepcopy(model)
    with torch.no_grad():
        scaled.attention.query.weight.mul_(torch.tensor([[2.0], [-0.5]]).repeat(8, 1))
    assert equal(masks(settings, scaled), expected)


def test_wanda_of_equal_inputs_is_magnitude():
    model = network()
    signs = torch.randint(0, 2, (8, 12), generator=torch.Generator().manual_seed(3)) * 2.0 - 1
    found = masks(prune.Wanda(modules="query"), model, [signs])
    assert equal(found, masks(prune.Magnitude(modules="query", group="row"), model))


def test_gblm_limits():
    model = network()
    wanda, gradient = (
        masks(kind(modules="query"), model) for kind in (prune.Wanda, prune.Gradient)
    )
    assert equal(masks(prune.GBLM(modules="query", alpha=0.0), model), wanda)
    assert equal(masks(prune.GBLM(modules="query", alpha=1e20), model), gradient)
    assert not equal(wanda, gradient)
    # No gradients at all are accepted.
    zero = masks(prune.GBLM(modules="query"), model, by=lambda m, b: loss(m, b) * 0)
    assert equal(zero, wanda)


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_gradients_of_opposite_signs_do_not_cancel(norm):
    """Two samples with g and -g: whole batches would see no gradient."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 4, bias=False))
    x = batches(count=1)[0][:1]
    seen = []

    class Seen(prune.Gradient):
        def compress(self, observed):
            seen.extend(one.gradient for one in observed)
            return super().compress(observed)

    def linear(model, batch):
        return model(batch).sum()

    calibration = [torch.cat([x, -x]), torch.cat([x, -x])]
    pruned(Seen(norm=norm), model, calibration, by=linear)
    pruned(Seen(norm=norm), model, calibration, by=lambda *given: 3 * linear(*given))
    expected = x.abs().expand(4, 12)
    torch.testing.assert_close(seen[0].values, expected)
    torch.testing.assert_close(seen[1].values, 3 * expected)
    total = 4 if norm == "l1" else 2
    torch.testing.assert_close(seen[0].reference_values(100), 100 * total * expected)


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_what_a_calibration_twice_does(norm):
    """Nothing to normalised norms; those of the code's form grow with the number of samples."""
    model = network()
    seen = []

    class Seen(prune.GBLM):
        def compress(self, observed):
            seen.append([(one.inputs["input_sq"].values, one.gradient) for one in observed])
            return super().compress(observed)

    once = masks(Seen(norm=norm), model)
    twice = masks(Seen(norm=norm), model, batches() * 2)
    assert equal(once, twice)
    for (squares, first), (others, second) in zip(*seen, strict=True):
        if squares is not seen[0][0][0]:
            continue
        torch.testing.assert_close(squares, others)
        torch.testing.assert_close(first.values, second.values)
        factor = 2 if norm == "l1" else 2**0.5
        torch.testing.assert_close(first.reference_values() * factor, second.reference_values())


@pytest.mark.parametrize("recipe", [prune.Magnitude, prune.Wanda, prune.GBLM, prune.Gradient])
def test_one_choice_in_all_of_the_model(recipe):
    model = network()
    found, report = pruned(recipe(group="model", sparsity=0.4), model)
    counts = {name: int((weight == 0).sum()) for name, weight in found.items()}
    assert sum(counts.values()) == int(0.4 * sum(weight.numel() for weight in found.values()))
    assert report.sparsity == pytest.approx(0.4, abs=0.002)
    if recipe is prune.Magnitude:
        old = dense(model)
        flat = torch.cat([old[name].flatten().abs() for name in found])
        edge = flat.sort().values[sum(counts.values())]
        assert all(
            torch.equal(weight != 0, old[name].abs() >= edge) for name, weight in found.items()
        )
    assert len({round(count / found[name].numel(), 3) for name, count in counts.items()}) > 1


def test_magnitude_as_the_code():
    """One more of each matrix, and all that equal it."""
    found, _ = pruned(prune.Magnitude(reference=True))
    assert all(int((w == 0).sum()) == w.numel() // 2 + 1 for w in found.values())


MAPPINGS = {
    "name": ({"attention.query": 0.75, "output": 0.25}, (0.75, 0.0, 0.25)),
    "part": ({"attention": 0.75}, (0.75, 0.75, 0.0)),
    "expression": ({r"attention\.(key|value)": 0.5}, (0.0, 0.5, 0.0)),
    "first that matches": ({"attention": 0.5, "key": 0.25}, (0.5, 0.5, 0.0)),
    "own name first": ({"attention": 0.5, "attention.key": 0.25}, (0.5, 0.25, 0.0)),
    "all": ({".*": 0.25}, (0.25, 0.25, 0.25)),
}


@every
@pytest.mark.parametrize("case", MAPPINGS)
def test_mappings(recipe, case):
    mapping, expected = MAPPINGS[case]
    model = network(columns=16)
    _, report = pruned(recipe(sparsity=mapping), model, batches(columns=16))
    assert tuple(row.sparsity for row in report.rows) == expected


@pytest.mark.parametrize(
    ("modules", "expected"),
    [
        ("all-linear", ["attention.query", "attention.key", "output"]),
        ("attention", ["attention.query", "attention.key"]),
        (["query", "output"], ["attention.query", "output"]),
        (r".*\.k[a-z]+", ["attention.key"]),
        (re.compile("que|out"), ["attention.query", "output"]),
    ],
)
def test_modules(modules, expected):
    found, _ = pruned(prune.Wanda(modules=modules))
    assert list(found) == expected


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.62, 0.95])
@pytest.mark.parametrize("spread", [0.0, 0.05, 0.3])
@every
def test_allocation(recipe, sparsity, spread):
    """The total is exact, shares stay near it, and what matters less loses more."""
    model = network(columns=40)
    calibration = batches(columns=40)
    settings = recipe(sparsity=sparsity, allocation="gradient", spread=spread)
    found, report = pruned(settings, model, calibration)
    wanted = sparsity * sum(weight.numel() for weight in found.values())
    gone = sum(int((weight == 0).sum()) for weight in found.values())
    # Rows lose whole weights: less than one of each row of a layer is missing. Counts of matrices
    # are rounded down, one by one.
    by_rows = recipe in (prune.Wanda, *GRADIENTS)
    missing = max(map(len, found.values())) if by_rows else len(found)
    assert wanted - missing - 1 < gone <= wanted
    for row in report.rows:
        step = 1 / row.shape[1] if by_rows else 1 / row.shape[0]
        assert abs(row.sparsity - sparsity) <= spread + step
    matters = sensitivity(model, calibration)
    order = sorted(report.rows, key=lambda row: matters[row.name])
    steps = [1 / row.shape[1] + 1e-9 for row in order]
    for i in range(len(order) - 1):
        assert order[i].sparsity >= order[i + 1].sparsity - max(steps[i : i + 2])
    if spread == 0.3 and sparsity == 0.5:
        assert order[0].sparsity > order[-1].sparsity + 0.1


def sensitivity(model, calibration):
    """By autograd: the mean over samples and weights of ``|w g|``."""
    samples = [x[None] for batch in calibration for x in batch]
    found = {}
    for x in samples:
        model.zero_grad()
        loss(model, x).backward()
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear):
                product = (module.weight * module.weight.grad).abs().mean() / len(samples)
                found[name] = found.get(name, 0.0) + float(product.detach())
    return found


REFUSED = [
    ({"sparsity": 1.5}, "sparsity must be from 0 to 1, got 1.5"),
    ({"sparsity": -0.1}, "sparsity must be from 0 to 1, got -0.1"),
    ({"pattern": "2to4"}, 'pattern must be "unstructured" or "N:M", .* got .2to4.'),
    ({"pattern": "5:4"}, 'pattern must be "unstructured" or "N:M", .* got .5:4.'),
    ({"pattern": "2:4", "sparsity": 0.6}, "sparsity of pattern 2:4 is 0.5, got 0.6"),
    ({"pattern": "2:4", "sparsity": {"a": 0.5}}, "pattern must be unstructured for sparsities"),
    ({"pattern": "2:4", "allocation": "gradient"}, "pattern must be unstructured for sparsities"),
    (
        {"sparsity": {"a": 0.5}, "allocation": "gradient"},
        "sparsity must be one number .* a mapping",
    ),
    ({"allocation": "magic"}, "allocation must be None or .gradient., got .magic."),
    ({"spread": 1.5}, "spread must be from 0 to 1, got 1.5"),
]


@every
@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_refused(recipe, options, message):
    with pytest.raises(ValueError, match=f"{recipe.__name__}: {message}"):
        recipe(**options)


@pytest.mark.parametrize(
    ("recipe", "options", "message"),
    [
        *((kind, {"group": "column"}, 'group must be "row", "matrix" or') for kind in SCORES),
        *((kind, {"group": "model", "pattern": "2:4"}, 'group "model" needs') for kind in SCORES),
        *((kind, {"norm": "l3"}, 'norm must be "l1" or "l2", got .l3.') for kind in GRADIENTS),
        (prune.GBLM, {"alpha": -1.0}, "alpha must be finite and at least 0, got -1.0"),
        (prune.GBLM, {"alpha": float("inf")}, "alpha must be finite and at least 0, got inf"),
        (prune.GBLM, {"alpha": 1.0, "reference": True}, "alpha must be left out with reference"),
    ],
)
def test_refused_of_some(recipe, options, message):
    with pytest.raises(ValueError, match=f"{recipe.__name__}: {message}"):
        recipe(**options)


def test_refused_on_a_model():
    with pytest.raises(
        ValueError, match=r"sparsity must name layers .* got 'value', which matches"
    ):
        pruned(prune.Wanda(sparsity={"query": 0.5, "value": 0.5}))
    with pytest.raises(ValueError, match=r"sparsity\['query'\] must be from 0 to 1, got 2"):
        pruned(prune.Wanda(sparsity={"query": 2}))
    with pytest.raises(ValueError, match="needs a multiple of 5 columns, got 12"):
        pruned(prune.Wanda(pattern="1:5"))


def test_recipes_are_values():
    assert prune.Wanda() == prune.Wanda(group="row")
    assert prune.GBLM(alpha=2.0) != prune.GBLM()
    with pytest.raises(AttributeError):
        prune.Wanda().sparsity = 0.3
