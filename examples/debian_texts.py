"""Public-domain English prose out of Debian packages, without installing them.

Each reader takes the folder into which `unpack` has extracted its packages and returns documents in reading order:

| source | package | text | licence |
| --- | --- | --- | --- |
| `king_james_bible` | bible-kjv-text, bible-kjv | Authorised Version, 1611 | text public domain; the `bible` program GPL-2+ |
| `jane_austen` | r-cran-janeaustenr | six novels, 1811 to 1818 | texts public domain; package MIT |
| `concise_commentary` | sword-comm-mhcc | Matthew Henry's Concise Commentary | public domain |
| `treasury_of_david` | sword-comm-tdavid | C. H. Spurgeon on the Psalms, 1869 to 1885 | public domain |

In a document one line is one paragraph (or one Bible verse); quotation marks and dashes are plain ASCII.
"""

from __future__ import annotations

import html
import re
import shutil
import struct
import subprocess
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

__all__ = ["SOURCES", "Document", "Source", "normalise", "unpack"]

BIBLE_BOOKS = (
    *("Genesis", "Exodus", "Leviticus", "Numbers", "Deuteronomy", "Joshua", "Judges", "Ruth", "1 Samuel", "2 Samuel"),
    *("1 Kings", "2 Kings", "1 Chronicles", "2 Chronicles", "Ezra", "Nehemiah", "Esther", "Job", "Psalms", "Proverbs"),
    *("Ecclesiastes", "Song of Solomon", "Isaiah", "Jeremiah", "Lamentations", "Ezekiel", "Daniel", "Hosea", "Joel"),
    *("Amos", "Obadiah", "Jonah", "Micah", "Nahum", "Habakkuk", "Zephaniah", "Haggai", "Zechariah", "Malachi"),
    *("Matthew", "Mark", "Luke", "John", "Acts", "Romans", "1 Corinthians", "2 Corinthians", "Galatians", "Ephesians"),
    *(
        "Philippians",
        "Colossians",
        "1 Thessalonians",
        "2 Thessalonians",
        "1 Timothy",
        "2 Timothy",
        "Titus",
        "Philemon",
    ),
    *("Hebrews", "James", "1 Peter", "2 Peter", "1 John", "2 John", "3 John", "Jude", "Revelation"),
)
OLD_TESTAMENT_BOOKS = 39
KJV_VERSES = 31_102
NOVELS = (
    "Emma",
    "Mansfield Park",
    "Northanger Abbey",
    "Persuasion",
    "Pride and Prejudice",
    "Sense and Sensibility",
)
# the characters of the packages outside ASCII that stand for something plain
PLAIN = str.maketrans(
    {"“": '"', "”": '"', "‘": "'", "’": "'", "—": "--", "–": "-", "\u202f": " ", "\xa0": " ", "•": "", "`": "'"}
)


@dataclass(frozen=True)
class Document:
    """One chapter.

    `work` and `part` say what the chapter is about, whoever wrote it: the Bible and its commentaries share them, so
    that holding out (work, part) holds out a chapter together with every comment on it.
    """

    source: str
    work: str
    part: int
    text: str


@dataclass(frozen=True)
class Source:
    """A text with its packages, its licence and the function that reads it from the unpacked folder."""

    title: str
    packages: tuple[str, ...]
    licence: str
    read: Callable[[Path], list[Document]]


def normalise(text: str) -> str:
    """Plain quotation marks and dashes, single spaces, no empty lines, no control characters."""
    text = text.translate(PLAIN)
    text = "".join(character for character in text if character.isprintable() or character in "\n\t")
    lines = (re.sub(r"\s+", " ", line).strip() for line in text.split("\n"))
    return "\n".join(line for line in lines if line)


def unpack(package: str, folder: Path, packages_dir: Path | None = None) -> None:
    """Extract a Debian package into `folder`, from `packages_dir` if a .deb lies there, else by `apt-get download`.

    Raises:
        RuntimeError: `apt-get` or `dpkg-deb` is missing or failed; the message says what to do.
    """
    if shutil.which("dpkg-deb") is None:
        raise RuntimeError(
            "dpkg-deb was not found: the built-in sources come as Debian packages. On Debian or Ubuntu install `dpkg`; "
            "elsewhere give text files of your own with --texts PATH."
        )
    folder.mkdir(parents=True, exist_ok=True)
    found = sorted(packages_dir.glob(f"{package}_*.deb")) if packages_dir else []
    if not found:
        if shutil.which("apt-get") is None:
            raise RuntimeError(
                f"apt-get was not found, so the package {package} cannot be downloaded. Put {package}_*.deb into a "
                "folder and name it with --packages_dir, or give text files of your own with --texts PATH."
            )
        target = packages_dir or folder
        target.mkdir(parents=True, exist_ok=True)
        _run(["apt-get", "download", package], cwd=target, advice="Run `apt-get update` first; a network is needed.")
        found = sorted(target.glob(f"{package}_*.deb"))
    if not found:
        raise RuntimeError(f"apt-get download {package} left no {package}_*.deb behind.")
    _run(["dpkg-deb", "-x", str(found[-1].resolve()), str(folder.resolve())], advice="The .deb file may be damaged.")


