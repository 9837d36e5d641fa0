"""What an answer is worth: plain functions, a process that can be stopped, and the worker that asks it."""
