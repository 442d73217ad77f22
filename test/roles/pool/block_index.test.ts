import { test } from 'uvu';
import * as assert from 'uvu/assert';
import { BlockIndex } from '../../../src/roles/pool/block_index.js';

/** Reserves and commits; returns the slots. */
function store(index: BlockIndex, client: string, ids: string[], pin = false): number[] {
  return index.reserve(client, ids, pin).map((reservation, i) => {
    if (reservation.state !== 'write') throw new Error(`${ids[i]} is ${reservation.state}`);
    index.commit(client, { id: ids[i]!, slot: reservation.slot, index: 0, tokens: 64, checksum: `sum ${ids[i]}` }, pin);
    return reservation.slot;
  });
}

test('a block is visible once committed, and pinned while looked up', () => {
  const index = new BlockIndex(4);
  const [write] = index.reserve('p', ['a'], false);
  assert.equal(index.lookup('d', ['a']), []);
  assert.equal(index.counts, { total: 4, used: 1, cached: 0 });
  assert.is(write!.state, 'write');
  const slot = (write as { slot: number }).slot;
  index.commit('p', { id: 'a', slot, index: 0, tokens: 64, checksum: '7' }, false);
  assert.equal(index.counts, { total: 4, used: 0, cached: 1 });
  assert.equal(index.lookup('d', ['a', 'b']), [{ slot, index: 0, tokens: 64, checksum: '7' }]);
  assert.equal(index.counts, { total: 4, used: 1, cached: 0 });
  index.unpin('d', [slot]);
  assert.equal(index.counts, { total: 4, used: 0, cached: 1 });
  assert.equal(index.check(), []);
});

test('lookup stops at the first gap', () => {
  const index = new BlockIndex(4);
  store(index, 'p', ['a', 'c']);
  assert.is(index.lookup('d', ['a', 'b', 'c']).length, 1);
});

test('the least recently used unpinned block makes room; pinned ones stay', () => {
  const index = new BlockIndex(3);
  store(index, 'p', ['a', 'b', 'c']);
  const [a] = index.lookup('d', ['a']);
  store(index, 'p', ['d']);
  assert.equal(index.lookup('d', ['b']), [], 'b was the oldest without a pin');
  assert.is(index.evictions, 1);
  store(index, 'p', ['e']);
  store(index, 'p', ['f'], false);
  assert.is(index.lookup('d', ['a']).length, 1);
  index.unpin('d', [a!.slot, a!.slot]);
  assert.equal(index.counts, { total: 3, used: 0, cached: 3 });
  assert.equal(index.check(), []);
});

test('when every slot is pinned there is no room', () => {
  const index = new BlockIndex(2);
  store(index, 'd', ['a', 'b'], true);
  assert.equal(index.reserve('p', ['c'], false), [{ state: 'full' }]);
  assert.equal(index.counts, { total: 2, used: 2, cached: 0 });
});

test('a block that is here or being written is not written twice', () => {
  const index = new BlockIndex(4);
  store(index, 'p', ['a']);
  index.reserve('p', ['b'], false);
  const [a, b] = index.reserve('q', ['a', 'b'], true);
  assert.is(a!.state, 'present');
  assert.is(b!.state, 'busy');
  assert.equal(index.counts, { total: 4, used: 2, cached: 0 });
});

test('of a prefix the tail is evicted first', () => {
  const index = new BlockIndex(3);
  store(index, 'p', ['a', 'b', 'c']);
  index.unpin('d', index.lookup('d', ['a', 'b', 'c']).map(({ slot }) => slot));
  store(index, 'p', ['x']);
  assert.is(index.lookup('d', ['a', 'b', 'c']).length, 2);
});

