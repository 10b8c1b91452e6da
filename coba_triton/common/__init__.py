"""Small helpers that many rooms use: files, texts, versions, signals."""
