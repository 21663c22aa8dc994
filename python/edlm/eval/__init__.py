"""Numbers about models and samples, named for what they are; those that are means have standard errors."""

from .estimate import Estimate
from .finite_steps import finite_step_elbo
from .generative import GenerativePerplexity, generative_perplexity
from .joint import EnergyEstimate, joint_nll, paper_joint
from .judges import Judge, Scores, TokenJudge
from .likelihood import ar_nll, nelbo
from .mauve import mauve
from .ngram import NGramModel
from .partition import PartitionBounds, log_partition_bounds, log_Z_lower, log_Z_upper_asymptotic
from .text_metrics import distinct_n, repetition, self_bleu, unigram_entropy
from .transformers_judge import TransformersJudge
from .word_trigram import WordTrigramJudge

__all__ = [
    "EnergyEstimate",
    "Estimate",
    "GenerativePerplexity",
    "Judge",
    "NGramModel",
    "PartitionBounds",
    "Scores",
    "TokenJudge",
    "TransformersJudge",
    "WordTrigramJudge",
    "ar_nll",
    "distinct_n",
    "finite_step_elbo",
    "generative_perplexity",
    "joint_nll",
    "log_Z_lower",
    "log_Z_upper_asymptotic",
    "log_partition_bounds",
    "mauve",
    "nelbo",
    "paper_joint",
    "repetition",
    "self_bleu",
    "unigram_entropy",
]
