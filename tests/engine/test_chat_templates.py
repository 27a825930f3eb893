"""Chat templates of uploads, each rendered by the real process."""

import os
import signal

import pytest

from tests import tiny
from worker.engine.chat_templates import ChatTemplates, TemplateTooSlow
from worker.engine.tokenizer import Tokenizer
from worker.errors import InvalidLine
from worker.jobs import ChatMessage

CHAT = [{"role": "system", "content": "Be brief. é"}, {"role": "user", "content": "Who\ngoes there?"}]
ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


@pytest.fixture(scope="module")
def templates() -> ChatTemplates:
    return ChatTemplates()


def test_a_template_is_rendered_as_transformers_renders_it(templates):
    own = tiny.tokenizer()
    own.chat_template = (
        "{{ bos_token }}{% for m in messages %}{{ m.role | upper }}: {{ m.content | tojson }}"
        "{{ eos_token }}\n{% endfor %}"
        "{% if add_generation_prompt %}ASSISTANT:{% endif %}{{ strftime_now('%Y') | length }}"
    )
    there = templates.render(own.chat_template, CHAT, own.special_tokens_map)
    assert there == own.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    assert 'USER: "Who\\ngoes there?"' in there


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('no system messages') }}", "no system messages"),
        ("{% if %}", "Expected an expression"),
        ("{{ messages[0].content.nothing() }}", "nothing"),
        ("{{ ().__class__.__base__.__subclasses__() }}", "unsafe"),
        ("{{ cycler.__init__.__globals__.os.system('true') }}", "unsafe|undefined"),
        ("{{ 'a' * 900000000 }}", "more than 512 MiB"),
        ("{% for a in range(99999) %}{{ 'a' * 1000 }}{% endfor %}", "99999000 characters of them, 16777216"),
    ],
)
def test_a_template_that_fails_says_why_and_the_next_is_rendered(templates, template, reason):
    with pytest.raises(InvalidLine, match=reason):
        templates.render(template, CHAT, {})
    assert templates.render("{{ messages | length }}", CHAT, {}) == "2"


@pytest.mark.parametrize("template", [ENDLESS, "{{ (9 ** 9) ** (9 ** 9) }}"])
def test_a_template_that_goes_on_for_ever_is_stopped(templates, template):
    with pytest.raises(TemplateTooSlow, match="it takes more than 2 seconds"):
        templates.render(template, CHAT, {})
    assert templates.render("{{ messages | length }}", CHAT, {}) == "2"


def test_a_process_that_was_killed_costs_one_row(templates):
    templates.render("", CHAT, {})
    assert templates._process is not None
    os.kill(pid := templates._process.pid, signal.SIGKILL)
    with pytest.raises(InvalidLine, match="ended, with exit code -9"):
        templates.render("", CHAT, {})
    assert templates.render("a", CHAT, {}) == "a"
    assert templates._process.pid != pid


def test_the_process_ends_with_whoever_started_it():
    templates = ChatTemplates()
    templates.render("", CHAT, {})
    assert templates._process is not None
    pid = templates._process.pid
    del templates
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_tokenizer_says_no_at_once_when_its_template_was_too_slow(monkeypatch):
    own = tiny.tokenizer()
    own.chat_template = ENDLESS
    templates = ChatTemplates()
    tokenizer = Tokenizer(own, "the adapter's tokenizer", templates)
    wanted = "chat template of the adapter's tokenizer refuses the messages: it takes more than 2 seconds"
    with pytest.raises(InvalidLine, match=wanted):
        tokenizer.render_chat([ChatMessage("user", "a")])
    monkeypatch.delattr(ChatTemplates, "render")
    with pytest.raises(InvalidLine, match=wanted):
        tokenizer.render_chat([ChatMessage("user", "b")])
