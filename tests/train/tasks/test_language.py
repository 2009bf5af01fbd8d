"""Texts and answers from files and the Hub, their tokens, and packed rows."""

import gzip
import json
import lzma

import datasets
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.train.tasks.language import BOS, EOS, TEMPLATE, make_tokenizer
from train.config import ConfigError, LanguageConfig
from train.tasks.language.formats import Conversation, Examples, Question
from train.tasks.language.rows import pack, packed_rows, single_rows
from train.tasks.language.source import load_parts
from train.tasks.language.tokens import Encoded, encode_examples, encode_text
from train.tasks.records import DataError

QUESTIONS = [{"question": f"{i}+1?", "answer": str(i + 1)} for i in range(20)]
CHAT = [
    {"role": "system", "content": "S"},
    {"role": "user", "content": "U1"},
    {"role": "assistant", "content": "A1"},
    {"role": "user", "content": "U2"},
    {"role": "assistant", "content": "A2"},
]


def load(tmp_path, content, name: str | None = None, **options):
    name = name or ("train.txt" if isinstance(content, str) else "train.json")
    content = content if isinstance(content, str | bytes) else json.dumps(content)
    (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return load_parts(LanguageConfig(train=name, root=str(tmp_path), **options))


def learnt(encoded: Encoded, index: int = 0) -> str:
    """What is learnt of an example, as text."""
    ids, chosen = encoded.row(index)
    return make_tokenizer().decode(ids[chosen])


class TestText:
    def test_the_end_is_held_out(self, tmp_path):
        text = "".join(f"line {i}\n" for i in range(100))
        parts, notes = load(tmp_path, text, validation_fraction=0.1, test_fraction=0.2)
        assert parts["train"] + parts["validation"] + parts["test"] == text
        assert [len(parts[name]) for name in parts] == [569, 158, 63]
        assert notes == (
            "test: the last 158 of 790 characters of the training text held out",
            "validation: the last 63 of 632 characters of the training text held out",
        )

    def test_given_splits_and_others_are_kept(self, tmp_path):
        (tmp_path / "dev.txt").write_text("dev")
        (tmp_path / "old.txt.gz").write_bytes(gzip.compress(b"old"))
        options = {"validation": "dev.txt", "test": "dev.txt", "others": {"past": "old.txt.gz"}}
        parts, notes = load(tmp_path, "text", **options)
        expected = {"train": "text", "validation": "dev", "test": "dev", "past": "old"}
        assert (parts, notes) == (expected, ())

    @pytest.mark.parametrize("bos", [True, False])
    @pytest.mark.parametrize("max_length", [2, 5, 100])
    def test_every_token_is_learnt_once(self, bos, max_length):
        text = "to be or not to be"
        encoded = encode_text(text, make_tokenizer(bos), max_length, "train")
        assert encoded.lengths.max() <= max_length
        rows = range(len(encoded))
        assert "".join(learnt(encoded, i) for i in rows) == (text if bos else text[1:])
        for i in rows:
            ids, chosen = encoded.row(i)
            assert not chosen[0] and chosen[1:].all()
            assert (ids[0] == BOS) == bos
        assert encoded.lengths[:-1].tolist() == [max_length] * (len(encoded) - 1)

    def test_one_token_is_too_few(self):
        with pytest.raises(DataError, match="test: the text has 1 tokens, which leaves none"):
            encode_text("a", make_tokenizer(bos=False), 8, "test")


class TestFormats:
    def test_alpaca_with_and_without_input(self, tmp_path):
        records = [
            {"instruction": "Add.", "input": "1 2", "output": "3"},
            {"instruction": "Greet.", "input": "", "output": "Hi"},
            {"instruction": "Stop.", "output": "."},
        ]
        parts, _ = load(tmp_path, records, format="alpaca", validation="train.json")
        with_input, empty, without = parts["train"].items
        assert with_input == Question(
            "### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n", "3"
        )
        assert empty == Question("### Instruction:\nGreet.\n\n### Response:\n", "Hi")
        assert without.prompt == "### Instruction:\nStop.\n\n### Response:\n"

    def test_a_prompt_of_ones_own(self, tmp_path):
        records = [
            {"instruction": "Add.", "input": "1 2", "output": "3", "kind": "sum"},
            {"instruction": "Greet.", "output": "Hi", "kind": "talk"},
        ]
        options = {"format": "alpaca", "validation": "train.json"}
        prompt = "{{{kind}}} {instruction}|{input}: "
        parts, _ = load(tmp_path, records, prompt=prompt, **options)
        assert [q.prompt for q in parts["train"].items] == ["{sum} Add.|1 2: ", "{talk} Greet.|: "]
        with pytest.raises(
            DataError, match=r"line 1: there is an `input`, which `language\.prompt`"
        ):
            load(tmp_path, records, prompt="{instruction}", **options)

    @pytest.mark.parametrize(
        ("name", "content"),
        [
            ("t.json", json.dumps(QUESTIONS).encode()),
            ("t.jsonl.gz", gzip.compress("\n".join(map(json.dumps, QUESTIONS)).encode())),
            ("t.jsonl.xz", lzma.compress("\n".join(map(json.dumps, QUESTIONS)).encode())),
        ],
    )
    def test_gsm8k(self, tmp_path, name, content):
        parts, notes = load(tmp_path, content, name, format="gsm8k", max_train_examples=5)
        assert {name: len(part) for name, part in parts.items()} == {"train": 5, "validation": 2}
        assert notes[0] == "validation: 2 of 20 training examples held out (split seed 0)"
        assert "training: 5 of 18 examples, at random" in notes
        for question in (*parts["train"].items, *parts["validation"].items):
            number = int(question.answer) - 1
            assert question.prompt == f"Question: {number}+1?\nAnswer:\n"

    def test_parts_of_others(self, tmp_path):
        options = {"validation": "train.json", "others": {"more": "train.json"}}
        parts, notes = load(tmp_path, QUESTIONS, format="gsm8k", max_eval_examples=3, **options)
        assert (len(parts["train"]), len(parts["validation"]), len(parts["more"])) == (20, 3, 3)
        assert notes[-1] == "more: 3 of 20 examples, at random"

    def test_chat(self, tmp_path):
        parts, _ = load(tmp_path, [{"messages": CHAT}], format="chat", validation="train.json")
        (conversation,) = parts["train"].items
        assert list(conversation.messages) == CHAT
        assert conversation.place.endswith("train.json`, line 1")

    @pytest.mark.parametrize(
        ("records", "options", "message"),
        [
            ([{"question": "x"}], {}, "line 1: no column `answer`; there are question"),
            ([{"question": "x", "answer": 3}], {}, "line 1: `answer` must be text, not 3"),
            ([{"question": None, "answer": "x"}], {}, "`question` must be text, not None"),
            ([{"output": "x"}], {"format": "alpaca"}, "no column `instruction`"),
            (
                [{"instruction": "x", "input": 3, "output": "x"}],
                {"format": "alpaca"},
                "`input` must be text, not 3",
            ),
            (QUESTIONS, {"prompt": "{q}"}, "no column `q`; there are question, answer"),
            (QUESTIONS, {"prompt": "{answer}"}, "names `answer`, which is the answer to learn"),
            (QUESTIONS, {"prompt": "none"}, "`language.prompt` names no field"),
            (QUESTIONS, {"prompt": "{question"}, "`language.prompt` cannot be read: expected '}'"),
            (QUESTIONS, {"prompt": "{}"}, "the name of a field between braces, not ''"),
            (QUESTIONS, {"prompt": "{question.x}"}, "between braces, not 'question.x'"),
            (QUESTIONS, {"prompt": "{question!r}"}, "not 'question' with a format"),
            ([{"text": "x"}], {"format": "chat"}, "no column `messages`"),
            ([{"messages": []}], {"format": "chat"}, "`messages` must be a list of messages"),
            (
                [{"messages": [*CHAT, {"role": "user"}]}],
                {"format": "chat"},
                "line 1: message 6 must have a `content` that is text",
            ),
            ([], {}, "holds no examples"),
            ("{", {}, "must end in .json, .jsonl"),
            (QUESTIONS, {"format": "text"}, "must end in .txt"),
        ],
    )
    def test_refusals(self, tmp_path, records, options, message):
        with pytest.raises(DataError) as error:
            load(tmp_path, records, **{"format": "gsm8k", **options})
        assert message in str(error.value)
        assert "\n" not in str(error.value)

    def test_a_further_file_has_a_name_of_its_own(self):
        with pytest.raises(ConfigError, match=r"`language\.others` has a file 'test'"):
            LanguageConfig(train="a.txt", others={"test": "b.txt"})


class TestHub:
    @pytest.fixture
    def hub(self, monkeypatch):
        """Stands in for the Hub with the rows given to it, by name of the split."""
        loaded = {}

        def load_dataset(name, subset):
            assert (name, subset) == ("openai/gsm8k", "main")
            return datasets.DatasetDict(
                {split: datasets.Dataset.from_list(rows) for split, rows in loaded.items()}
            )

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        return loaded

    @staticmethod
    def _load(**options):
        return load_parts(LanguageConfig(dataset="openai/gsm8k", subset="main", **options))[0]

    def test_examples(self, hub):
        hub |= {"train": QUESTIONS, "test": QUESTIONS[:3]}
        parts = self._load(format="gsm8k")
        assert {name: len(part) for name, part in parts.items()} == {
            "train": 18,
            "validation": 2,
            "test": 3,
        }

    def test_texts(self, hub):
        hub |= {"train": [{"text": "a\n"}, {"text": "b"}], "validation": [{"text": "c"}]}
        assert self._load() == {"train": "a\nb\n", "validation": "c\n"}

    def test_refusals(self, hub, monkeypatch):
        hub["test"] = QUESTIONS
        with pytest.raises(DataError, match="no split `train`; there are test"):
            self._load(format="gsm8k")
        hub["train"] = QUESTIONS
        with pytest.raises(DataError, match="`openai/gsm8k, train`, line 1: no column `text`"):
            self._load()

        def load_dataset(*_):
            raise ConnectionError("no route\nto the Hub")

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        with pytest.raises(DataError, match="cannot load `openai/gsm8k`, `main`, from the Hub: no"):
            self._load()


class TestAnswers:
    @pytest.mark.parametrize("bos", [True, False])
    def test_the_answer_and_eos_are_learnt(self, bos):
        questions = Examples((Question("2+2=", "4"), Question("Hi", "Ho ho")))
        encoded, notes = encode_examples(questions, make_tokenizer(bos), 32, "train")
        assert [learnt(encoded, i) for i in range(2)] == ["4</s>", "Ho ho</s>"]
        assert notes == ()
        text = make_tokenizer().decode(encoded.input_ids)
        assert text == ("<s>2+2=4</s><s>HiHo ho</s>" if bos else "2+2=4</s>HiHo ho</s>")
        for i, question in enumerate(questions.items):
            exchange, (ids, chosen) = encoded.exchanges[i], encoded.row(i)
            assert (exchange.prompt, exchange.answer) == (question.prompt, question.answer)
            assert exchange.prompt_ids.tolist() == ids[~chosen].tolist()

    def test_a_tokenizer_that_ends_texts_does_not_end_prompts(self):
        from tokenizers import processors

        tokenizer = make_tokenizer()
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", BOS), ("</s>", EOS)]
        )
        encoded, _ = encode_examples(Examples((Question("q", "a"),)), tokenizer, 32, "train")
        assert tokenizer.decode(encoded.input_ids) == "<s>qa</s>"

    def test_what_is_cut_and_left_out_is_counted(self):
        pairs = [("ab", "c"), ("ab", "cdefgh"), ("abcdefg", "x"), ("abcdef", "xy"), ("a", " \n")]
        questions = Examples(tuple(Question(*pair) for pair in pairs))
        encoded, notes = encode_examples(questions, make_tokenizer(), 8, "train")
        assert [learnt(encoded, i) for i in range(3)] == ["c</s>", "cdefg", "x"]
        assert [exchange.answer for exchange in encoded.exchanges] == ["c", "cdefgh", "xy"]
        assert notes == (
            "train: 2 of 5 examples were cut to 8 tokens",
            "train: 1 of 5 examples were left out, as an answer is empty or missing",
            "train: 1 of 5 examples were left out, as their prompt alone fills 8 tokens",
        )
        with pytest.raises(DataError, match="no example is left to use; train: 1 of 1 examples"):
            encode_examples(questions.take([4]), make_tokenizer(), 8, "train")

    def test_without_an_eos_token(self):
        tokenizer = make_tokenizer(eos_token=None)
        with pytest.raises(DataError, match="no EOS token"):
            encode_examples(Examples((Question("q", "a"),)), tokenizer, 8, "train")


