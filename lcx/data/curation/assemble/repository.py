"""Files of a repository in the order of their dependencies: each behind those that it imports.

What a file imports is read from Python's syntax tree, and in C, C++, JavaScript, TypeScript and Java by simple patterns; what is
no file of the repository is left out. Files of other languages depend on nothing.
"""

from __future__ import annotations

import ast
import heapq
import posixpath
import re
import warnings
from collections.abc import Sequence

PYTHON, C, JAVASCRIPT, JAVA = (
    (".py", ".pyi"),
    (".c", ".h", ".cc", ".hh", ".cpp", ".hpp", ".cxx", ".hxx", ".cu", ".cuh"),
    (".js", ".jsx", ".mjs", ".cjs", ".ts", ".tsx"),
    (".java",),
)
_INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]+"([^"\n]+)"', re.M)
_FROM = re.compile(r"""(?:\bfrom|\bimport|\brequire\(|\bimport\()\s*['"](\.{1,2}/[^'"\n]+)['"]""")
_JAVA = re.compile(r"^[ \t]*import[ \t]+(?:static[ \t]+)?([\w.]+)[ \t]*;", re.M)

Reference = tuple[str, ...]
"""Where a file may be that another one refers to: paths from the root of the repository, or endings (`*/a/b.h`), the first that
exists counts."""


def references(path: str, text: str) -> list[Reference]:
    """What a file refers to; `path` is relative to its repository. Empty for a file that cannot be parsed."""
    ending, folder = posixpath.splitext(path)[1].lower(), posixpath.dirname(path)
    if ending in PYTHON:
        return _python(path, text)
    if ending in C:
        return [(posixpath.normpath(posixpath.join(folder, name)), name, f"*/{name}") for name in _INCLUDE.findall(text)]
    if ending in JAVASCRIPT:
        targets = [posixpath.normpath(posixpath.join(folder, name)) for name in _FROM.findall(text)]
        return [(to, *(to + end for end in JAVASCRIPT), *(f"{to}/index{end}" for end in JAVASCRIPT)) for to in targets]
    if ending in JAVA:
        return [(f"{name.replace('.', '/')}.java", f"*/{name.replace('.', '/')}.java") for name in _JAVA.findall(text)]
    return []


def _python(path: str, text: str) -> list[Reference]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return []
    folder = posixpath.dirname(path)
    package, found = folder.split("/"), []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [_module(alias.name.split("."), folder) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = (node.module or "").split(".") if node.module else []
            if node.level:
                # One dot is the file's own package, each further one the package around it.
                base = [part for part in package[: len(package) - node.level + 1] if part] + base
                found += [_relative(base, alias.name) for alias in node.names]
            else:
                found += [_module([*base, alias.name], folder) for alias in node.names]
    return found


def _relative(base: list[str], name: str) -> Reference:
    """A module `name` of a package, or the package or module `base` that defines it."""
    return tuple(candidate for parts in ([*base, name], base) if parts for candidate in _files(parts))


def _module(parts: list[str], folder: str) -> Reference:
    """The longest beginning of a dotted name that is a module, from the root, from a folder in front, or next to the file."""
    prefixes = [parts[:length] for length in range(len(parts), 0, -1)]
    fronts = ("", "src/", "lib/", "python/", f"{folder}/")
    return tuple(f"{front}{name}" for prefix in prefixes for name in _files(prefix) for front in fronts)


def _files(parts: list[str]) -> tuple[str, ...]:
    path = "/".join(parts)
    return f"{path}.py", f"{path}/__init__.py", f"{path}.pyi", f"{path}/__init__.pyi"


def order(paths: Sequence[str], referred: Sequence[Sequence[Reference]]) -> list[int]:
    """The numbers of the files, each behind those it refers to; of several that could come next the first by path.

    In a cycle none can be first: then comes the file that waits for the fewest others, of several the first by path.
    """
    numbers = {path: i for i, path in enumerate(paths)}
    endings: dict[str, list[str]] = {}
    for path in sorted(paths):
        endings.setdefault(posixpath.basename(path), []).append(path)

    def resolve(reference: Reference) -> int | None:
        for candidate in reference:
            if candidate in numbers:
                return numbers[candidate]
            if candidate.startswith("*/"):
                ending = candidate[1:]
                match = next((path for path in endings.get(posixpath.basename(ending), []) if f"/{path}".endswith(ending)), None)
                if match is not None:
                    return numbers[match]
        return None

    needs = [{other for reference in refers if (other := resolve(reference)) is not None} for refers in referred]
    return _topological(paths, [need - {i} for i, need in enumerate(needs)])


def _topological(paths: Sequence[str], needs: Sequence[set[int]]) -> list[int]:
    waits = [set(need) for need in needs]
    users: list[list[int]] = [[] for _ in paths]
    for i, need in enumerate(needs):
        for other in need:
            users[other].append(i)
    heap = [(len(wait), paths[i], i) for i, wait in enumerate(waits)]
    heapq.heapify(heap)
    done, found = [False] * len(paths), []
    while heap:
        count, _, i = heapq.heappop(heap)
        # An entry is out of date if the file has come, or waits for fewer than it says.
        if done[i] or count != len(waits[i]):
            continue
        done[i] = True
        found.append(i)
        for user in users[i]:
            waits[user].discard(i)
            if not done[user]:
                heapq.heappush(heap, (len(waits[user]), paths[user], user))
    return found
