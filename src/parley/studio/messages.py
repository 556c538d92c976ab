"""Messages of the commands in the language of a page: findings of the doctor, errors, and what a plan rests on.

The commands write English alone. A message is recognised by its format, a text with named values, and said again by the
format's translation; one that no format fits stays as it is. `tests/studio/test_messages.py` makes the commands write
them, so that a changed message is noticed.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache

from parley.studio.i18n import N_

NUMBERS = frozenset(
    ("all", "count", "exported", "high", "length", "limit", "line", "low", "mean", "over", "p5", "p50", "p95", "p99",
     "rate", "share", "some", "trained", "worst")
)  # fmt: skip
"""Values that are numbers: a format of little text must not fit other messages."""
MESSAGES = frozenset({"better", "label", "rule", "where"})
"""Values that are messages themselves."""
FORMATS = (
    N_("rows that cannot be read or understood"),
    N_("rows that hold half a character (a lone surrogate), which no tokenizer reads"),
    N_("held-out rows that repeat a training row"),
    N_("held-out rows that nearly repeat a training row"),
    N_("rows that have no assistant turn, so training leaves them out"),
    N_("rows that have an empty answer, which training leaves out"),
    N_("rows that repeat an earlier one"),
    N_("rows that nearly repeat an earlier one"),
    N_("rows that are longer than model.max_seq_length"),
    N_("rows that have no supervised token, so training leaves them out"),
    N_("rows that hold control tokens of a model family in their text"),
    N_("rows that hold the placeholder of a picture or sound, which the model would never see"),
    N_("rows that hold another template's headings in their text"),
    N_("rows that hold text read with the wrong encoding"),
    N_("rows that hold U+FFFD in place of characters that were lost"),
    N_("rows that hold the character NUL"),
    N_("rows that have an answer of one word"),
    N_("rows that have a system turn that is not the first"),
    N_("rows that have two turns of one speaker in a row"),
    N_("rows that have a tool's result without a call"),
    N_("rows that begin with the assistant"),
    N_("rows that end without an answer, so that what follows the last one is not supervised"),
    N_("data.drop=[%(name)s] leaves them out"),
    N_("data.drop=[%(name)s] leaves the training rows out"),
    N_("%(better)s; data.drop=[%(name)s] leaves them out"),
    N_("write the answer"),
    N_("remove them: Parley writes the model's own around each turn"),
    N_("describe in words what it stood for"),
    N_("split them into turns with columns or roles of their own"),
    N_("read the source as UTF-8 again, or repair it with ftfy"),
    N_("read the source as UTF-8 again"),
    N_("remove it"),
    N_("fine where that is the task"),
    N_("correct them; data.bad_rows=skip, the default, leaves them out"),
    N_("repair the text where it was cut; data.bad_rows=skip, the default, leaves them out"),
    N_("give them an answer, or name the speaker with data.roles"),
    N_("data.train_on and the messages' weights say which turns are supervised"),
    N_("model.chat_template=FILE names a template that does"),
    N_("data.control_tokens=text encodes them as plain text, tokens as control tokens"),
    N_(
        "data.overlong=%(mode)s leaves them out (%(over)s tokens past the limit, %(share)s of all); "
        "model.max_seq_length=%(length)s takes them whole"
    ),
    N_(
        "data.overlong=%(mode)s leaves them out (%(over)s tokens past the limit, %(share)s of all); "
        "model.max_seq_length=%(length)s takes them whole, data.overlong=split loses none of their tokens"
    ),
    N_(
        "data.overlong=%(mode)s cuts them (%(over)s tokens past the limit, %(share)s of all); "
        "model.max_seq_length=%(length)s takes them whole, data.overlong=split loses none of their tokens"
    ),
    N_(
        "data.overlong=split cuts them into rows of their own (%(over)s tokens past the limit, %(share)s of "
        "all); model.max_seq_length=%(length)s takes them whole"
    ),
    N_("the first repeats %(origin)s"),
    N_("the first nearly repeats %(origin)s"),
    N_("the answer is empty"),
    N_("the assistant speaks first"),
    N_("%(count)s tokens"),
    N_("rows"),
    N_("format"),
    N_("left out"),
    N_("held out"),
    N_("turns a row"),
    N_("turns by role"),
    N_("characters a row"),
    N_("tokens a row"),
    N_("tokens an answer"),
    N_("tokens are of"),
    N_("%(low)s to %(high)s, mean %(mean)s; 5%% up to %(p5)s, median %(p50)s, 95%% up to %(p95)s, 99%% up to %(p99)s"),
    N_("%(some)s tokens of %(all)s (%(share)s)"),
    N_("the first %(count)s of a stream"),
    N_("%(count)s rows of %(source)s"),
    N_("a sample of %(count)s; all that may be too long are in it"),
    N_("%(label)s (columns %(columns)s)"),
    N_("prompt and completion"),
    N_(
        "%(origin)s: got columns %(columns)s; wanted instruction, response (context) / conversations / "
        "messages / prompt, completion / text / input_ids; name yours in data.columns, for example "
        "{instruction: question, response: answer}"
    ),
    N_("%(source)s: no such file or folder here, and the hub cannot be reached; check the name or the network"),
    N_("%(where)s: is empty; wanted at least one row"),
    N_("%(origin)s: data.columns maps %(canonical)s to %(own)s, which is missing; it has columns %(columns)s"),
    N_("%(place)s line %(line)s: not UTF-8 (byte %(byte)s); save the file as UTF-8"),
    N_("%(source)s: cannot be read (%(reason)s); check its permissions"),
    N_("%(text)s: not in a folder that this studio may open (%(places)s); start it with --allow FOLDER"),
    N_("%(name)s: cannot be stored (%(reason)s)"),
    N_("no data set is named; give a hub id, or the path of a file or folder"),
    N_("another data set was chosen meanwhile; reload the page"),
    N_(
        "%(name)s: not downloaded yet, and the hub cannot be reached (%(reason)s); connect this machine (and "
        "unset HF_HUB_OFFLINE), or set model.name to a folder"
    ),
    N_("%(name)s: no such folder; give a model folder, or a hub id such as owner/model"),
    N_("%(name)s: got a file, wanted a model folder with config.json, or a hub id"),
    N_(
        "%(name)s: no such folder here and no such model on the hub; correct model.name, or, if it is "
        "private, `hf auth login` or set HF_TOKEN"
    ),
    N_("got %(value)s; %(rule)s"),
    N_("%(key)s: got %(value)s; %(rule)s"),
    N_("Input should be a valid number, unable to parse string as a number"),
    N_("Input should be a valid integer, unable to parse string as an integer"),
    N_("Input should be a valid integer, got a number with a fractional part"),
    N_("Input should be a valid boolean, unable to interpret input"),
    N_("Input should be a valid string"),
    N_("Input should be a valid list"),
    N_("Input should be a valid dictionary"),
    N_("Input should be greater than or equal to %(limit)s"),
    N_("Input should be greater than %(limit)s"),
    N_("Input should be less than or equal to %(limit)s"),
    N_("Input should be less than %(limit)s"),
    N_("Input should be %(choices)s"),
    N_("unknown key %(key)s in %(where)s; did you mean %(similar)s?"),
    N_("unknown key %(key)s in %(where)s; no key is spelled like it"),
    N_("the run's settings"),
    N_("%(setting)s: the studio starts no code of others; start this run with parley train"),
    N_("training.method: %(method)s is checked, but not planned"),
    N_("from %(rate)s tokens/s of the run %(run)s"),
    N_("from arithmetic (operations and bandwidth of the device): within a factor of two"),
    N_("%(run)s: no run of that name in %(root)s"),
    N_("%(run)s: runs, or is in the queue already"),
    N_("that run is not in the queue any more; reload the page"),
    N_("the models are not loaded; load them first"),
    N_("the studio's own process ended, most likely for lack of memory; end other programs, then try again"),
    N_("held-out conversations"),
    N_("%(some)s of %(all)s"),
    N_("%(mean)s and %(worst)s nats"),
    N_("%(trained)s and %(exported)s"),
)
_FIELD = re.compile(r"%\((\w+)\)s|(%%)")


def translated(gettext: Callable[[str], str], text: str) -> str:
    """`text` in the language of `gettext`, a message or one that has a format; else as it is."""
    if not text or "\n" in text:
        return text
    whole = gettext(text)
    if whole != text:
        return whole
    for format, pattern in _patterns():
        if (found := pattern.fullmatch(text)) is not None and (said := gettext(format)) != format:
            values = found.groupdict()
            return said % {
                name: translated(gettext, value) if name in MESSAGES else value for name, value in values.items()
            }
    return text


@cache
def _patterns() -> list[tuple[str, re.Pattern[str]]]:
    return [(format, re.compile(_expression(format))) for format in FORMATS if _FIELD.search(format)]


def _expression(format: str) -> str:
    parts, end = [], 0
    for field in _FIELD.finditer(format):
        parts.append(re.escape(format[end : field.start()]))
        value = r"[\d.,e+%<-]+" if field[1] in NUMBERS else ".+?"
        parts.append("%" if field[2] else f"(?P<{field[1]}>{value})")
        end = field.end()
    return "".join([*parts, re.escape(format[end:])])
