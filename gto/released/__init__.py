"""Released models: their weights, heads, tokenizers and chat templates."""
