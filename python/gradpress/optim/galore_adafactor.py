"""GaLore with Adafactor: factored second moments in low-rank subspaces of the gradients.

Zhao, Zhang, Chen, Wang, Anandkumar, Tian: "GaLore: Memory-Efficient LLM Training by Gradient
Low-Rank Projection" (2024, arXiv 2403.03507), with Shazeer, Stern: "Adafactor: Adaptive Learning
Rates with Sublinear Memory Cost" (2018, arXiv 1804.04235). Original implementation:
jiaweizzhao/GaLore (galore_torch), whose Adafactor is that of transformers. Differences: with
`relative_step` the group's `lr` is a number, a factor on the relative step size, where the
original's is None, which no scheduler of PyTorch can multiply; weights are rounded once; the
subspace comes from a randomized iteration with canonical signs; what a refresh does to the moments
is an option; the first moment may be integer codes; projected tensors of order above 2 are taken
as matrices instead of being decomposed.
"""

from __future__ import annotations

from typing import Any, ClassVar, cast

import torch
from torch.optim.optimizer import ParamsT

from gradpress.ops import lowrank as kernels
from gradpress.optim import _adafactor as adafactor
from gradpress.optim import _projector as projector
from gradpress.optim._adam import FLOATS, AdamHyper
from gradpress.optim._base import Group, State, new_step
from gradpress.optim._blockwise import BlockwiseOptimizer
from gradpress.optim._projected import check_options
from gradpress.optim._scaling import Scale
from gradpress.optim._subspace import Row
from gradpress.optim._tucker import is_tensor
from gradpress.optim._weights import add_update
from gradpress.optim.galore import GaLoreAdamW

#: The factor on the relative step size that schedulers begin with.
NEUTRAL_LR = 1.0
#: Options of GaLoreAdamW that Adafactor has not.
UNUSED: dict[str, Any] = {"betas": (0.0, 0.0), "reference": False}


class _WithoutAdam(BlockwiseOptimizer):
    """Leaves Adam's own options out of the groups, where schedulers would turn them."""

    def __init__(self, params: ParamsT, defaults: dict[str, Any]) -> None:
        super().__init__(params, {k: v for k, v in defaults.items() if k not in UNUSED})


