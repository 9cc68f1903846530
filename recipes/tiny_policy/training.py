"""Supervised training of a small Qwen2 on expert transcripts, and the folder it is saved as."""

from __future__ import annotations

import math
import random
import re
import time
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from settings import ModelSettings, Settings, TrainSettings
from tokenizer import learn_tokenizer
from torch.nn import functional
from transcripts import TokenisedTranscript, tokenise, transcript_texts, transcripts
from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

from thunder_rollout.agent.chat import ChatFormat
from thunder_rollout.agent.config import SYSTEM_PROMPT

_BATCHES_SORTED_TOGETHER = 16  # transcripts of like length share a batch, so that little is padding
_LOG_EVERY_STEPS = 50
_SENTENCE = re.compile(r"[A-Z][^.:\n]{20,}[.:]")


def build_policy(settings: Settings, folder: Path, log: Callable[[str], None]) -> None:
    """Learn tokenizer and model and save them in `folder` as Hugging Face does."""
    started = time.monotonic()
    torch.manual_seed(settings.seed)
    tokenizer = _learn_tokenizer(settings, folder)
    model = Qwen2ForCausalLM(_model_config(settings.model, tokenizer))
    log(f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens; making transcripts")
    data = _training_data(settings, tokenizer)
    log(f"{len(data)} transcripts of {np.mean([len(item.ids) for item in data]):.0f} tokens on average")
    batches = _batches(data, settings.train.batch_transcripts, random.Random(settings.seed), tokenizer.pad_token_id)
    _train(model, batches, settings.train, log)
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=True
    )
    model.save_pretrained(folder)
    log(f"built in {time.monotonic() - started:.0f} s")


def _learn_tokenizer(settings: Settings, folder: Path) -> Qwen2Tokenizer:
    corpus = transcripts(
        f"tokenizer:{settings.seed}",
        settings.difficulty,
        settings.tokenizer.num_transcripts,
        hasty_share=settings.train.hasty_share,
    )
    texts = chain.from_iterable(transcript_texts(transcript) for transcript in corpus)
    return learn_tokenizer(texts, settings.tokenizer.vocab_size, _SENTENCE.findall(SYSTEM_PROMPT), folder)


def _model_config(model: ModelSettings, tokenizer: Qwen2Tokenizer) -> Qwen2Config:
    return Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=model.hidden_size,
        intermediate_size=model.intermediate_size,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_heads,
        num_key_value_heads=model.num_kv_heads,
        max_position_embeddings=model.max_position_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": model.rope_theta},
        initializer_range=model.initializer_range,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _training_data(settings: Settings, tokenizer: Qwen2Tokenizer) -> list[TokenisedTranscript]:
    train, chat = settings.train, ChatFormat(tokenizer)
    count = train.num_steps * train.batch_transcripts
    made = transcripts(
        f"train:{settings.seed}",
        settings.difficulty,
        count,
        mistake_share=train.mistake_share,
        hasty_share=train.hasty_share,
    )
    return [tokenise(transcript, chat, tokenizer) for transcript in made]


def _batches(
    data: list[TokenisedTranscript], size: int, rng: random.Random, pad_id: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """`ids` (B, T) and `learn` (B, T), padded on the right."""
    for start in range(0, len(data), size * _BATCHES_SORTED_TOGETHER):
        window = sorted(data[start : start + size * _BATCHES_SORTED_TOGETHER], key=lambda item: len(item.ids))
        groups = [window[first : first + size] for first in range(0, len(window), size)]
        rng.shuffle(groups)
        for group in groups:
            longest = max(len(item.ids) for item in group)
            ids = torch.full((len(group), longest), pad_id)
            learn = torch.zeros((len(group), longest), dtype=torch.bool)
            for row, item in enumerate(group):
                ids[row, : len(item.ids)] = torch.from_numpy(item.ids)
                learn[row, : len(item.ids)] = torch.from_numpy(item.learn)
            yield ids, learn


def _train(
    model: Qwen2ForCausalLM,
    batches: Iterator[tuple[torch.Tensor, torch.Tensor]],
    train: TrainSettings,
    log: Callable[[str], None],
) -> None:
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=train.learning_rate, betas=(0.9, 0.98), weight_decay=train.weight_decay
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, train))
    started = time.monotonic()
    model.train()
    for step, (ids, learn) in enumerate(batches, 1):
        loss = _loss(model, ids, learn)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), train.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        if step % _LOG_EVERY_STEPS == 0:
            log(f"step {step}/{train.num_steps} loss {loss.item():.3f} {time.monotonic() - started:.0f} s")


def _loss(model: Qwen2ForCausalLM, ids: torch.Tensor, learn: torch.Tensor) -> Any:
    """Mean cross-entropy of the expert's tokens alone; logits are computed nowhere else."""
    hidden = model.model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
    wanted = learn[:, 1:]
    return functional.cross_entropy(model.lm_head(hidden[wanted]), ids[:, 1:][wanted])


def _rate(step: int, train: TrainSettings) -> float:
    """Linear warm-up, then a cosine down to a twentieth."""
    if step < train.warmup_steps:
        return (step + 1) / train.warmup_steps
    progress = (step - train.warmup_steps) / max(1, train.num_steps - train.warmup_steps)
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress))
