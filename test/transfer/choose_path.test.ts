import { test } from 'uvu';
import * as assert from 'uvu/assert';
import { rankOffers } from '../../src/transfer/choose_path.js';
import type { PathOffer } from '../../src/transfer/messages.js';

const ucx: PathOffer = { path: 'ucx', version: '1.13.1', address: Buffer.from('a'), key: 'k' };
const tcp: PathOffer = { path: 'tcp', port: 7000, key: 'k' };
const shm: PathOffer = { path: 'shm', gateSlots: 4 };
const host = { onGpu: false, ucxVersion: '1.13.0' };

test("decode's order is kept, and a release of the same series is the same", () => {
  assert.equal(rankOffers([ucx, tcp], host, undefined), { usable: [ucx, tcp], passedOver: [] });
  assert.equal(rankOffers([ucx, tcp], host, 'ucx').usable, [ucx]);
  assert.equal(rankOffers([shm], host, 'shm').usable, [shm]);
});

test('what is passed over is told with its reason', () => {
  const { usable, passedOver } = rankOffers([ucx, tcp], { ...host, ucxVersion: null }, undefined);
  assert.equal(usable, [tcp]);
  assert.equal(passedOver.map(({ path }) => path), ['ucx']);
  assert.match(rankOffers([ucx, tcp], { ...host, ucxVersion: '1.17.0' }, undefined).passedOver[0]!.reason, /UCX 1\.17\.0 on this side and 1\.13\.1 on decode's/);
});

test('nothing left to use is refused with what is missing', () => {
  const refusal = (...args: Parameters<typeof rankOffers>) => {
    try {
      rankOffers(...args);
    } catch (error) {
      return (error as Error).message;
    }
    throw new Error('expected a refusal');
  };
  assert.match(refusal([tcp], host, 'shm'), /the path to decode is tcp, at least shm is required/);
  assert.match(refusal([ucx, tcp], { ...host, ucxVersion: null }, 'ucx'), /the path to decode is tcp, at least ucx is required \(ucx: this side uses no UCX/);
  assert.match(refusal([ucx, tcp], { ...host, onGpu: true }, undefined), /no path that can be used \(ucx: KV in GPU memory .*; tcp: KV in GPU memory/);
  assert.match(refusal([], host, undefined), /decode offers no path/);
});

test.run();
