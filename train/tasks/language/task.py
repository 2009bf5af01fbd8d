"""Causal language modelling: the task, and its examples in the form that a model takes."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

import circflax as cf
from train.config import Config, LanguageConfig
from train.generation import Sampling, longest_prompt
from train.tasks.batches import Batch, Batches
from train.tasks.language import objective
from train.tasks.language.answers import answer_all, choose_exchanges
from train.tasks.language.rows import Rows, describe, packed_rows, single_rows
from train.tasks.language.source import Part, load_parts
from train.tasks.language.tokens import Exchange, encode_examples, encode_text
from train.tasks.records import DataError
from train.tasks.splits import sample
from train.tasks.task import Evaluation, Runner

if TYPE_CHECKING:
    from transformers import FlaxPreTrainedModel, PreTrainedTokenizerFast


class LanguageModelling:
    """Texts or answers for a causal language model; see `train.tasks.task.Task`."""

    head = "causal-lm"
    head_config: ClassVar[Mapping[str, Any]] = {}

    def __init__(self, config: Config) -> None:
        """Reads the examples.

        Args:
            config: The settings of the run.

        Raises:
            DataError: If examples cannot be read, or do not fit.
            ValueError: If the metric that is asked for is not computed for them.
        """
        self._config = config
        self.metric = objective.choose_metric(config.run.metric, _has_numbers(config.language))
        self._parts, self._notes = load_parts(config.language)
        language = config.language
        path = Path(language.root or ".", language.train or "")
        self.name = language.dataset or path.parent.name or path.stem

    def encode(self, directory: Path, model: "FlaxPreTrainedModel") -> "Language":
        """Tokenizes the examples and lays them out in rows.

        Args:
            directory: The base model's, with its tokenizer.
            model: The model.

        Returns:
            The rows.

        Raises:
            DataError: If tokenizer, model, settings and examples do not fit.
            ValueError: If examples are to share rows, but the model cannot keep them apart.
        """
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(directory)
        check_tokenizer(tokenizer, model)
        positions = getattr(model.config, "max_position_embeddings", None)
        language = self._config.language
        length = language.max_length
        if positions is not None and length > positions:
            raise DataError(
                f"`language.max_length` {length} exceeds the {positions} positions of the model"
            )
        if language.packing and language.format != "text":
            _check_apart(model)
        notes = [*self._notes]
        parts, asked = {}, {}
        longest = longest_prompt(model.config, _sampling(language)) if language.generate else 0
        for name, part in self._parts.items():
            parts[name], found = self._rows(name, part, tokenizer)
            notes += found
            if language.generate and name in ("validation", "test"):
                exchanges = parts[name].encoded.exchanges
                asked[name], long = choose_exchanges(exchanges, language.generate, longest)
                if long:
                    notes.append(
                        f"{name}: {long} of {len(exchanges)} prompts leave no room for answers of "
                        f"{language.max_new_tokens} tokens, and are not asked"
                    )
        return Language(self._config, parts, tokenizer, asked, longest, tuple(notes))

    def _rows(
        self, name: str, part: Part, tokenizer: "PreTrainedTokenizerFast"
    ) -> tuple[Rows, tuple[str, ...]]:
        """The rows of a split, and what is to be said of them."""
        language = self._config.language
        if isinstance(part, str):
            encoded = encode_text(part, tokenizer, language.max_length, name)
            training = name == "train"
            most = language.max_train_examples if training else language.max_eval_examples
            encoded, notes = sample(encoded, most, name, language.split_seed)
            return single_rows(encoded, language.max_length), notes
        encoded, notes = encode_examples(part, tokenizer, language.max_length, name)
        if not language.packing:
            return single_rows(encoded, language.max_length), notes
        rows = packed_rows(encoded, language.max_length, language.split_seed)
        return rows, (*notes, *describe(rows, name))


@dataclass(frozen=True)
class Language:
    """Rows of tokens; see `train.tasks.task.Workload`.

    Attributes:
        config: The settings of the run.
        parts: The rows of each split.
        tokenizer: The model's.
        asked: The examples of a split that answers are generated to.
        longest: Tokens that the prompts of these can have.
        notes: Sentences on the splits, on what was cut and left out, and on packing.
    """

    config: Config
    parts: Mapping[str, Rows]
    tokenizer: "PreTrainedTokenizerFast"
    asked: Mapping[str, tuple[Exchange, ...]]
    longest: int
    notes: tuple[str, ...]

    unit = "tokens"

    @property
    def generation(self) -> dict[str, Any] | None:
        """Settings of generation, if there is any."""
        return _sampling(self.config.language).settings(self.tokenizer) if self.asked else None

    @property
    def splits(self) -> tuple[str, ...]:
        """The names of the splits that there are."""
        return tuple(self.parts)

    @property
    def compared(self) -> tuple[str, ...]:
        """The split that is reported on, and the further ones."""
        return ("test" if "test" in self.parts else "validation", *self.config.language.others)

    def train_batches(self, seed: int, epoch: int) -> Batches:
        """The batches of one pass, shuffled by seed and epoch."""
        rng = np.random.default_rng([seed, epoch])
        return self.parts["train"].batches(self.config.optim.batch_size, rng)

    def size(self, batch: Batch) -> int:
        """The tokens of a batch."""
        return int(batch["attention_mask"].sum())

    def inputs(self, batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """The batch as it is."""
        return dict(batch)

    def losses(
        self, logits: jax.Array, batch: Mapping[str, jax.Array]
    ) -> tuple[jax.Array, jax.Array]:
        """See `train.tasks.language.objective.losses`."""
        return objective.losses(logits, batch)

    def rows(self, logits: jax.Array, batch: Mapping[str, jax.Array]) -> jax.Array:
        """See `train.tasks.language.objective.rows`."""
        return objective.rows(logits, batch)

    def evaluate(self, split: str, runner: Runner) -> Evaluation:
        """See `objective.evaluate`; with generated answers where these are asked for."""
        size = self.config.optim.eval_batch_size
        measured = runner.predict_all(self.parts[split].batches(size), split)
        evaluation = objective.evaluate(measured)
        if split not in self.asked:
            return evaluation
        answered = answer_all(
            self.asked[split], runner, self.tokenizer, size, self.longest, self.config.run.seed
        )
        metrics = evaluation.metrics | answered.metrics(_has_numbers(self.config.language))
        return Evaluation(metrics, evaluation.loss, answered.save)


def _check_apart(model: "FlaxPreTrainedModel") -> None:
    """Refuses a model that cannot keep the examples of a row apart, before anything is compiled."""
    run, ids = cf.linen.keep_apart(model), jnp.zeros((1, 2), jnp.int32)
    jax.eval_shape(lambda params: run(ids, params=params, segment_ids=ids), model.params_shape_tree)


def _sampling(language: LanguageConfig) -> Sampling:
    return Sampling(language.max_new_tokens, language.temperature, language.top_p)


def _has_numbers(language: LanguageConfig) -> bool:
    """Whether answers are generated that come to numbers."""
    return language.format == "gsm8k" and language.generate > 0


def check_tokenizer(tokenizer: "PreTrainedTokenizerFast", model: "FlaxPreTrainedModel") -> None:
    """Refuses a tokenizer that does not fit.

    Args:
        tokenizer: The tokenizer.
        model: The model that its tokens are for.

    Raises:
        DataError: If it is not a fast one, or has tokens that the model has no embedding for.
    """
    if not tokenizer.is_fast:
        raise DataError(
            f"`{type(tokenizer).__name__}` is not a fast tokenizer; a tokenizer.json is needed"
        )
    if len(tokenizer) > model.config.vocab_size:
        raise DataError(
            f"the tokenizer has {len(tokenizer)} tokens, but the model's `vocab_size` is "
            f"{model.config.vocab_size}"
        )
