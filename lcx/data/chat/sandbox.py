"""A sandbox for chat templates, which are programs by strangers: it limits what they call, how long they run and what they produce.

The language is the one that transformers gives to templates (`ImmutableSandboxedEnvironment` of jinja2, `raise_exception`,
`strftime_now`, `tojson` without HTML escapes, trimmed blocks, loop controls, `{% generation %}`), minus what a conversation does
not need: filters and methods that pad or format to a width, and `lipsum`. Three limits turn an endless or enormous template into
an error: the iterations and calls of all loops together, the size of every value and of the text, and seconds of CPU time. The
first two grow with the conversation. For the limits that jinja2 leaves to users of its sandbox see
https://jinja.palletsprojects.com/sandbox.
"""

from __future__ import annotations

import datetime
import json
import re
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jinja2
from jinja2 import ext, nodes, sandbox, visitor
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.utils import Namespace

SECONDS = 10.0
_TURNS, _TURNS_PER_MESSAGE = 20_000, 1_000
_SIZE, _SIZE_PER_INPUT = 1_000_000, 8
_ITEM = 8
_LONGEST_TEMPLATE = 500_000
_BITS = 256
_GENERATION = "generation"

_STR_METHODS = frozenset((
    "capitalize", "casefold", "count", "endswith", "find", "index", "isalnum", "isalpha", "isascii", "isdecimal", "isdigit",
    "isidentifier", "islower", "isnumeric", "isprintable", "isspace", "istitle", "isupper", "join", "lower", "lstrip",
    "partition", "removeprefix", "removesuffix", "replace", "rfind", "rindex", "rpartition", "rsplit", "rstrip", "split",
    "splitlines", "startswith", "strip", "swapcase", "title", "upper",
))  # fmt: skip
_FILTERS = frozenset((
    "abs", "attr", "capitalize", "count", "d", "default", "dictsort", "e", "escape", "first", "float", "groupby", "indent", "int",
    "items", "join", "last", "length", "list", "lower", "map", "max", "min", "reject", "rejectattr", "replace", "reverse",
    "round", "safe", "select", "selectattr", "sort", "string", "title", "tojson", "trim", "truncate", "unique", "upper",
    "wordcount",
))  # fmt: skip


class Refused(TemplateError):
    """Something that a template is not allowed to do; the message completes an error sentence."""


class Stopped(TemplateError):
    """An error that the template itself raised with `raise_exception`."""


class Meter:
    """How much one rendering has used of its limits; it renders `messages` messages with a total size of `size`."""

    def __init__(self, messages: int, size: int) -> None:
        self.turns = _TURNS + _TURNS_PER_MESSAGE * messages
        self.size = _SIZE + _SIZE_PER_INPUT * size
        self._left, self._ends = self.turns, time.thread_time() + SECONDS

    def tick(self) -> bool:
        """Counts one iteration of a loop or one call."""
        self._left -= 1
        if self._left < 0:
            raise Refused(f"its loops and calls take more than {self.turns:,} iterations")
        if self._left % 64 == 0:
            self.clock()
        return True

    def clock(self) -> None:
        """Raises `Refused` after `SECONDS`."""
        if time.thread_time() > self._ends:
            raise Refused(f"it ran for more than {SECONDS:g} seconds")

    def check(self, size: int) -> None:
        """Raises `Refused` for a value larger than allowed."""
        if size > self.size:
            raise Refused(f"it creates a value of more than {self.size:,} characters")

    def measured(self, value: Any) -> Any:
        """`value`, if everything it contains is within the limits; what it contains twice counts twice."""
        self.check(measure(value, self.size))
        self.clock()
        return value


def measure(value: Any, limit: int) -> int:
    """Number of characters in a value and its contents, where each item counts as eight; stops counting above `limit`."""
    total, waiting = 0, [value]
    while waiting and total <= limit:
        one = waiting.pop()
        total += _ITEM
        if isinstance(one, str | range):
            total += len(one)
        elif isinstance(one, Mapping):
            waiting.extend(one.keys())
            waiting.extend(one.values())
        elif isinstance(one, list | tuple | set | frozenset):
            waiting.extend(one)
        elif isinstance(one, int) and one.bit_length() > _BITS:
            raise Refused(f"it creates a number of more than {_BITS} bits")
    return total


