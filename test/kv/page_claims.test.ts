import { test } from 'uvu';
import * as assert from 'uvu/assert';
import { isSafe, type PageClaim } from '../../src/kv/page_claims.js';

const claim = (held: number, need: number): PageClaim => ({ held: [held], need: [need] });

test('safe where some order lets everyone end', () => {
  assert.ok(isSafe([0], []));
  assert.ok(isSafe([3], [claim(5, 3)]));
  assert.ok(isSafe([3], [claim(1, 8), claim(2, 5), claim(3, 3)]), 'the last ends first, then the second, then the first');
  assert.not.ok(isSafe([3], [claim(1, 9), claim(2, 5), claim(3, 3)]), 'eight pages come together, nine are needed');
  assert.not.ok(isSafe([2], [claim(5, 3), claim(5, 3)]));
});

test('lanes count separately', () => {
  assert.ok(isSafe([1, 1], [{ held: [1, 0], need: [1, 1] }, { held: [0, 0], need: [2, 1] }]));
  assert.not.ok(isSafe([2, 0], [{ held: [0, 1], need: [0, 1] }]));
});

test('granting only what stays safe lets random sequences all end', () => {
  let state = 99;
  const random = (below: number) => { state = (Math.imul(state, 1664525) + 1013904223) >>> 0; return (state >>> 8) % below; };
  for (let round = 0; round < 50; round++) {
    const total = 20;
    let free = total;
    const sequences = Array.from({ length: 12 }, () => ({ held: 0, need: 1 + random(total) }));
    let live = sequences;
    for (let step = 0; live.length > 0; step++) {
      assert.ok(step < 10_000, 'deadlock');
      for (const sequence of live) {
        if (free === 0) break;
        const after = live.map((other) => claim(other.held + Number(other === sequence), other.need - Number(other === sequence)));
        if (!isSafe([free - 1], after)) continue;
        free -= 1;
        sequence.held += 1;
        sequence.need -= 1;
      }
      for (const done of live.filter(({ need }) => need === 0)) free += done.held;
      live = live.filter(({ need }) => need > 0);
    }
    assert.is(free, total);
  }
});

test.run();
