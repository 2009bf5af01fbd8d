"""Plans: what is read from programs, what is reported, what is refused, and one real compile."""

import importlib.util
import io
import json

import pytest
from rich.console import Console

from train.config import (
    AdapterConfig,
    Config,
    DataConfig,
    ImagesConfig,
    LanguageConfig,
    ModelConfig,
    OptimConfig,
)
from train.plan import report, topology
from train.plan.__main__ import main
from train.plan.estimate import BATCH, REST, STATE, WEIGHTS, Estimate, Speed, Traffic
from train.plan.program import memory_wanted, read_program
from train.plan.step import count_classes

CYCLES = 'backend_config={"estimated_cycles":"%d"}'
GROUPS = "replica_groups={{0,1,2,3},{4,5,6,7}}"
COLLECTIVES = [
    # A line of a program for 8 devices, its kind, and the bytes that a chip sends.
    (f"bf16[64,32]{{1,0:T(8,128)(2,1)}} all-gather(%x), {GROUPS}", "all-gather", 3072),
    (f"f32[16]{{0}} all-reduce(%x), {GROUPS}, to_apply=%add", "all-reduce", 96),
    ("f32[16]{0} all-reduce(%x), replica_groups={}, to_apply=%add", "all-reduce", 112),
    (f"f32[16]{{0}} reduce-scatter(%x), {GROUPS}", "reduce-scatter", 192),
    ("(f32[8], bf16[8,1]) all-reduce(%x, %y), replica_groups=[2,4]<=[8]", "all-reduce", 72),
    ("s8[64] all-to-all(%x), replica_groups=[4,2]<=[2,4]T(1,0)", "all-to-all", 32),
    (
        "(bf16[4,8]{1,0}, bf16[32,8]{1,0:S(1)}, u32[]{:S(2)}) all-gather-start(%x),"
        " replica_groups=mesh['a'=2,'b'=4] {'a','b'}",
        "all-gather",
        448,
    ),
    (
        "((f32[2], f32[4]), (f32[8], f32[16])) all-gather-start(%x, %y),"
        " replica_groups=mesh['a'=2,'b'=4] {'b'}",
        "all-gather",
        72,
    ),
    ("f32[8] all-gather(%x), replica_groups=mesh['a'=8] {'a':(2)4}", "all-gather", 24),
    (
        "(bf16[4,8]{1,0}, bf16[4,8]{1,0}, u32[], u32[]) collective-permute-start(%x),"
        " source_target_pairs={{0,1},{1,0}}",
        "collective-permute",
        64,
    ),
    (f"(f32[8], f32[8]) all-reduce-start(%x, %y), {GROUPS}", "all-reduce", 96),
]
LOOP = """
%condition (p: (s32[], f32[8])) -> pred[] {
  %p = (s32[], f32[8]) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %end = s32[] constant(7)
  ROOT %less = pred[] compare(%i, %end), direction=LT
}

%body (q: (s32[], f32[8])) -> (s32[], f32[8]) {
  %q = (s32[], f32[8]) parameter(0)
  %j = s32[] get-tuple-element(%q), index=0
  %two = s32[] constant(2)
  %next = s32[] add(%j, %two)
  %g = f32[8] all-gather(%q), replica_groups={}, metadata={op_name="jit(f)/while/body/dot"}
  ROOT %t = (s32[], /*index=1*/f32[8]) tuple(%next, %g), backend_config={"estimated_cycles":"100"}
}

ENTRY %main (a: f32[8]) -> f32[8] {
  %a = f32[8] parameter(0)
  %w = (s32[], f32[8]) while(%a), condition=%condition, body=%body
  ROOT %r = f32[8] get-tuple-element(%w), index=1, backend_config={"estimated_cycles":"5"}
}
"""


def program(*lines: str, before: str = "") -> str:
    body = "\n".join(f"  %n{number} = {line}" for number, line in enumerate(lines))
    entry = f"ENTRY %main (x: f32[8]) -> f32[8] {{\n{body}\n}}\n"
    return f"HloModule f, is_scheduled=true\n{before}\n{entry}"


def computation(name: str, *lines: str) -> str:
    body = "\n".join(f"  {line}" for line in lines)
    return f"%{name} (p: f32[2]) -> f32[8] {{\n{body}\n}}\n"


