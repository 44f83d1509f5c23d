"""Every optimizer behaves as `torch.optim` users expect; one registry drives all tests."""

import copy
import io
import pickle
import warnings

import pytest
import torch
from torch import nn

import gradpress
from gradpress.nn import QuantizedWeight

SMALL = {"min_8bit_size": 64}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Linear(24, 40)
        self.tall = nn.Linear(40, 24, bias=False)
        self.norm = nn.LayerNorm(24)

    def forward(self, x):
        return self.norm(self.tall(torch.relu(self.wide(x))) + x)


def adamw8bit(model, **options):
    return gradpress.optim.AdamW8bit(model.named_parameters(), lr=1e-2, **SMALL, **options)


def adamw32bit(model, **options):
    return gradpress.optim.AdamW8bit(model.parameters(), lr=1e-2, state_bits=32, **options)


def adamw4bit(model, **options):
    return adamw8bit(model, state_bits=4, **options)


def adamw8bit_int8(model, **options):
    return adamw8bit(gradpress.nn.quantize_(model), **options)


def qgalore(model, **options):
    groups = gradpress.optim.param_groups(model, rank=4, update_proj_gap=3, verbose=False)
    return gradpress.optim.QGaLoreAdamW(groups, lr=1e-2, **SMALL, **options)


def qgalore_int8(model, **options):
    return qgalore(gradpress.nn.quantize_(model), **options)


def adamw4bit_class(model, **options):
    return gradpress.optim.AdamW4bit(model.parameters(), lr=1e-2, **SMALL, **options)


def adamp(model, **options):
    options = {"weight_decay": 1e-2, **SMALL, **options}
    return gradpress.optim.AdamP(model.named_parameters(), lr=1e-2, **options)


def adamp32bit(model, **options):
    return adamp(model, state_bits=32, nesterov=True, **options)


def adamp_int8(model, **options):
    return adamp(gradpress.nn.quantize_(model), nesterov=True, **options)


def sgdp(model, **options):
    options = {"momentum": 0.9, "weight_decay": 1e-4, **SMALL, **options}
    return gradpress.optim.SGDP(model.named_parameters(), lr=1e-2, **options)


def sgdp_int8(model, **options):
    return sgdp(gradpress.nn.quantize_(model), nesterov=True, **options)


def diffgrad(model, **options):
    return gradpress.optim.DiffGrad(model.parameters(), lr=1e-2, **SMALL, **options)


def diffgrad4bit(model, **options):
    return diffgrad(model, state_bits=4, reference=True, weight_decay=1e-4, **options)


def diffgrad_int8(model, **options):
    return diffgrad(gradpress.nn.quantize_(model), variant="wide", **options)


def low_rank(name, model, **options):
    groups = gradpress.optim.param_groups(model, rank=4, update_proj_gap=3, verbose=False)
    return getattr(gradpress.optim, name)(groups, lr=1e-2, **SMALL, **options)


def galore32bit(model, **options):
    return low_rank("GaLoreAdamW", model, **options)


def galore_rotating(model, **options):
    """Codes everywhere, and moments that a refresh turns."""
    bits = {"state_bits": 8, "projector_bits": 8, "moments": "rotate"}
    return low_rank("GaLoreAdamW", model, **bits, **options)


def galore_full32bit(model, **options):
    own = {"proj_type": "full", "moments": "reset", "reference": True, "scale": 1.0}
    return low_rank("GaLoreAdamW", model, **own, **options)


def galore_reverse_int8(model, **options):
    own = {"proj_type": "reverse_std", "stagger": True, "state_bits": 8}
    return low_rank("GaLoreAdamW", gradpress.nn.quantize_(model), **own, **options)


def apollo32bit(model, **options):
    return low_rank("Apollo", model, **options)


def apollo_int8(model, **options):
    own = {"state_bits": 8, "scale_front": True}
    return low_rank("Apollo", gradpress.nn.quantize_(model), **own, **options)


def apollo_mini32bit(model, **options):
    return gradpress.optim.ApolloMini(
        model.named_parameters(), lr=1e-2, scale=16.0, update_proj_gap=3, **SMALL, **options
    )


def fira32bit(model, **options):
    return low_rank("Fira", model, **options)


def fira_int8(model, **options):
    own = {"state_bits": 8, "projector_bits": 4, "reference": True}
    return low_rank("Fira", gradpress.nn.quantize_(model), **own, **options)


def galore_auto32bit(model, **options):
    """Ranks that the first gradients choose."""
    groups = [{"params": list(model.named_parameters()), "rank": "auto", "update_proj_gap": 3}]
    own = {"rank_energy": 0.7, "moments": "rotate"}
    return gradpress.optim.GaLoreAdamW(groups, lr=1e-2, **SMALL, **own, **options)


