"""The settings of one run: typed, frozen, filled from YAML files and the command line.

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
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import jsonargparse
import yaml

from train import docstrings, glue


class ConfigError(ValueError):
    """Settings that do not fit; the message is one sentence for the person who wrote them."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def _require_fields(
    section: str, config: Any, fits: Callable[[Any], bool], expected: str, *names: str
) -> None:
    """Checks numeric fields against one predicate; None stands for "not set" and always fits."""
    for name in names:
        value = getattr(config, name)
        _require(
            value is None or fits(value), f"`{section}.{name}` must be {expected}, not {value}"
        )


@dataclass(frozen=True)
class ModelConfig:
    """The pretrained model.

    Attributes:
        name: Hub id or local directory of a model with Flax code in transformers.
        revision: Branch, tag or commit on the Hub; None is the default branch.
        compute_dtype: Type of the activations; parameters of the adapters stay float32.
    """

    name: str
    revision: str | None = None
    compute_dtype: Literal["float32", "bfloat16"] = "float32"


@dataclass(frozen=True)
class DataConfig:
    """The examples: either a task by name or local files.

    Attributes:
        task: GLUE task to load from the Hub, whose official validation split is reported as the
            test split, since the official test labels are hidden; or "docstrings": which module
            of Python's standard library is a docstring of? That needs no download.
        train: Training file: .tsv/.txt (tab-separated), .csv or .jsonl, also with .gz or .xz.
        validation: Validation file; None holds out `validation_fraction` of the training split.
        test: Test file; None holds out `test_fraction` of the training split, if that is set, and
            means otherwise that no test result is reported.
        root: Directory that relative paths start from; None is the working directory.
        text: Column of the first sentence.
        text_pair: Column of the second sentence, if there is one.
        label: Column of the label.
        columns: Names of the columns of files that have no header line.
        quoting: Whether double quotes enclose fields; None means yes for .csv and no for .tsv.
        labels: Class names in the order of their indices; None takes those of the training
            split, sorted.
        regression: Whether the labels are numbers to predict instead of classes.
        validation_fraction: Part of the training split held out, stratified by class.
        test_fraction: Part of the training split held out as the test split, before validation.
        split_seed: Seed of these splits and of all random parts; kept apart from the seed of the
            run so that runs with different seeds see the same data.
        max_length: Longest sequence in tokens; longer ones are truncated and counted.
        buckets: Sequence lengths that batches are padded to.
        max_train_examples: Train on a random part of at most this many examples.
        max_eval_examples: Validate and test on random parts of at most this many examples each.
    """

    task: str | None = None
    train: str | None = None
    validation: str | None = None
    test: str | None = None
    root: str | None = None
    text: str = "text"
    text_pair: str | None = None
    label: str = "label"
    columns: tuple[str, ...] | None = None
    quoting: bool | None = None
    labels: tuple[str, ...] | None = None
    regression: bool = False
    validation_fraction: float = 0.1
    test_fraction: float | None = None
    split_seed: int = 0
    max_length: int = 128
    buckets: tuple[int, ...] = (32, 64, 128, 256, 512)
    max_train_examples: int | None = None
    max_eval_examples: int | None = None

    def __post_init__(self) -> None:
        _require(
            (self.task is None) != (self.train is None),
            "set exactly one of `data.task` (a task by name) and `data.train` (a file)",
        )
        _require(
            self.task in (None, docstrings.NAME, *glue.TASKS),
            f"`data.task` {self.task!r} is unknown; it can be {docstrings.NAME} or one of GLUE's:"
            f" {', '.join(glue.TASKS)}",
        )
        if self.task is not None:
            # The task fixes these; a value given beside it would be ignored.
            for item in dataclasses.fields(self):
                _require(
                    item.name not in _LOCAL_ONLY or getattr(self, item.name) == item.default,
                    f"`data.{item.name}` is for local files and cannot be combined with "
                    "`data.task`",
                )
        _require(
            not (self.regression and self.labels),
            "`data.labels` names classes, but `data.regression` is true; remove one of them",
        )
        for name in ("labels", "columns"):
            values = getattr(self, name) or ()
            _require(len(set(values)) == len(values), f"`data.{name}` holds a name twice")
        _require(
            self.labels is None or len(self.labels) >= 2,
            "`data.labels` must name at least two classes",
        )
        _require(
            self.test is None or self.test_fraction is None,
            "set at most one of `data.test` (a file) and `data.test_fraction` (a part of train)",
        )
        fractions = ("validation_fraction", "test_fraction")
        _require_fields("data", self, lambda v: 0 < v < 1, "between 0 and 1", *fractions)
        _require(
            len(self.buckets) > 0
            and self.buckets[0] > 0
            and list(self.buckets) == sorted(set(self.buckets)),
            f"`data.buckets` must be increasing lengths above 0, not {list(self.buckets)}",
        )
        most = ("max_train_examples", "max_eval_examples")
        _require_fields("data", self, lambda v: v >= 1, "at least 1", *most)
        _require_fields("data", self, lambda v: v >= 2, "at least 2", "max_length")
        _require_fields("data", self, lambda v: v >= 0, "at least 0", "split_seed")

    @property
    def bucket_lengths(self) -> tuple[int, ...]:
        """`buckets` clipped to `max_length`, which is always the last of them."""
        return (*(b for b in self.buckets if b < self.max_length), self.max_length)


