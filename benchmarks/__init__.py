"""Measurements of operant on this machine; each module is one command."""
