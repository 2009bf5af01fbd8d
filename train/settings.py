"""Reading settings from YAML files and the command line, and writing them.

`load` reads ``--config FILE`` (several may be given, later ones win) and ``--section.field value``
for every field; `save` writes the resolved settings so that loading them again gives an equal
`Config`. Whatever does not fit is refused with a `ConfigError` of one sentence.
"""

import argparse
import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, Literal, TypeVar

import jsonargparse
import yaml

from train.config import Config, ConfigError, ExamplesConfig

Settings = TypeVar("Settings")


def load(argv: Sequence[str], kind: type[Settings] = Config, **about: str) -> Settings:
    """Reads settings from command-line arguments.

    Args:
        argv: Arguments without the program's name, for instance
            ``["--config", "run.yaml", "--optim.epochs", "3"]``; later ones win.
        kind: The dataclass to fill.
        **about: What ``--help`` says of the program, as `argparse.ArgumentParser` takes it.

    Returns:
        The checked settings.

    Raises:
        ConfigError: If a file cannot be read, a key is unknown or given twice in a file, a value
            is missing, has the wrong type or is out of range.
        SystemExit: After ``--help`` or ``--print_config``, with code 0.
    """
    _check_arguments(argv, kind)
    parser = _parser(kind, about)
    try:
        namespace = parser.parse_args(list(argv))
    except jsonargparse.ArgumentError as error:
        message = str(error)
        raise ConfigError(_sentence(message, kind, _entry(parser, argv, kind, message))) from None
    namespace.pop("config")
    try:
        return kind(**vars(parser.instantiate(namespace)))
    except ConfigError as error:
        raise _name_entry(parser, namespace, error) from None


def load_with_options(
    argv: Sequence[str],
    options: argparse.ArgumentParser,
    kind: type[Settings] = Config,
    **about: str,
) -> tuple[argparse.Namespace, Settings]:
    """Reads settings beside options of one call, which are no settings.

    Args:
        argv: Command-line arguments.
        options: Knows the options; made with ``exit_on_error=False``.
        kind: As for `load`.
        **about: As for `load`; the options' help is added.

    Returns:
        The options and the settings.

    Raises:
        ConfigError: As `load`.
    """
    try:
        known, rest = options.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise ConfigError(str(error)) from None
    each = (f"{action.option_strings[0]}: {action.help}" for action in options._actions)
    return known, load(rest, kind, epilog="besides: " + "; ".join(each), **about)


def save(config: Config, path: str | Path) -> None:
    """Writes settings as YAML that `load` reads back as equal ones, without unused sections.

    Args:
        config: The settings.
        path: File to write.
    """
    sections = {item.name: getattr(config, item.name) for item in dataclasses.fields(config)}
    used = {
        name: dataclasses.asdict(section)
        for name, section in sections.items()
        if not isinstance(section, ExamplesConfig) or section.given
    }
    text = yaml.safe_dump(used, sort_keys=False, allow_unicode=True)
    Path(path).write_text(text, encoding="utf-8")


def _load_value(text: str) -> Any:
    """Reads YAML, in which a text like "#2 String" would be a comment and come to nothing."""
    value = _load_yaml(text)
    return text if value is None and text.lstrip().startswith("#") else value


_load_yaml = jsonargparse.get_loader("yaml")
jsonargparse.set_loader("yaml", _load_value, exceptions=(yaml.YAMLError,))


def _parser(kind: type, about: Mapping[str, str]) -> jsonargparse.ArgumentParser:
    standard = {
        "prog": "python -m train",
        "description": "Fine-tune a Flax model with circulant adapters.",
    }
    parser = jsonargparse.ArgumentParser(
        **{**standard, **about}, exit_on_error=False, allow_abbrev=False
    )
    parser.add_argument("--config", action="config", help="YAML file with settings")
    parser.add_class_arguments(kind)
    for name, hint in typing.get_type_hints(kind).items():
        # The parser's own --section FILE would be a second way to give files: not offered.
        if dataclasses.is_dataclass(hint):
            parser._option_string_actions[f"--{name}"].help = argparse.SUPPRESS
    return parser


