import { test } from 'uvu';
import * as assert from 'uvu/assert';
import { rankOffers } from '../../src/transfer/choose_path.js';
import type { PathOffer } from '../../src/transfer/messages.js';

const ucx: PathOffer = { path: 'ucx', version: '1.13.1', address: Buffer.from('a'), key: 'k' };
const nixl: PathOffer = { path: 'nixl', backends: ['UCX', 'Mooncake'], ucxVersion: '1.20.0', address: Buffer.from('a'), key: 'k' };
const tcp: PathOffer = { path: 'tcp', port: 7000, key: 'k' };
const shm: PathOffer = { path: 'shm', gateSlots: 4 };
const host = { onGpu: false, ucxVersion: '1.13.0', nixl: { backends: ['UCX'], ucxVersion: '1.20.1' } };

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
  assert.match(refusal([ucx, tcp], { ...host, onGpu: true, ucxVersion: null }, undefined), /no path that can be used \(ucx: this side uses no UCX.*; tcp: KV in GPU memory/);
  assert.match(refusal([], host, undefined), /decode offers no path/);
});

test('NIXL needs a backend that both sides have, and required it is that or nothing', () => {
  assert.equal(rankOffers([nixl, ucx, tcp], host, undefined).usable, [nixl, ucx, tcp]);
  assert.equal(rankOffers([nixl, ucx, tcp], host, 'ucx').usable, [nixl, ucx]);
  assert.equal(rankOffers([nixl, ucx, tcp], host, 'nixl').usable, [nixl]);
  const refusal = (offers: PathOffer[], abilities: typeof host | { nixl: null }) => {
    assert.throws(() => rankOffers(offers, { ...host, ...abilities }, 'nixl'), (error: Error) => (said = error.message) !== '');
    return said;
  };
  let said = '';
  assert.match(refusal([shm], host), /the path to decode is shm, nixl and nothing else is required/);
  assert.match(refusal([ucx, tcp], host), /the path to decode is ucx, nixl and nothing else is required/);
  assert.match(refusal([nixl, ucx], { nixl: null }), /nixl and nothing else is required \(nixl: this side uses no NIXL/);
  assert.match(refusal([nixl], { ...host, nixl: { ...host.nixl, backends: ['GDS'] } }), /NIXL has GDS on this side and UCX, Mooncake on decode's/);
  assert.match(refusal([nixl], { ...host, nixl: { ...host.nixl, ucxVersion: '1.13.1' } }), /NIXL has UCX 1\.13\.1 under it on this side and 1\.20\.0 on decode's/);
  assert.equal(rankOffers([nixl], { ...host, nixl: { ...host.nixl, ucxVersion: 'unknown' } }, 'nixl').usable, [nixl]);
});

test.run();
