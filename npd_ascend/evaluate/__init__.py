"""Scores of the student before, between and after, and of the teacher; of any model in public benchmarks."""
