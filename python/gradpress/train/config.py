"""What a training run computes, as one frozen record that is written into the run's folder."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from gradpress.train.errors import UserError
from gradpress.train.sizes import SIZES, ModelSize

OPTIMIZERS = ("adamw", "adamw8bit", "qgalore")
DTYPES = ("float32", "bfloat16")
ROUNDINGS = ("stochastic", "nearest")
MEMORY = ("ordinary", "least")


def option(
    help_text: str,
    parse: Callable[[str], Any] = str,
    default: Any = dataclasses.MISSING,
    **metadata: Any,
) -> Any:
    """A field that the command line offers too; `default` missing means "depends on others"."""
    metadata.update(help=help_text, parse=parse)
    if default is dataclasses.MISSING:
        return dataclasses.field(metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def bits_or_none(text: str) -> int | None:
    """Reads a number of bits; the word `none` stands for full precision."""
    return None if text.lower() == "none" else int(text)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything that decides the result of a run, and nothing else.

    Two runs with equal configurations on the CPU of the same machine, with the same packages, text
    and number of threads, give the same bits. `TrainConfig.create` fills in what depends on the
    size and on the optimizer.
    """

    size: str = option("built-in model size", default="tiny", choices=tuple(SIZES))
    hidden_size: int = option("width of the model", int, shown="the size's")
    intermediate_size: int = option("width of the SwiGLU layer", int, shown="the size's")
    heads: int = option("attention heads", int, shown="the size's")
    layers: int = option("transformer blocks", int, shown="the size's")
    vocab_size: int = option(
        "largest size of the byte-level BPE vocabulary", int, shown="1024 for tiny, else 32000"
    )
    dtype: str = option("type of weights and activations", default="float32", choices=DTYPES)
    text: tuple[str, ...] = option(
        "files or folders to train on",
        default=(),
        nargs="+",
        shown="the Python standard library's sources and manual topics",
    )

    memory: str = option(
        "least: step in the backward pass without forming gradients, compute activations again,"
        " logits of some tokens at a time (qgalore, which it implies)",
        default="ordinary",
        choices=MEMORY,
    )
    optimizer: str = option(
        "update rule", shown="adamw; qgalore with --memory least", choices=OPTIMIZERS
    )
    lr: float = option(
        "peak learning rate of the attention and MLP matrices", float, shown="by the optimizer"
    )
    lr_rest: float = option(
        "peak learning rate of embeddings, norms and head", float, shown="by the optimizer"
    )
    betas: tuple[float, float] = option(
        "decay of the two moments", float, default=(0.9, 0.999), nargs=2
    )
    eps: float = option("added to the root of the second moment", float, default=1e-8)
    weight_decay: float = option("decoupled weight decay", float, default=0.0)

    rank: int = option("rank of the projected gradients (qgalore)", int, shown="the size's")
    update_proj_gap: int = option(
        "steps between two refreshes of a projector (qgalore)", int, shown="50 for tiny, else 200"
    )
    scale: float = option("factor on the projected update (qgalore)", float, default=0.25)
    projector_bits: int | None = option(
        "4, 8 or none (qgalore)", bits_or_none, default=4, allowed=(4, 8, None)
    )
    state_bits: int = option("bits of the moments (qgalore): 4, 8 or 32", int, default=8)
    cos_threshold: float = option(
        "mean cosine from which a refresh interval grows (qgalore)", float, default=0.4
    )
    gamma_proj: float = option("factor by which it grows (qgalore)", float, default=2.0)
    queue_size: int = option("cosines that are averaged (qgalore)", int, default=5)
    stagger: bool = option("spread first refreshes over the steps (qgalore)", default=True)
    weight_bits: int | None = option(
        "8: keep the attention and MLP matrices as INT8; or none",
        bits_or_none,
        shown="8 for qgalore, else none",
    )
    weight_group_size: int = option("weights that share one INT8 scale", int, default=256)
    weight_rounding: str = option(
        "rounding of an updated INT8 weight", default="stochastic", choices=ROUNDINGS
    )

    steps: int = option("optimizer steps", int, shown="300 for tiny, else 1000")
    batch_size: int = option("windows per forward pass", int, shown="8 for tiny, else 16")
    sequence_length: int = option("tokens per window", int, shown="128 for tiny, else 256")
    accumulate: int = option("forward passes per optimizer step", int, default=1)
    warmup: float = option("share of the steps that warm up", float, default=0.1)
    min_lr_ratio: float = option("where the cosine ends, relative to the peak", float, default=0.1)
    clip: float = option("largest norm of the gradient; 0: no clipping", float, default=0.0)
    seed: int = option("of initialization, batches and rounding", int, default=0)
    eval_every: int = option("steps between two evaluations; 0: only at the end", int, default=50)
    eval_batches: int = option("batches of the validation text to evaluate", int, default=16)

    @classmethod
    def create(cls, **options: Any) -> TrainConfig:
        """Builds a configuration; what is not given follows from the size and the optimizer.

        Args:
            **options: Any field of this class.

        Returns:
            The checked configuration.

        Raises:
            UserError: An option is unknown, out of range, or does not fit the others.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(options) - known)
        if unknown:
            raise UserError(f"unknown option {unknown[0]!r}")
        size = options.get("size", "tiny")
        least = options.get("memory") == "least"
        optimizer = options.setdefault("optimizer", "qgalore" if least else "adamw")
        _check_choice("size", size, tuple(SIZES))
        _check_choice("optimizer", optimizer, OPTIMIZERS)
        return cls(**{**_dependent_defaults(SIZES[size], size, optimizer), **options})

    def __post_init__(self) -> None:
        """Checks every field.

        Raises:
            UserError: A field is out of range or does not fit the others.
        """
        for field in dataclasses.fields(self):
            choices = field.metadata.get("choices") or field.metadata.get("allowed")
            if choices:
                _check_choice(field.name, getattr(self, field.name), choices)
        _check_ranges(self)
        _check_combination(self)

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-ready values."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in dataclasses.asdict(self).items()
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainConfig:
        """Inverse of `to_dict`.

        Raises:
            UserError: A field is missing, unknown or out of range.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        if set(values) != known:
            odd = sorted(set(values) ^ known)[0]
            raise UserError(f"the configuration does not fit this version: see {odd!r}")
        fields: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in values.items()
        }
        return cls(**fields)

    def differences(self, given: dict[str, Any]) -> list[str]:
        """Names of the given options whose value is not this configuration's."""
        return [name for name, value in given.items() if getattr(self, name) != value]

    @property
    def tokens_per_step(self) -> int:
        """Tokens that one optimizer step predicts."""
        return self.batch_size * self.sequence_length * self.accumulate


