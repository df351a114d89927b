// The interpreter of JavaScript whose state persists: one Node process, cells one at a time.
//
// Speaks what worker.py speaks: asks and answers of fixed shape on descriptor 3 (docs/protocol.md, "Agent and interpreter").
// Cells run in the global scope: declarations stay, and top-level await works as in Node's own REPL.
'use strict';
(() => {
  const fs = require('fs');
  const net = require('net');
  const util = require('util');
  const vm = require('vm');
  const { createRequire } = require('module');
  // What Node's REPL makes of a cell with `await` in it. Not for the user's own programs: children get no such flag.
  const { processTopLevelAwait } = require('internal/repl/await');
  process.execArgv = [];

  const ASK_BYTES = 9;
  const ANSWER_BYTES = 30;
  const AWAIT = 8;
  const AWAIT_MS = 500;
  const later = setTimeout;

  class Exit {
    constructor(code) { this.code = code; }
  }
  class Interrupted {}

  const write = (fd, text) => {
    for (let data = Buffer.from(text); data.length > 0;) {
      try {
        data = data.subarray(fs.writeSync(fd, data));
      } catch (error) {
        if (error.code !== 'EAGAIN') return;
        Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0, 5); // the pipe is full: let the agent read
      }
    }
  };

  globalThis.require = createRequire(process.cwd() + '/');
  globalThis.module = { exports: {} };
  globalThis.exports = globalThis.module.exports;

  let stop = null; // ends the cell that is waiting for something
  let interrupts = 0; // that have arrived since the latest cell began
  process.on('SIGINT', () => {
    interrupts += 1;
    if (stop) stop(new Interrupted());
  });
  process.on('uncaughtException', (error) => {
    if (error instanceof Exit) leave(error.code);
    write(2, `Uncaught ${shown(error)}\n`);
  });
  process.on('unhandledRejection', (error) => write(2, `Uncaught (in promise) ${shown(error)}\n`));
  const leave = process.reallyExit.bind(process);
  process.exit = (code) => { throw new Exit(Number(code ?? process.exitCode ?? 0) & 255); };

  // The user's lines of a stack, none of ours or of Node's.
  function shown(error) {
    if (!(error instanceof Error) || typeof error.stack !== 'string') return util.inspect(error);
    return error.stack.split('\n')
      .filter((line) => line !== '' && !/^\s+at .*(node:|\[eval\]|Script\.runIn)/.test(line))
      .join('\n');
  }

  function settled(failed, error, value) {
    if (!failed) {
      if (value !== undefined) write(1, util.inspect(value) + '\n');
      return 0;
    }
    if (error instanceof Exit) return error.code;
    const inScript = error && error.code === 'ERR_SCRIPT_EXECUTION_INTERRUPTED';
    if (error instanceof Interrupted || inScript) {
      if (inScript) interrupts += 1; // Node took the signal itself
      write(2, 'Interrupted\n');
      return 130;
    }
    write(2, `Uncaught ${shown(error)}\n`);
    return 1;
  }

  let number = 0;

  function evaluated(code, filename) {
    const options = { displayErrors: false, breakOnSigint: true };
    let script = null;
    let waiting = false;
    try {
      script = new vm.Script(code, { filename });
    } catch (error) {
      const rewritten = code.includes('await') ? processTopLevelAwait(code) : null;
      if (rewritten === null) throw error;
      script = new vm.Script(rewritten, { filename });
      waiting = true;
    }
    const value = script.runInThisContext(options);
    return waiting ? value.then((done) => done?.value) : { plain: value };
  }

  async function run(code) {
    number += 1;
    try {
      const value = evaluated(code, `cell${number}`);
      if ('plain' in value) return settled(false, null, value.plain);
      const stopped = new Promise((_, reject) => { stop = reject; });
      return settled(false, null, await Promise.race([value, stopped]));
    } catch (error) {
      return settled(true, error);
    } finally {
      stop = null;
    }
  }

  function perform(code, env) {
    Object.assign(process.env, env);
    interrupts = 0;
    const wall = process.hrtime.bigint();
    const cpu = process.cpuUsage();
    run(code).then((exitCode) => {
      const spent = process.cpuUsage(cpu);
      const answer = Buffer.alloc(ANSWER_BYTES);
      answer.writeInt32BE(exitCode, 2);
      answer.writeDoubleBE(Number(process.hrtime.bigint() - wall) / 1e9, 6);
      answer.writeDoubleBE((spent.user + spent.system) / 1e6, 14);
      answer.writeBigUInt64BE(BigInt(process.resourceUsage().maxRSS), 22);
      line.write(answer);
    });
  }

  // An interrupt that was meant for an earlier cell must have come before the next one begins. One that came at the very
  // end of a script is swallowed by Node, which then interrupts the next script, whatever that is: let it be this loop.
  function afterInterrupt(then, left) {
    if (interrupts === 0 && left > 0) {
      later(afterInterrupt, 1, then, left - 1);
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
    const code = inbox.toString('utf8', ASK_BYTES, codeEnd);
    const env = end > codeEnd ? JSON.parse(inbox.toString('utf8', codeEnd, end)) : {};
    const flags = inbox[0];
    inbox = inbox.subarray(end);
    if (flags & AWAIT) afterInterrupt(() => perform(code, env), AWAIT_MS);
    else perform(code, env);
  });
})();
