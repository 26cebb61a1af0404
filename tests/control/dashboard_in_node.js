// Runs the dashboard's script in node, with as much of a document as it uses, against an API that really runs.
//
//     node dashboard_in_node.js SCRIPT http://127.0.0.1:PORT TOKEN
//
// Prints what the page shows after the third picture, as JSON, and ends.
"use strict";
const fs = require("fs");
const [script, base, token] = process.argv.slice(2);

class Element {
  constructor(kind) { this.kind = kind; this.children = []; this.text = ""; this.hidden = kind === "main" || kind === "form"; this.attributes = {}; this.listeners = {}; }
  set textContent(text) { this.text = String(text); this.children = []; }
  get textContent() { return this.text + this.children.map(child => child.textContent).join("|"); }
  append(...children) { this.children.push(...children); }
  prepend(...children) { this.children.unshift(...children); }
  replaceChildren(...children) { this.children = children; }
  setAttribute(name, value) { this.attributes[name] = value; }
  addEventListener(kind, call) { this.listeners[kind] = call; }
  remove() {}
  get childNodes() { return this.children; }
  get lastChild() { return this.children[this.children.length - 1]; }
}
const elements = {};
const kinds = { main: "main", ask: "form" };
const stored = {};
const real = globalThis.fetch;
globalThis.location = { hash: "" };
globalThis.sessionStorage = { getItem: key => stored[key] || null, setItem: (key, value) => { stored[key] = value; }, removeItem: key => { delete stored[key]; } };
globalThis.document = { hidden: false, getElementById: id => elements[id] ||= new Element(kinds[id]), createElement: kind => new Element(kind) };
globalThis.fetch = (path, options) => real(base + path, options);

const asked = () => elements.ask && !elements.ask.hidden;
const wait = setInterval(() => {
  if (asked() && !stored.given) {
    stored.given = true;
    document.getElementById("token").value = token;
    elements.ask.listeners.submit({ preventDefault() {} });
  }
  const points = ((elements["line-from"] || { attributes: {} }).attributes.points || "").split(" ").length;
  if (points >= 3) {
    clearInterval(wait);
    const page = Object.fromEntries(Object.entries(elements).map(([id, element]) => [id, element.textContent]));
    console.log(JSON.stringify({ ...page, mainHidden: elements.main.hidden, askHidden: elements.ask.hidden, wasAsked: !!stored.given, token: stored.token }));
    process.exit(0);
  }
}, 20);
setTimeout(() => { console.error("nothing was shown: " + (elements.state || {}).textContent); process.exit(1); }, 20000);
(0, eval)(fs.readFileSync(script, "utf8"));
