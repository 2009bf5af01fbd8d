"""The methods to compare against beside their implementations in PEFT, given the same weights."""

import numpy as np
import pytest

from circflax.methods import BOFT, IA3, FourierFT, Method, VeRA, _frozen

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")


def peft_layer(config, in_features: int, out_features: int):
    """A linear layer with a bias, adapted by PEFT with random arrays."""
    torch.manual_seed(0)
    base = torch.nn.Sequential(torch.nn.Linear(in_features, out_features))
    layer = peft.get_peft_model(base, config).base_model.model[0]
    for parameter in layer.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, 0.5, 0.5)
    return layer


def numpy(tensor) -> np.ndarray:
    return tensor.detach().numpy().copy()


def check(method: Method, params, layer) -> None:
    """Forward pass, merged weights and size, against a layer of PEFT."""
    kernel, bias = numpy(layer.weight).T, numpy(layer.bias)
    trained = sum(p.numel() for p in layer.parameters() if p.requires_grad)
    assert method.parameter_count(*kernel.shape) == trained
    shapes = method.shapes(*kernel.shape)
    assert {k: a.shape for k, a in params.items()} == {k: s.shape for k, s in shapes.items()}

    x = np.random.default_rng(0).standard_normal((5, kernel.shape[0])).astype(np.float32)
    theirs = numpy(layer(torch.from_numpy(x)))
    y = method.input(params, x) @ kernel + bias
    np.testing.assert_allclose(method.apply(params, x, y, bias), theirs, rtol=1e-5, atol=1e-5)
    layer.merge()
    merged = numpy(layer.weight).T
    np.testing.assert_allclose(method.merge(params, kernel), merged, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(method.merge_bias(params, bias), numpy(layer.bias), rtol=1e-5)


SHAPES = pytest.mark.parametrize(("in_features", "out_features"), [(16, 24), (96, 96), (48, 16)])


@SHAPES
@pytest.mark.parametrize("r", [4, 128])
def test_vera(in_features: int, out_features: int, r: int) -> None:
    config = peft.VeraConfig(r=r, target_modules=["0"])
    layer = peft_layer(config, in_features, out_features)
    method = VeRA(r=r)
    a, b = (np.asarray(matrix) for matrix in method._matrices(in_features, out_features))
    # The two draw differently; theirs has the same bounds.
    assert np.abs(a).max() <= np.sqrt(6 / in_features) and np.abs(b).max() <= np.sqrt(6 / r)
    assert layer.vera_A["default"].abs().max() <= np.sqrt(6 / in_features)
    assert layer.vera_B["default"].abs().max() <= np.sqrt(6 / r)
    layer.vera_A["default"].copy_(torch.from_numpy(a.T.copy()))
    layer.vera_B["default"].copy_(torch.from_numpy(b.T.copy()))
    params = {
        "d": numpy(layer.vera_lambda_d["default"]),
        "b": numpy(layer.vera_lambda_b["default"]),
    }
    check(method, params, layer)


@SHAPES
@pytest.mark.parametrize("alpha", [150.0, 2.5])
def test_fourierft(in_features: int, out_features: int, alpha: float) -> None:
    config = peft.FourierFTConfig(n_frequency=60, scaling=alpha, target_modules=["0"])
    layer = peft_layer(config, in_features, out_features)
    method = FourierFT(n=60, alpha=alpha)
    rows, columns = _frozen.positions(method.seed, 60, (in_features, out_features))
    layer.indices["default"] = torch.from_numpy(np.stack([columns, rows]).astype(np.int64))
    check(method, {"c": numpy(layer.fourierft_spectrum["default"])}, layer)


@SHAPES
@pytest.mark.parametrize("feedforward", [False, True])
def test_ia3(in_features: int, out_features: int, feedforward: bool) -> None:
    modules = ["0"] if feedforward else []
    config = peft.IA3Config(target_modules=["0"], feedforward_modules=modules)
    layer = peft_layer(config, in_features, out_features)
    params = {"l": numpy(layer.ia3_l["default"]).reshape(-1)}
    check(IA3(feedforward=feedforward), params, layer)


NO_CUDA = pytest.mark.filterwarnings("ignore:.*CUDA", "ignore:Setting boft")


@NO_CUDA
@SHAPES
@pytest.mark.parametrize("b", [2, 8])
def test_boft_of_one_factor(in_features: int, out_features: int, b: int) -> None:
    # Without its CUDA extension PEFT has one factor only.
    config = peft.BOFTConfig(boft_block_size=b, boft_n_butterfly_factor=1, target_modules=["0"])
    layer = peft_layer(config, in_features, out_features)
    params = {"r": numpy(layer.boft_R["default"]), "s": numpy(layer.boft_s["default"]).reshape(-1)}
    check(BOFT(b=b, m=1), params, layer)


@NO_CUDA
@pytest.mark.parametrize(("b", "m"), [(2, 2), (8, 2), (4, 3), (2, 4)])
def test_boft_pairs_halves_of_blocks_as_peft_permutes(b: int, m: int) -> None:
    width = 96
    layer = peft_layer(peft.BOFTConfig(boft_block_size=b, target_modules=["0"]), width, width)
    x = np.arange(width)
    for i in range(m):
        blocks = width // b // 2**i
        theirs = layer.block_butterfly_perm(width, blocks, b // 2, m - 1).numpy()
        np.testing.assert_array_equal(np.asarray(BOFT(b=b, m=m)._unpair(x, i)), theirs)