def _dependent_defaults(size: ModelSize, name: str, optimizer: str) -> dict[str, Any]:
    low_rank = optimizer == "qgalore"
    lr = size.lr_qgalore if low_rank else 1e-3
    return {
        "hidden_size": size.hidden_size,
        "intermediate_size": size.intermediate_size,
        "heads": size.heads,
        "layers": size.layers,
        "vocab_size": size.vocab_size,
        "sequence_length": size.sequence_length,
        "batch_size": size.batch_size,
        "steps": size.steps,
        "rank": size.rank,
        "update_proj_gap": 50 if name == "tiny" else 200,
        "lr": lr,
        "lr_rest": lr,
        "weight_bits": 8 if low_rank else None,
    }


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _check_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    if value not in choices:
        words = ", ".join("none" if choice is None else str(choice) for choice in choices)
        raise UserError(f"{_flag(name)} {value}: choose from {words}")


def _check_ranges(config: TrainConfig) -> None:
    smallest = {
        "hidden_size": 1,
        "intermediate_size": 1,
        "heads": 1,
        "layers": 1,
        "vocab_size": 257,
        "rank": 1,
        "update_proj_gap": 1,
        "queue_size": 1,
        "gamma_proj": 1.0,
        "weight_group_size": 1,
        "steps": 1,
        "batch_size": 1,
        "sequence_length": 1,
        "accumulate": 1,
        "eval_every": 0,
        "eval_batches": 1,
        "lr": 0.0,
        "lr_rest": 0.0,
        "eps": 0.0,
        "weight_decay": 0.0,
        "clip": 0.0,
        "seed": 0,
    }
    for name, bound in smallest.items():
        value = getattr(config, name)
        if not (math.isfinite(value) and value >= bound):
            raise UserError(f"{_flag(name)} {value}: must be at least {bound}")
    for name in ("warmup", "min_lr_ratio"):
        value = getattr(config, name)
        if not 0.0 <= value <= 1.0:
            raise UserError(f"{_flag(name)} {value}: must lie between 0 and 1")
    if len(config.betas) != 2 or not all(0.0 <= beta < 1.0 for beta in config.betas):
        raise UserError(f"--betas {config.betas}: takes two numbers from 0 up to below 1")
    if not -1.0 <= config.cos_threshold <= 1.0:
        raise UserError(f"--cos-threshold {config.cos_threshold}: must lie between -1 and 1")
    if config.seed >= 2**63:
        raise UserError(f"--seed {config.seed}: must be below 2**63")


def _check_combination(config: TrainConfig) -> None:
    _check_choice("state_bits", config.state_bits, (4, 8, 32))
    _check_choice("weight_bits", config.weight_bits, (8, None))
    if config.hidden_size % (2 * config.heads):
        raise UserError(
            f"--heads {config.heads}: an even number of the {config.hidden_size} hidden units "
            "must fall to each head"
        )
    largest = min(config.hidden_size, config.intermediate_size)
    if config.optimizer == "qgalore" and config.rank > largest:
        raise UserError(
            f"--rank {config.rank}: the smallest side of a projected matrix is {largest}"
        )
    if config.memory == "least" and (config.optimizer != "qgalore" or config.weight_bits is None):
        raise UserError("--memory least: takes --optimizer qgalore and --weight-bits 8")
    if config.optimizer == "adamw" and config.weight_bits is not None:
        raise UserError(
            f"--weight-bits {config.weight_bits}: takes --optimizer qgalore or adamw8bit"
        )