class TestProgram:
    @pytest.mark.parametrize(("line", "kind", "sent"), COLLECTIVES)
    def test_what_a_chip_sends(self, line, kind, sent):
        (found,) = read_program(program(line), devices=8).collectives
        assert (found.kind, found.sent, found.times) == (kind, sent, 1)

    def test_ends_of_what_is_asynchronous_count_nothing(self):
        lines = (
            "f32[8] all-gather-done(%s)",
            "f32[8] collective-permute-done(%s)",
            'f32[8] add(%x, %x), metadata={op_name="all-gather(x)"}',
        )
        assert read_program(program(*lines), devices=8).collectives == ()

    def test_a_wrapped_operation_counts_once(self):
        wrapped = computation("wrapped", "ROOT %g = f32[8] all-gather(%p), replica_groups={}")
        lines = (
            "((f32[2]), f32[8], u32[]) async-start(%x), calls=%wrapped",
            "((f32[2]), f32[8], u32[]) async-update(%n0), calls=%wrapped",
            "f32[8] async-done(%n1), calls=%wrapped",
        )
        (found,) = read_program(program(*lines, before=wrapped), devices=4).collectives
        assert found.sent == 24

    def test_an_operation_that_is_spread_over_others_counts_once(self):
        part = '%g = f32[8] all-gather(%p), frontend_attributes={chain_id="0"}'
        start = 'ROOT %c = f32[8] custom-call(%g), custom_call_target="AsyncCollectiveStart"'
        before = computation("one", part, start) + computation("two", part)
        lines = (f"f32[8] fusion(%x), kind=kCustom, calls=%{name}" for name in ("one", "two"))
        assert len(read_program(program(*lines, before=before), devices=4).collectives) == 1

    def test_a_sum_that_is_scattered(self):
        scattered = "%s = f32[32] all-reduce(%p), replica_groups={}, to_apply=%add"
        before = computation("all-reduce-scatter.1", scattered)
        line = "f32[8] fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1"
        (found,) = read_program(program(line, before=before), devices=4).collectives
        assert (found.kind, found.sent) == ("reduce-scatter", 96)

    def test_a_loop_counts_as_often_as_it_runs(self):
        found = read_program(LOOP, devices=8)
        assert (found.cycles, found.unknown_loops) == (4 * 100 + 5, 0)
        assert [(each.times, each.place) for each in found.collectives] == [
            (4, "jit(f)/while/body/dot")
        ]

    def test_a_loop_s_own_count_comes_first(self):
        known = LOOP.replace(
            "body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"3"}}'
        )
        assert read_program(known, devices=8).cycles == 3 * 100 + 5

    def test_a_loop_of_unknown_length_counts_once(self):
        found = read_program(LOOP.replace("direction=LT", "direction=NE"), devices=8)
        assert (found.cycles, found.unknown_loops) == (105, 1)

    def test_cycles_without_end_are_left_out(self):
        lines = [f"f32[8] add(%x, %x), {CYCLES % cycles}" for cycles in (3, 4, 2**62)]
        assert read_program(program(*lines), devices=1).cycles == 7

    def test_kernels_are_listed_with_what_they_move(self):
        line = (
            'f32[8] custom-call(%x), custom_call_target="tpu_custom_call",'
            ' operand_layout_constraints={bf16[4,4]{1,0}}, metadata={op_name="f32[99]"}'
        )
        (found,) = read_program(program(line), devices=1).kernels
        assert (found.bytes, found.times, found.fused) == (64, 1, False)
        within = computation("within", f"ROOT %k = {line}")
        fusion = "f32[8] fusion(%x), kind=kCustom, calls=%within"
        (found,) = read_program(program(fusion, before=within), devices=1).kernels
        assert (found.bytes, found.times, found.fused) == (64, 1, True)

    @pytest.mark.parametrize(
        ("message", "wanted"),
        [
            (
                "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 17.50G of 15.75G"
                " hbm. Exceeded hbm capacity by 1.75G.",
                (17.5, 15.75),
            ),
            (
                "Ran out of memory on HBM, the total memory required for HLO temporaries (240.00G)"
                " exceeds available HBM (95.74G).",
                (240, 95.74),
            ),
        ],
    )
    def test_what_the_compiler_says_when_memory_runs_out(self, message, wanted):
        assert memory_wanted(message) == tuple(round(size * 2**30) for size in wanted)

    def test_other_errors_are_about_something_else(self):
        assert memory_wanted("INTERNAL: Mosaic failed to compile") is None


def make_config(**sections) -> Config:
    given = {"model": ModelConfig("shapes"), "language": LanguageConfig(dataset="x")}
    return Config(**given | sections)


def make_estimate(**changes) -> Estimate:
    """A step whose base weights are most of what it needs."""
    values = {
        "topology": "v5e:2x2",
        "chips": 4,
        "mesh": {"data": 1, "fsdp": 4, "tensor": 1},
        "peak": 12_000_000_000,
        "capacity": 16_000_000_000,
        "parts": {WEIGHTS: 9_000_000_000, STATE: 1_000_000_000, BATCH: 0, REST: 2_000_000_000},
        "fits": True,
        "traffic": (Traffic("all-gather", "weights", 64, 2e9, "self_attn/q_proj (backward)"),),
        "speed": Speed(0.5, 0.25, 8192, "tokens", kernels=0, unknown_loops=0),
        "compile_seconds": 61.0,
        "notes": ("no mesh is set: `fsdp` over all chips",),
    }
    return Estimate(**values | changes)


