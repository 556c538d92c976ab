// Event streams of all pages of a browser within its six connections to a host: a hidden page has none, three pages
// that are visible have one each, and the others ask again and again. The server replays by id, so that none misses
// an event.
"use strict";
class SharedStream extends EventTarget {
  static OPEN = 3; // streams that stay open; the other connections are for pages and what they load
  static ASK_EVERY = 2000;
  static GONE_AFTER = 3 * SharedStream.ASK_EVERY; // ms without a message of another page

  // address(once): where the stream continues; `once`: the server ends it when it has sent what there is.
  constructor(address, names, onMode) {
    super();
    this.address = address;
    this.names = names;
    this.onMode = onMode;
    this.readyState = EventSource.OPEN; // htmx reconnects what is closed
    this.id = `${Date.now().toString(36).padStart(12, "0")}-${Math.random()}`; // older pages come first
    this.others = new Map();
    this.channel = new BroadcastChannel("parley-streams");
    this.channel.onmessage = ({data}) => this.heard(data);
    this.follow = () => this.update();
    this.leave = () => this.say("bye");
    document.addEventListener("visibilitychange", this.follow);
    addEventListener("pagehide", this.leave);
    addEventListener("pageshow", this.follow);
    this.timer = setInterval(this.follow, SharedStream.ASK_EVERY);
    this.say("hello");
    setTimeout(this.follow, 50); // others have answered by then
  }

  say(what) { if (!document.hidden || what === "bye") this.channel.postMessage({what, id: this.id}); }

  heard({what, id}) {
    if (what === "bye") this.others.delete(id); else this.others.set(id, Date.now());
    if (what === "hello") this.say("here");
    if (what !== "here") this.update();
  }

  get mode() {
    if (document.hidden) return "closed";
    const alive = [...this.others].filter(([id, seen]) => id < this.id && Date.now() - seen < SharedStream.GONE_AFTER);
    return alive.length < SharedStream.OPEN ? "open" : "asking";
  }

  update() {
    if (this.readyState === EventSource.CLOSED) return;
    const mode = this.mode;
    if (mode === "closed" && this.current !== "closed") this.say("bye"); else this.say("here");
    if (mode === this.current && mode !== "asking") return;
    if (mode === "asking" && this.source && this.current === "asking") return; // the last answer is not whole yet
    this.current = mode;
    this.onMode(mode);
    this.disconnect();
    if (mode !== "closed") this.connect(mode === "asking");
  }

  connect(once) {
    const source = this.source = new EventSource(this.address(once));
    const pass = event => this.dispatchEvent(event instanceof MessageEvent
      ? new MessageEvent(event.type, {data: event.data, lastEventId: event.lastEventId}) : new Event(event.type));
    for (const name of ["open", ...this.names]) source.addEventListener(name, pass);
    source.addEventListener("end", () => { if (this.source === source) this.disconnect(); });
    source.addEventListener("error", event => {
      pass(event);
      // The browser gives up where a response is no stream, such as the refusal of a session that is void.
      if (source.readyState === EventSource.CLOSED && this.source === source) { this.source = null; this.current = null; }
    });
  }

  disconnect() {
    if (this.source) this.source.close();
    this.source = null;
  }

  close() {
    this.readyState = EventSource.CLOSED;
    this.disconnect();
    clearInterval(this.timer);
    document.removeEventListener("visibilitychange", this.follow);
    removeEventListener("pagehide", this.leave);
    removeEventListener("pageshow", this.follow);
    this.say("bye");
    this.channel.close();
  }
}
