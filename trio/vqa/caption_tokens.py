"""Tokens of a caption, as the COCO evaluation makes them with the Stanford PTB tokeniser.

The official pipeline runs Java. These rules give the same tokens for captions of a few sentences;
they were made by asking that tokeniser, and `tests/vqa` holds them against what it answered.
"""

from __future__ import annotations

import re

_SAME = str.maketrans(
    {
        "\n": " ",
        "’": "'",
        "‘": "'",
        "“": '"',
        "”": '"',
        "…": "...",
        "—": "--",
        "―": "--",
        "–": "--",
        "£": "#",
        "€": "$",
        "¢": " cents",
        "½": "1/2",
        "¼": "1/4",
        "¾": "3/4",
    }
)
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_DROPPED = re.compile(r"'+|`+|\"|\.+|[?!,:;]|-+|[\U00010000-\U0010ffff]")
_JOINED = ("cannot", "gonna", "wanna", "gotta", "lemme", "gimme", "'tis", "'twas", "y'all")
_FIRST = {"'tis": 2, "'twas": 2, "y'all": 2}
"""Letters of the first of two words that are written as one; 3 of the others."""
_ABBREVIATIONS = (
    "mr mrs ms mme mlle messrs dr drs prof sr jr st ste mt ft gen col capt cmdr adm lt maj sgt sen "
    "sens rep reps gov govs rev hon pres supt insp atty vs etc inc ltd co cos corp bros dept est "
    "jan feb mar apr jun jul aug sep sept oct nov dec mon tue tues wed thu thurs fri ave blvd rd "
    "ct sq cf al calif fla mich minn mo mont neb nev okla penn tenn vt va wis wyo ala ariz colo "
    "conn ga ind kan ky md ph bldg univ assn intl natl tel ext cie invt elec plc adj asst alex wm "
    r"jos mfg esq msgr ph\.d [a-z]"
).replace(" ", "|")
_BEFORE_NUMBER = "figs?|nos?|pp|ca|art"
_TOKEN = re.compile(
    rf"""
    </?[a-z][^<>]*>                                   # a tag
    | https?://[^\s"<>]+ | www\.[^\s"<>]+
    | [\w.+-]+@[\w-]+(?:\.[\w-]+)+                    # an e-mail address
    | [#@][a-z_]\w*
    | (?<!\w)(?:[a-z]\.){{2,}}(?![a-z])(?:-\w+)*       # a.m.
    | (?<!\w)(?:{_ABBREVIATIONS})\.(?!\w)
    | (?<!\w)(?:{_BEFORE_NUMBER})\.(?=\s*\d)
    | (?<![^\s("]) [-+] (?:\d+(?:[.:,]\d+)*|(?:[.:,]\d+)+)
    | (?:\d+(?:[.:,]\d+)+|(?:[.:,]\d+)+)(?:-\w+)*     # 3,000
    | '\d\d(?=\s|$) | '\d0s\b                         # '90s
    | (?<!\w)(?:'em|'cause|'till?|li'l|ol')(?!\w)
    | n't\b
    | [^\W\d_]+?(?=n't\b)
    | (?<!\w)(?:'tis|'twas|y'all|ma'am)\b
    | '(?:s|re|ve|ll|d|m)\b
    | 'n(?:'|\b)
    | [a-hj-xz]'[a-z]{{2,}}                           # o'clock
    | (?-i:[A-Z]+&[A-Z]+)
    | \w+(?:[-‐‑/@.]\w+)*
    | [?!]{{2,}} | \*{{2,}} | \#{{2,}} | \.{{2,}} | -{{2,}} | '{{2,}} | `{{2,}}
    | \S
    """,
    re.VERBOSE | re.IGNORECASE,
)


def caption_tokens(text: str) -> list[str]:
    """Lower-case tokens without punctuation; brackets stay, as -lrb- and the like."""
    tokens = []
    for found in _TOKEN.findall(text.translate(_SAME)):
        token = found.lower()
        if token in _JOINED:
            first = _FIRST.get(token, 3)
            tokens += [token[:first], token[first:]]
        elif not _DROPPED.fullmatch(token):
            tokens.append(_BRACKETS.get(token, token))
    return tokens
