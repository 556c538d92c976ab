import json
import logging
import shutil

import pytest

from parley.config import ModelSection
from parley.errors import ModelError
from parley.models.load import load_tokenizer, require_chat_template

GREETING = [{"role": "user", "content": "Ahoy"}]


@pytest.fixture
def folder(tiny_llama_folder, tmp_path):
    return shutil.copytree(tiny_llama_folder, tmp_path / "model")


def section(folder, **fields):
    return ModelSection(name=str(folder), **fields)


def edit(folder, **changes):
    path = folder / "tokenizer_config.json"
    saved = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in saved.items() if value is not None}))


def test_needs_no_weights_and_equals_the_saved_one(folder, tiny_tokenizer):
    (folder / "model.safetensors").unlink()
    tokenizer = load_tokenizer(section(folder))
    assert (
        tokenizer.apply_chat_template(GREETING)["input_ids"]
        == tiny_tokenizer.apply_chat_template(GREETING)["input_ids"]
    )


def test_missing_pad_token_is_chosen_without_new_embeddings(folder, caplog):
    edit(folder, pad_token=None)
    with caplog.at_level(logging.INFO, logger="parley"):
        tokenizer = load_tokenizer(section(folder))
    assert tokenizer.pad_token == "<|finetune_right_pad_id|>"
    assert len(tokenizer) == 384
    assert [record.getMessage() for record in caplog.records if "padding" in record.getMessage()] != []


def test_end_token_pads_where_nothing_else_can(folder):
    edit(folder, pad_token=None)
    path = folder / "tokenizer.json"
    path.write_text(path.read_text().replace("<|finetune_right_pad_id|>", "<|something_else|>"))
    assert load_tokenizer(section(folder)).pad_token == "<|eot_id|>"


def test_missing_or_broken_tokenizer_is_one_line(folder):
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match=r"cannot be read .*download its files again"):
        load_tokenizer(section(folder))
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"has no tokenizer .*copy the tokenizer files"):
        load_tokenizer(section(folder))


def test_missing_chat_template_is_named_and_a_file_replaces_it(folder, tmp_path):
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(ModelError, match=r"no chat template.*model\.chat_template"):
        require_chat_template(load_tokenizer(section(folder)))
    mine = tmp_path / "mine.jinja"
    mine.write_text("{% for message in messages %}[{{ message['content'] }}]{% endfor %}")
    tokenizer = load_tokenizer(section(folder, chat_template=mine))
    require_chat_template(tokenizer)
    assert tokenizer.apply_chat_template(GREETING, tokenize=False) == "[Ahoy]"


def test_unusable_template_files_are_named(folder, tmp_path):
    broken = tmp_path / "broken.jinja"
    broken.write_text("{% for %}")
    with pytest.raises(ModelError, match=r"broken\.jinja line 1: .*correct the template"):
        load_tokenizer(section(folder, chat_template=broken))
    with pytest.raises(ModelError, match=r"absent\.jinja cannot be read"):
        load_tokenizer(section(folder, chat_template=tmp_path / "absent.jinja"))
    deep = tmp_path / "deep.jinja"
    deep.write_text("{{" + "(" * 5000 + "1" + ")" * 5000 + "}}")
    with pytest.raises(ModelError, match=r"deep\.jinja"):
        load_tokenizer(section(folder, chat_template=deep))
    endless = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}{{ 'x' * 10**12 }}"
    tagged = "{% generation %}{{ messages[0]['content'] }}{%- endgeneration -%}{% for m in [] %}{% break %}{% endfor %}"
    for text in (endless, tagged):
        (tmp_path / "taken.jinja").write_text(text)
        assert load_tokenizer(section(folder, chat_template=tmp_path / "taken.jinja")).chat_template == text
    picky = tmp_path / "picky.jinja"
    picky.write_text("{{ raise_exception('start with a system turn') }}")
    assert load_tokenizer(section(folder, chat_template=picky)).chat_template.startswith("{{ raise")


def test_adapter_folder_uses_its_own_tokenizer_or_its_bases(folder, tmp_path, tiny_tokenizer):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(folder)}))
    assert len(load_tokenizer(section(adapter))) == 384
    tiny_tokenizer.save_pretrained(adapter)
    edit(adapter, eos_token="<|end_of_text|>")
    assert load_tokenizer(section(adapter)).eos_token == "<|end_of_text|>"