class GaLoreAdafactor(GaLoreAdamW, _WithoutAdam):
    r"""Adafactor in a low-rank subspace of each weight's gradient.

    For a weight of a group with `rank` set, with gradient G (m x n) and the type ``"std"``, in the
    t-th step:

    .. math::
        R &= G P \;(m \ge n) \quad\text{or}\quad R = P^\top G, \qquad
            \beta_{2t} = 1 - t^c \\
        r_t &= \beta_{2t} r_{t-1} + (1-\beta_{2t})\,\mathrm{mean}_{columns}(R^2 + \epsilon_1),
            \quad c_t \text{ likewise over rows}, \qquad
            X = R \Big/ \sqrt{\frac{r_t c_t^\top}{\mathrm{mean}(r_t)}} \\
        E_t &= \beta_1 E_{t-1} + (1-\beta_1)\,
            \frac{\alpha_t X}{\max(1, \mathrm{rms}(X) / d)}, \qquad
        W \leftarrow (1 - \alpha_t\lambda) W - \mathrm{scale} \cdot \mathrm{back}(E_t) \\
        \alpha_t &= \mathrm{lr}\cdot\min(10^{-2}, t^{-1/2})\cdot\max(\epsilon_2, \mathrm{rms}(W))

    P holds leading singular directions of the gradient at the last refresh, as for
    :class:`GaLoreAdamW`. All other parameters take the same rule with G in place of R, without
    `scale`: factored over the last two dimensions where there are two or more, element by element
    where there are not. Sums have the same bits for any number of threads. Weights quantized by
    :func:`gradpress.nn.quantize_` are updated in place. Takes a float32 copy of one weight at a
    time with `scale_parameter`, and of one gradient where it is not projected.

    With `relative_step` the group's `lr` is a factor on the relative step size, 1 to begin with:
    any scheduler of PyTorch goes on top of it, and none is needed (transformers'
    `AdafactorSchedule`, which stands in for one, does not apply). :meth:`learning_rates` tells
    what comes out. Without momentum a rate of zero moves nothing; momentum averages updates that
    are already multiplied by their rates, and runs out by itself.

    Args:
        params: Parameters or groups, as :func:`gradpress.optim.param_groups` makes them. Every
            option below may stand in a group.
        lr: Learning rate; None with `relative_step`, and only then.
        eps: Added to squared gradients, and the least root mean square that `scale_parameter`
            takes a parameter to have.
        clip_threshold: Root mean square above which an update is scaled down (the paper's d).
        decay_rate: The exponent c of the second moments' decay; not positive.
        beta1: Decay rate of the first moment; None keeps none.
        weight_decay: Decoupled decay, times the learning rate.
        scale_parameter: Multiply the rate by the root mean square of the parameter.
        relative_step: Take the paper's relative step size instead of a rate.
        warmup_init: Let the relative step size begin at 1e-6 and grow by 1e-6 a step.
        rank: Directions kept; None does not project. Clamped to the weight's shorter side.
            Tensors of order above 2 are taken as (first dimension, all others); those below 2 are
            not projected.
        update_proj_gap: Steps between refreshes.
        scale: Factor on the back-projected update.
        proj_type: ``"std"``, ``"reverse_std"``, ``"left"``, ``"right"`` or ``"full"``, as for
            :class:`GaLoreAdamW`.
        projector_bits: None for float32, 8 or 4 bits for the projector's entries.
        projector_group_size: Entries of an integer projector that share a scale.
        stagger: Spread the refreshes of the layers over the interval.
        moments: What a refresh does to them: ``"keep"`` leaves them in the coordinates of a
            subspace that is gone, as the original does; ``"rotate"`` turns the first moment into
            the new coordinates, and gives each new direction the second moments of the old ones by
            the squares of the cosines, and the mean of them for the part that is new; ``"reset"``
            starts anew, with the decay of a first step, while the relative step size goes on.
        state_bits: 32 for a float32 first moment, 8 or 4. Second moments are float32.
        **options: The others of :class:`GaLoreAdamW`, except `betas` and `reference`.

    Raises:
        ValueError: an option is out of its range; `lr` is given together with `relative_step`, or
            neither is; `warmup_init` is given without `relative_step`.

    Example:
        >>> import torch, gradpress
        >>> from gradpress.optim.galore_adafactor import GaLoreAdafactor
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64))
        >>> groups = gradpress.optim.param_groups(model, rank=8, verbose=False)
        >>> optimizer = GaLoreAdafactor(groups)
        >>> model(torch.randn(4, 64)).square().sum().backward()
        >>> optimizer.step()
        >>> optimizer.state[model[0].weight]["exp_avg_sq_row"].shape
        torch.Size([64])
    """

    _KEEP_DTYPE: ClassVar[frozenset[str]] = GaLoreAdamW._KEEP_DTYPE | frozenset(adafactor.FACTORS)

    def __init__(
        self,
        params: ParamsT,
        lr: float | torch.Tensor | None = None,
        eps: tuple[float, float] = (1e-30, 1e-3),
        clip_threshold: float = 1.0,
        decay_rate: float = -0.8,
        beta1: float | None = None,
        weight_decay: float = 0.0,
        scale_parameter: bool = True,
        relative_step: bool = True,
        warmup_init: bool = False,
        *,
        rank: int | None = None,
        update_proj_gap: int = 200,
        scale: float = 0.25,
        proj_type: str = "std",
        projector_bits: int | None = None,
        projector_group_size: int = 256,
        stagger: bool = False,
        moments: str = "keep",
        state_bits: int = 32,
        **options: Any,
    ) -> None:
        own: dict[str, Any] = {
            "eps": eps,
            "clip_threshold": clip_threshold,
            "decay_rate": decay_rate,
            "beta1": beta1,
            "weight_decay": weight_decay,
            "scale_parameter": scale_parameter,
            "relative_step": relative_step,
            "warmup_init": warmup_init,
        }
        super().__init__(
            params,
            _rate_of(lr, relative_step=relative_step),
            betas=UNUSED["betas"],
            reference=UNUSED["reference"],
            rank=rank,
            update_proj_gap=update_proj_gap,
            scale=scale,
            proj_type=proj_type,
            projector_bits=projector_bits,
            projector_group_size=projector_group_size,
            stagger=stagger,
            moments=moments,
            state_bits=state_bits,
            **own,
            **options,
        )

    # Options

    def add_param_group(self, param_group: Group) -> None:
        """Adds parameters with options of their own; options left out take the defaults.

        Raises:
            ValueError: an option is out of its range, or `lr` does not go with `relative_step`.
        """
        if not isinstance(param_group, dict):
            raise TypeError(f"param_group must be a dict, but got {type(param_group)}")
        default = self.defaults["relative_step"]
        relative = param_group.get("relative_step", default)
        lr = param_group.get("lr")
        if relative and lr is not None and float(lr) == NEUTRAL_LR:
            lr = None  # a group of another optimizer like this one
        if lr is None and not relative and not default:
            lr = self.defaults["lr"]
        rate = _rate_of(lr, relative_step=relative)
        if param_group.get("lr", self.defaults["lr"]) is not rate:
            param_group = {**param_group, "lr": rate}
        super().add_param_group(param_group)

    def _check_group(self, group: Group) -> None:
        eps, beta1 = group["eps"], group["beta1"]
        pair = isinstance(eps, (tuple, list)) and len(eps) == 2 and min(eps) >= 0.0
        check_options(
            group,
            eps=pair,
            clip_threshold=group["clip_threshold"] > 0.0,
            decay_rate=group["decay_rate"] <= 0.0,
            beta1=beta1 is None or 0.0 <= beta1 < 1.0,
        )
        if group["warmup_init"] and not group["relative_step"]:
            raise ValueError("GaLoreAdafactor: warmup_init needs relative_step, got False")
        super()._check_group({**group, "eps": eps[0]})

    def learning_rates(self) -> dict[str, float]:
        """The rate of each parameter's next step, by its name or ordinal. Waits for the device."""
        return {
            name: float(adafactor.learning_rate(p, group, self._steps_of(p) + 1))
            for name, p, group in self._names()
        }

    def _steps_of(self, p: torch.Tensor) -> int:
        self._settle()
        return int(self.state[p]["step"].item()) if self.state.get(p) else 0

    # State

    def _planned_state(self, group: Group, p: torch.Tensor) -> State:
        state = super()._planned_state(group, p)
        if "projector_rank" not in state:
            state = {"step": new_step()}
            adafactor.new_moments(state, p.shape, p.device, group)
        return state

    def _new_state(self, group: Group, p: torch.Tensor, state: State, offset: int) -> None:
        # Adam's float32 moments have the shape of what is projected, whatever the projection.
        super()._new_state({**group, "state_bits": 32}, p, state, offset)
        shape, _ = (state.pop(name).shape for name in FLOATS)
        adafactor.new_moments(state, shape, p.device, group)

    def _move_moments(self, group: Group, p: torch.Tensor, old: Any) -> None:
        state = self.state[p]
        if group["moments"] == "reset":
            adafactor.reset_moments(state, group)
            state["moments_start"] = int(state["step"].item()) - 1
            return
        adafactor.turn_moments(state, self._bases(group, p).turn_from(old), group)

    # Steps

    def _hypers(
        self, group: Group, params: list[torch.Tensor], scale: Scale
    ) -> list[tuple[list[torch.Tensor], AdamHyper]]:
        # What Adam has of its own is not used.
        return [(params, AdamHyper.of({**group, **UNUSED, "eps": 0.0}, scale))]

    def _step_projected(
        self,
        group: Group,
        params: list[torch.Tensor],
        grads: list[torch.Tensor],
        hyper: AdamHyper,
    ) -> None:
        common = []
        for p, grad in zip(params, grads, strict=True):
            names = projector.kept_bases(projector.matrix_shape(p), group["proj_type"])
            if is_tensor(group, p) or projector.LONG in names:
                self._step_by_bases(group, p, grad, hyper)
            else:
                common.append((p, grad))
        if common:
            chosen, theirs = (list(column) for column in zip(*common, strict=True))
            rows = self._project(group, chosen, theirs)
            decays = [self._to_update(group, p, update, hyper) for p, _, _, update in rows]
            self._add_updates(group, rows, decays, hyper)

    def _step_by_bases(
        self, group: Group, p: torch.Tensor, grad: torch.Tensor, hyper: AdamHyper
    ) -> None:
        state, bases = self.state[p], self._bases(group, p)
        update = bases.project(grad)
        decay = self._to_update(group, p, update, hyper)
        outer, basis = bases.factors(update)
        row = (p, state, projector.matrix_shape(p), outer)
        self._add_updates(group, [row], [decay], hyper, [basis])

    def _step_unprojected(self, group: Group, params: list[torch.Tensor], scale: Scale) -> None:
        ((_, hyper),) = self._hypers(group, params, scale)
        ids = self._ids()
        for p in params:
            state = self.state[p]
            if not state:
                state["step"], state["tensor_id"] = new_step(), ids[p]
                adafactor.new_moments(state, p.shape, p.device, group)
            state["step"] += 1
            if p.numel():
                self._step_whole_gradient(group, p, hyper)

    def _step_whole_gradient(self, group: Group, p: torch.Tensor, hyper: AdamHyper) -> None:
        update = torch.empty(p.shape, dtype=torch.float32, device=p.device)
        update.copy_(cast(torch.Tensor, p.grad).detach())
        decay = self._to_update(group, p, update, hyper)
        if isinstance(decay, torch.Tensor):
            update.sub_(adafactor.float_values(p) * decay)
            decay = 0.0
        add_update(p, update, group, self.state[p], decay=decay, found_inf=hyper.found_inf)

    def _to_update(
        self, group: Group, p: torch.Tensor, values: torch.Tensor, hyper: AdamHyper
    ) -> float | torch.Tensor:
        """Turns a gradient into an update in place, and returns what the weight loses of itself."""
        state = self.state[p]
        step = int(state["step"].item())
        rate = adafactor.learning_rate(p, group, step)
        adafactor.to_update(
            adafactor.Gradient(values, hyper.grad_scale, hyper.found_inf),
            state,
            group,
            rate=rate,
            seen=step - int(state.get("moments_start", 0)),
            nonfinite=self._counter(p.device),
        )
        return rate * group["weight_decay"] if group["weight_decay"] else 0.0

    def _add_updates(
        self,
        group: Group,
        rows: list[Row],
        decays: list[float | torch.Tensor],
        hyper: AdamHyper,
        bases: list[torch.Tensor] | None = None,
    ) -> None:
        """Adds updates back-projected; those of one decay in one call."""
        together: dict[float, list[Row]] = {}
        for row, decay in zip(rows, decays, strict=True):
            if isinstance(decay, torch.Tensor):
                self._add_with_decay(group, row, decay, hyper, bases)
            else:
                together.setdefault(decay, []).append(row)
        for decay, chosen in together.items():
            # The base multiplies the two.
            known = hyper._replace(lr=decay, weight_decay=1.0)
            self._add_back(group, chosen, known, bases)

    def _add_with_decay(
        self,
        group: Group,
        row: Row,
        decay: torch.Tensor,
        hyper: AdamHyper,
        bases: list[torch.Tensor] | None,
    ) -> None:
        """Adds one update where only the device knows the decay."""
        p, state, shape, update = row
        change = torch.zeros(shape, dtype=torch.float32, device=p.device)
        kernels.project_back_add(
            [change],
            [update],
            bases or projector.bases_of([state], group),
            scale=group["scale"],
            tensor_ids=[state["tensor_id"]],
            steps=[int(state["step"].item())],
        )
        change.sub_(adafactor.float_values(p).view(shape) * decay)
        add_update(p, change, group, state, decay=0.0, found_inf=hyper.found_inf)


def _rate_of(lr: float | torch.Tensor | None, *, relative_step: bool) -> Any:
    """What stands in a group for a learning rate that was given, or was not."""
    if relative_step and lr is not None:
        raise ValueError(
            f"GaLoreAdafactor: lr must be None where relative_step is True, got {lr}; pass"
            " relative_step=False to choose the rate"
        )
    if not relative_step and lr is None:
        raise ValueError("GaLoreAdafactor: lr must be given where relative_step is False")
    return NEUTRAL_LR if lr is None else lr
