// The explorer of one gradient graph. Python provides the graph, its groups and all numbers. This file holds
// the state of the page: open groups, the side shown, pan and zoom. Graphviz computes the layout.

const read = (id) => JSON.parse(document.getElementById(id).textContent);
const data = read("data");
const by = (id) => document.getElementById(id);
const nodes = new Map(data.nodes.map((n) => [n.id, n]));
const groups = new Map(data.groups.map((g) => [g.id, g]));
const item = (id) => nodes.get(id) ?? groups.get(id);
const state = { side: "plain", view: "imbalance", rankdir: "TB", open: new Set(data.open), chosen: null };

// --- numbers

const SEEN = 5e-4; // of the output: labels leave smaller numbers out
const moved = (row) => (row ? row.lost + row.created : 0);
const share = (value, side) => value / (data.output[side] || 1);
const part = (value, side) => Math.abs(share(value, side)); // for mass lost or created, which is never negative
const percent = (fraction) => {
  const p = 100 * fraction;
  return `${p === 0 || Math.abs(p) >= 1e-3 ? Number(p.toPrecision(3)) : p.toExponential(1)}\u00a0%`;
};
const worst = Math.max(SEEN, ...[...nodes.values(), ...groups.values()].map((n) => part(moved(n.plain), "plain")));
const depth = (amount) => Math.log1p(100 * amount) / Math.log1p(100 * worst);

// --- visible items: an op, or the outermost closed group around it

const visible = (node) => node.groups.find((g) => !state.open.has(g)) ?? node.id;
const SIDES = ["plain", "balanced"];
const NAMES = { plain: "autograd", balanced: "balanced" };
const plus = (a, b) => a + b;
const both = (of, a, b) => (a === null ? b : b === null ? a : of(a, b));

function quotient() {
  const items = new Set(data.nodes.map(visible));
  const edges = new Map();
  for (const e of data.edges) {
    const [from, to] = [visible(nodes.get(e.from)), visible(nodes.get(e.to))];
    if (from === to) continue;
    const key = JSON.stringify([from, to]);
    const sum = edges.get(key) ?? { from, to, plain: null, balanced: null, plain_norm: null, balanced_norm: null };
    for (const side of SIDES) {
      sum[side] = both(plus, sum[side], e[side]);
      sum[`${side}_norm`] = both(Math.hypot, sum[`${side}_norm`], e[`${side}_norm`]);
    }
    edges.set(key, sum);
  }
  return { items, edges: [...edges.values()] };
}

const parent = (id) => (nodes.has(id) ? nodes.get(id).groups.at(-1) ?? "" : groups.get(id).parent);

function said(it, side) {
  if (side === "balanced") {
    const left = part(moved(it.balanced), side) >= SEEN ? [`left ${percent(part(moved(it.balanced), side))}`] : [];
    const done = Object.entries(it.actions).map(([k, n]) => k.replaceAll("_", " ") + (n > 1 ? ` × ${n}` : ""));
    return [...left, ...done].join(", ");
  }
  const words = { lost: "loses", created: "creates" };
  return Object.keys(words)
    .filter((k) => it.plain && part(it.plain[k], side) >= SEEN)
    .map((k) => `${words[k]} ${percent(part(it.plain[k], side))}`)
    .join(", ");
}

function lines(it) {
  const above = it.parent && !it.parent.includes("…") ? `${it.parent}.` : "";
  const title = groups.has(it.id) ? it.id.replace(above, "") : it.title;
  const about = groups.has(it.id) ? `${it.ops} ops` : it.shape;
  const [a, b] = SIDES.map((side) => said(it, side));
  return { head: [title, about].filter(Boolean), room: a.length > b.length ? a : b }; // room for the longer of both sides
}

// --- layout: DOT to an SVG element, by the Graphviz of graphviz-anywidget behind the anywidget protocol

