"""A byte-level BPE with ChatML, learned from expert transcripts.

A word is one token, a quoted word or a digit too, with the comma after it: what follows a token then
mostly depends on that token alone. So copying a name, a number or a list of them, which is what a tiny
model finds hard, is looking up where the last token stood before.
"""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

PAD, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# The constant parts of statements, actions and observations.
PHRASES = (
    "\n```bash\n", "\n```", "[exit 0]", "I look at", "grep -n -A 2 'def", "sed -i '", "c\\    return", "    return",
    "python -c 'from", "; print(", "It should return", " should return", "It should show", " should show", " but shows",
    "\nprint(", ".py is wrong.", " Line ", " is wrong.", "submit", "The fix works.",
)  # fmt: skip
_PIECES = r""" ?["']\p{L}+["'][:,]?| ?\p{N},?| ?\p{L}+| ?[^\s\p{L}\p{N}]|\n+|[^\S\n]+"""


def learn_tokenizer(texts: Iterable[str], vocab_size: int, phrases: Iterable[str] = ()) -> PreTrainedTokenizerFast:
    """`phrases` occur in every transcript and become one token each, which keeps transcripts short."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, IM_START, IM_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([AddedToken(phrase, normalized=False) for phrase in phrases])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=IM_END,
        pad_token=PAD,
        additional_special_tokens=[IM_START],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
