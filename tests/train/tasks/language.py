"""A tokenizer of single characters, and a tiny Llama for it."""

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

BOS, EOS = 0, 1
# The template of a conversation: each turn has the name of its role, and ends in EOS.
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)


def make_tokenizer(bos: bool = True, **options) -> PreTrainedTokenizerFast:
    """One token a byte, after `<s>` (0) and `</s>` (1); `bos` begins texts with `<s>`."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<s>", "</s>", *alphabet])}
    backend = Tokenizer(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    if bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", BOS)]
        )
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **(special | options))


def write_llama(directory: Path, **fields) -> Path:
    """A random Llama of two narrow layers with its tokenizer, as a Hugging Face directory."""
    from transformers import FlaxLlamaForCausalLM, LlamaConfig

    tokenizer = make_tokenizer(chat_template=TEMPLATE)
    settings = dict(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=24,
        max_position_embeddings=64,
        initializer_range=0.2,
    )
    FlaxLlamaForCausalLM(LlamaConfig(**(settings | fields)), seed=1).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory
