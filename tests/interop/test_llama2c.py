"""llama2.c: what is converted computes and tokenizes as llama2.c's own code, written out here."""

import os
import struct
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest

from circflax.cli import main
from circflax.interop import convert_llama2c, load_model
from circflax.interop._llama2c import Header

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

Pieces = list[tuple[float, bytes]]
# Characters first, then what they merge to, best last in the list: the order of scores is not
# that of the ids.
ORDINARY = (" ", "a", "b", "c", "<", "s", ">", "é", "…", " a", "bc", "ab", "abc", " ab", "é…", "ca")
PIECES: Pieces = [
    *((0.0, piece) for piece in (b"<unk>", b"\n<s>\n", b"\n</s>\n")),
    *((0.0, f"<0x{byte:02X}>".encode()) for byte in range(256)),
    *((float(i - 40), piece.encode()) for i, piece in enumerate(ORDINARY)),
]
TEXTS = [
    "",
    " ",
    "abc abcab",
    "  cab  ab",
    "ab\nca\tb",
    "é…é a猫 🙂b",
    "xyz",
    "a<s>b</s><0x0A>",
]


def header(tied: bool = True, **changes: int) -> Header:
    sizes = dict(dim=16, hidden_dim=20, n_layers=2, n_heads=4, n_kv_heads=2, seq_len=12)
    return Header(**(sizes | {"vocab_size": len(PIECES)} | changes), tied=tied)


def packed(head: Header) -> bytes:
    vocabulary = head.vocab_size if head.tied else -head.vocab_size
    sizes = head.dim, head.hidden_dim, head.n_layers, head.n_heads, head.n_kv_heads
    return struct.pack("<7i", *sizes, vocabulary, head.seq_len)


def random_arrays(head: Header) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    arrays = {name: rng.standard_normal(shape) / 2 for name, shape in head.shapes().items()}
    frequencies = 1 / 10000 ** (np.arange(0, head.head_size, 2) / head.head_size)
    angles = np.arange(head.seq_len)[:, None] * frequencies
    arrays |= {"cos": np.cos(angles), "sin": np.sin(angles)}
    return {name: array.astype("<f4") for name, array in arrays.items()}


def write_model(file: Path, head: Header) -> dict[str, np.ndarray]:
    arrays = random_arrays(head)
    file.write_bytes(packed(head) + b"".join(array.tobytes() for array in arrays.values()))
    return arrays


def write_tokenizer(file: Path, pieces: Pieces) -> None:
    longest = max(len(piece) for _, piece in pieces)
    entries = [struct.pack("<fi", score, len(piece)) + piece for score, piece in pieces]
    file.write_bytes(struct.pack("<i", longest) + b"".join(entries))


@pytest.fixture
def convert(tmp_path: Path) -> Callable[[Header], Path]:
    """Converts a random model of some sizes; its files stay in `tmp_path`."""

    def run(head: Header) -> Path:
        write_model(tmp_path / "model.bin", head)
        write_tokenizer(tmp_path / "tok.bin", PIECES)
        convert_llama2c(tmp_path / "model.bin", tmp_path / "tok.bin", tmp_path / "out")
        return tmp_path / "out"

    return run