def adafactor32bit(model, **options):
    own = {"beta1": 0.9, "relative_step": False, "scale_parameter": False, "state_bits": 32}
    return low_rank("GaLoreAdafactor", model, **own, **options)


def adafactor_int8(model, **options):
    own = {"relative_step": False, "beta1": 0.9, "state_bits": 8, "projector_bits": 4}
    return low_rank("GaLoreAdafactor", gradpress.nn.quantize_(model), **own, **options)


def ldadam32bit(model, **options):
    return low_rank("LDAdamW", model, **options)


def ldadam_int8(model, **options):
    own = {"state_bits": 8, "projector_bits": 8, "error_bits": 8}
    return low_rank("LDAdamW", gradpress.nn.quantize_(model), **own, **options)


def subtrack32bit(model, **options):
    return low_rank("SubTrack", model, **options)


def subtrack_int8(model, **options):
    own = {"state_bits": 8, "projector_bits": 8}
    return low_rank("SubTrack", gradpress.nn.quantize_(model), **own, **options)


def gradnormlorp32bit(model, **options):
    gradpress.nn.weight_normalize_(model)
    groups = gradpress.optim.gradnormlorp_groups(model, rank=4, update_proj_gap=3, verbose=False)
    return gradpress.optim.GradNormLoRP(groups, lr=1e-2, **SMALL, **options)


LOW_RANK = [
    galore_auto32bit,
    adafactor32bit,
    adafactor_int8,
    ldadam32bit,
    ldadam_int8,
    subtrack32bit,
    subtrack_int8,
    gradnormlorp32bit,
    galore32bit,
    galore_rotating,
    galore_full32bit,
    galore_reverse_int8,
    apollo32bit,
    apollo_int8,
    apollo_mini32bit,
    fira32bit,
    fira_int8,
]
MAKERS = [
    *LOW_RANK,
    adamw8bit,
    adamw4bit,
    adamw32bit,
    adamw8bit_int8,
    qgalore,
    qgalore_int8,
    adamw4bit_class,
    adamp,
    adamp32bit,
    adamp_int8,
    sgdp,
    sgdp_int8,
    diffgrad,
    diffgrad4bit,
    diffgrad_int8,
]
#: What CUDA graphs can record.
CAPTURABLE = [adamw8bit, adamw4bit, adamw32bit, adamw4bit_class]
every = pytest.mark.parametrize("make", MAKERS, ids=lambda make: make.__name__)


def setup(make, **options):
    torch.manual_seed(0)
    model = Block()
    return model, make(model, **options)


def train(model, optimizer, first, last):
    for i in range(first, last):
        x = torch.randn(8, 24, generator=torch.Generator().manual_seed(i))
        optimizer.zero_grad()
        (model(x) - x.roll(1, 1)).square().mean().backward()
        optimizer.step()


def late(optimizer, *params):
    """The parameters of a later group, named where the optimizer's are."""
    if "param_names" not in optimizer.param_groups[0]:
        return list(params)
    return [(f"late{i}", p) for i, p in enumerate(params)]


def snapshot(model, optimizer):
    tensors = dict(gradpress.nn.flatten_state_dict(model))
    for i, state in enumerate(optimizer.state_dict()["state"].values()):
        for name, value in state.items():
            tensors[f"{i}.{name}"] = torch.as_tensor(value)
    return {name: t.detach().clone() for name, t in tensors.items()}


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name, t in a.items():
        assert t.dtype == b[name].dtype, name
        assert torch.equal(t, b[name]), name


@every
def test_learns(make):
    model, optimizer = setup(make)
    x = torch.randn(64, 24)
    before = float((model(x) - x.roll(1, 1)).square().mean().detach())
    train(model, optimizer, 0, 150)
    assert float((model(x) - x.roll(1, 1)).square().mean().detach()) < 0.8 * before


@every
@pytest.mark.parametrize("safe", [True, False])
def test_resume_is_bit_exact(make, safe):
    model, optimizer = setup(make)
    train(model, optimizer, 0, 8)  # in the middle of an interval
    buffer = io.BytesIO()
    torch.save([gradpress.nn.flatten_state_dict(model), optimizer.state_dict()], buffer)
    train(model, optimizer, 8, 16)
    buffer.seek(0)
    weights, state = torch.load(buffer, weights_only=safe)
    other, restored = setup(make)
    gradpress.nn.load_flat_state_dict_(other, weights)
    restored.load_state_dict(state)
    train(other, restored, 8, 16)
    assert_same(snapshot(model, optimizer), snapshot(other, restored))