const engine = (async () => {
  const source = new Blob([read("engine")], { type: "text/javascript" });
  const widget = (await import(URL.createObjectURL(source))).default;
  const held = { dot_source: "digraph {}", enable_zoom: false };
  const on = {};
  const room = by("engine-room");
  const quiet = { log: console.log, info: console.info }; // the bundle logs each element that it finds
  const hushed = async (work) => {
    Object.assign(console, { log() {}, info() {} });
    try { await work(); } finally { Object.assign(console, quiet); }
  };
  const model = { get: (k) => held[k], set() {}, save_changes() {}, on: (event, f) => { on[event] = f; } };
  await hushed(() => widget.render({ model, el: room }));
  return async (dot) => {
    held.dot_source = dot;
    await hushed(on["change:dot_source"]);
    return room.querySelector("svg").cloneNode(true);
  };
})();

const quoted = (text) => `"${String(text).replace(/[\\"]/g, "\\$&").replaceAll("\n", "\\n")}"`;

function dot({ items, edges }) {
  const name = new Map([...items].map((id, i) => [id, `n${i}`]));
  const clusters = [...state.open].filter((g) => groups.has(g) && shown(g));
  const place = new Map(clusters.map((g, i) => [g, `cluster_${i}`]));
  const font = 'fontname="Helvetica,Arial,sans-serif"';
  const inside = (outer) => [
    ...[...items].filter((id) => parent(id) === outer).map((id) => {
      const { head, room } = lines(item(id));
      return `${name.get(id)} [id=${name.get(id)} label=${quoted([...head, ...(room ? [`${room}\u2002\u2002`] : [])].join("\n"))}];`;
    }),
    ...clusters.filter((g) => groups.get(g).parent === outer).map(
      (g) => `subgraph ${place.get(g)} { id=${place.get(g)} label=${quoted(lines(groups.get(g)).head[0])}; ${inside(g)} }`,
    ),
  ].join("\n");
  const text = `digraph {
    graph [rankdir=${state.rankdir} nodesep=0.25 ranksep=0.32 bgcolor=transparent ${font} fontsize=11 labeljust=l]
    node [shape=box style="rounded,filled" fontsize=10 margin="0.2,0.07" ${font}]
    edge [arrowsize=0.6]
    ${inside("")}
    ${edges.map((e, i) => `${name.get(e.from)} -> ${name.get(e.to)} [id=e${i}];`).join("\n")}
  }`;
  return { text, ids: new Map([...name, ...place].map(([id, svg]) => [svg, id])) };
}

/** Whether all groups around a group are open, so that its own cluster is drawn. */
const shown = (group) => {
  for (let g = groups.get(group).parent; g; g = groups.get(g).parent) if (!state.open.has(g)) return false;
  return true;
};

// --- drawing

let drawn = null; // { svg, elements: id -> element, edges: [[element, edge]] }
let laying = Promise.resolve();
let layouts = 0;

/** Lay out the visible items. `anchor` keeps its place on the screen; without one, all is fitted. */
function redraw(anchor = null) {
  laying = laying.then(async () => {
    by("note").textContent = "laying out …";
    by("tip").textContent = "";
    const at = anchor && drawn?.elements.get(anchor) ? middle(anchor) : null;
    const scale = drawn ? zoom() : null;
    const graph = quotient();
    const { text, ids } = dot(graph);
    const svg = await (await engine)(text);
    const elements = new Map();
    for (const el of svg.querySelectorAll(".node, .cluster")) {
      const id = ids.get(el.id);
      elements.set(id, el);
      el.querySelector("title")?.remove();
      el.tabIndex = 0;
      el.setAttribute("role", "button");
      el.setAttribute("aria-label", lines(item(id)).head.join(", "));
      el.dataset.item = id;
      el.classList.toggle("group", groups.has(id));
    }
    svg.querySelector(":scope > g > polygon")?.remove(); // the background
    const edges = graph.edges.map((edge, i) => [svg.querySelector(`#e${i}`), edge]);
    edges.forEach(([el], i) => { el.dataset.edge = i; });
    const box = svg.viewBox.baseVal;
    const size = { x: box.x, y: box.y, width: box.width, height: box.height };
    drawn?.svg.remove();
    svg.removeAttribute("width");
    svg.removeAttribute("height");
    by("stage").prepend(svg);
    drawn = { svg, elements, edges, size };
    paint();
    if (at && elements.has(anchor)) keep(anchor, at, scale);
    else fit();
    by("note").textContent = "";
    document.body.dataset.layouts = ++layouts;
  }).catch((error) => {
    by("note").textContent = `The layout failed: ${error.message ?? error}`;
    console.error(error);
  });
  return laying;
}

