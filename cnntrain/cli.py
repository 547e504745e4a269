"""The command line: arguments, help, shell completion and exit codes. Torch is not imported here: help is fast."""

import argparse
import ast
import contextlib
import dataclasses
import importlib
import io
import os
import re
import signal
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from cnntrain.config.command_line import DEFAULT_COMMAND, Invocation, mask_passwords
from cnntrain.errors import (
    CnntrainError,
    MachineError,
    PeerFailedError,
    StoppedError,
    UserError,
    explain_machine,
    is_from_user_code,
    suggest,
)
from cnntrain.io.streams import escape_control_characters, flush_or_discard, lenient
from cnntrain.memory import keep_freed_memory

MULTIRUN_COMMANDS = ("train", "overfit", "inspect")  # accept keys with several values
COMMANDS_WITH_WORDS = ("check", "clean", "compare", "help")  # read arguments that are not KEY=VALUE
WITHOUT_CONFIG = ("clean", "help")
COMMANDS_FOLDER = Path(__file__).parent / "commands"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def options_parser() -> argparse.ArgumentParser:
    """Return a parser of the options; command words and overrides are left to `parse_arguments`."""
    parser = _Parser(
        prog="cnntrain", usage="cnntrain [COMMAND] [options] [KEY=VALUE ...]", add_help=False, allow_abbrev=False
    )
    add = parser.add_argument
    add("-h", "--help", action="store_true", help="print this help, that of COMMAND, or the keys of GROUP=OPTION")
    add("-m", "--multirun", action="store_true", help="run all combinations of keys with several values")
    add("--cfg", action="store_true", dest="print_config", help="print the composed config and exit")
    add("--config-dir", metavar="DIR", help="folder with your own config groups and Python modules")
    add("--version", action="store_true", help="print the version")
    add("--completion", action="store_true", help="print a completion script for bash: eval it in ~/.bashrc")
    add("--complete", action="store_true", help=argparse.SUPPRESS)
    return parser


def commands() -> dict[str, str]:
    """Return the command words with their one-line descriptions: the docstrings of the files in cnntrain/commands/."""
    files = sorted(COMMANDS_FOLDER.glob("[a-z]*.py"))
    return {path.stem.replace("_", "-"): _docstring(path).splitlines()[0] for path in files}


def _docstring(path: Path) -> str:
    return ast.get_docstring(ast.parse(path.read_text("utf-8"))) or ""


def parse_arguments(argv: Sequence[str]) -> Invocation:
    """Parse the command line. Raises `UserError` for an unknown option or command."""
    parser = options_parser()
    options, rest = parser.parse_known_args(list(argv))
    words: list[str] = []
    overrides: list[str] = []
    for position, argument in enumerate(rest):
        if argument.startswith("-"):
            raise _unknown_option(parser, argument, rest[position + 1 :])
        is_override = "=" in argument or argument.startswith(("~", "+"))
        (overrides if is_override else words).append(argument)
    if options.config_dir is not None and not Path(options.config_dir).is_dir():
        raise UserError(f"--config-dir: no folder {options.config_dir!r}")
    command = words.pop(0) if words else DEFAULT_COMMAND
    if command not in (known := commands()):
        raise _unknown_command(command, words, list(known))
    return Invocation(
        command,
        tuple(words),
        tuple(overrides),
        config_dir=Path(options.config_dir) if options.config_dir else None,
        multirun=options.multirun,
        help=options.help,
        print_config=options.print_config,
        argv=tuple(argv),
    )


def _unknown_option(parser: argparse.ArgumentParser, option: str, following: Sequence[str]) -> UserError:
    from cnntrain.config.reference import suggest_setting

    if setting := suggest_setting(option.lstrip("-").partition("=")[0], following):
        return UserError(f"unknown option {option}; write settings as KEY=VALUE, for example {setting}")
    known = re.findall(r"(?<!\S)--?[a-z][a-z-]*", parser.format_help())
    return UserError(f"unknown option {option}{suggest(option, known)}")


def _unknown_command(command: str, following: Sequence[str], known: list[str]) -> UserError:
    from cnntrain.config.reference import suggest_setting

    if setting := suggest_setting(command, following):
        return UserError(f"{command!r} is not a command; write settings as KEY=VALUE, for example {setting}")
    hint = suggest(command, known) or f"; the commands are {', '.join(known)}"
    return UserError(f"unknown command {command!r}{hint}")


