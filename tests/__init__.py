"""Tests, one module per module of gbc."""
