// The persistent JavaScript helper: `node node.js`, started by the agent.
//
// Commands run through V8's own REPL mode (the inspector's Runtime.evaluate), which is what gives
// top-level await and lets `const` and `let` be declared again. Messages are those of protocol.py.
'use strict';

const crypto = require('node:crypto');
const fs = require('node:fs');
const inspector = require('node:inspector');
const { createRequire } = require('node:module');
const net = require('node:net');
const path = require('node:path');
const util = require('node:util');
const vm = require('node:vm');

// Resources that keep a script alive under `node script.js`, and so keep a command running.
// A server that listens does not: it goes on behind later commands.
const WORK = new Set([
  'Timeout', 'Immediate', 'FSReqCallback', 'FSReqPromise', 'GetAddrInfoReqWrap', 'ProcessWrap',
  'TCPSocketWrap', 'TLSWrap', 'HTTPCLIENTREQUEST', 'Worker', 'ZlibTransform',
]);
const POLL_MS = 5;

class Channel {
  constructor(fd, onMessage) {
    this.socket = new net.Socket({ fd, readable: true, writable: true });
    let buffer = Buffer.alloc(0);
    this.socket.on('data', (part) => {
      buffer = buffer.length ? Buffer.concat([buffer, part]) : part;
      while (buffer.length >= 8) {
        const json = buffer.readUInt32LE(0);
        const end = 8 + json + buffer.readUInt32LE(4);
        if (buffer.length < end) break;
        const body = JSON.parse(buffer.subarray(8, 8 + json).toString());
        const blob = buffer.subarray(8 + json, end);
        buffer = buffer.subarray(end);
        onMessage(body, blob);
      }
    });
    this.socket.on('close', () => reallyExit(0));
    this.socket.on('error', () => reallyExit(0));
  }

  send(body, blob = Buffer.alloc(0)) {
    const text = Buffer.from(JSON.stringify(body));
    const head = Buffer.alloc(8);
    head.writeUInt32LE(text.length, 0);
    head.writeUInt32LE(blob.length, 4);
    this.socket.write(Buffer.concat([head, text, blob]));
  }
}

class Exit {
  constructor(code) { this.code = code; }
}

const reallyExit = process.exit.bind(process);
const session = new inspector.Session();
session.connect();

// Randomness -----------------------------------------------------------------------------------
// Node cannot reseed its generators, and a restored clone would repeat them, so scripts get
// generators that draw on the kernel's, which the agent renews.

const urandom = fs.openSync('/dev/urandom', 'r');

function fill(view) {
  const bytes = Buffer.from(view.buffer ?? view, view.byteOffset ?? 0, view.byteLength);
  for (let at = 0; at < bytes.length;) at += fs.readSync(urandom, bytes, at, bytes.length - at);
  return view;
}

let pool = Buffer.alloc(0);

function random() {
  if (pool.length < 8) pool = fill(Buffer.alloc(512));
  const high = pool.readUInt32LE(0) >>> 5;
  const low = pool.readUInt32LE(4) >>> 6;
  pool = pool.subarray(8);
  return (high * 0x4000000 + low) / 0x20000000000000;
}

function randomBytes(size, callback) {
  const bytes = fill(Buffer.alloc(size));
  if (!callback) return bytes;
  process.nextTick(callback, null, bytes);
  return undefined;
}

function randomUUID() {
  const bytes = randomBytes(16);
  bytes[6] = (bytes[6] & 0x0f) | 0x40;
  bytes[8] = (bytes[8] & 0x3f) | 0x80;
  return bytes.toString('hex').replace(/^(.{8})(.{4})(.{4})(.{4})(.{12})$/, '$1-$2-$3-$4-$5');
}

Math.random = random;
crypto.randomBytes = crypto.pseudoRandomBytes = randomBytes;
crypto.randomFillSync = (view, offset = 0, size = view.byteLength - offset) => {
  fill(new Uint8Array(view.buffer ?? view, (view.byteOffset ?? 0) + offset, size));
  return view;
};
crypto.randomUUID = randomUUID;
crypto.randomFill = (view, ...rest) => {
  const callback = rest.pop();
  process.nextTick(callback, null, crypto.randomFillSync(view, ...rest));
};
crypto.randomInt = (low, high, callback) => {
  if (high === undefined || typeof high === 'function') [low, high, callback] = [0, low, high];
  const number = low + Math.floor(random() * (high - low));
  if (!callback) return number;
  process.nextTick(callback, null, number);
  return undefined;
};
crypto.webcrypto.getRandomValues = fill;
crypto.webcrypto.randomUUID = randomUUID;

// Running --------------------------------------------------------------------------------------

let running = null; // { settle(code) }
let echoed; // the text of the command's value, if it has one

// Bytes of JSON that a command's results may have, as in rich.py.
const MAX_RESULTS = 8 << 20;

// What the command has shown, as JSON of one result; nothing without a value.
function takeShown() {
  if (echoed === undefined) return Buffer.alloc(0);
  // Through a buffer, which replaces surrogates without their other half: readers of JSON refuse them.
  const whole = (text) => Buffer.from(JSON.stringify([{ 'text/plain': Buffer.from(text).toString() }]));
  const shown = echoed.length > MAX_RESULTS ? undefined : whole(echoed);
  echoed = undefined;
  return shown?.length <= MAX_RESULTS ? shown : whole('[thaw: this result is too large to be shown]');
}

