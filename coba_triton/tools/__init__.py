"""Checking, tuning and timing tools."""