const mix = (colour, amount) => `color-mix(in srgb, var(--${colour}) ${Math.round(60 * amount)}%, var(--node))`;

/** Paint colours, widths and labels of one side and view onto the present layout. */
function paint() {
  if (!drawn) return; // the first layout paints
  const { side, view } = state;
  for (const [id, el] of drawn.elements) {
    const it = item(id);
    const row = it[side];
    const amount = part(moved(row), side);
    const painted = el.matches(".node") && view === "imbalance" && amount >= SEEN;
    const colour = row && row.lost >= row.created ? "lost" : "created";
    el.querySelector("path, polygon").style.fill = painted ? mix(colour, depth(amount)) : "";
    el.classList.toggle("edited", side === "balanced" && Object.keys(it.actions).length > 0);
    el.classList.toggle("chosen", id === state.chosen);
    const { head, room } = lines(it);
    if (el.matches(".node") && room) el.querySelectorAll("text")[head.length].textContent = said(it, side);
  }
  const widest = Math.max(...drawn.edges.flatMap(([, e]) => [part(e.plain ?? 0, "plain"), part(e.balanced ?? 0, "balanced")]), 1e-12);
  for (const [el, edge] of drawn.edges) {
    const mass = edge[side];
    const flow = view === "flow" && mass !== null;
    el.style.setProperty("--width", flow ? 0.5 + (9.5 * part(mass, side)) / widest : 1);
    el.classList.toggle("positive", flow && share(mass, side) >= 0);
    el.classList.toggle("negative", flow && share(mass, side) < 0);
    el.classList.toggle("pruned", side === "balanced" && mass === null);
    el.classList.toggle("absent", side === "plain" && mass === null);
  }
  legend(widest);
  details();
}

function legend(widest) {
  const { side, view } = state;
  const key = view === "imbalance"
    ? [element("div", {}, "gradient mass, % of the output (logarithmic)"),
       Object.assign(element("div", { id: "scale" }), { style: `background: linear-gradient(90deg, ${mix("lost", 1)}, var(--node), ${mix("created", 1)})` }),
       element("div", { id: "ticks" }, ...[-1, 1].flatMap((sign) => TICKS.map((t) => tick(t, sign * depth(t)))), tick(0, 0)),
       element("div", {}, "lost + created: violet where more is lost, orange where more is created")]
    : [element("div", {}, `width: the mass ⟨a, g⟩ that comes back, at most ${percent(widest)} of the output; `,
       coloured("positive", "red: for it"), ", ", coloured("negative", "blue: against it"))];
  const edits = side === "balanced"
    ? [element("div", {}, "dashed: pruned; ", coloured("edit", "green border: edited"))] : [];
  by("legend").replaceChildren(...key, ...edits);
}

const TICKS = [0.01, 0.1, 1, 10, 100, 1000].filter((t) => t < worst && t > worst / 500); // of the output
/** A number below the scale, at -1 to 1: as far from the middle as its colour is strong. */
const tick = (amount, at) => Object.assign(element("span", {}, String(100 * amount)), { style: `left: ${50 + 50 * at}%` });

const coloured = (name, text) => Object.assign(element("span", {}, text), { style: `color: var(--${name})` });

function element(tag, attributes, ...children) {
  const el = document.createElement(tag);
  for (const [k, v] of Object.entries(attributes)) k.startsWith("on") ? el.addEventListener(k.slice(2), v) : el.setAttribute(k, v);
  el.append(...children);
  return el;
}

