"""Judging models: token metrics, hold-out and task scores, paired statistics, reports."""
