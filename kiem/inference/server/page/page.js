// The page's own script: sends the prompt to /v1/completions and shows the stream.

const byId = (id) => document.getElementById(id);
const RANGES = ["temperature", "top_p", "min_p", "repetition_penalty", "max_tokens"];
const SHOWN_ALTERNATIVES = 5;

// Some browsers forbid it; then the page just forgets.
let memory = {};
try {
  memory = localStorage;
} catch {}

const WORDS = {
  nl: {
    busy: "Bezig…",
    reasons: { stop: "einde van de tekst", length: "maximum bereikt", stopped: "gestopt" },
    copied: "Gekopieerd.",
    lost: "Geen verbinding met de server.",
    cut: "De verbinding is verbroken.",
    refused: {
      context_length_exceeded: "De tekst is te lang voor dit model, de nieuwe tokens meegerekend.",
      429: "De server heeft het te druk. Probeer het zo nog eens.",
      503: "De server stopt.",
    },
    empty: "leeg",
    chance: "kans",
  },
  en: {
    busy: "Busy…",
    reasons: { stop: "end of the text", length: "limit reached", stopped: "stopped" },
    copied: "Copied.",
    lost: "No connection to the server.",
    cut: "The connection was lost.",
    empty: "empty",
    refused: {
      context_length_exceeded: "The text is too long for this model, the new tokens included.",
      429: "The server is too busy. Try again in a moment.",
      503: "The server is stopping.",
    },
    chance: "probability",
  },
};

let language = "nl";
let running = null; // the AbortController of the running request
let given = ""; // the text that is being continued
let tokens = []; // spans in the result, each with .steps: [{token, logprob, top}]
let chosen = -1;

function words() {
  return WORDS[language];
}

function make(tag, className, ...content) {
  const element = document.createElement(tag);
  element.className = className;
  element.append(...content);
  return element;
}

function number(value, digits) {
  return value.toLocaleString(language, { minimumFractionDigits: digits, maximumFractionDigits: digits });
}

function percent(logprob) {
  return Math.exp(logprob).toLocaleString(language, { style: "percent", maximumFractionDigits: 2 });
}

// --- languages: Dutch stands in the page, English in its data-en attributes -----------------------

function setLanguage(next) {
  for (const [property, suffix] of [["textContent", ""], ["title", "Title"], ["placeholder", "Placeholder"]]) {
    for (const element of document.querySelectorAll(`[data-en${suffix && "-" + suffix}]`)) {
      const own = element.dataset;
      own["nl" + suffix] ??= element[property];
      element[property] = own[next + suffix];
    }
  }
  language = next;
  document.documentElement.lang = next;
  const button = byId("language");
  button.textContent = next === "nl" ? "English" : "Nederlands";
  button.lang = next === "nl" ? "en" : "nl";
  for (const id of RANGES) showValue(byId(id));
  byId("status").textContent = "";
  hideDetails();
}

// --- settings --------------------------------------------------------------------------------------

function showValue(input) {
  const digits = input.step === "1" ? 0 : 2;
  const output = document.querySelector(`output[for="${input.id}"]`);
  output.textContent = number(Number(input.value), digits);
}

function settings() {
  const body = { prompt: given, stream: true, logprobs: SHOWN_ALTERNATIVES };
  for (const id of RANGES) body[id] = Number(byId(id).value);
  body.top_k = Number(byId("top_k").value || 0);
  if (byId("seed").value !== "") body.seed = Number(byId("seed").value);
  body.stop = byId("stop_text").value ? [byId("stop_text").value.replaceAll("\\n", "\n")] : [];
  return body;
}

// --- the stream ------------------------------------------------------------------------------------

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    rest += value;
    const parts = rest.split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

async function refusal(response) {
  try {
    const error = (await response.json()).error;
    return words().refused[error.code ?? response.status] ?? error.message;
  } catch {
    return `${response.status} ${response.statusText}`;
  }
}

function say(text, isBad = false) {
  byId("status").textContent = text;
  byId("status").classList.toggle("bad", isBad);
}

function setRunning(controller) {
  running = controller;
  byId("write").disabled = controller !== null;
  byId("stop").disabled = controller === null;
  byId("result").ariaBusy = String(controller !== null);
  for (const id of ["adopt", "copy"]) byId(id).disabled = controller !== null || tokens.length === 0;
}

function begin() {
  byId("result").replaceChildren(make("span", "given", given));
  tokens = [];
  chosen = -1;
  hideDetails();
}

function addPiece(text, steps) {
  const span = make("span", "token", text);
  span.steps = steps;
  span.index = tokens.length;
  tokens.push(span);
  byId("result").append(span);
  color(span);
}

function color(span) {
  // The least likely token of a piece counts.
  const logprob = Math.min(...span.steps.map((step) => step.logprob));
  const strength = byId("colors").checked ? Math.min(1, -logprob / 6) : 0;
  span.style.backgroundColor = strength ? `rgba(var(--unlikely), ${0.45 * strength})` : "";
}

