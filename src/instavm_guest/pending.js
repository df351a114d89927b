// What JavaScript cells have started: whose it is, and when a call has nothing left to wait for.
//
// Node itself knows when nothing is left that keeps its loop alive ('beforeExit'). For that to tell the end of one call, whatever
// belongs to earlier calls, or is meant to last (servers), is unref'd as it is made; the cell's own things are not.
'use strict';
const { createHook, executionAsyncResource } = require('async_hooks');
const { promiseHooks } = require('v8');
const { owner_symbol: OWNER } = require('internal/async_hooks').symbols;

const { process, performance, setInterval, clearInterval, setImmediate, clearTimeout, clearImmediate } = globalThis;
const { Map, Object, Set } = globalThis;
const { nextTick } = process;
const SWEEP_MS = 50; // Node tells of the end of all, not of one: so often a call that waits looks at what it waits for
const THINGS_MAX = 1000; // of one cell, before those that have ended are forgotten
const ENDLESS_MAX_MS = 10000; // how long a call waits for what may go on for ever, when all else has ended

const PLAIN = new Set(['TickObject', 'Microtask']); // keep no loop alive
const SERVERS = new Set(['TCPSERVERWRAP', 'PIPESERVERWRAP']);
const CONNECTIONS = new Set(['TCPWRAP', 'PIPEWRAP']);
const FINITE = new Set(['PROCESSWRAP', 'WORKER', 'Immediate']);