class TestChat:
    @staticmethod
    def _encode(messages, template: str | None = TEMPLATE, max_length: int = 128):
        examples = Examples((Conversation(tuple(messages), "`f.json`, line 7"),))
        tokenizer = make_tokenizer(chat_template=template)
        return encode_examples(examples, tokenizer, max_length, "train")

    def test_the_assistants_turns_alone_are_learnt(self):
        encoded, notes = self._encode(CHAT)
        text = make_tokenizer().decode(encoded.input_ids)
        assert text == (
            "<s>[system]S</s>[user]U1</s>[assistant]A1</s>[user]U2</s>[assistant]A2</s>"
        )
        assert learnt(encoded) == "A1</s>A2</s>"
        assert notes == ()
        (exchange,) = encoded.exchanges
        assert exchange.prompt == text.removesuffix("A2</s>")
        assert exchange.answer == "A2"
        count = len(exchange.prompt_ids)
        assert exchange.prompt_ids.tolist() == encoded.input_ids[:count].tolist()
        assert make_tokenizer().decode(exchange.prompt_ids) == exchange.prompt

    def test_a_question_at_the_end_is_not_learnt(self):
        encoded, _ = self._encode(CHAT[:4])
        assert learnt(encoded) == "A1</s>"

    def test_eos_ends_the_last_answer(self):
        template = "{% for m in messages %}\n{{ m.role }}: {{ m.content }}{% endfor %}"
        ask = "{% if add_generation_prompt %}\nassistant: {% endif %}"
        encoded, _ = self._encode(CHAT, template + ask)
        assert learnt(encoded) == "A1A2</s>"
        encoded, _ = self._encode(CHAT[:4], template + ask)
        assert learnt(encoded) == "A1"

    @pytest.mark.parametrize(
        "messages", [CHAT[:2], [*CHAT[:2], {"role": "assistant", "content": " "}]]
    )
    def test_no_answer(self, messages):
        with pytest.raises(DataError, match="left out, as an answer is empty or missing"):
            self._encode(messages)

    def test_a_long_conversation_loses_its_end(self):
        encoded, notes = self._encode(CHAT, max_length=40)
        assert learnt(encoded) == "A1</s>"
        assert notes == ("train: 1 of 1 examples were cut to 40 tokens",)

    @pytest.mark.parametrize(
        ("template", "message"),
        [
            (None, "the tokenizer has no chat template"),
            (
                "{% for m in messages %}{{ m.role if loop.last }}{{ m.content }}{% endfor %}",
                "`f.json`, line 7: the chat template writes the first messages otherwise",
            ),
            (
                "{{ raise_exception('no system') if messages[0].role == 'system' }}",
                "`f.json`, line 7: the chat template refuses the messages: no system",
            ),
        ],
    )
    def test_templates_that_do_not_serve(self, template, message):
        with pytest.raises(DataError) as error:
            self._encode(CHAT, template)
        assert message in str(error.value)
        assert "\n" not in str(error.value)