// --- the panel

function details() {
  const it = item(state.chosen);
  by("details").replaceChildren(...(it ? about(it) : overview()));
}

const link = (id, text) => element("button", { class: "link", onclick: () => reveal(id) }, text ?? lines(item(id)).head[0]);
const list = (pairs) => {
  const kept = pairs.filter(([, v]) => v !== "" && v !== undefined && v !== null);
  return element("dl", {}, ...kept.flatMap(([k, v]) => [element("dt", {}, k), element("dd", {}, v)]));
};

function rows(head, body) {
  const row = (tag, cells) => element("tr", {}, ...cells.map((c) => element(tag, {}, c)));
  return element("table", {}, element("thead", {}, row("th", head)), element("tbody", {}, ...body.map((r) => row("td", r))));
}

const account = (it, key, of) => SIDES.map((s) => (it[s] ? percent(of(it[s][key], s)) : "–"));

const mass = (edge, side) => (edge[side] !== null ? percent(share(edge[side], side)) : side === "balanced" ? "pruned" : "–");

function about(it) {
  const group = groups.has(it.id);
  const counted = (found, word) => Object.entries(found).map(([k, n]) => `${word(k)} × ${n}`).join(", ");
  const facts = group
    ? list([["ops", String(it.ops)], ["of them", counted(it.kinds, (k) => k.split(".")[1] ?? k)], ["edits", counted(it.actions, (k) => k.replaceAll("_", " ")) || "none"]])
    : list([["op", it.op], ["node", it.id], ["module", it.module], ["role", it.role], ["kind", it.kind.replaceAll("_", " ")], ["shape", it.shape], ["dtype", it.dtype], ["source", it.source],
            ["action", it.action.replaceAll("_", " ") || "none"], ["operands", it.operands], ["scale", it.scale === 1 ? "" : String(it.scale)], ["rule", it.rule], ["reason", it.reason]]);
  const toggle = group
    ? [element("p", {}, element("button", { onclick: () => flip(it.id) }, state.open.has(it.id) ? "close" : "open"))] : [];
  const near = (title, end, other) => {
    const found = drawn.edges.map(([, e]) => e).filter((e) => e[end] === it.id);
    if (!found.length) return [];
    const body = found.map((e) => [link(e[other]), ...SIDES.map((s) => mass(e, s))]);
    return [element("h3", {}, title), rows(["", "autograd", "balanced"], body)];
  };
  const outer = parent(it.id);
  return [
    element("h2", {}, group ? it.id : it.title),
    ...(outer ? [element("p", {}, "in ", link(outer, outer))] : []),
    facts,
    ...toggle,
    element("h3", {}, "Account, % of the output"),
    rows(["", "autograd", "balanced"], [["lost", ...account(it, "lost", part)], ["created", ...account(it, "created", part)], ["to biases", ...account(it, "bias", share)]]),
    ...near("Mass back to", "to", "from"),
    ...near("Mass back from", "from", "to"),
  ];
}

const counts = (n) => n.plain || n.balanced ? n.op !== "target" : false; // neither inputs nor the target

function overview() {
  const total = (side) => percent(part(data.nodes.reduce((sum, n) => sum + moved(n[side]), 0), side));
  const worstNodes = [...nodes.values()].filter((n) => part(moved(n.plain), "plain") >= SEEN).sort((a, b) => moved(b.plain) - moved(a.plain)).slice(0, 12);
  const key = (k, what) => [element("dt", {}, element("kbd", {}, k)), element("dd", {}, what)];
  return [
    element("h2", {}, "Gradient graph"),
    element("p", {}, `${data.nodes.filter(counts).length} ops that a gradient passes, ${data.edges.length} edges, ${data.nodes.filter((n) => n.action).length} edits. The output explained is ${Number(data.output.balanced.toPrecision(5))}.`),
    element("p", {}, `Mass lost and created on the way back: ${total("plain")} of the output under autograd, ${total("balanced")} when balanced.`),
    element("h3", {}, "Most imbalanced under autograd"),
    rows(["", "lost", "created"], worstNodes.map((n) => [link(n.id, `${n.title} (${n.id})`), percent(part(n.plain.lost, "plain")), percent(part(n.plain.created, "plain"))])),
    element("h3", {}, "Keys"),
    element("dl", {}, ...key("/", "search"), ...key("b", "autograd or balanced"), ...key("v", "imbalance or flow"), ...key("d", "direction"),
      ...key("↑ ↓ ← →", "along edges, or move"), ...key("Enter", "open or close a module"), ...key("Backspace", "close what is around"),
      ...key("+ - 0", "zoom, fit"), ...key("Esc", "let go")),
    element("p", { class: "soft" }, "Double-click opens a module, and closes its frame."),
  ];
}