function show(error) {
  let text = error instanceof Error ? error.stack ?? String(error) : `Uncaught ${util.inspect(error)}`;
  text = text.split('\n').filter((line) => !/^\s+at .*(node:|\(?.*thaw\/runner\/|node\.js:\d+)/.test(line)).join('\n');
  if (error instanceof Error && Object.keys(error).length) {
    const extra = Object.fromEntries(Object.entries(error).filter(([key]) => key !== 'stack'));
    text += ` ${util.inspect(extra)}`;
  }
  process.stderr.write(text + '\n');
}

// Handed to the inspector, which otherwise only knows values by reference.
let taken;
globalThis[Symbol.for('thaw.take')] = (value) => { taken = value; };

function take(remote) {
  if (remote.objectId === undefined) {
    if (remote.unserializableValue === undefined) return remote.value;
    return vm.runInThisContext(`(${remote.unserializableValue})`);
  }
  // A strict function, so that `this` is not boxed.
  const functionDeclaration = "function () { 'use strict'; globalThis[Symbol.for('thaw.take')](this); }";
  session.post('Runtime.callFunctionOn', { functionDeclaration, objectId: remote.objectId });
  session.post('Runtime.releaseObject', { objectId: remote.objectId });
  const value = taken;
  taken = undefined;
  return value;
}

function evaluate(source) {
  return new Promise((resolve, reject) => {
    session.post(
      'Runtime.evaluate',
      { expression: source, replMode: true, awaitPromise: true, userGesture: true },
      (failure, answer) => {
        if (failure) reject(new Error(failure.message));
        else if (answer.exceptionDetails) reject(take(answer.exceptionDetails.exception));
        else resolve({ value: take(answer.result) });
      },
    );
  });
}

// Resolves when everything that was written has left, or never will.
const drained = (stream) => new Promise((done) => stream.write('', () => done()));

function isWorking() {
  const kinds = process.getActiveResourcesInfo?.() ?? [];
  return kinds.some((kind) => WORK.has(kind)) && !kinds.includes('TCPServerWrap');
}

async function run(source) {
  const interrupted = new Promise((_, reject) => {
    running = { settle: reject };
  });
  const own = running;
  interrupted.catch(() => {});
  let pending;
  globalThis[Symbol.for('thaw.begin')] = () => { pending = evaluate(source); };
  try {
    // Only code inside of such a script can be broken off by SIGINT while it does not yield.
    new vm.Script("globalThis[Symbol.for('thaw.begin')]()").runInThisContext({ breakOnSigint: true });
    const finish = async () => {
      let { value } = await pending;
      const isPromise = util.types.isPromise(value);
      if (isPromise) value = await value;
      if (value !== undefined) {
        const text = util.inspect(value);
        process.stdout.write(text + '\n');
        // One that was interrupted may come to its value during a later command.
        if (running === own) echoed = text;
      }
      while (isWorking()) await new Promise((done) => setTimeout(done, POLL_MS).unref());
      return 0;
    };
    return await Promise.race([finish(), interrupted]);
  } catch (error) {
    if (error instanceof Exit) return error.code;
    if (error?.code === 'ERR_SCRIPT_EXECUTION_INTERRUPTED') {
      process.stderr.write('Interrupted\n');
      return 130;
    }
    show(error);
    return 1;
  } finally {
    running = null;
  }
}

process.on('SIGINT', () => {
  const error = new Error('interrupted');
  error.code = 'ERR_SCRIPT_EXECUTION_INTERRUPTED';
  running?.settle(error);
});
process.on('uncaughtException', (error) => (running ? running.settle(error) : show(error)));
process.on('unhandledRejection', (error) => (running ? running.settle(error) : show(error)));
process.exit = (code = process.exitCode ?? 0) => {
  throw new Exit(Number(code) & 0xff);
};

globalThis.require = createRequire(path.join(process.cwd(), 'repl.js'));
globalThis.module = { exports: {} };
globalThis.exports = globalThis.module.exports;
globalThis.__filename = path.join(process.cwd(), '[command]');
globalThis.__dirname = process.cwd();
delete process.env.NODE_CHANNEL_FD;

// The agent ---------------------------------------------------------------------------------

const number = (name) => {
  const fd = Number(process.env[name]);
  delete process.env[name];
  return fd;
};

const commands = new Channel(number('THAW_COMMANDS'), async (body, blob) => {
  if (body.op === 'freeze') return commands.send({ op: 'frozen' });
  if (body.op === 'warm') return commands.send({ op: 'warmed', missing: {} });
  if (body.op !== 'execute') return undefined;
  const before = { ...process.env };
  Object.assign(process.env, body.env);
  const spent = process.cpuUsage();
  const exit = await run(blob.toString());
  // What is still on its way belongs to this command, not to the next.
  await Promise.all([process.stdout, process.stderr].map(drained));
  const { user, system } = process.cpuUsage(spent);
  for (const name of Object.keys(body.env ?? {})) {
    if (name in before) process.env[name] = before[name];
    else delete process.env[name];
  }
  const shown = takeShown();
  return commands.send({ op: 'done', exit, cpu_us: user + system, out: 0, err: 0, rich: shown.length }, shown);
});

const attend = new Channel(number('THAW_ATTEND'), (body) => {
  if (body.op !== 'renew') return;
  Object.assign(process.env, body.env);
  pool = Buffer.alloc(0);
  attend.send({ op: 'renewed' });
});

commands.send({ op: 'ready', version: process.versions.node });
