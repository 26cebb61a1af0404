#!/bin/sh
# Writes pac_answers.json: what browsers answer to tests/proxy/pac_cases.py. Run it after a change there; it needs apt-get,
# 80 MB of download, node and python3.
#
# The PAC functions are Firefox' own, cut out of Debian's firefox-esr (netwerk/base/ascii_pac_utils.js, a string in
# libxul.so); Chromium has the same ones, with another formatting. The engine is V8, Chromium's, as node has it.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
apt-get download firefox-esr
dpkg-deb --fsys-tarfile firefox-esr_*.deb | tar -x --wildcards '*/libxul.so'
python3 - "$here/.." <<'PYTHON'
import json, pathlib, sys
sys.path.insert(0, sys.argv[1])
import pac_cases
library = next(pathlib.Path().rglob("libxul.so")).read_bytes()
at = library.index(b"function dnsDomainIs(")
functions = library[library.rindex(b"\0", 0, at) + 1 : library.index(b"\0", at)].decode()
cases = [{**case._asdict(), "clocked": pac_cases.with_clock(case)} for case in pac_cases.cases()]
pathlib.Path("input.json").write_text(json.dumps({"functions": functions, "hosts": pac_cases.HOSTS, "cases": cases}))
PYTHON
cat > ask.mjs <<'JAVASCRIPT'
import { readFileSync } from 'node:fs';
import { isIPv4 } from 'node:net';
import vm from 'node:vm';
const { functions, hosts, cases } = JSON.parse(readFileSync('input.json', 'utf8'));
const answers = {};
for (const one of cases) {
  const dnsResolve = (host) => (isIPv4(host) ? host : hosts[host] ?? null);
  const world = vm.createContext({ dnsResolve, alert: () => {} });
  try {
    vm.runInContext(functions, world);
    vm.runInContext(one.clocked, world);
    world.asked = [one.url, one.host];
    answers[one.name] = vm.runInContext('FindProxyForURL(asked[0], asked[1])', world);
  } catch (error) {
    answers[one.name] = 'error';
  }
}
console.log(JSON.stringify(answers, null, 1));
JAVASCRIPT
TZ=UTC node ask.mjs > "$here/pac_answers.json"
