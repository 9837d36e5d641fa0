"""Student weights on their way to the generator: whole, numbered, checksummed versions."""
