"""Examples from files and the Hub, tokens, and batches of few shapes."""

import gzip
import lzma

import datasets
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from train import glue
from train.config import DataConfig
from train.tasks.batches import plan
from train.tasks.records import DataError
from train.tasks.text import Encoded, Split, epoch_batches, load_splits, tokenize

ROWS = "text\tlabel\n" + "".join(f"sentence {i}\t{'ab'[i % 2]}\n" for i in range(20))


def _load(tmp_path, content: str | bytes, name: str = "train.tsv", **settings):
    content = content.encode() if isinstance(content, str) else content
    (tmp_path / name).write_bytes(content)
    return load_splits(DataConfig(train=name, root=str(tmp_path), **settings))


class TestFiles:
    def test_validation_is_held_out_by_class(self, tmp_path):
        splits = _load(tmp_path, ROWS, validation_fraction=0.2)
        assert (len(splits.train), len(splits.validation), splits.test) == (16, 4, None)
        assert np.bincount(splits.validation.labels).tolist() == [2, 2]
        assert splits.label_names == ("a", "b")
        assert not set(splits.train.text) & set(splits.validation.text)
        assert splits.notes == (
            "validation: 4 of 20 training examples held out (split seed 0)",
            "test: no test split given, so no test result is reported",
        )
        assert _load(tmp_path, ROWS, validation_fraction=0.2).train.text == splits.train.text
        other = _load(tmp_path, ROWS, validation_fraction=0.2, split_seed=1)
        assert other.train.text != splits.train.text

    def test_given_splits_are_kept(self, tmp_path):
        (tmp_path / "dev.tsv").write_text("label\ttext\nb\tone\n")
        splits = _load(tmp_path, ROWS, validation="dev.tsv", test="dev.tsv")
        assert (len(splits.train), splits.notes) == (20, ())
        assert splits.validation.text == splits.test.text == ("one",)
        assert splits.validation.labels.tolist() == [1]

    @pytest.mark.parametrize(
        ("name", "compress"), [("t.tsv.gz", gzip.compress), ("t.tsv.xz", lzma.compress)]
    )
    def test_compressed(self, tmp_path, name, compress):
        assert len(_load(tmp_path, compress(ROWS.encode()), name).train) == 18

    def test_tsv_has_no_quoting_and_may_begin_with_a_mark(self, tmp_path):
        content = "\ufefftext\tlabel\r\n" + '" he said\ta\r\nshe "said\tb\r\n\r\n' * 10
        splits = _load(tmp_path, content)
        assert set(splits.train.text) == {'" he said', 'she "said'}

    def test_csv_is_quoted(self, tmp_path):
        content = "text,label\n" + '"one, ""two""\nthree",a\nfour,b\n' * 10
        splits = _load(tmp_path, content, "train.csv")
        assert set(splits.train.text) == {'one, "two"\nthree', "four"}

    def test_jsonl_pairs(self, tmp_path):
        content = '{"p": "x", "q": "y", "n": 1}\n{"p": "z", "q": "w", "n": 0}\n\n' * 10
        splits = _load(tmp_path, content, "t.jsonl", text="p", text_pair="q", label="n")
        assert splits.label_names == ("0", "1")
        assert set(zip(splits.train.text, splits.train.text_pair, strict=True)) == {
            ("x", "y"),
            ("z", "w"),
        }

    def test_files_without_header(self, tmp_path):
        splits = _load(tmp_path, "0\tone\n1\ttwo\n" * 10, columns=("label", "text"))
        assert len(splits.train) == 18

    def test_regression(self, tmp_path):
        content = "text\tlabel\n" + "one\t1.5\ntwo\t3\n" * 5
        splits = _load(tmp_path, content, regression=True)
        assert splits.label_names == ()
        assert splits.train.labels.dtype == np.float32
        assert set(splits.train.labels.tolist()) == {1.5, 3.0}

    def test_classes_that_are_numbers_keep_their_order(self, tmp_path):
        content = "text\tlabel\n" + "".join(f"x\t{i % 11}\n" for i in range(220))
        assert _load(tmp_path, content).label_names == tuple(map(str, range(11)))

    def test_given_classes_keep_their_order(self, tmp_path):
        splits = _load(tmp_path, ROWS, labels=("b", "a"))
        assert splits.label_names == ("b", "a")
        assert splits.train.labels[splits.train.text.index("sentence 1")] == 0

    def test_part_of_the_training_examples(self, tmp_path):
        whole, part = _load(tmp_path, ROWS), _load(tmp_path, ROWS, max_train_examples=5)
        assert len(part.train) == 5
        assert set(part.train.text) < set(whole.train.text)
        assert part.validation.text == whole.validation.text
        assert "training: 5 of 18 examples, at random" in part.notes

    def test_part_of_the_other_examples(self, tmp_path):
        (tmp_path / "dev.tsv").write_text(ROWS)
        splits = _load(tmp_path, ROWS, test="dev.tsv", max_eval_examples=1)
        assert (len(splits.train), len(splits.validation), len(splits.test)) == (18, 1, 1)
        assert "test: 1 of 20 examples, at random" in splits.notes

    def test_a_test_split_can_be_held_out(self, tmp_path):
        splits = _load(tmp_path, ROWS, test_fraction=0.5, validation_fraction=0.2)
        assert (len(splits.train), len(splits.validation), len(splits.test)) == (8, 2, 10)
        texts = [set(part.text) for part in (splits.train, splits.validation, splits.test)]
        assert len(set.union(*texts)) == 20
        assert np.bincount(splits.test.labels).tolist() == [5, 5]
        assert splits.notes == (
            "test: 10 of 20 training examples held out (split seed 0)",
            "validation: 2 of 10 training examples held out (split seed 0)",
        )

    @pytest.mark.parametrize("split", ["validation", "test"])
    def test_labels_that_the_training_split_lacks(self, tmp_path, split):
        (tmp_path / "dev.tsv").write_text("text\tlabel\nx\ta\ny\tc\n")
        with pytest.raises(DataError, match=r"dev\.tsv`, line 3: label 'c' is none of the classes"):
            _load(tmp_path, ROWS, **{split: "dev.tsv"})

    @pytest.mark.parametrize(
        ("content", "name", "settings", "message"),
        [
            (ROWS, "t.bin", {}, "must end in .tsv, .txt, .csv, .jsonl, and may add .gz or .xz"),
            ("", "t.tsv", {}, "holds no examples"),
            ("text\tlabel\n", "t.tsv", {}, "holds no examples"),
            (ROWS, "t.tsv", {"text": "foo"}, "line 2: no column `foo`; there are text, label"),
            (ROWS + "alone\n", "t.tsv", {}, "line 22: 1 fields, but there are 2 columns"),
            (ROWS + "a\tb\tc\n", "t.tsv", {}, "line 22: 3 fields, but there are 2 columns"),
            (
                ROWS,
                "t.tsv",
                {"labels": ("a", "c")},
                "line 3: label 'b' is none of the classes a, c",
            ),
            (ROWS, "t.tsv", {"regression": True}, "line 2: label 'a' is not a number"),
            ("text\tlabel\nx\tnan\n", "t.tsv", {"regression": True}, "'nan' is not a number"),
            ("text\tlabel\nx\ta\n", "t.tsv", {}, "holds only the label 'a'"),
            (ROWS + "x\tc\n", "t.tsv", {}, "class 'c' has one example; give `data.validation`"),
            ("text\tlabel\nx\ta\ny\tb\n" * 1, "t.tsv", {}, "class 'a' has one example"),
            (b"text\tlabel\n\xff\ta\n", "t.tsv", {}, "is not UTF-8 text"),
            (b"nonsense", "t.tsv.gz", {}, "cannot read"),
            (b"nonsense", "t.tsv.xz", {}, "cannot read"),
            ('text,label\n"open,a\n', "t.csv", {}, "t.csv`, line 2: unexpected end of data"),
            ("{\n", "t.jsonl", {}, "line 1: not JSON"),
            ("[]\n", "t.jsonl", {}, "line 1: must be a JSON object"),
            ('{"text": null, "label": 1}\n', "t.jsonl", {}, "`text` must be text or a number"),
        ],
    )
    def test_refusals(self, tmp_path, content, name, settings, message):
        with pytest.raises(DataError) as error:
            _load(tmp_path, content, name, **settings)
        assert message in str(error.value)
        assert "\n" not in str(error.value)

    def test_missing_file(self, tmp_path):
        with pytest.raises(DataError, match="No such file"):
            load_splits(DataConfig(train="no.tsv", root=str(tmp_path)))


