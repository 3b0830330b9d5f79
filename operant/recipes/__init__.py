"""Whole circles on a task, each one command."""