test('a client that is gone holds nothing: pins, reservations, several of each', () => {
  const index = new BlockIndex(6);
  store(index, 'd', ['a', 'b'], true);
  index.lookup('d', ['a']);
  index.lookup('e', ['a']);
  const [half] = index.reserve('d', ['half'], false);
  index.dropClient('d');
  assert.equal(index.counts, { total: 6, used: 1, cached: 1 });
  assert.throws(() => index.commit('d', { id: 'half', slot: (half as { slot: number }).slot, index: 0, tokens: 64, checksum: '' }, false), /not reserved/);
  index.dropClient('e');
  assert.equal(index.counts, { total: 6, used: 0, cached: 2 });
  assert.equal(index.check(), []);
});

test('a client cannot commit, or give back, what another has', () => {
  const index = new BlockIndex(4);
  const [write] = index.reserve('p', ['a'], false);
  const slot = (write as { slot: number }).slot;
  assert.throws(() => index.commit('q', { id: 'a', slot, index: 0, tokens: 64, checksum: '' }, false), /not reserved/);
  index.unpin('q', [slot, 77, -1]);
  assert.ok(index.isWriting('p', 'a', slot));
  index.unpin('p', [slot]);
  assert.equal(index.counts, { total: 4, used: 0, cached: 0 });
});

test('a dropped block is invisible at once, its slot comes back with the last pin', () => {
  const index = new BlockIndex(2);
  const [slot] = store(index, 'p', ['a'], true);
  index.lookup('d', ['a']);
  assert.is(index.evict(['a', 'unknown']), 1);
  assert.equal(index.lookup('e', ['a']), []);
  const again = store(index, 'p', ['a']);
  assert.is.not(again[0], slot);
  index.unpin('p', [slot!]);
  assert.is(index.counts.used, 1);
  index.unpin('d', [slot!]);
  assert.equal(index.counts, { total: 2, used: 0, cached: 1 });
  assert.is(index.lookup('e', ['a']).length, 1);
  assert.equal(index.check(), []);
});

test('evicting all leaves pinned blocks', () => {
  const index = new BlockIndex(4);
  store(index, 'p', ['a', 'b']);
  store(index, 'p', ['c'], true);
  assert.is(index.evict(), 2);
  assert.equal(index.counts, { total: 4, used: 1, cached: 0 });
});

test('a random history of three clients that come and go leaks no slot', () => {
  let state = 4242;
  const random = (below: number) => { state = (Math.imul(state, 1103515245) + 12345) >>> 0; return (state >>> 8) % below; };
  const index = new BlockIndex(10);
  const clients = ['x', 'y', 'z'];
  const held = new Map(clients.map((client) => [client, [] as { id: string; slot: number; writing: boolean }[]]));
  for (let step = 0; step < 20_000; step++) {
    const client = clients[random(3)]!;
    const mine = held.get(client)!;
    const id = `block ${random(25)}`;
    const action = random(6);
    if (action === 0) for (const { slot } of index.lookup(client, [id])) mine.push({ id, slot, writing: false });
    else if (action === 1) {
      const pin = random(2) === 0;
      const [got] = index.reserve(client, [id], pin);
      if (got!.state === 'write') mine.push({ id, slot: got!.slot, writing: true });
      else if (got!.state === 'present' && pin) mine.push({ id, slot: got!.slot, writing: false });
    } else if (action === 2) {
      const at = mine.findIndex(({ writing }) => writing);
      if (at >= 0) {
        const pin = random(2) === 0;
        index.commit(client, { id: mine[at]!.id, slot: mine[at]!.slot, index: 0, tokens: 64, checksum: '' }, pin);
        if (pin) mine[at]!.writing = false;
        else mine.splice(at, 1);
      }
    } else if (action === 3 && mine.length > 0) index.unpin(client, [mine.splice(random(mine.length), 1)[0]!.slot]);
    else if (action === 4 && random(20) === 0) index.evict([id]);
    else if (action === 5 && random(200) === 0) { index.dropClient(client); mine.length = 0; }
    const distinct = new Set([...held.values()].flat().map(({ slot }) => slot));
    assert.is(index.counts.used, distinct.size);
    if (step % 100 === 0) assert.equal(index.check(), []);
  }
  clients.forEach((client) => index.dropClient(client));
  assert.is(index.counts.used, 0);
  assert.equal(index.check(), []);
});

test.run();
