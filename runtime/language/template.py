"""Chat templates, which are programs from strangers, run inside limits.

The sandbox is Jinja's own (immutable, no private attributes). On top of it every loop step, call, text and list that a
template makes is counted, and what could grow without being counted (repetition, wide formats, nested values) is
bounded beforehand, so that a hostile template ends with an error instead of eating memory or time. What a well-meant
template prints is what `transformers` prints. It knows nothing about messages or models.
"""

import json
import re
from collections.abc import Callable, ItemsView, Iterable, Iterator, KeysView, ValuesView
from contextvars import ContextVar
from datetime import datetime
from functools import lru_cache, wraps
from typing import Any

from ..errors import BundleError, MissingPackageError, UsageError

_LONGEST_TEMPLATE = 1 << 18  # characters
_MOST_STEPS = 1 << 18  # loop steps, calls, filters and looks into values of one rendering
_MOST_MADE = 1 << 26  # bytes, roughly, of all values that one rendering makes
_LARGEST = 1 << 22  # bytes, in the same way, of one value
_ITEM = 8  # what an item of a list counts beside a character
_DEEPEST = 100  # lists within lists
_WIDEST = 64  # an exponent, digits after the point

_FILTERS = (
    "abs capitalize count d default dictsort e escape first float groupby int items last length list lower map max min "
    "reject rejectattr reverse safe select selectattr sort title trim unique upper"
).split()
_TEXT_METHODS = frozenset(
    "capitalize count endswith find index isalnum isalpha isdecimal isdigit islower isnumeric isspace istitle "
    "isupper join lower lstrip partition removeprefix removesuffix replace rfind rindex rpartition rsplit rstrip split "
    "splitlines startswith strip swapcase title upper".split()
)
_PRINTING = frozenset("capitalize e escape float int lower safe title trim upper".split())  # make a text of anything
_WIDE_FORMAT = re.compile(r"\d{4}|\*|\{[^{}]*\{")  # a width that is long, or comes from a value


class _Exceeded(Exception):
    """A template went past a limit."""


class _Refused(Exception):
    """The template itself says no, with raise_exception."""


class _Meter:
    """What one rendering has used."""

    def __init__(self) -> None:
        self.steps = self.made = 0

    def step(self, count: int = 1) -> None:
        self.steps += count
        if self.steps > _MOST_STEPS:
            raise _Exceeded(f"it takes more than {_MOST_STEPS} steps")

    def make(self, value: Any) -> Any:
        """Counts a value that was made, and returns it."""
        if isinstance(value, (str, list, tuple, dict)):
            self.made += len(value) if isinstance(value, str) else _ITEM * len(value)
            if self.made > _MOST_MADE or len(value) > _LARGEST:
                raise _Exceeded("it makes too much")
        return value


_METER: ContextVar[_Meter] = ContextVar("meter")


def render(template: str, **values: Any) -> str:
    """The text that a template makes of plain values (texts, numbers, lists, dicts).

    Raises UsageError with the template's own words where it refuses the values, BundleError where it is no template,
    fails or goes past a limit, MissingPackageError without jinja2.
    """
    environment = _environment()
    meter = _METER.set(_Meter())
    try:
        return _compiled(environment, template).render(**values)
    except _Refused as error:
        why = str(error)[:500]
        raise UsageError("The model's chat template refuses the messages.", why, "Change them as it says.") from None
    except Exception as error:
        why = f"{type(error).__name__.lstrip('_')}: {error}"[:300]
        raise BundleError(
            "The model's chat template failed.", why, "Check the messages, or use a text prompt."
        ) from None
    finally:
        _METER.reset(meter)


@lru_cache(maxsize=8)
def variables(template: str) -> frozenset[str]:
    """The names that a template reads from outside, "tools" among them where it knows tools. Raises as `render`."""
    environment = _environment()
    from jinja2 import meta

    try:
        return frozenset(meta.find_undeclared_variables(environment.parse(_checked(template))))
    except Exception as error:
        raise BundleError("The model's chat template is none.", str(error)[:300], "Convert with another one.") from None


@lru_cache(maxsize=8)
def _compiled(environment, template: str):
    return environment.from_string(_checked(template))