def test_docstrings_need_no_file():
    splits = load_splits(DataConfig(task="docstrings", max_train_examples=30))
    assert (len(splits.train), len(splits.label_names)) == (30, 20)
    assert not set(splits.train.text) & set(splits.test.text)
    assert len(splits.test) > len(splits.validation) > 150


class TestGlue:
    @pytest.fixture
    def hub(self, monkeypatch):
        """Stands in for the Hub with the datasets given to it, by name of the split."""
        loaded = {}

        def load_dataset(name, task):
            assert name == "nyu-mll/glue"
            return datasets.DatasetDict(
                {split: datasets.Dataset.from_dict(c) for split, c in loaded[task].items()}
            )

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        return loaded

    @staticmethod
    def _columns(task: glue.GlueTask, count: int) -> dict:
        classes = len(task.labels)
        labels = [i % classes if classes else i / 10 for i in range(count)]
        columns = {task.text: [f"first {i}" for i in range(count)], "label": labels}
        if task.text_pair is not None:
            columns[task.text_pair] = [f"second {i}" for i in range(count)]
        return columns

    @pytest.mark.parametrize("name", glue.TASKS)
    def test_every_task(self, hub, name):
        task = glue.TASKS[name]
        hub[name] = {"train": self._columns(task, 40), task.validation: self._columns(task, 6)}
        splits = load_splits(DataConfig(task=name))
        assert (len(splits.train), len(splits.validation), len(splits.test)) == (36, 4, 6)
        assert splits.label_names == task.labels
        assert (splits.train.text_pair is None) == (task.text_pair is None)
        assert splits.train.labels.dtype == (np.int32 if task.labels else np.float32)
        assert "official test labels are hidden" in splits.notes[0]

    def test_hidden_labels_are_refused(self, hub):
        hub["sst2"] = {
            "train": {"sentence": ["x"], "label": [-1]},
            "validation": {"sentence": ["x"], "label": [0]},
        }
        with pytest.raises(DataError, match="labels from -1 to -1, but there are 2 classes"):
            load_splits(DataConfig(task="sst2"))

    def test_no_connection(self, monkeypatch):
        def load_dataset(*_):
            raise ConnectionError("no route\nto the Hub")

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        with pytest.raises(
            DataError, match="cannot load GLUE task `rte` from the Hub: no route to"
        ):
            load_splits(DataConfig(task="rte"))


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {t: i for i, t in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "b", "c"])}
    backend = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="[PAD]",
        unk_token="[UNK]",
        model_max_length=64,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


