"""`gradpress ...` on the command line."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from gradpress.train.config import TrainConfig
from gradpress.train.errors import DivergedError, UserError
from gradpress.train.folder import RunOptions

_DEMO_OPTIONS = ("text", "steps", "eval_every", "seed", "threads", "device")


class _Parser(argparse.ArgumentParser):
    """Reports a wrong command line in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        arguments: Words after the program's name; None takes them from the process.

    Returns:
        Exit code: 0 done, 1 the training diverged or the system refused, 2 a wrong request, 130
        interrupted.
    """
    parser = _parser()
    given = vars(parser.parse_args(arguments))
    command = given.pop("command")
    try:
        return _COMMANDS[command](given)
    except DivergedError as error:
        return _fail(command, error, 1)
    except UserError as error:
        return _fail(command, error, 2)
    except OSError as error:
        return _fail(command, error, 1)
    except KeyboardInterrupt:
        print(f"gradpress {command}: interrupted", file=sys.stderr)
        return 130


def _fail(command: str, error: Exception, code: int) -> int:
    message = " ".join(str(error).split())
    print(f"gradpress {command}: error: {message}", file=sys.stderr)
    return code


def _train(given: dict[str, Any]) -> int:
    from gradpress.train.loop import resume_run, start_run

    resume = given.pop("resume")
    out = given.pop("out", None)
    config_given, options_given = _divide(given)
    if out is None:
        size, rule = config_given.get("size", "tiny"), config_given.get("optimizer", "adamw")
        out = f"runs/{size}-{rule}"
    folder = Path(out)
    if resume:
        outcome = resume_run(folder, config_given, options_given)
    else:
        config = TrainConfig.create(**config_given)
        outcome = start_run(config, RunOptions(**options_given), folder)
    if outcome.exit_code:
        print(
            f"stopped after step {outcome.step}; continue with: "
            f"gradpress train --resume --out {folder}"
        )
    else:
        print(f"done: {outcome.step} steps, validation loss {outcome.validation_loss:.4f}")
        print(f"model, metrics and checkpoints: {folder}")
    return outcome.exit_code


def _demo(given: dict[str, Any]) -> int:
    from gradpress.train.demo import run_demo

    folder = Path(given.pop("out"))
    config, options = _divide(given)
    return run_demo(folder, **options, **config)


def _env(given: dict[str, Any]) -> int:
    from gradpress.environment import report

    print(report())
    return 0


_COMMANDS: dict[str, Callable[[dict[str, Any]], int]] = {
    "train": _train,
    "demo": _demo,
    "env": _env,
}


def _divide(given: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    names = {field.name for field in dataclasses.fields(RunOptions)}
    config = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in given.items()
        if name not in names
    }
    return config, {name: value for name, value in given.items() if name in names}


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="gradpress", description="Memory-efficient training and compression.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    train = commands.add_parser(
        "train",
        help="pre-train a LLaMA on text",
        description="Pre-trains a LLaMA on text. Ctrl-C writes a checkpoint; --resume continues, "
        "on the CPU bit for bit.",
        argument_default=argparse.SUPPRESS,
    )
    train.add_argument("--out", metavar="FOLDER", help="run folder (runs/SIZE-OPTIMIZER)")
    train.add_argument(
        "--resume",
        action="store_true",
        default=False,
        help="continue the run in --out from its newest checkpoint, with its own options",
    )
    for field in _run_fields():
        _add_option(train, field)
    _add_demo(commands)
    commands.add_parser("env", help="report versions, processor and devices")
    return parser


def _add_demo(commands: Any) -> None:
    demo = commands.add_parser(
        "demo",
        help="AdamW and Q-GaLore side by side on real text, in a few minutes",
        argument_default=argparse.SUPPRESS,
    )
    demo.add_argument("--out", default="runs/demo", metavar="FOLDER", help="(default: runs/demo)")
    for field in _run_fields():
        if field.name in _DEMO_OPTIONS:
            _add_option(demo, field)


def _run_fields() -> tuple[dataclasses.Field[Any], ...]:
    return (*dataclasses.fields(TrainConfig), *dataclasses.fields(RunOptions))


def _add_option(parser: argparse.ArgumentParser, field: dataclasses.Field[Any]) -> None:
    """Offers a field of a configuration; an option that is not given stays out of the result."""
    flag = "--" + field.name.replace("_", "-")
    shown = field.metadata.get("shown", field.default)
    if isinstance(shown, bool):
        parser.add_argument(
            flag,
            action=argparse.BooleanOptionalAction,
            help=f"{field.metadata['help']} (default: {'yes' if shown else 'no'})",
        )
        return
    if isinstance(shown, tuple):
        shown = " ".join(map(str, shown))
    parser.add_argument(
        flag,
        type=field.metadata["parse"],
        choices=field.metadata.get("choices"),
        nargs=field.metadata.get("nargs"),
        metavar=None if "choices" in field.metadata else field.metadata.get("metavar", "X"),
        help=f"{field.metadata['help']} (default: {shown})",
    )
