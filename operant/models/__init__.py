"""What has weights, and what decodes: policy, critic, encoder, reward model, caches, the sampler."""