def some(lengths) -> Encoded:
    """Examples of these lengths; tokens are all different, and the last half is learnt."""
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    learnt = np.concatenate([np.arange(n) >= max(n // 2, 1) for n in lengths])
    return Encoded(np.arange(1, offsets[-1] + 1, dtype=np.int32), learnt, offsets)


some_lengths = st.lists(st.integers(2, 16), min_size=1, max_size=40)


class TestRows:
    @settings(max_examples=50, deadline=None)
    @given(some_lengths, st.integers(0, 3))
    def test_packs_hold_every_example_once_and_fit(self, lengths, seed):
        packs = pack(np.asarray(lengths), 16, seed)
        assert sorted(example for row in packs for example in row) == list(range(len(lengths)))
        sizes = sorted(sum(lengths[example] for example in row) for row in packs)
        assert sizes[-1] <= 16
        # No two rows fit into one.
        assert len(sizes) == 1 or sizes[0] + sizes[1] > 16
        assert packs == pack(np.asarray(lengths), 16, seed)

    def test_by_hand(self):
        ids = np.array([5, 6, 7, 8, 9], np.int32)
        learnt = np.array([False, True, False, True, True])
        rows = packed_rows(Encoded(ids, learnt, np.array([0, 2, 5])), 6, seed=0)
        (batch,) = rows.batches(2)
        expected = {
            "input_ids": [7, 8, 9, 5, 6, 0],
            "attention_mask": [1, 1, 1, 1, 1, 0],
            "position_ids": [0, 1, 2, 0, 1, 0],
            "segment_ids": [1, 1, 1, 2, 2, 0],
            "targets": [8, 9, 0, 6, 0, 0],
            "target_weights": [1.0, 1.0, 0.0, 1.0, 0.0, 0.0],
        }
        assert {name: array[0].tolist() for name, array in batch.items()} == expected
        # The second row fills the batch up and does not count.
        assert batch["input_ids"][1].tolist() == expected["input_ids"]
        assert not batch["target_weights"][1].any()
        kinds = {name: array.dtype for name, array in batch.items()}
        assert kinds.pop("target_weights") == np.float32
        assert set(kinds.values()) == {np.dtype(np.int32)}

    @settings(max_examples=50, deadline=None)
    @given(some_lengths, st.integers(1, 5), st.booleans(), st.integers(0, 3))
    def test_batches_hold_every_target_once(self, lengths, batch_size, packed, epoch):
        encoded = some(lengths)
        rows = packed_rows(encoded, 16, 0) if packed else single_rows(encoded, 16)
        batches = rows.batches(batch_size, np.random.default_rng([1, epoch]))
        assert len(batches) == len(rows.batches(batch_size)) == -(-len(rows) // batch_size)
        assert packed or len(rows) == len(encoded)
        seen = []
        for batch in batches:
            assert ("segment_ids" in batch) == packed
            counts = batch["target_weights"] == 1
            assert counts.any()
            seen += batch["targets"][counts].tolist()
            # Tokens follow each other, so the target is the next one.
            np.testing.assert_array_equal(batch["targets"][counts], batch["input_ids"][counts] + 1)
        assert sorted(seen) == encoded.input_ids[encoded.learnt].tolist()

    def test_single_rows_pad_to_little_more_than_they_need(self):
        rows = single_rows(some([10] * 4 + [40] * 4 + [90] * 4), 100)
        assert [batch["input_ids"].shape for batch in rows.batches(4)] == [
            (4, 32),
            (4, 64),
            (4, 100),
        ]

    @pytest.mark.parametrize("packed", [True, False])
    def test_resuming_gives_the_batches_left(self, packed):
        encoded = some([3, 5, 9, 2, 16, 7, 7, 4, 12] * 3)
        rows = packed_rows(encoded, 16, 0) if packed else single_rows(encoded, 16)
        whole = list(rows.batches(2, np.random.default_rng([3, 1])))
        for begin in range(len(whole) + 1):
            tail = rows.batches(2, np.random.default_rng([3, 1]))[begin:]
            assert len(tail) == len(whole) - begin
            for left, right in zip(whole[begin:], tail, strict=True):
                for name in left:
                    np.testing.assert_array_equal(left[name], right[name])

    def test_epochs_differ(self):
        rows = packed_rows(some([9] * 12), 16, 0)
        first, second = (
            np.concatenate([p.indices for p in rows.batches(4, np.random.default_rng(e)).plan])
            for e in (0, 1)
        )
        assert first.tolist() != second.tolist()
        assert sorted(first) == sorted(second)
