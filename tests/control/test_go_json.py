"""Go's encoding/json: its mistakes in its words, and how its answers look.

The words are those of go1.24: each body here was decoded by json.NewDecoder(...).Decode(&request), on paper where no Go
was at hand, following scanner.go's states.
"""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from netstack.control.go_json import GoJsonError, dumps, loads, quote_character, take_struct

FIELDS = {"local": (str, "string"), "protocol": (str, "types.TransportProtocol"), "Records": (list, "[]types.Record")}


@pytest.mark.parametrize(
    ("body", "words"),
    (
        (b"", "EOF"),
        (b" \r\n\t", "EOF"),
        (b"{", "unexpected EOF"),
        (b'{"local"', "unexpected EOF"),
        (b'{"local":', "unexpected EOF"),
        (b'{"local":"127', "unexpected EOF"),
        (b'{"local":"a"', "unexpected EOF"),
        (b"[1", "unexpected EOF"),
        (b"tru", "unexpected EOF"),
        (b"-", "unexpected EOF"),
        (b"1.", "unexpected EOF"),
        (b"1e+", "unexpected EOF"),
        (b"local", "invalid character 'l' looking for beginning of value"),
        (b"{local:1}", "invalid character 'l' looking for beginning of object key string"),
        (b"{'local':1}", r"invalid character '\'' looking for beginning of object key string"),
        (b'{"a":1,}', "invalid character '}' looking for beginning of object key string"),
        (b'{"a" 1}', "invalid character '1' after object key"),
        (b'{"a":1 "b":2}', "invalid character '\"' after object key:value pair"),
        (b'{"a":1]', "invalid character ']' after object key:value pair"),
        (b"[1 2]", "invalid character '2' after array element"),
        (b"[1,]", "invalid character ']' looking for beginning of value"),
        (b"[01]", "invalid character '1' after array element"),
        (b'"a\nb"', r"invalid character '\n' in string literal"),
        (b'"\\x"', "invalid character 'x' in string escape code"),
        (b'"\\u12g4"', r"invalid character 'g' in \u hexadecimal character escape"),
        (b"-x", "invalid character 'x' in numeric literal"),
        (b"1.x", "invalid character 'x' after decimal point in numeric literal"),
        (b"1ex", "invalid character 'x' in exponent of numeric literal"),
        (b"nul1", "invalid character '1' in literal null (expecting 'l')"),
        (b"fals}", "invalid character '}' in literal false (expecting 'e')"),
        (b"\x00", r"invalid character '\x00' looking for beginning of value"),
        (b"\xc3\xa9", "invalid character 'Ã' looking for beginning of value"),
        (b"local=1", "invalid character 'l' looking for beginning of value"),
        (b"[" * 20_000, "exceeded max depth"),
        (b"[" * 5_000 + b"]" * 5_000, "exceeded max depth"),
    ),
)
def test_mistakes_in_gos_words(body: bytes, words: str) -> None:
    with pytest.raises(GoJsonError) as caught:
        loads(body)
    assert str(caught.value) == words


@pytest.mark.parametrize(
    ("body", "value"),
    (
        (b'{"a":1} and more', {"a": 1}),
        (b"12", 12),
        (b" null ", None),
        (b'{"a":[{},[],"x",-0.5e3,true]}}}', {"a": [{}, [], "x", -500.0, True]}),
        (b'"\xff"', "\ufffd"),
        (b'"\\ud800"', "\ufffd"),
        (b'{"\\udc00a":"\\ud83d\\ude00"}', {"\ufffda": "\U0001f600"}),
        (b"9" * 5000, float("inf")),
    ),
)
def test_the_first_value_is_read_and_no_more(body: bytes, value: object) -> None:
    assert loads(body) == value


@given(st.binary(max_size=40) | st.text('{}[]",:\\0123e.-+trufalsn \n', max_size=40).map(str.encode))
def test_any_body_is_a_value_or_a_mistake(body: bytes) -> None:
    """And what Python takes for JSON, Go does too."""
    try:
        value = loads(body)
    except GoJsonError:
        with pytest.raises(ValueError):
            json.loads(body.decode())
    else:
        json.dumps(value)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(), lambda x: st.lists(x) | st.dictionaries(st.text(), x)
    )
)
def test_what_is_written_is_read_back(value: object) -> None:
    written = dumps(value)
    assert written.endswith(b"\n")
    if "\\ud" not in json.dumps(value):  # half a character cannot be written as UTF-8
        assert loads(written) == value


def test_answers_are_escaped_as_for_html() -> None:
    assert dumps([{"Name": "<é>&\u2028", "IP": ""}]) == b'[{"Name":"\\u003c\xc3\xa9\\u003e\\u0026\\u2028","IP":""}]\n'
    assert dumps({}) == b"{}\n"


def test_fields_are_found_in_any_letter_case_and_others_are_ignored() -> None:
    body = {"LOCAL": "x", "unknown": 1, "Protocol": None, "records": []}
    assert take_struct(body, "types.Request", FIELDS) == {"local": "x", "Records": []}
    assert take_struct(None, "types.Request", FIELDS) == {}


@pytest.mark.parametrize(
    ("value", "words"),
    (
        ([], "json: cannot unmarshal array into Go value of type types.Request"),
        ("x", "json: cannot unmarshal string into Go value of type types.Request"),
        (True, "json: cannot unmarshal bool into Go value of type types.Request"),
        (1.5, "json: cannot unmarshal number into Go value of type types.Request"),
        ({"local": 1}, "json: cannot unmarshal number into Go struct field Request.local of type string"),
        (
            {"protocol": {}, "local": 1},
            "json: cannot unmarshal object into Go struct field Request.protocol of type types.TransportProtocol",
        ),
        ({"Records": "x"}, "json: cannot unmarshal string into Go struct field Request.Records of type []types.Record"),
    ),
)
def test_wrong_types_in_gos_words(value: object, words: str) -> None:
    with pytest.raises(GoJsonError) as caught:
        take_struct(value, "types.Request", FIELDS)
    assert str(caught.value) == words


def test_every_byte_can_be_quoted() -> None:
    assert len({quote_character(byte) for byte in range(256)}) == 256
