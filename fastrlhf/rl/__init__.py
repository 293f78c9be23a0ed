"""The parts of a PPO step."""
