"""What the optimizers share: checks, closures, gradient scaling, and state that loads exactly."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch.optim.optimizer import ParamsT

from gradpress.optim._capture import is_capturing
from gradpress.optim._reporting import ReportingOptimizer
from gradpress.optim._scaling import OpenStep, Scale, stays_on_device
from gradpress.optim._sharded import Shard, is_sharded
from gradpress.optim._sharded_state import local_state
from gradpress.optim._stand_ins import StandIns, step_sharded

if TYPE_CHECKING:
    from gradpress.optim._offload import Offload

Group = dict[str, Any]
State = dict[str, Any]

#: Version of what the states hold: names, packing and block order. Stands in every group.
STATE_LAYOUT = 1


class LowBitOptimizer(ReportingOptimizer):
    """An optimizer whose state is tensors and numbers of its own choice of dtype.

    Subclasses implement `_step_group`. State tensors keep their dtype through `load_state_dict`,
    which PyTorch by itself would cast to the parameter's.
    """

    _KEEP_DTYPE: ClassVar[frozenset[str]] = frozenset()
    #: Of these the ones that stay with the host, which decides by them.
    _ON_HOST: ClassVar[frozenset[str]] = frozenset()
    #: Why steps cannot be recorded in CUDA graphs; None where they can.
    _NOT_CAPTURABLE: ClassVar[str | None] = "steps are counted on the host"
    #: Whether `_step_group` may be given a part of the rows of parameters.
    _STEPS_SHARDS: ClassVar[bool] = False

    def __init__(self, params: ParamsT, defaults: dict[str, Any]) -> None:
        super().__init__(params, {**defaults, "state_layout": STATE_LAYOUT})
        # `step` reads `grad_scale` and `found_inf`, which GradScaler sets.
        self._step_supports_amp_scaling = True
        self._install_state_hooks()

    # Options

    def add_param_group(self, param_group: Group) -> None:
        """Adds parameters with options of their own; options left out take the defaults.

        Raises:
            ValueError: an option is out of its range.
        """
        super().add_param_group(param_group)
        try:
            self._check_group(self.param_groups[-1])
        except (ValueError, NotImplementedError, TypeError):
            self.param_groups.pop()
            raise

    def _check_group(self, group: Group) -> None:
        lr = group["lr"]
        if isinstance(lr, torch.Tensor) and lr.numel() != 1:
            raise ValueError("Tensor lr must be 1-element")
        if not float(lr) >= 0.0:
            raise ValueError(f"Invalid learning rate: {lr}")
        if not group["eps"] >= 0.0:
            raise ValueError(f"Invalid epsilon value: {group['eps']}")
        for index, beta in enumerate(group.get("betas", ())):
            if not 0.0 <= beta < 1.0:
                raise ValueError(f"Invalid beta parameter at index {index}: {beta}")
        if not group["weight_decay"] >= 0.0:
            raise ValueError(f"Invalid weight_decay value: {group['weight_decay']}")
        if group["differentiable"]:
            raise NotImplementedError(
                f"{type(self).__name__}: differentiable must be False; the fused kernels cannot be"
                " differentiated"
            )
        if group["capturable"] and self._NOT_CAPTURABLE is not None:
            raise NotImplementedError(
                f"{type(self).__name__}: capturable must be False; {self._NOT_CAPTURABLE}"
            )

    # Stepping

    @torch._disable_dynamo  # type: ignore[attr-defined]
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Performs one optimization step.

        Args:
            closure: Reevaluates the model and returns the loss; run with gradients enabled.

        Returns:
            What `closure` returned, or None.

        Raises:
            RuntimeError: a gradient is sparse; or a CUDA graph is being recorded, and a group is
                not capturable or has no state yet.
        """
        self._check_capture(self.param_groups)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._settle()
        found_inf, grad_scale = self._told_by_scaler()
        if stays_on_device(grad_scale if found_inf is None else found_inf):
            scale = Scale(1.0, grad_scale, found_inf)
        elif found_inf is not None and found_inf.item():
            return loss
        else:
            scale = Scale(1.0 if grad_scale is None else float(grad_scale.item()))
        stepped: list[torch.Tensor] = []
        with torch.no_grad():
            for group in self.param_groups:
                params = [p for p in group["params"] if self._has_gradient(p)]
                self._check_gradients(params)
                self._step_params(group, params, scale)
                if not self._counts_on_device(group):
                    stepped += params
        counters = [self.state[p]["step"] for p in stepped if "step" in self.state[p]]
        if scale.found_inf is not None and counters:
            self.__dict__["_open_step"] = OpenStep(scale.found_inf, counters)
        if self._offload is not None:
            self._offload.wait()
        return loss

    def _told_by_scaler(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """What `torch.amp.GradScaler` says: whether a gradient is not finite, and the scale."""
        found_inf, grad_scale = (getattr(self, name, None) for name in ("found_inf", "grad_scale"))
        return found_inf, grad_scale

    def _has_gradient(self, p: torch.Tensor) -> bool:
        """Whether there is anything to step a parameter with."""
        return p.grad is not None

    def _gradient_square(self, p: torch.Tensor) -> torch.Tensor:
        """The squared norm of what a parameter is stepped with."""
        grad = cast(torch.Tensor, p.grad).detach()
        square: torch.Tensor = torch.linalg.vector_norm(grad, dtype=torch.float32).square()
        return square

    def _counts_on_device(self, group: Group) -> bool:
        """Whether the steps of a group's parameters are counted where these are."""
        return bool(group["capturable"]) and self._NOT_CAPTURABLE is None

    def _check_capture(self, groups: Iterable[Group]) -> None:
        if is_capturing() and not all(self._counts_on_device(group) for group in groups):
            reason = self._NOT_CAPTURABLE or "make it with capturable=True"
            raise RuntimeError(
                f"{type(self).__name__}: step() is being captured in a CUDA graph, but"
                f" capturable is False in param_groups; {reason}"
            )
        if is_capturing() and self._offload is not None:
            raise RuntimeError(
                f"{type(self).__name__}: step() is being captured in a CUDA graph, but its states"
                " are on the host; call remove() of offload_states first"
            )

    def _settle(self) -> None:
        """Counts the last step right, of which only the device knew whether it was skipped."""
        open_step: OpenStep | None = self.__dict__.pop("_open_step", None)
        if open_step is not None:
            open_step.settle()
        if self._offload is not None:
            self._offload.wait()

    @property
    def _offload(self) -> Offload | None:
        """Where the states are between steps, if not with the parameters."""
        return self.__dict__.get("_offload")

    def _step_params(self, group: Group, params: list[torch.Tensor], scale: Scale) -> None:
        """Steps parameters of one group."""
        self._check_capture([group])
        if self._offload is None:
            self._step_resident(group, params, scale)
        else:
            self._offload.step(self, group, params, scale)

    def _step_resident(self, group: Group, params: list[torch.Tensor], scale: Scale) -> None:
        """Steps parameters of one group whose states are where the parameters are."""
        self._step_devices(group, [p for p in params if not is_sharded(p)], scale)
        shards = [Shard.of(p, type(self).__name__) for p in params if is_sharded(p)]
        if shards:
            for shard in shards:
                self.state[shard.p]  # empty ones come in this order, as a loaded state's do
            self._step_shards(group, shards, scale)

    def _step_shards(self, group: Group, shards: list[Shard], scale: Scale) -> None:
        """Steps sharded parameters of one group; there is at least one."""
        step = functools.partial(self._step_stand_ins, scale)
        step_sharded(self.state, group, shards, self._ids(), step)

    def _step_devices(self, group: Group, params: list[torch.Tensor], scale: Scale) -> None:
        for device, together in _by_device(params).items():
            self._step_group(group, together, scale.on(device))

    def _step_stand_ins(self, scale: Scale, group: Group, stand_ins: StandIns) -> None:
        self.__dict__["_stand_ins"] = stand_ins
        try:
            self._step_devices(group, list(stand_ins.shards), scale)
        finally:
            del self.__dict__["_stand_ins"]

    def _shard_of(self, p: torch.Tensor) -> Shard | None:
        """What a parameter of `_step_group` stands in for; None for one that is not sharded."""
        stand_ins: StandIns | None = self.__dict__.get("_stand_ins")
        return None if stand_ins is None else stand_ins.shards.get(p)

    def _step_group(self, group: Group, params: list[torch.Tensor], scale: Scale) -> None:
        """Steps parameters of one group that are on one device; there is at least one.

        Of sharded parameters, plain tensors of the rows of this process stand in for them.
        """
        raise NotImplementedError

    def _check_gradients(self, params: Iterable[torch.Tensor]) -> None:
        for p in params:
            if is_sharded(p):
                if not self._STEPS_SHARDS:
                    raise NotImplementedError(
                        f"{type(self).__name__}: sharded parameters (DTensor, as fully_shard makes"
                        " them) are not supported; replicate them, as DistributedDataParallel does"
                    )
                Shard.of(p, type(self).__name__)
            if p.grad is not None and p.grad.is_sparse:
                raise RuntimeError(f"{type(self).__name__} does not support sparse gradients")
            if p.is_complex():
                raise RuntimeError(f"{type(self).__name__} does not support complex parameters")

    def _ids(self) -> dict[torch.Tensor, int]:
        """The ordinal of every parameter over all groups: the key of its random numbers."""
        everything = itertools.chain.from_iterable(g["params"] for g in self.param_groups)
        ids = {p: i for i, p in enumerate(everything)}
        stand_ins: StandIns | None = self.__dict__.get("_stand_ins")
        return ids if stand_ins is None else {**ids, **stand_ins.ids}

    # State

    def __setstate__(self, state: State) -> None:
        """Restores a pickled, copied or loaded optimizer.

        Hooks are not copied, and options that a checkpoint does not know take their defaults.
        """
        super().__setstate__(state)
        for group in self.param_groups:
            for key, value in self.defaults.items():
                group.setdefault(key, value)
        if not self.__dict__.get("_state_hooks_installed", False):
            self._install_state_hooks()

    def __getstate__(self) -> State:
        """What pickle and deepcopy keep: everything but the hooks."""
        self._settle()
        kept = {"_step_supports_amp_scaling": True}
        offload = {} if self._offload is None else {"_offload": self._offload}
        return {**super().__getstate__(), **kept, **offload}

    def _install_state_hooks(self) -> None:
        self.register_state_dict_pre_hook(_settle)
        self.register_load_state_dict_pre_hook(_remember_loaded)
        # Before the user's hooks, which shall see the state as it will be.
        self.register_load_state_dict_post_hook(_restore_dtypes, prepend=True)
        self._state_hooks_installed = True


def _settle(optimizer: torch.optim.Optimizer) -> None:
    cast(LowBitOptimizer, optimizer)._settle()


def _remember_loaded(optimizer: torch.optim.Optimizer, state_dict: State) -> State | None:
    for group in state_dict["param_groups"]:
        layout = group.get("state_layout", STATE_LAYOUT)
        if layout != STATE_LAYOUT:
            raise ValueError(
                f"{type(optimizer).__name__}: state_dict has state_layout {layout}, this version"
                f" of gradpress reads {STATE_LAYOUT}"
            )
    optimizer.__dict__.pop("_open_step", None)
    ids = [list(g["params"]) for g in state_dict["param_groups"]]
    optimizer.__dict__["_loaded_state"] = (state_dict["state"], ids)
    if "_offload" not in optimizer.__dict__:
        return None
    # PyTorch would bring all of them to the parameters' device.
    keep = type(optimizer)._KEEP_DTYPE  # type: ignore[attr-defined]
    others = {
        key: {n: v for n, v in state.items() if n not in keep or not isinstance(v, torch.Tensor)}
        for key, state in state_dict["state"].items()
    }
    return {**state_dict, "state": others}


def _restore_dtypes(optimizer: torch.optim.Optimizer) -> None:
    loaded, ids = optimizer.__dict__.pop("_loaded_state")
    keep = type(optimizer)._KEEP_DTYPE  # type: ignore[attr-defined]
    on_host = type(optimizer)._ON_HOST  # type: ignore[attr-defined]
    offload: Offload | None = optimizer.__dict__.get("_offload")
    live = [(p, group) for group in optimizer.param_groups for p in group["params"]]
    for key, (p, group) in zip(itertools.chain.from_iterable(ids), live, strict=True):
        source = loaded.get(key, {})
        for name in source:
            if name not in keep or not isinstance(source[name], torch.Tensor):
                continue
            value = source[name].detach()
            own = cast(LowBitOptimizer, optimizer)
            if offload is not None and offload.moves(own, group, name):
                optimizer.state[p][name] = offload.host_copy(value, p)
                continue
            # The device follows the parameter; the dtype is the state's own.
            device = torch.device("cpu") if name in on_host else p.device
            optimizer.state[p][name] = value.to(device, copy=True)
        if isinstance(source.get("step"), torch.Tensor) and p in optimizer.state:
            # PyTorch takes the counter itself, which two optimizers would then count together.
            on_device = cast(LowBitOptimizer, optimizer)._counts_on_device(group)
            counter = source["step"].detach().to(p.device if on_device else "cpu", copy=True)
            optimizer.state[p]["step"] = counter
        if is_sharded(p) and p in optimizer.state:
            # Refuses what was divided otherwise, before anything is stepped with it.
            local_state(Shard.of(p, type(optimizer).__name__), optimizer.state[p], group)


def _by_device(params: list[torch.Tensor]) -> dict[torch.device, list[torch.Tensor]]:
    """The parameters of each device, in their order."""
    devices: dict[torch.device, list[torch.Tensor]] = {}
    for p in params:
        devices.setdefault(p.device, []).append(p)
    return devices


def plain_gradient(p: torch.Tensor) -> torch.Tensor:
    """The gradient as a contiguous tensor, copied only where it is not one already."""
    grad = cast(torch.Tensor, p.grad).detach()
    return grad.resolve_neg().contiguous()


def new_step(device: torch.device | str = "cpu") -> torch.Tensor:
    """The counter of a parameter that was never stepped, as PyTorch keeps it."""
    return torch.zeros((), dtype=torch.float32, device=device)
