"""A byte-level BPE with ChatML, learned from expert transcripts.

A number's digits, a quoted word and the constant parts of actions are one token each, the comma after
them included: what follows a token then mostly depends on that token alone. So copying a list of numbers
or words, which is what a tiny model finds hard, is looking up where the last token stood before.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen2Config, Qwen2Tokenizer

from thunder_rollout.tasks.toy.words import WORDS

PAD, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_CONSTANT_PARTS = (
    "\n```bash\n", "\n```", "[exit 0]", "I look at", "grep -n -A 2 'def", "sed -i '", "c\\    return", "    return",
    "python -c 'from", "; print(", "It should return", " should return", "It should show", " should show", " but shows",
    "\nprint(", ".py is wrong.", " Line ", " is wrong.", "submit", "The fix works.",
)  # fmt: skip


def learn_tokenizer(texts: Iterable[str], vocab_size: int, sentences: Iterable[str], folder: Path) -> Qwen2Tokenizer:
    """The tokenizer, saved in `folder` and as every loader of a Qwen2 folder will have it.

    `sentences` occur in every transcript and become one token each. Loaders put Qwen2's own splitting into
    pieces in the place of any other, so merges are learned with it and the result is read back.
    """
    qwen2 = Qwen2Tokenizer().backend_tokenizer
    learned = Tokenizer(models.BPE())
    learned.normalizer, learned.pre_tokenizer = qwen2.normalizer, qwen2.pre_tokenizer
    learned.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, IM_START, IM_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    learned.train_from_iterator(texts, trainer)
    phrases = dict.fromkeys([*sentences, *_CONSTANT_PARTS, *_literals()])
    learned.add_tokens([AddedToken(phrase, normalized=False) for phrase in phrases])
    PreTrainedTokenizerFast(
        tokenizer_object=learned,
        eos_token=IM_END,
        pad_token=PAD,
        additional_special_tokens=[IM_START],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    ).save_pretrained(folder)
    Qwen2Config().save_pretrained(folder)  # a place-holder: it only tells the loader the kind of model
    tokenizer: Qwen2Tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return tokenizer


def _literals() -> Iterator[str]:
    """Digits and quoted words as they stand in lists, dicts and calls."""
    for start in ("", " "):
        for digit in "0123456789":
            yield from (f"{start}{digit}", f"{start}{digit},")
        for word in WORDS:
            yield from (f"{start}{quote}{word}{quote}{end}" for quote in "\"'" for end in ("", ",", ":"))
