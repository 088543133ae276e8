"""How near texts are to their references: a table of measures, each by the package that papers report it with."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

from inlay.messages import check_installed, installed

Texts = list[str]
Corpus = Callable[[list[int]], float]  # the value over some examples, by their places
Measure = Callable[[Texts, list[Texts]], Corpus]  # of texts, and of each one's references


def sacre(name: str) -> Measure:
    """Return the measure of corpus BLEU or chrF against all references, by sacrebleu (Post 2018)."""

    def measure(answers: Texts, wanted: list[Texts]) -> Corpus:
        import sacrebleu

        corpus: Callable[..., Any] = getattr(sacrebleu, name)
        most = max(map(len, wanted))
        rows = [[texts[k] if k < len(texts) else None for texts in wanted] for k in range(most)]
        return lambda places: corpus([answers[i] for i in places], [[row[i] for i in places] for row in rows]).score

    return measure


def rouge(name: str) -> Measure:
    """Return a measure: the mean F-measure of ROUGE (Lin 2004) of the best reference, in percent.

    It is rouge-score's, with its stemmer, as in transformers' summarisation examples.
    """

    def measure(answers: Texts, wanted: list[Texts]) -> Corpus:
        from rouge_score.rouge_scorer import RougeScorer

        scorer: Any = RougeScorer([name], use_stemmer=True)
        pairs = zip(wanted, answers, strict=True)
        scores = [100 * scorer.score_multi(texts, answer)[name].fmeasure for texts, answer in pairs]
        return lambda places: statistics.fmean(scores[i] for i in places)

    return measure


def nist(answers: Texts, wanted: list[Texts]) -> Corpus:
    """Return NIST (Doddington 2002) up to 5-grams by nltk, of lower-case words as mteval-v13a has them."""
    from nltk.translate.nist_score import corpus_nist
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

    words = Tokenizer13a()
    tokens = [words(text.lower()).split() for text in answers]
    references = [[words(text.lower()).split() for text in texts] for texts in wanted]

    def corpus(places: list[int]) -> float:
        try:
            return float(corpus_nist([references[i] for i in places], [tokens[i] for i in places]))
        except ZeroDivisionError:  # not one text has five words
            return 0.0

    return corpus


MEASURES: dict[str, tuple[str, Measure]] = {  # the package each needs, and what it does
    "BLEU": ("sacrebleu", sacre("corpus_bleu")),
    "chrF": ("sacrebleu", sacre("corpus_chrf")),
    "NIST": ("nltk", nist),
    "ROUGE-1": ("rouge_score", rouge("rouge1")),
    "ROUGE-2": ("rouge_score", rouge("rouge2")),
    "ROUGE-L": ("rouge_score", rouge("rougeL")),
}


def installed_measures() -> dict[str, Measure]:
    """Return the measures whose package is installed.

    Raises:
        ValueError: sacrebleu is not.
    """
    check_installed("task text", "sacrebleu")
    return {name: measure for name, (package, measure) in MEASURES.items() if installed(package)}
