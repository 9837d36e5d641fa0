"""The two operations that decide speed and memory: packed attention and the per-token loss."""
