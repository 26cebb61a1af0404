"""A corpus of PAC scripts: what is asked, and of what. What browsers answer is in recorded/pac_answers.json.

`EXPRESSIONS` are evaluated as the whole of FindProxyForURL, with the result as text; the other scripts are as
companies write them. Names resolve by HOSTS, and time stands still at NOW, a Friday, unless a case says otherwise
(seconds since 1970, UTC).
"""

from __future__ import annotations

from typing import Final, NamedTuple

HOSTS: Final = {
    "ten.test": "10.1.2.3",
    "www.corp.test": "192.168.7.9",
    "far.test": "203.0.113.9",
    "plain": "172.16.5.5",
}
NOW: Final = 1_700_244_930  # 2023-11-17 18:15:30 UTC


class Case(NamedTuple):
    """One question."""

    name: str
    script: str
    url: str = "http://www.example.com/index.html"
    host: str = "www.example.com"
    now: int = NOW


EXPRESSIONS: Final = (
    # Names.
    'isPlainHostName("www")',
    'isPlainHostName("www.mozilla.org")',
    'isPlainHostName("")',
    'dnsDomainIs("www.mozilla.org", ".mozilla.org")',
    'dnsDomainIs("www", ".mozilla.org")',
    'dnsDomainIs("notmozilla.org", "mozilla.org")',
    'dnsDomainIs("mozilla.org", ".mozilla.org")',
    'dnsDomainIs("WWW.MOZILLA.ORG", ".mozilla.org")',
    'dnsDomainIs("a.b.c", "")',
    'dnsDomainIs("b.c", "a.b.c")',
    'localHostOrDomainIs("www.mozilla.org", "www.mozilla.org")',
    'localHostOrDomainIs("www", "www.mozilla.org")',
    'localHostOrDomainIs("www.google.com", "www.mozilla.org")',
    'localHostOrDomainIs("home.mozilla.org", "www.mozilla.org")',
    'localHostOrDomainIs("ww", "www.mozilla.org")',
    'dnsDomainLevels("www")',
    'dnsDomainLevels("mozilla.org")',
    'dnsDomainLevels("www.mozilla.org")',
    'dnsDomainLevels("")',
    # Shell patterns.
    'shExpMatch("http://home.netscape.com/people/ari/index.html", "*/ari/*")',
    'shExpMatch("http://home.netscape.com/people/montulli/index.html", "*/ari/*")',
    'shExpMatch("www.example.com", "*.example.com")',
    'shExpMatch("example.com", "*.example.com")',
    'shExpMatch("www.example.com", "www.example.com")',
    'shExpMatch("wwwxexample.com", "www.example.com")',
    'shExpMatch("www.example.com", "*example*")',
    'shExpMatch("www1.example.com", "www?.example.com")',
    'shExpMatch("www.example.com", "www?.example.com")',
    'shExpMatch("WWW.example.com", "www.*")',
    'shExpMatch("", "*")',
    'shExpMatch("", "?")',
    'shExpMatch("a+b", "a+b")',
    'shExpMatch("aab", "a+b")',
    'shExpMatch("a(b)c", "a(b)c")',
    'shExpMatch("a$", "a$")',
    'shExpMatch("a^b", "a^b")',
    'shExpMatch("{a}", "{a}")',
    'shExpMatch("a|b", "a|b")',
    'shExpMatch("b", "a|b")',
    'shExpMatch("abc", "")',
    'shExpMatch("http://x/y?q=1", "*?q=*")',
    # Addresses.
    'isInNet("198.95.249.79", "198.95.249.79", "255.255.255.255")',
    'isInNet("198.95.6.8", "198.95.0.0", "255.255.0.0")',
    'isInNet("198.96.6.8", "198.95.0.0", "255.255.0.0")',
    'isInNet("10.1.2.3", "10.0.0.0", "255.0.0.0")',
    'isInNet("10.1.2.3", "10.9.9.9", "255.0.0.0")',
    'isInNet("255.255.255.255", "255.0.0.0", "255.0.0.0")',
    'isInNet("ten.test", "10.0.0.0", "255.0.0.0")',
    'isInNet("far.test", "10.0.0.0", "255.0.0.0")',
    'isInNet("unknown.test", "10.0.0.0", "255.0.0.0")',
    'isInNet("10.1.2.3", "10.0.0.0", "0.0.0.0")',
    'isInNet("10.1.2.3", "10.0.0", "255.0.0.0")',
    'isInNet("10.1.2.300", "10.0.0.0", "255.0.0.0")',
    'isInNet("10.1.2.3", "10.0.0.0", "255.0.0.256")',
    'dnsResolve("ten.test")',
    'dnsResolve("10.1.2.3")',
    'dnsResolve("plain")',
    'isResolvable("ten.test")',
    'isResolvable("unknown.test")',
    # The calendar. Friday 2023-11-17 18:15:30.
    'weekdayRange("FRI")',
    'weekdayRange("THU")',
    'weekdayRange("MON", "FRI")',
    'weekdayRange("MON", "THU")',
    'weekdayRange("SAT", "WED")',
    'weekdayRange("FRI", "MON")',
    'weekdayRange("FRI", "FRI")',
    'weekdayRange("FRI", "GMT")',
    'weekdayRange("MON", "FRI", "GMT")',
    "dateRange(17)",
    "dateRange(18)",
    'dateRange("NOV")',
    'dateRange("DEC")',
    "dateRange(2023)",
    "dateRange(2022)",
    "dateRange(1, 17)",
    "dateRange(17, 17)",
    "dateRange(18, 30)",
    "dateRange(25, 20)",
    'dateRange("JAN", "NOV")',
    'dateRange("JAN", "OCT")',
    'dateRange("OCT", "JAN")',
    'dateRange("DEC", "JAN")',
    "dateRange(2020, 2023)",
    "dateRange(2024, 2025)",
    'dateRange(1, "NOV", 17, "NOV")',
    'dateRange(18, "NOV", 30, "NOV")',
    'dateRange(18, "NOV", 30, "JUN")',
    'dateRange(1, "OCT", 28, "FEB")',
    'dateRange("OCT", 2023, "NOV", 2023)',
    'dateRange("DEC", 2023, "JAN", 2024)',
    'dateRange(1, "JAN", 2023, 31, "DEC", 2023)',
    'dateRange(1, "JAN", 2024, 31, "DEC", 2024)',
    'dateRange(17, "NOV", 2023, 17, "NOV", 2023)',
    'dateRange(17, "GMT")',
    'dateRange("NOV", "GMT")',
    'dateRange(1, "NOV", 2023, 30, "NOV", 2023, "GMT")',
    "timeRange(18)",
    "timeRange(17)",
    "timeRange(9, 18)",
    "timeRange(9, 17)",
    "timeRange(18, 20)",
    "timeRange(19, 20)",
    "timeRange(22, 6)",
    "timeRange(17, 6)",
    "timeRange(18, 0, 18, 15)",
    "timeRange(18, 0, 18, 14)",
    "timeRange(18, 16, 19, 0)",
    "timeRange(22, 0, 18, 20)",
    "timeRange(18, 15, 30, 18, 15, 30)",
    "timeRange(18, 15, 31, 18, 16, 0)",
    "timeRange(0, 0, 0, 0, 0, 30)",
    'timeRange(18, "GMT")',
    'timeRange(9, 19, "GMT")',
    'timeRange(18, 0, 18, 30, "GMT")',
    # The engine.
    "null",
    "typeof undefined",
    '"PROXY a:1" + "; DIRECT"',
    'url + " " + host',
    '"Host".toLowerCase()',
    'url.substring(0, 5) == "http:"',
    "/^www\\./.test(host)",
)