@every
def test_deepcopy_and_pickle_go_on_alike(make):
    model, optimizer = setup(make)
    train(model, optimizer, 0, 4)
    twins = [copy.deepcopy((model, optimizer)), pickle.loads(pickle.dumps((model, optimizer)))]
    train(model, optimizer, 4, 8)
    for twin in twins:
        train(*twin, 4, 8)
        twin[1].load_state_dict(twin[1].state_dict())
        assert_same(snapshot(model, optimizer), snapshot(*twin))


@every
@pytest.mark.parametrize("threads", [1, 2, 4])
def test_same_bits_for_all_threads(make, threads, restore_threads):
    results = []
    for count in (1, threads):
        torch.set_num_threads(1)
        model, optimizer = setup(make)
        for i in range(5):
            for p in model.parameters():
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
            torch.set_num_threads(count)
            optimizer.step()
        results.append(snapshot(model, optimizer))
    assert_same(*results)


@every
def test_no_gradient_and_zero_learning_rate_change_nothing(make):
    model, optimizer = setup(make)
    before = snapshot(model, optimizer)
    optimizer.step()
    assert_same(before, snapshot(model, optimizer))
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(0.0)
    for p in model.parameters():
        p.grad = torch.zeros(p.shape)
    optimizer.step()
    after = snapshot(model, optimizer)
    assert_same(before, {name: after[name] for name in before})
    keys = [set(s) for s in optimizer.state_dict()["state"].values()]
    train(model, optimizer, 0, 4)
    assert keys == [set(s) for s in optimizer.state_dict()["state"].values()]


@every
def test_state_is_tensors_and_numbers(make):
    model, optimizer = setup(make)
    train(model, optimizer, 0, 2)
    for state in optimizer.state.values():
        assert all(type(v) in (torch.Tensor, int, float) for v in state.values())
        assert state["step"].dtype == torch.float32
        assert state["step"].shape == ()


@every
def test_gradients_and_groups_are_left_alone(make):
    model, optimizer = setup(make, maximize=True)
    keys = [set(g) for g in optimizer.param_groups]
    optimizer.param_groups[0]["mine"] = "kept"
    for p in model.parameters():
        p.grad = torch.randn(p.shape)
    grads = [(p.grad, p.grad.clone()) for p in model.parameters()]
    optimizer.step()
    optimizer.step()
    for p, (grad, copied) in zip(model.parameters(), grads, strict=True):
        assert p.grad is grad
        assert torch.equal(grad, copied)
    assert optimizer.param_groups[0].pop("mine") == "kept"
    assert keys == [set(g) for g in optimizer.param_groups]


@every
def test_closure_and_hooks(make):
    model, optimizer = setup(make)
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("pre"))
    optimizer.register_step_post_hook(lambda *_: seen.append("post"))
    optimizer.register_state_dict_post_hook(lambda *_: seen.append("save"))
    optimizer.register_load_state_dict_post_hook(
        lambda o: seen.append(
            {t.dtype for s in o.state.values() for t in s.values() if torch.is_tensor(t)}
        )
    )

    def closure():
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = model(torch.ones(2, 24)).square().mean() + 1
        loss.backward()
        return loss

    with torch.no_grad():
        assert optimizer.step(closure) >= 1
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen[:3] == ["pre", "post", "save"]
    assert torch.float32 in seen[3]
    assert (torch.uint8 in seen[3]) == ("32bit" not in make.__name__)


@every
def test_grad_scaler(make):
    model, optimizer = setup(make)
    plain, reference = setup(make)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    x = torch.randn(4, 24)
    scaler.scale(model(x).square().mean()).backward()
    plain(x).square().mean().backward()
    scaler.step(optimizer)
    reference.step()
    scaler.update()
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        a, b = ((t.dequantize() if isinstance(t, QuantizedWeight) else t) for t in (a, b))
        # A step apart at most where rounding decides otherwise.
        assert float((a - b).detach().abs().max()) < 5e-3
    before = snapshot(model, optimizer)
    for p in model.parameters():
        p.grad.fill_(float("inf"))
    scaler.step(optimizer)
    assert_same(before, snapshot(model, optimizer))


@every
def test_nonfinite_gradients_are_skipped_and_counted(make):
    model, optimizer = setup(make)
    train(model, optimizer, 0, 3)
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.0
    before = gradpress.nn.flatten_state_dict(copy.deepcopy(model))
    for p in model.parameters():
        p.grad = torch.full(p.shape, float("nan"))
    optimizer.step()
    assert optimizer.nonfinite_gradients > 0
    assert_same(before, gradpress.nn.flatten_state_dict(model))
    train(model, optimizer, 3, 6)
    assert all(torch.isfinite(t.float()).all() for t in snapshot(model, optimizer).values())


