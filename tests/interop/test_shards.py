"""Loading onto several devices: the same values, read where they are needed and once."""

import os
import shutil
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from transformers import LlamaConfig

import circflax as cf
from circflax.interop import CheckpointError, load_adapted, load_model, outline_model
from circflax.interop._checkpoint import initialise
from circflax.interop._names import Placement, name_leaves
from circflax.interop._shards import place_leaves
from circflax.interop._tensors import SAFETENSORS, Tensor, write_safetensors
from tests.architectures import architecture
from tests.interop.devices import SHARDS, Counted
from tests.interop.test_adapted import adapted

oracle = pytest.importorskip("tests.interop.oracle", exc_type=ImportError)

HEAD = "sequence-classification"


def new_head(checkpoint: Any, directory: Path) -> dict[str, Any]:
    return {"source": checkpoint("bert"), "head": HEAD, "new_head": True}


def conv1d_in_files(checkpoint: Any, directory: Path) -> dict[str, Any]:
    entry = architecture("gpt2")
    oracle.save(oracle.torch_model(entry), directory, max_shard_size="40KB")
    assert not (directory / SAFETENSORS).exists()
    return {"source": directory, "head": entry.head}


def tied_head(checkpoint: Any, directory: Path) -> dict[str, Any]:
    entry = architecture("llama")
    config = entry.config()
    config.tie_word_embeddings = True
    oracle.save(oracle.torch_model(replace(entry, config=lambda: config)), directory)
    return {"source": directory, "head": entry.head}


def msgpack(checkpoint: Any, directory: Path) -> dict[str, Any]:
    model, params, _ = load_model(checkpoint("bert"), HEAD)
    model.save_pretrained(directory, params=params)
    return {"source": directory, "head": HEAD}


@pytest.mark.parametrize("make", [new_head, conv1d_in_files, tied_head, msgpack])
@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
def test_values_are_those_on_one_device(checkpoint, tmp_path, make, param_dtype: str) -> None:
    arguments = make(checkpoint, tmp_path) | {"param_dtype": jnp.dtype(param_dtype)}
    _, expected, report = load_model(**arguments)
    for shard in SHARDS.values():
        asked = []
        _, params, again = load_model(**arguments, shard=lambda s: asked.append(s) or shard(s))  # noqa: B023
        assert again == report
        shapes, shardings = flatten_dict(asked[0]), flatten_dict(shard(asked[0]))
        leaves = flatten_dict(params)
        assert leaves.keys() == flatten_dict(expected).keys()
        for path, leaf in flatten_dict(expected).items():
            assert leaves[path].dtype == leaf.dtype == shapes[path].dtype == param_dtype
            assert leaves[path].sharding == shardings[path]
            np.testing.assert_array_equal(leaves[path], leaf)


def test_stored_dtypes_are_kept(tmp_path) -> None:
    entry = architecture("llama")
    base = oracle.save(oracle.torch_model(entry).to(oracle.torch.float16), tmp_path / "base")
    shapes = []
    _, params, _ = load_model(
        base, entry.head, param_dtype=None, shard=lambda s: shapes.append(s) or SHARDS["all"](s)
    )
    assert {leaf.dtype for leaf in jax.tree.leaves((params, shapes))} == {jnp.dtype("float16")}


def test_random_leaves_do_not_depend_on_where_they_go() -> None:
    outline = outline_model(architecture("bert").config())
    shapes = place_leaves(flatten_dict(outline.params), SHARDS["all"])
    made = initialise(outline.model, shapes, jax.random.PRNGKey(3))
    for path, leaf in flatten_dict(outline.init(3)).items():
        assert made[path].sharding == shapes[path].sharding
        np.testing.assert_array_equal(made[path], leaf)


