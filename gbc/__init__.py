"""gbc: Generator Born from Classifier (Yu & Wang, NeurIPS 2023), a generator trained from a classifier's weights alone."""
