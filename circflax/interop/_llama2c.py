"""Checkpoints and tokenizers of llama2.c as Hugging Face directories.

A checkpoint (the legacy layout of https://github.com/karpathy/llama2.c) is a header of seven
int32, then float32 arrays one after the other, each with its layers stacked. A tokenizer is a
SentencePiece BPE: the longest piece's length as int32, then score (float32), length (int32) and
bytes of every piece.
"""

import math
import os
import struct
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from circflax.interop._tensors import CheckpointError, Tensor
from circflax.interop._write import write_directory

if TYPE_CHECKING:
    from transformers import LlamaConfig, PreTrainedTokenizerFast

_HEADER = struct.Struct("<7i")
_PIECE = struct.Struct("<fi")
# The first word of llama2.c's later layouts, "ak42".
_VERSIONED = 0x616B3432
_LAYER = {
    "rms_att": "input_layernorm",
    "wq": "self_attn.q_proj",
    "wk": "self_attn.k_proj",
    "wv": "self_attn.v_proj",
    "wo": "self_attn.o_proj",
    "rms_ffn": "post_attention_layernorm",
    "w1": "mlp.gate_proj",
    "w2": "mlp.down_proj",
    "w3": "mlp.up_proj",
}
_BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))
# llama2.c's own code relies on these ids, and writes newlines around the names of 1 and 2.
_FIRST_PIECES = ("<unk>", "\n<s>\n", "\n</s>\n", *_BYTES)
_SPECIAL = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}


def convert_llama2c(
    checkpoint: str | os.PathLike[str],
    tokenizer: str | os.PathLike[str],
    output: str | os.PathLike[str],
) -> None:
    """Converts a model of llama2.c into a Hugging Face directory, with its tokenizer.

    What is written loads in PyTorch and, as `"causal-lm"`, with `load_model`. Flax's Llama always
    has an output matrix of its own. Where llama2.c shares it with the embedding, the matrix is
    written twice and the configuration ties nothing, so that PyTorch and Flax read the same.

    Example:
        >>> convert_llama2c("stories15M.bin", "tokenizer.bin", "stories")  # doctest: +SKIP
        >>> model, params, report = load_model("stories", "causal-lm")  # doctest: +SKIP

    Args:
        checkpoint: The model in llama2.c's legacy layout, in float32.
        tokenizer: Its `tokenizer.bin`.
        output: The directory to write: new, or empty. It appears when it is complete.

    Raises:
        CheckpointError: If a file is missing or is not what it should be, the two do not belong
            together, or `output` is not empty; then nothing is written.
    """
    header, arrays = _read_model(Path(checkpoint))
    pieces = _read_pieces(Path(tokenizer))
    if len(pieces) != header.vocab_size:
        raise CheckpointError(
            f"The tokenizer `{tokenizer}` has {len(pieces)} pieces, but the model `{checkpoint}`"
            f" has a vocabulary of {header.vocab_size}."
        )
    write_directory(
        output,
        _config(header),
        "LlamaForCausalLM",
        _tensors(header, arrays),
        _make_tokenizer(pieces, header.seq_len).save_pretrained,
    )


