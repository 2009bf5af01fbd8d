"""`python -m train.answer RUN QUESTIONS OUTPUT`: answers to MT-Bench's questions, for its judge."""

import argparse
import json
import os
import sys
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

os.environ.setdefault("USE_TORCH", "0")
os.environ.setdefault("USE_TF", "0")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import jax
import jax.numpy as jnp
from rich.console import Console

import circflax as cf
from train import settings
from train.config import ConfigError
from train.failures import exit_code
from train.generation import Generate, Sampling, answer, longest_prompt
from train.progress import CountProgress, Display
from train.run import CONFIG
from train.steps import make_generate
from train.tasks.language.asking import Ask, make_ask
from train.tasks.records import DataError, field_of, read_records

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# FastChat's temperatures (fastchat/llm_judge/common.py).
TEMPERATURES = {
    "writing": 0.7,
    "roleplay": 0.7,
    "extraction": 0.0,
    "math": 0.0,
    "coding": 0.0,
    "reasoning": 0.0,
    "stem": 0.1,
    "humanities": 0.1,
}
_OTHERS = 0.7


@dataclass(frozen=True)
class Question:
    """A question of one or more turns.

    Attributes:
        number: Its id.
        category: What it is about, which decides the temperature.
        turns: What the user says.
    """

    number: int
    category: str
    turns: tuple[str, ...]


def main(argv: list[str]) -> int:
    """Answers questions with a run's adapters.

    Args:
        argv: Command-line arguments.

    Returns:
        The exit code; see `train.failures.exit_code`.
    """
    parser = argparse.ArgumentParser(prog="python -m train.answer", description=__doc__)
    parser.add_argument("run", type=Path, help="directory of a finished run of a language model")
    parser.add_argument("questions", type=Path, help="MT-Bench's question.jsonl")
    parser.add_argument("output", type=Path, help=".jsonl file; answers that it has are kept")
    parser.add_argument("--model-id", help="name of the model; None is the run's directory")
    parser.add_argument("--max-new-tokens", type=int, default=1024, help="longest answer to a turn")
    parser.add_argument("--temperature", type=float, help="None is FastChat's, by category")
    parser.add_argument("--batch-size", type=int, default=8, help="questions answered at once")
    parser.add_argument("--seed", type=int, default=0, help="seed of sampling")
    options = parser.parse_args(argv)
    return exit_code(lambda: _run(options, Console()), "the same command goes on with what is left")


def read_questions(path: Path) -> list[Question]:
    """Reads questions in MT-Bench's format.

    Args:
        path: A .jsonl file whose objects have ``question_id``, ``category`` and ``turns``.

    Returns:
        The questions.

    Raises:
        DataError: If the file cannot be read, or a question lacks something or is there twice.
    """
    questions: dict[int, Question] = {}
    for line, record in read_records(path, (".jsonl",)):
        names = ("question_id", "category", "turns")
        number, category, turns = (field_of(record, name, path, line) for name in names)
        texts = isinstance(turns, list) and turns and all(isinstance(t, str) and t for t in turns)
        if not isinstance(number, int) or not isinstance(category, str) or not texts:
            raise DataError(
                f"`{path}`, line {line}: `question_id` must be a whole number, `category` text "
                "and `turns` a list of texts"
            )
        if number in questions:
            raise DataError(f"`{path}`, line {line}: question {number} is there twice")
        questions[number] = Question(number, category, tuple(turns))
    return list(questions.values())


def read_answered(path: Path) -> set[int]:
    """Finds the questions that a file of answers has, and drops an answer that was cut off.

    Args:
        path: The file; a missing one has none.

    Returns:
        The questions' ids.

    Raises:
        DataError: If the file holds something else.
    """
    if not path.exists():
        return set()
    text = path.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        path.write_text(whole, encoding="utf-8")
    if not whole.strip():
        return set()
    records = read_records(path, (".jsonl",))
    return {field_of(record, "question_id", path, line) for line, record in records}


