"""AdamW with moments of 8 bits.

Dettmers, Lewis, Shleifer, Zettlemoyer: "8-bit Optimizers via Block-wise Quantization" (2021,
arXiv 2110.02861), with the update of Loshchilov and Hutter: "Decoupled Weight Decay
Regularization" (2017, arXiv 1711.05101). Original implementation: bitsandbytes. Differences: the
weight decay comes before the step, as in `torch.optim.AdamW`; a positive second moment never
becomes zero; bfloat16 parameters are rounded stochastically.
"""

from __future__ import annotations

from typing import Any, ClassVar, cast

import torch
from torch.optim.optimizer import ParamsT

from gradpress.nn._weight import QuantizedWeight
from gradpress.optim._adam import (
    CODES,
    FLOATS,
    AdamHyper,
    Batch,
    new_moments,
    step_directions,
    step_parameters,
)
from gradpress.optim._base import Group, State, new_step, plain_gradient
from gradpress.optim._blockwise import BlockwiseOptimizer
from gradpress.optim._capture import count_on_device, count_on_host, refuse_in_capture
from gradpress.optim._scaling import Scale
from gradpress.optim._weights import requantize_with_update


class AdamW8bit(BlockwiseOptimizer):
    r"""AdamW whose two moments take one byte each.

    .. math::
        m_t &= \beta_1 m_{t-1} + (1-\beta_1) g_t, \quad v_t = \beta_2 v_{t-1} + (1-\beta_2) g_t^2 \\
        p_t &= (1 - \eta\lambda)\, p_{t-1}
            - \eta\, \frac{m_t / (1-\beta_1^t)}{\sqrt{v_t / (1-\beta_2^t)} + \epsilon}

    The moments are stored as 8-bit codes of a dynamic map with one float32 scale for each block of
    256 elements; all arithmetic is in float32 and the parameter is rounded once. One native call
    steps all tensors of a group. The result is the same bit for bit whatever the number of threads
    or the instruction set. An element whose gradient is NaN or infinite keeps its parameter and
    moments, and is counted (:attr:`nonfinite_gradients`).

    Args:
        params: Tensors, named tensors, or dicts of parameter groups, as for `torch.optim.AdamW`.
            Any option below but the flags may stand in a group. Weights quantized by
            :func:`gradpress.nn.quantize_` are updated in place with stochastic rounding.
        lr: Learning rate; a number or a tensor of one element.
        betas: Decay rates of the two moments.
        eps: Added to the denominator.
        weight_decay: Decoupled decay, times the learning rate.
        maximize: Ascends instead of descending.
        foreach: Accepted for compatibility; the kernels always take lists.
        fused: Accepted for compatibility; the kernels are always fused.
        capturable: Lets `torch.cuda.graph` record `step`. Steps are counted on the parameter's
            device, a learning rate that is a float32 tensor there is read there, and so are
            GradScaler's numbers: the host waits for nothing, and each replay counts on. Step once
            before the capture, which makes the states. The results are those of False bit for bit,
            on the CPU too, and checkpoints go both ways; as in PyTorch the flag of a checkpoint
            replaces this one. Not for quantized weights.
        differentiable: Must be False: the kernels cannot be differentiated.
        block_size: Elements of a moment that share a scale: 256 for 8 bits, 128 for 4 when None.
        min_8bit_size: Tensors with fewer elements keep float32 moments.
        state_bits: 8; 4 for half the memory (Li et al. 2023, arXiv 2309.01507); or 32 for float32
            moments throughout.
        stochastic_rounding: Round bfloat16 parameters stochastically, so that updates below half a
            step count on average; False rounds to nearest.
        weight_rounding: How quantized weights are rounded: ``"stochastic"`` or ``"nearest"``.
        seed: Key of all random numbers. Equal seeds give equal bits.

    Raises:
        ValueError: an option is out of its range.

    Example:
        >>> import torch, gradpress
        >>> model = torch.nn.Linear(128, 128)
        >>> optimizer = gradpress.optim.AdamW8bit(model.parameters(), lr=1e-3)
        >>> model(torch.ones(2, 128)).sum().backward()
        >>> optimizer.step()
        >>> optimizer.state[model.weight]["exp_avg_codes"].dtype
        torch.uint8
    """

    _KEEP_DTYPE: ClassVar[frozenset[str]] = frozenset((*CODES, *FLOATS))
    _STEPS_SHARDS: ClassVar[bool] = True
    _NOT_CAPTURABLE: ClassVar[str | None] = None

    def __init__(
        self,
        params: ParamsT,
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        block_size: int | None = None,
        min_8bit_size: int = 4096,
        state_bits: int = 8,
        stochastic_rounding: bool = True,
        weight_rounding: str = "stochastic",
        seed: int = 0,
        **own_defaults: Any,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "foreach": foreach,
            "fused": fused,
            "capturable": capturable,
            "differentiable": differentiable,
            "block_size": block_size,
            "min_8bit_size": min_8bit_size,
            "state_bits": state_bits,
            "stochastic_rounding": stochastic_rounding,
            "weight_rounding": weight_rounding,
            "seed": seed,
            **own_defaults,
        }
        super().__init__(params, defaults)

    def _check_group(self, group: Group) -> None:
        super()._check_group(group)
        self._check_quantized(group, group["params"])

    def _check_quantized(self, group: Group, params: list[torch.Tensor]) -> None:
        if self._counts_on_device(group) and any(isinstance(p, QuantizedWeight) for p in params):
            raise NotImplementedError(
                f"{type(self).__name__}: capturable must be False for quantized weights; the host"
                " counts the steps that key their rounding"
            )

    def _planned_state(self, group: Group, p: torch.Tensor) -> State:
        state: State = {"step": new_step()}
        new_moments(state, p.shape, p.device, group)
        return state

    def _step_group(self, group: Group, params: list[torch.Tensor], scale: Scale) -> None:
        self._step_unprojected(group, params, scale)

    def _hypers(
        self, group: Group, params: list[torch.Tensor], scale: Scale
    ) -> list[tuple[list[torch.Tensor], AdamHyper]]:
        """The parameters, divided where the numbers of their steps differ."""
        if self._counts_on_device(group):
            return [(params, AdamHyper.on(params[0].device, group, scale))]
        return [(params, AdamHyper.of(group, scale))]

    def _step_unprojected(self, group: Group, params: list[torch.Tensor], scale: Scale) -> None:
        """AdamW on whole gradients, for dense and for quantized parameters."""
        self._check_quantized(group, params)
        on_device, ids = self._counts_on_device(group), self._ids()
        for p in params:
            state = self.state[p]
            if not state:
                refuse_in_capture(f"{type(self).__name__}: the states of parameters")
                state["step"] = new_step(p.device if on_device else "cpu")
                state["tensor_id"] = ids[p]
                new_moments(state, p.shape, p.device, group)
        states = [self.state[p] for p in params]
        if on_device:
            count_on_device(states, params[0].device, scale.found_inf, type(self).__name__)
        else:
            count_on_host(states)
        for chosen, hyper in self._hypers(group, params, scale):
            self._step_whole(group, chosen, hyper)

    def _step_whole(self, group: Group, params: list[torch.Tensor], hyper: AdamHyper) -> None:
        for p in params:
            if isinstance(p, QuantizedWeight):
                self._step_quantized(group, p, hyper)
        dense = [p for p in params if not isinstance(p, QuantizedWeight)]
        if dense:
            targets = [p if p.is_contiguous() else p.detach().contiguous() for p in dense]
            states = [self.state[p] for p in dense]
            batch = Batch(targets, [plain_gradient(p) for p in dense], states)
            step_parameters(batch, hyper, self._counter(dense[0].device))
            for p, target in zip(dense, targets, strict=True):
                if target is not p:
                    p.copy_(target)

    def _step_quantized(self, group: Group, p: QuantizedWeight, hyper: AdamHyper) -> None:
        """A quantized weight that is not projected: Adam's update, then one rounding."""
        state = self.state[p]
        # A copy: the gradient itself is never written.
        update = cast(torch.Tensor, p.grad).detach().to(torch.float32, copy=True).contiguous()
        batch = Batch([update], [update], [state])
        step_directions(batch, hyper, self._counter(p.device))
        requantize_with_update(
            p,
            update,
            decay=hyper.lr * hyper.weight_decay,
            rounding=group["weight_rounding"],
            seed=hyper.seed,
            tensor_id=state["tensor_id"],
            step=int(state["step"].item()),
            found_inf=hyper.found_inf,
        )
