#!/usr/bin/env python3
"""Counts properties that make a tree easy or hard to change: lines, unsafe blocks, public items, long functions, cycles
of files, type names defined more than once.

    python3 scripts/check/tree_stats.py [ROOT] [--list]      ROOT is a checkout [default: this one]; --list names what is counted

Counted are src/ and adapters/src/ without tests (`#[cfg(test)]` items, tests/, benches/, examples/), unless a line says so.
Comments and string literals do not count as code. This is a reading of the text, not of the compiler: macros that
define items are not expanded.
"""

import re
import sys
from collections import defaultdict
from pathlib import Path

TOKEN = re.compile(
    r"""//[^\n]*|/\*.*?\*/|b?r(?P<h>\#*)".*?"(?P=h)|b?"(?:\\.|[^"\\])*"|b?'(?:\\.[^']*|[^'\\])'""", re.S
)
NAME = r"[A-Za-z_][A-Za-z0-9_]*"


def code(text):
    """The text with comments and literals blanked, line breaks kept."""

    def blank(match):
        return re.sub(r"[^\n]", " ", match.group())

    return TOKEN.sub(blank, text)


def closing(text, at):
    """The index after the brace that closes the one at `at`."""
    depth = 0
    for i in range(at, len(text)):
        depth += {"{": 1, "}": -1}.get(text[i], 0)
        if depth == 0:
            return i + 1
    return len(text)


def without_tests(text):
    """Blanks items under `#[cfg(test)]` and the like."""
    for match in reversed(list(re.finditer(r"#\[cfg\((?:all\()?test\b[^\]]*\]", text))):
        rest = text[match.end() :]
        end = re.search(r"[;{]", rest)
        if not end:
            continue
        stop = match.end() + end.end()
        if end.group() == "{":
            stop = closing(text, stop - 1)
        text = text[: match.start()] + re.sub(r"[^\n]", " ", text[match.start() : stop]) + text[stop:]
    return text


def functions(text):
    """(name, lines) of every function with a body, nested ones too."""
    for match in re.finditer(rf"\bfn\s+({NAME})", text):
        depth = 0
        for i in range(match.end(), len(text)):
            if text[i] in "([":
                depth += 1
            elif text[i] in ")]":
                depth -= 1
            elif text[i] == ";" and depth == 0:
                break
            elif text[i] == "{" and depth == 0:
                yield match.group(1), text.count("\n", match.start(), closing(text, i)) + 1
                break


def expanded(tree):
    """The paths of a use tree: `a::{b, c::{d as e}}` -> [([a, b], b), ([a, c, d], e)]."""
    tree = tree.strip()
    if "{" in tree:
        head, inside = tree.split("{", 1)
        inside = inside[: inside.rindex("}")]
        parts, depth, part = [], 0, ""
        for char in inside:
            depth += {"{": 1, "}": -1}.get(char, 0)
            if char == "," and depth == 0:
                parts.append(part)
                part = ""
            else:
                part += char
        for part in [*parts, part]:
            if part.strip():
                for path, name in expanded(part):
                    yield head.replace(" ", "").strip(":").split("::") * bool(head.strip()) + path, name
        return
    path, _, alias = tree.partition(" as ")
    path = [part for part in path.replace(" ", "").replace("\n", "").split("::") if part]
    if path[-1:] == ["self"] and len(path) > 1:
        path.pop()
    yield path, (alias.strip() or (path[-1] if path else ""))


class Crate:
    """The module files of a crate, and which uses which."""

    def __init__(self, folder):
        self.modules = {}  # path as a tuple -> text
        for file in sorted(folder.rglob("*.rs")):
            parts = list(file.relative_to(folder).with_suffix("").parts)
            if parts[-1] in ("mod", "lib"):
                parts.pop()
            if parts == ["main"] or file.name == "tests.rs":
                continue
            self.modules[tuple(parts)] = without_tests(code(file.read_text()))
        self.exports = {module: self.reexports(module) for module in self.modules}

    def uses(self, module):
        """(public, path, name) of every use statement."""
        for match in re.finditer(r"\b(pub(?:\([^)]*\))?\s+)?use\s+([^;]+);", self.modules[module]):
            for path, name in expanded(match.group(2)):
                yield bool(match.group(1)), path, name

    def reexports(self, module):
        return {name: path for public, path, name in self.uses(module) if public}

    def absolute(self, module, path):
        """A path from the crate's root, or None for another crate's."""
        if path[0] == "crate":
            return tuple(path[1:])
        if path[0] not in ("super", "self"):
            return module + tuple(path) if module + (path[0],) in self.modules else None
        module = list(module)
        for i, part in enumerate(path):
            if part == "super":
                module = module[:-1]
            elif part != "self":
                return tuple(module) + tuple(path[i:])
        return tuple(module)

    def file_of(self, path, seen=()):
        """The module that defines the item of an absolute path, after re-exports."""
        module = path
        while module not in self.modules:
            module = module[:-1]
            if not module:
                break
        rest = path[len(module) :]
        if rest and (exported := self.exports.get(module, {}).get(rest[0])) and (module, rest) not in seen:
            target = self.absolute(module, exported)
            if target is not None:
                return self.file_of(target + rest[1:], (*seen, (module, rest)))
        return module

    def arrows(self):
        """Module -> the modules whose items it uses; `mod` and `pub use` are no use."""
        found = defaultdict(set)
        for module, text in self.modules.items():
            paths = [path for public, path, _ in self.uses(module) if not public]
            body = re.sub(r"\b(pub(\([^)]*\))?\s+)?use\s+[^;]+;", "", text)
            paths += [match.group().split("::") for match in re.finditer(rf"\b(crate|super|self)(::{NAME})+", body)]
            for path in paths:
                if path and (target := self.absolute(module, path)) is not None:
                    file = self.file_of(target)
                    if file != module and file:
                        found[module].add(file)
        return found


