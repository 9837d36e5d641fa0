"""Scores of the student before, between and after, and of the teacher."""