def _name_entry(
    parser: jsonargparse.ArgumentParser, namespace: jsonargparse.Namespace, error: ConfigError
) -> ConfigError:
    """Adds which entry of a mapping of sections does not fit, which a section cannot know."""
    mappings = {key: value for key, value in vars(namespace).items() if isinstance(value, dict)}

    def fits(**kept: Any) -> bool:
        partial = {**vars(namespace), **{key: {} for key in mappings}, **kept}
        try:
            parser.instantiate(jsonargparse.Namespace(partial))
        except ConfigError:
            return False
        return True

    if fits():
        for key, entries in mappings.items():
            for name, entry in entries.items():
                if not fits(**{key: {name: entry}}):
                    return ConfigError(f"`{key}.{name}`: {error}")
    return error


def _entry(
    parser: jsonargparse.ArgumentParser, argv: Sequence[str], kind: type, message: str
) -> str:
    """The name of the entry that a message is about, which leaves it out; a star if no file's."""
    for path in _files(argv):
        sections = _load_yaml(Path(path).read_text(encoding="utf-8"))
        for key, hint in typing.get_type_hints(kind).items():
            mapping = typing.get_origin(hint) is dict and _holds_sections(hint)
            for name, value in sections.get(key, {}).items() if mapping else ():
                try:
                    parser.parse_object({key: {name: value}})
                except jsonargparse.ArgumentError as error:
                    if str(error) == message:
                        return str(name)
    return "*"


def _files(argv: Sequence[str]) -> list[str]:
    """The YAML files that are given."""
    apart = (a.split("=", 1) if a.startswith("--config=") else [a] for a in argv)
    return [path for option, path in pairwise(chain(*apart)) if option == "--config"]


def _check_arguments(argv: Sequence[str], kind: type) -> None:
    """Refuses unknown keys before parsing, where the nearest right key can still be named."""
    keys = _keys(kind)
    known = [*keys, "config", "help", "print_config"]
    dictionaries = tuple(f"{k}." for k, hint in keys.items() if typing.get_origin(hint) is dict)
    for path in _files(argv):
        _check_file(path, kind)
    for argument in argv:
        option = argument.partition("=")[0]
        if option.startswith("--"):
            key = option[2:].removesuffix("+")
            # A dictionary's own keys follow its name: --adapter.hyperparameters.block_size 128.
            if key not in known and not key.startswith(dictionaries):
                raise _unknown(key, known, kind)


def _check_file(path: str, kind: type) -> None:
    """Refuses unknown and repeated keys of a YAML file, which parsers drop or merge silently."""
    try:
        root = yaml.compose(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the config file `{path}`: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"the config file `{path}` is not UTF-8 text") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"`{path}` is not YAML: {' '.join(str(error).split())}") from None
    _check_node(root, kind, "", path, kind)


def _check_node(node: yaml.Node | None, hint: Any, prefix: str, path: str, kind: type) -> None:
    """Checks a mapping: a section, or entries by name if the hint is a dictionary of sections."""
    if not isinstance(node, yaml.MappingNode):
        name = f"`{prefix.removesuffix('.')}` in `{path}`" if prefix else f"`{path}`"
        raise ConfigError(f"{name} must be a mapping of keys to values")
    hints = typing.get_type_hints(hint) if dataclasses.is_dataclass(hint) else None
    seen = set()
    for key_node, value in node.value:
        name, key = key_node.value, f"{prefix}{key_node.value}"
        where = f" in `{path}`, line {key_node.start_mark.line + 1}"
        if hints is not None and name not in hints:
            candidates = _keys(kind) if hint in _sections(kind) else [prefix + h for h in hints]
            raise _unknown(key, candidates, kind, where)
        if name in seen:
            raise ConfigError(f"key `{key}` is given twice{where}")
        seen.add(name)
        inner = typing.get_args(hint)[1] if hints is None else hints[name]
        if _holds_sections(inner):
            _check_node(value, inner, f"{key}.", path, kind)
        elif isinstance(value, yaml.SequenceNode):
            for item in filter(dataclasses.is_dataclass, typing.get_args(inner)):
                for index, element in enumerate(value.value):
                    _check_node(element, item, f"{key}[{index}].", path, kind)


