"""Plans: what is read from programs, what is reported, what is refused, and one real compile."""

import dataclasses
import importlib.util
import json

import pytest
from rich.console import Console

from train.config import AdapterConfig, Config, DataConfig, ImagesConfig, LanguageConfig
from train.config import MeshConfig, ModelConfig, OptimConfig
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
    return f"HloModule f, is_scheduled=true\n{before}\nENTRY %main (x: f32[8]) -> f32[8] {{\n{body}\n}}\n"


class TestProgram:
    @pytest.mark.parametrize(("line", "kind", "sent"), COLLECTIVES)
    def test_what_a_chip_sends(self, line, kind, sent):
        (found,) = read_program(program(line), devices=8).collectives
        assert (found.kind, found.sent, found.times) == (kind, sent, 1)

    def test_ends_of_what_is_asynchronous_count_nothing(self):
        lines = (
            "f32[8] all-gather-done(%s)",
            "f32[8] collective-permute-done(%s)",
            "f32[8] add(%x, %x), metadata={op_name=\"all-gather(x)\"}",
        )
        assert read_program(program(*lines), devices=8).collectives == ()

    def test_a_wrapped_operation_counts_once(self):
        wrapped = "%wrapped (p: f32[2]) -> f32[8] {\n  ROOT %g = f32[8] all-gather(%p), replica_groups={}\n}\n"
        lines = (
            "((f32[2]), f32[8], u32[]) async-start(%x), calls=%wrapped",
            "((f32[2]), f32[8], u32[]) async-update(%n0), calls=%wrapped",
            "f32[8] async-done(%n1), calls=%wrapped",
        )
        (found,) = read_program(program(*lines, before=wrapped), devices=4).collectives
        assert found.sent == 24

    def test_an_operation_that_is_spread_over_others_counts_once(self):
        part = "  %g = f32[8] all-gather(%p), frontend_attributes={chain_id=\"0\"}\n"
        start = '  ROOT %c = f32[8] custom-call(%g), custom_call_target="AsyncCollectiveStart"\n'
        before = f"%one (p: f32[2]) -> f32[8] {{\n{part}{start}}}\n\n%two (p: f32[2]) -> f32[8] {{\n{part}}}\n"
        lines = (f"f32[8] fusion(%x), kind=kCustom, calls=%{name}" for name in ("one", "two"))
        assert len(read_program(program(*lines, before=before), devices=4).collectives) == 1

    def test_a_sum_that_is_scattered(self):
        before = (
            "%all-reduce-scatter.1 (p: f32[32]) -> f32[8] {\n"
            "  %s = f32[32] all-reduce(%p), replica_groups={}, to_apply=%add\n}\n"
        )
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
        assert (found.bytes, found.times) == (64, 1)

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