// --- choosing, opening, searching

function choose(id) {
  state.chosen = id;
  by("tip").textContent = "";
  paint();
}

function flip(group) {
  state.chosen = group;
  if (!state.open.delete(group)) state.open.add(group);
  return redraw(group).then(() => drawn.elements.get(group)?.focus({ preventScroll: true }));
}

/** Open all groups around an item, select it and scroll it to the middle. */
async function reveal(id) {
  const closed = [];
  for (let g = parent(id); g; g = groups.get(g).parent) if (!state.open.has(g)) closed.push(g);
  closed.forEach((g) => state.open.add(g));
  state.chosen = id;
  if (closed.length) await redraw();
  paint();
  centre(id);
  drawn.elements.get(id).focus({ preventScroll: true });
}

const WORDS = ["id", "title", "op", "module", "source", "action", "rule"];

function search() {
  const query = by("query").value.trim().toLowerCase();
  const all = query ? [...groups.values(), ...nodes.values()] : [];
  const words = (it) => WORDS.map((k) => it[k].toLowerCase()).flatMap((w) => [w, w.replaceAll("_", " ")]); // as drawn
  const hits = all.filter((it) => words(it).some((w) => w.includes(query)));
  const exact = (it) => (it.id.toLowerCase() === query ? 0 : 1);
  const best = hits.sort((a, b) => exact(a) - exact(b)).slice(0, 50);
  const entry = (it) => element("li", {}, element("button", { onclick: () => { leave(); reveal(it.id); } },
    groups.has(it.id) ? it.id : `${it.title}  ${it.shape}`,
    element("small", {}, groups.has(it.id) ? `module, ${it.ops} ops` : [it.id, it.module, it.source, it.rule].filter(Boolean).join(" · "))));
  const rest = hits.length > best.length ? [element("li", { class: "soft" }, `and ${hits.length - best.length} more`)] : [];
  const none = query && !hits.length ? [element("li", { class: "soft" }, "nothing found")] : [];
  by("found").replaceChildren(...best.map(entry), ...rest, ...none);
}

const leave = () => { by("query").value = ""; search(); by("query").blur(); };
by("query").addEventListener("input", search);
by("query").addEventListener("keydown", (event) => {
  if (event.key === "Enter") by("found").querySelector("button")?.click();
  if (event.key === "Escape") leave();
  if (event.key === "ArrowDown") { by("found").querySelector("button")?.focus(); event.preventDefault(); }
  event.stopPropagation();
});

by("found").addEventListener("keydown", (event) => {
  const step = { ArrowDown: "nextElementSibling", ArrowUp: "previousElementSibling" }[event.key];
  if (!step) return;
  (event.target.closest("li")[step]?.querySelector("button") ?? (event.key === "ArrowUp" ? by("query") : null))?.focus();
  event.preventDefault();
  event.stopPropagation();
});

for (const name of ["side", "view", "rankdir"]) {
  by(name).addEventListener("change", (event) => set(name, event.target.value));
}
function set(name, value) {
  state[name] = value;
  by(name).querySelector(`[value=${value}]`).checked = true;
  return name === "rankdir" ? redraw() : paint();
}
by("fit").addEventListener("click", () => fit());
by("fold").addEventListener("click", () => { state.open.clear(); state.chosen = null; redraw(); });

