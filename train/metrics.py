"""Metrics of predictions, and which of them choose the best epoch."""

import numpy as np

from train import glue

PERPLEXITY = "perplexity"
_BINARY = ("accuracy", "f1", "matthews")
_MULTICLASS = ("accuracy", "matthews")
_MANY = (*_MULTICLASS, "top5")
_REGRESSION = ("pearson", "spearman", "pearson_spearman")


def compute(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Compares a model's outputs with the labels.

    Args:
        logits: Scores of the classes, (examples, classes); for regression the predicted
            numbers, (examples,) or (examples, 1).
        labels: Class indices, or floating-point numbers for regression.

    Returns:
        Two classes: accuracy, f1 (of class 1) and matthews; more classes: accuracy and
        matthews, and with more than five top5, the part whose class is among the five likeliest;
        regression: pearson, spearman and their mean pearson_spearman.

    Raises:
        ValueError: If logits and labels do not fit together, or a logit is not finite.
    """
    logits, labels = np.asarray(logits, np.float64), np.asarray(labels)
    if not np.isfinite(logits).all():
        raise ValueError("the model's outputs hold nan or inf; a lower learning rate may help")
    regression = np.issubdtype(labels.dtype, np.floating)
    outputs = logits.size if regression else len(logits)
    if outputs != len(labels) or logits.ndim > 2:
        raise ValueError(f"logits of shape {logits.shape} do not fit {len(labels)} labels")
    if regression:
        return _regression(logits.reshape(-1), labels)
    return _classification(logits, labels)


def choose(metric: str | None, task: str | None, classes: int) -> str:
    """Finds the metric that chooses the best epoch.

    Args:
        metric: The one asked for, if any.
        task: GLUE task, if it is one; each has a customary metric.
        classes: Number of classes; 0 for regression.

    Returns:
        The name of a metric that `compute` gives.

    Raises:
        ValueError: If the one asked for is not among those.
    """
    names = {0: _REGRESSION, 2: _BINARY}.get(classes, _MANY if classes > 5 else _MULTICLASS)
    if metric is None:
        usual = {0: "pearson_spearman"}.get(classes, "accuracy")
        return glue.TASKS[task].metric if task in glue.TASKS else usual
    if metric not in names:
        raise ValueError(
            f"`run.metric` {metric!r} is not computed here; it can be {', '.join(names)}"
        )
    return metric


def better(metric: str, value: float, than: float) -> bool:
    """Whether a value of a metric is better than another.

    Args:
        metric: The metric's name.
        value: The value.
        than: The other.

    Returns:
        Whether it is higher, or of a perplexity lower.
    """
    return value < than if metric == PERPLEXITY else value > than


def _classification(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    from sklearn import metrics

    predictions, classes = logits.argmax(-1), logits.shape[-1]
    results = {"accuracy": metrics.accuracy_score(labels, predictions)}
    if classes == 2:
        # Without a true or predicted positive F1 is 0/0, which counts as 0.
        results["f1"] = metrics.f1_score(labels, predictions, zero_division=0.0)
    # scikit-learn gives 0 where a constant side leaves the coefficient undefined.
    results["matthews"] = metrics.matthews_corrcoef(labels, predictions)
    if classes > 5:
        results["top5"] = metrics.top_k_accuracy_score(labels, logits, k=5, labels=range(classes))
    return {name: float(value) for name, value in results.items()}


def _regression(predictions: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    from scipy import stats

    # A constant has no correlation with anything; 0 says that nothing was learnt, whereas nan
    # would lose every comparison between epochs.
    if np.ptp(predictions) == 0 or np.ptp(labels) == 0:
        pearson = spearman = 0.0
    else:
        pearson = float(stats.pearsonr(predictions, labels).statistic)
        spearman = float(stats.spearmanr(predictions, labels).statistic)
    return {
        "pearson": pearson,
        "spearman": spearman,
        "pearson_spearman": (pearson + spearman) / 2,
    }
