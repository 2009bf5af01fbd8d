"""Answers of a run: exact match as its metric, and a file for MT-Bench's judge."""

import json

import numpy as np
import pytest

from tests.train.tasks.language import BOS, EOS, TEMPLATE, make_tokenizer, write_llama
from train import answer as answering
from train import settings
from train.answer import main, read_answered, read_questions
from train.config import LanguageConfig
from train.run import run
from train.tasks.language.asking import make_ask
from train.tasks.records import DataError

QUESTIONS = [
    {"question_id": 81, "category": "writing", "turns": ["Sing.", "Again."]},
    {"question_id": 82, "category": "math", "turns": ["2+2?", "And 3?"]},
    {"question_id": 83, "category": "else", "turns": ["Hi."]},
]


def _lines(path, records) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A short run on GSM8K's format, with answers generated in each evaluation."""
    directory = tmp_path_factory.mktemp("answers")
    write_llama(directory / "model")
    rng = np.random.default_rng(0)
    sums = [(int(a), int(b)) for a, b in rng.integers(0, 5, (24, 2))]
    _lines(
        directory / "train.jsonl",
        [{"question": f"{a}+{b}?", "answer": f"#### {a + b}"} for a, b in sums],
    )
    options = {
        "model.name": directory / "model",
        "language.root": directory,
        "language.train": "train.jsonl",
        "language.format": "gsm8k",
        "language.prompt": "{question}",
        "language.max_length": 64,
        "language.validation_fraction": 0.25,
        "language.generate": 4,
        "language.max_new_tokens": 8,
        "run.metric": "exact_match",
        "adapter.targets": '["q_proj","v_proj"]',
        "optim.epochs": 1,
        "optim.batch_size": 4,
        "optim.eval_batch_size": 4,
        "run.output": directory / "run",
    }
    arguments = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    return directory / "run", run(settings.load(arguments))


def test_a_run_measures_exact_match_and_leaves_its_answers(finished) -> None:
    directory, summary = finished
    assert summary.metric == "exact_match"
    assert set(summary.validation) == {"perplexity", "token_accuracy", "exact_match"}
    assert "answers.jsonl" in summary.files
    assert "[answers](answers.jsonl)" in (directory / "report.md").read_text()
    records = [json.loads(line) for line in (directory / "answers.jsonl").open()]
    assert len(records) == 4
    for record in records:
        a, b = record["prompt"].removesuffix("?").split("+")
        assert record["reference"] == f"#### {int(a) + int(b)}"
        assert isinstance(record["answer"], str)


@pytest.mark.slow
def test_answers_are_what_the_judge_reads(finished, tmp_path, capsys, monkeypatch) -> None:
    questions, output = tmp_path / "question.jsonl", tmp_path / "answers.jsonl"
    _lines(questions, QUESTIONS)
    command = [str(finished[0]), str(questions), str(output), "--max-new-tokens", "5"]
    assert main([*command, "--model-id", "tiny", "--batch-size", "2"]) == 0
    assert f"wrote {output}" in capsys.readouterr().out.replace("\n", "")
    records = {record["question_id"]: record for record in map(json.loads, output.open())}
    assert set(records) == {81, 82, 83}
    for question in QUESTIONS:
        record = records[question["question_id"]]
        assert set(record) == {"question_id", "answer_id", "model_id", "choices", "tstamp"}
        assert (record["model_id"], isinstance(record["tstamp"], float)) == ("tiny", True)
        (choice,) = record["choices"]
        assert choice["index"] == 0 and len(choice["turns"]) == len(question["turns"])
        assert all(isinstance(turn, str) for turn in choice["turns"])
    assert len({record["answer_id"] for record in records.values()}) == 3

    # What is cut off is answered again, what is whole is kept.
    lines = output.read_text().splitlines(keepends=True)
    output.write_text("".join(lines[:2]) + lines[2][:30])
    asked = []
    monkeypatch.setattr(
        answering,
        "answer_turns",
        lambda batch, *_: (asked.extend(q.number for q in batch), [["again"] for _ in batch], 1)[
            1:
        ],
    )
    assert main(command) == 0
    assert asked == [json.loads(lines[2])["question_id"]]
    assert output.read_text().splitlines(keepends=True)[:2] == lines[:2]
    assert "prompts whose beginning was cut off to fit the model: 1" in capsys.readouterr().out


def test_what_is_asked_is_what_was_learnt() -> None:
    tokenizer = make_tokenizer()
    config = LanguageConfig(train="x.json", format="alpaca", prompt="Q:{instruction}\n")
    ids = make_ask(config, tokenizer)(["one", "two"], ["1"])
    assert ids.tolist()[0] == BOS and ids.dtype == np.int32
    assert tokenizer.decode(ids) == "<s>Q:one\n1</s>Q:two\n"
    assert ids.tolist().count(EOS) == 1
    usual = make_ask(LanguageConfig(train="x.json", format="alpaca"), tokenizer)
    assert "Input" not in tokenizer.decode(usual(["one"], []))
    chat = make_ask(
        LanguageConfig(train="x.json", format="chat"), make_tokenizer(chat_template=TEMPLATE)
    )
    said = tokenizer.decode(chat(["one", "two"], ["1"]))
    assert said == "<s>[user]one</s>[assistant]1</s>[user]two</s>[assistant]"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LanguageConfig(train="x.txt"), "the format text has no questions to answer"),
        (
            LanguageConfig(train="x.json", format="alpaca", prompt="{instruction} {input}"),
            "`language.prompt` has input, instruction, and so cannot be put a question alone",
        ),
        (LanguageConfig(train="x.json", format="chat"), "the tokenizer has no chat template"),
    ],
)
def test_formats_that_cannot_be_asked(config, message) -> None:
    with pytest.raises(DataError) as error:
        make_ask(config, make_tokenizer())
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"question_id": "81"}, "line 1: `question_id` must be a whole number"),
        ({"turns": []}, "`turns` a list of texts"),
        ({"turns": None}, "`turns` a list of texts"),
        ({"question_id": 82}, "line 2: question 82 is there twice"),
    ],
)
def test_questions_that_do_not_fit(tmp_path, change, message) -> None:
    path = tmp_path / "question.jsonl"
    _lines(path, [QUESTIONS[0] | change, *QUESTIONS[1:]])
    with pytest.raises(DataError) as error:
        read_questions(path)
    assert message in str(error.value)


def test_files_that_hold_no_answers(tmp_path) -> None:
    assert read_answered(tmp_path / "none.jsonl") == set()
    (tmp_path / "cut.jsonl").write_text('{"question_id": 8')
    assert read_answered(tmp_path / "cut.jsonl") == set()
    assert (tmp_path / "cut.jsonl").read_text() == ""
    (tmp_path / "other.jsonl").write_text('{"a": 1}\n')
    with pytest.raises(DataError, match="no column `question_id`"):
        read_answered(tmp_path / "other.jsonl")


def test_a_run_without_a_language_model_is_refused(tmp_path, capsys) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("model: {name: m}\ndata: {task: rte}\n")
    _lines(tmp_path / "q.jsonl", QUESTIONS)
    assert main([str(tmp_path / "run"), str(tmp_path / "q.jsonl"), str(tmp_path / "a.jsonl")]) == 2
    assert "is no run of a language model" in capsys.readouterr().err
