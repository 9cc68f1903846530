"""Refuses, before the engine sees it, a request that the engine can't bear."""

from __future__ import annotations

import math
from array import array
from dataclasses import dataclass

from thunder_rollout.engine.protocol import GenerateRequest, Sampling
from thunder_rollout.errors import RequestError

_MAX_TEMPERATURE = 2.0  # vLLM's
_SEED_LIMIT = 2**63


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestLimits:
    vocab_size: int
    max_model_len: int
    capacity_tokens: int
    seeds: bool  # whether a request may bring its own seed


def check_request(request: GenerateRequest, limits: RequestLimits) -> list[int]:
    """The prompt's ids as plain ints; raises `RequestError` naming the field and the remedy."""
    try:
        prompt_ids = array("I", request.prompt_ids)
    except (TypeError, OverflowError) as error:
        raise _refusal(request, "prompt_ids", f"must be token ids, ints from 0 to {limits.vocab_size - 1}") from error
    if not prompt_ids:
        raise _refusal(request, "prompt_ids", "is empty; a prompt has at least one token")
    _check_sampling(request, limits)
    if (largest := max(prompt_ids)) >= limits.vocab_size:
        why = f"token id {largest} is not in the vocabulary of {limits.vocab_size}; use the model's own tokenizer"
        raise _refusal(request, "prompt_ids", why)
    longest = len(prompt_ids) + request.sampling.max_tokens
    asked = f"the prompt's {len(prompt_ids)} tokens and max_tokens {request.sampling.max_tokens}"
    if longest > limits.max_model_len:
        why = f"{asked} exceed the engine's {limits.max_model_len}; shorten them or raise engine.max_model_len"
        raise _refusal(request, "max_tokens", why)
    if longest > limits.capacity_tokens:
        why = f"{asked} exceed the engine's {limits.capacity_tokens} KV tokens; raise engine.kv_cache_tokens"
        raise _refusal(request, "max_tokens", why)
    return prompt_ids.tolist()


def _check_sampling(request: GenerateRequest, limits: RequestLimits) -> None:
    s: Sampling = request.sampling
    rules = (
        ("max_tokens", s.max_tokens, _is_int(s.max_tokens) and s.max_tokens >= 1, ">= 1"),
        ("temperature", s.temperature, 0 <= s.temperature <= _MAX_TEMPERATURE, f"in [0, {_MAX_TEMPERATURE}]"),
        ("top_p", s.top_p, 0 < s.top_p <= 1, "in (0, 1]"),
        ("top_k", s.top_k, _is_int(s.top_k) and s.top_k >= -1, "-1 (all) or >= 1"),
        ("min_p", s.min_p, 0 <= s.min_p <= 1, "in [0, 1]"),
        ("repetition_penalty", s.repetition_penalty, _is_positive(s.repetition_penalty), "> 0 and finite"),
        (
            "stop_token_ids",
            s.stop_token_ids,
            all(_is_int(i) and 0 <= i < limits.vocab_size for i in s.stop_token_ids),
            f"ids of the vocabulary, from 0 to {limits.vocab_size - 1}",
        ),
    )
    for name, value, ok, rule in rules:
        if not ok:
            raise _refusal(request, name, f"{value!r} must be {rule}")
    if s.seed is None:
        return
    if not limits.seeds:
        why = "a request's own seed brings a CPU engine down; leave it null and set engine.seed"
        raise _refusal(request, "seed", why)
    if not _is_int(s.seed) or not -_SEED_LIMIT <= s.seed < _SEED_LIMIT:
        raise _refusal(request, "seed", f"{s.seed!r} must be a 64-bit int")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_positive(value: float) -> bool:
    return math.isfinite(value) and value > 0


def _refusal(request: GenerateRequest, field: str, why: str) -> RequestError:
    return RequestError(f"request {request.request_id}: {field}: {why}")
