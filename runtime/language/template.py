"""Chat templates, which are programs from strangers, run inside limits.

The sandbox is Jinja's own (immutable, no private attributes). On top of it every loop step, call, text and list that a
template makes is counted, and what could grow without being counted (repetition, wide formats, nested values) is
bounded beforehand, so that a hostile template ends with an error instead of eating memory or time. What a well-meant
template prints is what `transformers` prints. It knows nothing about messages or models.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from datetime import datetime
from functools import lru_cache, wraps
from typing import Any

from ..errors import BundleError, MissingPackageError, UsageError

_LONGEST_TEMPLATE = 1 << 18  # characters
_MOST_STEPS = 1 << 20  # loop steps, calls and filters of one rendering
_MOST_MADE = 1 << 26  # bytes, roughly, of all values that one rendering makes
_LARGEST = 1 << 22  # characters and items of one value
_WIDEST = 64  # of an indentation, an exponent, digits after the point

_FILTERS = (
    "abs capitalize count d default dictsort e escape first float groupby int items last length list lower map max min "
    "reject rejectattr reverse round safe select selectattr sort title trim unique upper"
).split()
_TEXT_METHODS = frozenset(
    "capitalize count endswith find format index isalnum isalpha isdecimal isdigit islower isnumeric isspace istitle "
    "isupper join lower lstrip partition removeprefix removesuffix replace rfind rindex rpartition rsplit rstrip split "
    "splitlines startswith strip swapcase title upper".split()
)
_WIDE_FORMAT = re.compile(r"\d{4}|\*|\{[^{}]*\{")  # a width that is long, or comes from a value


class _Exceeded(Exception):
    """A template went past a limit."""


class _Refused(Exception):
    """The template itself says no, with raise_exception."""


class _Meter:
    """What one rendering has used."""

    def __init__(self) -> None:
        self.steps = self.made = 0

    def step(self) -> None:
        self.steps += 1
        if self.steps > _MOST_STEPS:
            raise _Exceeded(f"it takes more than {_MOST_STEPS} steps")

    def make(self, value: Any) -> Any:
        """Counts a value that was made, and returns it."""
        if isinstance(value, (str, list, tuple, dict)):
            self.made += len(value) if isinstance(value, str) else 8 * len(value)
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
        raise BundleError("The model's chat template failed.", why, "Check the messages, or use a text prompt.") from None
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

        def call_binop(self, context, operator, left, right):
            _METER.get().step()
            _bound_operation(operator, left, right)
            return _METER.get().make(super().call_binop(context, operator, left, right))

        def call(__self, __context, __obj, *args, **kwargs):  # noqa: N805 - a template may pass any keyword
            _METER.get().step()
            if isinstance(text := getattr(__obj, "__self__", None), str):
                _bound_method(__obj.__name__, text, args, kwargs)
            return _METER.get().make(super(Sandbox, __self).call(__context, __obj, *args, **kwargs))

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
    environment.filters = {name: _guarded(name, environment.filters[name]) for name in _FILTERS}
    environment.filters |= {name: _guarded(name, function) for name, function in _OWN_FILTERS.items()}
    environment.filters |= {"_counted": _counted, "_bounded": _bounded, "_made": lambda value: _METER.get().make(value)}
    builtin = environment.globals
    environment.globals = {name: builtin[name] for name in ("range", "cycler", "joiner")}
    environment.globals |= {
        "dict": lambda *args, **kwargs: _bounded(dict(*args, **kwargs)),
        "namespace": Namespace,
        "raise_exception": _raise_exception,
        "strftime_now": lambda form: datetime.now().strftime(_narrow(form)),
    }
    return environment


# Limits on what one operation makes ----------------------------------------------------------------------------------


def _counted(values: Iterable) -> Iterator:
    """A loop's values, each one a step."""
    meter = _METER.get()
    for value in values:
        meter.step()
        yield value


def _bounded(value: Any) -> Any:
    """The same value, where all that it holds, shared parts counted each time, is not too large."""
    held, rest = 0, [value]
    while rest:
        part = rest.pop()
        if isinstance(part, (str, list, tuple, dict)):
            held += len(part) + 1
            if held > _LARGEST:
                raise _Exceeded("it makes a value that is too large")
        if isinstance(part, dict):
            rest.extend(part)
            rest.extend(part.values())
        elif isinstance(part, (list, tuple)):
            rest.extend(part)
    return value


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    return str(_bounded(list(value) if isinstance(value, _VIEWS) else value))


_VIEWS = (type({}.keys()), type({}.values()), type({}.items()))


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
                _limit((1 + sum(len(_text(item)) for item in value)) * times)
    if operator == "%" and isinstance(left, str):
        _narrow(left)
        _bounded(right)


def _bound_method(name: str, text: str, args: tuple, kwargs: dict) -> None:
    if name == "replace" and len(args) > 1 and all(isinstance(part, str) for part in args[:2]):
        _limit(len(text) + text.count(args[0]) * len(args[1]))
    elif name == "join" and args:
        _limit(len(text) * (len(args[0]) if hasattr(args[0], "__len__") else _MOST_STEPS))
        _bounded(args[0])
    elif name == "format":
        _narrow(text)
        _bounded([*args, kwargs])


def _guarded(name: str, function: Callable) -> Callable:
    @wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        _METER.get().step()
        if name in _PRINTING:
            _bounded(args[0])
        if name in ("round", "indent", "tojson"):
            for value in (*args[1:], *kwargs.values()):
                if isinstance(value, int) and value > _WIDEST:
                    raise _Exceeded("it asks for a wide layout")
        return _METER.get().make(function(*args, **kwargs))

    return guarded


_PRINTING = frozenset("capitalize e escape float int lower safe title tojson trim upper".split())


def _raise_exception(message: Any) -> None:
    raise _Refused(_text(message))


def _tojson(value: Any, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    """Like transformers: not escaped for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