def _run(command: list[str], advice: str, cwd: Path | None = None) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    if done.returncode != 0:
        raise RuntimeError(
            f"`{' '.join(command)}` failed with exit status {done.returncode}: {done.stderr.strip()}. {advice}"
        )
    return done.stdout


def _king_james_bible(folder: Path) -> list[Document]:
    data = folder / "usr/lib"
    # the program looks for its compressed data in the current directory first
    printed = _run(
        [str((folder / "usr/bin/bible").resolve()), "-f", "gen1:1-rev22:21"],
        cwd=data,
        advice="It needs libreadline8 (`apt-get install libreadline8`).",
    )
    chapters: dict[tuple[int, int], list[str]] = {}
    books: dict[str, int] = {}
    for line in printed.splitlines():
        match = re.fullmatch(r"([0-9]?[A-Za-z]+)([0-9]+):[0-9]+ (.+)", line)
        if match is None:
            raise RuntimeError(f"bible-kjv printed a line that is no verse: {line[:80]!r}.")
        book = books.setdefault(match[1], len(books))
        chapters.setdefault((book, int(match[2])), []).append(match[3])
    verses = sum(map(len, chapters.values()))
    if verses != KJV_VERSES or len(books) != len(BIBLE_BOOKS):
        raise RuntimeError(f"bible-kjv gave {verses} verses in {len(books)} books, expected {KJV_VERSES} in 66.")
    return [
        Document("king_james_bible", BIBLE_BOOKS[book], chapter, normalise("\n".join(lines)))
        for (book, chapter), lines in chapters.items()
    ]


def _r_character_vectors(database: bytes) -> Iterator[list[str]]:
    """The strings of each object of an R lazy-load database: [4-byte length, zlib stream] each, XDR format inside."""
    position = 0
    while position < len(database):
        inflater = zlib.decompressobj()
        chunk = inflater.decompress(database[position + 4 :]) + inflater.flush()
        (length,) = struct.unpack_from(">I", database, position)
        if len(chunk) != length:
            raise RuntimeError(f"the R database is damaged: a chunk holds {len(chunk)} bytes, {length} announced.")
        position = len(database) - len(inflater.unused_data)
        strings, at = [], 0
        # a CHARSXP record: two bytes of flags, type 9, a signed length, the bytes
        while (at := chunk.find(b"\x00\x09", at)) >= 0:
            (size,) = struct.unpack_from(">i", chunk, at + 2) if at + 6 <= len(chunk) else (-1,)
            if 0 <= size <= len(chunk) - at - 6 and size < 1000:
                strings.append(chunk[at + 6 : at + 6 + size].decode("utf-8"))
                at += 6 + size
            else:
                at += 1
        yield strings


def _jane_austen(folder: Path) -> list[Document]:
    database = folder / "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb"
    if not database.is_file():
        raise RuntimeError(f"r-cran-janeaustenr has no {database.name}: this version packs its novels differently.")
    novels = list(_r_character_vectors(database.read_bytes()))
    if len(novels) != len(NOVELS):
        raise RuntimeError(f"{database} holds {len(novels)} objects, expected the {len(NOVELS)} novels.")
    documents = []
    for novel, lines in zip(NOVELS, novels, strict=True):
        if novel.upper() not in " ".join(lines[:3]).upper():
            raise RuntimeError(f"expected {novel} in {database}, found a text that begins {lines[:2]!r}.")
        text = "\n".join(lines)
        # the last chapter ends at the closing word or at the note of the edition from which the text was taken
        text = re.split(r"\n\s*(?:FINIS|Finis|THE END|A NOTE ON THE TEXT)\s*(?:\n|$)", text)[0]
        chapters = re.split(r"(?m)^ *(?:CHAPTER|Chapter) +[IVXLC0-9]+\.?(?:\s*\(\d+\))? *$", text)[1:]
        for number, chapter in enumerate(chapters, start=1):
            documents.append(Document("jane_austen", novel, number, _unwrap(chapter)))
    return documents


def _unwrap(chapter: str) -> str:
    """Join the printed lines of each paragraph; drop volume headings, rows of stars, footnotes and editors' notes."""
    paragraphs = []
    for block in re.split(r"\n\s*\n", chapter):
        block = " ".join(block.split())
        if not re.match(r"(?:VOLUME\b|\[(?:At this point|End volume)|\*)", block) and block:
            paragraphs.append(block.replace("_", "").replace(",*", ","))
    return normalise("\n".join(paragraphs))


