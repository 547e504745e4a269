"""Composing the config with Hydra, and turning what Hydra says about a user's slip into one clear message."""

import contextlib
import dataclasses
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, QuotedString
from hydra.errors import HydraException
from hydra.version import VersionBase
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from cnntrain.config.instantiate import trust_folder
from cnntrain.config.renamed_keys import renamed
from cnntrain.config.schema import Settings, conf_folder, parse
from cnntrain.config.yaml_files import check_yaml_files, yaml_files
from cnntrain.errors import UserError, suggest


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


def search_path(config_dir: Path | None) -> list[str]:
    """The override that adds a user's own folder of config groups."""
    return [f"hydra.searchpath=['file://{config_dir.resolve()}']"] if config_dir else []


def compose(name: str, overrides: Sequence[str], config_dir: Path | None = None) -> dict[str, Any]:
    """The composed config as plain values, and under `choices` the option chosen in each group.

    Args:
        name: the primary config, a file of conf/.
        overrides: as on the command line, e.g. `["model=mlp", "optimizer.lr=0.1"]`.
        config_dir: a folder with groups of the user's own.

    Raises:
        UserError: a group, an option, a key or a value is wrong; names it and suggests the near miss.
    """
    return deepcopy(_compose(name, tuple(quote_values(overrides)), config_dir, _stamps(config_dir)))


def _stamps(config_dir: Path | None) -> tuple[tuple[str, int, int], ...]:
    """What tells that a file in the user's own folder has changed."""
    files = [file for file in yaml_files(config_dir) if file.exists()] if config_dir else []
    return tuple((str(file), (about := file.stat()).st_mtime_ns, about.st_size) for file in files)


@lru_cache(maxsize=1)  # a command's config is checked before torch is imported, and composed once more after
def _compose(
    name: str, overrides: tuple[str, ...], config_dir: Path | None, stamps: tuple[tuple[str, int, int], ...]
) -> dict[str, Any]:
    if config_dir:
        check_yaml_files(config_dir)
    _check_choices(overrides, config_dir)
    with hydra_session():
        try:
            composed = hydra_compose(name, [*search_path(config_dir), *overrides], return_hydra_config=True)
            chosen = OmegaConf.to_container(composed.hydra.runtime.choices)
            with open_dict(composed):
                del composed["hydra"]
            plain = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
        except (HydraException, OmegaConfBaseException, YAMLError, RecursionError) as error:
            raise UserError(_explain(error, name, overrides, config_dir)) from error
        except (OSError, ValueError) as error:
            # Hydra and OmegaConf raise these if a file is not a mapping, or if `defaults` is not a list.
            if problem := find_malformed_file(config_dir):
                raise UserError(problem) from error
            raise
    assert isinstance(plain, dict) and isinstance(chosen, dict)
    choices = {str(group): option for group, option in chosen.items() if not str(group).startswith("hydra")}
    return {**{str(key): value for key, value in plain.items()}, "choices": choices}


def parse_overrides(overrides: Sequence[str]) -> list[Override]:
    """Hydra's own grammar, with its syntax errors turned into ours; Hydra's own keys are refused."""
    for override in overrides:
        if override.startswith("="):
            raise UserError(f"{override!r} has no key; write KEY=VALUE, as epochs=5")
    try:
        parsed = OverridesParser.create().parse_overrides(quote_values(overrides))
    except HydraException as error:
        raise UserError(_syntax(error)) from error
    except ValueError as error:  # Python refuses to parse integers of more than 4,300 digits
        longest = max(overrides, key=len)
        raise UserError(f"{longest.partition('=')[0]}: the value cannot be read: {error}") from error
    except RecursionError as error:
        deepest = max(overrides, key=lambda override: override.count("[") + override.count("{"))
        raise UserError(f"{deepest.partition('=')[0]}: is nested too deep to be read") from error
    for override in parsed:
        if re.split(r"[./@]", override.key_or_group)[0] == "hydra":
            raise UserError(
                f"{override.key_or_group}: Hydra composes the config here and does no more; a run's folder is run_dir, "
                "and what -m does is set by sweep.*"
            )
    return parsed


def quote_values(overrides: Sequence[str]) -> list[str]:
    """Quote plain-text values that Hydra's grammar cannot parse, such as `~/photos` or `fünf.csv`.

    Values with brackets, braces, parentheses, quotes or commas are left to Hydra's grammar. A leading `~` or `~user` is
    expanded to the home folder, because shells do not expand it after `=`.
    """
    return [_quote_value(override) for override in overrides]


_PLAIN_KEY = re.compile(r"[+~]{0,2}[\w./@:-]+")
_READABLE = re.compile(
    r"[A-Za-z0-9_/\\+.$%*@?|:{}\s-]*"
)  # values that Hydra's grammar accepts without quotes, and ${...}


