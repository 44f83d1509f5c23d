"""The training run: prepare, step, evaluate, save, resume, finish."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from gradpress.train.checkpoint import clean_checkpoints, newest_checkpoint, save_checkpoint
from gradpress.train.config import TrainConfig
from gradpress.train.device import Clock, choose_device, describe, peak_bytes, reset_peak, to_device
from gradpress.train.errors import UserError, require
from gradpress.train.evaluate import evaluate, token_losses
from gradpress.train.files import write_atomically, write_json
from gradpress.train.folder import (
    RunOptions,
    clean_folder,
    create_folder,
    discard_folder,
    locked,
    read_options_for_resume,
    write_options,
)
from gradpress.train.interrupt import Interrupt
from gradpress.train.least_memory import LeastMemory, chunked_token_losses
from gradpress.train.metrics import (
    EVALUATION,
    STEP,
    MetricsWriter,
    read_metrics,
    truncate_metrics,
)
from gradpress.train.model import build_model, export_model
from gradpress.train.optimizer import (
    build_optimizer,
    quantize_weights,
    refresh_count,
    set_learning_rates,
)
from gradpress.train.report import last_evaluation, median_of, plot_losses
from gradpress.train.schedule import lr_multiplier
from gradpress.train.steps import Step, UnreadSteps, check_finite
from gradpress.train.tokens import TokenData, copy_tokens, prepare_tokens, training_batch


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        folder: Its folder.
        step: Completed steps.
        exit_code: 0 when all steps are done, else 128 plus the number of the signal.
        validation_loss: The newest one, in nats per token, or None.
    """

    folder: Path
    step: int
    exit_code: int
    validation_loss: float | None


def start_run(
    config: TrainConfig, options: RunOptions, folder: Path, data_from: Path | None = None
) -> Outcome:
    """Trains a model from its initialization in a new folder.

    Args:
        config: What to compute.
        options: How to carry it out.
        folder: A folder that does not exist yet or is empty.
        data_from: Folder of another run whose tokenizer and tokens are to be taken; None reads
            `config.text`.

    Returns:
        How it ended.

    Raises:
        UserError: An option, a path or a missing package stands in the way, or the loss diverged.
    """
    _require_packages(options)
    options = _settled(options)
    create_folder(folder, config, options)
    with locked(folder):
        try:
            if data_from is not None:
                copy_tokens(data_from, folder)
            trainer = Trainer(config, options, folder)
        except UserError:
            discard_folder(folder)
            raise
        return trainer.run()


def resume_run(
    folder: Path, config_changes: dict[str, Any], option_changes: dict[str, Any]
) -> Outcome:
    """Continues a run from its newest complete checkpoint.

    On the CPU the result is that of a run without a break, bit for bit.

    Args:
        folder: The run's folder.
        config_changes: Fields of `TrainConfig` that must agree with the stored ones.
        option_changes: Fields of `RunOptions` that replace the stored ones.

    Returns:
        How it ended.

    Raises:
        UserError: There is no run, a field differs, the device that it ran on is missing and no
            other one was named, or the loss diverged.
    """
    config, options = read_options_for_resume(folder, config_changes, option_changes)
    _require_packages(options)
    options = _settled(options)
    with locked(folder):
        write_options(folder, config, options)
        clean_folder(folder)
        clean_checkpoints(folder / "checkpoints")
        trainer = Trainer(config, options, folder)
        trainer.restore()
        return trainer.run()


