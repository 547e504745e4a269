"""Compose the config with Hydra, and explain Hydra's errors in terms of the user's keys and files."""

import contextlib
import dataclasses
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, QuotedString
from hydra.errors import HydraException
from hydra.version import VersionBase
from omegaconf import OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from cnntrain.config.instantiate import trust_folder
from cnntrain.config.reference import group_options, no_such_option, option_keys, suggest_key
from cnntrain.config.renamed_keys import renamed
from cnntrain.config.schema import Settings, check_groups, conf_folder, parse, shortened
from cnntrain.config.yaml_files import check_yaml_files, yaml_files
from cnntrain.errors import UserError


@contextmanager
def hydra_session() -> Iterator[GlobalHydra]:
    """Initialize Hydra with the shipped configs; restore Hydra's previous state at the end."""
    hydra, version_base = GlobalHydra.instance().hydra, VersionBase.instance().version_base
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(conf_folder()), version_base="1.3", job_name="cnntrain"):
            yield GlobalHydra.instance()
    finally:
        GlobalHydra.instance().hydra = hydra
        VersionBase.instance().version_base = version_base


T = TypeVar("T")


def read_settings(overrides: Sequence[str], config_dir: Path | None = None) -> Settings:
    """Compose and validate the settings of a training. Raises `UserError` if one is invalid."""
    settings = read_command_settings(Settings, "config", overrides, config_dir)
    check_groups(settings)
    return settings


def read_command_settings(cls: type[T], name: str, overrides: Sequence[str], config_dir: Path | None = None) -> T:
    """Compose and validate the settings of a command from its config, conf/`name`.yaml.

    `trusted_packages` only has an effect among `overrides`: a config file cannot trust itself. The modules in
    `config_dir` are trusted, because that folder is named on the command line.
    """
    composed = compose(name, overrides, config_dir)
    if cls is not Settings:
        composed.pop("choices")
    settings: Any = parse(cls, composed)
    if "trusted_packages" in composed:
        trusted = []
        if any(override.key_or_group == "trusted_packages" for override in parse_overrides(overrides)):
            trust_folder(Path.cwd())
            trusted += settings.trusted_packages
        if config_dir:
            trusted += trust_folder(config_dir.resolve())
        settings = dataclasses.replace(settings, trusted_packages=trusted)
    return settings


def compose(name: str, overrides: Sequence[str], config_dir: Path | None = None) -> dict[str, Any]:
    """Compose a config to plain Python values; the key `choices` holds the option chosen in each group.

    Args:
        name: primary config, a file of conf/.
        overrides: as on the command line, for example `["model=mlp", "optimizer.lr=0.1"]`.
        config_dir: the user's folder of config groups.
    """
    files = [file for file in yaml_files(config_dir) if file.exists()] if config_dir else []
    versions = tuple((str(file), (stat := file.stat()).st_mtime_ns, stat.st_size) for file in files)
    return deepcopy(_compose(name, tuple(map(quote_value, overrides)), config_dir, versions))


@lru_cache(maxsize=1)  # the command line composes before it imports torch, and the command composes again
def _compose(name: str, overrides: tuple[str, ...], config_dir: Path | None, versions: object) -> dict[str, Any]:
    if config_dir:
        check_yaml_files(config_dir)
    _check_option_names(overrides, config_dir)
    with hydra_session():
        try:
            search_path = [f"hydra.searchpath=['file://{config_dir.resolve()}']"] if config_dir else []
            composed = hydra_compose(name, [*search_path, *overrides], return_hydra_config=True)
            chosen = OmegaConf.to_container(composed.hydra.runtime.choices)
            with open_dict(composed):
                del composed["hydra"]
            config = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
        except (HydraException, OmegaConfBaseException, YAMLError, RecursionError) as error:
            raise UserError(_explain(error, name, overrides, config_dir)) from error
        except (OSError, ValueError) as error:
            # Hydra and OmegaConf raise these if a file is not a mapping, or if `defaults` is not a list.
            if problem := _malformed_file(config_dir):
                raise UserError(problem) from error
            raise
    assert isinstance(config, dict) and isinstance(chosen, dict)
    choices = {str(group): option for group, option in chosen.items() if not str(group).startswith("hydra")}
    return {**{str(key): value for key, value in config.items()}, "choices": choices}


