"""The GLUE tasks as the Hub's ``nyu-mll/glue`` has them."""

from dataclasses import dataclass

DATASET = "nyu-mll/glue"


@dataclass(frozen=True)
class GlueTask:
    """Columns, classes and the metric that is customarily reported.

    Attributes:
        text: Column of the first sentence.
        text_pair: Column of the second sentence, if there is one.
        labels: Class names in the order of their indices; none for regression.
        metric: Name of the metric in `train.metrics`.
        validation: Name of the official validation split.
    """

    text: str
    text_pair: str | None
    labels: tuple[str, ...]
    metric: str = "accuracy"
    validation: str = "validation"


TASKS: dict[str, GlueTask] = {
    "cola": GlueTask("sentence", None, ("unacceptable", "acceptable"), "matthews"),
    "sst2": GlueTask("sentence", None, ("negative", "positive")),
    "mrpc": GlueTask("sentence1", "sentence2", ("not_equivalent", "equivalent")),
    "stsb": GlueTask("sentence1", "sentence2", (), "pearson_spearman"),
    "qqp": GlueTask("question1", "question2", ("not_duplicate", "duplicate")),
    "mnli": GlueTask(
        "premise",
        "hypothesis",
        ("entailment", "neutral", "contradiction"),
        validation="validation_matched",
    ),
    "qnli": GlueTask("question", "sentence", ("entailment", "not_entailment")),
    "rte": GlueTask("sentence1", "sentence2", ("entailment", "not_entailment")),
    "wnli": GlueTask("sentence1", "sentence2", ("not_entailment", "entailment")),
}