def _checked(template: str) -> str:
    if len(template) > _LONGEST_TEMPLATE:
        raise _Exceeded(f"it is longer than {_LONGEST_TEMPLATE} characters")
    return template


@lru_cache(maxsize=1)
def _environment():
    try:
        import jinja2
        from jinja2.ext import Extension, loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment
        from jinja2.visitor import NodeTransformer
    except ImportError as error:
        raise MissingPackageError(
            "Chat templates need a package that is not here.", str(error), "Run: pip install 'shoal[language]'"
        ) from None
    nodes = jinja2.nodes

    class Counting(NodeTransformer):
        """Puts a filter of ours around what a template would run or make without a call."""

        def _through(self, name: str, node):
            return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)

        def visit_TemplateData(self, node):
            return nodes.Const(node.data, lineno=node.lineno)  # an expression, so that printing it is counted

        def visit_For(self, node):
            self.generic_visit(node)
            if node.recursive:
                raise _Exceeded("it has a recursive loop")
            node.iter = self._through("_counted", node.iter)
            return node

        def visit_Concat(self, node):
            self.generic_visit(node)
            return self._through("_joined", nodes.List(node.nodes, lineno=node.lineno))

        def visit_List(self, node):
            self.generic_visit(node)
            return self._through("_bounded", node) if getattr(node, "ctx", "load") == "load" else node

        visit_Dict = visit_Tuple = visit_List

        def visit_Getitem(self, node):
            self.generic_visit(node)
            return self._through("_made", node) if isinstance(node.arg, nodes.Slice) else node

    class Generation(Extension):
        """{% generation %} marks what an assistant says, for training; here it is only printed."""

        tags = {"generation"}

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("_said"), [], [], body).set_lineno(line)

        def _said(self, caller):
            return caller()

    class Sandbox(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset(("+", "*", "**", "%"))

        def _parse(self, source, name, filename):
            return Counting().visit(super()._parse(source, name, filename))

        def is_safe_attribute(self, obj, attr, value):
            known = not isinstance(obj, str) or attr in _TEXT_METHODS
            return known and super().is_safe_attribute(obj, attr, value)

        def wrap_str_format(self, value):
            wrapped = super().wrap_str_format(value)
            if wrapped is None:
                return None

            def format(*args, **kwargs):
                _narrow(value.__self__)
                _extent([*args, kwargs])
                return wrapped(*args, **kwargs)

            return format

        def call_binop(self, context, operator, left, right):
            _METER.get().step()
            _bound_operation(operator, left, right)
            return _METER.get().make(super().call_binop(context, operator, left, right))

        def call(__self, __context, __obj, *args, **kwargs):  # noqa: N805 - a template may pass any keyword
            _METER.get().step()
            if isinstance(text := getattr(__obj, "__self__", None), str):
                _bound_method(__obj.__name__, text, args)
            return _METER.get().make(super().call(__context, __obj, *args, **kwargs))

    class Namespace(jinja2.utils.Namespace):
        def __init__(*args, **kwargs):
            self, *rest = args  # so that a template may name an attribute "self"
            values = dict(*rest, **kwargs)
            for name in values:
                Namespace._check(name)
            jinja2.utils.Namespace.__init__(self, values)

        def __setitem__(self, name, value):
            Namespace._check(name)
            super().__setitem__(name, value)

        def __repr__(self):
            return "<Namespace>"

        @staticmethod
        def _check(name):
            if not isinstance(name, str) or name.startswith("_"):
                raise _Exceeded("it sets a private attribute")

    environment = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    environment.finalize = jinja2.pass_context(lambda context, value: _METER.get().make(_text(value)))
    builtin = environment.filters

    @jinja2.pass_eval_context
    def join(context, values, separator="", attribute=None):
        values = list(values)
        _limit(len(_text(separator)) * len(values))
        _extent(values)
        return builtin["join"](context, values, separator, attribute)

    @jinja2.pass_eval_context
    def replace(context, text, old, new, count=None):
        _bound_method("replace", text := _text(text), (old, new))
        return builtin["replace"](context, text, old, new, count)

    def indent(text, width=4, first=False, blank=False):
        text = _text(text)
        _limit(len(text) + (text.count("\n") + 1) * (len(width) if isinstance(width, str) else width))
        return builtin["indent"](text, width, first, blank)

    def round(value, precision=0, method="common"):
        if abs(precision) > _WIDEST:
            raise _Exceeded("it rounds to many digits")
        return builtin["round"](value, precision, method)

    filters = {name: builtin[name] for name in _FILTERS}
    filters |= {"join": join, "replace": replace, "indent": indent, "round": round, "string": _text, "tojson": _tojson}
    environment.filters = {name: _guarded(name, function) for name, function in filters.items()}
    environment.filters |= {"_counted": _counted, "_bounded": _bounded, "_joined": _joined, "_made": _made}
    names: dict[str, Any] = {name: environment.globals[name] for name in ("range", "cycler", "joiner")}
    names["dict"] = lambda *args, **kwargs: _bounded(dict(*args, **kwargs))
    names["namespace"] = Namespace
    names["raise_exception"] = _raise_exception
    names["strftime_now"] = lambda form: datetime.now().strftime(_narrow(form))
    environment.globals = names
    return environment


# Limits on what one operation makes ----------------------------------------------------------------------------------


def _counted(values: Iterable) -> Iterator:
    """A loop's values, each one a step."""
    meter = _METER.get()
    for value in values:
        meter.step()
        yield value


def _made(value: Any) -> Any:
    return _METER.get().make(value)


def _joined(values: list) -> str:
    """What `~` makes."""
    return _made("".join(map(_text, values)))


def _extent(value: Any) -> int:
    """How much a value holds, parts that are shared counted each time. Raises where that is too much or too deep."""
    held = seen = 0
    rest = [(value, 0)]
    while rest:
        part, depth = rest.pop()
        seen += 1
        if isinstance(part, str):
            held += len(part) + 1
        elif isinstance(part, (list, tuple, dict)):
            held += _ITEM * (len(part) + 1)
        if held > _LARGEST or depth > _DEEPEST:
            raise _Exceeded("it makes a value that is too large")
        if isinstance(part, (list, tuple, dict)):
            rest.extend((inner, depth + 1) for inner in part)
        if isinstance(part, dict):
            rest.extend((inner, depth + 1) for inner in part.values())
    _METER.get().step(seen >> 2)
    return held


def _bounded(value: Any) -> Any:
    _extent(value)
    return value


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    _extent(list(value) if isinstance(value, (KeysView, ValuesView, ItemsView)) else value)
    return str(value)


def _narrow(form: str) -> str:
    if not isinstance(form, str) or _WIDE_FORMAT.search(form):
        raise _Exceeded("it has a wide format")
    return form


def _limit(size: int) -> None:
    if size > _LARGEST:
        raise _Exceeded("it makes a value that is too large")


def _bound_operation(operator: str, left: Any, right: Any) -> None:
    numbers = isinstance(left, (int, float)) and isinstance(right, (int, float))
    if operator == "**" and not (numbers and abs(left) <= 1 << 32 and abs(right) <= _WIDEST):
        raise _Exceeded("it raises to a high power")
    if operator == "*":
        if numbers and max(abs(left), abs(right)) > 1 << 256:
            raise _Exceeded("it makes a huge number")
        for value, times in ((left, right), (right, left)):
            if isinstance(value, (str, list, tuple)) and isinstance(times, int):
                _limit(_extent(value) * times)
    if operator == "%" and isinstance(left, str):
        _narrow(left)
        _extent(right)


def _bound_method(name: str, text: str, args: tuple) -> None:
    if name == "replace" and len(args) > 1 and isinstance(args[0], str) and isinstance(args[1], str):
        _limit(len(text) + text.count(args[0]) * len(args[1]))
    elif name == "join" and args:
        _limit(len(text) * (len(args[0]) if hasattr(args[0], "__len__") else _MOST_STEPS))


def _guarded(name: str, function: Callable) -> Callable:
    @wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        _METER.get().step()
        if name in _PRINTING:
            _extent(args[0])
        return _made(function(*args, **kwargs))

    return guarded


def _raise_exception(message: Any) -> None:
    raise _Refused(_text(message))


def _tojson(value: Any, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    """As transformers has it: nothing is escaped for HTML."""
    _limit(_extent(value) * (1 + (len(indent) if isinstance(indent, str) else indent or 0)))
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
