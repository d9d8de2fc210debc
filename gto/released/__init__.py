"""Released models: their weights, heads, tokenizers and chat templates, and a target over several GPUs."""
