"""Chat templates: what transformers renders, from any file that holds one, and nothing that runs."""

import json

import pytest

from delta_jax.data import ChatTemplate, load_chat_template

TURNS = [{"role": "user", "content": "Hé"}, {"role": "assistant", "content": "Oh"}]
SOURCE = """{{ bos_token }}
{%- for message in messages %}
    {%- if loop.index > 3 %}{% break %}{% endif %}
    {%- if message.role == "tool" %}{{ raise_exception("no tools here") }}{% endif %}
    {% generation %}
<{{ message.role }}>{{ message.content }}{{ eos_token }}
    {% endgeneration %}
{% endfor %}
{%- if tools %}{{ tools | tojson }}{% endif %}
{%- if add_generation_prompt %}<assistant>{% endif %}"""
TOKENS = {"bos_token": "<s>", "eos_token": {"content": "</s>", "special": True}, "unk_token": None}


def write(folder, *, inside=None, beside=None):
    (folder / "tokenizer_config.json").write_text(json.dumps({**TOKENS, "chat_template": inside}))
    if beside is not None:
        (folder / "chat_template.jinja").write_text(beside)
    return load_chat_template(folder)


@pytest.mark.parametrize(
    "files",
    [
        {"inside": SOURCE},
        {"inside": [{"name": "rag", "template": "no"}, {"name": "default", "template": SOURCE}]},
        {"inside": "the file beside goes before", "beside": SOURCE},
    ],
)
def test_a_template_is_found_and_rendered(tmp_path, files):
    template = write(tmp_path, **files)
    assert template.tokens == {"bos_token": "<s>", "eos_token": "</s>"}
    assert template.render(TURNS) == "<s><user>Hé</s>\n<assistant>Oh</s>\n"
    with_more = template.render(TURNS[:1], add_generation_prompt=True, tools=[{"name": "é"}])
    assert with_more == '<s><user>Hé</s>\n[{"name": "é"}]<assistant>'
    assert template.render(TURNS * 3).count("<user>") == 2  # break


def test_a_folder_without_one(tmp_path):
    assert load_chat_template(tmp_path) is None
    assert write(tmp_path) is None


def test_the_day_is_known_unless_it_is_given():
    template = ChatTemplate(source="{{ strftime_now('%Y') }}")
    assert int(template.render([])) >= 2024
    assert template.render([], strftime_now=lambda form: "then") == "then"


@pytest.mark.parametrize(
    ("source", "messages", "said"),
    [
        ("{{ raise_exception('roles must alternate') }}", TURNS, "cannot render the messages: roles must alternate"),
        ("{{ messages[7].content }}", TURNS, "cannot render the messages"),
        ("{{ messages.append(1) }}", TURNS, "cannot render the messages"),
        ("{{ ''.__class__.__mro__ }}", TURNS, "cannot render the messages"),
        ("{{ cycler.__init__.__globals__ }}", TURNS, "cannot render the messages"),
        ("{{ 1 / 0 }}", TURNS, "division by zero"),
        ("{% include 'secrets' %}", TURNS, "cannot render the messages"),
        ("", [{"content": "x"}], 'messages.0: wanted an object with a "role"'),
        ("", ["x"], "messages.0: wanted an object"),
        ("", "hello", "messages: wanted a list of objects, got str"),
    ],
)
def test_what_cannot_be_rendered_is_one_sentence(source, messages, said):
    with pytest.raises(ValueError) as error:
        ChatTemplate(source=source).render(messages)
    assert said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("inside", "said"),
    [
        ("{% for %}", "line 1 is no Jinja template"),
        (7, "should be a text, or a list"),
        ([{"name": "rag", "template": "x"}], 'none called "default", only rag'),
    ],
)
def test_a_bad_template_is_one_sentence_that_names_the_file(tmp_path, inside, said):
    with pytest.raises(ValueError) as error:
        write(tmp_path, inside=inside)
    assert said in str(error.value) and "tokenizer_config.json" in str(error.value)


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff"])
def test_a_bad_file_is_one_sentence(tmp_path, content):
    (tmp_path / "tokenizer_config.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"tokenizer_config.json"):
        load_chat_template(tmp_path)