def shown(estimate: Estimate, config: Config | None = None) -> list[str]:
    console = Console(width=80, record=True, file=io.StringIO())
    report.show(estimate, config or make_config(), console)
    return console.export_text().splitlines()


class TestReport:
    def test_it_says_what_a_step_needs(self):
        lines = shown(make_estimate())
        text = "\n".join(lines)
        for part in (
            "v5e:2x2: 4 chips, mesh data 1 × fsdp 4 × tensor 1",
            "note: no mesh is set",
            "together 500.0 to 750.0 ms",
            "10,923 to 16,384 tokens a",
            "compiled in 61 s",
        ):
            assert part in text
        cells = [line.split() for line in lines]
        assert ["base", "weights", "9.000", "75.0%"] in cells
        assert ["there", "is", "16.000", "75.0%", "used"] in cells
        assert ["all-gather:", "weights", "64", "2,000.0", "250.00", "self_attn/q_proj"] in cells
        assert lines[-1] == "fits: 4.00 GB of each chip are left"
        assert max(map(len, lines)) <= 80

    def test_what_counts_otherwise_is_said(self):
        speed = Speed(0.5, 0.25, 32, "images", kernels=3, unknown_loops=2)
        text = "\n".join(shown(make_estimate(speed=speed)))
        assert "3 custom kernels count" in text and "2 loops of unknown length" in text
        assert "images a second" in text.replace("\n", " ")

    def test_one_chip_sends_nothing(self):
        text = "\n".join(shown(make_estimate(chips=1, topology="v5e:1x1", traffic=())))
        assert "v5e:1x1: 1 chip, mesh" in text and "sends" not in text
        assert "500.0 ms, 16,384 tokens a second" in text

    def test_a_step_that_does_not_fit_has_no_speed(self):
        lines = shown(make_estimate(fits=False, peak=18_500_000_000, traffic=(), speed=None))
        text = " ".join(lines)
        assert "does not fit: each chip lacks 2.50 GB" in text and "tokens" not in text
        assert "what would help: --model.param_dtype bfloat16" in text

    @pytest.mark.parametrize(
        ("parts", "mesh", "settings", "first"),
        [
            ({WEIGHTS: 9}, (1, 4, 1), {}, "--model.param_dtype bfloat16"),
            ({WEIGHTS: 9}, (2, 2, 1), {"param_dtype": "bfloat16"}, "--mesh.data 1 --mesh.fsdp 4"),
            ({WEIGHTS: 9}, (2, 1, 2), {"param_dtype": "bfloat16"}, "--mesh.data 1 --mesh.fsdp 2"),
            ({WEIGHTS: 9}, (1, 4, 1), {"param_dtype": "bfloat16"}, "a slice of more chips"),
            ({REST: 9}, (1, 4, 1), {}, "--model.gradient_checkpointing true"),
            (
                {REST: 9},
                (1, 4, 1),
                {"gradient_checkpointing": True},
                "--model.compute_dtype bfloat16",
            ),
            (
                {REST: 9},
                (1, 4, 1),
                {"gradient_checkpointing": True, "compute_dtype": "bfloat16"},
                "--optim.accumulation_steps 2",
            ),
            ({STATE: 9}, (1, 4, 1), {"method": "full"}, "an --adapter.method that trains less"),
        ],
    )
    def test_what_would_help_is_for_what_is_large(self, parts, mesh, settings, first):
        model = {key: value for key, value in settings.items() if key != "method"}
        adapter = AdapterConfig(method=settings.get("method", "cdvft"))
        config = make_config(model=ModelConfig("shapes", **model), adapter=adapter)
        estimate = make_estimate(
            peak=12,
            parts={WEIGHTS: 1, STATE: 1, BATCH: 1, REST: 1} | parts,
            mesh=dict(zip(("data", "fsdp", "tensor"), mesh, strict=True)),
        )
        helpful = report.advice(estimate, config)
        assert helpful[0].startswith(first)
        about_weights = [each for each in helpful if "weights" in each or "share them" in each]
        assert bool(about_weights) == (WEIGHTS in parts)

    def test_rows_that_are_one_a_chip_are_not_cut_up_further(self):
        config = make_config(optim=OptimConfig(batch_size=4))
        helpful = report.advice(make_estimate(), config)
        assert helpful[-1].startswith("--mesh.tensor") and "--optim" not in " ".join(helpful)

    def test_the_file_has_all_numbers(self, tmp_path):
        report.write(make_estimate(), tmp_path / "plan.json")
        record = json.loads((tmp_path / "plan.json").read_text())
        assert record["parts"][WEIGHTS] == 9_000_000_000 and record["fits"] is True
        assert (record["speed"]["best"], record["speed"]["worst"]) == (0.5, 0.75)
        assert record["traffic"][0]["place"] == "self_attn/q_proj (backward)"


