"""Likelihood of text: ``edlm bench eval``, against evaluation as research code does it."""
