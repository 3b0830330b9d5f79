"""The reward loop: rollouts, episodes, logged completions, held-out measurements."""
