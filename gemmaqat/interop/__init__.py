"""Readers and writers of other projects' checkpoint formats."""
