"""Programs to read and to start from; `quartet demo` runs `train_gpt`. They are scripts: nothing is imported from here."""
