// The interpreter of JavaScript whose state persists: one Node process, cells one at a time.
//
// Speaks what worker.py speaks: asks and answers of fixed shape on descriptor 3 (docs/protocol.md, "Agent and interpreter").
// Cells run in the global scope: declarations stay, and top-level await works as in Node's own REPL. A cell is answered for
// when what it has started has ended (pending.js).
'use strict';
const { EventEmitter } = require('events');
const Module = require('module');
const net = require('net');
const path = require('path');
const { pathToFileURL } = require('url');
const util = require('util');
const vm = require('vm');

// A cell may put something else in the place of any global.
const { process, BigInt, Buffer, JSON, Number, Object, setTimeout, setImmediate } = globalThis;
process.execArgv = []; // children of the user's get no flag of ours
const outlets = require('outlets'); // first: what it makes would later be things of the first cell that prints
const pending = require('pending');
const source = require('source');
const { write } = outlets;

const ASK_BYTES = 9;
const LIMIT_BYTES = 4; // ahead of the code: how many milliseconds the cell may take
const ANSWER_BYTES = 30;
const AWAIT = 8;
const AWAIT_MS = 500;

class Exit {
  constructor(code) { this.code = code; }
}

// What a program finds around it. Paths are the working directory's, as it is now.

const main = new Module('.', null);
process.mainModule = main;
main.filename = path.join(source.here(), 'cell');
main.paths = Module._nodeModulePaths(source.here());

let place = null;
let required = null;
function requirer() {
  if (place !== source.here()) {
    place = source.here();
    required = Module.createRequire(`${place}/`);
  }
  return required;
}

function changing(name, get) {
  const set = (value) => Object.defineProperty(globalThis, name, { value, writable: true, configurable: true });
  Object.defineProperty(globalThis, name, { get, set, configurable: true, enumerable: false });
}
const fileName = () => path.join(source.here(), `cell${cell?.number ?? number}`);
// Done with the first cell: `node -e` itself puts some of these back when it has run us.
function furnish() {
  changing('require', requirer);
  changing('module', () => main);
  changing('exports', () => main.exports);
  changing('__filename', fileName);
  changing('__dirname', () => source.here());
  changing(source.CALL, () => source.call);
  changing(source.META, () => ({
    __proto__: null,
    dirname: source.here(),
    filename: fileName(),
    resolve: (name) => (/^\.{0,2}\//.test(name)
      ? pathToFileURL(path.resolve(source.here(), name)).href
      : resolved(requirer().resolve(name))),
    url: pathToFileURL(fileName()).href,
  }));
}
const resolved = (found) => (path.isAbsolute(found) ? pathToFileURL(found).href : `node:${found.replace(/^node:/, '')}`);

// What a cell comes to.

let number = 0;
let cell = null; // that is not answered for yet
let interrupts = 0; // that have arrived since the latest cell began

// The user's lines of a stack, none of ours or of Node's.
function shown(error) {
  if (!util.types.isNativeError(error) || typeof error.stack !== 'string') return util.inspect(error);
  const lines = error.stack.split('\n')
    .filter((line) => line !== '' && !/^\s+at .*(node:|\[eval\]|instavm-|Script\.runIn)/.test(line));
  const { cause } = error;
  return cause === undefined ? lines.join('\n') : `${lines.join('\n')}\n[cause]: ${shown(cause)}`;
}

function told(error) {
  try {
    return shown(error);
  } catch {
    return 'an error that cannot be shown';
  }
}

// `late`: outside of the cell's own lines. Then it may be of an earlier cell, which was answered for long ago.
function failed(whose, error, late = '') {
  if (error instanceof Exit) return;
  if (error?.code === 'ERR_SCRIPT_EXECUTION_INTERRUPTED') {
    interrupts += 1; // Node took the signal itself
    interrupted(whose);
    return;
  }
  write(2, `Uncaught ${late}${told(error)}\n`);
  if (whose === cell && cell !== null) answer(1);
}

function interrupted(whose) {
  if (whose !== cell || cell === null) return;
  write(2, 'Interrupted\n');
  answer(130);
}

process.on('SIGINT', () => {
  interrupts += 1;
  interrupted(cell);
});

// The module `domain`, which others may load, has a listener that does nothing but clear up.
const others = (listener) => ![onException, onRejection].includes(listener) && !/^domain/.test(listener.name);
const heard = (name) => process.listeners(name).some(others);

// A program's own listeners take the place of ours, as they take that of Node's.
function onException(error) {
  const whose = pending.owner();
  pending.lost();
  if (heard('uncaughtException')) return;
  failed(whose, error);
}
function onRejection(error, promise) {
  if (heard('unhandledRejection')) return;
  if (heard('uncaughtException')) {
    if (!(error instanceof Exit)) process.emit('uncaughtException', error, 'unhandledRejection', promise);
    return;
  }
  failed(pending.owner(promise), error, '(in promise) ');
}
function listen() {
  const listeners = { uncaughtException: onException, unhandledRejection: onRejection };
  for (const [name, listener] of Object.entries(listeners)) {
    if (!process.listeners(name).includes(listener)) process.on(name, listener);
  }
}

