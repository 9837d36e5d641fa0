"""A plain decoder for the Llama family and its Hugging Face names, both ways."""
