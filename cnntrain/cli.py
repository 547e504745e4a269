"""The command word, its options and exit codes. Torch is not imported here: help and completion answer at once."""

import ast
import contextlib
import dataclasses
import importlib
import io
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cnntrain.config.command_text import mask_passwords
from cnntrain.config.invocation import DEFAULT_COMMAND, Invocation
from cnntrain.errors import (
    CnntrainError,
    ElsewhereError,
    MachineError,
    StoppedError,
    UserError,
    explain_machine,
    is_from_user_code,
    suggest,
)
from cnntrain.io.streams import flush_or_discard, lenient, printable
from cnntrain.memory import keep_freed_memory

SWEEPING = ("train", "overfit", "inspect")  # what takes several values


def commands() -> dict[str, str]:
    """Command words and their one-line meaning: the files of cnntrain/commands/ and their docstrings."""
    folder = Path(__file__).parent / "commands"
    words = {}
    for path in sorted(folder.glob("[a-z]*.py")):
        words[path.stem.replace("_", "-")] = (
            ast.get_docstring(ast.parse(path.read_text())) or ""
        ).splitlines()[0]
    return words


def parse_arguments(argv: Sequence[str]) -> Invocation:
    """Split what was typed.

    Raises:
        UserError: an unknown flag or command word, with the near miss.
    """
    known = commands()
    words: list[str] = []
    overrides: list[str] = []
    flags: dict[str, Any] = {}
    rest = list(argv)
    while rest:
        argument = rest.pop(0)
        if argument in ("-h", "--help"):
            flags["help"] = True
        elif argument in ("-m", "--multirun"):
            flags["multirun"] = True
        elif argument == "--cfg":
            flags["print_config"] = True
        elif argument.startswith("--config-dir"):
            value = argument.partition("=")[2] or (rest.pop(0) if rest else "")
            flags["config_dir"] = Path(value)
            if not value or not Path(value).is_dir():
                raise UserError(f"--config-dir: no folder {value!r}")
        elif argument.startswith("-") and "=" not in argument:
            options = ["--help", "--multirun", "--cfg", "--config-dir", "--version", "-m", "-h"]
            from cnntrain.config.compose import suggest_setting

            if setting := suggest_setting(argument.lstrip("-"), rest):
                raise UserError(f"unknown option {argument}; write settings as KEY=VALUE, as {setting}")
            raise UserError(f"unknown option {argument}{suggest(argument, options)}")
        elif "=" in argument or argument.startswith(("~", "+")):
            overrides.append(argument)
        else:
            words.append(argument)
    command = words.pop(0) if words else DEFAULT_COMMAND
    if command in known:
        return Invocation(command, tuple(words), tuple(overrides), argv=tuple(argv), **flags)
    from cnntrain.config.compose import suggest_setting

    if command not in known and (setting := suggest_setting(command, words)):
        raise UserError(f"{command!r} is not a command; write settings as KEY=VALUE, as {setting}")
    if command not in known:
        hint = suggest(command, list(known)) or f"; there is {', '.join(known)}"
        raise UserError(f"unknown command {command!r}{hint}")
    return Invocation(command, tuple(words), tuple(overrides), argv=tuple(argv), **flags)


def check_early(command: str, overrides: Sequence[str], config_dir: Path | None) -> None:
    """Validate the settings before the command's module imports torch, which takes seconds.

    Raises:
        UserError: see `read_settings`.
    """
    from cnntrain.config.compose import conf_folder
    from cnntrain.sweep.search_space import add_swept_keys

    if command != "train" and any(override.lstrip("+").startswith("launch.") for override in overrides):
        raise UserError(f"launch.devices: `{command}` uses one process; leave this key out")
    has_config = (conf_folder() / f"{command}.yaml").exists()
    if command == "check":  # with a checkpoint, the config comes from there; `checks=` is not a config key
        has_config = any(override.startswith("checkpoint=") for override in overrides)
        overrides = [override for override in overrides if not override.startswith("checks=")]
    if not has_config:
        add_swept_keys(overrides, config_dir)


def composed_text(command: str, overrides: Sequence[str], config_dir: Path | None = None) -> str:
    """Return the composed config of a command as YAML (`--cfg`)."""
    import yaml

    from cnntrain.config.command_text import without_passwords
    from cnntrain.config.compose import compose, conf_folder, read_settings
    from cnntrain.sweep.search_space import expand_grid

    if command == "check":
        overrides = [override for override in overrides if not override.startswith("checks=")]
        command = "evaluate" if any(each.startswith("checkpoint=") for each in overrides) else command
    elif command == "inspect":
        overrides = expand_grid(overrides, config_dir)[0]
    if (conf_folder() / f"{command}.yaml").exists():
        composed = compose(command, overrides, config_dir)
        composed.pop("choices")
    else:
        composed = without_passwords(dataclasses.asdict(read_settings(overrides, config_dir)))
    return yaml.safe_dump(composed, sort_keys=False)


def help_text(invocation: Invocation) -> str:
    """What there is to choose from, from the config folders and the command files."""
    from cnntrain.config.compose import conf_folder, group_options

    word = invocation.command
    source = Path(__file__).parent / "commands" / f"{word.replace('-', '_')}.py"
    lines = [ast.get_docstring(ast.parse(source.read_text())) or "", ""]
    primary = conf_folder() / f"{word}.yaml"
    if word == DEFAULT_COMMAND:
        lines = [
            "cnntrain trains convolutional networks from YAML, and tells whether to trust the result.",
            "",
        ]
        lines += [
            "usage: cnntrain [COMMAND] [-m] [--config-dir DIR] [--cfg] [KEY=VALUE ...]",
            "",
            "commands:",
        ]
        lines += [f"  {name:<12} {meaning}" for name, meaning in commands().items()]
        lines += [
            "",
            "`train` may be left out; `cnntrain COMMAND --help` says more about one. -m sweeps over listed",
            "values, --cfg prints the composed config, --config-dir adds config groups of your own.",
            "",
        ]
    if primary.exists():
        lines += ["keys:", *_indent(primary.read_text())]
    else:
        lines.append("choices:")
        for group, options in group_options(invocation.config_dir).items():
            lines += _wrap(f"  {group + '=':<11}", options)
        lines += ["", "keys (and those of each choice: cnntrain --cfg model=... prints them):"]
        lines += _indent((conf_folder() / "config.yaml").read_text().split("\n\n", 1)[1])
    return "\n".join(lines)