async function write() {
  if (running) return;
  given = byId("prompt").value;
  const controller = new AbortController();
  begin();
  setRunning(controller);
  say(words().busy);
  let first = 0;
  let last = 0;
  let count = 0;
  let reason = null;
  let waiting = []; // steps whose text is still to come
  const done = () => {
    const rate = count > 1 ? `, ${number((1000 * (count - 1)) / (last - first), 1)} tokens/s` : "";
    return `${count} tokens${rate}`;
  };
  try {
    const response = await fetch("v1/completions", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(settings()),
      signal: controller.signal,
    });
    if (!response.ok) throw new Error(await refusal(response));
    for await (const event of events(response)) {
      if (event.error) throw new Error(event.error.message);
      const choice = event.choices[0];
      last = performance.now();
      first ||= last;
      choice.logprobs.tokens.forEach((token, i) => {
        count++;
        waiting.push({ token, logprob: choice.logprobs.token_logprobs[i], top: choice.logprobs.top_logprobs[i] });
      });
      if (choice.text) {
        addPiece(choice.text, waiting);
        waiting = [];
      }
      reason = choice.finish_reason ?? reason;
      say(done());
    }
    say(`${done()} (${words().reasons[reason] ?? words().cut})`, reason === null);
  } catch (error) {
    if (controller.signal.aborted) say(`${done()} (${words().reasons.stopped})`);
    else say(error instanceof TypeError ? words().lost : error.message, true);
  } finally {
    setRunning(null);
  }
}

// --- probabilities ---------------------------------------------------------------------------------

function visible(token) {
  return token.replaceAll("\n", "⏎").replaceAll("\t", "⇥").replaceAll(" ", "␣") || words().empty;
}

function stepTable(step) {
  const alternatives = Object.entries(step.top).sort((a, b) => b[1] - a[1]);
  if (!alternatives.some(([token]) => token === step.token)) alternatives.push([step.token, step.logprob]);
  const table = make("table", "");
  for (const [token, logprob] of alternatives) {
    const bar = make("span", "bar");
    bar.style.width = `${100 * Math.exp(logprob)}%`;
    const cells = [visible(token), bar, percent(logprob)].map((content) => make("td", "", content));
    table.append(make("tr", token === step.token ? "taken" : "", ...cells));
  }
  return table;
}

function showDetails(span) {
  const details = byId("details");
  tokens[chosen]?.classList.remove("chosen");
  chosen = span.index;
  span.classList.add("chosen");
  const parts = [];
  for (const step of span.steps.slice(-3)) {
    const line = `${visible(step.token)}: ${words().chance} ${percent(step.logprob)}`;
    parts.push(make("p", "", line), stepTable(step));
  }
  details.replaceChildren(...parts);
  details.hidden = false;
  placeDetails();
}

function placeDetails() {
  const details = byId("details");
  if (details.hidden) return;
  const span = tokens[chosen];
  const place = span.getClientRects()[0] ?? span.getBoundingClientRect();
  const size = details.getBoundingClientRect();
  const below = place.bottom + 6 + size.height <= innerHeight;
  details.style.top = `${Math.max(4, below ? place.bottom + 6 : place.top - size.height - 6)}px`;
  details.style.left = `${Math.max(8, Math.min(place.left, innerWidth - size.width - 8))}px`;
}

function hideDetails() {
  tokens[chosen]?.classList.remove("chosen");
  byId("details").hidden = true;
}

function move(event) {
  const steps = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 10, ArrowUp: -10 };
  const last = tokens.length - 1;
  if (last < 0) return;
  let next = event.key === "Home" ? 0 : event.key === "End" ? last : null;
  if (event.key in steps) next = Math.max(0, Math.min(last, chosen + steps[event.key]));
  if (next === null) return;
  event.preventDefault();
  tokens[next].scrollIntoView({ block: "nearest" });
  showDetails(tokens[next]);
}

// --- what people do --------------------------------------------------------------------------------

function resultText() {
  return given + tokens.map((span) => span.textContent).join("");
}

function question() {
  const prompt = byId("prompt");
  if (!prompt.value.startsWith("Vraag: ")) {
    prompt.value = `Vraag: ${prompt.value.trim()}\nAntwoord:`;
  }
  byId("stop_text").value = "\\nVraag:";
  prompt.focus();
}

byId("form").addEventListener("submit", (event) => {
  event.preventDefault();
  write();
});
byId("stop").addEventListener("click", () => running?.abort());
byId("question").addEventListener("click", question);
byId("adopt").addEventListener("click", () => {
  byId("prompt").value = resultText();
  byId("prompt").focus();
});
byId("copy").addEventListener("click", async () => {
  await navigator.clipboard.writeText(resultText());
  say(words().copied);
});
byId("language").addEventListener("click", () => {
  setLanguage(language === "nl" ? "en" : "nl");
  memory.language = language;
});
byId("colors").addEventListener("change", () => {
  memory.colors = byId("colors").checked;
  tokens.forEach(color);
});
for (const id of RANGES) byId(id).addEventListener("input", (event) => showValue(event.target));

const result = byId("result");
result.addEventListener("pointerover", (event) => {
  if (event.target.steps) showDetails(event.target);
});
result.addEventListener("pointerleave", (event) => {
  if (event.pointerType === "mouse") hideDetails();
});
result.addEventListener("keydown", move);
result.addEventListener("blur", hideDetails);
addEventListener("scroll", placeDetails, { passive: true });

addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    write();
  } else if (event.key === "Escape") {
    if (!byId("details").hidden) hideDetails();
    else running?.abort();
  }
});

const preferred = navigator.language.toLowerCase().startsWith("nl") ? "nl" : "en";
setLanguage(memory.language ?? preferred);
byId("colors").checked = memory.colors === "true";