@pytest.mark.parametrize(
    ("section", "classes"),
    [
        ({"data": DataConfig(task="mnli")}, (3, False)),
        ({"data": DataConfig(task="stsb")}, (1, False)),
        ({"data": DataConfig(task="docstrings")}, (20, False)),
        ({"data": DataConfig(train="x.tsv")}, (2, True)),
        ({"data": DataConfig(train="x.tsv", labels=("a", "b", "c"))}, (3, False)),
        ({"data": DataConfig(train="x.tsv", regression=True)}, (1, False)),
        ({"images": ImagesConfig(dataset="digits")}, (10, False)),
        ({"images": ImagesConfig(train="x")}, (2, True)),
        ({"images": ImagesConfig(train="x", classes=("a", "b", "c", "d"))}, (4, False)),
        ({"language": LanguageConfig(dataset="x")}, (None, False)),
    ],
)
def test_classes_come_from_settings(section, classes):
    assert count_classes(Config(ModelConfig("shapes"), **section)) == classes


class TestRefusals:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ([], "`--topology` must be set"),
            (["--topology", "v9:2x2"], "no topology `v9:2x2`; there are, among others, v5e: 1x1"),
            (["--topology", "v5e"], "no topology `v5e`"),
            (["--topology", "v5e:2x2x2"], "no topology `v5e:2x2x2`"),
            (["--topology", "v5p:4x4"], "no topology `v5p:4x4`"),
            (["--topology"], "expected one argument"),
        ],
    )
    def test_what_there_is_not(self, tmp_path, capsys, arguments, message):
        assert main(["--model.name", str(tmp_path), "--language.dataset", "x", *arguments]) == 2
        assert message in capsys.readouterr().err

    @pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is not None, reason="the TPU compiler is installed"
    )
    def test_without_the_tpu_compiler(self):
        with pytest.raises(ValueError, match=r"pip install 'circflax\[tpu-compiler\]'"):
            topology.find_topology("v5e:2x2")


# The cache that all tests share cannot give programs for chips that are not there.
@pytest.mark.filterwarnings("ignore:Error reading persistent compilation cache")
@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="the TPU compiler is not installed"
)
class TestCompiling:
    @pytest.fixture
    def arguments(self, tmp_path) -> list[str]:
        """A language model of one narrow layer, on four chips."""
        from transformers import GPT2Config

        GPT2Config(vocab_size=128, n_positions=16, n_embd=64, n_layer=1, n_head=2).save_pretrained(
            tmp_path
        )
        settings = {
            "topology": "v5e:2x2",
            "model.name": tmp_path,
            "language.dataset": "x",
            "language.max_length": 16,
            "adapter.targets": "[c_attn]",
            "adapter.method": "lora",
            "optim.batch_size": 8,
            "json": tmp_path / "plan.json",
        }
        return [part for name, value in settings.items() for part in (f"--{name}", str(value))]

    def test_a_step_that_fits(self, arguments, tmp_path, capsys):
        assert main(arguments) == 0
        out = capsys.readouterr().out
        assert "mesh data 1 × fsdp 4 × tensor 1" in out and "fits: 16" in out
        record = json.loads((tmp_path / "plan.json").read_text())
        assert record["mesh"] == {"data": 1, "fsdp": 4, "tensor": 1}
        assert record["speed"]["compute"] > 0 and record["speed"]["units"] == 8 * 16
        assert sum(record["parts"].values()) == record["peak"] < record["capacity"]
        sent = {(each["kind"], each["carries"]): each["sent"] for each in record["traffic"]}
        assert sent["all-reduce", "gradients"] > 0

    def test_a_step_that_does_not_fit(self, arguments, capsys):
        assert main([*arguments, "--optim.batch_size", "16000000"]) == 1
        out = capsys.readouterr().out
        assert "does not fit: each chip lacks" in out and "what would help" in out

    @pytest.mark.parametrize(
        ("more", "message"),
        [
            (["--topology", "v5e:3x4"], "no topology `v5e:3x4`"),
            (["--mesh.fsdp", "3"], "needs a multiple of 3 devices, but there are 4"),
            (["--optim.batch_size", "6"], "dimension size is 6"),
        ],
    )
    def test_what_does_not_fit_together(self, arguments, capsys, more, message):
        assert main([*arguments, *more]) == 2
        assert message in capsys.readouterr().err
