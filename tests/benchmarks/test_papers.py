"""The papers' figures come out of the library's counts, and the documents hold what is counted."""

import math

import pytest

import circflax as cf
from benchmarks import memory, papers

BASE, LARGE = "roberta-base", "roberta-large"
# C3A's Table 2 where it is exact, and the figures that the other papers print.
EXACT = [
    (BASE, cf.IA3(), memory.SIX, 110_592),
    (LARGE, cf.IA3(), memory.SIX, 294_912),
    (BASE, cf.LoRA(r=8), {}, 294_912),
    (LARGE, cf.LoRA(r=8), {}, 786_432),
    (BASE, cf.VeRA(r=1024), {}, 43_008),
    (LARGE, cf.VeRA(r=256), {}, 61_440),
    (BASE, cf.C3A(), {}, 18_432),
    (LARGE, cf.C3A(), {}, 49_152),
    (BASE, cf.C3A(b=128), {}, 110_592),
    (LARGE, cf.C3A(b=128), {}, 393_216),
    (BASE, cf.FourierFT(n=1000), {}, 24_000),
    (BASE, cf.BCA(), {}, 18_432),
    (BASE, cf.CDVFT(), {}, 55_296),
    ("vit-base", cf.CDVFT(), {}, 55_296),
    ("vit-base", cf.FourierFT(n=3000), {}, 72_000),
    ("llama-2-7b", cf.VeRA(r=1024), {"targets": r".*/(q|k|v|o|gate|up|down)_proj"}, 1_589_248),
]


@pytest.mark.parametrize(("model", "method", "config", "expected"), EXACT, ids=str)
def test_parameters(model: str, method: cf.Method, config: dict, expected: int) -> None:
    assert papers.parameters(model, method, **config) == expected


def test_parameters_without_a_method() -> None:
    assert (papers.biases(BASE), papers.biases(LARGE)) == (102_144, 271_360)
    # The paper has two numbers for each output besides the rotations, PEFT and the library one.
    assert papers.effective_boft(BASE) == 165_888 - 24 * 768
    assert papers.effective_boft(LARGE) == 442_368 - 48 * 1024


def test_percentages_of_llama() -> None:
    table = papers.commonsense()
    for row in ("| 0.83 | 0.833 |", "| 0.70 | 0.705 |", "| 0.35 | 0.354 |", "| 0.26 | 0.261 |"):
        assert row in " ".join(table.split())


@pytest.mark.parametrize(
    ("model", "p", "printed"),
    [(BASE, 768, 2.5), (BASE, 256, 3.8), (LARGE, 512, 9.0), (LARGE, 1024, 7.5)],
)
def test_operations_by_the_convention_of_bca(model: str, p: int, printed: float) -> None:
    width, layers = (768, 24) if model == BASE else (1024, 48)
    assert round(layers * papers.paper_flops(width, p) / 1e6, 1) == printed


def test_fourierft_against_cdvft() -> None:
    expected = (508, 74, 38, 21, 17, 15.6, 15.4)
    tokens = (1, 12, 32, 128, 512, 4096, math.inf)
    for t, figure in zip(tokens, expected, strict=True):
        assert papers.complex_ratio(t) == pytest.approx(figure, rel=0.02)
        assert papers.ratio(cf.CDVFT(), t) == pytest.approx(1.87 * figure, rel=0.03)


@pytest.mark.slow
@pytest.mark.parametrize("path", papers.DOCUMENTS, ids=lambda path: path.name)
def test_documents_hold_what_is_counted(path) -> None:
    assert papers.fill(path.read_text()) == path.read_text()
