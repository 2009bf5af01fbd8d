"""The benchmarks run, say what they measured, and go on where they ended."""

import importlib.util
import json

import pytest

from benchmarks import steps
from benchmarks.__main__ import main
from benchmarks.calibrate import main as calibrate
from benchmarks.results import Results, markdown_table
from circflax.methods import METHODS
from train.timing import time_interleaved


def test_layers_are_measured_once_and_calibrate(tmp_path, capsys) -> None:
    path = tmp_path / "results" / "layer.json"
    arguments = ["--suite", "layer", "--quick", "--json", str(path)]
    assert main(arguments) == 0
    first = capsys.readouterr().out
    names = {record["name"] for record in json.loads(path.read_text())["records"]}
    assert {"frozen", "lora r=8", "c3a fft", "c3a dft", "c3a dense", "cdvft fft"} <= names
    assert "512 × 384, 128 f32" in first and "c3a* / lora" in first
    before = path.read_bytes()
    assert main(arguments) == 0
    assert path.read_bytes() == before
    assert capsys.readouterr().out.splitlines()[-1] == first.splitlines()[-1]
    assert calibrate([str(path)]) == 0
    assert '"cpu": Rates(matrix=' in capsys.readouterr().out


def test_merging_is_measured(capsys) -> None:
    assert main(["--suite", "merge", "--quick"]) == 0
    assert "512 × 512, bfloat16" in capsys.readouterr().out


@pytest.mark.slow
def test_training_steps_are_measured(tmp_path, capsys, monkeypatch) -> None:
    every = steps.adapters()
    assert set(every) == {steps.HEAD, steps.BIASES, *METHODS}
    # One that trains leaves alone, and methods that add to a layer's output or turn its kernel.
    few = {name: every[name] for name in (steps.BIASES, "lora", "cdvft", "boft")}
    monkeypatch.setattr(steps, "adapters", lambda: few)
    monkeypatch.setitem(steps.MODELS["minilm-l6"], "num_hidden_layers", 1)
    assert main(["--suite", "step", "--quick", "--json", str(tmp_path / "step.json")]) == 0
    table = capsys.readouterr().out
    for name in few:
        assert f"| {name} " in table


def test_throughput_is_measured_beside_the_frozen_model(capsys, monkeypatch) -> None:
    from benchmarks import throughput

    few = {name: throughput._METHODS[name] for name in ("lora", "cdvft")}
    monkeypatch.setattr(throughput, "_METHODS", few)
    assert main(["--suite", "throughput", "--quick"]) == 0
    table = capsys.readouterr().out
    assert "kind language, batch 1, length 16, layers 1" in table and "tokens/s" in table
    for name in (throughput.FORWARD, *few):
        assert f"| {name} " in table


def test_presets_are_compiled_and_counted(capsys, monkeypatch) -> None:
    from benchmarks import presets

    # Without the TPU compiler; of it alone the numbers would be worth something.
    monkeypatch.setattr(
        presets.compiling, "compile_for", lambda _, run, shapes: (run.lower(*shapes).compile(), 0.0)
    )
    results = Results(None)
    presets.run(results, "presets", quick=True)
    table = presets.table(results.of("presets"))
    assert "| cdvft/roberta-base/rte | " in table and "55,296" in table
    cases = [case["preset"] for case in presets.grid(quick=False)]
    assert len(set(cases)) == len(cases) < len(presets.PRESETS)


@pytest.mark.slow
def test_memory_goes_on_where_it_ended(tmp_path, capsys, monkeypatch) -> None:
    from benchmarks import memory

    few = {"frozen + head": memory.adapters("minilm-l6")["frozen + head"]}
    path = tmp_path / "memory.json"
    monkeypatch.setattr(memory, "adapters", lambda model: few)
    assert main(["--suite", "memory", "--quick", "--json", str(path)]) == 0
    (first,) = json.loads(path.read_text())["records"]
    few["lora"] = memory.cf.AdapterConfig(method=memory.cf.LoRA(), targets=("query",))
    assert main(["--suite", "memory", "--quick", "--json", str(path)]) == 0
    before, after = json.loads(path.read_text())["records"]
    assert before == first and 0 < before["peak"] < after["peak"]
    out = capsys.readouterr().out
    assert "chip cpu, model minilm-l6, batch 2, length 16, dtype float32" in out
    assert "| lora " in out


def test_what_does_not_fit_a_chip_is_said_not_to(monkeypatch) -> None:
    import jax

    from benchmarks import memory

    def refuse(*_):
        raise jax.errors.JaxRuntimeError(
            "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space"
            " hbm. Used 17.50G of 15.75G hbm. Exceeded hbm capacity by 1.75G."
        )

    monkeypatch.setattr(memory.compiling, "compile_for", refuse)
    results = Results(None)
    case = memory.grid("v5e", quick=True)[0]
    monkeypatch.setattr(memory, "grid", lambda chip, quick: [case])
    memory.run(results, "memory", "v5e", quick=True)
    table = memory.table(results.of("memory"))
    assert "18.79 †" in table and table.endswith(
        "† does not fit: what the compiler says that it would take."
    )


def test_growth_is_drawn(tmp_path, monkeypatch) -> None:
    from benchmarks import growth

    case = {"tokens": 8, "features": 8, "block": 8, "dtype": "float32"}
    records = [
        {"suite": "growth", "case": {**case, "axis": axis, axis: size}, "name": "c3a fft"}
        | {"median": 0.001 * size}
        for axis in growth.AXES
        for size in (8, 16)
    ]
    paths = growth.plot(records, tmp_path)
    assert len(paths) == len(growth.AXES)
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)


def test_suites_that_this_machine_cannot_run(capsys, monkeypatch) -> None:
    assert main(["--suite", "gpu", "--quick"]) == 2
    assert "needs a GPU that JAX can use" in capsys.readouterr().err


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is not None, reason="the TPU compiler is installed"
)
def test_without_the_tpu_compiler(capsys) -> None:
    import jax

    from benchmarks import tpu

    with pytest.raises(ValueError, match=r"circflax\[tpu-compiler\]"):
        tpu.estimate("v5e", lambda x: x, [jax.ShapeDtypeStruct((8,), float)])


def test_a_file_of_something_else(tmp_path) -> None:
    path = tmp_path / "other.json"
    for content in ("{", "[]", '{"machine": {}}'):
        path.write_text(content)
        with pytest.raises(ValueError, match="does not hold benchmark results"):
            Results(path)


def test_slow_functions_run_less_often() -> None:
    calls = {"slow": 0, "fast": 0}

    def count(name: str, seconds: float):
        import time

        def run() -> None:
            calls[name] += 1
            time.sleep(seconds)

        return run

    timings = time_interleaved(
        {"slow": count("slow", 0.05), "fast": count("fast", 0.0)}, rounds=6, budget=0.06
    )
    assert timings["slow"].runs == 2 and timings["fast"].runs == 6
    assert calls == {"slow": 3, "fast": 7}


def test_tables_line_up() -> None:
    lines = markdown_table(["a", "b"], [["long name", "1"], ["x", "22"]]).splitlines()
    assert len({len(line) for line in lines}) == 1