def answer_turns(
    questions: Sequence[Question],
    ask: Ask,
    generate: Generate,
    tokenizer: "PreTrainedTokenizerFast",
    longest: int,
    key: jax.Array,
) -> tuple[list[list[str]], int]:
    """Answers questions turn by turn, each turn knowing what was said before.

    Args:
        questions: The questions.
        ask: How a conversation is put to the model.
        generate: The compiled model.
        tokenizer: Turns its tokens into text.
        longest: Tokens that a prompt can have; of a longer one the beginning is cut off.
        key: For sampling.

    Returns:
        The answers to each question's turns, and how many prompts were cut.
    """
    answers: list[list[str]] = [[] for _ in questions]
    cut = 0
    for turn in range(max(len(question.turns) for question in questions)):
        asked = [i for i, question in enumerate(questions) if turn < len(question.turns)]
        prompts = [ask(questions[i].turns[: turn + 1], answers[i]) for i in asked]
        cut += sum(len(prompt) > longest for prompt in prompts)
        texts = answer(
            [prompt[-longest:] for prompt in prompts],
            generate,
            tokenizer,
            batch_size=len(questions),
            longest=longest,
            key=jax.random.fold_in(key, turn),
        )
        for i, text in zip(asked, texts, strict=True):
            answers[i].append(text)
    return answers, cut


def _run(options: argparse.Namespace, console: Console) -> int:
    from transformers import AutoTokenizer

    questions, answered = read_questions(options.questions), read_answered(options.output)
    config = settings.load(["--config", str(options.run / CONFIG)])
    if not config.language.given:
        raise ConfigError(f"`{options.run}` is no run of a language model")
    with Display(console) as display:
        adapted = cf.interop.load_adapted(
            options.run,
            dtype=jnp.dtype(config.model.compute_dtype),
            param_dtype=jnp.dtype(config.model.param_dtype),
            progress=partial(display.track, what="loading the model"),
        )
    tokenizer = AutoTokenizer.from_pretrained(
        cf.interop.find_checkpoint(config.model.name, config.model.revision)
    )
    ask = make_ask(config.language, tokenizer)

    def temperature(question: Question) -> float:
        usual = TEMPERATURES.get(question.category, _OTHERS)
        return usual if options.temperature is None else options.temperature

    def generator(sampling: Sampling) -> Generate:
        choices = sampling.settings(tokenizer)
        compiled = make_generate(adapted.model, adapted.file.plan, choices)
        return partial(compiled, adapted.file.adapters, adapted.params)

    left = sorted((q for q in questions if q.number not in answered), key=temperature)
    name, cut = options.model_id or options.run.resolve().name, 0
    done = len(questions) - len(left)
    with (
        CountProgress("questions answered", len(questions), done, console) as progress,
        options.output.open("a", encoding="utf-8") as file,
    ):
        for heat, group in groupby(left, temperature):
            sampling, same = Sampling(options.max_new_tokens, heat), list(group)
            longest = longest_prompt(adapted.model.config, sampling)
            generate = generator(sampling)
            for start in range(0, len(same), options.batch_size):
                batch = same[start : start + options.batch_size]
                # Whichever questions are left, a question's batch has a key of its own.
                key = jax.random.fold_in(jax.random.key(options.seed), batch[0].number)
                answers, shortened = answer_turns(batch, ask, generate, tokenizer, longest, key)
                _write(file, name, batch, answers)
                progress.advance(len(batch))
                cut += shortened
        progress.say(f"wrote {options.output}")
        if cut:
            progress.say(f"prompts whose beginning was cut off to fit the model: {cut}")
    return 0


def _write(
    file: TextIO, name: str, questions: Sequence[Question], answers: Sequence[Sequence[str]]
) -> None:
    """Adds answers in the format that FastChat's judge reads."""
    for question, turns in zip(questions, answers, strict=True):
        record = {
            "question_id": question.number,
            "answer_id": uuid.uuid4().hex,
            "model_id": name,
            "choices": [{"index": 0, "turns": turns}],
            "tstamp": time.time(),
        }
        file.write(json.dumps(record, ensure_ascii=False) + "\n")
    file.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