@every
def test_late_groups_schedulers_and_tensor_rates(make):
    model, optimizer = setup(make)
    extra = nn.Parameter(torch.ones(3))
    optimizer.add_param_group({"params": late(optimizer, extra), "lr": torch.tensor(0.5)})
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    extra.grad = torch.ones(3)
    train(model, optimizer, 0, 1)
    extra.grad = torch.ones(3)
    optimizer.step()
    scheduler.step()
    assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(5e-3)
    assert (extra < 1).all()


@every
@pytest.mark.parametrize("flatten", [False, True])
def test_distributed_checkpoint_state(make, flatten):
    from torch.distributed.checkpoint import state_dict as dcp

    options = dcp.StateDictOptions(flatten_optimizer_state_dict=flatten)
    model, optimizer = setup(make)
    train(model, optimizer, 0, 5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        saved = copy.deepcopy(dcp.get_optimizer_state_dict(model, optimizer, options=options))
        other, restored = setup(make)
        gradpress.nn.load_flat_state_dict_(other, gradpress.nn.flatten_state_dict(model))
        dcp.set_optimizer_state_dict(other, restored, saved, options=options)
    train(model, optimizer, 5, 9)
    train(other, restored, 5, 9)
    assert_same(snapshot(model, optimizer), snapshot(other, restored))


@every
def test_shapes_of_all_kinds(make):
    _, optimizer = setup(make)
    shapes = [(), (1,), (0, 4), (3,), (2, 3, 4, 5), (1, 1)]
    params = [nn.Parameter(torch.randn(s)) for s in shapes]
    strided = nn.Parameter(torch.randn(12, 9).t())
    channels = nn.Parameter(torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last))
    half = nn.Parameter(torch.randn(70, 3).bfloat16())
    params += [strided, channels, half]
    optimizer.add_param_group({"params": late(optimizer, *params)})
    for p in params:
        p.grad = torch.ones_like(p)
    before = [p.detach().clone() for p in params]
    optimizer.step()
    for p, old in zip(params, before, strict=True):
        assert (p <= old).all()
        assert p.stride() == old.stride()
        assert p.numel() == 0 or (p < old).any()


@pytest.mark.parametrize("make", [adamw8bit, adamw32bit, qgalore, adamp, sgdp, diffgrad])
def test_compiled_model_trains(make):
    model, optimizer = setup(make)
    compiled = torch.compile(model, backend="aot_eager")
    before = snapshot(model, optimizer)
    compiled(torch.ones(2, 24)).square().mean().backward()
    optimizer.step()
    after = snapshot(model, optimizer)
    assert any(not torch.equal(before[n], after[n]) for n in before)


def test_sparse_and_complex_are_refused():
    p = nn.Parameter(torch.ones(4, 4))
    p.grad = torch.ones(4, 4).to_sparse()
    with pytest.raises(RuntimeError, match="AdamW8bit does not support sparse gradients"):
        gradpress.optim.AdamW8bit([p]).step()
    p = nn.Parameter(torch.ones(4, dtype=torch.complex64))
    p.grad = torch.ones_like(p)
    with pytest.raises(RuntimeError, match="does not support complex"):
        gradpress.optim.AdamW8bit([p]).step()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "Invalid learning rate: -1.0"),
        ({"lr": torch.ones(2)}, "Tensor lr must be 1-element"),
        ({"betas": (1.0, 0.9)}, "Invalid beta parameter at index 0: 1.0"),
        ({"eps": -1e-8}, "Invalid epsilon value: -1e-08"),
        ({"weight_decay": -1}, "Invalid weight_decay value: -1"),
        ({"rank": 0}, "Invalid rank value: 0"),
        ({"projector_bits": 3}, "Invalid projector_bits value: 3"),
        ({"state_bits": 3}, "Invalid state_bits value: 3"),
        ({"proj_type": "left"}, "Invalid proj_type value: 'left'"),
        ({"weight_rounding": "up"}, "Invalid weight_rounding value: 'up'"),
        ({"seed": -1}, "Invalid seed value: -1"),
    ],
)
def test_invalid_options(options, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        gradpress.optim.QGaLoreAdamW([nn.Parameter(torch.ones(2))], **options)


@every
@pytest.mark.parametrize("flag", ["capturable", "differentiable"])
def test_unsupported_flags(make, flag):
    if flag == "capturable" and make in CAPTURABLE:
        _, optimizer = setup(make, capturable=True)
        assert optimizer.param_groups[0]["capturable"]
        return
    with pytest.raises(NotImplementedError, match=f"{flag} must be False"):
        setup(make, **{flag: True})
