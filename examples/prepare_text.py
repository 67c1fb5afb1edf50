"""Make train.txt, valid.txt and test.txt of public-domain English prose, or of text files of your own.

    python examples/prepare_text.py                                   # the built-in sources, into .data/
    python examples/prepare_text.py --texts my_book.txt my_folder/    # your own files instead

Of every work two contiguous runs of chapters are held out: one to choose by (valid), one to report (test). With a
chapter of the Bible goes every comment on it, whichever source it stands in. Written are:

- `train.txt`, `valid.txt`, `test.txt`: documents, each followed by a line that holds only `<|endoftext|>`; in a
  document one line is one paragraph or verse;
- `excerpt.txt`: a few documents of the test split from each source, for a quick check of a trained model;
- `words.txt`: the words of the training text that occur at least `--min_word_count` times, in lower case;
- `sources.json`: sources, packages, licences, sizes, sha256 of every file, and how much of the test split occurs
  word for word in the training text.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from debian_texts import SOURCES, Document, normalise, unpack
from transformers import HfArgumentParser

__all__ = ["SEPARATOR", "PrepareArguments", "hold_out", "main", "prepare", "read_texts", "word_overlap"]

SEPARATOR = "<|endoftext|>"
OWN_PART_CHARACTERS = 4_000
OVERLAP_WORDS = 13


@dataclass
class PrepareArguments:
    """Options of prepare_text.py."""

    output_dir: str = field(default=".data", metadata={"help": "folder to write into"})
    sources: list[str] = field(
        default_factory=lambda: list(SOURCES), metadata={"help": f"built-in sources to use, of: {', '.join(SOURCES)}"}
    )
    texts: list[str] = field(
        default_factory=list,
        metadata={"help": "text files, or folders searched for *.txt, to use instead of the built-in sources"},
    )
    packages_dir: str | None = field(
        default=None, metadata={"help": "folder with the .deb files; missing ones are downloaded into it"}
    )
    held_out_fraction: float = field(
        default=0.03,
        metadata={"help": "fraction of each work for the validation split, and as much for the test split"},
    )
    excerpt_bytes: int = field(default=48_000, metadata={"help": "size limit of excerpt.txt"})
    min_word_count: int = field(default=20, metadata={"help": "how often a word must occur to stand in words.txt"})

    def __post_init__(self) -> None:
        unknown = [name for name in self.sources if name not in SOURCES]
        if unknown:
            raise ValueError(f"--sources: unknown source {unknown[0]!r}; choose from {', '.join(SOURCES)}.")
        if not 0 < self.held_out_fraction < 0.3:
            raise ValueError(f"--held_out_fraction must lie between 0 and 0.3, got {self.held_out_fraction}.")


def read_texts(paths: Iterable[str]) -> list[Document]:
    """Read the user's text files (UTF-8). A file is a work; its parts are spans of whole paragraphs.

    Paragraphs are separated by empty lines; lines inside a paragraph are joined. A file without any empty line is
    taken to hold one paragraph a line.

    Raises:
        ValueError: a path does not exist, a folder holds no *.txt, a file is not UTF-8, or nothing was read.
    """
    files: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted(path.rglob("*.txt"))
            if not inside:
                raise ValueError(f"--texts: the folder {path} holds no *.txt file.")
            files += inside
        elif path.is_file():
            files.append(path)
        else:
            raise ValueError(f"--texts: {path} does not exist.")
    documents = []
    for file in dict.fromkeys(files):
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"--texts: {file} is not UTF-8 ({error}); convert it, e.g. with `iconv -t UTF-8`."
            ) from None
        blocks = re.split(r"\n\s*\n", text.strip())
        paragraphs = blocks if len(blocks) > 1 else text.splitlines()
        paragraphs = [joined for block in paragraphs if (joined := normalise(" ".join(block.split())))]
        parts: list[list[str]] = [[]]
        for paragraph in paragraphs:
            if sum(map(len, parts[-1])) > OWN_PART_CHARACTERS:
                parts.append([])
            parts[-1].append(paragraph)
        documents += [
            Document(source=file.stem, work=str(file), part=number, text="\n".join(part))
            for number, part in enumerate(parts, start=1)
            if part
        ]
    if not documents:
        raise ValueError("--texts: the files hold no text.")
    return documents


def hold_out(documents: list[Document], fraction: float) -> dict[str, list[Document]]:
    """Split into "train", "valid" and "test": of every work one contiguous run of parts for each of the last two.

    The validation run begins at a third of the work, the test run at two thirds. Each is as long as it can be within
    `fraction` of the work, and at least one part. Works of fewer than 10 parts go to "train" whole.

    Raises:
        ValueError: no work is long enough to hold anything out.
    """
    sizes: dict[str, dict[int, int]] = defaultdict(lambda: defaultdict(int))
    for document in documents:
        sizes[document.work][document.part] += len(document.text)
    split_of: dict[tuple[str, int], str] = {}
    for work, parts in sizes.items():
        order = sorted(parts)
        if len(order) < 10:
            continue
        allowed = fraction * sum(parts.values())
        for split, start in (("valid", len(order) // 3), ("test", 2 * len(order) // 3)):
            end = start + 1
            while end < start + len(order) // 3 and sum(parts[part] for part in order[start : end + 1]) <= allowed:
                end += 1
            split_of.update({(work, part): split for part in order[start:end]})
    if not split_of:
        raise ValueError(
            "nothing could be held out: every work is shorter than 10 parts of about "
            f"{OWN_PART_CHARACTERS} characters. Give more text."
        )
    splits: dict[str, list[Document]] = {"train": [], "valid": [], "test": []}
    for document in documents:
        splits[split_of.get((document.work, document.part), "train")].append(document)
    return splits


def words_of(text: str) -> list[str]:
    """Lower-case words; an apostrophe inside a word belongs to it."""
    return re.findall(r"[a-z]+(?:'[a-z]+)*", text.lower())


def word_overlap(train: list[Document], held: list[Document], length: int = OVERLAP_WORDS) -> float:
    """Fraction of the held-out runs of `length` words that also occur in the training text."""

    def runs(document: Document) -> Iterable[int]:
        words = words_of(document.text)
        return (hash(tuple(words[i : i + length])) for i in range(len(words) - length + 1))

    wanted = Counter(run for document in held for run in runs(document))
    seen = {run for document in train for run in runs(document) if run in wanted}
    return sum(count for run, count in wanted.items() if run in seen) / max(1, sum(wanted.values()))


def join(documents: Iterable[Document]) -> str:
    """The documents as one text, a separator line after each."""
    return "".join(f"{document.text}\n{SEPARATOR}\n" for document in documents)


def excerpt(held: list[Document], limit: int) -> list[Document]:
    """Held-out documents of at most `limit` bytes together, an equal share for each source.

    A source whose every document is larger than its share gives the first paragraphs of its first one.
    """
    sources = list(dict.fromkeys(document.source for document in held))
    share = limit // max(1, len(sources))
    chosen = []
    for source in sources:
        own, room = [document for document in held if document.source == source], share
        fitting = []
        for document in own:
            size = len(join([document]).encode())
            if size <= room:
                fitting.append(document)
                room -= size
        if not fitting:
            lines = own[0].text.split("\n")
            while len(lines) > 1 and len("\n".join(lines).encode()) + len(SEPARATOR) + 2 > share:
                lines.pop()
            fitting = [replace(own[0], text="\n".join(lines))]
        chosen += fitting
    return chosen


def prepare(arguments: PrepareArguments) -> dict[str, Any]:
    """Read the sources, split, write the files and return what was written into sources.json."""
    documents: list[Document] = []
    described: dict[str, dict[str, Any]] = {}
    if arguments.texts:
        documents = read_texts(arguments.texts)
        for name in dict.fromkeys(document.source for document in documents):
            described[name] = {"title": name, "packages": [], "licence": "not stated"}
    else:
        packages_dir = Path(arguments.packages_dir) if arguments.packages_dir else None
        for name in arguments.sources:
            source = SOURCES[name]
            print(f"{source.title}: {', '.join(source.packages)}", flush=True)
            with tempfile.TemporaryDirectory() as folder:
                for package in source.packages:
                    unpack(package, Path(folder), packages_dir)
                documents += source.read(Path(folder))
            described[name] = {"title": source.title, "packages": list(source.packages), "licence": source.licence}

    splits = hold_out(documents, arguments.held_out_fraction)
    train, test = splits["train"], splits["test"]
    counts = Counter(word for document in train for word in words_of(document.text))
    files = {
        **{f"{split}.txt": join(part) for split, part in splits.items()},
        "excerpt.txt": join(excerpt(test, arguments.excerpt_bytes)),
        "words.txt": "".join(f"{w}\n" for w in sorted(counts) if counts[w] >= arguments.min_word_count),
    }
    for name, entry in described.items():
        for split, part in splits.items():
            own = [document for document in part if document.source == name]
            entry[f"{split}_documents"] = len(own)
            entry[f"{split}_bytes"] = sum(len(document.text.encode()) for document in own)
    report = {
        "sources": described,
        "separator": SEPARATOR,
        "held_out_fraction": arguments.held_out_fraction,
        # in the order of the file, so that the text of one source can be evaluated alone
        "test_documents": [[document.source, document.work, document.part] for document in test],
        f"test_runs_of_{OVERLAP_WORDS}_words_found_in_train": round(word_overlap(train, test), 5),
        "files": {
            name: {"bytes": len(text.encode()), "sha256": hashlib.sha256(text.encode()).hexdigest()}
            for name, text in files.items()
        },
    }
    output = Path(arguments.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (output / name).write_text(text, encoding="utf-8", newline="\n")
    (output / "sources.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return report


def main() -> None:
    """Entry point of the script: parse the options, prepare, print the sizes."""
    parser = HfArgumentParser(cast(Any, PrepareArguments), description=(__doc__ or "").split("\n")[0])
    try:
        (arguments,) = parser.parse_args_into_dataclasses()
        report = prepare(arguments)
    except (ValueError, RuntimeError) as error:
        sys.exit(f"error: {error}")
    for name, entry in report["sources"].items():
        print(f"{name:24} train {entry['train_bytes']:>10,} bytes   test {entry['test_bytes']:>8,} bytes")
    for name, entry in report["files"].items():
        print(f"{arguments.output_dir}/{name:12} {entry['bytes']:>11,} bytes  sha256 {entry['sha256'][:16]}")


if __name__ == "__main__":
    main()