def _wrap(head: str, names: Sequence[str]) -> list[str]:
    import textwrap

    return textwrap.wrap(", ".join(names), 108, initial_indent=head, subsequent_indent=" " * len(head))


def _indent(text: str) -> list[str]:
    return ["  " + line for line in text.rstrip().splitlines()]


def complete(line: str) -> list[str]:
    """Words that may follow what has been typed, for the shell: command words, groups, options, keys."""
    from hydra.plugins.completion_plugin import DefaultCompletionPlugin

    from cnntrain.config.compose import conf_folder, hydra_session

    typed = line.split()[1:]
    known = commands()
    word = "" if line.endswith(" ") or not typed else typed[-1]
    before = typed if not word else typed[:-1]
    command = next((w for w in before if w in known), None)
    primary = command if command and (conf_folder() / f"{command}.yaml").exists() else "config"
    found = [w for w in known if command is None and w.startswith(word) and "=" not in word]
    arguments = [w for w in before if w != command and w not in ("-m", "--multirun")]
    with hydra_session() as hydra:
        plugin = DefaultCompletionPlugin(hydra.config_loader())
        found += plugin._query(primary, " ".join([*arguments, word]))
    hidden = {f"{w}." for w in known if w in found}  # `overfit` the command before `overfit.` the keys
    return [w for w in found if w not in hidden and not w.startswith(("hydra", "_")) and "=_" not in w]


COMPLETION_SCRIPT = """_cnntrain() {
    COMPREPLY=($(compgen -o nospace -W "$(COMP_LINE="${COMP_LINE:0:COMP_POINT}" cnntrain --complete)" -- \
"${COMP_WORDS[COMP_CWORD]}"))
}
COMP_WORDBREAKS=${COMP_WORDBREAKS//=}
complete -o nospace -o default -F _cnntrain cnntrain"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return the exit code.

    0: success. 1: a check failed. 2: invalid input. 3: training diverged. 4: machine error. 129, 130, 143: stopped by a
    signal.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if {"WORLD_SIZE", "SLURM_PROCID"} & os.environ.keys():  # DDP warns about find_unused_parameters
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # read when torch is imported
    if isinstance(sys.stdout, io.TextIOWrapper):  # names of files may hold bytes that are no text
        sys.stdout.reconfigure(errors="backslashreplace")
    code = _run(arguments)
    lost = flush_or_discard(sys.stdout)
    if lost and not isinstance(lost, BrokenPipeError) and code == 0:
        print(f"error: standard output: {lost.strerror}", file=lenient(sys.stderr))
        code = MachineError.exit_code
    flush_or_discard(sys.stderr)
    return code


def _run(arguments: list[str]) -> int:
    """Run the command, print errors, and return the exit code for the kind of error."""
    try:
        return _dispatch(arguments)
    except CnntrainError as error:
        if os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        if not isinstance(error, ElsewhereError):
            prefix = "" if isinstance(error, StoppedError) else "error: "
            print(printable(mask_passwords(f"{prefix}{error}")), file=lenient(sys.stderr))
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=lenient(sys.stderr))
        return 128 + signal.SIGINT
    except SystemExit as ended:
        if isinstance(
            ended.__context__, BrokenPipeError
        ):  # rich's way when its reader has gone: `cnntrain | head -1`
            return 0
        print("error: user code raised SystemExit", file=lenient(sys.stderr))
        return 1
    except (OSError, RuntimeError, MemoryError) as error:
        if not isinstance(error, BrokenPipeError):
            cause = None if is_from_user_code(error) else explain_machine(error)
            if cause is None or os.environ.get("HYDRA_FULL_ERROR") == "1":
                raise
            print(printable(mask_passwords(f"error: {cause}")), file=lenient(sys.stderr))
            return MachineError.exit_code
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _dispatch(arguments: list[str]) -> int:
    if arguments[:1] == ["--complete"]:
        print("\n".join(complete(os.environ.get("COMP_LINE", "cnntrain "))))
        return 0
    if arguments[:1] == ["--completion"]:
        print(COMPLETION_SCRIPT)
        return 0
    if arguments[:1] == ["--version"]:
        from importlib.metadata import version

        print(f"cnntrain {version('cnntrain')}")
        return 0
    invocation = parse_arguments(arguments)
    if invocation.help:
        print(help_text(invocation))
        return 0
    module = invocation.command.replace("-", "_")
    if invocation.print_config and invocation.command == "clean":
        raise UserError("clean: has no config")
    if invocation.multirun and invocation.command not in SWEEPING:
        raise UserError(f"{invocation.command}: no -m; give each key one value")
    asked = invocation.command, invocation.overrides, invocation.config_dir
    check_early(*asked)
    if invocation.print_config and not invocation.multirun:
        print(composed_text(*asked), end="")
        return 0
    keep_freed_memory()
    return importlib.import_module(f"cnntrain.commands.{module}").run(invocation)


if __name__ == "__main__":
    sys.exit(main())