// Says of any object whose it is, where nobody sees it: what AsyncLocalStorage adds to promises is shown by console.log.
class Given { constructor(object) { return object; } }
class Mark extends Given {
  #cell;
  constructor(object, cell) { super(object); this.#cell = cell; }
  static put(object, cell) {
    if (#cell in object) object.#cell = cell; // made once, used again
    else new Mark(object, cell);
  }
  static of(object) { return #cell in object ? object.#cell : undefined; }
}

let running; // the cell whose code runs now
const outer = []; // and those whose code it interrupts
const servers = new Map(); // the number of a listening server -> its cell
let current = null;
let ours = false;

class Cell {
  constructor(number, timeoutMs) {
    this.number = number;
    this.endlessMs = Math.min(ENDLESS_MAX_MS, timeoutMs / 2);
    this.over = false; // it has answered
    this.stopped = false; // it failed: what it started goes on no more
    this.started = 0; // things so far
    this.things = new Map(); // what can be unref'd -> { type, at: started when it was made }
    this.callbacks = new Map(); // function of a timer -> `started` when a timer of it was first seen
    this.again = new Set(); // functions that set a timer of themselves
    this.quiet = 0; // since when only endless things are left
  }
}

// Do something of our own: what it makes is no cell's.
function byUs(work) {
  ours = true;
  try {
    return as(undefined, work);
  } finally {
    ours = false;
  }
}

function as(cell, work) {
  const before = running;
  running = cell;
  try {
    return work();
  } finally {
    running = before;
  }
}

function begin(cell, work) {
  current = cell;
  as(cell, work);
}

// Whose code runs now, or whose `promise` is; the cell that is not answered for yet, if nobody can tell.
function owner(promise) {
  return (promise === undefined ? running : Mark.of(promise)) ?? current;
}

// An error has ended what ran, without a word to `after`.
function lost() {
  running = undefined;
  outer.length = 0;
}

function enter(object) {
  outer.push(running);
  running = Mark.of(object);
}

function after() {
  running = outer.pop();
}

function init(id, type, trigger, resource) {
  if (ours) return;
  const server = CONNECTIONS.has(type) ? servers.get(trigger) : undefined;
  const cell = server ?? owner();
  if (cell === null) return;
  Mark.put(resource, cell);
  if (PLAIN.has(type)) return;
  if (SERVERS.has(type)) servers.set(id, cell);
  const tracked = typeof resource.unref === 'function';
  if (cell.over || server !== undefined || SERVERS.has(type)) {
    if (tracked) nextTick(cell.stopped ? end : release, resource);
    if (cell.over) return;
  }
  cell.started += 1;
  if (!tracked || server !== undefined || SERVERS.has(type)) return;
  cell.things.set(resource, { type, at: cell.started });
  if (cell.things.size % THINGS_MAX === 0) forget(cell);
}

// Promises are followed by V8's own hooks. Node before 24 adds its own for them, which leave traces that console.log shows.
const inner = require('internal/promise_hooks');
const add = inner.createHook;
inner.createHook = () => () => {};
createHook({ init, before: () => enter(executionAsyncResource()), after, trackPromises: false }).enable();
inner.createHook = add;
promiseHooks.createHook({
  init(promise) {
    const cell = running ?? (ours ? null : current);
    if (cell !== null) Mark.put(promise, cell);
  },
  before: enter,
  after,
});

function release(thing) {
  thing.unref();
}

function end(thing) {
  const kind = thing.constructor?.name;
  if (kind === 'Timeout') clearTimeout(thing);
  else if (kind === 'Immediate') clearImmediate(thing);
  else release(thing);
}

function forget(cell) {
  for (const thing of cell.things.keys()) {
    if (thing._destroyed || !thing.hasRef()) cell.things.delete(thing);
  }
}

// Whether it may go on for ever, as far as anybody can tell.
function endless(cell, thing, { type, at }) {
  if (FINITE.has(type)) return false;
  if (type === 'Timeout') {
    const callback = thing._onTimeout;
    if (!cell.callbacks.has(callback)) cell.callbacks.set(callback, cell.started);
    else if (at > cell.callbacks.get(callback)) cell.again.add(callback);
    return thing._repeat !== null || cell.again.has(callback);
  }
  if (type !== 'TCPWRAP') return true;
  const socket = thing[OWNER];
  if (!socket || socket.connecting || socket._httpMessage) return false;
  // a socket of fetch holds the loop only while a request is under way
  return !Object.getOwnPropertySymbols(socket).some((symbol) => symbol.description === 'client');
}

function sweep(cell, busy) {
  forget(cell);
  const lasting = [];
  for (const [thing, made] of cell.things) {
    if (endless(cell, thing, made)) lasting.push(thing);
    else busy = true;
  }
  if (busy || process._getActiveRequests().length > 0) cell.quiet = performance.now();
  else if (performance.now() - cell.quiet >= cell.endlessMs) lasting.forEach(release);
}

// Call `done` once nothing is left that `cell` has to wait for. `asks()`: whether it waits for a promise as well.
// Returns what gives that up.
function whenIdle(cell, asks, done) {
  if (cell.started === 0 && !asks() && process.listenerCount('beforeExit') === 0) {
    const turn = byUs(() => setImmediate(done)); // by then Node has told of promises that nobody caught
    return () => clearImmediate(turn);
  }
  let before = 0;
  const mark = () => { before = cell.started; };
  const idle = () => {
    if (cell.started === before) done(); // else a listener of the cell's own has begun something
  };
  cell.quiet = performance.now();
  const ticker = byUs(() => setInterval(() => byUs(() => sweep(cell, asks())), SWEEP_MS).unref());
  process.prependListener('beforeExit', mark);
  process.on('beforeExit', idle);
  return () => {
    clearInterval(ticker);
    process.removeListener('beforeExit', mark);
    process.removeListener('beforeExit', idle);
  };
}

// The call is over: what it leaves goes on without anybody waiting for it, or ends if `stop`.
function leave(cell, stop) {
  cell.over = true;
  cell.stopped = stop;
  if (current === cell) current = null;
  for (const thing of cell.things.keys()) (stop ? end : release)(thing);
  cell.things.clear();
  cell.callbacks.clear();
}

module.exports = { Cell, begin, byUs, leave, lost, owner, whenIdle };
