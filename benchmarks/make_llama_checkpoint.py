"""Write a random LlamaForCausalLM checkpoint (bfloat16) that any server can load.

    python benchmarks/make_llama_checkpoint.py OUT [mid|0.5b|3b]

`mid` (174 M parameters) is the one of the side-by-side in peer.md. The tokenizer has as many
entries as the model has rows, so that whatever is generated is text. Needs torch, transformers and
tokenizers.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SIZES = {
    "mid": {
        "hidden_size": 1024,
        "num_hidden_layers": 12,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "intermediate_size": 2816,
        "vocab_size": 32_000,
    },
    "0.5b": {
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "intermediate_size": 4096,
        "vocab_size": 110_592,
    },
    "3b": {
        "hidden_size": 3072,
        "num_hidden_layers": 32,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "intermediate_size": 7168,
        "vocab_size": 110_592,
    },
}
TRAINED_ENTRIES = 8000
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a random Llama checkpoint.")
    parser.add_argument("out", type=Path)
    parser.add_argument("size", nargs="?", choices=SIZES, default="mid")
    options = parser.parse_args()
    dimensions = SIZES[options.size]
    make_tokenizer(dimensions["vocab_size"]).save_pretrained(options.out)
    config = LlamaConfig(
        **dimensions,
        max_position_embeddings=16_384,
        rope_theta=1e8,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(options.out)


def make_tokenizer(num_entries: int) -> PreTrainedTokenizerFast:
    """Trained on text that is there wherever torch is, then filled up with words."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    sources = sorted(Path(torch.__file__).parent.glob("*.py"))
    tokenizer.train_from_iterator(
        [source.read_text(errors="ignore") for source in sources],
        trainers.BpeTrainer(
            vocab_size=TRAINED_ENTRIES, special_tokens=SPECIAL_TOKENS, initial_alphabet=alphabet
        ),
    )
    whole = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|endoftext|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
    )
    whole.add_tokens([f" w{number}" for number in range(num_entries - len(whole))])
    whole.chat_template = CHAT_TEMPLATE
    return whole


if __name__ == "__main__":
    main()