def _sword_blocks(folder: Path, testament: str, letter: str) -> Iterator[str]:
    """The text blocks of a compressed SWORD module: an index of (offset, size, inflated size) and zlib streams."""
    index, data = ((folder / f"{testament}.{letter}z{kind}").read_bytes() for kind in "sz")
    for offset, size, inflated in struct.iter_unpack("<III", index):
        if size:
            block = zlib.decompress(data[offset : offset + size])
            if len(block) != inflated:
                raise RuntimeError(f"{folder}: a block holds {len(block)} bytes, {inflated} announced.")
            yield block.decode("utf-8")


def _prose(osis: str) -> str:
    """Running text of an OSIS fragment: paragraphs only, without tables, headings and verse labels."""
    osis = re.sub(r"<table>.*?</table>|<title\b.*?</title>", "\n", osis, flags=re.DOTALL)
    osis = re.sub(r'<hi type="bold">\s*Verses?\b[^<]*</hi>', " ", osis)
    osis = re.sub(r"<(?:div|chapter|list|item|lg?)\b[^>]*>", "\n", osis)
    text = normalise(html.unescape(re.sub(r"<[^>]*>", "", osis)).replace("#", ""))
    return "\n".join(_mend_quotes(paragraph) for paragraph in text.split("\n"))


def _mend_quotes(paragraph: str) -> str:
    """Put the space after a closing quotation mark where the module has it before: `to "arise, "as` there."""
    pieces = paragraph.split('"')
    # an odd number of marks leaves open which of them close
    if len(pieces) % 2 == 0:
        return paragraph
    for inside in range(1, len(pieces), 2):
        if pieces[inside].endswith(" ") and pieces[inside + 1][:1].isalnum():
            pieces[inside] = pieces[inside].rstrip()
            pieces[inside + 1] = " " + pieces[inside + 1]
    return '"'.join(pieces)


def _concise_commentary(folder: Path) -> list[Document]:
    module = folder / "usr/share/sword/modules/comments/zcom/mhcc"
    documents = []
    books = [*_sword_blocks(module, "ot", "b"), *_sword_blocks(module, "nt", "b")]
    book = -1
    for block in books:
        chapters = re.split(r'<chapter n="(\d+)"[^>]*/>', block)
        if len(chapters) < 3:  # the heading of a testament
            continue
        book += 1
        for number, chapter in zip(chapters[1::2], chapters[2::2], strict=True):
            if text := _prose(chapter):
                documents.append(Document("concise_commentary", BIBLE_BOOKS[book], int(number), text))
    if book + 1 != len(BIBLE_BOOKS):
        raise RuntimeError(f"sword-comm-mhcc holds {book + 1} books, expected {len(BIBLE_BOOKS)}.")
    return documents


def _treasury_of_david(folder: Path) -> list[Document]:
    module = folder / "usr/share/sword/modules/comments/zcom/tdavid"
    documents = []
    for block in _sword_blocks(module, "ot", "c"):
        number = re.search(r'<chapter n="(\d+)"', block)
        # a psalm's block: subject, EXPOSITION (Spurgeon's own prose), then extracts from others, hints, book lists
        sections = re.split(r"(<title\b.*?</title>)", block, flags=re.DOTALL)
        own = [
            body
            for title, body in zip(sections[1::2], sections[2::2], strict=True)
            if re.match(r"<title[^>]*>\s*EXPOSITION", title)
        ]
        if number and own:
            documents.append(Document("treasury_of_david", "Psalms", int(number[1]), _prose("\n".join(own))))
    if len(documents) < 140:
        raise RuntimeError(f"sword-comm-tdavid gave the exposition of {len(documents)} psalms, expected 150.")
    return documents


SOURCES = {
    "king_james_bible": Source(
        title="King James Bible (Authorised Version)",
        packages=("bible-kjv-text", "bible-kjv"),
        licence="text in the public domain; the extracting program is GPL-2+ and is not redistributed",
        read=_king_james_bible,
    ),
    "jane_austen": Source(
        title="The six novels of Jane Austen",
        packages=("r-cran-janeaustenr",),
        licence="texts in the public domain; package MIT",
        read=_jane_austen,
    ),
    "concise_commentary": Source(
        title="Matthew Henry's Concise Commentary on the Whole Bible",
        packages=("sword-comm-mhcc",),
        licence="public domain",
        read=_concise_commentary,
    ),
    "treasury_of_david": Source(
        title="C. H. Spurgeon, The Treasury of David (the expositions)",
        packages=("sword-comm-tdavid",),
        licence="public domain",
        read=_treasury_of_david,
    ),
}