class Trainer:
    """One run in one process.

    Args:
        config: What to compute.
        options: How to carry it out; `device` is that of PyTorch, chosen already.
        folder: The run's folder; its `config.json` is written already.
    """

    def __init__(self, config: TrainConfig, options: RunOptions, folder: Path) -> None:
        self.config = config
        self.options = options
        self.folder = folder
        self.step = 0
        self.data: TokenData = prepare_tokens(config, folder)
        self.device = torch.device(options.device)
        self.model = _initial_model(config).to(self.device)
        reset_peak(self.device)
        self.optimizer = build_optimizer(self.model, config)
        self._least = None
        if config.memory == "least":
            self._least = LeastMemory(self.model, self.optimizer, config)
        self._clock = Clock(self.device)
        self._unread = UnreadSteps(self.device, self._clock, config.tokens_per_step)
        self._memory_counted = False
        self._metrics_path = folder / "metrics.jsonl"

    def restore(self) -> None:
        """Takes up the newest complete checkpoint, or the start when there is none.

        Raises:
            UserError: The checkpoint was trained on other tokens, or cannot be loaded.
        """
        checkpoint = newest_checkpoint(self.folder / "checkpoints")
        if checkpoint is None:
            truncate_metrics(self._metrics_path, None)
            print("no checkpoint yet: starting at the first step", flush=True)
            return
        if checkpoint.trainer["data_digest"] != self.data.digest:
            raise UserError(f"{self.folder}: the text is not the one this run was trained on")
        checkpoint.load(self.model, self.optimizer)
        if self._least is not None:
            self._least.grad_norm = checkpoint.trainer["gradient_norm"]
        self.step = checkpoint.step
        truncate_metrics(self._metrics_path, self.step)
        print(f"resumed at step {self.step} from {checkpoint.folder}", flush=True)

    def run(self) -> Outcome:
        """Trains until the last step or a signal, and writes the results."""
        self._print_start()
        metrics = MetricsWriter(self._metrics_path)
        try:
            with Interrupt() as interrupt, self._progress_bar() as bar:
                self._steps(metrics, interrupt, bar)
        finally:
            metrics.close()
        if self.step == self.config.steps:
            self._finish()
        elif self.options.plot:
            self._plot()
        return self._outcome(interrupt.exit_code if self.step < self.config.steps else 0)

    def _steps(self, metrics: MetricsWriter, interrupt: Interrupt, bar: tqdm[Any]) -> None:
        evaluated = last_evaluation(read_metrics(self._metrics_path))
        if evaluated is None:
            evaluated = self._evaluate(metrics)
        saved = self.step
        while self.step < self.config.steps and interrupt.signal is None:
            self.train_step()
            evaluate_now = self._is_due(self.config.eval_every)
            save_now = self._is_due(self.options.save_every)
            if evaluate_now or save_now or self._unread.are_due:
                self._write_records(metrics, bar)
            if evaluate_now:
                evaluated = self._evaluate(metrics)
            if save_now:
                self._save(metrics)
                saved = self.step
        self._write_records(metrics, bar)
        if self.step == self.config.steps and evaluated["step"] != self.step:
            self._evaluate(metrics)
        if saved != self.step:
            self._save(metrics)

    def train_step(self) -> None:
        """One optimizer step: `accumulate` forward and backward passes, clipping, update.

        It is added to the unread steps; the host waits for no device.

        Raises:
            DivergedError: The loss or the gradient is not finite, where every step is read; the
                weights are as before, but for `memory="least"`, which has stepped by then.
        """
        config = self.config
        issued, start = time.perf_counter(), self._clock.mark()
        multiplier = lr_multiplier(
            self.step,
            steps=config.steps,
            warmup=config.warmup,
            min_ratio=config.min_lr_ratio,
        )
        set_learning_rates(self.optimizer, config, multiplier)
        loss_and_norm = torch.stack([self._accumulate_gradients(), self._clip_gradients()])
        if self._unread.most == 1:
            check_finite(self.step + 1, *loss_and_norm.tolist())
        update = self._clock.mark()
        self.optimizer.step()
        updated = self._clock.mark()
        if not self._memory_counted:
            self._count_memory()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        fields = {
            "step": self.step,
            "lr": config.lr * multiplier,
            "lr_rest": config.lr_rest * multiplier,
            "tokens": self.step * config.tokens_per_step,
        }
        marks = (start, update, updated, self._clock.mark())
        self._unread.add(Step(fields, loss_and_norm, issued, marks))

    def _accumulate_gradients(self) -> torch.Tensor:
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for part in range(self.config.accumulate):
            windows = training_batch(
                self.data.train,
                self.step * self.config.accumulate + part,
                seed=self.config.seed,
                batch_size=self.config.batch_size,
                sequence_length=self.config.sequence_length,
            )
            loss = self._mean_loss(to_device(windows, self.device)) / self.config.accumulate
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        return total

    def _mean_loss(self, windows: torch.Tensor) -> torch.Tensor:
        if self._least is not None:
            return chunked_token_losses(self.model, windows, "mean")
        return token_losses(self.model, windows).mean()

    def _clip_gradients(self) -> torch.Tensor:
        if self._least is not None:
            return self._least.grad_norm.to(self.device).double()
        if self.config.clip > 0:
            parameters = self.model.parameters()
            return torch.nn.utils.clip_grad_norm_(parameters, self.config.clip).double()
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        return torch.nn.utils.get_total_norm(gradients).double()

    def _write_records(self, metrics: MetricsWriter, bar: tqdm[Any]) -> None:
        for record in self._unread.read():
            metrics.write(STEP, **record)
            bar.update()
            shown = (
                f"loss {record['loss']:.3f}, {record['tokens_per_second']:.0f} tokens/s, "
                f"{record['memory_bytes'] / 1e6:.0f} MB"
            )
            if "cuda_peak_bytes" in record:
                shown += f", CUDA {record['cuda_peak_bytes'] / 1e6:.0f} MB"
            bar.set_postfix_str(shown)

    def _is_due(self, every: int) -> bool:
        return every > 0 and self.step % every == 0

    def _evaluate(self, metrics: MetricsWriter) -> dict[str, Any]:
        started = time.perf_counter()
        found = evaluate(
            self.model,
            self.data.validation,
            sequence_length=self.config.sequence_length,
            batch_size=self.config.batch_size,
            batches=self.config.eval_batches,
            losses_of=token_losses if self._least is None else chunked_token_losses,
        )
        record = {
            "step": self.step,
            "loss": found.loss,
            "perplexity": found.perplexity,
            "tokens": found.tokens,
            "windows": found.windows,
            "seconds": time.perf_counter() - started,
        }
        metrics.write(EVALUATION, **record)
        tqdm.write(
            f"step {self.step}: validation loss {found.loss:.4f} "
            f"(perplexity {found.perplexity:.2f}, {found.tokens} tokens)"
        )
        return record

    def _save(self, metrics: MetricsWriter) -> None:
        metrics.sync()
        save_checkpoint(
            self.folder / "checkpoints",
            self.model,
            self.optimizer,
            {"step": self.step, "data_digest": self.data.digest, **self._clipping()},
            self.options.keep,
        )

    def _clipping(self) -> dict[str, float]:
        """What the next step is clipped by, where gradients are gone when their norm is known."""
        return {} if self._least is None else {"gradient_norm": float(self._least.grad_norm)}

    def _count_memory(self) -> None:
        from gradpress import memory

        count = memory.count(self.model, self.optimizer)
        write_json(self.folder / "memory.json", count.to_dict())
        write_atomically(self.folder / "memory.txt", f"{count}\n".encode())
        self._memory_counted = True

    def _finish(self) -> None:
        export_model(self.model, self.config, self.folder / "tokenizer.json", self.folder / "model")
        records = read_metrics(self._metrics_path)
        evaluation = last_evaluation(records)
        peak = peak_bytes(self.device)
        write_json(
            self.folder / "summary.json",
            {
                "step": self.step,
                "device": describe(self.device),
                "validation": evaluation,
                "median_step_seconds": median_of(records, "step_seconds"),
                "median_optimizer_seconds": median_of(records, "optimizer_seconds"),
                "refreshes": refresh_count(self.optimizer),
                **({} if peak is None else {"cuda_peak_bytes": peak}),
            },
        )
        if self.options.plot:
            self._plot()

    def _plot(self) -> None:
        title = f"{self.config.size}, {self.config.optimizer}"
        plot_losses(read_metrics(self._metrics_path), self.folder / "loss.png", title)

    def _outcome(self, exit_code: int) -> Outcome:
        evaluation = last_evaluation(read_metrics(self._metrics_path))
        loss = None if evaluation is None else float(evaluation["loss"])
        return Outcome(self.folder, self.step, exit_code, loss)

    def _print_start(self) -> None:
        parameters = sum(parameter.numel() for parameter in self.model.parameters())
        train = self.data.description["train"]["tokens"]
        validation = self.data.description["validation"]["tokens"]
        print(
            f"{parameters:,} parameters, {self.config.optimizer}; "
            f"{train:,} training and {validation:,} validation tokens; "
            f"{self.config.steps} steps of {self.config.tokens_per_step:,} tokens; "
            f"on {describe(self.device)}",
            flush=True,
        )

    def _progress_bar(self) -> tqdm[Any]:
        # disable=None: no bar where the output is a file.
        return tqdm(total=self.config.steps, initial=self.step, unit="step", disable=None)


def _require_packages(options: RunOptions) -> None:
    modules = ["transformers", "tokenizers", "safetensors.torch"]
    for module in modules + (["matplotlib"] if options.plot else []):
        require(module)


def _settled(options: RunOptions) -> RunOptions:
    """Takes the threads and chooses the device, and puts down which they are."""
    device = choose_device(options.device)
    if options.threads:
        torch.set_num_threads(options.threads)
    return replace(options, threads=torch.get_num_threads(), device=str(device))


def _initial_model(config: TrainConfig) -> torch.nn.Module:
    # On the CPU: the same weights whatever the device, which never holds those before INT8.
    with torch.device("cpu"):
        model = build_model(config)
        quantize_weights(model, config)
    return model
