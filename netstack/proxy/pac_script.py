"""The functions that a PAC script may call, in JavaScript, and how its answer is read.

Theory of operation. What these functions do was fixed by Netscape in 1996 and by what browsers made of it since;
tests/proxy compares them with Firefox' own. What scripts rely on, and what is easily got wrong:

    shExpMatch       shell patterns, of which browsers know * and ? only; the rest is a regular expression but for the
                     dot, over the whole text, and case counts
    dnsDomainIs      the end of the text, not a label: "notexample.com" is in "example.com"
    isInNet          a name is looked up; a pattern or mask that is no address never matches
    dnsResolve       the first IPv4 address, null for none; the Ex functions have both families, with semicolons
    weekdayRange, dateRange, timeRange
                     both ends included, and over the turn of the week, month, year or day where they are the wrong
                     way round, but for two hours; timeRange(9, 17) lasts until 17:59:59; "GMT" as the last argument

The only way out of the script is `__resolve(name)`, a list of addresses as JSON, and `__addresses`, our own. A script
cannot fetch, read or write anything.

The answer is a list such as "PROXY a:8080; SOCKS5 b:1080; DIRECT" (`parse_result`). Names are resolved by a SOCKS5
proxy, as browsers have it, which is why it becomes socks5h; SOCKS alone means version 4 to all of them.
"""

from __future__ import annotations

import re
from typing import Final

from netstack.proxy.routes import DIRECT, Route, Routes
from netstack.proxy.settings import ProxySyntaxError, Scheme, parse_server