_COMPANY: Final = """
var internal = [".corp.test", ".intern.test"];
function isInternal(host) {
  for (var i = 0; i < internal.length; i++) { if (dnsDomainIs(host, internal[i])) return true; }
  return false;
}
function FindProxyForURL(url, host) {
  host = host.toLowerCase();
  if (isPlainHostName(host) || host == "127.0.0.1") return "DIRECT";
  if (isInternal(host)) return "DIRECT";
  if (isResolvable(host) && isInNet(dnsResolve(host), "10.0.0.0", "255.0.0.0")) return "PROXY ten:8080; DIRECT";
  if (shExpMatch(url, "https://*.bank.test/*")) return "PROXY secure:3128";
  if (url.substring(0, 6) == "https:") return "PROXY tls:3128; PROXY tls2:3128";
  if (url.substring(0, 4) == "ftp:") return "SOCKS socks:1080";
  undeclared = "is allowed outside strict mode";
  switch (host.charAt(0)) {
    case "a": return "PROXY a:80";
    default: return "PROXY rest:80; SOCKS5 s5:1080; DIRECT";
  }
}
"""

_ASKED: Final = (
    ("http://intranet/", "intranet"),
    ("http://www.corp.test/", "www.corp.test"),
    ("http://WWW.CORP.TEST/", "WWW.CORP.TEST"),
    ("http://ten.test/", "ten.test"),
    ("https://login.bank.test/x", "login.bank.test"),
    ("https://far.test/", "far.test"),
    ("http://far.test/", "far.test"),
    ("ftp://far.test/", "far.test"),
    ("http://a.unknown.test/", "a.unknown.test"),
)

_BY_URL: Final = """
function FindProxyForURL(url, host) {
  var sum = 0;
  for (var i = 0; i < url.length; i++) sum = (sum * 31 + url.charCodeAt(i)) % 1009;
  var list = ["PROXY p0:80", "PROXY p1:80", "PROXY p2:80"];
  return list[sum % 3] + "; " + list[(sum + 1) % 3];
}
"""


def cases() -> list[Case]:
    """All of them."""
    found = [Case(one, f"function FindProxyForURL(url, host) {{ return String({one}); }}") for one in EXPRESSIONS]
    found += [Case(f"company {url}", _COMPANY, url, host) for url, host in _ASKED]
    found += [Case(f"by url {n}", _BY_URL, f"http://h/{n}", "h") for n in range(5)]
    # New Year's Eve, a leap day, the first second of a year, and the day after a month of 30 days.
    moments = ("eve", 1_704_067_199), ("leap", 1_709_208_000), ("midnight", 1_704_067_200), ("first", 1_701_388_800)
    for name, now in moments:
        for one in (
            'dateRange("DEC", "JAN")',
            'dateRange("OCT", "NOV")',
            'dateRange(29, "FEB", 1, "MAR")',
            'dateRange("DEC", 2023, "JAN", 2024)',
            "dateRange(2023, 2024)",
            "dateRange(31, 1)",
            "timeRange(0)",
            "timeRange(23, 0, 0, 30)",
            'weekdayRange("SUN")',
            'weekdayRange("SAT", "MON")',
        ):
            script = f"function FindProxyForURL(url, host) {{ return String({one}); }}"
            found.append(Case(f"{name} {one}", script, now=now))
    return found


def with_clock(case: Case) -> str:
    """The script, in a world where it is always `now`."""
    return f"""
var RealDate = Date;
Date = function (y, m, d, h, i, s) {{
  return arguments.length == 0 ? new RealDate({case.now} * 1000) : new RealDate(y, m, d, h || 0, i || 0, s || 0);
}};
{case.script}
"""