_LOCAL_ONLY = (
    "validation",
    "test",
    "test_fraction",
    "root",
    "text",
    "text_pair",
    "label",
    "columns",
    "quoting",
    "labels",
    "regression",
)


@dataclass(frozen=True)
class OverrideConfig:
    """Another adapter for the layers that match a pattern.

    Attributes:
        pattern: Regular expression over slash-joined parameter names.
        method: Method for these layers; None keeps the one of the run.
        hyperparameters: Hyperparameters that replace those of the run, one by one.
    """

    pattern: str
    method: str | None = None
    hyperparameters: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class AdapterConfig:
    """What is trained.

    Attributes:
        method: Name of a method that circflax knows; "lamda++" for LaMDA with ranks by the layers'
            spectra; or, without adapters, "full" (all trains), "bitfit" (biases and the head) or
            "none" (the head).
        hyperparameters: Hyperparameters of the method by name.
        targets: Names of the layers to adapt, or one regular expression.
        layers: Numbers of the blocks to adapt; None is all.
        overrides: Other settings for some layers; the first match wins.
        train: Base parameters that are trained in full, besides those that the checkpoint does
            not have (the head): names that their paths contain, such as "bias".
    """

    method: str = "cdvft"
    hyperparameters: dict[str, Any] = field(default_factory=dict)
    targets: tuple[str, ...] | str = ("query", "value")
    layers: tuple[int, ...] | None = None
    overrides: tuple[OverrideConfig, ...] = ()
    train: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _require(
            all(layer >= 0 for layer in self.layers or ()),
            f"`adapter.layers` must be numbers from 0 up, not {list(self.layers or ())}",
        )


@dataclass(frozen=True)
class OptimConfig:
    """AdamW and its schedule.

    Attributes:
        epochs: Passes over the training split.
        batch_size: Examples of one update.
        eval_batch_size: Examples of one evaluation step.
        accumulation_steps: Parts that a batch is computed in, one after the other.
        learning_rate: Peak learning rate of the adapters, or of what "full" and "bitfit" train of
            the checkpoint; None is one that suits the method to begin with.
        head_learning_rate: Peak learning rate of base parameters that are trained in full; with
            the methods "full" and "bitfit", of those that the checkpoint does not have (the head).
        schedule: Shape of the learning rate after the warm-up.
        warmup: Part of all steps during which the learning rate rises from 0.
        weight_decay: Decoupled weight decay.
        clip_norm: Largest global norm of a gradient, in which an array counts with the root of
            its method's factor on the learning rate; None does not clip.
        b1: Decay of Adam's first moment.
        b2: Decay of Adam's second moment.
    """

    epochs: int = 10
    batch_size: int = 32
    eval_batch_size: int = 64
    accumulation_steps: int = 1
    learning_rate: float | None = None
    head_learning_rate: float = 1e-3
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup: float = 0.06
    weight_decay: float = 0.0
    clip_norm: float | None = 1.0
    b1: float = 0.9
    b2: float = 0.999

    def __post_init__(self) -> None:
        counts = ("epochs", "batch_size", "eval_batch_size", "accumulation_steps")
        _require_fields("optim", self, lambda v: v >= 1, "at least 1", *counts)
        rates = ("learning_rate", "head_learning_rate", "weight_decay")
        _require_fields("optim", self, lambda v: 0 <= v < float("inf"), "0 or more", *rates)
        _require_fields("optim", self, lambda v: v > 0, "above 0", "clip_norm")
        _require_fields(
            "optim", self, lambda v: 0 <= v < 1, "at least 0 and below 1", "warmup", "b1", "b2"
        )
        _require(
            self.batch_size % self.accumulation_steps == 0,
            f"`optim.batch_size` {self.batch_size} must be a multiple of "
            f"`optim.accumulation_steps` {self.accumulation_steps}",
        )