def parse_overrides(overrides: Sequence[str]) -> list[Override]:
    """Parse overrides with Hydra's grammar. Raises `UserError` for a syntax error or a key of Hydra's own."""
    for override in overrides:
        if override.startswith("="):
            raise UserError(f"{override!r} has no key; write KEY=VALUE, for example epochs=5")
    try:
        parsed = OverridesParser.create().parse_overrides([quote_value(override) for override in overrides])
    except HydraException as error:
        raise UserError(_syntax_error(error)) from error
    except ValueError as error:  # Python refuses to parse integers of more than 4,300 digits
        longest = max(overrides, key=len)
        raise UserError(f"{longest.partition('=')[0]}: the value cannot be parsed: {error}") from error
    except RecursionError as error:
        deepest = max(overrides, key=lambda override: override.count("[") + override.count("{"))
        raise UserError(f"{deepest.partition('=')[0]}: the value is nested too deeply") from error
    for override in parsed:
        if re.split(r"[./@]", override.key_or_group)[0] == "hydra":
            raise UserError(
                f"{override.key_or_group}: Hydra only composes the config, so its own keys have no effect; set the "
                "run folder with run_dir, and a sweep (-m) with sweep.*"
            )
    return parsed


_PLAIN_KEY = re.compile(r"[+~]{0,2}[\w./@:-]+")
# Values that Hydra's grammar accepts without quotes, and ${...}.
_UNQUOTED = re.compile(r"[A-Za-z0-9_/\\+.$%*@?|:{}\s-]*")


def quote_value(override: str) -> str:
    """Quote a text value that Hydra's grammar cannot parse, such as `~/photos` or `fünf.csv`.

    Values with brackets, braces, parentheses, quotes or commas are left to Hydra's grammar. A leading `~` or `~user` is
    expanded to the home folder, because shells do not expand it after `=`.
    """
    key, equals, value = override.partition("=")
    if not equals or not _PLAIN_KEY.fullmatch(key) or re.search(r"[,()\[\]'\"]", value) or value[:1] == "{":
        return override
    expanded = value
    if value.startswith("~"):
        with contextlib.suppress(RuntimeError):  # no such user, or no home folder
            expanded = str(Path(value).expanduser())
    return override if _UNQUOTED.fullmatch(value) and expanded == value else f"{key}='{expanded}'"


def _check_option_names(overrides: Sequence[str], config_dir: Path | None) -> None:
    """Reject an option that is not a name, such as `model=3`: Hydra's own error does not say where it is."""
    groups = group_options(config_dir)
    for override in parse_overrides(overrides):
        if override.key_or_group not in groups or override.is_sweep_override() or override.is_delete():
            continue
        value = override.value()
        for name in value if isinstance(value, list) else [value]:
            if not isinstance(name, str | QuotedString) or not str(getattr(name, "text", name)):
                shown = override.get_value_string() or "an empty value"
                raise UserError(f"{override.key_or_group}: {shown} is not the name of an option")


def _syntax_error(error: Exception) -> str:
    override = re.search(r"Error parsing override '(.*?)'\n", str(error), re.DOTALL)
    text = override[1] if override else getattr(error, "override", None) or str(error).strip().splitlines()[0]
    if element := re.match(r"([\w.]+)\[[^=]*=", text):
        return (
            f"{text!r}: a single list element cannot be overridden; give the whole list, {element[1]}=[...], or set "
            "it in your own YAML file (--config-dir)"
        )
    return (
        f"can't parse {text!r}\nan override is written KEY=VALUE, for example epochs=20; a value with spaces or "
        "special characters needs its own quotes inside the shell's, for example \"data.root='my photos'\""
    )