def _holds_sections(hint: Any) -> bool:
    """Whether a type is a section, or a dictionary of sections by name."""
    entries = typing.get_args(hint)[1:] if typing.get_origin(hint) is dict else (hint,)
    return all(map(dataclasses.is_dataclass, entries))


def _unknown(key: str, known: Iterable[str], kind: type, where: str = "") -> ConfigError:
    """Names the key nearest to an unknown one, or else all keys beside it."""
    section, _, name = key.rpartition(".")
    fields = {k.rpartition(".")[2]: k for k in known}
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.8)
    near += [fields[match] for match in difflib.get_close_matches(name, fields, n=1)]
    beside = [k for k in known if section and k.rpartition(".")[0] == section]
    if near:
        hint = f"did you mean `{near[0]}`?"
    elif beside:
        hint = f"known keys are {', '.join(beside)}"
    else:
        hint = f"the sections are {', '.join(typing.get_type_hints(kind))}"
    return ConfigError(f"unknown key `{key}`{where}; {hint}")


def _sections(kind: type) -> dict[type, str]:
    """The types of the sections and the prefixes of their keys; that of the whole is empty."""
    hints = typing.get_type_hints(kind)
    sections = {hint: f"{n}." for n, hint in hints.items() if dataclasses.is_dataclass(hint)}
    return {kind: ""} | sections


def _keys(kind: type) -> dict[str, Any]:
    """The type of every dotted key."""
    sections = _sections(kind)
    return {
        f"{prefix}{name}": hint
        for section, prefix in sections.items()
        for name, hint in typing.get_type_hints(section).items()
        if not dataclasses.is_dataclass(hint)
    }


def _sentence(message: str, kind: type, entry: str) -> str:
    """Turns the parser's message of several lines into one sentence with the key and its type."""
    keys = re.findall(r'key "([^"]+)"', message)
    name, hint = _locate(keys, kind, entry)
    required = re.search(r"arguments are required: (.*)", message)
    if required:
        return f"`{name}{'.' if name else ''}{required[1]}` must be set"
    unexpected = re.search(r"unrecognized arguments: (.*)", message)
    if unexpected:
        return f"unexpected argument `{unexpected[1]}`; settings are given as --section.field value"
    group = re.search(r"Group '([^']+)' does not accept option '([^']+)'", message)
    option = re.search(r"Option '([^']+)' is not accepted", message)
    if group or option:
        name, section = _locate([*keys, group[1]] if group else keys, kind, entry)
        known = [f"{name}.{field}" for field in typing.get_type_hints(section)]
        return str(_unknown(f"{name}.{group[2] if group else option[1]}", known, kind))
    value = re.findall(r"(?:Got|Given) value: (.*)", message)
    if not keys or not value:
        return " ".join(message.split())
    return f"`{name}` must be {_describe(hint)}, not {value[-1]!r}"


def _locate(keys: Iterable[str], kind: type, entry: str) -> tuple[str, Any]:
    """The name and the type of what nested keys lead to, given the name of a mapping's entry."""
    name, hint = [], kind
    for key in keys:
        for part in key.split("."):
            hint = typing.get_type_hints(hint)[part]
            name.append(part)
        if typing.get_origin(hint) is dict and _holds_sections(hint):
            name.append(entry)
        sections = [item for item in typing.get_args(hint) if dataclasses.is_dataclass(item)]
        hint = sections[0] if sections else hint
    return ".".join(name), hint


def _describe(hint: Any) -> str:
    """A type in plain words."""
    words = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
    words |= {types.NoneType: "null"}
    arguments = typing.get_args(hint)
    origin = typing.get_origin(hint)
    if origin is Literal:
        return "one of " + ", ".join(arguments)
    if origin is types.UnionType:
        return " or ".join(map(_describe, arguments))
    if origin is tuple:
        return f"a list ({_describe(arguments[0])} each)"
    if origin is dict or dataclasses.is_dataclass(hint):
        return "a mapping of keys to values"
    return words[hint]