@dataclass(frozen=True)
class RunConfig:
    """One run on disk.

    Attributes:
        output: Directory of the run.
        seed: Seed of initial values, the order of examples and dropout.
        checkpoint_every: Steps between checkpoints; None saves one after each epoch.
        metric: Validation metric that chooses the best epoch; None is the usual one of the task.
        resume: Whether to go on from a checkpoint found in `output`.
    """

    output: str = "runs/default"
    seed: int = 0
    checkpoint_every: int | None = None
    metric: str | None = None
    resume: bool = True

    def __post_init__(self) -> None:
        _require_fields("run", self, lambda v: v >= 1, "at least 1", "checkpoint_every")
        _require_fields("run", self, lambda v: v >= 0, "at least 0", "seed")


@dataclass(frozen=True)
class Config:
    """All settings of a run, by section."""

    model: ModelConfig
    data: DataConfig
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunConfig = field(default_factory=RunConfig)


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
        raise ConfigError(_sentence(str(error), kind)) from None
    namespace.pop("config")
    try:
        return kind(**vars(parser.instantiate(namespace)))
    except ConfigError as error:
        raise _name_entry(parser, namespace, error) from None


def save(config: Any, path: str | Path) -> None:
    """Writes settings as YAML that `load` reads back as equal ones.

    Args:
        config: The settings.
        path: File to write.
    """
    text = yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, allow_unicode=True)
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


def _check_arguments(argv: Sequence[str], kind: type) -> None:
    """Refuses unknown keys before parsing, where the nearest right key can still be named."""
    keys = _keys(kind)
    known = [*keys, "config", "help", "print_config"]
    dictionaries = tuple(f"{k}." for k, hint in keys.items() if typing.get_origin(hint) is dict)
    expects_file = False
    for argument in argv:
        if expects_file:
            _check_file(argument, kind)
        option, separator, value = argument.partition("=")
        expects_file = argument == "--config"
        if option == "--config" and separator:
            _check_file(value, kind)
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


def _sentence(message: str, kind: type) -> str:
    """Turns the parser's message of several lines into one sentence with the key and its type."""
    keys = re.findall(r'key "([^"]+)"', message)
    name, hint = _locate(keys, kind)
    required = re.search(r"arguments are required: (.*)", message)
    if required:
        return f"`{name}{'.' if name else ''}{required[1]}` must be set"
    unexpected = re.search(r"unrecognized arguments: (.*)", message)
    if unexpected:
        return f"unexpected argument `{unexpected[1]}`; settings are given as --section.field value"
    group = re.search(r"Group '([^']+)' does not accept option '([^']+)'", message)
    option = re.search(r"Option '([^']+)' is not accepted", message)
    if group or option:
        name, section = _locate([*keys, group[1]] if group else keys, kind)
        known = [f"{name}.{field}" for field in typing.get_type_hints(section)]
        return str(_unknown(f"{name}.{group[2] if group else option[1]}", known, kind))
    value = re.findall(r"(?:Got|Given) value: (.*)", message)
    if not keys or not value:
        return " ".join(message.split())
    return f"`{name}` must be {_describe(hint)}, not {value[-1]!r}"


def _locate(keys: Iterable[str], kind: type) -> tuple[str, Any]:
    """The name and the type of what nested keys lead to, with a star for any entry's name."""
    name, hint = [], kind
    for key in keys:
        for part in key.split("."):
            hint = typing.get_type_hints(hint)[part]
            name.append(part)
        if typing.get_origin(hint) is dict and _holds_sections(hint):
            name.append("*")
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