class TestTokenize:
    def test_pairs_keep_their_segments(self, tokenizer):
        split = Split(("a b", "c"), ("c", "a a"), np.array([0, 1], np.int32))
        encoded = tokenize(split, tokenizer, 16)
        assert encoded.input_ids.tolist() == [2, 4, 5, 3, 6, 3, 2, 6, 3, 4, 4, 3]
        assert encoded.token_type_ids.tolist() == [0, 0, 0, 0, 1, 1, 0, 0, 0, 1, 1, 1]
        assert encoded.lengths.tolist() == [6, 6]
        assert (encoded.truncated, encoded.pad_id) == (0, 0)

    @pytest.mark.parametrize("pair", [None, ("b", "b b b b b", "b")])
    def test_truncation_is_counted(self, tokenizer, pair):
        split = Split(("a", "a a a a a a", "a a a a a a"), pair, np.zeros(3, np.int32))
        encoded = tokenize(split, tokenizer, 7)
        assert encoded.truncated == 2
        assert encoded.lengths.max() == 7

    def test_many_examples(self, tokenizer):
        split = Split(tuple("a " * (i % 5) for i in range(2500)), None, np.zeros(2500, np.int32))
        assert tokenize(split, tokenizer, 8).lengths.tolist() == [i % 5 + 2 for i in range(2500)]

    def test_refusals(self, tokenizer):
        split = Split(("a", ""), None, np.zeros(2, np.int32))
        with pytest.raises(DataError, match="100 exceeds the 64 tokens"):
            tokenize(split, tokenizer, 100)
        bare = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordPiece({"a": 0})))
        with pytest.raises(DataError, match="example 2 has no tokens"):
            tokenize(split, bare, 8)


