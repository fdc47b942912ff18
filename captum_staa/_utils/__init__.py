"""Helpers that every package shares."""
