import { test } from 'uvu';
import * as assert from 'uvu/assert';
import { decodeMessage, encodeMessage, type Message } from '../../src/transfer/messages.js';
import { handshake, smallLayout } from '../support/handoff.js';
import { xorshift } from '../native/kv_reference.js';

const who = handshake(smallLayout({ form: 'tpla', ranks: 2 }));
const prefill = { promptTokens: 9, pooledTokens: 1, skippedTokens: 2, computedTokens: 6, queueMs: 0.25, computeMs: 12.5 };
const MESSAGES: Message[] = [
  { type: 'hello', handshake: who },
  { type: 'welcome', handshake: who, pages: 12, offers: [{ path: 'shm', gateSlots: 64 }, { path: 'ucx', version: '1.13.1', address: Buffer.from([0, 255, 7]), key: 'k' }, { path: 'tcp', port: 7000, key: 'k' }] },
  { type: 'refused', code: 'HANDSHAKE_REFUSED', message: 'no' },
  { type: 'open', session: 'abc', path: 'shm' },
  { type: 'granted', session: 'abc', tokens: [16, 70], rank: 1, leaseMs: 500, slot: 3, epoch: 7, pages: [Int32Array.from([1, 2, 3]), Int32Array.from([]), Int32Array.from([-5])] },
  { type: 'pushed', session: 'abc', layers: [0, 3], tokens: [16, 32], checksums: BigUint64Array.from([0n, 2n ** 64n - 1n, 7n]) },
  { type: 'commit', session: 'abc', pushes: 1, sinceMs: 1.5, firstTokens: [{ token: 5, logprob: -0.5, top: [{ token: 6, logprob: -1 }] }], prefill },
  { type: 'committed', session: 'abc' },
  { type: 'fail', session: 'abc', reason: 'ünïcode' },
  { type: 'cancel', session: 'abc', code: 'CANCELLED', message: '' },
  { type: 'alive' },
  { type: 'welcome', handshake: who, pages: 12, offers: [{ path: 'pull', devices: ['GPU-1'] }] },
  { type: 'lend', path: 'cuda-ipc', pages: 9, handles: ['ab', 'cd'] },
  { type: 'ready', session: 'abc', layers: [0, 3], tokens: [16, 32], pages: Int32Array.from([4, 0, -1]) },
  { type: 'taken', session: 'abc', layers: [0, 3], tokens: [16, 32], bytes: 4096 },
  { type: 'hello', handshake: handshake(smallLayout({ form: 'tpla', ranks: 2, shared: [0, 64, 16] })) },
];

test('every message survives the wire', () => {
  for (const message of MESSAGES) assert.equal(decodeMessage(encodeMessage(message)), message, message.type);
  const unasked = { ...MESSAGES[6]!, firstTokens: [{ token: 1, logprob: NaN, top: [] }] } as Message;
  const back = decodeMessage(encodeMessage(unasked));
  assert.ok(back.type === 'commit' && Number.isNaN(back.firstTokens[0]!.logprob));
});

const refusal = (bytes: Uint8Array): { code: string; message: string } | null => {
  try {
    decodeMessage(bytes);
    return null;
  } catch (error) {
    return error as { code: string; message: string };
  }
};

/** A message with its head rewritten. */
function forged(message: Message, change: (head: Record<string, unknown>) => unknown, tail?: Uint8Array): Uint8Array {
  const bytes = Buffer.from(encodeMessage(message));
  const length = bytes.readUInt32LE(0);
  const head = JSON.parse(bytes.subarray(4, 4 + length).toString());
  const text = Buffer.from(JSON.stringify(change(head)));
  const prefix = Buffer.alloc(4);
  prefix.writeUInt32LE(text.length);
  return Buffer.concat([prefix, text, tail ?? bytes.subarray(4 + length)]);
}