@dataclass(frozen=True)
class Header:
    """The sizes of a model of llama2.c, and whether its output matrix is its embedding."""

    dim: int
    hidden_dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    vocab_size: int
    seq_len: int
    tied: bool

    @classmethod
    def unpack(cls, data: bytes) -> "Header":
        """Reads the first bytes of a checkpoint; a negative `vocab_size` there means not tied."""
        *sizes, vocab_size, seq_len = _HEADER.unpack(data)
        return cls(*sizes, abs(vocab_size), seq_len, tied=vocab_size > 0)

    @property
    def head_size(self) -> int:
        """The width of one head."""
        return self.dim // self.n_heads

    def misfit(self) -> str | None:
        """Returns what is impossible about the sizes, if something is."""
        *sizes, _ = astuple(self)
        if min(sizes) < 1:
            return "every size must be at least 1"
        if self.dim % self.n_heads or self.head_size % 2:
            return "`dim` must be an even multiple of `n_heads`"
        if self.n_heads % self.n_kv_heads:
            return "`n_heads` must be a multiple of `n_kv_heads`"
        return None

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Returns the shapes of the arrays, in the order of the file."""
        layers, dim, hidden = self.n_layers, self.dim, self.hidden_dim
        keys = self.n_kv_heads * self.head_size
        angles = self.seq_len, self.head_size // 2
        shapes = {
            "embedding": (self.vocab_size, dim),
            "rms_att": (layers, dim),
            "wq": (layers, dim, dim),
            "wk": (layers, keys, dim),
            "wv": (layers, keys, dim),
            "wo": (layers, dim, dim),
            "rms_ffn": (layers, dim),
            "w1": (layers, hidden, dim),
            "w2": (layers, dim, hidden),
            "w3": (layers, hidden, dim),
            "rms_final": (dim,),
            "cos": angles,
            "sin": angles,
        }
        return shapes if self.tied else shapes | {"output": (self.vocab_size, dim)}


def _read_model(file: Path) -> tuple[Header, dict[str, np.ndarray]]:
    """The header, and the arrays, which stay in the file until they are used."""
    _require(file)
    found = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(_HEADER.size)
    if len(start) < _HEADER.size:
        raise CheckpointError(
            f"`{file}` has {found} bytes; the header of a llama2.c checkpoint alone has"
            f" {_HEADER.size}."
        )
    header = Header.unpack(start)
    if header.dim == _VERSIONED:
        raise CheckpointError(
            f"`{file}` has one of llama2.c's later layouts; export it in the legacy one, with"
            " `--version 0`."
        )
    if (misfit := header.misfit()) is not None:
        raise CheckpointError(f"The header of `{file}` is impossible: {header}; {misfit}.")
    shapes = header.shapes()
    needed = _HEADER.size + 4 * sum(map(math.prod, shapes.values()))
    if found != needed:
        raise CheckpointError(
            f"`{file}` has {found:,} bytes, but by its header it must have {needed:,}: {header}."
        )
    values = np.memmap(file, "<f4", "r", _HEADER.size)
    ends = np.cumsum([math.prod(shape) for shape in shapes.values()])
    parts = np.split(values, ends[:-1])
    arrays = {
        name: part.reshape(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)
    }
    frequencies = 10000.0 ** (-2 * np.arange(header.head_size // 2) / header.head_size)
    angles = np.outer(np.arange(header.seq_len), frequencies)
    for name, table in (("cos", np.cos(angles)), ("sin", np.sin(angles))):
        if not np.allclose(arrays[name], table, rtol=0, atol=1e-2):
            raise CheckpointError(
                f"`{file}` rotates positions by other angles than those of base 10000, which is"
                " the only base that Flax's Llama knows."
            )
    return header, arrays


def _config(header: Header) -> "LlamaConfig":
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=header.vocab_size,
        hidden_size=header.dim,
        intermediate_size=header.hidden_dim,
        num_hidden_layers=header.n_layers,
        num_attention_heads=header.n_heads,
        num_key_value_heads=header.n_kv_heads,
        max_position_embeddings=header.seq_len,
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        tie_word_embeddings=False,
        bos_token_id=_FIRST_PIECES.index("\n<s>\n"),
        eos_token_id=_FIRST_PIECES.index("\n</s>\n"),
    )


def _tensors(header: Header, arrays: dict[str, np.ndarray]) -> dict[str, Tensor]:
    """The arrays by their PyTorch names."""

    def halves(rows: np.ndarray) -> np.ndarray:
        # llama2.c rotates entries 2i and 2i + 1 of a head, Hugging Face i and i + head_size / 2.
        pairs = rows.reshape(-1, header.head_size // 2, 2, header.dim)
        return pairs.swapaxes(1, 2).reshape(rows.shape)

    tensors = {
        "model.embed_tokens.weight": Tensor.of(arrays["embedding"]),
        "model.norm.weight": Tensor.of(arrays["rms_final"]),
        "lm_head.weight": Tensor.of(arrays.get("output", arrays["embedding"])),
    }
    for name, module in _LAYER.items():
        for layer in range(header.n_layers):
            tensor = Tensor.of(arrays[name][layer])
            tensors[f"model.layers.{layer}.{module}.weight"] = (
                tensor.map(halves) if name in ("wq", "wk") else tensor
            )
    return tensors


def _read_pieces(file: Path) -> list[tuple[str, float]]:
    """The pieces of a tokenizer, with their scores."""
    _require(file)
    data, position = file.read_bytes(), 4
    pieces: list[tuple[str, float]] = []
    while position < len(data):
        start = position + _PIECE.size
        # What is missing at the end of the file reads as a negative length.
        score, length = _PIECE.unpack(data[position:start].ljust(_PIECE.size, b"\xff"))
        if not 0 <= length <= len(data) - start:
            raise CheckpointError(
                f"`{file}` is no whole tokenizer of llama2.c: its piece {len(pieces)} is cut off."
            )
        position = start + length
        try:
            pieces.append((data[start:position].decode(), score))
        except UnicodeDecodeError as error:
            raise CheckpointError(f"Piece {len(pieces)} of `{file}` is not UTF-8 text.") from error
    for index, expected in enumerate(_FIRST_PIECES):
        found = pieces[index][0] if index < len(pieces) else None
        if found != expected:
            raise CheckpointError(
                f"`{file}` is no tokenizer of llama2.c: its piece {index} is {found!r} and not"
                f" {expected!r}."
            )
    return pieces


def _make_tokenizer(
    pieces: list[tuple[str, float]], model_max_length: int
) -> "PreTrainedTokenizerFast":
    """A tokenizer that encodes as SentencePiece does, as `transformers` makes Llama's."""
    from tokenizers import Tokenizer, decoders, models, normalizers, processors
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import generate_merges

    ordinary = [(piece.replace(" ", "▁"), score) for piece, score in pieces[len(_FIRST_PIECES) :]]
    names = [*_SPECIAL.values(), *_BYTES, *(piece for piece, _ in ordinary)]
    vocabulary = {name: index for index, name in enumerate(names)}
    if len(vocabulary) < len(names):
        twice = next(name for index, name in enumerate(names) if vocabulary[name] != index)
        raise CheckpointError(f"The tokenizer holds the piece {twice!r} twice.")
    # Only ordinary pieces are made of others.
    merges = generate_merges({name: vocabulary[name] for name, _ in ordinary}, ordinary)
    tokenizer = Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    bos = _SPECIAL["bos_token"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A",
        pair=f"{bos} $A {bos}:1 $B:1",
        special_tokens=[(bos, vocabulary[bos])],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=model_max_length,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
        # To llama2.c a `<s>` in a text is three characters.
        split_special_tokens=True,
        **_SPECIAL,
    )


def _require(file: Path) -> None:
    if not file.is_file():
        raise CheckpointError(f"The file `{file}` is missing.")
