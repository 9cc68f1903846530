"""thunder_rollout: program-aware distributed rollouts for agentic RL."""

__version__ = "0.1.0"
