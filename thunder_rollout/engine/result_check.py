"""Tells a result that no working engine gives, whatever the model and the sampling."""

from __future__ import annotations

import math

from thunder_rollout.core.events import FinishReason
from thunder_rollout.engine.protocol import GenerateRequest, Generation

_MAX_LOGPROB = 1e-3  # above 0 only by what rounding may add


def what_is_wrong(request: GenerateRequest, generation: Generation, *, vocab_size: int) -> str | None:
    """None for a result that can be; a turn that the engine itself reports as failed always can."""
    if generation.finish_reason == FinishReason.ERROR:
        return None
    ids, logprobs = generation.token_ids, generation.logprobs
    if len(ids) > request.sampling.max_tokens:
        return f"{len(ids)} tokens of {request.sampling.max_tokens} asked for"
    if len(logprobs) != len(ids):
        return f"{len(logprobs)} log-probabilities for {len(ids)} tokens"
    if ids and not 0 <= min(ids) <= max(ids) < vocab_size:
        return f"token ids from {min(ids)} to {max(ids)} of a vocabulary of {vocab_size}"
    if not all(math.isfinite(logprob) and logprob <= _MAX_LOGPROB for logprob in logprobs):
        return "log-probabilities that are not finite or above 0"
    if generation.prompt_tokens != len(request.prompt_ids):
        return f"a prompt of {generation.prompt_tokens} tokens where {len(request.prompt_ids)} were sent"
    if not 0 <= generation.cached_tokens <= generation.prompt_tokens:
        return f"{generation.cached_tokens} of {generation.prompt_tokens} prompt tokens cached"
    return None