def forward(head: Header, w: dict[str, np.ndarray], tokens: np.ndarray) -> np.ndarray:
    """The logits of llama2.c, position by position, in float64."""
    w = {name: array.astype(np.float64) for name, array in w.items()}
    size, group = head.head_size, head.n_heads // head.n_kv_heads
    keys = [[] for _ in range(head.n_layers)]
    values = [[] for _ in range(head.n_layers)]
    logits = []

    def norm(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
        return weight * x / np.sqrt((x**2).mean() + 1e-5)

    def rotate(x: np.ndarray, position: int) -> np.ndarray:
        x = x.reshape(-1, size // 2, 2)
        cos, sin = w["cos"][position], w["sin"][position]
        pairs = (x[..., 0] * cos - x[..., 1] * sin, x[..., 0] * sin + x[..., 1] * cos)
        return np.stack(pairs, -1).reshape(-1, size)

    for position, token in enumerate(tokens):
        x = w["embedding"][token]
        for i in range(head.n_layers):
            y = norm(x, w["rms_att"][i])
            queries = rotate(w["wq"][i] @ y, position)
            keys[i].append(rotate(w["wk"][i] @ y, position))
            values[i].append((w["wv"][i] @ y).reshape(-1, size))
            heads = []
            for j, query in enumerate(queries):
                scores = np.array([key[j // group] @ query for key in keys[i]]) / np.sqrt(size)
                weights = np.exp(scores - scores.max())
                weights /= weights.sum()
                heads.append(weights @ np.array([value[j // group] for value in values[i]]))
            x = x + w["wo"][i] @ np.concatenate(heads)
            y = norm(x, w["rms_ffn"][i])
            gate = w["w1"][i] @ y
            x = x + w["w2"][i] @ (gate / (1 + np.exp(-gate)) * (w["w3"][i] @ y))
        logits.append(w.get("output", w["embedding"]) @ norm(x, w["rms_final"]))
    return np.array(logits)


def encode(pieces: Pieces, text: str) -> list[int]:
    """llama2.c's `encode`, which merges the best pair there is until there is none."""
    ids = {piece: index for index, (_, piece) in enumerate(pieces)}
    tokens = [1]
    if text:
        tokens.append(ids[b" "])
    for character in text:
        data = character.encode()
        tokens += [ids[data]] if data in ids else [byte + 3 for byte in data]
    while True:
        best = (-1e10, -1, -1)
        for i in range(len(tokens) - 1):
            found = ids.get(pieces[tokens[i]][1] + pieces[tokens[i + 1]][1])
            if found is not None and pieces[found][0] > best[0]:
                best = (pieces[found][0], found, i)
        _, found, i = best
        if i < 0:
            return tokens
        tokens[i : i + 2] = [found]


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_logits(convert, tied: bool) -> None:
    head = header(tied)
    directory = convert(head)
    tokens = np.random.default_rng(1).integers(0, head.vocab_size, head.seq_len)
    expected = forward(head, random_arrays(head), tokens)
    assert np.abs(expected).max() > 1
    model, params, report = load_model(directory, "causal-lm")
    assert report.initialised == report.unused == ()
    logits = jax.jit(lambda p: model(tokens[None], params=p).logits)(params)
    np.testing.assert_allclose(logits[0], expected, rtol=1e-5, atol=1e-5)

    pytorch, info = transformers.LlamaForCausalLM.from_pretrained(
        directory, output_loading_info=True
    )
    assert not (info["missing_keys"] or info["unexpected_keys"])
    with torch.no_grad():
        logits = pytorch(torch.from_numpy(tokens)[None]).logits[0]
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)


def test_tokens(convert) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(convert(header()))
    for text in TEXTS:
        encoded = tokenizer(text)
        assert encoded["input_ids"] == encode(PIECES, text), text
        assert set(encoded) == {"input_ids", "attention_mask"}
        assert tokenizer.decode(encoded["input_ids"], skip_special_tokens=True) == text
    # One of each kind: merged pieces, and the bytes of what has none.
    names = tokenizer.convert_ids_to_tokens(tokenizer("abc\n")["input_ids"])
    assert names == ["<s>", "▁ab", "c", "<0x0A>"]
    assert tokenizer.is_fast and tokenizer.model_max_length == header().seq_len
    assert (tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)


def spoil(directory: Path, what: str) -> None:
    model, tokenizer = directory / "model.bin", directory / "tok.bin"
    data = model.read_bytes()
    match what:
        case "short":
            model.write_bytes(data[:-1])
        case "long":
            model.write_bytes(data + b"\0")
        case "no header":
            model.write_bytes(data[:20])
        case "no layers":
            model.write_bytes(packed(header(n_layers=0)) + data[28:])
        case "odd heads":
            model.write_bytes(packed(header(n_heads=16)) + data[28:])
        case "uneven groups":
            model.write_bytes(packed(header(n_kv_heads=3)) + data[28:])
        case "later layout":
            model.write_bytes(b"24ka" + data[4:])
        case "other angles":
            head = header()
            before = sum(np.prod(shape) for shape in list(head.shapes().values())[:-2])
            values = np.frombuffer(data, "<f4", offset=28).copy()
            values[before:] = 1
            model.write_bytes(data[:28] + values.tobytes())
        case "no model":
            model.unlink()
        case "no tokenizer":
            tokenizer.unlink()
        case "other vocabulary":
            write_tokenizer(tokenizer, PIECES[:-1])
        case "cut piece":
            tokenizer.write_bytes(tokenizer.read_bytes()[:-1])
        case "cut length":
            tokenizer.write_bytes(tokenizer.read_bytes() + b"\0" * 5)
        case "other file":
            write_tokenizer(tokenizer, [(0.0, b"<pad>"), *PIECES[1:]])
        case "twice":
            write_tokenizer(tokenizer, [*PIECES[:-1], PIECES[-2]])
        case "no text":
            write_tokenizer(tokenizer, [*PIECES[:-1], (0.0, b"\xff")])


SIZE = 28 + 4 * sum(int(np.prod(shape)) for shape in header().shapes().values())
LAST = len(PIECES) - 1


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("short", f"has {SIZE - 1:,} bytes, but by its header it must have {SIZE:,}"),
        ("long", f"has {SIZE + 1:,} bytes, but by its header it must have {SIZE:,}"),
        ("no header", "has 20 bytes; the header of a llama2.c checkpoint alone has 28"),
        ("no layers", "n_layers=0, n_heads=4, n_kv_heads=2, vocab_size=275, seq_len=12"),
        ("odd heads", "`dim` must be an even multiple of `n_heads`"),
        ("uneven groups", "`n_heads` must be a multiple of `n_kv_heads`"),
        ("later layout", "export it in the legacy one, with `--version 0`"),
        ("other angles", "by other angles than those of base 10000"),
        ("no model", "model.bin` is missing"),
        ("no tokenizer", "tok.bin` is missing"),
        ("other vocabulary", f"has {LAST} pieces, but the model"),
        ("cut piece", f"its piece {LAST} is cut off"),
        ("cut length", f"its piece {LAST + 1} is cut off"),
        ("other file", "its piece 0 is '<pad>' and not '<unk>'"),
        ("twice", "holds the piece 'é…' twice"),
        ("no text", f"Piece {LAST} of"),
    ],
)
def test_refusals(tmp_path, capsys, what: str, message: str) -> None:
    files = tmp_path / "files"
    files.mkdir()
    write_model(files / "model.bin", header())
    write_tokenizer(files / "tok.bin", PIECES)
    spoil(files, what)
    arguments = ["--tokenizer", str(files / "tok.bin")]
    assert main(["convert", str(files / "model.bin"), str(tmp_path / "out"), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["files"]


def test_an_existing_output_is_left_alone(convert, tmp_path, capsys) -> None:
    before = {file.name: file.read_bytes() for file in convert(header()).iterdir()}
    arguments = ["--tokenizer", str(tmp_path / "tok.bin")]
    assert main(["convert", str(tmp_path / "model.bin"), str(tmp_path / "out"), *arguments]) == 2
    assert "is not an empty directory" in capsys.readouterr().err
    after = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    assert after == before


@pytest.mark.slow
def test_stories(tmp_path, capsys) -> None:
    """A trained model tells the story that its card shows, in both libraries."""
    if "CIRCFLAX_DATA" not in os.environ:
        pytest.skip("the environment variable CIRCFLAX_DATA names no folder with stories260K")
    data = Path(os.environ["CIRCFLAX_DATA"])
    weights, output = data / "weights_stories260k", tmp_path / "stories"
    arguments = ["--tokenizer", str(weights / "tok512.bin")]
    assert main(["convert", str(weights / "stories260K.bin"), str(output), *arguments]) == 0
    assert "converted model" in capsys.readouterr().out
    card = (weights / "stories260K.md").read_text()
    story = card.partition("-t 0.0\n")[2].partition("\n```")[0]

    tokenizer = transformers.AutoTokenizer.from_pretrained(output)
    model, params, _ = load_model(output, "causal-lm")
    options = {"max_length": 257, "do_sample": False, "pad_token_id": 0}
    tokens = model.generate(np.array([[1]]), params=params, **options).sequences[0]
    pytorch = transformers.LlamaForCausalLM.from_pretrained(output)
    for sequence in (tokens, pytorch.generate(torch.tensor([[1]]), **options)[0]):
        assert len(sequence) == 257
        assert tokenizer.decode(sequence, skip_special_tokens=True) == story

    for file, expected in (("tinyshakespeare/input.txt", 3.90), ("wikitext2/test.txt", 5.42)):
        ids = tokenizer((data / file).read_text()[:4000])["input_ids"][:512]
        scores = jax.nn.log_softmax(model(np.array([ids]), params=params).logits[0])
        nats = -scores[np.arange(511), np.array(ids[1:])].mean()
        assert nats == pytest.approx(expected, abs=5e-3)
