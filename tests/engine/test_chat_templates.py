"""Chat templates of uploads, each rendered by the real process."""

import os
import signal

import pytest

from tests import tiny
from worker.engine.chat_templates import ChatTemplates, TemplateTooSlow, _Process
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


def test_a_chat_that_took_too_long_is_not_tried_again_but_shorter_ones_are():
    own = tiny.tokenizer()
    own.chat_template = "{% if messages[0].content | length > 3 %}" + ENDLESS + "{% endif %}done"
    tokenizer = Tokenizer(own, "the adapter's tokenizer", templates := ChatTemplates())
    refused = "chat template of the adapter's tokenizer refuses the messages: "
    with pytest.raises(InvalidLine, match=refused + "it takes more than 2 seconds"):
        tokenizer.render_chat([ChatMessage("user", "12345")])
    assert tokenizer.render_chat([ChatMessage("user", "123")]) == "done"
    assert templates._process is not None
    pid = templates._process.pid
    for longer in ("12345", "123456"):
        with pytest.raises(InvalidLine, match=refused + "it took too long for 6 characters already"):
            tokenizer.render_chat([ChatMessage("user", longer)])
    assert templates._process.pid == pid  # nobody asked it


def test_a_process_that_stands_still_is_replaced(monkeypatch):
    monkeypatch.setattr("worker.engine.chat_templates._ANSWER_SECONDS", 0.2)
    templates = ChatTemplates()
    templates._process = process = _Process()
    os.kill(process.pid, signal.SIGSTOP)
    with pytest.raises(InvalidLine, match="ended, with exit code -9"):
        templates.render("", CHAT, {})
    monkeypatch.undo()
    assert templates.render("a", CHAT, {}) == "a"


def test_nothing_in_the_current_folder_is_taken_for_ours(tmp_path, monkeypatch):
    (tmp_path / "worker").mkdir()
    for name in ("worker/__init__.py", "msgspec.py", "transformers.py"):
        (tmp_path / name).write_text("raise SystemExit('from the current folder')")
    monkeypatch.chdir(tmp_path)
    assert ChatTemplates().render("a", CHAT, {}) == "a"
