"""Adapter files: the small tree as safetensors, and the plan and its base as JSON beside it."""

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from jax.experimental import multihost_utils

from circflax.methods import make_method
from circflax.tree._adapters import adapters_by_target, check_plan
from circflax.tree._layout import Layout
from circflax.tree._paths import Path, Tree, flatten, join, split, unflatten
from circflax.tree._plan import Plan, Target

ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
_FORMAT = "circflax-1"


@dataclass(frozen=True)
class AdapterFile:
    """What an adapter file holds.

    Attributes:
        adapters: the small tree, numpy arrays.
        plan: the layers and leaves that it belongs to.
        base: the base model's name, as it was given to `save_adapters`.
        fingerprint: a digest of the base's adapted kernels.
    """

    adapters: dict[str, Any]
    plan: Plan
    base: str | None
    fingerprint: str

    def check_base(self, params: Tree) -> None:
        """Raises a ValueError unless the adapters were trained on this base model.

        Args:
            params: the base model's parameters, in whatever dtype.

        Raises:
            ValueError: if a layer is missing, has another shape, or has other weights.
        """
        leaves = flatten(params)
        self.check_kernels(leaves, leaves.__getitem__)

    def check_kernels(
        self, shapes: Mapping[Path, Any], kernel: Callable[[Path], jax.Array]
    ) -> None:
        """`check_base` for a base model that is not in memory.

        Args:
            shapes: the base model's leaves, or descriptions of them, by their paths.
            kernel: reads the leaf of a path.

        Raises:
            ValueError: as `check_base`.
        """
        check_plan(self.plan, shapes)
        if _fingerprint(self.plan, kernel) != self.fingerprint:
            name = f" ({self.base})" if self.base else ""
            raise ValueError(
                f"the adapters were trained on another base model{name}: the shapes agree with"
                " these parameters, but the weights of the adapted layers do not."
            )


def _fingerprint(plan: Plan, read: Callable[[Path], jax.Array]) -> str:
    """A digest of the layers that a plan adapts: their names, shapes and some of their weights.

    Weights count in bfloat16, so that a base loaded in another dtype is still recognised.
    """
    digest = hashlib.sha256()
    for target in sorted(plan.targets, key=lambda target: target.path):
        kernel = read(target.kernel_path)
        digest.update(f"{join(target.kernel_path)} {target.shape};".encode())
        # The first row tells two models apart, and costs no pass over gigabytes.
        row = kernel[(0,) * (kernel.ndim - 1)]
        digest.update(_whole(jnp.asarray(row).astype(jnp.bfloat16)).tobytes())
    return digest.hexdigest()


def save_adapters(
    directory: str | os.PathLike[str],
    adapters: Tree,
    plan: Plan,
    params: Tree,
    *,
    base: str | None = None,
) -> None:
    """Writes a small tree as `adapter_model.safetensors` and `adapter_config.json`.

    Of several processes, all must call it, since each may hold parts of the arrays; the first
    writes.

    Args:
        directory: where to; made if missing, and an adapter already there is replaced.
        adapters: the small tree.
        plan: as it was made for the base.
        params: the base model's parameters, whose adapted kernels the file will recognise.
        base: the base model's name or directory, for the reader's sake.

    Raises:
        ValueError: if the small tree and the plan do not fit, or an array is not finite.
        OSError: if the files cannot be written; an adapter already there then stays as it was.
    """
    adapters_by_target(adapters, plan)
    arrays = {join(path): _whole(leaf) for path, leaf in flatten(adapters).items()}
    for name, array in arrays.items():
        if not np.isfinite(array).all():
            raise ValueError(f"the adapters' array {name!r} is not finite, so nothing was saved.")
    weights = safetensors.numpy.save(arrays, metadata={"format": _FORMAT})
    config = {
        "format": _FORMAT,
        "weights_sha256": hashlib.sha256(weights).hexdigest(),
        "base": base,
        "fingerprint": _fingerprint(plan, flatten(params).__getitem__),
        "trained": [join(path) for path in plan.trained],
        "targets": [_target_to_json(target) for target in plan.targets],
    }
    if jax.process_index() > 0:
        return
    directory = FilePath(directory)
    directory.mkdir(parents=True, exist_ok=True)
    text = json.dumps(config, indent=1).encode()
    _replace({directory / ADAPTER_WEIGHTS: weights, directory / ADAPTER_CONFIG: text})


