"""What is collected of inputs and gradients, however they are batched, padded and shared."""

import copy

import pytest
import torch
import transformers
from tests.engine.models import (
    Residual,
    Stack,
    compress,
    llama,
    same,
    stack,
    token_batches,
    vector_batches,
)
from tests.engine.zoo import bert
from torch import nn

import gradpress
from gradpress import prune

#: float32 sums in another order, relative to the largest.
NEAR = 2e-5


def observe(model, kind, batches, **options):
    """What a recipe is given of each layer, and the model that it makes."""
    model = copy.deepcopy(model)
    seen = {}

    class Seen(kind):
        def compress(self, observed):
            for one in observed:
                seen[one.layer.name] = one
            return super().compress(observed)

    recipe = Seen(**options.pop("recipe", {}))
    compress(model, recipe, batches, **options)
    return seen, model


def values(one):
    found = dict(one.inputs)
    numbers = {name: s.values if name == "input_sq" else s.matrix for name, s in found.items()}
    if one.gradient is not None:
        numbers["gradient"] = one.gradient.values
    return numbers


def agree(first, second):
    """Statistics of the first block are equal to rounding, and all masks but for rare ties."""
    (seen, model), (others, other) = first, second
    assert seen.keys() == others.keys()
    names = list(seen)
    for name in names:
        one, another = seen[name], others[name]
        assert one.tokens == pytest.approx(another.tokens)
        a, b = values(one), values(another)
        assert a.keys() == b.keys()
        # Later blocks may see another choice between two weights that score the same.
        for key in a if name in names[: len(names) // 2] else ():
            near = NEAR * float(a[key].abs().max())
            torch.testing.assert_close(a[key], b[key], rtol=0, atol=near)
    pairs = zip(model.parameters(), other.parameters(), strict=True)
    differ = sum(int(((a != 0) != (b != 0)).sum()) for a, b in pairs)
    assert differ <= 0.002 * sum(p.numel() for p in model.parameters())


RECIPES = [prune.Wanda, prune.GBLM, prune.SparseGPT]


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("side", ["right", "2-D"])
def test_padding_counts_for_nothing(recipe, side):
    model = llama() if side == "right" else Flat()
    lengths = [10, 7, 4]
    ids = token_batches(count=1, samples=3)[0]
    mask = torch.stack([(torch.arange(10) < n).long() for n in lengths])
    batches = [{"input_ids": ids, "attention_mask": mask}]
    alone = [{"input_ids": row[None, :n]} for row, n in zip(ids, lengths, strict=True)]
    together = observe(model, recipe, batches)
    agree(together, observe(model, recipe, alone))
    assert all(one.tokens == 7 for one in together[0].values())
    # All of it counts when nothing says what padding is.
    plain, _ = observe(model, recipe, [{"input_ids": ids}])
    name = next(iter(plain))
    counted = [next(iter(values(seen[name]).values())) for seen in (plain, together[0])]
    assert counted[0].sum() > 1.2 * counted[1].sum()


class Flat(nn.Module):
    """Its layers see all tokens of a batch as rows of one matrix."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(48, 32)
        self.layers = nn.ModuleList(Residual(32) for _ in range(2))
        self.lm_head = nn.Linear(32, 48)

    def forward(self, input_ids, attention_mask=None, labels=None):
        x = self.embedding(input_ids).flatten(0, 1)
        for layer in self.layers:
            x = layer(x)
        if labels is None:
            return x
        logits = self.lm_head(x).view(*input_ids.shape, -1)[:, :-1].flatten(0, 1)
        loss = nn.functional.cross_entropy(logits, labels[:, 1:].flatten())
        return transformers.modeling_outputs.CausalLMOutput(loss=loss)


@pytest.mark.parametrize("recipe", [*RECIPES, prune.Gradient])
def test_batches_do_not_matter(recipe):
    model = llama()
    batches = token_batches(count=2, samples=3)
    one_by_one = [ids[None] for batch in batches for ids in batch]
    all_at_once = [torch.cat(batches)]
    found = [observe(model, recipe, b) for b in (batches, one_by_one, all_at_once)]
    agree(found[0], found[1])
    agree(found[0], found[2])
    if recipe in (prune.GBLM, prune.Gradient):
        # Gradients are those of samples in any case: the same operations.
        for name, one in found[0][0].items():
            for seen, _ in found[1:]:
                assert torch.equal(one.gradient.values, seen[name].gradient.values)


@pytest.mark.parametrize("recipe", [*RECIPES, prune.Gradient])
def test_a_calibration_twice_is_the_same_calibration(recipe):
    model = llama()
    batches = token_batches()
    agree(observe(model, recipe, batches), observe(model, recipe, batches * 2))


def test_keywords_and_mappings_and_generators():
    model = llama()
    batches = token_batches()
    expected = copy.deepcopy(model)
    compress(expected, prune.GBLM(), batches)
    others = [
        (b for b in batches),
        [{"input_ids": b} for b in batches],
        [{"input_ids": b, "labels": b} for b in batches],
        [transformers.BatchEncoding({"input_ids": b}) for b in batches],
        [{"input_ids": b, "attention_mask": torch.ones_like(b)} for b in batches],
        [(b,) for b in batches],
        [*batches, torch.zeros(0, 10, dtype=torch.int64)],
    ]
    for i, other in enumerate(others):
        found = copy.deepcopy(model)
        options = {}
        if i == 5:  # which has no labels
            options["loss"] = lambda model, batch: model(*batch, labels=batch[0]).loss
        compress(found, prune.GBLM(), other, **options)
        assert same(found, expected)


def test_masked_labels_are_the_batch_own():
    """A loss that the model computes from labels in the batch, padded sequences included."""
    case = bert()
    seen, _ = observe(case.model, prune.Gradient, case.batches)
    name = "bert.encoder.layer.1.output.dense"
    total, count = 0, 0
    case.model.eval()
    for batch in case.batches:
        for i in range(3):
            n = int(batch["attention_mask"][i].sum())
            case.model.zero_grad()
            sample = {key: value[i : i + 1, :n] for key, value in batch.items()}
            case.model(**sample).loss.backward()
            total = total + case.model.get_submodule(name).weight.grad.abs()
            count += 1
    torch.testing.assert_close(seen[name].gradient.values, total / count, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("recipe", [prune.Wanda, prune.SparseGPT, prune.GBLM])
def test_shared_inputs_are_collected_once(recipe, monkeypatch):
    updates = []
    for kind in (prune.InputSquares, prune.Hessian):
        own = kind.update

        def update(self, inputs, sequences=None, own=own):
            updates.append(self.columns)
            own(self, inputs, sequences)

        monkeypatch.setattr(kind, "update", update)
    seen, _ = observe(llama(), recipe, token_batches(count=3))
    key = "hessian" if recipe is prune.SparseGPT else "input_sq"
    for i in range(2):
        of = {
            name.rsplit(".")[-1]: one.inputs[key]
            for name, one in seen.items()
            if f"layers.{i}." in name
        }
        assert of["q_proj"] is of["k_proj"] is of["v_proj"]
        assert of["gate_proj"] is of["up_proj"]
        assert len({id(statistic) for statistic in of.values()}) == 4
    # Four inputs of each of two blocks, for three batches.
    assert len(updates) == 4 * 2 * 3


class Sometimes(Residual):
    """Two layers that have the same input while it is small, or before it is written into."""

    def __init__(self, width=16, how="apart"):
        super().__init__(width)
        self.left, self.right = nn.Linear(width, width), nn.Linear(width, width)
        self.how = how

    def forward(self, x):
        y = torch.tanh(x)
        if self.how == "written":
            left = self.left(y)
            return left + self.right(y.mul_(2))
        if self.how == "twice" and x.abs().max() > 10:
            return self.left(y) + self.right(y) + self.right(2 * y)
        z = y + 1 if x.abs().max() > 10 and self.how == "apart" else y
        return self.left(y) + self.right(z)


@pytest.mark.parametrize("how", ["apart", "twice", "written", "never"])
def test_sharing_that_ends(how):
    model = stack(Sometimes, count=2, how=how)
    first, second = vector_batches(count=2)
    seen, _ = observe(
        model, prune.Wanda, [first, 20 * second], recipe={"modules": ["left", "right"]}
    )
    assert set(seen) == {f"blocks.{i}.{side}" for i in range(2) for side in ("left", "right")}
    left, right = (seen[f"blocks.0.{side}"].inputs["input_sq"] for side in ("left", "right"))
    assert (left is right) == (how == "never")
    y, z = torch.tanh(first), torch.tanh(20 * second)
    # A batch of vectors is one of rows; a sequence is a row.
    torch.testing.assert_close(left.values, (y.square().sum(0) + z.square().sum(0)) / 8)
    squares = {
        "apart": y.square().sum(0) + (z + 1).square().sum(0),
        "twice": y.square().sum(0) + 5 * z.square().sum(0),
        "written": 4 * (y.square().sum(0) + z.square().sum(0)),
        "never": y.square().sum(0) + z.square().sum(0),
    }
    torch.testing.assert_close(right.values, squares[how] / 8)


def test_tokens_of_inputs_that_are_no_ids():
    """Images have as many tokens as their layers see, in blocks and in the whole model."""
    from tests.engine.zoo import vit

    case = vit()
    seen, _ = observe(case.model, prune.GBLM, case.batches)
    tokens = {name: one.tokens for name, one in seen.items()}
    assert tokens.pop("classifier") == 1
    assert set(tokens.values()) == {5}


def test_a_cache_inside_of_another_model_is_off():
    """A model in a model has its own configuration; a cache would grow with every run."""

    class Wrapped(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.inner = model

        def forward(self, ids):
            return self.inner(ids).logits

    model = llama()
    batches = token_batches()
    wrapped = Wrapped(copy.deepcopy(model))
    wrapped.inner.config.use_cache = True
    compress(wrapped, prune.Wanda(), batches)
    compress(model, prune.Wanda(), batches)
    assert same(wrapped.inner, model)
    assert wrapped.inner.config.use_cache is True


def test_inference_mode_and_autocast_outside():
    model = llama()
    expected = copy.deepcopy(model)
    compress(expected, prune.GBLM(), token_batches())
    with torch.inference_mode():
        compress(model, prune.GBLM(), token_batches())
    assert same(model, expected)


def test_several_recipes_one_after_the_other():
    model = Stack(Residual(), Residual())
    first, second = prune.Wanda(sparsity=0.25, modules="up"), prune.Wanda(pattern="2:4")
    expected = copy.deepcopy(model)
    compress(expected, first, vector_batches())
    compress(expected, second, vector_batches())
    report = gradpress.compress(
        model, [first, second], calibration=vector_batches(), progress=False
    )
    assert same(model, expected)
    assert [row.recipe for row in report.rows] == ["Wanda"] * 6
    # Of a layer that two recipes were for, what the last one left counts.
    share = gradpress.prune.sparsity(model)
    assert report.sparsity == pytest.approx(share.sparsity)
    assert report.sparsity >= 0.5
