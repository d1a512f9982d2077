"""The fenced blocks of a page, and what their marks say about them."""

import re
from dataclasses import dataclass

FENCE = re.compile(r"^( *)(```+)(\w*)[^\n]*\n(.*?)^\1\2 *$", re.DOTALL | re.MULTILINE)
MARK = re.compile(r"<!-- (needs|not run|numbers vary)(?:: ([^\n]*?))? -->\s*\Z")
NAMED = re.compile(r"# ([\w/.-]+\.\w+)\n")


@dataclass(frozen=True)
class Block:
    """One block.

    Attributes:
        place: page and line of its fence.
        language: what stands behind the fence.
        text: what is between the fences, without the indentation of a list.
        marks: by kind, what the comments directly above the fence say.
        output: the text block that follows without words between, for Python; else none.
    """

    place: str
    language: str
    text: str
    marks: dict[str, str]
    output: str | None = None

    @property
    def is_run(self):
        return not {"needs", "not run"} & self.marks.keys()

    @property
    def file(self):
        """The path that its first line names."""
        named = NAMED.match(self.text)
        return named and named[1]


@dataclass(frozen=True)
class Command:
    """A line behind a prompt, with the lines that continue it, and what the page says that it prints."""

    place: str
    line: str
    shown: str


def blocks(page, text):
    """The blocks of a page, in order."""
    found = [(match, *_read(page, text, match)) for match in FENCE.finditer(text)]
    for index, (match, place, language, body, marks) in enumerate(found):
        follower = found[index + 1] if index + 1 < len(found) else None
        follows = follower and follower[2] == "text" and not text[match.end() : follower[0].start()].strip()
        yield Block(place, language, body, marks, follower[3] if follows else None)


def _read(page, text, match):
    indentation, _, language, body = match.groups()
    body = re.sub(rf"^{indentation}", "", body, flags=re.MULTILINE)
    return f"{page}:{text.count(chr(10), 0, match.start()) + 1}", language, body, _marks(text[: match.start()])


def _marks(above):
    marks = {}
    while mark := MARK.search(above):
        marks[mark[1]] = mark[2] or ""
        above = above[: mark.start()]
    return marks


def commands(block):
    """The commands of a console block."""
    prompts = re.split(r"^\$ ", block.text, flags=re.MULTILINE)
    assert not prompts[0], f"{block.place}: a console block begins with a command: {prompts[0]!r}"
    for prompt in prompts[1:]:
        line, shown = re.match(r"((?:[^\n]*\\\n)*[^\n]*)\n?(.*)", prompt, re.DOTALL).groups()
        yield Command(block.place, line.replace("\\\n", " "), shown)
