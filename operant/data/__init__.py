"""Text in, ids out: tokenizers and chat templates, rows of files, preferences, logs of feedback."""