class _Namespace(Namespace):
    """`namespace(...)`: attributes that templates may set, except those that Python uses."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        given = dict(*args[1:], **kwargs)
        for name in given:
            _plain_name(name)
        Namespace.__init__(args[0], given)

    def __setitem__(self, name: str, value: Any) -> None:
        _plain_name(name)
        Namespace.__setitem__(self, name, value)

    def __repr__(self) -> str:
        return "<Namespace>"


def _plain_name(name: str) -> None:
    if str(name).startswith("_"):
        raise Refused(f"it sets the attribute {name!r} of a namespace")


class _Dict:
    """`dict(...)`, without access to the type and its methods."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict:
        return dict(*args, **kwargs)


class _Metered(visitor.NodeTransformer):
    """Adds the meter to the parsed template: loops count their iterations, and new values are measured."""

    def visit_For(self, node: nodes.For) -> nodes.For:
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_call("tick"), lineno=node.lineno))
        if node.test is not None:
            # Items that the test filters out never reach the body.
            node.test = nodes.And(_call("tick"), node.test, lineno=node.lineno)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Call:
        self.generic_visit(node)
        return _call("concatenated", *node.nodes)

    def _literal(self, node: nodes.Node) -> nodes.Call:
        self.generic_visit(node)
        return _call("measured", node)

    visit_List = visit_Dict = _literal

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        # A tuple may also be the target of an assignment.
        return self._literal(node) if node.ctx == "load" else node


def _call(name: str, *args: nodes.Expr) -> nodes.Call:
    return nodes.Call(nodes.EnvironmentAttribute(name), list(args), [], None, None)


class _Generation(ext.Extension):
    """The block `{% generation %}`, which contains what the model writes."""

    tags = {_GENERATION}

    def parse(self, parser: Any) -> nodes.Node:
        """The block as a call that receives its text."""
        line = next(parser.stream).lineno
        body = parser.parse_statements((f"name:end{_GENERATION}",), drop_needle=True)
        return nodes.CallBlock(self.call_method("mark"), [], [], body).set_lineno(line)

    def mark(self, caller: Callable[[], str]) -> str:
        """Records where the block's text ends up."""
        text = caller()
        at = self.environment.written
        self.environment.blocks.append((at, at + len(text), text))
        return text