// A program that ends itself ends its call: at once, even if it catches what unwinds it.
const leave = process.reallyExit.bind(process);
process.exit = (code) => {
  const exitCode = Number(code ?? process.exitCode ?? 0) & 255;
  const whose = pending.owner();
  pending.byUs(() => setImmediate(() => {
    if (whose === cell && cell !== null) answer(exitCode, true);
    else if (whose !== null) pending.leave(whose, true);
  }));
  throw new Exit(exitCode);
};

function quiet(value) {
  if (value === undefined || value instanceof EventEmitter) return true;
  return typeof value === 'object' && value !== null && ['Timeout', 'Immediate'].includes(value.constructor?.name);
}

function show(value) {
  if (!quiet(value)) write(1, `${util.inspect(value)}\n`);
}

// The cell's own lines have run, to this value. What they have started may go on.
function finish(one, value) {
  if (one !== cell) return;
  let asked = util.types.isPromise(value);
  try {
    if (asked) {
      const shows = (result) => {
        asked = false;
        if (one === cell) show(result);
      };
      value.then(shows).catch((error) => { asked = false; failed(one, error); });
    } else {
      show(value);
    }
  } catch (error) {
    failed(one, error);
    return;
  }
  line.unref();
  one.giveUp = pending.whenIdle(one, () => asked, () => {
    if (one !== cell) return;
    if (asked) write(1, `${util.inspect(value)}\n`);
    answer(Number(process.exitCode ?? 0) & 255);
  });
}

// `stop`: what the cell has started ends with it, as it does when a program fails.
function answer(exitCode, stop = exitCode !== 0) {
  const one = cell;
  cell = null;
  line.ref();
  one.giveUp?.();
  pending.leave(one, stop);
  process.exitCode = undefined;
  const spent = process.cpuUsage(one.cpu);
  const data = Buffer.alloc(ANSWER_BYTES);
  data.writeInt32BE(exitCode, 2);
  data.writeDoubleBE(Number(process.hrtime.bigint() - one.wall) / 1e9, 6);
  data.writeDoubleBE((spent.user + spent.system) / 1e6, 14);
  data.writeBigUInt64BE(BigInt(process.resourceUsage().maxRSS), 22);
  pending.byUs(() => {
    line.write(data);
    outlets.reopen();
  });
}

async function linked(one, { script, imports, waiting }) {
  await source.link(imports);
  if (one !== cell) return undefined;
  const value = script.runInThisContext({ displayErrors: false, breakOnSigint: true });
  return { value: waiting ? (await value)?.value : value };
}

function run(one, code) {
  try {
    const ready = source.prepared(code, `cell${one.number}`);
    if (ready.imports.length > 0) {
      linked(one, ready).then((done) => done && finish(one, done.value)).catch((error) => failed(one, error));
      return;
    }
    const value = ready.script.runInThisContext({ displayErrors: false, breakOnSigint: true });
    if (ready.waiting) value.then((done) => finish(one, done?.value)).catch((error) => failed(one, error));
    else finish(one, value);
  } catch (error) {
    failed(one, error);
  }
}

function perform(code, env, timeoutMs) {
  Object.assign(process.env, env);
  if (number === 0) furnish();
  number += 1;
  interrupts = 0;
  pending.byUs(outlets.renew);
  listen();
  cell = new pending.Cell(number, timeoutMs);
  cell.wall = process.hrtime.bigint();
  cell.cpu = process.cpuUsage();
  process.argv.splice(1, process.argv.length, fileName());
  pending.begin(cell, () => run(cell, code));
}

// An interrupt that was meant for an earlier cell must have come before the next one begins. One that came at the very
// end of a script is swallowed by Node, which then interrupts the next script, whatever that is: let it be this loop.
function afterInterrupt(then, left) {
  if (interrupts === 0 && left > 0) {
    setTimeout(afterInterrupt, 1, then, left - 1);
    return;
  }
  if (interrupts === 0) {
    try {
      vm.runInThisContext('for (let i = 0; i < 1e7; i++);', { breakOnSigint: true, displayErrors: false });
    } catch {
      // it was
    }
  }
  then();
}

let inbox = Buffer.alloc(0);
const line = new net.Socket({ fd: 3, readable: true, writable: true });
line.on('end', () => leave(0));
line.on('data', (data) => {
  inbox = Buffer.concat([inbox, data]);
  if (inbox.length < ASK_BYTES) return;
  const codeEnd = ASK_BYTES + inbox.readUInt32BE(1);
  const end = codeEnd + inbox.readUInt32BE(5);
  if (inbox.length < end) return;
  const timeoutMs = inbox.readUInt32BE(ASK_BYTES);
  const code = inbox.toString('utf8', ASK_BYTES + LIMIT_BYTES, codeEnd);
  const env = end > codeEnd ? JSON.parse(inbox.toString('utf8', codeEnd, end)) : {};
  const flags = inbox[0];
  inbox = inbox.subarray(end);
  if (flags & AWAIT) afterInterrupt(() => perform(code, env, timeoutMs), AWAIT_MS);
  else perform(code, env, timeoutMs);
});