// --- pan and zoom: the SVG's viewBox

const zoom = () => by("stage").clientWidth / drawn.svg.viewBox.baseVal.width;
const look = (x, y, scale) => {
  const { clientWidth: width, clientHeight: height } = by("stage");
  drawn.svg.setAttribute("viewBox", `${x} ${y} ${width / scale} ${height / scale}`);
};

const READABLE = 0.9, LARGEST = 1.4; // CSS pixels a point
function fit() {
  if (!drawn) return;
  const { size } = drawn;
  const { clientWidth: width, clientHeight: height } = by("stage");
  const whole = Math.min((width - 40) / size.width, (height - 40) / size.height, LARGEST);
  const scale = Math.max(whole, READABLE); // if it is too large to read as a whole, begin at the input
  const along = (start, length, room) => (length * scale > room ? start - 20 / scale : start + (length - room / scale) / 2);
  look(along(size.x, size.width, width), along(size.y, size.height, height), scale);
}

/** The middle of an item in pixels of the window. */
function middle(id) {
  const box = drawn.elements.get(id).getBoundingClientRect();
  return { x: box.x + box.width / 2, y: box.y + Math.min(box.height / 2, 20) };
}

/** Scroll so that an item lies at a place of the window. */
function keep(id, place, scale = zoom()) {
  look(drawn.svg.viewBox.baseVal.x, drawn.svg.viewBox.baseVal.y, scale);
  const now = middle(id);
  const box = drawn.svg.viewBox.baseVal;
  look(box.x + (now.x - place.x) / scale, box.y + (now.y - place.y) / scale, scale);
}

function centre(id) {
  const room = by("stage").getBoundingClientRect();
  keep(id, { x: room.x + room.width / 2, y: room.y + room.height / 2 }, Math.max(zoom(), READABLE));
}

function magnify(factor, place = null) {
  const room = by("stage").getBoundingClientRect();
  const px = (place?.x ?? room.x + room.width / 2) - room.x;
  const py = (place?.y ?? room.y + room.height / 2) - room.y;
  const box = drawn.svg.viewBox.baseVal;
  const [old, scale] = [zoom(), Math.min(8, Math.max(0.01, zoom() * factor))];
  look(box.x + px / old - px / scale, box.y + py / old - py / scale, scale);
}

function pan(dx, dy) {
  const box = drawn.svg.viewBox.baseVal;
  look(box.x - dx / zoom(), box.y - dy / zoom(), zoom());
}

const stage = by("stage");
stage.addEventListener("wheel", (event) => {
  event.preventDefault();
  const far = event.deltaMode === 1 ? 20 : 1; // lines to pixels
  if (drawn) magnify(Math.exp(-event.deltaY * far * (event.ctrlKey ? 0.01 : 0.002)), event);
}, { passive: false });

const fingers = new Map();
stage.addEventListener("pointerdown", (event) => fingers.set(event.pointerId, event));
addEventListener("pointermove", (event) => {
  const last = fingers.get(event.pointerId);
  if (!last || !drawn) return;
  const others = [...fingers.values()].filter((f) => f.pointerId !== event.pointerId);
  const gap = (e) => Math.hypot(e.clientX - others[0].clientX, e.clientY - others[0].clientY);
  if (others.length) magnify(gap(event) / (gap(last) || 1), event);
  else pan(event.clientX - last.clientX, event.clientY - last.clientY);
  fingers.set(event.pointerId, event);
});
for (const end of ["pointerup", "pointercancel"]) addEventListener(end, (event) => fingers.delete(event.pointerId));
addEventListener("resize", () => drawn && look(drawn.svg.viewBox.baseVal.x, drawn.svg.viewBox.baseVal.y, zoom()));