class Environment(sandbox.ImmutableSandboxedEnvironment):
    """The sandbox for one template; `render` is not re-entrant."""

    intercepted_binops = frozenset(["+", "*", "**", "%", "//", "/", "-"])

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, ext.loopcontrols], optimized=False)
        given = {"raise_exception": _raise, "strftime_now": _now, "dict": _Dict(), "namespace": _Namespace, "range": self._range}
        self.globals = {name: self.globals[name] for name in ("cycler", "joiner")} | given
        own = {"tojson": self._tojson, "join": self._join, "replace": self._replace, "indent": self._indent}
        self.filters = {name: self._watched(name, own.get(name, self.filters.get(name))) for name in _FILTERS}
        self.meter = Meter(0, 0)
        self.written = 0
        self.blocks: list[tuple[int, int, str]] = []

    def program(self, text: str) -> jinja2.Template:
        """The compiled template; raises jinja2's `TemplateError`."""
        if len(text) > _LONGEST_TEMPLATE:
            raise Refused(f"it is {len(text):,} characters long, and at most {_LONGEST_TEMPLATE:,} are allowed")
        tree = _Metered().visit(self.parse(text))
        return jinja2.Template.from_code(self, self.compile(tree), self.make_globals(None))

    def render(self, program: jinja2.Template, meter: Meter, values: Mapping[str, Any]) -> tuple[str, list[tuple[int, int]]]:
        """The text, and (start, end) of each generation block in characters; raises any error of the template."""
        self.meter, self.written, self.blocks = meter, 0, []
        pieces = []
        for piece in program.generate(**values):
            pieces.append(piece)
            self.written += len(piece)
            meter.check(self.written)
            meter.clock()
        text = "".join(pieces)
        if any(text[start:end] != block for start, end, block in self.blocks):
            raise Refused("it has a generation block inside a macro or a captured block, where its position is unknown")
        return text, [(start, end) for start, end, _ in self.blocks]

    # What templates do, within the limits.

    def tick(self) -> None:
        """One iteration of a loop; `call` counts it."""

    def measured(self, value: Any) -> Any:
        """A literal value of a template."""
        return self.meter.measured(value)

    def concat(self, pieces: Iterable[str]) -> str:
        """The text of a macro or a captured block."""
        pieces = list(pieces)
        self.meter.check(sum(map(len, pieces)))
        return "".join(pieces)

    def concatenated(self, *values: Any) -> str:
        """`a ~ b`."""
        return self.concat(map(str, values))

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """A call, which is counted and its result measured."""
        __self.meter.tick()
        if __obj == __self.tick:
            return True
        owner, name = getattr(__obj, "__self__", None), getattr(__obj, "__name__", "")
        if isinstance(owner, str) and name == "join":
            return __self._join(args[0], owner)
        if isinstance(owner, str) and name == "replace":
            return __self._replace(owner, *args, **kwargs)
        result = super().call(__context, __obj, *args, **kwargs)
        return result if __obj == __self.measured else __self.meter.measured(result)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """`left operator right`, refused in advance if the result would be enormous."""
        texts = [len(x) for x in (left, right) if isinstance(x, str | list | tuple)]
        numbers = [x for x in (left, right) if isinstance(x, int)]
        if operator == "*" and texts and numbers:
            self.meter.check(texts[0] * max(numbers[0], 0))
        elif operator == "+":
            self.meter.check(sum(texts))
        elif operator == "**" and (not all(isinstance(x, int | float) for x in (left, right)) or abs(right) > _BITS):
            raise Refused(f"it raises {left!r:.20} to the power {right!r:.20}")
        elif operator == "%" and isinstance(left, str):
            _no_width(left)
        return self.meter.measured(super().call_binop(context, operator, left, right))

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """As in jinja2, and of the string methods only those that neither pad nor format."""
        if isinstance(obj, str) and attr not in _STR_METHODS:
            return False
        return super().is_safe_attribute(obj, attr, value)

    def unsafe_undefined(self, obj: Any, attribute: str) -> Any:
        """A forbidden attribute stops the template, even if it would only be printed."""
        raise SecurityError(f"it accesses {attribute!r} of a {type(obj).__name__}, which templates must not use")

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """`text.format(...)` as jinja2 makes it safe, refused if the text specifies a width."""
        found = super().wrap_str_format(value)
        if found is not None:
            _no_width(value.__self__)
        return found

    def _watched(self, name: str, function: Callable) -> Callable:
        def watched(*args: Any, **kwargs: Any) -> Any:
            self.meter.tick()
            found = function(*args, **kwargs)
            return self.meter.measured(found) if isinstance(found, str | list | tuple | dict) else found

        for mark in ("jinja_pass_arg", "jinja_async_variant"):
            if hasattr(function, mark):
                setattr(watched, mark, getattr(function, mark))
        watched.__name__ = name
        return watched

    def _range(self, *bounds: int) -> range:
        found = range(*bounds)
        turns = self.meter.turns
        if found[turns:]:
            raise Refused(f"range({', '.join(f'{bound:,}' for bound in bounds)}) has more than the {turns:,} iterations allowed")
        return found

    def _join(self, values: Iterable, separator: str = "", attribute: str | None = None) -> str:
        if attribute is not None:
            values = map(jinja2.filters.make_attrgetter(self, attribute), values)
        pieces = [str(value) for value in values]
        self.meter.check(sum(map(len, pieces)) + len(separator) * max(len(pieces) - 1, 0))
        return str(separator).join(pieces)

    def _replace(self, text: str, old: str, new: str, count: int | None = -1) -> str:
        text, old, new, count = str(text), str(old), str(new), -1 if count is None else count
        found = text.count(old)
        self.meter.check(len(text) + len(new) * (min(found, count) if count >= 0 else found))
        return text.replace(old, new, count)

    def _indent(self, text: str, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
        step = width if isinstance(width, str) else " " * min(width, self.meter.size)
        self.meter.check(len(text) + len(step) * (text.count("\n") + 1))
        return jinja2.filters.do_indent(text, step, first, blank)

    def _tojson(self, value: Any, ensure_ascii: bool = False, indent=None, separators=None, sort_keys: bool = False) -> str:
        if isinstance(indent, int):
            indent = " " * min(indent, self.meter.size)
        encoder = json.JSONEncoder(ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
        pieces, size = [], 0
        for piece in encoder.iterencode(value):
            pieces.append(piece)
            size += len(piece)
            self.meter.check(size)
        return "".join(pieces)


def _no_width(form: str) -> None:
    """Raises `Refused` for a format that may pad a short value to a long one."""
    if re.search(r"\d{4}|\*|\{[^}]*\{", form):
        raise Refused(f"it formats to a width, {form!r:.40}")


def _raise(message: str) -> None:
    raise Stopped(str(message))


def _now(form: str) -> str:
    if len(form) > 100 or re.search(r"%\W?\d", form):
        raise Refused(f"it formats the time as {form!r:.40}")
    return datetime.datetime.now().strftime(form)
