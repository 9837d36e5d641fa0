"""The student answers prompts."""
