"""Optimizer states that live on the host between steps."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch

from gradpress._handle import Handle
from gradpress.optim._base import Group, LowBitOptimizer, State
from gradpress.optim._ranks import AUTO
from gradpress.optim._scaling import Scale
from gradpress.optim._sharded import is_sharded


class Offload:
    """Where an optimizer's state tensors are between steps, and how they come and go.

    Counters, and what decides about later steps on the host, never leave it. Projectors that
    backward passes need stay with the parameters.

    Attributes:
        device: Where they are.
        pin_memory: Whether page-locked, for copies that nobody waits for.
        portion_bytes: Of states that are on the parameters' device at a time.
    """

    def __init__(self, device: torch.device, pin_memory: bool, portion_bytes: int) -> None:
        self.device, self.pin_memory, self.portion_bytes = device, pin_memory, portion_bytes
        self._copies: dict[torch.device, torch.cuda.Event] = {}

    def __getstate__(self) -> State:
        """The options; copies are done when an optimizer is pickled."""
        return {**self.__dict__, "_copies": {}}

    def step(
        self, optimizer: LowBitOptimizer, group: Group, params: list[torch.Tensor], scale: Scale
    ) -> None:
        """Steps parameters of one group, some at a time, each with its states on its device."""
        for p in params:
            check_whole(p)
            optimizer.state[p]  # empty ones come in this order, as a loaded state's do
        for portion in self._portions(optimizer, group, params):
            homes = [self._fetch(optimizer, group, p) for p in portion]
            try:
                optimizer._step_resident(group, portion, scale)
            finally:
                for p, home in zip(portion, homes, strict=True):
                    self._hand_back(optimizer, group, p, home)
                for device in {p.device for p in portion if p.is_cuda}:
                    self._copies[device] = torch.cuda.Event()  # type: ignore[no-untyped-call]
                    self._copies[device].record(torch.cuda.current_stream(device))

    def wait(self) -> None:
        """Returns when what the last steps have left is on the host."""
        while self._copies:
            _, copied = self._copies.popitem()
            copied.synchronize()

    def moves(self, optimizer: LowBitOptimizer, group: Group, name: str) -> bool:
        """Whether a state tensor of this name comes and goes."""
        stays = name.startswith("projector") and not group.get("materialize_gradients", True)
        return name in optimizer._KEEP_DTYPE - optimizer._ON_HOST and not stays

    def host_copy(self, value: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
        """A copy of a state tensor of a parameter, where it is between steps."""
        return self._like(value, p).copy_(value)

    def keep_all(self, optimizer: LowBitOptimizer) -> None:
        """Takes the states that exist, one after the other."""
        was_offloaded = optimizer._offload is not None
        for p, name, value in self._tensors(optimizer):
            if not (was_offloaded and self._fits(value, value, p)):
                optimizer.state[p][name] = self.host_copy(value, p)

    def release_all(self, optimizer: LowBitOptimizer) -> None:
        """Gives all states back to the parameters' devices."""
        self.wait()
        for p, name, value in self._tensors(optimizer):
            optimizer.state[p][name] = value.to(p.device, copy=True)

    # Portions

    def _portions(
        self, optimizer: LowBitOptimizer, group: Group, params: list[torch.Tensor]
    ) -> Iterator[list[torch.Tensor]]:
        if group.get("rank") == AUTO and group.get("rank_budget") is not None:
            states = [optimizer.state[p] for p in params]
            if any(not state or not state.get("rank_chosen", 1) for state in states):
                yield params
                return
        portion: list[torch.Tensor] = []
        size = 0
        for p in params:
            more = self._bytes(optimizer, group, p)
            if portion and size + more > self.portion_bytes:
                yield portion
                portion, size = [], 0
            portion.append(p)
            size += more
        if portion:
            yield portion

    def _bytes(self, optimizer: LowBitOptimizer, group: Group, p: torch.Tensor) -> int:
        """What the states of a parameter take in its step."""
        state = optimizer.state[p]
        if not state or not state.get("rank_chosen", 1):
            like = torch.empty(p.shape, dtype=p.dtype, device="meta")
            state = optimizer._planned_state(group, like)
        return sum(
            value.nbytes
            for name, value in state.items()
            if isinstance(value, torch.Tensor) and self.moves(optimizer, group, name)
        )

    # Copies

    def _fetch(self, optimizer: LowBitOptimizer, group: Group, p: torch.Tensor) -> State:
        """Brings the states of a parameter to its device; returns what they were copied from."""
        state = optimizer.state[p]
        homes = {
            name: value
            for name, value in state.items()
            if isinstance(value, torch.Tensor) and self.moves(optimizer, group, name)
        }
        for name, value in homes.items():
            state[name] = value.to(p.device, non_blocking=True, copy=True)
        return homes

    def _hand_back(
        self, optimizer: LowBitOptimizer, group: Group, p: torch.Tensor, homes: State
    ) -> None:
        state = optimizer.state[p]
        for name, value in state.items():
            if isinstance(value, torch.Tensor) and self.moves(optimizer, group, name):
                home = homes.get(name)
                if home is None or not self._fits(home, value, p):
                    home = self._like(value, p)
                state[name] = home.copy_(value, non_blocking=self._pins(p))

    def _fits(self, home: torch.Tensor, value: torch.Tensor, p: torch.Tensor) -> bool:
        same = home.shape == value.shape and home.dtype == value.dtype
        return same and home.device == self.device and (not self._pins(p) or home.is_pinned())

    def _like(self, value: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(value, device=self.device, pin_memory=self._pins(p))

    def _pins(self, p: torch.Tensor) -> bool:
        return self.pin_memory and p.is_cuda and self.device.type == "cpu"

    def _tensors(
        self, optimizer: LowBitOptimizer
    ) -> Iterator[tuple[torch.Tensor, str, torch.Tensor]]:
        for group in optimizer.param_groups:
            for p in group["params"]:
                for name, value in list(optimizer.state.get(p, {}).items()):
                    if isinstance(value, torch.Tensor) and self.moves(optimizer, group, name):
                        yield p, name, value


class OffloadedStates(Handle):
    """What :func:`offload_states` switched on; `remove` switches it off.

    Also a context manager that does so at its end.
    """

    def __init__(self, optimizer: LowBitOptimizer) -> None:
        self._optimizer = optimizer

    def remove(self) -> None:
        """The states stay on the parameters' devices again."""
        offload: Offload | None = self._optimizer.__dict__.pop("_offload", None)
        if offload is not None:
            offload.release_all(self._optimizer)


def offload_states(
    optimizer: torch.optim.Optimizer,
    device: torch.device | str = "cpu",
    pin_memory: bool = True,
    *,
    portion_bytes: int = 256 << 20,
) -> OffloadedStates:
    """Keeps the states of an optimizer on the host between steps, to the same bits.

    In a step the parameters come in portions: the states of a portion are copied to the parameters'
    device, stepped, and copied back (Ren et al.: "ZeRO-Offload", 2021, arXiv 2101.06840, has the
    states on the host too, and steps there). The copies follow the step on the current stream; a
    step ends when they are done. `fused_backward` has portions of one parameter each, and waits at
    the end of the step only.

    `state_dict`, pickling and `deepcopy` take the states from the host, and checkpoints are those
    of any other optimizer; copies of an offloaded optimizer are offloaded. Loaded states go
    straight to the host. Numbers and counters, which are on the host anyway, stay there; so do, on
    the parameters' device, projectors where ``materialize_gradients=False``, since backward passes
    need them. Matrices whose ranks are chosen under a `rank_budget` have that one step in common,
    whatever their states take.

    Args:
        optimizer: One of this package's; its parameters are not sharded (DTensor).
        device: Where the states are between steps. If the parameters are there too, nothing is
            won, and the states are copied all the same.
        pin_memory: Page-locked memory, which copies do not wait for, where parameters are on CUDA.
        portion_bytes: Of states that are on the parameters' device at a time; a parameter whose
            own states take more has a portion for itself.

    Returns:
        A handle with `remove()`.

    Raises:
        TypeError: `optimizer` is another package's.
        ValueError: `portion_bytes` is less than 1.
        NotImplementedError: a parameter is sharded.

    Example:
        >>> import torch, gradpress
        >>> model = torch.nn.Linear(128, 128)
        >>> optimizer = gradpress.optim.AdamW8bit(model.parameters())
        >>> handle = gradpress.optim.offload_states(optimizer)
        >>> model(torch.ones(2, 128)).square().sum().backward()
        >>> optimizer.step()
        >>> optimizer.state[model.weight]["exp_avg_codes"].device
        device(type='cpu')
        >>> handle.remove()
    """
    if not isinstance(optimizer, LowBitOptimizer):
        raise TypeError(
            "offload_states: optimizer must be one of gradpress.optim, got"
            f" {type(optimizer).__name__}"
        )
    if portion_bytes < 1:
        raise ValueError(f"offload_states: portion_bytes must be at least 1, got {portion_bytes}")
    for p in itertools.chain.from_iterable(g["params"] for g in optimizer.param_groups):
        check_whole(p)
    optimizer._settle()
    offload = Offload(torch.device(device), pin_memory, portion_bytes)
    offload.keep_all(optimizer)
    optimizer.__dict__["_offload"] = offload
    return OffloadedStates(optimizer)


def check_whole(p: Any) -> None:
    """Refuses sharded parameters.

    Raises:
        NotImplementedError: it is one.
    """
    if is_sharded(p):
        raise NotImplementedError(
            "offload_states: parameters must not be sharded (DTensor), whose states are divided"
            " already; use the `offload_policy` of fully_shard"
        )