test('each field is checked, and the refusal names it', () => {
  const granted = MESSAGES[4]!;
  const pushed = MESSAGES[5] as Extract<Message, { type: 'pushed' }>;
  const cases: [Uint8Array, RegExp][] = [
    [new Uint8Array(0), /no message/],
    [new Uint8Array([255, 255, 255, 255, 1]), /a head of 4294967295 bytes/],
    [Buffer.concat([Buffer.from([2, 0, 0, 0]), Buffer.from('{]')]), /not JSON/],
    [forged(granted, () => []), /not an object/],
    [forged(granted, () => null), /not an object/],
    [forged(granted, (head) => ({ ...head, type: 'constructor' })), /type "constructor" is unknown/],
    [forged(granted, (head) => ({ ...head, extra: 1 })), /extra is not a field/],
    [forged(granted, (head) => ({ ...head, tokens: [5, 5] })), /tokens is \[5,5\]/],
    [forged(granted, (head) => ({ ...head, tokens: [0, 2 ** 40] })), /tokens/],
    [forged(granted, (head) => ({ ...head, rank: 64 })), /rank is 64/],
    [forged(granted, (head) => ({ ...head, pages: [2 ** 30] })), /more were announced/],
    [forged(granted, (head) => ({ ...head, pages: [-1] })), /pages/],
    [forged(granted, (head) => ({ ...head, pages: Array.from({ length: 65 }, () => 0) })), /pages/],
    [forged(granted, (head) => ({ ...head, pages: [1] })), /bytes follow/],
    [forged(granted, (head) => ({ ...head, session: 'x'.repeat(5000) })), /session/],
    [encodeMessage({ ...pushed, layers: [3, 1] }), /layers is \[3,1\]/],
    [encodeMessage({ ...pushed, tokens: [-1, 1] }), /tokens is \[-1,1\]/],
    [encodeMessage({ ...pushed, session: 'x'.repeat(300) }), /name of 300 bytes/],
    [encodeMessage({ ...pushed, session: '\n' }), /not ASCII/],
    [encodeMessage(pushed).subarray(0, 20), /20 bytes are no push/],
    [encodeMessage(pushed).subarray(0, 28), /name of 3 bytes in a push of 28/],
    [encodeMessage(pushed).subarray(0, 35), /bytes follow/],
    [forged(MESSAGES[0]!, (head) => ({ ...head, handshake: { ...who, protocol: 1 } })), /protocol 1, this side speaks 3/],
    [forged(MESSAGES[0]!, (head) => ({ ...head, handshake: { ...who, layout: { ...who.layout, form: 'gqa' } } })), /handshake\.layout\.form is "gqa", expected one of mla/],
    [forged(MESSAGES[0]!, (head) => ({ ...head, handshake: { ...who, identity: { name: 'a' } } })), /handshake\.identity\.fingerprint is nothing/],
    [forged(MESSAGES[1]!, (head) => ({ ...head, offers: [{ path: 'pigeon' }] })), /offers\[0\]\.path/],
    [forged(MESSAGES[2]!, (head) => ({ ...head, code: 'toString' })), /code/],
    [forged(MESSAGES[6]!, (head) => ({ ...head, firstTokens: [{ token: 1, logprob: 'x', top: [] }] })), /firstTokens\[0\]\.logprob/],
    [forged(MESSAGES[6]!, (head) => ({ ...head, prefill: { ...prefill, queueMs: null } })), /prefill\.queueMs/],
  ];
  for (const [bytes, reason] of cases) {
    const error = refusal(bytes);
    assert.is(error?.code, 'PROTOCOL', String(reason));
    assert.match(error!.message, reason);
  }
});

test('mutated messages are refused or mean something valid, never anything else', () => {
  const random = xorshift(20);
  let refused = 0;
  for (let round = 0; round < 30_000; round++) {
    let bytes = Buffer.from(encodeMessage(MESSAGES[random() % MESSAGES.length]!));
    for (let edits = 1 + random() % 4; edits > 0; edits--) {
      const at = random() % bytes.length;
      switch (random() % 4) {
        case 0: bytes[at] = random() & 255; break;
        case 1: bytes = Buffer.concat([bytes.subarray(0, at), bytes.subarray(at + 1 + random() % 8)]); break;
        case 2: bytes = Buffer.concat([bytes.subarray(0, at), Buffer.from([random() & 255]), bytes.subarray(at)]); break;
        default: bytes = Buffer.concat([bytes.subarray(0, at), bytes.subarray(random() % bytes.length)]); break;
      }
      if (bytes.length === 0) bytes = Buffer.alloc(1);
    }
    try {
      // What is accepted must be in the canonical form: encoding it again and reading that gives the same message.
      const message = decodeMessage(bytes);
      assert.equal(decodeMessage(encodeMessage(message)), message);
    } catch (error) {
      assert.is((error as { code?: string }).code, 'PROTOCOL', (error as Error).stack);
      refused++;
    }
  }
  assert.ok(refused > 10_000, `${refused} of 30000 were refused`);
});

test.run();
