"""Makes the texts that some examples learn from, out of packages; none of it is part of the project.

    python examples/texts.py verses OUT     English and Spanish verses, for translation
    python examples/texts.py cloze OUT      a name left out of a verse, to be found in another translation
    python examples/texts.py glosses OUT    definitions of nouns and what kind of thing each is, of 25
    python examples/texts.py papers OUT     abstracts of papers and a sentence on what they did, for summaries

``glosses`` writes OUT.tsv, at most 400 of a kind, out of Debian's package wordnet-base (WordNet's licence,
free for any use). The others write OUT-train, OUT-validation and OUT-test. ``verses`` and ``cloze`` are split
by book, since neighbours quote each other; they read Debian's packages sword-text-web, sword-text-kjv and
sword-text-sparv (public domain) with ``pip install pysword``. ``papers`` fetches aclsum 0.1.2 (MIT; papers
after 2016 are CC BY 4.0) and has its splits.
"""

from __future__ import annotations

import csv
import json
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.data.fetch import Archive, fetch

SWORD = "/usr/share/sword"
ENGLISH, OLDER, SPANISH = "engWEB2015eb", "engKJV2006eb", "spaRV1909eb"
HELD_OUT = {"validation": ("Esther", "Luke"), "test": ("Ruth", "Jonah", "Mark", "James")}
ACLSUM = Archive("aclsum", "0.1.2", "c75ffc48d3eabc5f37c68ea087943780a85950087957759e89746f21111f2213")
BLANK = "____"
WORDNET = "/usr/share/wordnet/data.noun"
KINDS = {  # the numbers of WordNet's files of nouns, but for the most general ones
    4: "act",
    5: "animal",
    6: "artifact",
    7: "attribute",
    8: "body",
    9: "cognition",
    10: "communication",
    11: "event",
    12: "feeling",
    13: "food",
    14: "group",
    15: "location",
    16: "motive",
    17: "object",
    18: "person",
    19: "phenomenon",
    20: "plant",
    21: "possession",
    22: "process",
    23: "quantity",
    24: "relation",
    25: "shape",
    26: "state",
    27: "substance",
    28: "time",
}
OF_A_KIND = 400
CONTEXT = 2  # verses to both sides
# verses that are translated to measure, at most: each is written, word by word
WRITTEN = {"validation": 100, "test": 200}


def verses(module: str) -> dict[tuple[str, int, int], str]:
    """Verses by book, chapter and number; those that a translation leaves out are not there."""
    from pysword.modules import SwordModules

    modules = SwordModules(SWORD)
    modules.parse_modules()
    bible = modules.get_bible_from_module(module)
    found = {}
    for books in bible.get_structure().get_books().values():
        for book in books:
            for chapter, count in enumerate(book.chapter_lengths, start=1):
                for verse in range(1, count + 1):
                    text = bible.get(books=[book.name], chapters=[chapter], verses=[verse])
                    if text := " ".join(text.split()):
                        found[book.name, chapter, verse] = text
    return found


def split_of(book: str) -> str:
    return next((split for split, books in HELD_OUT.items() if book in books), "train")


def write_verses(out: str) -> None:
    english, spanish = verses(ENGLISH), verses(SPANISH)
    rows: dict[str, list[tuple[str, str]]] = {"train": [], "validation": [], "test": []}
    for place in english.keys() & spanish.keys():
        rows[split_of(place[0])].append((english[place], spanish[place]))
    for split, found in rows.items():
        pairs = sorted(found)
        pairs = pairs[:: -(-len(pairs) // WRITTEN.get(split, len(pairs)))]  # evenly
        with Path(f"{out}-{split}.tsv").open("w", encoding="utf-8", newline="") as file:
            csv.writer(file, delimiter="\t").writerows([("en", "es"), *pairs])
        print(f"{out}-{split}.tsv: {len(pairs):,} verses")


def names_in(text: str) -> Iterator[str]:
    """Words with a capital that begin no sentence."""
    yield from re.findall(r"(?<=[a-z,;] )[A-Z][a-z]{3,}\b", text)


def write_cloze(out: str) -> None:
    newer, older = verses(ENGLISH), verses(OLDER)
    common = Counter(name for text in newer.values() for name in set(names_in(text)))
    found: dict[str, list[dict[str, Any]]] = {"train": [], "validation": [], "test": []}
    for book, chapter, verse in sorted(newer.keys() & older.keys()):
        asked, given = older[book, chapter, verse], newer[book, chapter, verse]
        names = [name for name in names_in(asked) if re.search(rf"\b{name}\b", given)]
        names = [name for name in names if common[name] < 500 and len(re.findall(rf"\b{name}\b", asked)) == 1]
        if not names:
            continue
        around = (newer.get((book, chapter, n), "") for n in range(verse - CONTEXT, verse + CONTEXT + 1))
        context, name = " ".join(filter(None, around)), names[0]
        answer = {"text": name, "answer_start": re.search(rf"\b{name}\b", context).start()}
        question = {
            "id": f"{book} {chapter}:{verse}",
            "question": re.sub(rf"\b{name}\b", BLANK, asked),
            "answers": [answer],
        }
        found[split_of(book)].append({"context": context, "qas": [question]})
    for split, paragraphs in found.items():
        content = {"version": "cloze", "data": [{"title": split, "paragraphs": paragraphs}]}
        Path(f"{out}-{split}.json").write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
        print(f"{out}-{split}.json: {len(paragraphs):,} questions")


def write_glosses(out: str) -> None:
    found: dict[str, set[str]] = {}
    for line in Path(WORDNET).read_text(encoding="utf-8").splitlines():
        entry, bar, gloss = line.partition(" | ")
        number = entry.split()[1:2]
        if bar and int(number[0]) in KINDS:
            found.setdefault(gloss.split('; "')[0].strip(), set()).add(KINDS[int(number[0])])
    of_kind: dict[str, list[str]] = {kind: [] for kind in KINDS.values()}
    for gloss, kinds in sorted(found.items()):
        if len(kinds) == 1:
            of_kind[min(kinds)].append(gloss)
    rows = [
        (gloss, kind) for kind, every in of_kind.items() for gloss in every[:: -(-len(every) // OF_A_KIND)]
    ]
    with Path(f"{out}.tsv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, delimiter="\t").writerows([("gloss", "kind"), *rows])
    print(f"{out}.tsv: {len(rows):,} glosses of {len(of_kind)} kinds")


def write_papers(out: str) -> None:
    folder = fetch(ACLSUM) / "aclsum" / "dataset"
    for split, file in (("train", "train"), ("validation", "val"), ("test", "test")):
        papers = [json.loads(line) for line in (folder / f"{file}.jsonl").read_text("utf-8").splitlines()]
        rows = [
            {"abstract": " ".join(paper["sentences"]["abstract"]), "summary": paper["summary"]["approach"]}
            for paper in papers
        ]
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        Path(f"{out}-{split}.jsonl").write_text("".join(lines), encoding="utf-8")
        print(f"{out}-{split}.jsonl: {len(rows):,} papers")


if __name__ == "__main__":
    makers = {
        "verses": write_verses,
        "cloze": write_cloze,
        "glosses": write_glosses,
        "papers": write_papers,
    }
    if len(sys.argv) != 3 or sys.argv[1] not in makers:
        raise SystemExit(__doc__)
    makers[sys.argv[1]](sys.argv[2])