def _quote_value(override: str) -> str:
    key, equals, value = override.partition("=")
    if not equals or not _PLAIN_KEY.fullmatch(key) or re.search(r"[,()\[\]'\"]", value) or value[:1] == "{":
        return override
    if value.startswith("~"):
        with contextlib.suppress(RuntimeError):  # no such user, or no home folder
            value = str(Path(value).expanduser())
    return (
        override if _READABLE.fullmatch(value) and value == override[len(key) + 1 :] else f"{key}='{value}'"
    )


def _check_choices(overrides: Sequence[str], config_dir: Path | None) -> None:
    """Refuse what is no name where an option is chosen: Hydra stumbles over it without saying where."""
    groups = group_options(config_dir)
    for override in parse_overrides(overrides):
        if override.key_or_group not in groups or override.is_sweep_override() or override.is_delete():
            continue
        value = override.value()
        each = value if isinstance(value, list) else [value]
        if not all(
            isinstance(name, str | QuotedString) and str(getattr(name, "text", name)) for name in each
        ):
            raise UserError(
                f"{override.key_or_group}: {override.get_value_string() or 'nothing'} is no option's name"
            )


def _syntax(error: Exception) -> str:
    override = re.search(r"Error parsing override '(.*?)'\n", str(error), re.DOTALL)
    shown = (
        override[1] if override else getattr(error, "override", None) or str(error).strip().splitlines()[0]
    )
    if element := re.match(r"([\w.]+)\[[^=]*=", shown):
        return (
            f"{shown!r}: a single list element cannot be overridden; give the whole list, {element[1]}=[...], or set "
            "it in your own YAML file (--config-dir)"
        )
    return (
        f"can't read {shown!r}\nan override is written KEY=VALUE, as epochs=20; a value with spaces or special "
        "characters needs quotes of its own inside the shell's, as \"data.root='my photos'\""
    )


def group_options(config_dir: Path | None = None) -> dict[str, list[str]]:
    """Config groups and what there is to choose from in each; read from the folders, without Hydra."""
    found: dict[str, set[str]] = {}
    for folder in filter(None, (conf_folder(), config_dir)):
        for group in sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith((".", "_"))):
            names = {p.stem for p in group.glob("*.yaml") if not p.name.startswith("_")}
            if names:
                found.setdefault(group.name, set()).update(names)
    return {group: sorted(names) for group, names in found.items()}


def suggest_setting(word: str, following: Sequence[str] = ()) -> str | None:
    """Suggest `optimizer.lr=0.1` for the words `optimizer.lr 0.1`; return None if `word` is not a config key."""
    top = re.findall(r"^(\w+):", (conf_folder() / "config.yaml").read_text(), re.MULTILINE)
    if word.partition(".")[0] not in {*top, *group_options()}:
        return None
    return f"{word}={following[0] if following else '...'}"


def _explain(error: Exception, name: str, overrides: Sequence[str], config_dir: Path | None) -> str:
    """One message for what Hydra or OmegaConf could not do."""
    text = str(error)
    if isinstance(error, RecursionError):
        return "the config is nested too deep to be read"
    if "override_grammar" in text:
        return _syntax(error)
    if "hydra.searchpath" not in text and (
        match := re.search(r"Could not (?:load|find) '([^'/]+)/([^']+)'", text)
    ):
        options = group_options(config_dir).get(match[1], [])
        hint = renamed(match[1], match[2]) or suggest(match[2], options)
        return f"{match[1]}: no such option {match[2]!r}{hint} (there is {', '.join(options)})"
    if match := re.search(r"Ambiguous value for argument '([^']+)'", text):
        return f"{match[1]}: several values; -m runs them all, [brackets] make them a list"
    if match := re.search(r"Could not override '([^']+)'", text):
        if name != "config" and match[1] in group_options(config_dir):
            return f"{match[1]}: `{name}` takes it from the checkpoint"
        if hint := renamed(_typed_key(match[1], overrides)):
            return f"{match[1]}: no such key{hint}"
        group, _, key = match[1].partition(".")
        if key and key in _base_keys(group):
            return (
                f"{match[1]}: the chosen {group} has no such key; start its file with `defaults: [_base, _self_]`, "
                "which brings the keys that every one has"
            )
        return _no_such_key(match[1], name, overrides, config_dir)
    if match := re.search(r"In '([^']*)': Could not find '([^'/]+)/([^']+)'", text):
        options = group_options(config_dir).get(match[2], [])
        hint = renamed(match[2], match[3]) or suggest(match[3], options)
        return f"{match[2]}: no such option {match[3]!r}{hint} (there is {', '.join(options)})"
    if match := re.search(r"Could not override '([^']+)'\.\nNo match in the defaults list", text):
        return f"{match[1]}: no such group{suggest(match[1], list(group_options(config_dir)))}"
    if match := re.search(r"Missing mandatory value: (\S+)", text):
        return f"{match[1]}: missing; give it as {match[1]}=..."
    if isinstance(error, YAMLError):
        return _yaml_problem(error)
    return "\n".join(line for line in text.splitlines() if line.strip())[:600]


def _typed_key(key: str, overrides: Sequence[str]) -> str:
    """Return the whole key of the override at fault: Hydra names only its part up to the first unknown name."""
    typed = [each.lstrip("+~").partition("=")[0] for each in overrides]
    return next((each for each in typed if each == key or each.startswith(f"{key}.")), key)


