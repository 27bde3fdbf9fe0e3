"""Judges completions: finds the final answer and compares its value, out of the student's reach."""
