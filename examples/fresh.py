"""Makes what a fresh language model is drawn from: a configuration, and a tokenizer learnt from the text.

    python examples/fresh.py gpt2 OUT    a GPT-2 of two layers of 64, 236,288 parameters
    python examples/fresh.py bert OUT    a BERT like it

Both have 2,000 tokens, learnt from the State of the Union addresses (public domain). `--model fresh:OUT`
draws the weights from the run's seed; a configuration of your own needs the same files: config.json and a
tokenizer.
"""

from __future__ import annotations

import sys
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import BertConfig, GPT2Config, PreTrainedTokenizerFast

from pipeline.data.packages import rows

TOKENS, WIDTH, LAYERS, HEADS, POSITIONS = 2000, 64, 2, 2, 128


def write_gpt2(out: Path) -> None:
    """Pairs of bytes, as GPT-2 has them (Radford et al. 2019)."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=TOKENS, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    inner.train_from_iterator((row["text"] for row in rows("sotu")), trainer)
    PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|endoftext|>").save_pretrained(str(out))
    GPT2Config(
        vocab_size=TOKENS,
        n_embd=WIDTH,
        n_layer=LAYERS,
        n_head=HEADS,
        n_positions=POSITIONS,
        bos_token_id=0,
        eos_token_id=0,
        architectures=["GPT2LMHeadModel"],
    ).save_pretrained(out)


def write_bert(out: Path) -> None:
    """Pieces of words (Devlin et al. 2019)."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    inner = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    inner.normalizer = normalizers.BertNormalizer()
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=TOKENS, special_tokens=special, show_progress=False)
    inner.train_from_iterator((row["text"] for row in rows("sotu")), trainer)
    inner.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = {f"{token.strip('[]').lower()}_token": token for token in special}
    PreTrainedTokenizerFast(
        tokenizer_object=inner, model_input_names=["input_ids", "token_type_ids", "attention_mask"], **names
    ).save_pretrained(str(out))
    BertConfig(
        vocab_size=TOKENS,
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=4 * WIDTH,
        max_position_embeddings=POSITIONS,
        pad_token_id=0,
        architectures=["BertForMaskedLM"],
    ).save_pretrained(out)


if __name__ == "__main__":
    makers = {"gpt2": write_gpt2, "bert": write_bert}
    if len(sys.argv) != 3 or sys.argv[1] not in makers:
        raise SystemExit(__doc__)
    makers[sys.argv[1]](Path(sys.argv[2]))
    print(f"{sys.argv[2]}: config.json and a tokenizer of {TOKENS:,} tokens; --model fresh:{sys.argv[2]}")
