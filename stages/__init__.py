"""The stages of dvc.yaml, each run as `python -m stages.<stage> [name] [key=value ...]`: params → gbc → files."""
