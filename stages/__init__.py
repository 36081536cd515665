"""The stages of dvc.yaml, studies and the search, each run as `python -m stages.<stage> [name] [key=value ...]`: params → gbc → files."""
