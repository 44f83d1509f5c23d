"""The LLaMA that is trained, and its export."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from gradpress.train.config import TrainConfig
from gradpress.train.errors import require
from gradpress.train.files import whole_folder
from gradpress.train.tokenizer import END_OF_TEXT_ID, as_transformers


def build_model(config: TrainConfig) -> torch.nn.Module:
    """A freshly initialized `LlamaForCausalLM` (untied embeddings, SwiGLU, RMSNorm eps 1e-6).

    The weights are a function of `config.seed`; torch's own random state is left as it was.
    Under `torch.device("meta")` only shapes are made.

    Args:
        config: The run.

    Returns:
        The model in training mode; no weight is quantized yet.

    Raises:
        UserError: `transformers` is not installed.
    """
    transformers = require("transformers")
    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed, which seeds CUDA's generators too, and for good.
        torch.default_generator.manual_seed(config.seed)
        model = transformers.LlamaForCausalLM(model_config(config))
    model.set_attn_implementation(_causal_attention())
    model.to(getattr(torch, config.dtype))
    model.train()
    return model  # type: ignore[no-any-return]


def _causal_attention() -> str:
    """Names PyTorch's causal attention so that transformers makes no mask for it.

    For names it knows, it looks in every forward pass whether sequences were packed, and makes the
    host wait for the device to see that they were not.
    """
    modeling = require("transformers.modeling_utils")
    name = "gradpress_causal"
    modeling.AttentionInterface.register(name, modeling.ALL_ATTENTION_FUNCTIONS["sdpa"])
    return name


def model_config(config: TrainConfig) -> Any:
    """The `LlamaConfig` of a run.

    Raises:
        UserError: `transformers` is not installed.
    """
    return require("transformers").LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_attention_heads=config.heads,
        num_key_value_heads=config.heads,
        num_hidden_layers=config.layers,
        max_position_embeddings=max(1024, config.sequence_length),
        hidden_act="silu",
        rms_norm_eps=1e-6,
        initializer_range=0.02,
        tie_word_embeddings=False,
        attention_dropout=0.0,
        use_cache=False,
        bos_token_id=END_OF_TEXT_ID,
        eos_token_id=END_OF_TEXT_ID,
        pad_token_id=None,
    )


def export_model(model: torch.nn.Module, config: TrainConfig, tokenizer: Path, to: Path) -> None:
    """Writes a dense model and its tokenizer in transformers' own layout, all or nothing.

    `LlamaForCausalLM.from_pretrained(to)` and `AutoTokenizer.from_pretrained(to)` read it.

    Args:
        model: A trained model; quantized weights are written dequantized, and stay as they are.
        config: Its run.
        tokenizer: The run's `tokenizer.json`.
        to: Folder to write; an older export there is replaced.
    """
    transformers = require("transformers")
    dtype = getattr(torch, config.dtype)
    settings = model_config(config)
    settings.use_cache = True
    with torch.device("meta"):
        dense = transformers.LlamaForCausalLM(settings)
    dense.to(dtype)
    with whole_folder(to) as folder, _without_progress_bar(transformers.utils.logging):
        dense.save_pretrained(folder, state_dict=dense_state_dict(model))
        as_transformers(tokenizer).save_pretrained(folder)


@contextlib.contextmanager
def _without_progress_bar(logging: Any) -> Iterator[None]:
    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()


def dense_state_dict(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The parameters as plain tensors of their own type on the host, quantized ones dequantized."""
    from gradpress.nn import QuantizedWeight

    # Dequantized after the move: a device that holds the codes may have no room for the floats.
    on_host = {name: value.cpu() for name, value in model.state_dict().items()}
    return {
        name: value.dequantize() if isinstance(value, QuantizedWeight) else value
        for name, value in on_host.items()
    }