const under = (event) => event.target.closest?.("[data-item]")?.dataset.item ?? null;
let pressed = null;
stage.addEventListener("pointerdown", (event) => { pressed = [event.clientX, event.clientY]; });
stage.addEventListener("click", (event) => {
  const dragged = pressed && Math.hypot(event.clientX - pressed[0], event.clientY - pressed[1]) > 4;
  if (by("query").value) leave();
  if (drawn && !dragged) choose(under(event));
});
stage.addEventListener("dblclick", (event) => { if (groups.has(under(event))) flip(under(event)); });
stage.addEventListener("focusin", (event) => {
  const id = under(event);
  if (id && id !== state.chosen && event.target.matches(":focus-visible")) choose(id);
});

stage.addEventListener("pointermove", (event) => {
  const tip = by("tip");
  const id = under(event);
  const edge = event.target.closest?.("[data-edge]");
  if (fingers.size || !(id || edge)) { tip.textContent = ""; return; }
  tip.textContent = id ? hint(item(id)) : flowHint(drawn.edges[edge.dataset.edge][1]);
  tip.style.left = `${Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8)}px`;
  tip.style.top = `${Math.min(event.clientY + 14, innerHeight - tip.offsetHeight - 8)}px`;
});
stage.addEventListener("pointerleave", () => { by("tip").textContent = ""; });

const hint = (it) => [
  groups.has(it.id) ? `${it.id}, ${it.ops} ops` : [it.op, it.id].join("  "),
  it.module !== it.id && it.module, it.source,
  said(it, "plain") && `autograd ${said(it, "plain")}`,
  said(it, "balanced") && `balanced: ${said(it, "balanced")}`, it.reason,
].filter(Boolean).join("\n");
const norm = (e, s) => (e[s] === null ? "" : `, gradient norm ${Number(e[`${s}_norm`].toPrecision(3))}`);
const flowHint = (e) => [
  `${lines(item(e.from)).head[0]} ← ${lines(item(e.to)).head[0]}`, ...SIDES.map((s) => `${NAMES[s]}: ${mass(e, s)}${norm(e, s)}`),
].join("\n");

// --- keys

/** The neighbour over which the most mass flows; a cluster has none. */
function neighbour(end, other) {
  const found = drawn.edges.map(([, e]) => e).filter((e) => e[end] === state.chosen);
  const mass = (e) => Math.abs(e[state.side] ?? 0);
  return found.sort((a, b) => mass(b) - mass(a))[0]?.[other];
}

const KEYS = {
  "/": () => by("query").focus(),
  b: () => set("side", state.side === "plain" ? "balanced" : "plain"),
  v: () => set("view", state.view === "flow" ? "imbalance" : "flow"),
  d: () => set("rankdir", state.rankdir === "TB" ? "LR" : "TB"),
  "+": () => magnify(1.25), "=": () => magnify(1.25), "-": () => magnify(0.8), 0: () => fit(),
  Escape: () => choose(null),
  Enter: () => groups.has(state.chosen) && flip(state.chosen),
  " ": () => groups.has(state.chosen) && flip(state.chosen),
  Backspace: () => { const g = item(state.chosen) && parent(state.chosen); if (g) flip(g); },
};
const ARROWS = { ArrowUp: [0, 60, "to", "from", "TB"], ArrowDown: [0, -60, "from", "to", "TB"], ArrowLeft: [60, 0, "to", "from", "LR"], ArrowRight: [-60, 0, "from", "to", "LR"] };

/** Keys that a focused control needs for itself. */
const reserved = (target) => (target.matches("button") ? ["Enter", " "] : target.matches("input") ? Object.keys(ARROWS) : []);

addEventListener("keydown", (event) => {
  if (!drawn || event.ctrlKey || event.metaKey || event.altKey || reserved(event.target).includes(event.key)) return;
  if (event.key === "Escape" && event.target.closest("#find")) return leave();
  if (event.key in ARROWS) {
    const [dx, dy, end, other, rankdir] = ARROWS[event.key];
    const next = state.chosen && rankdir === state.rankdir ? neighbour(end, other) : null;
    next ? reveal(next) : pan(dx, dy);
  } else if (event.key in KEYS) KEYS[event.key]();
  else return;
  event.preventDefault();
});

redraw();
