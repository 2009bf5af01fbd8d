"""Metrics against hand-made cases, and the cases where a formula is undefined."""

import numpy as np
import pytest

from train import metrics

BINARY = np.array([[2.0, 1.0], [0.0, 1.0], [0.0, 3.0], [1.0, 0.0]])


def test_two_classes():
    # Predictions 0 1 1 0: one true positive, one false positive, two true negatives.
    result = metrics.compute(BINARY, np.array([0, 1, 0, 0]))
    assert result == pytest.approx({"accuracy": 0.75, "f1": 2 / 3, "matthews": 1 / 3**0.5})
    assert all(type(value) is float for value in result.values())


def test_several_classes():
    result = metrics.compute(np.eye(3), np.array([0, 1, 2]))
    assert result == {"accuracy": 1.0, "matthews": 1.0}


@pytest.mark.parametrize("shape", [(4,), (4, 1)])
def test_regression(shape):
    labels = np.array([1, 2, 3, 5], np.float32)
    result = metrics.compute(np.exp(labels).reshape(shape), labels)
    assert result["spearman"] == pytest.approx(1.0)
    pearson = np.corrcoef(np.exp(labels), labels)[0, 1]
    assert result["pearson"] == pytest.approx(pearson)
    assert result["pearson_spearman"] == pytest.approx((1 + pearson) / 2)


@pytest.mark.filterwarnings("error")
def test_constant_predictions_score_zero():
    constant = np.tile([1.0, 0.0], (4, 1))
    result = metrics.compute(constant, np.array([0, 1, 0, 1]))
    assert result == {"accuracy": 0.5, "f1": 0.0, "matthews": 0.0}
    result = metrics.compute(np.ones(3), np.array([1, 2, 3], np.float32))
    assert set(result.values()) == {0.0}


def test_refusals():
    with pytest.raises(ValueError, match="nan or inf"):
        metrics.compute(np.array([[np.nan, 0]]), np.array([0]))
    with pytest.raises(ValueError, match="do not fit 3 labels"):
        metrics.compute(BINARY, np.array([0, 1, 0]))


def test_choose():
    assert metrics.choose(None, "cola", 2) == "matthews"
    assert metrics.choose(None, "stsb", 0) == "pearson_spearman"
    assert metrics.choose(None, None, 0) == "pearson_spearman"
    assert metrics.choose(None, None, 77) == "accuracy"
    assert metrics.choose("f1", None, 2) == "f1"
    with pytest.raises(ValueError, match="'f1' is not computed here; it can be accuracy, matthews"):
        metrics.choose("f1", None, 3)
