"""Numbers about models and samples, each with its standard error and its name: bounds are not mixed with what is none."""

from .likelihood import Estimate, ar_nll, nelbo
from .ngram import NGramModel
from .text_metrics import distinct_n, unigram_entropy

__all__ = ["Estimate", "NGramModel", "ar_nll", "distinct_n", "nelbo", "unigram_entropy"]
