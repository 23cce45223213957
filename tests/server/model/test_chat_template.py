"""Chats are rendered as transformers renders them, by templates that cannot harm the server."""

from typing import Any

import pytest
from loraplex.errors import InvalidRequestError
from loraplex.model import chat_template
from loraplex.model.chat_template import ChatTemplate
from transformers.utils.chat_template_utils import render_jinja_template

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
CHAT: list[dict[str, Any]] = [
    {"role": "system", "content": "Be <b>brief</b> & 'kind'."},
    {"role": "user", "content": "Hi 👋\n", "name": None},
    {
        "role": "assistant",
        "content": "Hello.",
        "tool_calls": [{"name": "é", "arguments": {"a": 1}}],
    },
]
TEMPLATES = {
    "chatml": "{% for m in messages %}<|{{ m.role }}|>{{ m['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}",
    "blocks": "{{ bos_token }}\n  {% for m in messages %}\n {{ m.content | trim }}\n"
    "  {% endfor %}\n",
    "tojson": "{{ messages | tojson }}{{ messages[0] | tojson(indent=2) }}",
    "null": "{% for m in messages %}{{ m.name is defined }}{{ m.keys() | list }}{% endfor %}",
    "loops": "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m.role }}"
    "{% break %}{% endfor %}",
    "generation": "{% for m in messages %}{% generation %}\n{{ m.role }}\n"
    "{% endgeneration %}{% endfor %}",
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}"
    "{% endfor %}{{ ns.n }}{{ '-' * 3 }}{{ 10 ** 2 }}{{ 1.5 * 3000000 }}",
    "kwargs": "{{ enable_thinking }}{{ tools is none }}{{ documents is none }}{{ missing }}",
    "date": "{{ strftime_now('%Y') | length }}",
}


def template_of(source: str) -> ChatTemplate:
    return ChatTemplate({"default": source}, SPECIAL)


def render(source: str, messages: list[dict[str, Any]] | None = None) -> str:
    return template_of(source).render(messages or CHAT, None, {}, add_generation_prompt=False)


@pytest.mark.parametrize("add_generation_prompt", [False, True])
@pytest.mark.parametrize("name", TEMPLATES)
def test_it_renders_as_transformers_does(name: str, add_generation_prompt: bool) -> None:
    source = TEMPLATES[name]
    kwargs = {"enable_thinking": False}
    chat = [{key: value for key, value in m.items() if value is not None} for m in CHAT]
    expected, _ = render_jinja_template(
        conversations=[chat],
        chat_template=source,
        add_generation_prompt=add_generation_prompt,
        **SPECIAL,
        **kwargs,
    )
    rendered = template_of(source).render(
        CHAT, None, kwargs, add_generation_prompt=add_generation_prompt
    )
    assert [rendered] == expected


def test_tools_choose_their_template() -> None:
    template = ChatTemplate({"default": "plain", "tool_use": "{{ tools[0].name }}"}, {})
    assert template.render(CHAT, None, {}, add_generation_prompt=True) == "plain"
    assert template.render(CHAT, [{"name": "f"}], {}, add_generation_prompt=True) == "f"


def test_the_templates_own_refusal_is_all_that_is_told() -> None:
    with pytest.raises(InvalidRequestError) as error:
        render("{{ raise_exception('roles must alternate') }}")
    assert error.value.message == "roles must alternate"
    assert error.value.field == "chat"


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages[0].content + messages[0].nothing }}",
        "{{ 1 / 0 }}",
        "{{ messages[7].role }}",
        "{{ messages.append({}) }}",
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__.__subclasses__() }}",
        "{% set ns = namespace() %}{% set ns.__call__ = 1 %}",
        "{{ namespace(_x=1) }}",
        "{{ range(10 ** 9) | list }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% include 'config.json' %}",
        "{{ {}.items | tojson }}",
    ],
)
def test_a_failing_template_tells_nothing(source: str) -> None:
    with pytest.raises(InvalidRequestError) as error:
        render(source)
    assert error.value.message == "the model's chat template does not take these messages"


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(100000) %}{{ messages[0].content * 10 }}{% endfor %}",
        "{{ 'x' * 10 ** 10 }}",
        "{{ 10 ** 10 * 'x' }}",
        "{{ [0] * 10 ** 10 }}",
        "{{ 10 ** (10 ** 10) }}",
    ],
)
def test_a_template_cannot_run_away(source: str) -> None:
    with pytest.raises(InvalidRequestError, match=r"characters|too large"):
        render(source, [{"role": "user", "content": "0123456789"}])


def test_a_refusal_is_cut() -> None:
    with pytest.raises(InvalidRequestError) as error:
        render("{{ raise_exception('x' * 10000) }}")
    assert len(error.value.message) == chat_template.MAX_REFUSAL


@pytest.mark.parametrize("sources", [{}, {"tool_use": "x"}, {"default": "{% broken"}])
def test_no_usable_template(sources: dict[str, str]) -> None:
    with pytest.raises(InvalidRequestError, match="no chat template"):
        ChatTemplate(sources, {}).render(CHAT, None, {}, add_generation_prompt=True)


def test_no_messages() -> None:
    with pytest.raises(InvalidRequestError, match="no messages"):
        template_of("x").render([], None, {}, add_generation_prompt=True)


@pytest.mark.parametrize("name", ["messages", "tools", "add_generation_prompt", "raise_exception"])
def test_kwargs_cannot_replace_what_the_template_relies_on(name: str) -> None:
    with pytest.raises(InvalidRequestError, match=name) as error:
        template_of("x").render(CHAT, None, {name: 1}, add_generation_prompt=True)
    assert error.value.field == "chat.template_kwargs_json"