def _encoded(lengths: list[int]) -> Encoded:
    """Examples that hold their own number in every token."""
    return Encoded(
        input_ids=np.repeat(np.arange(1, len(lengths) + 1, dtype=np.int32), lengths),
        token_type_ids=np.ones(sum(lengths), np.int32),
        offsets=np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]),
        labels=np.arange(len(lengths), dtype=np.int32),
        pad_id=0,
        truncated=0,
    )


BUCKETS = (4, 8, 16)
some_lengths = st.lists(st.integers(1, BUCKETS[-1]), min_size=1, max_size=60)


class TestBatches:
    @settings(max_examples=60, deadline=None)
    @given(some_lengths, st.integers(1, 7), st.integers(0, 3), st.booleans())
    def test_every_example_once_in_few_shapes(self, lengths, batch_size, epoch, shuffle):
        encoded = _encoded(lengths)
        batches = epoch_batches(
            encoded, batch_size=batch_size, buckets=BUCKETS, seed=1, epoch=epoch, shuffle=shuffle
        )
        assert len(batches) == -(-len(lengths) // batch_size)
        seen = []
        for number, batch in enumerate(batches):
            real = batch["weights"] == 1
            assert real.all() or number == len(batches) - 1
            assert batch["input_ids"].shape == (batch_size, batches.plan[number].length)
            for name in ("input_ids", "attention_mask", "token_type_ids"):
                assert batch[name].dtype == np.int32
                assert batch[name].shape == batch["input_ids"].shape
            for row, mask, label in zip(
                batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True
            ):
                length = lengths[label]
                assert row.tolist() == [label + 1] * length + [0] * (len(row) - length)
                assert mask.tolist() == [1] * length + [0] * (len(row) - length)
            seen += batch["labels"][real].tolist()
        assert sorted(seen) == list(range(len(lengths)))
        assert {planned.length for planned in batches.plan} <= set(BUCKETS)

    @settings(max_examples=30, deadline=None)
    @given(some_lengths, st.integers(1, 7), st.data())
    def test_resuming_gives_the_batches_left(self, lengths, batch_size, data):
        encoded = _encoded(lengths)
        arguments = dict(batch_size=batch_size, buckets=BUCKETS, seed=3, epoch=2)
        whole = list(epoch_batches(encoded, **arguments))
        begin = data.draw(st.integers(0, len(whole)))
        tail = epoch_batches(encoded, **arguments)[begin:]
        assert len(tail) == len(whole) - begin
        for left, right in zip(whole[begin:], tail, strict=True):
            for name in left:
                np.testing.assert_array_equal(left[name], right[name])

    @settings(max_examples=30, deadline=None)
    @given(some_lengths, st.integers(1, 7), st.booleans())
    def test_outputs_return_to_the_order_of_the_examples(self, lengths, batch_size, shuffle):
        batches = epoch_batches(
            _encoded(lengths), batch_size=batch_size, buckets=BUCKETS, shuffle=shuffle
        )
        outputs = [batch["labels"][:, None] * 2.0 for batch in batches]
        expected = np.arange(len(lengths))[:, None] * 2.0
        np.testing.assert_array_equal(batches.in_order(outputs), expected)

    def test_epochs_and_seeds_differ(self):
        encoded = _encoded([3] * 50)
        orders = {
            tuple(
                np.concatenate(
                    [
                        p.indices
                        for p in epoch_batches(
                            encoded, batch_size=4, buckets=BUCKETS, seed=seed, epoch=epoch
                        ).plan
                    ]
                )
            )
            for seed in (0, 1)
            for epoch in (0, 1)
        }
        assert len(orders) == 4

    def test_batches_pad_to_little_more_than_they_need(self):
        batches = plan(np.array([3] * 8 + [12] * 8), 4, BUCKETS)
        assert [planned.length for planned in batches] == [4, 4, 16, 16]

    def test_an_example_longer_than_every_bucket(self):
        with pytest.raises(DataError, match="17 tokens, but the longest bucket is 16"):
            plan(np.array([17]), 4, BUCKETS)