def circles(arrows):
    """Strongly connected sets of more than one module (Tarjan)."""
    index, low, stack, found = {}, {}, [], []
    sys.setrecursionlimit(10_000)

    def visit(node):
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in arrows.get(node, ()):
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            part = []
            while part[-1:] != [node]:
                part.append(stack.pop())
            if len(part) > 1:
                found.append(sorted(part))

    for node in list(arrows):
        if node not in index:
            visit(node)
    return sorted(found, key=len, reverse=True)


def main():
    args = [arg for arg in sys.argv[1:] if arg != "--list"]
    show = "--list" in sys.argv
    root = Path(args[0]) if args else Path(__file__).resolve().parents[2]
    sources = [folder for folder in (root / "src", root / "adapters/src") if folder.is_dir()]
    files = sorted(file for folder in sources for file in folder.rglob("*.rs"))
    texts = {file.relative_to(root): file.read_text() for file in files}
    bare = {name: without_tests(code(text)) for name, text in texts.items()}
    rust = [file for part in ("src", "adapters", "tests", "benches", "examples") for file in (root / part).rglob("*.rs")]
    in_cli = lambda name: str(name).startswith("src/cli") or name.name == "main.rs"

    rows = []

    def row(what, count, named=()):
        rows.append((what, count))
        if show and named:
            rows.extend((f"    {line}", "") for line in named)

    row("Rust files, tests included", len(rust))
    row("Rust lines, tests included", sum(file.read_text().count("\n") for file in rust))
    row("source files", len(files))
    row("source lines", sum(text.count("\n") for text in texts.values()))
    row("lines of code (no tests, comments, blank lines)", sum(bool(line.strip()) for text in bare.values() for line in text.splitlines()))
    blocks = {name: len(re.findall(r"\bunsafe\s*\{", text)) for name, text in bare.items()}
    row("unsafe blocks", sum(blocks.values()), [f"{count:4} {name}" for name, count in blocks.items() if count])
    row("unsafe blocks in src/model", sum(count for name, count in blocks.items() if str(name).startswith("src/model")))
    row("unsafe fn", sum(len(re.findall(r"\bunsafe\s+(?:extern\s+)?fn\b", text)) for text in bare.values()))
    item = re.compile(r"^\s*pub\s+(?:const\s+fn|unsafe\s+fn|async\s+fn|fn|struct|enum|union|trait|type|const|static|mod|use)\b", re.M)
    public = {name: len(item.findall(text)) for name, text in bare.items() if not in_cli(name)}
    row("pub items outside cli", sum(public.values()))
    spans = sorted(
        ((lines, function, name) for name, text in bare.items() for function, lines in functions(text)), reverse=True
    )
    long = [f"{lines:4} {function} ({name})" for lines, function, name in spans if lines > 100]
    row("functions over 100 lines", len(long), long)
    row("functions over 50 lines", sum(lines > 50 for lines, _, _ in spans))
    found = []
    for folder in sources:
        found += circles(Crate(folder).arrows())
    row("circles of files", len(found), [f"{len(part)}: {', '.join('/'.join(module) for module in part)}" for part in found])
    row("files in circles", sum(map(len, found)))
    types = defaultdict(list)
    for name, text in bare.items():
        for match in re.finditer(rf"\b(?:struct|enum|union|trait)\s+({NAME})|^(?:pub(?:\([^)]*\))?\s+)?type\s+({NAME})", text, re.M):
            types[match.group(1) or match.group(2)].append(str(name))
    twice = {name: where for name, where in sorted(types.items()) if len(where) > 1}
    row("type names", len(types))
    row("type names defined twice or more", len(twice), [f"{name}: {', '.join(where)}" for name, where in twice.items()])
    prints = {
        name: len(re.findall(r"\be?print(?:ln)?!", text)) for name, text in bare.items() if not in_cli(name) and "test" not in name.name
    }
    row("print macros outside cli", sum(prints.values()), [f"{count:4} {name}" for name, count in prints.items() if count])
    clap = [str(name) for name, text in bare.items() if not in_cli(name) and re.search(r"\bclap\b", text)]
    row("files with clap outside cli", len(clap), clap)
    for what, count in rows:
        print(f"{what:50}{count}" if count != "" else what)


if __name__ == "__main__":
    main()