def _explain(error: Exception, name: str, overrides: Sequence[str], config_dir: Path | None) -> str:
    """Turn an error of Hydra or OmegaConf into one message."""
    text = str(error)
    if isinstance(error, RecursionError):
        return "the config is nested too deeply"
    if "override_grammar" in text:
        return _syntax_error(error)
    # Without "In '...':", the message may be about Hydra's search path.
    prefix = "In '[^']*': " if "hydra.searchpath" in text else ""
    if match := re.search(prefix + r"Could not (?:load|find) '([^'/]+)/([^']+)'", text):
        return no_such_option(match[1], match[2], config_dir)
    if match := re.search(r"Ambiguous value for argument '([^']+)'", text):
        return f"{match[1]}: several values; -m runs each of them, [brackets] make them one list"
    if match := re.search(r"Could not override '([^']+)'", text):
        return _no_such_key(match[1], name, overrides, config_dir)
    if match := re.search(r"Missing mandatory value: (\S+)", text):
        return f"{match[1]}: missing; give it as {match[1]}=..."
    if isinstance(error, YAMLError):
        return _yaml_error(error)
    return "\n".join(line for line in text.splitlines() if line.strip())[:600]


def _no_such_key(key: str, name: str, overrides: Sequence[str], config_dir: Path | None) -> str:
    """Describe an unknown key: name the options that have it, or suggest the most similar key."""
    options = group_options(config_dir)
    if name != "config" and key in options:
        return f"{key}: `{name}` takes it from the checkpoint"
    typed = [override.lstrip("+~").partition("=")[0] for override in overrides]
    if hint := renamed(next((each for each in typed if each.startswith(f"{key}.")), key)):
        return f"{key}: no such key{hint}"
    group = key.partition(".")[0]
    keys_by_option = {option: option_keys(group, option, config_dir) for option in options.get(group, ())}
    owners = [option for option, keys in keys_by_option.items() if any(each.key == key for each in keys)]
    if owners:
        default = re.search(rf"- {group}: (\w+)", (conf_folder() / "config.yaml").read_text())
        chosen = [default[1] if default else "the chosen one"]
        chosen += [each.partition("=")[2] for each in overrides if each.startswith(f"{group}=")]
        more = f" and {len(owners) - 20} more" if len(owners) > 20 else ""
        return f"{key}: {group}={chosen[-1]} has no such key; {', '.join(owners[:20])}{more} have it"
    return f"{key}: no such key{suggest_key(key, config_dir, name)}"


def _yaml_error(error: YAMLError, file: Path | None = None) -> str:
    """Describe where a YAML file is invalid, and the likely cause."""
    mark = getattr(error, "problem_mark", None)
    where = file or getattr(mark, "name", "a config file")
    line = f":{mark.line + 1}" if mark else ""
    problem = getattr(error, "problem", None) or str(error).splitlines()[0]
    return (
        f"{where}{line}: not valid YAML ({problem}); check that this line and the line above have the same indentation "
        "(spaces only), that a space follows each `key:`, and that brackets and quotes are closed"
    )


def _malformed_file(config_dir: Path | None) -> str | None:
    """Describe the first config file of the user that is not a mapping, or whose `defaults` is not a list."""
    for file in yaml_files(config_dir) if config_dir else []:
        try:
            content = yaml.safe_load(file.read_text("utf-8"))
        except YAMLError as error:
            return _yaml_error(error, file)
        if content is not None and not isinstance(content, dict):
            return f"{file}: a config file must consist of `key: value` lines, got {shortened(content)}"
        defaults = (content or {}).get("defaults", [])
        if not isinstance(defaults, list):
            return f"{file}: defaults: must be a list, for example [flip, _self_]; got {shortened(defaults)}"
    return None
