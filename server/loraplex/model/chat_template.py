"""A model's chat template, rendered as transformers renders it, as code that is not trusted."""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

from jinja2 import Template, TemplateError, TemplateSyntaxError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from loraplex.errors import InvalidRequestError

logger = logging.getLogger(__name__)

FIELD = "chat"  # what a bad request's error names
MAX_RENDERED = 8 << 20  # characters: twice the largest message that a client may send
MAX_REFUSAL = 500  # characters


class ChatTemplate:
    """One model's templates by name; "default" answers unless there are tools and a "tool_use"."""

    def __init__(self, sources: Mapping[str, str], special_tokens: Mapping[str, str]) -> None:
        self._special_tokens = dict(special_tokens)  # bos_token, eos_token, ...
        self._environment = _Environment()
        self._reserved = {"messages", "tools", "add_generation_prompt", *self._environment.globals}
        self._templates: dict[str, Template] = {}
        for name, source in sources.items():
            try:
                self._templates[name] = self._environment.from_string(source)
            except TemplateSyntaxError as error:
                logger.warning("chat template %s is left out: %s", name, error)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Any] | None,
        template_kwargs: Mapping[str, Any],
        *,
        add_generation_prompt: bool,
    ) -> str:
        """The conversation as one text. What the template refuses is the request's fault."""
        template = self._select(tools)
        if not messages:
            raise InvalidRequestError(FIELD, "there are no messages")
        for name in template_kwargs:
            if name in self._reserved:
                raise InvalidRequestError(f"{FIELD}.template_kwargs_json", f"{name} cannot be set")
        variables = {
            **self._special_tokens,
            **template_kwargs,
            "messages": [_without_nulls(message) for message in messages],
            "tools": tools,
            "documents": template_kwargs.get("documents"),
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            return _bounded(template, variables)
        except _RefusedError as refused:
            raise InvalidRequestError(FIELD, str(refused)[:MAX_REFUSAL]) from None
        except Exception as error:  # a template may fail in any way
            logger.info("the chat template failed: %s", type(error).__name__)
            raise InvalidRequestError(
                FIELD, "the model's chat template does not take these messages"
            ) from error

    def _select(self, tools: Sequence[Any] | None) -> Template:
        names = ("tool_use", "default") if tools is not None else ("default",)
        for name in names:
            if name in self._templates:
                return self._templates[name]
        raise InvalidRequestError(FIELD, "this model has no chat template: send text or token_ids")


def _without_nulls(message: Mapping[str, Any]) -> dict[str, Any]:
    """Templates tell an absent key from a present one, and print null as None."""
    return {key: value for key, value in message.items() if value is not None}


def _bounded(template: Template, variables: dict[str, Any]) -> str:
    parts = []
    size = 0
    for part in template.generate(variables):
        size += len(part)
        if size > MAX_RENDERED:
            raise _RefusedError(f"the rendered chat is over {MAX_RENDERED} characters")
        parts.append(part)
    return "".join(parts)


class _RefusedError(TemplateError):
    """What a client may be told: the template's own raise_exception, or our bound."""


def _raise_exception(message: Any) -> None:
    raise _RefusedError(str(message))


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own escapes HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


class _Namespace(Namespace):
    """No name may begin with an underscore: `__call__` would lead out of the sandbox."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        for name in dict(*args[1:], **kwargs):
            _check_name(name)
        Namespace.__init__(*args, **kwargs)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: str) -> None:
    if name.startswith("_"):
        raise SecurityError("a namespace's names cannot begin with an underscore")


class _Generation(Extension):
    """`{% generation %}` marks an assistant's text for training; here it is its body."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        lineno = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=lineno)


class _Environment(ImmutableSandboxedEnvironment):
    """transformers' settings; products and powers cannot outgrow the bound either."""

    intercepted_binops = frozenset({"*", "**"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
        )
        self.filters["tojson"] = _tojson
        functions: dict[str, Callable[..., Any]] = {
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
            "namespace": _Namespace,
        }
        self.globals.update(functions)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "**":
            whole = isinstance(left, int) and isinstance(right, int)
            size = left.bit_length() * right if whole else 0
        else:
            size = max(_repeated(left, right), _repeated(right, left))
        if size > MAX_RENDERED:
            raise _RefusedError("the chat template computes something too large")
        return super().call_binop(context, operator, left, right)


def _repeated(sequence: Any, times: Any) -> int:
    """Elements of `sequence * times`; 0 where that is arithmetic."""
    if isinstance(sequence, str | list | tuple) and isinstance(times, int):
        return len(sequence) * times
    return 0
