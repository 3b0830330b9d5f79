"""Models and decoding: policy, critic, encoder, reward model, caches, the sampler."""
