import { test } from 'uvu';
import * as assert from 'uvu/assert';
import { StopStrings } from '../../../src/roles/router/stop_strings.js';

/** Feeds pieces; returns what was let out at each and whether it stopped. */
function feed(stops: string[], pieces: string[]): { out: string[]; stopped: boolean; rest: string } {
  const finder = new StopStrings(stops);
  const out: string[] = [];
  for (const piece of pieces) {
    const { text, stopped } = finder.push(piece);
    out.push(text);
    if (stopped) return { out, stopped, rest: '' };
  }
  return { out, stopped: false, rest: finder.flush() };
}

test('without stop strings everything passes at once', () => {
  assert.equal(feed([], ['a', 'b']), { out: ['a', 'b'], stopped: false, rest: '' });
});

test('a stop string over three pieces', () => {
  assert.equal(feed(['END'], ['x E', 'N', 'D y']), { out: ['x ', '', ''], stopped: true, rest: '' });
});

test('what looked like a beginning is let out once it is not', () => {
  assert.equal(feed(['aab'], ['a', 'a', 'a', 'c']), { out: ['', '', 'a', 'aac'], stopped: false, rest: '' });
  assert.equal(feed(['END'], ['EN']), { out: [''], stopped: false, rest: 'EN' });
});

test('the first of several wins, whatever their order and overlap', () => {
  assert.equal(feed(['cd', 'abc'], ['xabcd']).out, ['x']);
  assert.equal(feed(['bcd', 'c'], ['abcd']).out, ['a']);
});

test('against the definition, on random text cut at random places', () => {
  let state = 12345;
  const random = (n: number) => { state = (Math.imul(state, 1103515245) + 12345) >>> 0; return (state >>> 8) % n; };
  const word = (length: number) => Array.from({ length }, () => 'ab'[random(2)]).join('');
  for (let round = 0; round < 3000; round++) {
    const stops = Array.from({ length: 1 + random(4) }, () => word(1 + random(6)));
    const pieces = Array.from({ length: random(12) }, () => word(random(4)));
    const text = pieces.join('');
    const ends = stops.map((stop) => text.indexOf(stop)).filter((at) => at >= 0);
    const { out, stopped, rest } = feed(stops, pieces);
    assert.is(stopped, ends.length > 0);
    const seen = out.join('') + rest;
    assert.ok(text.startsWith(seen));
    if (!stopped) assert.is(seen, text);
    for (const stop of stops) assert.not.ok(seen.includes(stop), `${stop} in ${seen}`);
  }
});

test.run();
