// stdin, stdout and stderr: each cell begins with ones that lead to its result, whatever the one before it did to them.
'use strict';
const fs = require('fs');
const { Writable } = require('stream');

const { process, console, Atomics, Buffer, Int32Array, Object, SharedArrayBuffer } = globalThis;
const { O_APPEND, O_RDONLY, O_WRONLY } = fs.constants;
const all = [];
for (const [fd, name, flags] of [[0, 'stdin', O_RDONLY], [1, 'stdout', O_WRONLY | O_APPEND], [2, 'stderr', O_WRONLY | O_APPEND]]) {
  try {
    const { dev, ino } = fs.fstatSync(fd);
    const spare = `/proc/self/fd/${fs.openSync(`/proc/self/fd/${fd}`, flags)}`;
    all.push({ fd, name, flags, dev, ino, spare, stream: fd > 0 ? watched(process[name]) : null });
  } catch {
    // where it can't be opened again, a cell that closes it is the last one that is heard
  }
}

function write(fd, text) {
  for (let data = Buffer.from(text); data.length > 0;) {
    try {
      data = data.subarray(fs.writeSync(fd, data));
    } catch (error) {
      if (error.code !== 'EAGAIN') return;
      Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0, 5); // the pipe is full: let the agent read
    }
  }
}

// A stream that was ended looks as if it could be written to again, and can't.
function watched(stream) {
  const state = { stream, ended: false };
  stream.once('finish', () => { state.ended = true; });
  return state;
}

function leads({ fd, dev, ino }) {
  try {
    const found = fs.fstatSync(fd);
    return found.ino === ino && found.dev === dev;
  } catch {
    return false;
  }
}

function reopen({ fd, spare, flags }) {
  const below = [];
  try {
    try {
      fs.closeSync(fd);
    } catch {
      // it is closed
    }
    for (let opened = fs.openSync(spare, flags); opened < fd; opened = fs.openSync(spare, flags)) below.push(opened);
  } catch {
    // a cell has closed the spare one too
  }
  below.forEach((opened) => fs.closeSync(opened));
}

// What a cell has put in the place of a stream stays there.
function renewStream(outlet) {
  if (outlet.stream === null) return;
  const { name, fd, stream: { stream, ended } } = outlet;
  if (!ended && !stream.writableEnded && !stream.destroyed) return;
  const fresh = new Writable({
    write(data, encoding, done) {
      write(fd, data);
      done();
    },
  });
  outlet.stream = watched(Object.assign(fresh, { fd, _type: 'pipe', _isStdio: true }));
  if (process[name] !== stream) return;
  Object.defineProperty(process, name, { value: fresh, configurable: true, enumerable: true, writable: false });
  console[`_${name}`] = fresh;
}

module.exports = {
  write,
  // The descriptors are what they were in the beginning.
  reopen: () => all.filter((outlet) => !leads(outlet)).forEach(reopen),
  // And so are the streams, but for those that a cell has put in their place.
  renew: () => all.forEach(renewStream),
};
