"""The engine on models of very different kinds, found in the model itself."""

import copy
import warnings

import pytest
import torch
from tests.engine.models import (
    Residual,
    compress,
    same,
    square_loss,
    stack,
    vector_batches,
    weights,
)
from tests.engine.zoo import CASES, Image, experts, in_place, mixtral, tuples
from torch import nn

from gradpress import prune
from gradpress.engine import _plan
from gradpress.engine._batches import call, read_calibration
from gradpress.engine._blocks import find_blocks
from gradpress.engine._chain import find_chain
from gradpress.engine._compress import _quiet
from gradpress.engine._layers import select_layers
from gradpress.engine._stream import BlockStream

RECIPES = {"wanda": prune.Wanda, "gblm": prune.GBLM}
each_case = pytest.mark.parametrize("make", CASES, ids=lambda make: make.__name__)


def run(case, recipe, **options):
    """A compressed copy, with its report, and the layers that no input reached."""
    model = copy.deepcopy(case.model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        report = compress(model, recipe, case.batches, loss=case.loss, **options)
    notes = {str(w.message).split(": ")[1] for w in caught if w.category is RuntimeWarning}
    others = [w for w in caught if w.category is not RuntimeWarning]
    assert not others
    return model, report, notes


@each_case
@pytest.mark.parametrize("recipe", RECIPES)
def test_exact_counts(make, recipe):
    case = make()
    model, report, notes = run(case, RECIPES[recipe](sparsity=0.37, modules=case.modules))
    before = weights(case.model)
    assert len(report.rows) == case.layers
    for row in report.rows:
        module = model.get_submodule(row.name)
        old, new = before.pop(f"{row.name}.weight"), module.weight.detach()
        kept = new != 0
        assert torch.equal(new, torch.where(kept, old, 0.0))
        rows = kept.T if type(module).__name__ == "Conv1D" else kept.flatten(1)
        assert set((~rows).sum(1).tolist()) == {int(rows.shape[1] * 0.37)}
        assert row.sparsity == pytest.approx(1 - float(kept.float().mean()))
        assert row.error > 0 or row.note
    # All else is what it was.
    after = weights(model)
    assert all(torch.equal(after[name], old) for name, old in before.items())
    assert notes == case.unreached == {row.name for row in report.rows if row.note}


@each_case
def test_blocks_alone_do_what_the_whole_model_does(make, monkeypatch):
    case = make()
    found = []

    def watched(*arguments):
        found.append(find_chain(*arguments))
        return found[-1]

    monkeypatch.setattr(_plan, "find_chain", watched)
    recipe = prune.Wanda(modules=case.modules)
    model, report, _ = run(case, recipe)
    assert [chain is not None for chain in found] == case.chained
    monkeypatch.setattr(_plan, "find_chain", lambda *_: None)
    whole, other, _ = run(case, recipe)
    # The same operations on the same values: not a bit differs.
    assert same(model, whole)
    assert str([row.error for row in report.rows]) == str([row.error for row in other.rows])
    assert other.stream_bytes == 0
    assert (report.stream_bytes > 0) == any(case.chained)


@each_case
def test_blocks_are_given_what_the_model_gives_them(make):
    """Verbatim, and their last result is the model's own, bit for bit."""
    case = make()
    model = case.model
    layers = select_layers("test", model, case.modules)
    calibration = read_calibration("test", case.batches, torch.device("cpu"))
    lists = find_blocks(model, layers)
    assert len(lists) == len(case.chained)
    with _quiet(model), torch.no_grad():
        for blocks in lists:
            chain = find_chain(model, blocks, calibration.batches[0])
            if chain is None:
                continue
            stream = BlockStream(model, chain, calibration)
            stream.begin()
            seen = {"model": [], "alone": []}
            kind = "alone"

            def hook(module, args, kwargs, output):
                arguments = [*args, *kwargs.items()]
                output = output if isinstance(output, torch.Tensor) else output[0]
                seen[kind].append(copy.deepcopy((arguments, output)))  # noqa: B023

            handles = [b.register_forward_hook(hook, with_kwargs=True) for b in blocks]
            for i in range(len(blocks)):
                stream.advance(i)
            kind = "model"
            for batch in copy.deepcopy(calibration.batches):
                call(model, batch)
            for handle in handles:
                handle.remove()
            count = len(calibration)
            # The model visits batch after batch, the stream block after block.
            for i in range(len(blocks)):
                for j in range(count):
                    equal(seen["alone"][i * count + j], seen["model"][j * len(blocks) + i])
            results = [output for _, output in seen["model"][len(blocks) - 1 :: len(blocks)]]
            equal(stream.state(), results)
            assert stream.nbytes >= sum(x.nbytes for x in results)
            stream.end()
            assert stream.nbytes == 0


def equal(a, b):
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            equal(x, y)
    else:
        assert type(a) is type(b)
        assert a == b or not isinstance(a, str | int | float | bool | None)


def test_experts_in_one_parameter_are_left_alone():
    case = mixtral()
    model, report, _ = run(case, prune.Wanda())
    assert all("self_attn" in row.name for row in report.rows)
    fused = [name for name, p in model.named_parameters() if p.ndim == 3]
    assert len(fused) == 6
    assert all((model.get_parameter(name) != 0).all() for name in fused)
    with pytest.raises(ValueError, match="compress: modules must match a layer of the model"):
        compress(model, prune.Wanda(modules="experts.gate_up_proj"), case.batches)


def test_expert_without_tokens():
    case = experts()
    model = copy.deepcopy(case.model)
    with pytest.warns(
        RuntimeWarning, match=r"blocks\.\d\.experts\.2: no calibration input"
    ) as seen:
        report = compress(model, prune.SparseGPT(), case.batches)
    assert len(seen) == 3
    assert "blocks.2.experts.2: no calibration input reached it" in str(report)
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert report.sparsity == 0.5


def test_grouped_convolutions_are_refused():
    torch.manual_seed(0)
    model = Image(groups=2)
    before = weights(model)
    with pytest.raises(ValueError, match=r"features\.3 must be a layer whose outputs .* 2 groups"):
        compress(model, prune.Wanda(modules="features"), [torch.randn(2, 4, 9, 9)])
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    report = compress(model, prune.Magnitude(modules="features"))
    assert report.sparsity == 0.5


def test_convolutions_are_named_or_left_alone():
    torch.manual_seed(0)
    report = compress(Image(), prune.Wanda(), [torch.randn(2, 4, 9, 9)])
    assert [row.name for row in report.rows] == ["head"]


@pytest.mark.parametrize("padding_mode", ["zeros", "reflect", "circular"])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_convolution_is_a_linear_layer_of_patches(dims, padding_mode):
    """Statistics of a convolution are those of its weight as a matrix."""
    torch.manual_seed(dims)
    if (dims, padding_mode) == (3, "reflect"):
        padding_mode = "replicate"
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    model = nn.Sequential(
        kind(3, 4, 3, stride=2, padding=1, padding_mode=padding_mode), nn.Flatten()
    )
    x = torch.randn(2, 3, *[7] * dims)
    layer = select_layers("test", model, "0")[0]
    patches = layer.inputs(x)
    expected = (patches @ layer.matrix.T + model[0].bias).transpose(1, 2)
    torch.testing.assert_close(model[0](x).flatten(2), expected)
    gradients = {}

    class Seen(prune.Gradient):
        def compress(self, observed):
            gradients.update({one.layer.name: one.gradient.values for one in observed})
            return super().compress(observed)

    compress(copy.deepcopy(model), Seen(modules="0"), [x], loss=square_loss)
    total = 0
    for sample in x:
        model.zero_grad()
        square_loss(model, sample[None]).backward()
        total = total + model[0].weight.grad.abs().flatten(1) / 2
    torch.testing.assert_close(gradients["0"], total)


def test_blocks_run_where_the_model_uses_more_of_what_they_return():
    for make, runs in ((tuples, True), (in_place, False)):
        case = make()
        with torch.no_grad():
            chain = find_chain(case.model, list(case.model.blocks), case.batches[0])
        assert chain.runs == runs


def test_gradients_where_blocks_write_into_their_input():
    case = in_place()
    twin = stack(Residual)
    for block in twin.blocks:
        block.norm = nn.Identity()
    twin.load_state_dict(case.model.state_dict(), strict=True)
    seen = {}

    class Seen(prune.GBLM):
        def compress(self, observed):
            seen.update({one.layer.name: one.gradient.values for one in observed})
            return super().compress(observed)

    kept = copy.deepcopy(case.batches)
    compress(case.model, Seen(), case.batches, loss=case.loss)
    equal(case.batches, kept)
    samples = [x[None] for batch in case.batches for x in batch]
    expected = dict.fromkeys(seen, 0)
    for x in samples:
        twin.zero_grad()
        square_loss(twin, x).backward()
        for name in expected:
            mean = twin.get_submodule(name).weight.grad.abs() / len(samples)
            expected[name] = expected[name] + mean
    for name, mean in expected.items():
        torch.testing.assert_close(seen[name], mean)


def test_gradients_of_shared_and_missed_layers():
    """All calls of a layer in a sample are one gradient; a sample that misses it counts as zero."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.twice, self.rare = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x):
            x = self.twice(torch.tanh(self.twice(x)))
            return x + self.rare(x) if x.sum() > 0 else x

    torch.manual_seed(0)
    model = Model()
    batches = vector_batches()
    samples = [x[None] for batch in batches for x in batch]
    for norm in ("l1", "l2"):
        expected = {"twice": 0, "rare": 0}
        reached = 0
        for x in samples:
            model.zero_grad()
            square_loss(model, x).backward()
            reached += model.rare.weight.grad is not None
            for name in expected:
                g = model.get_submodule(name).weight.grad
                g = torch.zeros(16, 16) if g is None else g
                expected[name] = expected[name] + (g.abs() if norm == "l1" else g.square())
        assert 0 < reached < len(samples)
        seen = {}

        class Seen(prune.GBLM):
            def compress(self, observed):
                seen.update({one.layer.name: one.gradient.values for one in observed})  # noqa: B023
                return super().compress(observed)

        compress(copy.deepcopy(model), Seen(norm=norm), batches, loss=square_loss)
        for name, total in expected.items():
            mean = total / len(samples)
            torch.testing.assert_close(seen[name], mean if norm == "l1" else mean.sqrt())
