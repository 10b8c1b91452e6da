"""Small helpers that many rooms use: files, texts, messages, versions, signals."""