def _whole(array: Any) -> np.ndarray:
    """An array with the parts of it that other processes hold."""
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        return multihost_utils.process_allgather(array, tiled=True)
    return np.asarray(array)


def is_adapter(directory: str | os.PathLike[str]) -> bool:
    """Whether a directory holds an adapter, or a part of one."""
    return any((FilePath(directory) / name).exists() for name in (ADAPTER_WEIGHTS, ADAPTER_CONFIG))


def load_adapters(directory: str | os.PathLike[str]) -> AdapterFile:
    """Reads what `save_adapters` wrote.

    Args:
        directory: where the two files are.

    Returns:
        The small tree with its plan; `AdapterFile.check_base` compares it with a base model.

    Raises:
        FileNotFoundError: if one of the files is missing.
        ValueError: if a file is truncated or corrupt, or the two do not belong together.
    """
    directory = FilePath(directory)
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        if not (directory / name).is_file():
            raise FileNotFoundError(f"{directory} holds no adapter: {name} is missing.")
    try:
        config = json.loads((directory / ADAPTER_CONFIG).read_text())
        if (found := config.get("format")) != _FORMAT:
            raise ValueError(
                f"{directory / ADAPTER_CONFIG} has format {found!r}; this version reads"
                f" {_FORMAT!r}."
            )
        targets = tuple(_target_from_json(target) for target in config["targets"])
        plan = Plan(targets, tuple(split(name) for name in config["trained"]))
        base, digest = config["base"], config["fingerprint"]
        weights_digest = config["weights_sha256"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{directory / ADAPTER_CONFIG} is not a whole adapter configuration ({error!r})."
        ) from error
    weights = (directory / ADAPTER_WEIGHTS).read_bytes()
    try:
        arrays = safetensors.numpy.load(weights)
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"{directory / ADAPTER_WEIGHTS} is truncated or corrupt ({error})."
        ) from error
    if hashlib.sha256(weights).hexdigest() != weights_digest:
        raise ValueError(
            f"{directory / ADAPTER_WEIGHTS} is not what {ADAPTER_CONFIG} beside it was written for:"
            " a file was changed or replaced."
        )
    adapters = unflatten({split(name): array for name, array in arrays.items()})
    adapters_by_target(adapters, plan)
    if missing := [join(path) for path in plan.trained if join(path) not in arrays]:
        raise ValueError(f"{directory / ADAPTER_WEIGHTS} lacks {missing[0]!r}, trained in full.")
    return AdapterFile(adapters, plan, base, digest)


def check_room(directory: FilePath, needed: int, what: str) -> None:
    """Raises an OSError if a disk has no room, before a library reports that in pages.

    Args:
        directory: where to write; it exists.
        needed: bytes.
        what: what is to be written, for the message.
    """
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise OSError(
            f"{what} needs {needed:,} bytes in `{directory}`, and {free:,} are left on the disk."
        )


def _target_to_json(target: Target) -> dict[str, Any]:
    return {
        "module": target.name,
        "parameter": target.parameter,
        "layout": target.layout.to_json(),
        "shape": target.shape,
        "bias": target.bias,
        "method": target.method.name,
        "hyperparameters": dataclasses.asdict(target.method),
    }


def _target_from_json(data: dict[str, Any]) -> Target:
    return Target(
        path=split(data["module"]),
        parameter=data["parameter"],
        layout=Layout.from_json(data["layout"]),
        shape=tuple(data["shape"]),
        bias=data.get("bias"),
        method=make_method(data["method"], data["hyperparameters"]),
    )


def _replace(contents: dict[FilePath, bytes]) -> None:
    """Writes files whole or not at all, and none of them if the disk has no room for one."""
    temporary = {path: path.with_name(f".{path.name}.tmp") for path in contents}
    try:
        for path, content in contents.items():
            temporary[path].write_bytes(content)
        for path in contents:
            os.replace(temporary[path], path)
    finally:
        for path in temporary.values():
            path.unlink(missing_ok=True)
