"""What compressing leaves behind, takes, tells and refuses."""

import contextlib
import copy
import io
import re
import warnings

import pytest
import torch
from tests.engine.models import (
    compress,
    llama,
    same,
    stack,
    token_batches,
    vector_batches,
    weights,
)
from tests.engine.test_statistics import Sometimes
from tests.engine.zoo import Scaled
from torch import nn

import gradpress
from gradpress import prune
from gradpress.engine import _work

BATCHES = token_batches()
#: Of gradients of a block of `llama()`.
BLOCK_BYTES = 4 * 9216
WANDA = prune.Wanda()
GBLM = prune.GBLM()


class Fails(Exception):
    pass


def state_of(model):
    hooks = [
        (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks))
        for m in model.modules()
    ]
    own = ["forward" in m.__dict__ for m in model.modules()]
    modes = [m.training for m in model.modules()]
    asked = [(p.requires_grad, p.grad is None) for p in model.parameters()]
    fast = torch.backends.mha.get_fastpath_enabled()
    return hooks, own, modes, asked, model.config.use_cache, fast, torch.is_grad_enabled()


def failing_loss(model, batch):
    loss = model(batch, labels=batch).loss
    if torch.equal(batch[0], BATCHES[1][1]):
        raise Fails
    return loss


class FailingRecipe(prune.GBLM):
    def compress(self, observed):
        for i, outcome in enumerate(super().compress(observed)):
            if i == 3 and "layers.1" in outcome.name:
                raise Fails
            yield outcome


@pytest.mark.parametrize("where", ["nowhere", "loss", "recipe", "group", "model"])
def test_model_is_as_before(where):
    model = llama(layers=3)
    model.train()
    model.model.layers[1].eval()
    model.model.embed_tokens.weight.requires_grad_(False)
    model.model.layers[2].mlp.up_proj.weight.requires_grad_(False)
    model.config.use_cache = True
    seen = []
    model.model.layers[0].register_forward_hook(lambda *_: seen.append(1))
    if where == "model":

        def fail(module, args, kwargs):
            seen.append(2)
            if len(seen) > 12:
                raise Fails

        model.model.layers[1].mlp.register_forward_pre_hook(fail, with_kwargs=True)
    before, old = state_of(model), weights(model)
    options = {"loss": failing_loss} if where == "loss" else {}
    if where == "group":
        options["gradient_memory"] = BLOCK_BYTES
    recipe = FailingRecipe() if where in ("recipe", "group") else prune.GBLM()
    if where == "nowhere":
        compress(model, recipe, BATCHES)
    else:
        with pytest.raises(Fails):
            compress(model, recipe, BATCHES, **options)
    assert state_of(model) == before
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, old[name])}
    if where == "recipe":  # what was finished stays
        assert len([name for name in changed if "layers.0" in name]) == 7
        assert len(changed) == 10
    elif where == "nowhere":
        assert len(changed) == 21
    else:
        assert not changed


@pytest.mark.parametrize("recipe", [prune.Wanda(), prune.SparseGPT(), prune.GBLM(norm="l2")])
def test_deterministic(recipe):
    first, second = llama(), llama()
    one, other = compress(first, recipe, BATCHES), compress(second, recipe, BATCHES)
    assert same(first, second)
    assert [row.error for row in one.rows] == [row.error for row in other.rows]


def test_calibration_stays_as_it_is():
    batches = [{"input_ids": b, "labels": b.clone()} for b in BATCHES]
    kept = copy.deepcopy(batches)
    compress(llama(), prune.GBLM(), batches)
    for batch, old in zip(batches, kept, strict=True):
        assert batch.keys() == old.keys()
        assert all(torch.equal(batch[key], old[key]) for key in batch)


