import { test } from 'uvu';
import * as assert from 'uvu/assert';
import { merge } from '../../../src/roles/router/merge.js';

const tick = () => new Promise<void>((resolve) => setImmediate(resolve));

test('all items of all sources, each source in order', async () => {
  const source = async function* (name: string, count: number) {
    for (let i = 0; i < count; i++) {
      if (i % 3 === 0) await tick();
      yield `${name}${i}`;
    }
  };
  const items: string[] = [];
  for await (const item of merge([source('a', 5), source('b', 0), source('c', 9)], 8)) items.push(item);
  assert.is(items.length, 14);
  for (const name of ['a', 'c']) {
    const own = items.filter((item) => item.startsWith(name));
    assert.equal(own, own.map((_, i) => `${name}${i}`));
  }
});

test('a source runs at most one item ahead of the consumer', async () => {
  let made = 0;
  const endless = async function* () { for (;;) yield made++; };
  const merged = merge([endless(), endless()], 8);
  for (let i = 0; i < 10; i++) {
    await merged.next();
    for (let t = 0; t < 5; t++) await tick();
    assert.ok(made <= i + 1 + 3, `${made} made, ${i + 1} consumed`);
  }
  await merged.return(undefined);
});

test('an error of one source is thrown, and leaving ends the others', async () => {
  let ended = 0;
  const fine = async function* () {
    try {
      for (;;) { await tick(); yield 1; }
    } finally {
      ended++;
    }
  };
  const broken = async function* () { await tick(); yield 2; throw new Error('broken'); };
  const error = await (async () => { for await (const _ of merge<number>([fine(), broken(), fine()], 8)); })().then(() => null, (thrown: Error) => thrown);
  assert.is(error?.message, 'broken');
  for (let t = 0; t < 10; t++) await tick();
  assert.is(ended, 2);
});

test('so many run at a time, and all come to run', async () => {
  let running = 0;
  let most = 0;
  const source = async function* (i: number) {
    most = Math.max(most, ++running);
    for (let step = 0; step < 3; step++) {
      await tick();
      yield i;
    }
    running--;
  };
  const seen = new Set<number>();
  for await (const i of merge(Array.from({ length: 10 }, (_, i) => source(i)), 3)) seen.add(i);
  assert.equal([seen.size, most], [10, 3]);
});

test.run();