def _yaml_problem(error: YAMLError, file: Path | None = None) -> str:
    """Describe where a YAML file is invalid, and the likely cause."""
    mark = getattr(error, "problem_mark", None)
    where = file or getattr(mark, "name", "a config file")
    line = f":{mark.line + 1}" if mark else ""
    problem = getattr(error, "problem", None) or str(error).splitlines()[0]
    return (
        f"{where}{line}: not valid YAML ({problem}); check that this line and the line above have the same indentation "
        "(spaces only), that a space follows each `key:`, and that brackets and quotes are closed"
    )


def find_malformed_file(config_dir: Path | None) -> str | None:
    """Describe the first config file of the user that is not a mapping, or whose `defaults` is not a list."""
    for file in yaml_files(config_dir) if config_dir else []:
        try:
            content = yaml.safe_load(file.read_text("utf-8"))
        except YAMLError as error:
            return _yaml_problem(error, file)
        if content is not None and not isinstance(content, dict):
            return f"{file}: a config file must consist of `key: value` lines, got {_shortened(content)}"
        defaults = (content or {}).get("defaults", [])
        if not isinstance(defaults, list):
            return (
                f"{file}: defaults: must be a list, for example [_base, _self_]; got {_shortened(defaults)}"
            )
    return None


def _shortened(value: Any, most: int = 60) -> str:
    text = repr(value)
    return text if len(text) <= most else text[:most] + "..."


def _no_such_key(key: str, name: str, overrides: Sequence[str], config_dir: Path | None) -> str:
    """Describe an unknown key: name the options that have it, or suggest the most similar key."""
    group, _, rest = key.partition(".")
    if rest and group in (options := group_options(config_dir)):
        owners = [option for option in options[group] if rest in _option_keys(group, option, config_dir)]
        if owners:
            chosen = [each.partition("=")[2] for each in overrides if each.startswith(f"{group}=")]
            default = re.search(rf"- {group}: (\w+)", (conf_folder() / "config.yaml").read_text())
            shown = chosen[-1] if chosen else default[1] if default else "the chosen one"
            return f"{key}: {group}={shown} has no such key; {_any_of(owners)} have it"
    known = _all_keys(name, overrides, config_dir)
    ends = [each for each in known if each.endswith(f".{key}")]
    if ends:
        return f"{key}: no such key; did you mean {ends[0]!r}?"
    within = [each for each in known if each.startswith(f"{group}.")] if rest else known
    return f"{key}: no such key{suggest(key, within or known)}"


def _any_of(names: Sequence[str], most: int = 20) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _option_keys(group: str, option: str, config_dir: Path | None) -> set[str]:
    """Return the keys set in an option's own file, without those from its defaults list."""
    for folder in filter(None, (config_dir, conf_folder())):
        if (file := folder / group / f"{option}.yaml").is_file():
            try:
                content = yaml.safe_load(file.read_text("utf-8"))
            except (YAMLError, UnicodeDecodeError):
                return set()
            return {str(key) for key in content} if isinstance(content, dict) else set()
    return set()


def _base_keys(group: str) -> list[str]:
    """The keys of `_base.yaml`, which an option of the group may leave out by mistake."""
    file = conf_folder() / group / "_base.yaml"
    if not re.fullmatch(r"\w+", group) or not file.is_file():
        return []
    return [str(key) for key in OmegaConf.load(file)]


def _all_keys(name: str, overrides: Sequence[str], config_dir: Path | None) -> list[str]:
    """Every dotted key there is, given the groups that were chosen."""
    groups = group_options(config_dir)
    choices = [o for o in overrides if o.split("=")[0] in groups]
    try:
        composed = hydra_compose(name, [*search_path(config_dir), *choices])
    except (HydraException, OmegaConfBaseException):
        composed = hydra_compose(name)

    def walk(node: DictConfig, prefix: str) -> Iterator[str]:
        for key in node:
            yield f"{prefix}{key}"
            child = node._get_node(key)
            if isinstance(child, DictConfig) and not child._is_none() and not child._is_missing():
                yield from walk(child, f"{prefix}{key}.")

    return [*groups, *walk(composed, "")]


def read_settings(overrides: Sequence[str], config_dir: Path | None = None) -> Settings:
    """The checked settings of a training.

    `trusted_packages` counts only when it is given here: a config file can't trust itself. A folder given as
    `config_dir` is the user's own, so the modules in it are trusted.

    Raises:
        UserError: anything is wrong; nothing has been made yet.
    """
    settings = parse(Settings, compose("config", overrides, config_dir))
    typed = any(override.key_or_group == "trusted_packages" for override in parse_overrides(overrides))
    trusted = list(settings.trusted_packages) if typed else []
    if typed:
        trust_folder(Path.cwd())
    if config_dir:
        trusted += trust_folder(config_dir.resolve())
    return dataclasses.replace(settings, trusted_packages=trusted)
