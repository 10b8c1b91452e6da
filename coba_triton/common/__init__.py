"""Small helpers of many rooms: files, texts, versions, signals."""