def _config_of(command: str, overrides: Sequence[str] = ()) -> tuple[str, list[str]]:
    """Return the name of a command's primary config, and the overrides that belong to it."""
    from cnntrain.config.schema import conf_folder

    if command == "check":  # `checks=` is not a config key; with a checkpoint, the settings are those of `evaluate`
        command = "evaluate" if any(each.startswith("checkpoint=") for each in overrides) else command
        overrides = [each for each in overrides if not each.startswith("checks=")]
    return command if (conf_folder() / f"{command}.yaml").exists() else "config", list(overrides)


def check_early(command: str, overrides: Sequence[str], config_dir: Path | None) -> None:
    """Validate the settings before the command's module imports torch, which takes seconds."""
    from cnntrain.sweep.search_space import add_swept_keys

    if command != "train" and any(override.lstrip("+").startswith("launch.") for override in overrides):
        raise UserError(f"launch: `{command}` uses one process; leave out the launch.* keys")
    name, overrides = _config_of(command, overrides)
    if name == "config":
        add_swept_keys(overrides, config_dir)  # only for its errors


def composed_text(command: str, overrides: Sequence[str], config_dir: Path | None = None) -> str:
    """Return the composed config of a command as YAML (`--cfg`)."""
    import yaml

    from cnntrain.config.command_line import without_passwords
    from cnntrain.config.compose import compose, read_settings
    from cnntrain.sweep.search_space import expand_grid

    name, overrides = _config_of(command, overrides)
    if name == "config":
        overrides = expand_grid(overrides, config_dir)[0] if command == "inspect" else overrides
        composed = without_passwords(dataclasses.asdict(read_settings(overrides, config_dir)))
    else:
        composed = compose(name, overrides, config_dir)
        composed.pop("choices")
    return yaml.safe_dump(composed, sort_keys=False)


def help_text(invocation: Invocation) -> str:
    """Return the help of a command, or the reference of the options that the overrides choose."""
    from cnntrain.config.reference import describe, group_options
    from cnntrain.config.schema import conf_folder

    options = group_options(invocation.config_dir)
    if chosen := [each for each in invocation.overrides if each.partition("=")[0] in options]:
        return "\n\n".join(describe(each, invocation.config_dir) for each in chosen)
    command = invocation.command
    if command == DEFAULT_COMMAND:
        parts = [options_parser().format_help().rstrip(), _command_table()]
    else:
        parts = [_docstring(COMMANDS_FOLDER / f"{command.replace('-', '_')}.py")]
    name, _ = _config_of(command)
    keys = (conf_folder() / f"{name}.yaml").read_text("utf-8").rstrip()
    if name != "config":
        parts.append("keys:\n" + textwrap.indent(keys, "  "))
    elif command not in WITHOUT_CONFIG:
        groups = ["choices (`cnntrain help GROUP` describes them):"]
        for group, names in options.items():
            head = f"  {group + '=':<11}"
            groups += textwrap.wrap(", ".join(names), 108, initial_indent=head, subsequent_indent=" " * len(head))
        title = "keys (`cnntrain help GROUP=OPTION` prints those of an option):"
        parts += ["\n".join(groups), title + "\n" + textwrap.indent(keys.split("\n\n", 1)[1], "  ")]
    return "\n\n".join(parts)


def _command_table() -> str:
    lines = [f"  {name:<12} {meaning}" for name, meaning in commands().items()]
    notes = "`train` is the default command. `cnntrain COMMAND --help` describes a command, `cnntrain help KEY` a key."
    return "\n".join(["commands:", *lines, "", notes])


def complete(line: str) -> list[str]:
    """Return the completions of the last word of a command line: commands, groups, options and keys."""
    from hydra.plugins.completion_plugin import DefaultCompletionPlugin

    from cnntrain.config.compose import hydra_session

    typed = line.split()[1:]
    words = commands()
    word = "" if line.endswith(" ") or not typed else typed[-1]
    before = typed if not word else typed[:-1]
    command = next((w for w in before if w in words), None)
    primary = _config_of(command)[0] if command else "config"
    matches = [w for w in words if command is None and w.startswith(word) and "=" not in word]
    arguments = [w for w in before if w != command and w not in ("-m", "--multirun")]
    with hydra_session() as hydra:
        plugin = DefaultCompletionPlugin(hydra.config_loader())
        matches += plugin._query(primary, " ".join([*arguments, word]))
    hidden = {f"{w}." for w in words if w in matches}  # `overfit` the command before `overfit.` the keys
    return [w for w in matches if w not in hidden and not w.startswith(("hydra", "_")) and "=_" not in w]