HELPERS: Final = r"""
var __addresses = ["127.0.0.1"];
(function (scope) {
  "use strict";
  var OCTET = "(25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])";
  var IPV4 = new RegExp("^" + OCTET + "\\." + OCTET + "\\." + OCTET + "\\." + OCTET + "$");
  var DAYS = ["SUN", "MON", "TUE", "WED", "THU", "FRI", "SAT"];
  var MONTHS = ["JAN", "FEB", "MAR", "APR", "MAY", "JUN", "JUL", "AUG", "SEP", "OCT", "NOV", "DEC"];

  function resolve(host) {
    return JSON.parse(__resolve(String(host)));
  }
  function isIPv4(text) {
    return IPV4.test(text);
  }
  function toNumber(text) {
    var parts = IPV4.exec(text);
    return parts ? ((parts[1] << 24) | (parts[2] << 16) | (parts[3] << 8) | parts[4]) >>> 0 : null;
  }

  scope.alert = function () {};
  scope.isPlainHostName = function (host) {
    return String(host).search(/\.|:/) === -1;
  };
  scope.dnsDomainIs = function (host, domain) {
    host = String(host);
    domain = String(domain);
    return host.length >= domain.length && host.slice(host.length - domain.length) === domain;
  };
  scope.dnsDomainLevels = function (host) {
    return String(host).split(".").length - 1;
  };
  scope.localHostOrDomainIs = function (host, hostdom) {
    return host === hostdom || String(hostdom).lastIndexOf(host + ".", 0) === 0;
  };
  scope.convert_addr = function (text) {
    var number = toNumber(text);
    return number === null ? 0 : number | 0;
  };
  scope.dnsResolve = function (host) {
    if (isIPv4(host)) return host;
    var found = resolve(host).filter(isIPv4);
    return found.length ? found[0] : null;
  };
  scope.isResolvable = function (host) {
    return scope.dnsResolve(host) !== null;
  };
  scope.isInNet = function (host, pattern, mask) {
    var net = toNumber(pattern), bits = toNumber(mask);
    if (net === null || bits === null) return false;
    var address = isIPv4(host) ? host : scope.dnsResolve(host);
    return address !== null && (toNumber(address) & bits) === (net & bits);
  };
  scope.myIpAddress = function () {
    var found = __addresses.filter(isIPv4);
    return found.length ? found[0] : "127.0.0.1";
  };
  scope.shExpMatch = function (text, pattern) {
    // No other sign is escaped, in any browser: scripts have "(*.a.example|*.b.example)".
    var expression = String(pattern).replace(/\./g, "\\.").replace(/\*/g, ".*").replace(/\?/g, ".");
    return new RegExp("^" + expression + "$").test(String(text));
  };

  // Microsoft's additions, which Chromium has too.
  scope.dnsResolveEx = function (host) {
    return isIPv4(host) || String(host).indexOf(":") !== -1 ? String(host) : resolve(host).join(";");
  };
  scope.isResolvableEx = function (host) {
    return scope.dnsResolveEx(host) !== "";
  };
  scope.myIpAddressEx = function () {
    return __addresses.join(";");
  };
  scope.getClientVersion = function () {
    return "1.0";
  };

  function toWords(text) {
    // The eight groups of an IPv6 address, or the last two of one of IPv4 mapped; null where it is none.
    if (isIPv4(text)) {
      var n = toNumber(text);
      return { family: 4, words: [n >>> 16, n & 0xffff] };
    }
    text = String(text).replace(/%.*$/, "");
    var tail = /^(.*:)([0-9.]+)$/.exec(text);
    if (tail && isIPv4(tail[2])) {
      var m = toNumber(tail[2]);
      text = tail[1] + (m >>> 16).toString(16) + ":" + (m & 0xffff).toString(16);
    }
    var halves = text.split("::");
    if (halves.length > 2 || text.indexOf(":") === -1) return null;
    var head = halves[0] ? halves[0].split(":") : [];
    var rest = halves.length === 2 && halves[1] ? halves[1].split(":") : [];
    var gap = 8 - head.length - rest.length;
    if (halves.length === 1 ? gap !== 0 : gap < 1) return null;
    var words = head.concat(new Array(halves.length === 2 ? gap : 0).fill("0"), rest);
    for (var i = 0; i < 8; i++) {
      if (!/^[0-9a-fA-F]{1,4}$/.test(words[i])) return null;
    }
    return { family: 6, words: words.map(function (word) { return parseInt(word, 16); }) };
  }
  scope.isInNetEx = function (host, prefix) {
    var parts = String(prefix).split("/");
    var net = toWords(parts[0]), length = Number(parts[1]);
    if (parts.length !== 2 || !net || !(length >= 0 && length <= net.words.length * 16)) return false;
    var candidates = toWords(host) ? [host] : resolve(host);
    return candidates.some(function (one) {
      var address = toWords(one);
      if (!address || address.family !== net.family) return false;
      for (var i = 0, left = length; left > 0; i++, left -= 16) {
        var mask = left >= 16 ? 0xffff : (0xffff << (16 - left)) & 0xffff;
        if ((address.words[i] & mask) !== (net.words[i] & mask)) return false;
      }
      return true;
    });
  };
  scope.sortIpAddressList = function (list) {
    var all = String(list).split(";").map(function (one) { return one.trim(); });
    var parsed = all.map(toWords);
    if (!all.length || parsed.indexOf(null) !== -1) return "";
    function key(one) {
      return one.family + one.words.map(function (word) { return (0x10000 + word).toString(16); }).join("");
    }
    return all.map(function (text, i) { return { text: text, six: parsed[i].family === 6, key: key(parsed[i]) }; })
      .sort(function (a, b) { return a.six !== b.six ? (a.six ? -1 : 1) : a.key < b.key ? -1 : a.key > b.key ? 1 : 0; })
      .map(function (one) { return one.text; }).join(";");
  };

  // Whether now is from..to, over the turn where they are the wrong way round. Parts are compared from left to right.
  function compare(a, b) {
    for (var i = 0; i < a.length; i++) {
      if (a[i] !== b[i]) return a[i] < b[i] ? -1 : 1;
    }
    return 0;
  }
  function isWithin(from, now, to) {
    var after = compare(from, now) <= 0, before = compare(now, to) <= 0;
    return compare(from, to) <= 0 ? after && before : after || before;
  }
  function taken(args) {
    var list = Array.prototype.slice.call(args);
    var utc = list.length > 0 && list[list.length - 1] === "GMT";
    if (utc) list.pop();
    var now = new Date();
    return {
      list: list,
      day: utc ? now.getUTCDay() : now.getDay(),
      year: utc ? now.getUTCFullYear() : now.getFullYear(),
      month: utc ? now.getUTCMonth() : now.getMonth(),
      date: utc ? now.getUTCDate() : now.getDate(),
      time: [utc ? now.getUTCHours() : now.getHours(), utc ? now.getUTCMinutes() : now.getMinutes(),
        utc ? now.getUTCSeconds() : now.getSeconds()],
    };
  }
  scope.weekdayRange = function () {
    var at = taken(arguments), list = at.list;
    var from = DAYS.indexOf(list[0]), to = list.length > 1 ? DAYS.indexOf(list[1]) : from;
    return from !== -1 && to !== -1 && isWithin([from], [at.day], [to]);
  };
  scope.timeRange = function () {
    var at = taken(arguments), list = at.list.map(Number);
    switch (list.length) {
      case 1: return at.time[0] === list[0];
      case 2: return list[0] <= at.time[0] && at.time[0] <= list[1]; // not over midnight, in any browser
      case 4: return isWithin([list[0], list[1], 0], at.time, [list[2], list[3], 59]);
      case 6: return isWithin(list.slice(0, 3), at.time, list.slice(3));
      default: throw new Error("timeRange: bad number of arguments");
    }
  };
  function datePart(value) {
    var month = MONTHS.indexOf(value);
    if (month !== -1) return ["month", month];
    var number = parseInt(value, 10);
    if (isNaN(number)) return null;
    return number < 32 ? ["date", number] : ["year", number];
  }
  scope.dateRange = function () {
    var at = taken(arguments), parts = at.list.map(datePart);
    if (parts.length === 0 || parts.indexOf(null) !== -1) return false;
    if (parts.length === 1) return at[parts[0][0]] === parts[0][1];
    var half = parts.length >> 1, from = {}, to = {};
    parts.slice(0, half).forEach(function (part) { from[part[0]] = part[1]; });
    parts.slice(half).forEach(function (part) { to[part[0]] = part[1]; });
    var fields = ["year", "month", "date"].filter(function (name) { return name in from && name in to; });
    function pick(source) { return fields.map(function (name) { return source[name]; }); }
    return fields.length > 0 && isWithin(pick(from), pick(at), pick(to));
  };
})(globalThis);
function __find(url, host) { return FindProxyForURL(url, host); }
"""

_MAX_RESULT: Final = 8192
_MAX_ROUTES: Final = 32

_WORDS: Final[dict[str, Scheme]] = {
    "PROXY": "http",
    "HTTP": "http",
    "HTTPS": "https",
    "SOCKS": "socks4",
    "SOCKS4": "socks4",
    "SOCKS5": "socks5h",
}


def parse_result(text: str) -> Routes:
    """The ways that a script's answer lists; DIRECT for an empty one, and where nothing can be read. Untrusted."""
    routes: list[Route] = []
    for part in text[:_MAX_RESULT].split(";"):
        word, _, place = part.strip().partition(" ")
        word, place = word.upper(), place.strip()
        if word == "DIRECT":
            routes.append(DIRECT)
        elif word in _WORDS and re.fullmatch(r"[^\s/@?#]+", place):
            try:
                routes.append(parse_server(place, _WORDS[word]))
            except ProxySyntaxError:
                continue
    return tuple(dict.fromkeys(routes[:_MAX_ROUTES])) or (DIRECT,)