CASES = {
    "wanda": (llama, prune.Wanda(), BATCHES, {}),
    "one group": (llama, prune.GBLM(), BATCHES, {}),
    "groups": (llama, prune.GBLM(), BATCHES, {"gradient_memory": BLOCK_BYTES}),
    "allocation": (llama, prune.GBLM(allocation="gradient"), BATCHES, {}),
    "gradients alone": (llama, prune.Gradient(), BATCHES, {}),
    "no calibration": (llama, prune.Magnitude(), None, {}),
    "calibration for nothing": (llama, prune.Magnitude(), BATCHES, {}),
    "some blocks": (
        lambda: llama(layers=4),
        prune.GBLM(modules=re.compile(r"layers\.[12]\.")),
        BATCHES,
        {},
    ),
    "whole model": (lambda: stack(model=Scaled), prune.Wanda(), vector_batches(), {}),
    "sharing ends": (
        lambda: stack(Sometimes, count=2),
        prune.Wanda(modules=["left", "right"]),
        [vector_batches()[0], 20 * vector_batches()[1]],
        {},
    ),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("resumed", [0, 1, 2])
def test_progress_ends_at_its_total(case, resumed, monkeypatch, tmp_path):
    make, recipe, batches, options = CASES[case]
    bars = []

    class Bar(_work.tqdm):
        def __init__(self, **settings):
            super().__init__(file=io.StringIO(), **settings)
            assert not self.disable
            bars.append(self)

        def close(self):
            self.ended = self.n, self.total
            super().close()

    if resumed:
        own = type(recipe).compress
        begun = []

        def stop(self, observed):
            if len(begun) == resumed:
                raise Fails
            begun.append(1)
            return own(self, observed)

        with monkeypatch.context() as patch:
            patch.setattr(type(recipe), "compress", stop)
            with contextlib.suppress(Fails):
                compress(make(), recipe, batches, resume=tmp_path, **options)
    monkeypatch.setattr(_work, "tqdm", Bar)
    resume = tmp_path if resumed else None
    compress(make(), recipe, batches, progress=True, resume=resume, **options)
    assert len(bars) == 1
    done, total = bars[0].ended
    assert done == (total or 0)
    expected = {
        "wanda": 2 * 3,
        "one group": 6 + 2 * 3,
        "groups": 2 * 6 + 2 * 3,
        "allocation": 6 + 6 + 2 * 3,
        "gradients alone": 6,
        "no calibration": 0,
        "calibration for nothing": 0,
        "some blocks": 6 + 2 * 3,
        "whole model": 3 * 3,
        "sharing ends": 2 * 2,
    }
    assert done == expected[case]


@pytest.mark.parametrize("recipe", [prune.Wanda(), prune.SparseGPT(), prune.GBLM()])
def test_memory(recipe):
    """Beyond the model: statistics, inputs of a block, one batch in one block, and one matrix.

    A matrix being compressed takes its new values, a mask and what scores it: at most five times
    its own size. SparseGPT's Hessian is factored besides; as small as here it is inverted at once
    in float64, with copies that take fourteen times its own size. A batch in a block is measured by
    itself; with gradients all activations of one sample are alive, and one layer's gradient.
    """
    excess = {}
    for layers in (2, 5):
        model = llama(layers=layers, hidden=64)
        batches = token_batches(count=6, samples=2, tokens=32)
        with gradpress.memory.watch(min_bytes=256) as alone, torch.no_grad():
            start = alone.current
            model.model.layers[0](
                torch.randn(2, 32, 64),
                position_embeddings=model.model.rotary_emb(torch.randn(1), torch.arange(32)[None]),
            )
        activations = alone.peak - start
        if isinstance(recipe, prune.GBLM):
            with gradpress.memory.watch(min_bytes=256) as alone:
                start = alone.current
                model.requires_grad_(False)
                x = torch.randn(1, 32, 64, requires_grad=True)
                model(inputs_embeds=x, labels=batches[0][:1]).loss.backward()
                del x
            activations = max(activations, alone.peak - start)
            model.requires_grad_(True)
        with gradpress.memory.watch(model, min_bytes=256) as watch:
            start = watch.current
            report = compress(model, recipe, batches)
        largest = max(layer.weight.numel() for layer in modules(model))
        columns = max(layer.weight.shape[1] for layer in modules(model))
        matrix = 5 * 4 * largest
        if isinstance(recipe, prune.SparseGPT):
            matrix += 14 * 4 * columns**2
        bound = report.statistics_bytes + report.stream_bytes + activations + matrix
        assert watch.peak - start <= bound
        assert watch.peak - start >= report.statistics_bytes + report.stream_bytes
        inputs = 6 * 2 * 32 * 64 * 4
        # Positions beside them are the same in all batches, and held once.
        assert inputs < report.stream_bytes < inputs + 5000
        excess[layers] = watch.peak - start
    if not isinstance(recipe, prune.GBLM):
        # How many blocks there are does not matter.
        assert excess[5] <= 1.05 * excess[2]


def modules(model):
    return [m for n, m in model.named_modules() if isinstance(m, nn.Linear) and "proj" in n]


def test_errors_are_those_of_outputs():
    """The report's error beside what really becomes of a layer's outputs."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 24, bias=False))
    before = model[0].weight.detach().clone()
    g = torch.Generator().manual_seed(1)
    x = torch.randn(4096, 16, generator=g)
    for recipe, near in ((prune.Wanda(), 0.1), (prune.SparseGPT(damp=0.0), 1e-3)):
        with torch.no_grad():
            model[0].weight.copy_(before)
        report = compress(model, recipe, [x])
        change = x @ (model[0].weight.detach() - before).T
        real = float(change.norm() / (x @ before.T).norm())
        # Wanda takes inputs as uncorrelated, SparseGPT knows all products.
        assert report.rows[0].error == pytest.approx(real, rel=near)


def test_no_warnings_where_nothing_is_wrong():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compress(llama(), prune.GBLM(), BATCHES)