def test_one_device_is_no_bond(checkpoint) -> None:
    _, params, _ = load_model(checkpoint("bert"), HEAD, new_head=True)
    assert not any(leaf.committed for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize("shard", [None, *SHARDS.values()], ids=["none", *SHARDS])
def test_arrays_outlive_their_file(checkpoint, tmp_path, shard) -> None:
    base = Path(shutil.copytree(checkpoint("bert"), tmp_path / "bert"))
    _, params, _ = load_model(base, HEAD, param_dtype=None, shard=shard)
    before = [np.array(leaf) for leaf in jax.tree.leaves(params)]
    with (base / SAFETENSORS).open("r+b") as file:
        file.write(bytes((base / SAFETENSORS).stat().st_size))
    for leaf, old in zip(jax.tree.leaves(params), before, strict=True):
        np.testing.assert_array_equal(leaf, old)


@pytest.mark.parametrize("shard", [None, *SHARDS.values()], ids=["none", *SHARDS])
def test_each_byte_is_read_once(checkpoint, monkeypatch, shard) -> None:
    taken: list[int] = []
    read = Tensor.read
    monkeypatch.setattr(Tensor, "read", lambda tensor: Counted(read(tensor), taken))
    _, params, _ = load_model(checkpoint("bert"), HEAD, shard=shard)
    leaves = jax.tree.leaves(params)
    assert sum(taken) == sum(leaf.nbytes for leaf in leaves)
    assert (len(taken) > len(leaves)) == (shard not in (None, SHARDS["replicated"]))


def test_progress(checkpoint) -> None:
    seen = []

    def progress(paths, total):
        for path in paths:
            yield path
            seen.append((path, total))

    _, params, _ = load_model(checkpoint("bert"), HEAD, progress=progress)
    leaves = flatten_dict(params)
    assert {path for path, _ in seen} == leaves.keys()
    assert {total for _, total in seen} == {len(leaves)} == {len(seen)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"extra": {"leaf": P()}}, "`shard` places `extra/leaf`, which is no parameter"),
        ({"classifier": {}}, "gives the parameter `classifier/.*` no `jax.*Sharding`, but `None`"),
        ({"classifier": {"bias": P(), "kernel": P()}}, r"`classifier/bias` no .* but `P.*\(\)`"),
    ],
)
def test_other_trees_than_the_parameters(checkpoint, change: dict, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        load_model(checkpoint("bert"), HEAD, shard=lambda s: SHARDS["all"](s) | change)


@pytest.mark.parametrize("spec", [P("data"), P(None, "data")], ids=["size", "rank"])
def test_shardings_that_do_not_fit(checkpoint, spec: P) -> None:
    mesh = cf.sharding.make_mesh()
    with pytest.raises(CheckpointError, match=r"divides the parameter `classifier/bias` .*\(3,\)"):
        load_model(
            checkpoint("bert"),
            HEAD,
            shard=lambda s: (
                SHARDS["all"](s)
                | {"classifier": {name: NamedSharding(mesh, spec) for name in ("bias", "kernel")}}
            ),
        )


def test_adapters_on_a_base_in_parts(checkpoint, tmp_path) -> None:
    entry = architecture("bert")
    flax = adapted(checkpoint("bert"), entry, tmp_path / "adapter", cf.C3A(b=4))
    loaded = load_adapted(tmp_path / "adapter", shard=SHARDS["all"])
    for leaf, old in zip(jax.tree.leaves(loaded.params), jax.tree.leaves(flax.params), strict=True):
        np.testing.assert_array_equal(leaf, old)
    kernel = loaded.params["bert"]["pooler"]["dense"]["kernel"]
    assert kernel.sharding.spec == P(("data", "fsdp"), "tensor")


_PROCESS = """
import sys
import jax
jax.config.update("jax_num_cpu_devices", 4)
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
import numpy as np
from circflax.interop import load_model
from circflax.interop._tensors import Tensor
from tests.interop.devices import Counted, divide

_, expected, _ = load_model(sys.argv[3], "sequence-classification", new_head=True)
taken, read = [], Tensor.read
Tensor.read = lambda tensor: Counted(read(tensor), taken)
shard = divide("data", ("fsdp", "tensor"))
_, params, _ = load_model(sys.argv[3], "sequence-classification", new_head=True, shard=shard)
for leaf, old in zip(jax.tree.leaves(params), jax.tree.leaves(expected), strict=True):
    for part in leaf.addressable_shards:
        np.testing.assert_array_equal(part.data, old[part.index])
kernel = params["bert"]["pooler"]["dense"]["kernel"]
assert not kernel.is_fully_addressable
assert 1 < taken.count(kernel.nbytes // 8)
assert sum(taken) < 0.8 * sum(leaf.nbytes for leaf in jax.tree.leaves(expected)), sum(taken)
"""


@pytest.mark.slow
def test_a_process_reads_what_its_devices_hold(checkpoint) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    base = str(checkpoint("bert"))
    processes = [
        subprocess.Popen([sys.executable, "-c", _PROCESS, address, index, base], stderr=-1)
        for index in ("0", "1")
    ]
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors.decode()


_PEAK = """
import sys
import jax
jax.config.update("jax_num_cpu_devices", 8)
from pathlib import Path
from circflax.interop import load_model
from tests.interop.devices import SHARDS

def memory(field):
    (line,) = [l for l in Path("/proc/self/status").read_text().splitlines() if field in l]
    return 1024 * int(line.split()[1])

shard = SHARDS.get(sys.argv[3])
load_model(sys.argv[1], "causal-lm", param_dtype="bfloat16", shard=shard)
before = memory("VmRSS")
_, params, _ = load_model(sys.argv[2], "causal-lm", param_dtype="bfloat16", shard=shard)
print(memory("VmHWM") - before, sum(leaf.nbytes for leaf in jax.tree.leaves(params)))
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    """A checkpoint of 276 MB, whose largest tensor has 17 MB."""
    directory = tmp_path_factory.mktemp("large")
    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=4,
        num_attention_heads=8,
    )
    config.save_pretrained(directory)
    rng = np.random.default_rng(0)
    shapes = flatten_dict(outline_model(config, "causal-lm").params)

    def tensor(placement: Placement) -> Tensor:
        zeros = placement.to_torch(np.broadcast_to(np.float32(0), shapes[placement.path].shape))
        return Tensor.of(zeros).map(lambda zeros: rng.random(zeros.shape, np.float32))

    placements = name_leaves({path: len(leaf.shape) for path, leaf in shapes.items()})
    write_safetensors(
        directory / SAFETENSORS, {name: tensor(each) for name, each in placements.items()}
    )
    return directory


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("name", ["none", "all"])
def test_peak_of_memory(checkpoint, large: Path, name: str) -> None:
    arguments = [sys.executable, "-c", _PEAK, str(checkpoint("llama")), str(large), name]
    # What is freed goes back at once, so that the peak is of what is in use.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "1000000"}
    output = subprocess.check_output(arguments, env=environment, text=True)
    peak, held = map(int, output.split())
    largest = 4 * 4096 * 1024
    assert held > 8 * largest
    # Devices are host memory here: beside what they hold there is room for a few tensors.
    assert peak < held + 3 * largest, (peak, held)
