"""Tiny models of the architectures the tests run on: one table that every test shares."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

VOCABULARY = 67
BATCH, LENGTH = 2, 7


@dataclass(frozen=True)
class Architecture:
    """A tiny model of one architecture.

    Attributes:
        id: Short name, used as the test's id.
        config: Builds the tiny Hugging Face configuration.
        flax_class: Name of the Flax class in `transformers`.
        torch_class: Name of the PyTorch class in `transformers`.
        inputs: Builds the model's inputs, NumPy arrays both classes accept by keyword.
        targets: Last module names, in Flax, of the attention projections adapters usually go to.
        head: The kind of head as `load_model` names it.
    """

    id: str
    config: Callable[[], Any]
    flax_class: str
    torch_class: str
    inputs: Callable[[], dict[str, np.ndarray]]
    targets: tuple[str, ...]
    head: str

    def __str__(self) -> str:
        return self.id


def _config(name: str, **fields: Any) -> Callable[[], Any]:
    def build() -> Any:
        import transformers

        return getattr(transformers, name)(**fields)

    return build


def _tokens(seed: int) -> np.ndarray:
    # The first five ids are left out: configurations give them meanings, such as padding.
    return np.random.default_rng(seed).integers(5, VOCABULARY, (BATCH, LENGTH), dtype=np.int32)


def _mask() -> np.ndarray:
    mask = np.ones((BATCH, LENGTH), np.int32)
    mask[-1, -2:] = 0
    return mask


def _text_inputs() -> dict[str, np.ndarray]:
    return {"input_ids": _tokens(0), "attention_mask": _mask()}


def _sequence_to_sequence_inputs() -> dict[str, np.ndarray]:
    return {**_text_inputs(), "decoder_input_ids": _tokens(1)}


def _image_inputs() -> dict[str, np.ndarray]:
    pixels = np.random.default_rng(0).standard_normal((BATCH, 3, 16, 16))
    return {"pixel_values": pixels.astype(np.float32)}


def _speech_inputs() -> dict[str, np.ndarray]:
    features = np.random.default_rng(0).standard_normal((BATCH, 8, 20))
    return {"input_features": features.astype(np.float32), "decoder_input_ids": _tokens(1)}


_ENCODER = dict(
    vocab_size=VOCABULARY,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=48,
    max_position_embeddings=32,
    num_labels=3,
)
_DECODER = dict(
    vocab_size=VOCABULARY,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    intermediate_size=48,
    max_position_embeddings=32,
)
_ENCODER_DECODER = dict(
    vocab_size=VOCABULARY,
    d_model=32,
    encoder_layers=2,
    decoder_layers=2,
    encoder_attention_heads=4,
    decoder_attention_heads=4,
    encoder_ffn_dim=48,
    decoder_ffn_dim=48,
)

ARCHITECTURES: tuple[Architecture, ...] = (
    Architecture(
        "bert",
        _config("BertConfig", **_ENCODER),
        "FlaxBertForSequenceClassification",
        "BertForSequenceClassification",
        _text_inputs,
        ("query", "value"),
        "sequence-classification",
    ),
    Architecture(
        "roberta",
        _config("RobertaConfig", **_ENCODER),
        "FlaxRobertaForSequenceClassification",
        "RobertaForSequenceClassification",
        _text_inputs,
        ("query", "value"),
        "sequence-classification",
    ),
    Architecture(
        "distilbert",
        _config(
            "DistilBertConfig",
            vocab_size=VOCABULARY,
            dim=32,
            n_layers=2,
            n_heads=4,
            hidden_dim=48,
            max_position_embeddings=32,
            num_labels=3,
        ),
        "FlaxDistilBertForSequenceClassification",
        "DistilBertForSequenceClassification",
        _text_inputs,
        ("q_lin", "v_lin"),
        "sequence-classification",
    ),
    Architecture(
        "vit",
        _config(
            "ViTConfig",
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=48,
            image_size=16,
            patch_size=8,
            num_labels=3,
        ),
        "FlaxViTForImageClassification",
        "ViTForImageClassification",
        _image_inputs,
        ("query", "value"),
        "image-classification",
    ),
    Architecture(
        "gpt2",
        _config(
            "GPT2Config",
            vocab_size=VOCABULARY,
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_positions=32,
            bos_token_id=0,
            eos_token_id=0,
        ),
        "FlaxGPT2LMHeadModel",
        "GPT2LMHeadModel",
        _text_inputs,
        ("c_attn",),
        "causal-lm",
    ),
    Architecture(
        "llama",
        _config("LlamaConfig", **_DECODER),
        "FlaxLlamaForCausalLM",
        "LlamaForCausalLM",
        _text_inputs,
        ("q_proj", "v_proj"),
        "causal-lm",
    ),
    Architecture(
        "mistral",
        _config("MistralConfig", **_DECODER),
        "FlaxMistralForCausalLM",
        "MistralForCausalLM",
        _text_inputs,
        ("q_proj", "v_proj"),
        "causal-lm",
    ),
    Architecture(
        "gemma",
        _config("GemmaConfig", **_DECODER),
        "FlaxGemmaForCausalLM",
        "GemmaForCausalLM",
        _text_inputs,
        ("q_proj", "v_proj"),
        "causal-lm",
    ),
    Architecture(
        "bart",
        _config("BartConfig", max_position_embeddings=32, **_ENCODER_DECODER),
        "FlaxBartForConditionalGeneration",
        "BartForConditionalGeneration",
        _sequence_to_sequence_inputs,
        ("q_proj", "v_proj"),
        "seq2seq-lm",
    ),
    Architecture(
        "whisper",
        _config(
            "WhisperConfig",
            num_mel_bins=8,
            max_source_positions=10,
            max_target_positions=32,
            pad_token_id=0,
            bos_token_id=0,
            eos_token_id=0,
            decoder_start_token_id=1,
            suppress_tokens=None,
            begin_suppress_tokens=None,
            **_ENCODER_DECODER,
        ),
        "FlaxWhisperForConditionalGeneration",
        "WhisperForConditionalGeneration",
        _speech_inputs,
        ("q_proj", "v_proj"),
        "speech-seq2seq",
    ),
)


def architecture(id: str) -> Architecture:
    """Returns the table's entry with this `id`."""
    return next(entry for entry in ARCHITECTURES if entry.id == id)