COMPLETION_SCRIPT = """_cnntrain() {
    COMPREPLY=($(compgen -o nospace -W "$(COMP_LINE="${COMP_LINE:0:COMP_POINT}" cnntrain --complete)" -- \
"${COMP_WORDS[COMP_CWORD]}"))
}
COMP_WORDBREAKS=${COMP_WORDBREAKS//=}
complete -o nospace -o default -F _cnntrain cnntrain"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return the exit code.

    0: success. 1: a check, an expectation or a run of a sweep failed. 2: invalid input. 3: training diverged.
    4: machine error. 129, 130, 143: stopped by a signal.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if {"WORLD_SIZE", "SLURM_PROCID"} & os.environ.keys():  # DDP warns about find_unused_parameters
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # read when torch is imported
    if isinstance(sys.stdout, io.TextIOWrapper):  # file names may contain bytes that are not text
        sys.stdout.reconfigure(errors="backslashreplace")
    code = _run(arguments)
    lost = flush_or_discard(sys.stdout)
    if lost and not isinstance(lost, BrokenPipeError) and code == 0:
        _print_error(f"error: standard output: {lost.strerror}")
        code = MachineError.exit_code
    flush_or_discard(sys.stderr)
    return code


def _run(arguments: list[str]) -> int:
    """Run the command, print errors, and return the exit code for the kind of error."""
    show_traceback = os.environ.get("HYDRA_FULL_ERROR") == "1"
    try:
        return _dispatch(arguments)
    except CnntrainError as error:
        if show_traceback:
            raise
        if not isinstance(error, PeerFailedError):
            _print_error(str(error) if isinstance(error, StoppedError) else f"error: {error}")
        return error.exit_code
    except KeyboardInterrupt:
        _print_error("interrupted")
        return 128 + signal.SIGINT
    except SystemExit as ended:
        # rich raises it if the reader of the output has ended, as in `cnntrain | head -1`
        if isinstance(ended.__context__, BrokenPipeError):
            return 0
        _print_error("error: user code raised SystemExit")
        return 1
    except BrokenPipeError:
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (OSError, RuntimeError, MemoryError) as error:
        cause = None if is_from_user_code(error) else explain_machine(error)
        if cause is None or show_traceback:
            raise
        _print_error(f"error: {cause}")
        return MachineError.exit_code


def _print_error(text: str) -> None:
    print(escape_control_characters(mask_passwords(text)), file=lenient(sys.stderr))


def _dispatch(arguments: list[str]) -> int:
    if answer := _answer(arguments):
        print(answer)
        return 0
    invocation = parse_arguments(arguments)
    command, words, overrides = invocation.command, invocation.words, invocation.overrides
    if command == "help" and not invocation.help and not overrides and (not words or words[0] in commands()):
        command = words[0] if words else DEFAULT_COMMAND
        invocation = dataclasses.replace(invocation, command=command, help=True)
    if invocation.help:
        print(help_text(invocation))
        return 0
    if invocation.print_config and command in WITHOUT_CONFIG:
        raise UserError(f"{command}: has no config")
    if invocation.multirun and command not in MULTIRUN_COMMANDS:
        raise UserError(f"{command}: -m is not supported; give each key one value")
    if words and command not in COMMANDS_WITH_WORDS:
        from cnntrain.config.reference import suggest_setting

        usual = "model=resnet18" if _config_of(command)[0] == "config" else "checkpoint=PATH"
        example = suggest_setting(words[0], words[1:]) or usual
        raise UserError(f"{command}: {words[0]!r} is not an override; write KEY=VALUE, for example {example}")
    if command not in WITHOUT_CONFIG:
        check_early(command, overrides, invocation.config_dir)
    if invocation.print_config and not (invocation.multirun and command in ("train", "overfit")):
        print(composed_text(command, overrides, invocation.config_dir), end="")
        return 0
    keep_freed_memory()
    return importlib.import_module(f"cnntrain.commands.{command.replace('-', '_')}").run(invocation)


def _answer(arguments: list[str]) -> str:
    """Return the output of the options that run no command, or an empty string."""
    if "--complete" in arguments:
        return "\n".join(complete(os.environ.get("COMP_LINE", "cnntrain "))) or "\n"
    if "--completion" in arguments:
        return COMPLETION_SCRIPT
    if "--version" in arguments:
        from importlib.metadata import version

        return f"cnntrain {version('cnntrain')}"
    return ""


if __name__ == "__main__":
    sys.exit(main())
